// Every example runs as a user would run it, and says what it is there to show.
import { spawnSync } from 'node:child_process';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { beforeAll, expect, test, vi } from 'vitest';
import { modularDirectory } from '../infer/modules.js';
import { temporaryDirectory } from '../temporary.js';

vi.setConfig({ testTimeout: 120_000, hookTimeout: 120_000 });

const root = resolve(import.meta.dirname, '../..');
const work = temporaryDirectory();
const elastic = join(work, 'elastic');
const ran = new Set<string>();

function run(name: string, ...args: string[]): string {
  ran.add(name);
  const script = join(root, 'examples', name);
  const child = spawnSync(process.execPath, [script, ...args], { cwd: work, encoding: 'utf8', timeout: 110_000 });
  expect(child, child.stderr).toMatchObject({ status: 0, stderr: '' });
  return child.stdout;
}

const numbers = (text: string, pattern: RegExp): number[] => [...text.matchAll(pattern)].map(([, n]) => Number(n));

let trained: string;
beforeAll(() => {
  const text = join(work, 'train.txt');
  writeFileSync(text, readFileSync(join(root, 'models/tiny/train.txt'), 'utf8').slice(0, 1500));
  trained = run('elastify-and-distill.mjs', elastic, '3', text);
});

test('elastify-and-distill trains a model whose budgets are kept', () => {
  expect(trained).toContain('2064 parameters to train');
  expect(numbers(trained, /^step (\d+): KL \d/gm)).toEqual([1, 2, 3]);
  const ratios = numbers(trained, /^budget .*: ([\d.]+) of the FLOPs/gm);
  expect(ratios[0]).toBe(1);
  expect(ratios[1]).toBeLessThan(0.85);
  expect(ratios[2]).toBeLessThan(0.65);
});

test('generate spends what each budget says', () => {
  const ratios = numbers(run('generate.mjs', elastic), /tokens at ([\d.]+) of/g);
  expect(ratios).toHaveLength(3);
  expect(ratios[0]).toBe(1);
  expect(ratios[1]).toBeLessThan(1);
  expect(ratios[2]).toBeLessThan(ratios[1]);
});

test('mixed-budgets: a text in company has the bits it has alone', () => {
  const output = run('mixed-budgets.mjs', elastic);
  const ratios = numbers(output, /: ([\d.]+) of the FLOPs/g);
  expect(ratios).toHaveLength(3);
  expect(ratios[1]).toBeLessThan(ratios[0]);
  expect(output).toContain('alone has the same bits');
});

test('skip-attention: a prompt runs the attention of a layer for all its tokens or none', () => {
  const text = join(work, 'train.txt');
  const output = run('skip-attention.mjs', join(work, 'skipping'), '2', text);
  expect(output).toContain('516 parameters to train');
  const ratios = numbers(output, /: ([\d.]+) of the FLOPs/g);
  expect(ratios).toHaveLength(3);
  for (const [, layers] of output.matchAll(/in layers \[([\d,]*)\]/g)) {
    for (const layer of layers.split(',').filter((part) => part !== '')) expect([3, 4, 5, 6]).toContain(Number(layer));
  }
});

test('semantic-search ranks texts by their vectors, and tells classes where there are some', () => {
  for (const [name, classes] of [
    ['minilm', 0],
    ['bert-classes', 3],
  ] as const) {
    const output = run('semantic-search.mjs', join(root, 'test/golden/encoders', name));
    const scores = numbers(output, /^ {2}(-?[\d.]+) {2}\S/gm);
    expect(scores).toHaveLength(3);
    expect(scores).toEqual([...scores].sort((a, b) => b - a));
    expect(numbers(output, /^ {2}(?:bad|fair|good) ([\d.]+)/gm)).toHaveLength(classes);
  }
});

test('write-for-source writes for all sources, and beams cost more', () => {
  const output = run('write-for-source.mjs', join(root, 'test/golden/seq2seq/marian'), '5,9,14,2', '7,2');
  expect(output).toContain('marian, 3 layers of the decoder');
  const costs = numbers(output, /^beams [14]: [\d,]+ -> [\d,]+ \(\d+ tokens, ([\d.]+) million/gm);
  expect(costs).toHaveLength(4);
  expect(costs[2]).toBeGreaterThan(costs[0]);
  expect(costs[3]).toBeGreaterThan(costs[1]);
});

test('assemblies writes at several sizes, from the whole model to the smallest', async () => {
  const { dir } = await modularDirectory('marian');
  const output = run('assemblies.mjs', dir, '5,9,14,2');
  expect(output).toMatch(/^encoder 0,1,2,3, decoder 0,1,2,3,4,5: [\d,]+ \(1.00 of the FLOPs, 1.0 times as fast\)/);
  const ratios = numbers(output, /\(([\d.]+) of the FLOPs/gm);
  expect(ratios).toHaveLength(5);
  expect(output).toContain('encoder 0-3, decoder 0-5: ');
  const speedups = numbers(output, /, ([\d.]+) times as fast\)/gm);
  for (let i = 1; i < 5; i++) expect(speedups[i]).toBeGreaterThanOrEqual(speedups[i - 1]);
  expect(ratios.at(-1)).toBeLessThan(0.5);
});

test('stream-and-abort ends early both ways', () => {
  const output = run('stream-and-abort.mjs');
  expect(output).toContain('left after 10 tokens: abort');
  const [tokens] = numbers(output, /^abort after (\d+) tokens/gm);
  expect(tokens).toBeGreaterThanOrEqual(10);
  expect(tokens).toBeLessThan(100);
});

test('load-spike: budgets fall as the queue grows, and rise again', () => {
  const ratios = numbers(run('load-spike.mjs', elastic), /, ([\d.]+) of the FLOPs/g);
  expect(ratios).toHaveLength(12);
  const [before, first, last, after] = [ratios[0], ratios[1], ratios[10], ratios[11]];
  expect([before, last, after]).toEqual([1, 1, 1]);
  expect(first).toBeLessThan(0.8);
});

test('kernel-layer costs the rows and units it uses', () => {
  const output = run('kernel-layer.mjs');
  expect(numbers(output, /rows, ([\d.]+),/g).map((ratio) => Math.round(ratio * 8) / 8)).toEqual([1, 0.5, 0.5, 0.125]);
  const kl = numbers(output, /rows, [\d.]+, ([\d.]+)/g);
  expect(kl[0]).toBe(0);
  expect(Math.min(...kl.slice(1))).toBeGreaterThan(0);
});

test('every example is run here', () => {
  const all = readdirSync(join(root, 'examples')).filter((name) => name.endsWith('.mjs'));
  expect([...ran].sort()).toEqual(all.sort());
});
