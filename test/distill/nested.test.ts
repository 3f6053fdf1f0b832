// Training of nested feed-forwards: gradients of slices, the three ways to choose widths, from scratch and from a model.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { batchRun } from '../../lib/distill/batches.js';
import { distill } from '../../lib/distill/distill.js';
import type { TrainEvent } from '../../lib/distill/events.js';
import { type LossTerm, lossFeeds, resolveLosses } from '../../lib/distill/objectives.js';
import { trainablePlan } from '../../lib/distill/plan.js';
import { lossProgram, lossRun, pretrain } from '../../lib/distill/pretrain.js';
import { Random } from '../../lib/distill/random.js';
import { elastify as rankedElastify } from '../../lib/distill/rank.js';
import { type DistillModel, fedTeacher, teacherProgram, trainProgram } from '../../lib/distill/steps.js';
import { Trainable } from '../../lib/distill/trainable.js';
import { Widths } from '../../lib/distill/widths.js';
import { elastify, policyOf, type Recipe } from '../../lib/elastic/elastify.js';
import { type Nested, widthDims } from '../../lib/elastic/nested.js';
import type { ElasticPolicy } from '../../lib/elastic/policy.js';
import { readElastic } from '../../lib/elastic/store.js';
import { loadModel } from '../../lib/infer/model.js';
import { evaluate } from '../../lib/infer/quality/evaluate.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { type ModelSpec, specFromConfig } from '../../lib/model/spec.js';
import { initialWeights, loadWeights, parameterPlan } from '../../lib/model/weights.js';
import { Engine } from '../../lib/native/index.js';
import { goldenDirectory, largestDifference, readSpec } from '../model/golden.js';
import { stories, temporaryDirectory, tinyConfig, tinyModel, tinyPretraining } from './tiny.js';

const granularities = [0.25, 0.5, 1];
const documents = { kind: 'documents' as const, documents: stories(120) };
const agreements = async (dir: string): Promise<number[]> => {
  await using model = await loadModel(dir);
  const report = await evaluate(model, { data: stories(40), budgets: ['ffn50', 'ffn25'], speed: false });
  return report.levels.map(({ kl }) => kl.value);
};

test.each([
  ['llama', tinyConfig],
  ['gpt2', { model_type: 'gpt2', n_embd: 24, n_head: 3, n_layer: 2, n_inner: 40, n_positions: 32 }],
])('the gradient of a slice is that of the extracted model, and nothing beyond it: %s', async (_, config) => {
  const whole = specFromConfig({ ...config, vocab_size: 50 }, 'config.json');
  const units = whole.ffn / 4;
  const perLayer = whole.perLayer.map((layer) => ({ ...layer, ffn: units }));
  const small: ModelSpec = { ...whole, ffn: units, perLayer };
  const random = new Random(1, 'test');
  const flat = initialWeights(whole, () => random.normal());
  const ids = Int32Array.from({ length: 20 }, () => random.below(50));
  const batch = {
    ids,
    positions: Int32Array.from(ids, (_, i) => i % 12),
    offsets: Int32Array.of(0, 12, 20),
    targets: Int32Array.from(ids, (_, i) => (i === 11 || i === 19 ? -1 : ids[i + 1])),
  } as unknown as Parameters<typeof lossRun>[0];
  const layers = Array.from({ length: whole.layers }, (_, layer) => layer);
  const nested: Nested = { layers, granularities, alignment: 1, scores: 'none' };
  using engine = new Engine('cpu');
  const grads = async (spec: ModelSpec, values: Float32Array, width?: number) => {
    using trainable = new Trainable(parameterPlan(spec));
    trainable.params.write(values);
    const options = { batchTokens: 32, train: true, ...(width !== undefined && { nested }) };
    using program = lossProgram(spec, trainable, engine, options);
    const dims = width === undefined ? {} : widthDims(nested, new Array(spec.layers).fill(width), spec.ffn);
    await program.run(lossRun(batch, 1, dims));
    return trainable.grads.readFloat();
  };
  // A parameter of the small model within that of the whole: its first rows, or of down its first columns.
  const cut = (from: Float32Array): { values: Float32Array; rest: number[] } => {
    const values = new Float32Array(parameterPlan(small).size);
    const left = new Set(from.keys());
    const places = new Map(parameterPlan(whole).parameters.map((p) => [p.name, p]));
    for (const { name, shape, offset, size } of parameterPlan(small).parameters) {
      const { offset: at, shape: wide } = places.get(name)!;
      const columns = shape[1] ?? 1;
      for (let i = 0; i < size; i++) {
        const source = at + Math.floor(i / columns) * (wide[1] ?? 1) + (i % columns);
        values[offset + i] = from[source];
        left.delete(source);
      }
    }
    return { values, rest: [...left].map((i) => from[i]) };
  };
  const sliced = cut(await grads(whole, flat, units));
  expect(sliced.values).toEqual(await grads(small, cut(flat).values));
  expect(sliced.rest.length).toBeGreaterThan(0);
  expect(sliced.rest.every((g) => g === 0)).toBe(true);
  expect(await grads(whole, flat, whole.ffn)).toEqual(await grads(whole, flat));
});

test('which widths a step trains', () => {
  const spec = specFromConfig({ ...tinyConfig, vocab_size: 50 }, 'config.json');
  const nested: Nested = { layers: [0, 1, 2], granularities: [0.125, 0.25, 0.5, 1], alignment: 8, scores: 'none' };
  const draws = (sample: object | undefined, below = false) => {
    const widths = Widths.of('distill', sample, nested, spec, below);
    return Array.from({ length: 400 }, (_, i) => widths.draw(new Random(1, 'width', i)));
  };
  const names = (list: ReturnType<typeof draws>) =>
    new Set(list.map((widths) => widths.map(({ name }) => name).join()));
  expect(names(draws(undefined))).toEqual(new Set(['ffn12.5,ffn25,ffn50,full']));
  expect(names(draws(undefined, true))).toEqual(new Set(['ffn12.5,ffn25,ffn50']));
  expect(names(draws({ strategy: 'sandwich' }))).toEqual(new Set(['ffn12.5,ffn25,full', 'ffn12.5,ffn50,full']));
  const random = draws({ strategy: 'random', weights: [1, 1, 1, 5] });
  const full = random.filter(([{ name }]) => name === 'full').length;
  expect(Math.abs(full - 250)).toBeLessThan(30);
  expect(random.every((widths) => widths.length === 1 && widths[0].weight === 1)).toBe(true);
  expect(draws({ weights: [1, 2, 3, 4] })[0].map(({ weight }) => weight)).toEqual([1, 2, 3, 4]);
  expect(draws(undefined)[0][1].dims).toEqual({ 'ffn.0': 16, 'ffn.1': 16, 'ffn.2': 16 });
  expect(() => draws({ strategy: 'all' })).toThrow(/sample.strategy must be one of joint, random, sandwich, got "all"/);
  expect(() => draws({ weights: [1, 1] })).toThrow(/sample.weights must be 4 positive numbers/);
  expect(() => draws({ weights: [1, 1, 0, 1] })).toThrow(/sample.weights must be/);
  expect(() => draws({ every: 1 })).toThrow(/unknown key of sample 'every'/);
  expect(() => Widths.of('distill', {}, undefined, spec)).toThrow(/no feed-forward is nested/);
});

test.each(['joint', 'random', 'sandwich'] as const)('pretraining by %s: every slice learns', async (strategy) => {
  const [nested, plain] = [temporaryDirectory(), temporaryDirectory()];
  const events: TrainEvent[] = [];
  const more = { nested: { granularities }, sample: { strategy }, steps: 50, heldOut: 0.1, evalEvery: 50 };
  await pretrain(tinyPretraining(nested, { ...more, onEvent: (event) => events.push(event) && undefined }));
  await pretrain(tinyPretraining(plain, { steps: 50 }));
  expect((await readElastic(nested))?.policy.nested).toMatchObject({ granularities, trained: 'all', alignment: 16 });
  const evals = events.filter((event) => event.type === 'eval');
  expect(Object.keys(evals[0].levels)).toEqual(['ffn25', 'ffn50', 'full']);
  for (const name of ['ffn25', 'ffn50', 'full']) {
    expect(evals.at(-1)!.levels[name].loss).toBeLessThan(0.6 * evals[0].levels[name].loss);
  }
  // Slices of a model that was trained whole are far from it.
  await elastify(plain, { kind: 'matformer', granularities }, { out: join(plain, 'nested') });
  const [trained, sliced] = [await agreements(nested), await agreements(join(plain, 'nested'))];
  for (const i of trained.keys()) expect(trained[i]).toBeLessThan(0.5 * sliced[i]);
});

test('a stopped run continues to the same bits', async () => {
  const [once, twice] = [temporaryDirectory(), temporaryDirectory()];
  const config = (out: string) =>
    tinyPretraining(out, { nested: { granularities }, sample: { strategy: 'random' }, steps: 12, saveEvery: 4 });
  await pretrain(config(once));
  await pretrain({
    ...config(twice),
    onEvent: (event) => (event.type === 'step' && event.step === 6 ? 'stop' : undefined),
  });
  await pretrain(config(twice));
  const weights = (dir: string) => readFileSync(join(dir, 'model.safetensors'));
  expect(weights(twice).equals(weights(once))).toBe(true);
  await expect(pretrain({ ...config(twice), sample: { strategy: 'joint' } })).rejects.toThrow(/made with widths/);
});

test('a pretrained model: feed-forwards alone, and all of it', async () => {
  const base = await tinyModel(temporaryDirectory());
  const plan = join(temporaryDirectory(), 'plan');
  await elastify(base, { kind: 'matformer', granularities }, { out: plan });
  const before = await agreements(plan);
  const { model: _, tokenizer: __, ...training } = tinyPretraining('', { steps: 40, optimizer: { lr: 3e-3 } });
  for (const part of ['ffn', 'all'] as const) {
    const out = join(temporaryDirectory(), part);
    await pretrain({ ...training, from: plan, train: part, out });
    expect((await readElastic(out))?.policy.nested).toMatchObject({ granularities, trained: part });
    const after = await agreements(out);
    for (const i of after.keys()) expect(after[i]).toBeLessThan(0.7 * before[i]);
    using old = Checkpoint.open(base);
    using now = Checkpoint.open(out);
    for (const name of old.names()) {
      const same = Buffer.from(old.tensor(name).readFloat().buffer).equals(
        Buffer.from(now.tensor(name).readFloat().buffer),
      );
      expect([name, same]).toEqual([name, part === 'ffn' && !name.includes('mlp')]);
    }
  }
});

test('corrections of a frozen model: narrower widths come closer, the whole one stays to the bit', async () => {
  const base = await tinyModel(temporaryDirectory());
  const plan = join(temporaryDirectory(), 'plan');
  const recipe = { kind: 'matformer', granularities, lora: { rank: 4 } } as const;
  await elastify(base, recipe, { out: plan });
  const before = await agreements(plan);
  const events: TrainEvent[] = [];
  const out = join(temporaryDirectory(), 'out');
  await distill({
    ...{ plan, out, data: documents, device: 'cpu', steps: 40, batchTokens: 256, sequenceLength: 48 },
    ...{ loraLr: 1e-2, heldOut: 0.1, evalEvery: 40, seed: 2, onEvent: (event) => events.push(event) && undefined },
  });
  const elastic = await readElastic(out);
  expect(elastic?.policy).toMatchObject({ nested: { trained: 'lora' }, calibration: null });
  expect([...elastic!.lora!.keys()]).toContain('layers.0.down');
  const after = await agreements(out);
  for (const i of after.keys()) expect(after[i]).toBeLessThan(0.7 * before[i]);
  await using backbone = await loadModel(base);
  await using model = await loadModel(out);
  const ids = [3, 5, 8, 20, 31];
  expect(await model.logits(ids)).toEqual(await backbone.logits(ids));
  const evals = events.filter((event) => event.type === 'eval');
  expect(Object.keys(evals[0].levels)).toEqual(['ffn25', 'ffn50']);
  expect(evals.at(-1)!.levels.ffn25.kl).toBeLessThan(evals[0].levels.ffn25.kl);
});

describe('one run of the teacher serves every width of a batch', () => {
  const directory = join(goldenDirectory, 'gemma2');
  const spec = readSpec(directory);
  const policyWith = (...more: Recipe[]) =>
    policyOf([{ kind: 'matformer', granularities, lora: { rank: 2 } }, ...more], spec) as ElasticPolicy;
  const losses = (...terms: LossTerm[]) => resolveLosses(terms, spec);
  const kl = { kind: 'kl', weight: 1 } as const;

  test.each<[string, LossTerm[]]>([
    ['kl', [kl]],
    [
      'several terms',
      [
        { ...kl, temperature: 2 },
        { kind: 'reverse-kl', weight: 0.5, topK: 4 },
        { kind: 'cross-entropy', weight: 0.3 },
      ],
    ],
  ])('%s: the bits of the teacher beside the student', async (_, terms) => {
    using checkpoint = Checkpoint.open(directory);
    using loaded = loadWeights(spec, checkpoint);
    using engine = new Engine();
    const policy = policyWith();
    const batch = {
      ids: Int32Array.from({ length: 12 }, (_, i) => (i * 11 + 3) % spec.vocab),
      positions: Int32Array.from({ length: 12 }, (_, i) => i % 7),
      targets: Int32Array.from({ length: 12 }, (_, i) => (i * 5) % spec.vocab),
      offsets: Int32Array.of(0, 7, 12),
    };
    const given = losses(...terms);
    const run = async (fed: boolean) => {
      using trainable = new Trainable(trainablePlan(policy, spec));
      trainable.params.write(Float32Array.from({ length: trainable.plan.size }, (_, i) => 0.2 * Math.sin(1.7 * i)));
      const model = { spec, weights: loaded.weights, policy, trainable, engine, batchTokens: 12 };
      const once = fedTeacher(model, given)!;
      const { dims, feeds } = batchRun(batch);
      using lessons = teacherProgram(model, once);
      const teacher = (await lessons.run({ dims, feeds })).outputs.hidden;
      using program = trainProgram({ ...model, ...(fed && { teacher: once }) }, given);
      const loss: number[] = [];
      const tags = new Set<string>();
      for (const { dims: units } of Widths.of('distill', undefined, policy.nested, spec, true).all) {
        const { outputs, counters } = await program.run({
          dims: { ...dims, ...units },
          feeds: {
            ...{ ...feeds, ...(fed && { teacher }) },
            ...lossFeeds(given, policy, batch, { step: 0, steps: 1, total: 12, capacity: () => 1 }),
          },
        });
        loss.push(outputs.loss[0]);
        for (const tag of Object.keys(counters)) tags.add(tag);
      }
      return { loss, gradient: trainable.grads.readFloat(), tags };
    };
    const [beside, fed] = [await run(false), await run(true)];
    expect(fed.loss).toEqual(beside.loss);
    expect(fed.loss.every((loss) => loss > 0)).toBe(true);
    expect(fed.gradient).toEqual(beside.gradient);
    const layers = (tags: Set<string>) => [...tags].filter((tag) => /^teacher\/L/.test(tag));
    expect(layers(fed.tags)).toEqual([]);
    expect(layers(beside.tags)).not.toEqual([]);
  });

  test('not where training needs the inside of the full model, or no model', () => {
    const once = (policy: ElasticPolicy, ...terms: LossTerm[]) =>
      fedTeacher({ spec, policy } as DistillModel, losses(...terms)) !== null;
    expect(once(policyWith(), kl)).toBe(true);
    expect(once(policyWith(), { kind: 'cross-entropy', weight: 1 })).toBe(false);
    expect(once(policyWith(), kl, { kind: 'hidden-mse', weight: 1 })).toBe(false);
    expect(once(policyWith({ kind: 'elastiformer', gate: 'raw' }), kl)).toBe(true);
    expect(once(policyWith({ kind: 'elastiformer' }), kl)).toBe(false);
    expect(fedTeacher({ spec, policy: policyWith(), teacher: { topK: 4 } } as DistillModel, losses(kl))).toBe(null);
  });
});

test('what cannot be trained is refused', async () => {
  const base = await tinyModel(temporaryDirectory());
  const plan = join(temporaryDirectory(), 'plan');
  await elastify(base, { kind: 'matformer', granularities }, { out: plan });
  const out = join(temporaryDirectory(), 'out');
  await expect(distill({ plan, out, data: documents, steps: 1 })).rejects.toThrow(/neither routers nor corrections/);
  const config = { out, data: documents, steps: 1, from: plan };
  await expect(pretrain({ ...config, nested: { granularities } })).rejects.toThrow(/is nested already/);
  await expect(pretrain({ ...config, train: 'lora' as 'ffn' })).rejects.toThrow(/train must be 'all' or 'ffn'/);
  await expect(pretrain({ ...config, tokenizer: base })).rejects.toThrow(/model and tokenizer are those of 'from'/);
  const { from: _, ...scratch } = { ...tinyPretraining(out), ...config };
  await expect(pretrain({ ...scratch, train: 'ffn' })).rejects.toThrow(/it needs 'from'/);
  await expect(pretrain({ ...scratch, nested: { granularities: [0.5] } })).rejects.toThrow(/must end with 1/);
  await expect(pretrain({ ...scratch, sample: {} })).rejects.toThrow(/no feed-forward is nested/);
  const routed = join(temporaryDirectory(), 'routed');
  await elastify(base, { kind: 'elastiformer' }, { out: routed });
  await expect(pretrain({ ...config, from: routed })).rejects.toThrow(/has routers or corrections/);
});

describe.each(['activation', 'taylor'] as const)('units in the order of %s', (rank) => {
  test.each(['llama', 'gpt2'])('%s: the same function, and better slices', async (family) => {
    const model = temporaryDirectory();
    const gpt2 = { model_type: 'gpt2', n_embd: 32, n_head: 4, n_layer: 2, n_inner: 64, n_positions: 64 };
    await pretrain(tinyPretraining(model, { ...(family === 'gpt2' && { model: gpt2 }), saveAs: 'bf16' }));
    const [plain, ranked] = [join(model, 'plain'), join(model, 'ranked')];
    await elastify(model, { kind: 'matformer', granularities }, { out: plain });
    const progress: string[] = [];
    const calibration = { kind: 'documents' as const, documents: stories(60) };
    const options = { out: ranked, calibration, device: 'cpu' as const };
    await rankedElastify(
      model,
      { kind: 'matformer', granularities, rank },
      {
        ...options,
        onProgress: ({ phase }) => progress.push(phase),
      },
    );
    expect(progress).toContain('ranking units');
    const { policy } = (await readElastic(ranked))!;
    const { weightsSha256 } = (await readElastic(plain))!.policy.base;
    expect(policy.nested).toMatchObject({ scores: rank, permutedFrom: weightsSha256 });
    expect(policy.base.weightsSha256).not.toBe(weightsSha256);
    await using a = await loadModel(model, { dtype: 'f32' });
    await using b = await loadModel(ranked, { dtype: 'f32' });
    const ids = Array.from({ length: 30 }, (_, i) => 1 + ((i * 37) % 200));
    expect(largestDifference(await a.logits(ids), await b.logits(ids))).toBeLessThan(1e-4);
    const [before, after] = [await agreements(plain), await agreements(ranked)];
    expect(after[0] + after[1]).toBeLessThan(before[0] + before[1]);
  });
});

test('a rank needs a text to measure on', async () => {
  const base = await tinyModel(temporaryDirectory());
  const out = join(base, 'ranked');
  const recipe = { kind: 'matformer', granularities, rank: 'taylor' } as const;
  await expect(rankedElastify(base, recipe, { out })).rejects.toThrow(
    /measures units on a text: give calibration data/,
  );
  await expect(rankedElastify(base, { ...recipe, rank: 'size' as 'none' }, { out })).rejects.toThrow(
    /rank must be one of activation, taylor, none, got "size"/,
  );
});
