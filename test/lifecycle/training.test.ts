// A training in a process of its own: its live bytes over 1000 steps, what it leaves behind, the event loop and the
// abort signal while a long step runs.
import { spawnSync } from 'node:child_process';
import { resolve } from 'node:path';
import { expect, it, vi } from 'vitest';
import { temporaryDirectory } from '../temporary.js';

vi.setConfig({ testTimeout: 120_000 });

const root = resolve(import.meta.dirname, '../..');
const work = temporaryDirectory();

const url = (path: string) => JSON.stringify(new URL(`file://${resolve(root, path)}`).href);
const prelude = `
import { readFileSync } from 'node:fs';
import { distill, elastify, pretrain } from ${url('dist/index.js')};
import { loadAddon } from ${url('dist/native/index.js')};
const work = ${JSON.stringify(work)};
const shipped = ${JSON.stringify(resolve(root, 'models/tiny'))};
const text = readFileSync(shipped + '/train.txt', 'utf8').slice(0, 60000);
`;

/** Runs the script to its end and returns what it printed as JSON. */
function run(script: string) {
  const args = ['--input-type=module', '-e', prelude + script];
  const child = spawnSync(process.execPath, args, { encoding: 'utf8', timeout: 110_000 });
  expect(child).toMatchObject({ status: 0, stderr: '' });
  return JSON.parse(child.stdout);
}

it('1000 steps hold their live bytes constant, and leave none behind', () => {
  const { bytes, steps, memory } = run(`
    const data = { kind: 'documents', documents: text.slice(0, 20000).split('\\n\\n') };
    const model = { model_type: 'llama', hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2,
      num_attention_heads: 2, max_position_embeddings: 32, tie_word_embeddings: true };
    await pretrain({ model, tokenizer: { vocabSize: 300 }, out: work + '/tiny', data, steps: 2, batchTokens: 32,
      sequenceLength: 32 });
    await elastify(work + '/tiny', { kind: 'elastiformer' }, { out: work + '/plan' });
    const bytes = new Set();
    let steps = 0;
    await distill({ plan: work + '/plan', out: work + '/elastic', data, steps: 1000, batchTokens: 32, sequenceLength: 16,
      saveEvery: 500, calibrationTokens: 256, onEvent: (event) => {
        if (event.type !== 'step') return;
        steps++;
        bytes.add(event.memoryBytes);
      } });
    console.log(JSON.stringify({ bytes: [...bytes], steps, memory: loadAddon().memory() }));`);
  expect(steps).toBe(1000);
  expect(bytes).toHaveLength(1);
  expect(bytes[0]).toBeGreaterThan(0);
  const nothing = {
    mappedBytes: 0,
    heapBytes: 0,
    packedBytes: 0,
    arenaBytes: 0,
    deviceBytes: 0,
    tensors: 0,
    programs: 0,
  };
  expect(memory).toEqual(nothing);
});

// In counts, not times, since other programs may be busy: benchmarks hold the milliseconds. The signal comes in the
// middle of the third step, which takes about a second.
it('a long step leaves the event loop free, and does not go on after an abort', () => {
  const { ticks, outcome } = run(`
    await elastify(shipped, { kind: 'elastiformer' }, { out: work + '/shipped-plan' });
    loadAddon().setThreads(1);
    const controller = new AbortController();
    let ticks = 0;
    const outcome = await distill({ plan: work + '/shipped-plan', out: work + '/shipped-elastic', steps: 100,
      data: { kind: 'documents', documents: Array(4).fill(text) }, batchTokens: 4096, sequenceLength: 512,
      signal: controller.signal, onEvent: (event) => {
        if (event.type !== 'step' || event.step !== 2) return;
        const timer = setInterval(() => {
          if (++ticks < 20) return;
          clearInterval(timer);
          controller.abort();
        }, 5);
      } });
    console.log(JSON.stringify({ ticks, outcome }));`);
  expect(outcome).toMatchObject({ step: 2, stopped: 'signal' });
  expect(ticks).toBe(20);
});
