// Self-distillation against PyTorch: losses, rows chosen, and gradients of KL + BCE with respect to the routers.
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { batchRun } from '../../lib/distill/batches.js';
import { lossFeeds, resolveLosses } from '../../lib/distill/objectives.js';
import { trainablePlan } from '../../lib/distill/plan.js';
import {
  capacityFeeds,
  type DistillModel,
  evalProgram,
  logitsProgram,
  teacherProgram,
  trainProgram,
} from '../../lib/distill/steps.js';
import { Trainable } from '../../lib/distill/trainable.js';
import { policyOf } from '../../lib/elastic/elastify.js';
import { type AttentionKeys, type GateMode, routerPlaces } from '../../lib/elastic/policy.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { loadWeights } from '../../lib/model/weights.js';
import { Engine } from '../../lib/native/index.js';
import { goldenDirectory, largestDifference, positionsOf, readSpec, readVectors } from '../model/golden.js';

let engine: Engine;
beforeAll(() => {
  engine = new Engine();
});
afterAll(() => engine.dispose());

const cases = ['llama', 'gpt2'].flatMap((family) =>
  (['straight-through', 'raw'] as const).flatMap((gate) =>
    (['all', 'selected'] as const).map((keys) => [family, gate, keys] as [string, GateMode, AttentionKeys]),
  ),
);

const losses = ({ spec }: DistillModel) =>
  resolveLosses(
    [
      { kind: 'kl', weight: 1 },
      { kind: 'topk-bce', weight: 0.1 },
    ],
    spec,
  );

/** The golden model, a batch of all its sequences, and the vectors. */
function setUp(family: string, gate: GateMode, keys: AttentionKeys) {
  const directory = join(goldenDirectory, `elastiformer-${family}`);
  const spec = readSpec(directory);
  const vectors = readVectors(join(directory, `routed-${gate}-${keys}.safetensors`));
  const checkpoint = Checkpoint.open(directory);
  const loaded = loadWeights(spec, checkpoint);
  const policy = {
    ...policyOf({ kind: 'elastiformer', tokens: { attn: 0.5, mlp: 0.5 }, gate, keys }, spec),
    base: { name: family, weightsSha256: '', tokenizerSha256: null },
  };
  const trainable = new Trainable(trainablePlan(policy, spec));
  for (const { name } of trainable.plan.parameters) trainable.view(name).write(vectors[`router.${name}`]);
  const ids = Int32Array.from(vectors.ids);
  const batch = {
    ids,
    positions: positionsOf(vectors.offsets),
    targets: ids,
    offsets: Int32Array.from(vectors.offsets),
  };
  const model: DistillModel = { spec, weights: loaded.weights, policy, trainable, engine, batchTokens: ids.length };
  const { dims, feeds } = batchRun(batch);
  const run = (capacity: number) => ({
    dims,
    feeds: {
      ...feeds,
      ...capacityFeeds(policy, dims.segments, () => capacity),
    },
  });
  const weight = new Float32Array(dims.rows).fill(1 / dims.rows);
  const runLoss = (capacity: number) => {
    const { dims, feeds } = run(capacity);
    return { dims, feeds: { ...feeds, weight } };
  };
  const runTraining = (capacity: number) => {
    const { dims, feeds } = run(capacity);
    const at = { step: 0, steps: 1, total: dims.rows, capacity: () => capacity };
    return { dims, feeds: { ...feeds, ...lossFeeds(losses(model), policy, batch, at) } };
  };
  const dispose = () => {
    trainable.dispose();
    loaded.dispose();
    checkpoint.dispose();
  };
  return { model, vectors, run, runLoss, runTraining, [Symbol.dispose]: dispose };
}

describe.each(cases)('%s, %s gates, keys of %s rows', (family, gate, keys) => {
  it.each([false, true])(
    'has the losses and router gradients of PyTorch (recomputing blocks: %s)',
    async (recompute) => {
      using set = setUp(family, gate, keys);
      const { model, vectors, runTraining: run } = set;
      using program = trainProgram(model, losses(model), { recompute });
      const { outputs } = await program.run(run(0.5));
      expect(outputs.kl[0]).toBeCloseTo(vectors['loss.kl'][0], 5);
      expect(outputs['topk-bce'][0]).toBeCloseTo(vectors['loss.bce'][0], 5);
      expect(outputs.loss[0]).toBeCloseTo(vectors['loss.total'][0], 5);
      const grads = model.trainable.grads.readFloat();
      for (const { name, offset, size } of model.trainable.plan.parameters) {
        const expected = vectors[`grad.${name}`];
        const scale = Math.max(...[...expected].map(Math.abs), 1e-3);
        expect(largestDifference(grads.subarray(offset, offset + size), expected) / scale, name).toBeLessThan(1e-3);
      }
    },
  );

  it('scores rows as PyTorch does', async () => {
    using set = setUp(family, gate, keys);
    const { model, vectors, run } = set;
    using program = logitsProgram(model);
    const { outputs } = await program.run(run(0.5));
    for (const { id } of routerPlaces(model.policy))
      expect(largestDifference(outputs[id], vectors[`z.${id}`]), id).toBeLessThan(1e-4);
  });

  it('adds micro-batches up to the same gradient', async () => {
    using set = setUp(family, gate, keys);
    const { model, runTraining: run } = set;
    using program = trainProgram(model, losses(model));
    await program.run(run(0.5));
    const once = model.trainable.grads.readFloat();
    await program.run(run(0.5));
    expect(
      largestDifference(
        model.trainable.grads.readFloat(),
        once.map((g) => 2 * g),
      ),
    ).toBeLessThan(1e-6);
  });
});

it.each(['llama', 'gpt2'])('%s: at full capacity the student is the teacher, bit for bit', async (family) => {
  using set = setUp(family, 'straight-through', 'all');
  using teacher = teacherProgram(set.model);
  using program = evalProgram(set.model);
  const { dims, feeds } = set.runLoss(1);
  const { ids, positions, offsets } = feeds;
  const { hidden } = (await teacher.run({ dims, feeds: { ids, positions, offsets } })).outputs;
  const { outputs } = await program.run({ dims, feeds: { ...feeds, teacher: hidden } });
  expect(outputs.kl[0]).toBe(0);
  expect(outputs.agree[0]).toBeCloseTo(1, 6);
});

it.each(['llama', 'gpt2'])('%s: half the capacity costs half the work, forward and backward', async (family) => {
  using set = setUp(family, 'straight-through', 'selected');
  using program = trainProgram(set.model, losses(set.model));
  const tags = routerPlaces(set.model.policy).map(({ layer, place }) => `L${layer}.${place}`);
  const full = (await program.run(set.runTraining(1))).counters;
  const half = (await program.run(set.runTraining(0.5))).counters;
  for (const tag of tags) {
    const { spec } = set.model;
    const { rows } = set.run(1).dims;
    // Routers score every row at any capacity.
    const routing = 2 * rows * spec.hidden;
    const ratio = (half[tag].flops - routing) / (full[tag].flops - routing);
    expect(half[tag].rows / full[tag].rows, tag).toBeCloseTo(0.5, 1);
    expect(ratio, tag).toBeLessThan(0.56);
    // What enters the first sub-layer needs no gradient: nothing before it is trained.
    if (tag === tags[0]) expect(full[`${tag}/grad`].flops).toBeLessThan(4 * routing);
    else expect(half[`${tag}/grad`].flops / full[`${tag}/grad`].flops, `${tag}/grad`).toBeLessThan(0.6);
  }
});
