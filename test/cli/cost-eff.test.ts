// cost-eff from outside: stages on stderr, a table or an object, the interrupted run, and what does not fit.
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it, vi } from 'vitest';
import { finetune } from '../../lib/index.js';
import { encoderDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';
import { json, run, start } from './run.js';

vi.setConfig({ testTimeout: 120_000 });
const work = temporaryDirectory();
const base = join(work, 'base');
const tsv = join(work, 'train.tsv');
const config = join(work, 'config.yaml');
const sizes = ['--heads', '2', '--ffn', '10', '--rank', '6'];
const args = ['cost-eff', '-c', config, '--from', base, '--data', tsv, '--eval-data', tsv];

beforeAll(async () => {
  const rows = Array.from({ length: 60 }, (_, i) => `the ${i % 2 ? 'dog' : 'cat'} walks ${i}\t${i % 2}`);
  writeFileSync(tsv, ['sentence\tlabel', ...rows].join('\n'));
  const stage = '{ epochs: 2, lr: 0.01 }';
  writeFileSync(
    config,
    `assistant: ${stage}\nslim: ${stage}\nhidden: ${stage}\nprediction: ${stage}\nbatchTokens: 128\nsequenceLength: 24\n`,
  );
  await finetune({
    ...{ from: encoderDirectory('bert'), out: base, data: { kind: 'tsv', files: tsv } },
    ...{ steps: 2, sequenceLength: 24, batchTokens: 128, device: 'cpu' },
  });
});

it('runs all stages and prints what came of it', async () => {
  const out = join(work, 'out');
  const outcome = await run(...args, ...sizes, '--out', out);
  expect(outcome.code).toBe(0);
  expect(outcome.stderr.match(/^stage .*$/gm)).toEqual([
    ...['stage 1 of 4: assistant', 'stage 2 of 4: slim-1', 'stage 3 of 4: hidden', 'stage 4 of 4: prediction'],
  ]);
  expect(outcome.stdout).toMatch(/^ +parameters +MFLOPs +exit 0 +all {3}\(accuracy, held-out texts\)$/m);
  expect(outcome.stdout).toMatch(/^slim +[\d,]+ +\d+\.\d +\d\.\d{4} +\d\.\d{4}$/m);
  const again = json(await run(...args, ...sizes, '--out', out, '--json'));
  expect(again).toMatchObject({ dir: out, stopped: 'done', slim: { heads: [2, 2], ffn: [10, 10], rank: 6 } });
  const stock = join(work, 'stock');
  const exported = await run('extract', join(out, 'model'), '--out', stock);
  expect(exported.stdout).toMatch(
    /feed-forwards of 10 units, [\d,]+ parameters \(slim: [\d,]+\), 2 heads and 0 units of zeros; its logits differ/,
  );
  const texts = ['the dog walks', 'the cat'];
  const told = await Promise.all([join(out, 'model'), stock].map((dir) => run('classify', dir, ...texts)));
  const labels = told.map(({ stdout }) => stdout.match(/"label":"\w+"/g));
  expect(labels[1]).toEqual(labels[0]);
});

it('is interrupted and goes on', async () => {
  const out = join(work, 'interrupted');
  const running = start([...args, ...sizes, '--out', out]);
  let seen = '';
  running.child.stderr!.on('data', (text: Buffer) => {
    seen += text;
    if (/stage 2 of 4/.test(seen)) running.child.kill('SIGINT');
  });
  const outcome = await running.ended;
  expect(outcome).toMatchObject({ code: 130, stdout: `${out}: interrupted and saved; run it again to continue\n` });
  expect((await run(...args, ...sizes, '--out', out)).code).toBe(0);
});

describe('what does not fit is one line', () => {
  it.concurrent.each<[string[], string, number]>([
    [[], "'target' is missing: give --heads and --ffn", 2],
    [['--heads', '2'], 'target.ffn must be an integer from 1 to 40, got undefined', 1],
    [['--heads', '9', '--ffn', '4'], 'target.heads must be an integer from 1 to 3, got 9', 1],
    [[...sizes, '--steps', '4'], "Unknown option '--steps'", 2],
  ])('%j', async (more, message, code) => {
    const outcome = await run(...args, ...more, '--out', join(work, `none-${code}-${message.length}`));
    expect(outcome).toMatchObject({ code, stdout: '' });
    expect(outcome.stderr).toContain(message);
    expect(outcome.stderr.match(/\n/g)).toHaveLength(1);
  });
});
