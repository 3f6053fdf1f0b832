// Fine-tuning of encoder-decoder models: learning from scratch and from directories, resuming, bad rows.
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it, test } from 'vitest';
import { BadRows, readExamples } from '../../lib/distill/encoder/examples.js';
import { Random } from '../../lib/distill/random.js';
import { encodePairs } from '../../lib/distill/seq2seq/finetune.js';
import { BiasedHead, openSeq2Seq, pairProgram, pairRun, trainedPlan } from '../../lib/distill/seq2seq/model.js';
import { Trainable } from '../../lib/distill/trainable.js';
import { type FinetuneConfig, finetune, InvalidArgumentError, loadModel, type TrainEvent } from '../../lib/index.js';
import { logSoftmax } from '../../lib/infer/seq2seq/writing.js';
import { sha256File } from '../../lib/io/files.js';
import { Checkpoint, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { Engine } from '../../lib/native/index.js';
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

  it('refuses a bias of the head that is not finite', async () => {
    const from = await biasedDirectory('not-finite', (bias) => bias.fill(Number.NaN, 0, 1));
    const attempt = finetune({ from, out: join(root, 'refused'), data: biasedData, steps: 1 });
    await expect(attempt).rejects.toThrow('final_logits_bias must be 26 finite numbers');
  });
});

const biasedData = { kind: 'examples', examples: reversals(24, 5) } as const;

/** BART with a tokenizer, and a bias of its head that was changed. */
async function biasedDirectory(name: string, change: (bias: Float32Array) => unknown): Promise<string> {
  const dir = join(root, name);
  cpSync(seq2seqDirectory('bart'), dir, { recursive: true });
  writeLetters(dir);
  const file = Checkpoint.open(dir);
  const tensors = file.names().map((tensor): [string, TensorData] => {
    const stored = file.tensor(tensor);
    const data = stored.readFloat();
    if (tensor === 'final_logits_bias') change(data);
    return [tensor, { dtype: 'f32', shape: [...stored.shape], data }];
  });
  file.dispose();
  await writeSafetensors(join(dir, 'model.safetensors'), Object.fromEntries(tensors));
  return dir;
}

describe('a head with a bias', () => {
  it('is trained with it: the loss is that of the model at work, and the bias stays', async () => {
    const from = await biasedDirectory('biased', (bias) => bias.set(bias.map((_, id) => Math.sin(id))));
    const losses: number[] = [];
    const out = join(root, 'biased-trained');
    await finetune({
      ...{ from, out, data: biasedData, evalData: biasedData, steps: 20, evalEvery: 20, device: 'cpu', seed: 1 },
      ...{ sequenceLength: 12, optimizer: { lr: 3e-3 } },
      onEvent: (event) => void (event.type === 'eval' && losses.push(event.levels['held-out'].loss)),
    });
    const atWork = async (dir: string) => {
      await using model = await loadModel(dir);
      const { tokenizer, settings, spec } = model.seq2seq.network;
      const { vocab } = spec.decoder;
      let [loss, tokens] = [0, 0];
      for (const { text, label } of biasedData.examples) {
        const target = tokenizer!.encode(label);
        const read = [settings.startId, ...target.slice(0, -1)];
        const logits = await model.seq2seq.logits(tokenizer!.encode(text), read, { budget: 'full' });
        for (const [i, id] of target.entries()) loss -= logSoftmax(logits.subarray(i * vocab, (i + 1) * vocab))[id];
        tokens += target.length;
      }
      return loss / tokens;
    };
    expect(losses[0]).toBeCloseTo(await atWork(from), 4);
    expect(losses.at(-1)).toBeCloseTo(await atWork(out), 4);
    expect(losses.at(-1)).toBeLessThan(0.8 * losses[0]);
    using file = Checkpoint.open(out);
    const bias = file.tensor('final_logits_bias');
    expect([bias.shape, [...bias.readFloat()]]).toEqual([
      [1, 26],
      Array.from({ length: 26 }, (_, id) => Math.fround(Math.sin(id))),
    ]);
  });

  it('has the gradients that the loss has, also of the embedding, which its matrix is', async () => {
    const model = await openSeq2Seq('finetune', { from: join(root, 'biased') }, 0);
    const bad = new BadRows('finetune', false);
    const rows = { train: await readExamples(biasedData, bad), heldOut: null };
    const { data } = await encodePairs('finetune', { sequenceLength: 12 }, rows, model, bad);
    const { batch } = data.next({ epoch: 0, segment: 0 }, 64, null);
    using engine = new Engine('cpu');
    const plan = trainedPlan(model);
    using trainable = new Trainable(plan);
    const start = model.weights.slice();
    trainable.params.write(start);
    using biased = new BiasedHead(model.headBias!, model.spec.decoder.hidden);
    using program = pairProgram(model, trainable, engine, { batchTokens: 64, train: true, biased });
    const run = async () => (await program.run(pairRun(batch, 1 / batch.target.targets.length))).outputs.loss[0];
    await run();
    const gradients = trainable.grads.readFloat();
    const random = new Random(2, 'direction');
    for (const part of [/^embed$/, /^decoder\.layers/, /^encoder\.layers/]) {
      const direction = new Float32Array(plan.size);
      for (const { offset, size } of plan.parameters.filter(({ name }) => part.test(name)))
        for (let i = offset; i < offset + size; i++) direction[i] = random.normal();
      const lossAt = async (step: number) => {
        trainable.params.write(start.map((x, i) => x + step * direction[i]));
        return run();
      };
      const step = 1e-3;
      const measured = ((await lossAt(step)) - (await lossAt(-step))) / (2 * step);
      const expected = gradients.reduce((total, g, i) => total + g * direction[i], 0);
      expect(Math.abs(measured - expected) / Math.abs(expected), `${part}`).toBeLessThan(0.02);
    }
  });
});
