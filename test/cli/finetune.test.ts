// finetune from outside: files and flags over a configuration file, what is said of rows, the interrupted run, and what does not fit.
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it, vi } from 'vitest';
import { encoderDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';
import { json, run, start } from './run.js';

vi.setConfig({ testTimeout: 120_000 });
const work = temporaryDirectory();
const bert = encoderDirectory('bert');
const tsv = join(work, 'train.tsv');
const rows = Array.from({ length: 60 }, (_, i) => `the ${i % 2 ? 'dog' : 'cat'} walks ${i}\t${i % 2}`);
writeFileSync(tsv, ['sentence\tlabel', ...rows, 'the cat'].join('\n'));
const flags = ['--data', tsv, '--batch-tokens', '128', '--sequence-length', '24', '--lr', '0.01', '--seed', '1'];

it('trains from files, leaves bad rows out and says so, and classify knows what came of it', async () => {
  const out = join(work, 'mine');
  const more = ['--held-out', '0.2', '--bad-rows', 'skip', '--labels', 'meow,woof', '--out', out];
  const outcome = await run('finetune', '--from', bert, ...flags, '--steps', '60', ...more, '--json');
  expect(outcome.stderr).toContain(`warning: 1 bad rows left out: ${tsv}:62 has 1 columns, not 2\n`);
  expect(json(outcome)).toMatchObject({
    ...{ dir: out, step: 60, stopped: 'done', metric: 'accuracy', labels: ['meow', 'woof'], badRows: 1, truncated: 0 },
    examples: { train: 48, heldOut: 12 },
  });
  const told = await run('classify', out, 'the dog walks', 'the cat walks');
  expect(told.stdout.match(/"label":"\w+"/g)).toEqual(['"label":"woof"', '"label":"meow"']);
});

it('is interrupted, saves, and goes on from there', async () => {
  const config = join(work, 'config.yaml');
  writeFileSync(
    config,
    `from: ${bert}\nbadRows: skip\nsteps: 100000\nsaveEvery: 100000\noptimizer: { warmup: 3 }\ndata: { kind: tsv, files: ${tsv} }\n`,
  );
  const args = [
    'finetune',
    '-c',
    config,
    '--out',
    join(work, 'long'),
    '--sequence-length',
    '24',
    '--batch-tokens',
    '128',
  ];
  // Interrupted once it has told of a step.
  const interrupted = async (more: string[]) => {
    const running = start([...args, ...more]);
    let seen = '';
    running.child.stderr!.on('data', (text: Buffer) => {
      seen += text;
      if (/finetune \d+\/100000/.test(seen)) running.child.kill('SIGINT');
    });
    return running.ended;
  };
  const outcome = await interrupted([]);
  expect(outcome.code).toBe(130);
  const [, steps] = /: (\d+) steps \(interrupted and saved; run it again to continue\)/.exec(outcome.stdout)!;
  const { step } = json(await interrupted(['--json'])) as { step: number };
  expect(step).toBeGreaterThan(Number(steps));
});

describe('what does not fit is one line', () => {
  it.concurrent.each<[string[], string, number]>([
    [['--from', bert, ...flags, '--steps', '2'], `${tsv}:62 has 1 columns, not 2; badRows: 'skip'`, 1],
    [['--from', bert, '--steps', '2'], 'data is missing: give --data', 2],
    [[...flags, '--steps', '2'], 'a model is missing: give --from', 2],
    [['--from', bert, '--data', 'a.txt', '--steps', '2'], '--data must list .tsv files or .jsonl files', 2],
    [['--from', bert, ...flags, '--steps', '2', '--metric', 'loss'], '--metric must be one of accuracy, f1', 2],
    [['--from', bert, ...flags, '--bad-rows', 'skip'], 'exactly one of steps and epochs must be given', 1],
  ])('%j', async (args, message, code) => {
    const outcome = await run('finetune', ...args, '--out', join(work, `none-${code}-${message.length}`));
    expect(outcome).toMatchObject({ code, stdout: '' });
    expect(outcome.stderr).toContain(message);
    expect(outcome.stderr.match(/\n/g)).toHaveLength(1);
  });
});
