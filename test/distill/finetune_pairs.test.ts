// Fine-tuning of encoder-decoder models: learning from scratch and from directories, resuming, bad rows.
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it, test } from 'vitest';
import { type FinetuneConfig, finetune, InvalidArgumentError, loadModel, type TrainEvent } from '../../lib/index.js';
import { sha256File } from '../../lib/io/files.js';
import { largestDifference, readVectors, seq2seqDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';
import { reversals, smallModel, writeLetters, zeroBiased } from './pairs.js';

const root = temporaryDirectory();
const letters = writeLetters(join(root, 'letters'));

const scratch = (name: string, more: Partial<FinetuneConfig> = {}): FinetuneConfig => ({
  ...{ model: smallModel(), tokenizer: letters, out: join(root, name), device: 'cpu', seed: 3 },
  ...{ data: { kind: 'examples', examples: reversals(1500, 1) }, batchTokens: 512, sequenceLength: 12 },
  ...{ steps: 400, optimizer: { lr: 4e-3 } },
  ...more,
});

test('learns to turn words round from scratch, and what it wrote writes what it reported; a trained model goes on', async () => {
  const evalData = { kind: 'examples', examples: reversals(60, 2) } as const;
  const events: TrainEvent[] = [];
  const result = await finetune(
    scratch('reversed', { evalData, evalEvery: 150, onEvent: (event) => void events.push(event) }),
  );
  expect(result).toMatchObject({ metric: 'loss', labels: [], examples: { train: 1500, heldOut: 60 }, badRows: 0 });
  const evals = events.flatMap((event) => (event.type === 'eval' ? [event.levels['held-out']] : []));
  expect(evals[0].loss).toBeGreaterThan(1.5);
  expect(evals.at(-1)!.loss).toBeLessThan(evals[0].loss / 2);
  expect(result.best!.metric).toBe(Math.min(...evals.map(({ loss }) => loss)));
  expect(result.exactMatch).toBeGreaterThan(0.2);
  await using model = await loadModel(result.dir);
  let right = 0;
  for (const { text, label } of evalData.examples) if ((await model.generate(text).text) === label) right++;
  expect(right / 60).toBe(result.exactMatch);

  const more = await finetune({
    ...{ from: result.dir, out: join(root, 'more'), data: evalData, evalData, steps: 4, device: 'cpu' },
    ...{ sequenceLength: 12, optimizer: { lr: 1e-3 } },
  });
  const config = (dir: string) => JSON.parse(readFileSync(join(dir, 'config.json'), 'utf8'));
  expect(config(more.dir)).toEqual(config(result.dir));
  expect(more.best!.metric).toBeLessThan(result.best!.metric);
});

test('stopped and started again, it ends at the same bits', async () => {
  const config = scratch('once', { steps: 8, heldOut: 0.02, evalEvery: 4, saveEvery: 3, gradCheckpointing: true });
  await finetune(config);
  const out = join(root, 'twice');
  const controller = new AbortController();
  const stopped = await finetune({
    ...config,
    out,
    signal: controller.signal,
    onEvent: (event) => void (event.type === 'step' && event.step === 4 && controller.abort()),
  });
  expect(stopped).toMatchObject({ stopped: 'signal', step: 4 });
  expect(stopped).not.toHaveProperty('exactMatch');
  expect(await finetune({ ...config, out })).toMatchObject({ stopped: 'done', step: 8 });
  const hash = (dir: string) => sha256File(join(dir, 'model.safetensors'));
  expect(await hash(out)).toBe(await hash(config.out));
  const plain = { ...config, out: join(root, 'plain'), gradCheckpointing: false };
  await finetune(plain);
  expect(await hash(plain.out)).toBe(await hash(config.out));
});

test('T5 learns from a directory, its table of distances stays, and targets may have a tokenizer of their own', async () => {
  const from = await zeroBiased(seq2seqDirectory('t5-gated'), join(root, 't5-gated'));
  const data = { kind: 'examples', examples: reversals(40, 5) } as const;
  const result = await finetune({
    ...{ from, out: join(root, 't5-out'), data, evalData: data, steps: 60, sequenceLength: 12, device: 'cpu' },
    optimizer: { lr: 1e-2 },
  });
  const losses = readFileSync(join(result.dir, 'metrics.jsonl'), 'utf8')
    .trim()
    .split('\n')
    .flatMap((line) => (line.includes('"step"') && line.includes('"loss"') ? [JSON.parse(line).loss] : []))
    .filter((loss) => loss !== undefined);
  expect(losses.at(-1)).toBeLessThan(losses[0] / 1.5);
  const read = (dir: string) => readVectors(join(dir, 'model.safetensors'));
  const [before, after] = [read(from), read(result.dir)];
  expect(Object.keys(after).sort()).toEqual(Object.keys(before).sort());
  for (const [name, values] of Object.entries(before))
    expect(largestDifference(values, after[name]) === 0, name).toBe(name.includes('relative_attention_bias'));

  const own = await finetune(scratch('own-target', { targetTokenizer: writeLetters(join(root, 'other')), steps: 1 }));
  await using model = await loadModel(own.dir);
  expect((await model.generate('a b', { maxTokens: 3 }).usage).outputTokens).toBeGreaterThan(0);
});

describe('input', () => {
  const tsv = join(root, 'pairs.tsv');
  writeFileSync(tsv, `source\ttarget\na b\tb a\nc\n\ta\nd e\te d\n${'a '.repeat(30)}\tb\n`);
  const jsonl = join(root, 'pairs.jsonl');
  writeFileSync(jsonl, '{"in":"a b","out":"b a"}\n{"in":"c"}\n');

  it('of files: bad pairs stop it, or are left out and counted; long sides are cut', async () => {
    const events: TrainEvent[] = [];
    const result = await finetune(
      scratch('tsv', {
        ...{ data: { kind: 'tsv', files: tsv }, badRows: 'skip', steps: 1 },
        onEvent: (event) => void events.push(event),
      }),
    );
    expect(result).toMatchObject({ badRows: 2, truncated: 1, examples: { train: 3 } });
    const warnings = events.flatMap((event) => (event.type === 'warn' ? [event.code] : []));
    expect(warnings).toEqual(['bad-rows', 'truncated']);
    const named = { kind: 'jsonl', files: jsonl, field: 'in', labelField: 'out' } as const;
    await expect(finetune(scratch('jsonl', { data: named, steps: 1 }))).rejects.toThrow(/pairs\.jsonl:2 has no label/);
  });

  it.each([
    ['task', { task: 'classification' }, 'task is for encoders'],
    ['metric', { metric: 'f1' }, 'metric is for encoders'],
    ['a second text', { data: { kind: 'tsv', files: tsv, pairField: 'target' } }, 'leave out pairField'],
    ['T5 from scratch', { model: { model_type: 't5' } }, 'must be bart, mbart, marian, got "t5"'],
    ['a small vocabulary', { model: smallModel({ vocab_size: 5 }) }, "must be at least the tokenizers' 12, got 5"],
    ['long sides', { sequenceLength: 17 }, "must be at most the model's 16 tokens of a side, got 17"],
  ] as [string, Partial<FinetuneConfig>, string][])('refuses %s', async (_, more, message) => {
    const attempt = finetune(scratch('refused', more));
    await expect(attempt).rejects.toThrow(InvalidArgumentError);
    await expect(attempt).rejects.toThrow(message);
  });

  it('refuses a head that has a bias', async () => {
    const from = join(root, 'biased');
    cpSync(seq2seqDirectory('bart'), from, { recursive: true });
    writeLetters(from);
    const data = { kind: 'examples', examples: reversals(2, 1) } as const;
    await expect(finetune({ from, out: join(root, 'refused'), data, steps: 1 })).rejects.toThrow(
      'final_logits_bias must be 0',
    );
  });
});
