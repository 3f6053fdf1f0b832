// Pretraining: learns, writes a checkpoint that loads, continues to the same bits, and gives up when it diverges.
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { DivergedError, pretrain, type TrainEvent } from '../../lib/index.js';
import { evaluate } from '../../lib/infer/quality/evaluate.js';
import { sha256File } from '../../lib/io/files.js';
import { stories, temporaryDirectory, tinyPretraining } from './tiny.js';

const root = temporaryDirectory();

test('learns, and what it writes has the quality it reported', async () => {
  const out = join(root, 'learns');
  const events: TrainEvent[] = [];
  const heldOut = stories(240).slice(200);
  const evalData = { kind: 'documents', documents: heldOut } as const;
  await pretrain(tinyPretraining(out, { evalData, evalEvery: 30, onEvent: (event) => void events.push(event) }));
  const evals = events.filter((event) => event.type === 'eval').map((event) => event.levels['held-out']);
  expect(evals).toHaveLength(3);
  expect(evals[2].bits_per_byte).toBeLessThan(0.5 * evals[0].bits_per_byte);
  const { levels } = await evaluate(out, { data: heldOut, sequenceLength: 48, speed: false });
  expect(levels[0].bitsPerByte?.value).toBeCloseTo(evals[2].bits_per_byte, 1);
});

test('stopped and started again, it ends at the same bits', async () => {
  const [straight, stopped] = [join(root, 'straight'), join(root, 'stopped')];
  await pretrain(tinyPretraining(straight, { steps: 8 }));
  const abort = new AbortController();
  const onEvent = (event: TrainEvent) => void (event.type === 'step' && event.step === 3 && abort.abort());
  const first = await pretrain(tinyPretraining(stopped, { steps: 8, signal: abort.signal, onEvent }));
  expect(first).toMatchObject({ step: 3, stopped: 'signal' });
  expect(await pretrain(tinyPretraining(stopped, { steps: 8 }))).toMatchObject({ step: 8, stopped: 'done' });
  const weights = (dir: string) => sha256File(join(dir, 'model.safetensors'));
  expect(await weights(stopped)).toBe(await weights(straight));
});

test('steps without a finite loss are skipped with a warning; then it gives up with advice', async () => {
  const warnings: TrainEvent[] = [];
  const error = await pretrain(
    tinyPretraining(join(root, 'diverges'), {
      steps: 50,
      optimizer: { lr: 1e30, warmup: 0, gradClip: 0 },
      onEvent: (event) => void (event.type === 'warn' && warnings.push(event)),
    }),
  ).catch((e) => e);
  expect(error).toBeInstanceOf(DivergedError);
  expect(error.message).toMatch(/\[pretrain\] training diverged: 10 steps in a row.*lower optimizer.lr/);
  expect(warnings).toHaveLength(10);
  expect(warnings[0]).toMatchObject({ code: 'nan-grad' });
});
