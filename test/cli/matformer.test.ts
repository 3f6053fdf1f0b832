// MatFormer from the command line: nest, train, eval, profile, search and extract on a tiny model.
import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, expect, test } from 'vitest';
import { stories, temporaryDirectory, tinyModel } from '../distill/tiny.js';
import { json, run, workDirectory } from './run.js';

const work = workDirectory();
const at = (name: string) => join(work, name);
const text = at('stories.txt');
let base: string;
beforeAll(async () => {
  base = await tinyModel(temporaryDirectory());
  writeFileSync(text, stories(80).join('<|endoftext|>'));
});

async function done(...args: string[]): Promise<Record<string, unknown>> {
  const outcome = await run(...args, '--json');
  expect([args[0], outcome.code, outcome.stderr.match(/elastiform: .*/)?.[0]]).toEqual([args[0], 0, undefined]);
  return json(outcome);
}

test('a model is nested, trained, measured, searched and extracted', async () => {
  const nested = ['--nested', '0.25,0.5,1', '--rank', 'activation', '--data', text];
  expect(await done('elastify', base, ...nested, '--out', at('plan'))).toMatchObject({ trainableParameters: 0 });
  const training = [
    '--data',
    text,
    '--steps',
    '20',
    '--batch-tokens',
    '256',
    '--sequence-length',
    '48',
    '--lr',
    '3e-3',
  ];
  const trained = at('trained');
  expect(
    await done(
      'pretrain',
      '--from',
      at('plan'),
      '--train',
      'ffn',
      '--sample',
      'sandwich',
      ...training,
      '--out',
      trained,
    ),
  ).toMatchObject({ step: 20, stopped: 'done' });
  expect(await done('inspect', trained)).toMatchObject({ elastic: true, calibrated: true });
  const report = await done('eval', trained, '--data', text, '--budgets', 'full,ffn50', '--limit', '400');
  expect((report.levels as { method: string }[]).map(({ method }) => method)).toEqual(['full', 'nested']);
  const generated = await done('generate', trained, '--prompt', 'The cat', '--budget', '0.8', '--max-tokens', '4');
  expect((generated as { usage: { compute: { ratio: number } } }).usage.compute.ratio).toBeLessThan(0.81);
  const times = await done('profile', trained, '--context', '8,16', '--batch', '2');
  expect(existsSync(times.path as string)).toBe(true);
  const searched = ['--data', text, '--limit', '400', '--max-latency', 'ttft:10000ms', '--record', '--name', 'mine'];
  expect(await done('search', trained, ...searched)).toMatchObject({ best: { kl: 0 } });
  const constrained = ['--data', text, '--limit', '400', '--max-flops', '0.75', '--record', '--name', 'mine'];
  const { best } = (await done('search', trained, ...constrained)) as { best: { widths: number[] } };
  const extracted = await done('extract', trained, '--level', 'mine', '--layout', 'per-layer', '--out', at('mine'));
  expect(extracted).toMatchObject({ widths: best.widths, largestDifference: 0, loadsIn: ['elastiform'] });
  const uniform = await done('extract', trained, '--width', '0.5', '--no-verify', '--out', at('half'));
  expect(uniform).toMatchObject({ layout: 'uniform', widths: [32, 32, 32], largestDifference: null });
  expect(await done('inspect', at('half'))).toMatchObject({ elastic: false, ffn: 32 });
  const one = await done('extract', trained, '--width', '0.5', '--skip-layers', '1-2', '--out', at('one'));
  expect(one).toMatchObject({ layers: [0], widths: [32], largestDifference: 0 });
  const { stderr } = await run('extract', trained, '--width', '0.5', '--skip-layers', '0-2', '--out', at('none'));
  expect(stderr).toMatch(/a layer at least must be kept/);
  const { stdout } = await run('inspect', trained);
  expect(stdout).toMatch(/feed-forwards nested at 25.0 %, 50.0 %, 100.0 %/);
  expect(stdout).toMatch(/level +FLOPs +FFN width/);
}, 120_000);

test('corrections are distilled, and what no slice keeps ends with 3 and names the nearest', async () => {
  const nested = ['--nested', '0.5,1', '--lora', '2', '--out', at('lora')];
  await done('elastify', base, ...nested);
  const training = [
    '--data',
    text,
    '--steps',
    '4',
    '--batch-tokens',
    '256',
    '--sequence-length',
    '48',
    '--sample',
    'random',
  ];
  await done('distill', at('lora'), ...training, '--sample-weights', '1', '--out', at('corrected'));
  const infeasible = await run(
    'search',
    at('corrected'),
    '--data',
    text,
    '--limit',
    '200',
    '--max-params',
    '10',
    '--json',
  );
  expect(infeasible.code).toBe(3);
  expect(json(infeasible)).toMatchObject({ nearest: { widths: [32, 32, 32] } });
  expect(infeasible.stderr).toMatch(/no slice has 10 parameters: the nearest/);
}, 60_000);

test.each([
  [['elastify', 'm', '--nested', '0.5,x', '--out', 'o'], /--nested must be shares separated by commas/],
  [['elastify', 'm', '--rank', 'taylor', '--out', 'o'], /--rank needs --nested/],
  [['extract', 'm', '--out', 'o'], /extract needs --level or --width, one of them/],
  [['extract', 'm', '--level', 'a', '--width', '1', '--out', 'o'], /extract needs --level or --width, one of them/],
  [['extract', 'm', '--width', 'wide', '--out', 'o'], /--width must be numbers/],
  [['extract', 'm', '--level', 'a'], /extract needs --out/],
  [['extract', 'm', '--skip-layers', '1', '--out', 'o'], /extract needs --level or --width, one of them/],
  [
    ['extract', 'm', '--level', 'a', '--skip-layers', '3-1', '--out', 'o'],
    /--skip-layers must be numbers of layers and/,
  ],
  [
    ['extract', 'm', '--level', 'a', '--skip-layers', '1,', '--out', 'o'],
    /--skip-layers must be numbers of layers and/,
  ],
  [['search', 'm', '--data', 'd', '--max-params', '9', '--max-flops', '1'], /give one constraint/],
  [['search', 'm', '--data', 'd', '--max-bytes', '2TB'], /--max-bytes must be a number of bytes, KiB, MiB or GiB/],
  [['search', 'm', '--data', 'd', '--max-latency', 'soon'], /--max-latency must be a time/],
  [['search', 'm', '--data', 'd', '--name', 'n'], /--name needs --record/],
  [['profile', 'm', '--batch', '0'], /--batch must be positive integers/],
  [['pretrain', '--data', text, '--nested', 'a', '--out', 'o'], /--nested must be shares/],
])('%j is bad usage', async (args, message) => {
  const { code, stderr } = await run(...args);
  expect([code, stderr]).toEqual([2, expect.stringMatching(message)]);
});
