// modular from outside: pairs in files, a table or an object, the interrupted run, and what does not fit.
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, expect, it, vi } from 'vitest';
import { finetune } from '../../lib/index.js';
import { reversals, smallModel, writeLetters } from '../distill/pairs.js';
import { temporaryDirectory } from '../temporary.js';
import { json, run, start } from './run.js';

vi.setConfig({ testTimeout: 120_000 });
const work = temporaryDirectory();
const base = join(work, 'base');
const tsv = join(work, 'words.tsv');
const flags = ['--from', base, '--data', tsv, '--field', 'word', '--label-field', 'reversed'];
const args = ['modular', ...flags, '--granularities', '2,4', '--batch-tokens', '256', '--sequence-length', '12'];

beforeAll(async () => {
  const rows = reversals(80, 4).map(({ text, label }) => `${text}\t${label}`);
  writeFileSync(tsv, ['word\treversed', ...rows, 'a'].join('\n'));
  await finetune({
    ...{ model: smallModel(), tokenizer: writeLetters(join(work, 'letters')), out: base, steps: 2, device: 'cpu' },
    ...{ data: { kind: 'examples', examples: reversals(40, 5) }, sequenceLength: 12, batchTokens: 256 },
  });
});

it('trains from files and says what came of it', async () => {
  const more = ['--held-out', '0.2', '--bad-rows', 'skip', '--steps', '3', '--seed', '1'];
  const outcome = await run(...args, ...more, '--out', join(work, 'run'));
  expect(outcome.stderr).toContain(`warning: 1 bad rows left out: ${tsv}:82 has 1 columns, not 2\n`);
  expect(outcome.stdout).toMatch(/^layers +loss +divergence +accuracy {2}\(of held-out tokens\)$/m);
  expect(outcome.stdout).toMatch(/^4\+4 +\d\.\d{4} +0\.0000 +\d\.\d{4} {2}encoder=0,1,2,3;decoder=0,1,2,3$/m);
  expect(outcome.stdout).toMatch(/^1\+1 +\d\.\d{4} +\d\.\d{4} +\d\.\d{4} {2}encoder=0-3;decoder=0-3$/m);
  expect(json(await run(...args, ...more, '--out', join(work, 'again'), '--json'))).toMatchObject({
    ...{ step: 3, stopped: 'done', badRows: 1, examples: { train: 64, heldOut: 16 }, last: { step: 3 } },
    modules: {
      decoder: [
        { first: 0, last: 1 },
        { first: 2, last: 3 },
        { first: 0, last: 3 },
      ],
    },
  });
});

it('trains corrections and nested feed-forwards with them, which budgets then run', async () => {
  const out = join(work, 'composed');
  const composed = ['--lora', '2', '--lora-targets', 'v,q', '--nested', '0.5,1', '--rank', 'taylor'];
  const more = ['--held-out', '0.2', '--bad-rows', 'skip', '--steps', '3'];
  const outcome = await run(...args, ...more, ...composed, '--out', out);
  expect(outcome.stdout).toMatch(/^4\+4 .* 0\.0000 .*encoder=0,1,2,3;decoder=0,1,2,3$/m);
  expect(outcome.stdout).toMatch(/^1\+1 .*encoder=0-3;decoder=0-3;ffn=0\.5$/m);
  const config = json(await run('inspect', out, '--json'));
  expect(config).toMatchObject({ modules: { decoder: ['0-1', '2-3', '0-3'] } });
  const inspected = (await run('inspect', out)).stdout;
  expect(inspected).toMatch(/^elastic +feed-forwards nested at 50\.0 %, 100\.0 %$/m);
  expect(inspected).toMatch(/^corrections +rank 2 of q, v$/m);
  const budget = 'encoder=0-1,2,3;decoder=0,1,2-3;ffn=0.5';
  const written = await run('generate', out, '--prompt', 'a b c', '--max-tokens', '4', '--budget', budget, '--json');
  expect(json(written)).toMatchObject({
    usage: { compute: { effective: { assembly: { decoder: ['0', '1', '2-3'] }, ffnWidth: 0.5 } } },
  });
  const stock = await run('assemble', out, '--decoder', '0,1,2-3', '--width', '0.5', '--out', join(work, 'stock'));
  expect(stock.stdout).toMatch(/of 3 greedy texts are those of the assembly, and logits differ by at most \d/);
  expect(stock.stdout).toMatch(/^> +0,1,2,3 +0,1,2-3 +50\.0 %/m);
});

it('trains routers of the encoder, whose shares budgets and levels have', async () => {
  const out = join(work, 'routed');
  const more = ['--held-out', '0.2', '--bad-rows', 'skip', '--steps', '3', '--attn', '0.4:0.8', '--mlp', '0.5'];
  const outcome = await run(...args, ...more, '--out', out);
  expect(outcome.stdout).toMatch(/^4\+4 .*encoder=0,1,2,3;decoder=0,1,2,3;attn=0\.6\d*;mlp=0\.5$/m);
  expect(outcome.stdout).toMatch(/^1\+1 .*encoder=0-3;decoder=0-3;attn=0\.4;mlp=0\.5$/m);
  expect((await run('inspect', out)).stdout).toMatch(
    /routers +tokens of the encoder into attn \(40\.0 % to 80\.0 %\), mlp/,
  );
  const level = ['--decoder', '0-1,2-3', '--attn', '0.6', '--mlp', '0.5', '--save-level', 'light'];
  expect((await run('assemble', out, ...level)).stdout).toContain('Saved as level light');
  for (const budget of ['light', 'encoder=0,1,2,3;decoder=0-1,2-3;attn=0.6;mlp=0.5']) {
    const written = await run('generate', out, '--prompt', 'a b c', '--max-tokens', '4', '--budget', budget, '--json');
    expect(json(written)).toMatchObject({
      usage: {
        compute: { effective: { assembly: { decoder: ['0-1', '2-3'] }, tokenCapacity: { attn: 0.6, mlp: 0.5 } } },
      },
    });
  }
  const stock = await run('assemble', out, '--attn', '0.6', '--out', join(work, 'no stock'));
  expect([stock.code, stock.stderr]).toEqual([1, expect.stringContaining('a stock checkpoint has no routers')]);
});

it('is interrupted, saves, and goes on from there', async () => {
  const out = join(work, 'long');
  const running = start([...args, '--bad-rows', 'skip', '--steps', '100000', '--out', out]);
  let seen = '';
  running.child.stderr!.on('data', (text: Buffer) => {
    seen += text;
    if (/modular \d+\/100000/.test(seen)) running.child.kill('SIGINT');
  });
  const outcome = await running.ended;
  expect(outcome.code).toBe(130);
  expect(outcome.stdout).toMatch(/: \d+ steps \(interrupted and saved; run it again to continue\)\n$/);
});

it.each([
  [['modular', '--out', join(work, 'x')], "'from' is missing: give --from", 2],
  [['modular', ...flags, '--steps', '1', '--out', join(work, 'x')], "'granularities' is missing", 2],
  [[...args, '--steps', '1', '--lora-targets', 'q', '--out', join(work, 'x')], '--lora-targets needs --lora', 2],
  [[...args, '--steps', '1', '--rank', 'taylor', '--out', join(work, 'x')], '--rank needs --nested', 2],
  [[...args, '--steps', '1', '--nested', '0.5', '--out', join(work, 'x')], 'nested: granularities must end with 1', 1],
  [
    [...args.with(args.indexOf('2,4'), '3'), '--steps', '1', '--bad-rows', 'skip', '--out', join(work, 'x')],
    'that divide 4 encoder',
    1,
  ],
  [[...args, '--steps', '1', '--out', join(work, 'x')], 'words.tsv:82 has 1 columns, not 2', 1],
])('refuses %#', async (given, message, code) => {
  const outcome = await run(...given);
  expect(outcome.stderr).toContain(message);
  expect(outcome.code).toBe(code);
});
