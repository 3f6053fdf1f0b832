// `elastiform generate` and `inspect` of encoder-decoder models.
import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it, vi } from 'vitest';
import { readSeq2SeqCases, seq2seqDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';
import { run } from './run.js';

vi.setConfig({ testTimeout: 120_000 });
const dir = seq2seqDirectory('bart');
const { sources, generations } = readSeq2SeqCases('bart');
const plain = generations.filter(({ settings }) => JSON.stringify(settings) === '{"max_length":12}');

describe('generate', () => {
  it('writes for one source, and for those of a file in their order', async () => {
    const { ids } = plain[0];
    const args = ['generate', dir, '--ids', sources[0].join(), '--max-tokens', '11', '--json'];
    const one = await run(...args);
    expect(JSON.parse(one.stdout)).toMatchObject({ text: null, ids, usage: { inputTokens: sources[0].length } });
    const beams = JSON.parse((await run(...args, '--beams', '3')).stdout) as { ids: number[] };
    expect(beams.ids).toEqual(
      generations.find(
        ({ source, settings }) => source === 0 && JSON.stringify(settings) === '{"max_length":12,"num_beams":3}',
      )!.ids,
    );
    const file = join(temporaryDirectory(), 'sources.jsonl');
    writeFileSync(file, sources.map((ids) => JSON.stringify({ ids, maxTokens: 11 })).join('\n'));
    const many = await run('generate', dir, '--batch', file);
    const lines = many.stdout.trim().split('\n');
    expect(lines.map((line) => (JSON.parse(line) as { ids: number[] }).ids)).toEqual(plain.map(({ ids }) => ids));
  });

  it('says what is wrong', async () => {
    const { code, stderr } = await run('generate', dir, '--prompt', 'a text');
    expect(code).not.toBe(0);
    expect(stderr).toContain('has no tokenizer.json; give token ids');
    expect((await run('generate', dir, '--ids', '5,2', '--beams', '65')).stderr).toContain('from 1 to 64');
  });
});

describe('inspect', () => {
  it('shows both sides', async () => {
    const { stdout } = await run('inspect', dir);
    expect(stdout).toMatch(/task +seq2seq-lm/);
    expect(stdout).toMatch(/encoder +2 layers, FFN 40, 2 heads of 12/);
    expect(stdout).toMatch(/decoder +3 layers, FFN 32, 3 heads of 8, and as many that read the source/);
    const json = JSON.parse((await run('inspect', dir, '--json')).stdout) as object;
    expect(json).toMatchObject({ encoderLayers: 2, layers: 3, beams: 1, tokenizers: { source: null, target: null } });
  });
});

const g2p = join(process.env.ELASTIFORM_DATA ?? '', 'bart-g2p-us');
it.skipIf(!process.env.ELASTIFORM_DATA || !existsSync(g2p))('texts in and texts out', async () => {
  expect((await run('generate', g2p, '--prompt', 'hello')).stdout).toBe('hˈɛlO\n');
  expect((await run('inspect', g2p)).stdout).toContain('63, targets with a tokenizer of their own');
});
