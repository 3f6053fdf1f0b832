// Fine-tuning of encoders: learns classes, pairs and numbers, writes a directory that loads, continues to the same bits, and says what
// is wrong with rows.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it, test } from 'vitest';
import { type FinetuneConfig, finetune, InvalidDataError, loadModel, type TrainEvent } from '../../lib/index.js';
import { sha256File } from '../../lib/io/files.js';
import { encoderDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';

const root = temporaryDirectory();
const words = ['walks', 'saw', 'lake', 'owner', 'barks', 'seldom'];

/** Rows about a cat, label `meow`, or a dog, `woof`. */
const animals = (count: number, first = 0) =>
  Array.from({ length: count }, (_, i) => {
    const n = first + i;
    const around = [words[n % 6], words[(n * 5 + 1) % 6]];
    return {
      text: `${around[0]} the ${n % 3 === 0 ? 'dog' : 'cat'} ${around[1]}`,
      label: n % 3 === 0 ? 'woof' : 'meow',
    };
  });

const tiny = (name: string, more: Partial<FinetuneConfig> = {}): FinetuneConfig => ({
  from: encoderDirectory('bert'),
  out: join(root, name),
  data: { kind: 'examples', examples: animals(96) },
  device: 'cpu',
  steps: 120,
  batchTokens: 256,
  sequenceLength: 24,
  optimizer: { lr: 1e-2 },
  seed: 1,
  ...more,
});

test('learns classes, and what it writes has the quality it reported', async () => {
  const heldOut = animals(30, 500);
  const events: TrainEvent[] = [];
  const result = await finetune(
    tiny('classes', {
      evalData: { kind: 'examples', examples: heldOut },
      evalEvery: 60,
      onEvent: (event) => void events.push(event),
    }),
  );
  expect(result).toMatchObject({
    ...{ stopped: 'done', step: 120, metric: 'accuracy', labels: ['meow', 'woof'], badRows: 0, truncated: 0 },
    examples: { train: 96, heldOut: 30 },
  });
  const evals = events.flatMap((event) => (event.type === 'eval' ? [event.levels['held-out']] : []));
  expect(evals).toHaveLength(3);
  expect(Object.keys(evals[0])).toEqual(['accuracy', 'f1', 'matthews', 'loss']);
  expect(evals[0].accuracy).toBeLessThan(0.9);
  expect(result.best!.metric).toBeGreaterThan(0.9);
  await using model = await loadModel(result.dir);
  expect(model.info).toMatchObject({ task: 'sequence-classification', labels: ['meow', 'woof'] });
  const told = await model.classify(heldOut.map(({ text }) => text));
  const right = told.filter(({ label }, i) => label === heldOut[i].label).length;
  expect(right / heldOut.length).toBeCloseTo(result.best!.metric, 12);
  const config = JSON.parse(readFileSync(join(result.dir, 'config.json'), 'utf8'));
  expect(config).toMatchObject({
    architectures: ['BertForSequenceClassification'],
    id2label: { 0: 'meow', 1: 'woof' },
    label2id: { meow: 0, woof: 1 },
    problem_type: 'single_label_classification',
  });
});

test.each(['roberta-mlm', 'xlm-roberta', 'distilbert-mlm'])('%s gets a head and learns pairs', async (name) => {
  const examples = animals(96).map(({ text, label }, i) => ({ text: words[i % 6], pair: text, label }));
  const source = { kind: 'examples', examples } as const;
  const result = await finetune(
    tiny(`pairs-${name}`, { from: encoderDirectory(name), data: source, evalData: source }),
  );
  expect(result.best!.metric).toBeGreaterThan(0.85);
  await using model = await loadModel(result.dir);
  const told = await model.classify(examples.map(({ text, pair }) => [text, pair] as [string, string]));
  const right = told.filter(({ label }, i) => label === examples[i].label).length;
  expect(right / examples.length).toBeCloseTo(result.best!.metric, 12);
});

test('learns numbers with a head that is for them', async () => {
  const examples = animals(96).map(({ text, label }, i) => ({
    text,
    label: (label === 'woof' ? 2 : -1) + (i % 2) / 10,
  }));
  const source = { kind: 'examples', examples } as const;
  const result = await finetune(
    tiny('numbers', { from: encoderDirectory('distilbert-score'), data: source, evalData: source }),
  );
  expect(result).toMatchObject({ metric: 'pearson' });
  expect(result.best!.metric).toBeGreaterThan(0.9);
  await using model = await loadModel(result.dir);
  const [cat, dog] = await model.classify(['walks the cat lake', 'walks the dog lake']);
  expect(cat.score).toBeLessThan(dog.score);
});

test('from scratch, stopped and started again, it ends at the same bits', async () => {
  const { from: _, ...config } = tiny('once', { steps: 12, heldOut: 0.2, evalEvery: 6, saveEvery: 3 });
  const scratch: FinetuneConfig = {
    ...config,
    tokenizer: encoderDirectory('bert'),
    model: {
      ...{ model_type: 'bert', hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2 },
      ...{ num_attention_heads: 2, max_position_embeddings: 32 },
    },
  };
  await finetune(scratch);
  const out = join(root, 'twice');
  const controller = new AbortController();
  const stopped = await finetune({
    ...scratch,
    out,
    signal: controller.signal,
    onEvent: (event) => void (event.type === 'step' && event.step === 5 && controller.abort()),
  });
  expect(stopped).toMatchObject({ stopped: 'signal', step: 5 });
  expect(await finetune({ ...scratch, out })).toMatchObject({ stopped: 'done', step: 12 });
  expect(await sha256File(join(out, 'model.safetensors'))).toBe(
    await sha256File(join(scratch.out, 'model.safetensors')),
  );
  await expect(finetune({ ...scratch, out, optimizer: { lr: 1 } })).rejects.toThrow('was made with optimizer');
});

describe('rows', () => {
  const tsv = join(root, 'rows.tsv');
  const lines = [
    'id\tsentence\tlabel',
    '0\tthe cat walks\t0',
    '1\tthe dog',
    '2\tthe dog\t1\tmore',
    '3\t\t1',
    '4\tthe dog\t',
    '5\tthe lake\tfair',
    '6\tthe owner\t3',
    `7\t${'the cat '.repeat(40)}\tgood`,
  ];
  writeFileSync(tsv, `${lines.join('\r\n')}\r\n`);
  const classes = encoderDirectory('bert-classes');

  it('that are bad are counted and named, with labels that the head has not, and long ones are cut; each is said once', async () => {
    const warnings: TrainEvent[] = [];
    const result = await finetune(
      tiny('skip', {
        ...{ from: classes, data: { kind: 'tsv', files: tsv }, badRows: 'skip', steps: 2, batchTokens: 64 },
        onEvent: (event) => void (event.type === 'warn' && warnings.push(event)),
      }),
    );
    expect(result).toMatchObject({ examples: { train: 3, heldOut: 0 }, badRows: 5, truncated: 1 });
    expect(result.labels).toEqual(['bad', 'fair', 'good']);
    expect(warnings).toEqual([
      {
        type: 'warn',
        code: 'bad-rows',
        message:
          `5 bad rows left out: ${tsv}:3 has 2 columns, not 3, ${tsv}:4 has 4 columns, not 3, ${tsv}:5 has an empty text, ` +
          `${tsv}:6 has no label, ${tsv}:8 has the label '3', which is none of the 3 that the head has: bad, fair, good`,
      },
      { type: 'warn', code: 'truncated', message: '1 of 3 texts are longer than 24 tokens and were cut' },
    ]);
  });

  it.each<[string, Partial<FinetuneConfig>, string]>([
    [
      'a bad row',
      { data: { kind: 'tsv', files: tsv } },
      `${tsv}:3 has 2 columns, not 3; badRows: 'skip' leaves such rows out`,
    ],
    [
      'a label that the head has not',
      { from: classes, data: { kind: 'examples', examples: [{ text: 'a cat', label: 'worse' }] } },
      "example 0 has the label 'worse', which is none of the 3 that the head has: bad, fair, good",
    ],
    [
      'a label that is no number',
      {
        from: encoderDirectory('distilbert-score'),
        data: { kind: 'examples', examples: [{ text: 'a cat', label: 'x' }] },
      },
      "example 0 has the label 'x', which is no number",
    ],
  ])('%s ends the run', async (_, more, message) => {
    const error = await finetune(tiny('stop', more)).catch((e) => e);
    expect(error).toBeInstanceOf(InvalidDataError);
    expect(error.message).toContain(message);
  });

  it('of JSON have fields of their own, labels of numbers, pairs', async () => {
    const file = join(root, 'rows.jsonl');
    const rows = [{ a: 'the cat', b: 'a dog', y: 0 }, { a: 'the dog', b: 'a lake', y: 2 }, { a: 'x', y: 1 }, 7];
    writeFileSync(file, [...rows.map((row) => JSON.stringify(row)), '{', ''].join('\n'));
    const data = { kind: 'jsonl', files: [file], field: 'a', pairField: 'b', labelField: 'y' } as const;
    const result = await finetune(tiny('json', { data, badRows: 'skip', steps: 1, batchTokens: 64 }));
    expect(result).toMatchObject({ labels: ['LABEL_0', 'LABEL_1', 'LABEL_2'], badRows: 3, examples: { train: 2 } });
  });

  it('of files without names of columns are read by those given', async () => {
    const file = join(root, 'cola.tsv');
    writeFileSync(file, 'gj04\t1\t\tthe cat walks\ngj04\t0\t*\tcat the walk\n');
    const data = { kind: 'tsv', files: file, columns: ['source', 'label', 'mark', 'sentence'] } as const;
    expect(await finetune(tiny('cola', { data, steps: 1 }))).toMatchObject({ examples: { train: 2 }, badRows: 0 });
  });
});

it.each<[string, object, string]>([
  ['no start', { from: undefined }, "[finetune] give 'from', the directory of a model, or model"],
  ['two starts', { model: {} }, "model and tokenizers are those of 'from': leave them out"],
  ['labels of a head', { from: encoderDirectory('bert-classes'), labels: ['a', 'b'] }, 'leave them out'],
  [
    'another task',
    { from: encoderDirectory('bert-classes'), task: 'regression' },
    "task must be absent or 'classification'",
  ],
  ['many classes of a text', { from: encoderDirectory('roberta-classes') }, 'got multi_label_classification'],
  ['one label', { data: { kind: 'examples', examples: [{ text: 'a', label: 'x' }] } }, 'have one label alone, x'],
  [
    'a metric of numbers',
    { metric: 'pearson' },
    'metric must be one of accuracy, f1, matthews of this task, got pearson',
  ],
  ['too long', { sequenceLength: 25 }, "sequenceLength must be at most the model's 24 positions, got 25"],
  ['an unknown option', { stepz: 1 }, "unknown option 'stepz'"],
  ['an unknown kind', { data: { kind: 'csv' } }, "kind must be 'tsv', 'jsonl' or 'examples', got \"csv\""],
  ['an unknown key', { data: { kind: 'tsv', files: 'a', fields: 'b' } }, "unknown key for kind 'tsv' 'fields'"],
  [
    'no column',
    { data: { kind: 'tsv', files: join(root, 'rows.tsv'), field: 'text' } },
    "has no column 'text'; it has id, sentence, label",
  ],
  ['no file', { data: { kind: 'tsv', files: join(root, 'none.tsv') } }, 'cannot read'],
  ['a decoder', { from: join(import.meta.dirname, '../../models/tiny') }, 'model_type must be one of bert'],
])('refuses %s', async (name, more, message) => {
  const out = join(root, `refused-${name}`);
  await expect(finetune(tiny('', { ...more, out } as Partial<FinetuneConfig>))).rejects.toThrow(message);
  expect(() => readFileSync(join(out, 'config.json'))).toThrow('ENOENT');
});
