// Nested feed-forwards of encoders: a slice is the model with its units cut off, bit for bit, and vectors say what they compare with.
import { cpSync, existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { elastify } from '../../lib/distill/rank.js';
import { readElastic, writeElastic } from '../../lib/elastic/store.js';
import { Program } from '../../lib/graph/index.js';
import { loadModel } from '../../lib/infer/model.js';
import type { TextInput } from '../../lib/infer/types.js';
import { Checkpoint, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { encoderFlops } from '../../lib/model/flops.js';
import type { EncoderSpec } from '../../lib/model/spec.js';
import { encoderDirectory, largestDifference, readCases } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';
import { editConfig } from './exits.js';

const inputsOf = (name: string): TextInput[] =>
  readCases(name).map(({ texts: [a, b] }) => (b === undefined ? a : ([a, b] as const)));
/** Of tensors of a feed-forward, which axis its units lie along. */
const unitAxis = (name: string): 0 | 1 | null => {
  if (/(intermediate\.dense|ffn\.lin1)\.(weight|bias)$/.test(name)) return 0;
  return /(\d\.output\.dense|ffn\.lin2)\.weight$/.test(name) ? 1 : null;
};

/** A copy of a directory with other values in its tensors. */
async function rewritten(
  dir: string,
  change: (name: string, tensor: { shape: number[]; data: Float32Array }) => { shape: number[]; data: Float32Array },
  config: object = {},
): Promise<string> {
  const out = temporaryDirectory();
  cpSync(dir, out, { recursive: true });
  editConfig(out, config);
  const tensors: Record<string, TensorData> = {};
  {
    using checkpoint = Checkpoint.open(dir);
    for (const name of checkpoint.names()) {
      const tensor = checkpoint.tensor(name);
      tensors[name] = { dtype: 'f32', ...change(name, { shape: [...tensor.shape], data: tensor.readFloat() }) };
    }
  }
  await writeSafetensors(join(out, 'model.safetensors'), tensors);
  return out;
}

/** The same checkpoint with `units` units of every feed-forward, cut by plain loops. */
function cut(dir: string, units: number): Promise<string> {
  const width =
    JSON.parse(readFileSync(join(dir, 'config.json'), 'utf8')).model_type === 'distilbert'
      ? 'hidden_dim'
      : 'intermediate_size';
  return rewritten(
    dir,
    (name, { shape, data }) => {
      const axis = unitAxis(name);
      if (axis === null) return { shape, data };
      const [rows, columns] = shape.length === 1 ? [shape[0], 1] : shape;
      const kept = axis === 0 ? [units, columns] : [rows, units];
      const values = Float32Array.from(
        { length: kept[0] * kept[1] },
        (_, i) => data[Math.floor(i / kept[1]) * columns + (i % kept[1])],
      );
      return { shape: shape.length === 1 ? [units] : kept, data: values };
    },
    { [width]: units },
  );
}

async function nested(model: string, more: object = {}, options: object = {}): Promise<string> {
  const out = join(temporaryDirectory(), 'nested');
  await elastify(model, { kind: 'matformer', granularities: [0.2, 0.5, 1], ...more }, { out, ...options });
  return out;
}

it.each(['minilm', 'roberta-mlm', 'distilbert-mlm'])(
  '%s: a slice is the model cut, full the backbone, bit for bit, and FLOPs are counted',
  async (name) => {
    const model = encoderDirectory(name);
    await using elastic = await loadModel(await nested(model));
    await using whole = await loadModel(model);
    const inputs = inputsOf(name);
    const { layers } = elastic.info;
    const full = await whole.embed(inputs);
    for (const units of [8, 20]) {
      await using small = await loadModel(await cut(model, units));
      const { vectors, usage } = await elastic.embed(inputs, { budget: { spec: { ffnWidth: units } } });
      const expected = await small.embed(inputs);
      expect(vectors).toEqual(expected.vectors);
      expect(usage.compute.flops).toBe(expected.usage.compute.flops);
      expect(usage.compute.ratio).toBe(expected.usage.compute.flops / full.usage.compute.flops);
      expect([...usage.compute.layersRun.mlp]).toEqual(new Array(layers).fill(Math.fround(units / 40)));
      expect([...usage.compute.layersRun.attn]).toEqual(new Array(layers).fill(1));
    }
    expect((await elastic.embed(inputs)).vectors).toEqual(full.vectors);
  },
);

it('classes of a slice are those of the model cut, each text with the bits that it has alone', async () => {
  const model = encoderDirectory('bert-classes');
  const inputs = inputsOf('bert-classes');
  await using elastic = await loadModel(await nested(model));
  await using small = await loadModel(await cut(model, 20));
  const budget = { spec: { ffnWidth: 0.5 } };
  const results = await elastic.classify(inputs, { budget });
  const expected = await small.classify(inputs);
  expect(results.map(({ scores }) => scores)).toEqual(expected.map(({ scores }) => scores));
  expect(results.map(({ compute }) => compute.flops)).toEqual(expected.map(({ compute }) => compute.flops));
  const alone = await elastic.classify(inputs, { budget, batch: 1 });
  expect(alone.map(({ scores }) => scores)).toEqual(results.map(({ scores }) => scores));
});

it('no width needs a program of its own, full included, and budgets are widths', async () => {
  await using model = await loadModel(await nested(encoderDirectory('minilm')));
  expect(model.info).toMatchObject({ elastic: true, calibrated: true });
  const { levels } = model.info;
  expect(levels.map(({ name }) => name)).toEqual(expect.arrayContaining(['full', 'ffn20', 'ffn50']));
  await model.embed('the cat');
  const compile = Program.compile;
  let compiled = 0;
  Program.compile = (...args) => {
    compiled++;
    return compile.apply(Program, args);
  };
  try {
    for (const budget of ['ffn20', 'ffn50', 0.7, 0.9, { spec: { ffnWidth: [0.2, 0.5] } }, 'full']) {
      const { usage } = await model.embed('the cat', { budget });
      if (typeof budget === 'number') expect(usage.compute.ratio).toBeLessThan(budget + 0.05);
    }
  } finally {
    Program.compile = compile;
  }
  expect(compiled).toBe(0);
  const spec = model.loaded.spec as EncoderSpec;
  const { compute } = (await model.embed('the cat', { budget: 'ffn20' })).usage;
  const length = (await model.features('the cat')).length / spec.hidden;
  expect(compute.flops).toBe(encoderFlops(spec, [length], 'none', { widths: [8, 8] }));
  expect(compute).toMatchObject({ requested: 'ffn20', level: 'ffn20', effective: { ffnWidth: 0.2 } });
  await expect(model.embed('a', { budget: 0.1 })).rejects.toThrow('budget 0.1 cannot be reached');
});

describe('units in order of importance', () => {
  const calibration = { kind: 'documents', documents: ['the cat saw the dog\n\nby the lake', 'a dog barks'] } as const;

  it('leave the function as it was, and the first ones are those that matter', async () => {
    const model = encoderDirectory('minilm');
    // Every second unit adds nothing.
    const half = await rewritten(model, (name, { shape, data }) => ({
      shape,
      data: unitAxis(name) === 1 ? data.map((value, i) => (i % 2 === 0 ? 0 : value)) : data,
    }));
    const dir = await nested(half, { rank: 'activation' }, { calibration });
    const { policy } = (await readElastic(dir))!;
    expect(policy.nested).toMatchObject({
      scores: 'activation',
      permutedFrom: expect.stringMatching(/^[0-9a-f]{64}$/),
    });
    await using whole = await loadModel(half);
    await using elastic = await loadModel(dir);
    const inputs = inputsOf('minilm');
    const expected = (await whole.embed(inputs)).vectors;
    const full = (await elastic.embed(inputs)).vectors;
    const slice = (await elastic.embed(inputs, { budget: 'ffn50' })).vectors;
    const narrow = (await elastic.embed(inputs, { budget: 'ffn20' })).vectors;
    for (const [i, vector] of expected.entries()) {
      expect(largestDifference(full[i], vector)).toBeLessThan(1e-5);
      expect(largestDifference(slice[i], vector)).toBeLessThan(1e-5);
    }
    // What is cut off of the units that matter shows.
    expect(Math.max(...expected.map((vector, i) => largestDifference(narrow[i], vector)))).toBeGreaterThan(1e-3);
  });

  it('need a text, and no loss', async () => {
    const model = encoderDirectory('minilm');
    await expect(nested(model, { rank: 'activation' })).rejects.toThrow('give calibration data');
    await expect(nested(model, { rank: 'taylor' }, { calibration })).rejects.toThrow("rank 'taylor' needs a loss, and");
  });
});

describe('spaceId', () => {
  it('of an untrained width is its own; of those trained together that of the full model', async () => {
    const dir = await nested(encoderDirectory('minilm'));
    const idsOf = async (path: string) => {
      await using model = await loadModel(path);
      const id = async (ffnWidth: number | number[]) =>
        (await model.embed('the cat', { budget: { spec: { ffnWidth } } })).spaceId;
      return {
        full: (await model.embed('the cat')).spaceId,
        fifth: await id(0.2),
        half: await id(20),
        between: await id(0.4),
        mixed: await id([0.2, 0.5]),
      };
    };
    const untrained = await idsOf(dir);
    expect(new Set(Object.values(untrained)).size).toBe(5);
    const { policy, routers } = (await readElastic(dir))!;
    const trained = join(temporaryDirectory(), 'trained');
    await writeElastic(trained, dir, { ...policy, nested: { ...policy.nested!, trained: 'all' } }, routers, null);
    const { full, fifth, half, between, mixed } = await idsOf(trained);
    expect([fifth, half, mixed]).toEqual([full, full, full]);
    expect(between).not.toBe(full);
  });
});

it('a directory of sentence-transformers keeps its pooling, and its files are hashed', async () => {
  const dir = await nested(encoderDirectory('minilm'));
  for (const file of ['modules.json', 'sentence_bert_config.json', '1_Pooling/config.json'])
    expect(existsSync(join(dir, file))).toBe(true);
  await using model = await loadModel(dir);
  expect(model.info.maxContext).toBe(16);
  const [vector] = (await model.embed('the cat')).vectors;
  expect(Math.hypot(...vector)).toBeCloseTo(1, 5);
  const manifest = JSON.parse(readFileSync(join(dir, 'elastic_manifest.json'), 'utf8'));
  expect(Object.keys(manifest.files)).toContain('1_Pooling/config.json');
  expect(readFileSync(join(dir, 'README.md'), 'utf8')).toContain('model.embed(');
});

it.each<[object, string]>([
  [
    { kind: 'elastiformer' },
    'bert is an encoder: it has exits and nested feed-forwards, and no routers; nest its feed-forwards',
  ],
  [{ kind: 'matformer', granularities: [0.5, 1], lora: { rank: 2 } }, 'and no lora'],
  [
    { kind: 'matformer', granularities: [0.5, 1], alignment: 7 },
    "must be a positive integer that divides the feed-forward's width 40",
  ],
])('%j is refused', async (recipe, message) => {
  const out = join(temporaryDirectory(), 'x');
  await expect(elastify(encoderDirectory('minilm'), recipe as never, { out })).rejects.toThrow(message);
  expect(existsSync(out)).toBe(false);
});
