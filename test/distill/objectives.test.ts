// Terms of the loss: their checks, weights over the steps, values, gradients, credit, and training with them.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { batchInputs, batchRun } from '../../lib/distill/batches.js';
import { type DistillConfig, distill } from '../../lib/distill/distill.js';
import { type LossTerm, lossFeeds, lossWeight, resolveLosses } from '../../lib/distill/objectives.js';
import { trainablePlan } from '../../lib/distill/plan.js';
import { capacityFeeds, type Teacher, trainProgram } from '../../lib/distill/steps.js';
import { Trainable } from '../../lib/distill/trainable.js';
import { type ElastiformerRecipe, elastify, policyOf } from '../../lib/elastic/elastify.js';
import type { ElasticPolicy } from '../../lib/elastic/policy.js';
import { Graph } from '../../lib/graph/graph.js';
import { Program } from '../../lib/graph/program.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { decoder, logits } from '../../lib/model/decoder.js';
import { bindWeights, loadWeights } from '../../lib/model/weights.js';
import { Engine } from '../../lib/native/index.js';
import { goldenDirectory, positionsOf, readSpec } from '../model/golden.js';
import { stories, temporaryDirectory, tinyModel } from './tiny.js';

const directory = join(goldenDirectory, 'elastiformer-llama');
const spec = readSpec(directory);
const ids = Int32Array.from({ length: 24 }, (_, i) => (i * 11 + 3) % 29);
const offsets = Int32Array.of(0, 12, 24);
const targets = ids.map((_, i) => (i % 12 === 11 ? -1 : ids[i + 1]));
const batch = { ids, positions: positionsOf(offsets), targets, offsets };

describe('resolveLosses', () => {
  const shape = { layers: 3, vocab: 50 };
  const refused = (term: Record<string, unknown>): string => {
    try {
      resolveLosses([term as LossTerm], shape);
    } catch (error) {
      return (error as Error).message;
    }
    return 'accepted';
  };

  it('names terms by kind and number, and fills in the last weight', () => {
    const losses = resolveLosses(
      [
        { kind: 'kl', weight: 1 },
        { kind: 'jsd', weight: 0, to: 2 },
        { kind: 'kl', weight: 2, to: 0, temperature: 2 },
      ],
      shape,
    );
    expect(losses.map(({ name, to }) => [name, to])).toEqual([
      ['kl', 1],
      ['jsd', 2],
      ['kl-2', 0],
    ]);
    expect(resolveLosses(undefined, shape).map(({ name }) => name)).toEqual(['kl', 'topk-bce', 'load-balance']);
  });

  it('changes weights linearly from the first step to the last', () => {
    const [loss] = resolveLosses([{ kind: 'kl', weight: 1, to: 0.2 }], shape);
    expect([0, 1, 2, 3, 4].map((step) => lossWeight(loss, step, 5))).toEqual([
      1, 0.8, 0.6, 0.3999999999999999, 0.19999999999999996,
    ]);
    expect(lossWeight(loss, 0, 1)).toBe(1);
  });

  it.each<[Record<string, unknown>, string]>([
    [{ kind: 'mse', weight: 1 }, 'a loss must be one of kl, reverse-kl, jsd, cross-entropy, hidden-cosine'],
    [{ kind: 'toString', weight: 1 }, 'a loss must be one of'],
    [{ kind: 'kl', weight: 0 }, 'the weight of kl must be positive, got 0'],
    [{ kind: 'kl', weight: 0, to: 0 }, 'the weight of kl must be positive'],
    [{ kind: 'kl', weight: Number.NaN }, 'the weight of kl must be positive'],
    [{ kind: 'kl', weight: '1' }, 'the weight of kl must be positive'],
    [{ kind: 'kl', weight: 1, to: -1 }, 'the to of kl must be zero or more, got -1'],
    [{ kind: 'kl', weight: 1, beta: 0.5 }, "unknown key of the loss kl 'beta'"],
    [{ kind: 'cross-entropy', weight: 1, temperature: 2 }, "unknown key of the loss cross-entropy 'temperature'"],
    [{ kind: 'kl', weight: 1, temperature: 0 }, 'the temperature of kl must be a positive number, got 0'],
    [{ kind: 'jsd', weight: 1, beta: 1 }, 'the beta of jsd must be between 0 and 1, got 1'],
    [
      { kind: 'reverse-kl', weight: 1, topK: 51 },
      "the topK of reverse-kl must be an integer from 1 to the vocabulary's 50",
    ],
    [{ kind: 'kl', weight: 1, topK: 1.5 }, 'the topK of kl must be an integer'],
    [
      { kind: 'hidden-mse', weight: 1, layers: [] },
      "the layers of hidden-mse must be 'all' or a list of layers from 0 to 2",
    ],
    [{ kind: 'hidden-mse', weight: 1, layers: [3] }, 'a list of layers from 0 to 2, got 3'],
    [
      { kind: 'topk-bce', weight: 1 },
      "loss must have a term of the student's output: kl, reverse-kl, jsd, cross-entropy",
    ],
  ])('refuses %j', (term, message) => expect(refused(term)).toContain(message));
});

interface StepOptions {
  from?: string;
  recipe?: Partial<ElastiformerRecipe>;
  capacity?: number;
  change?: (start: Float32Array) => void;
  step?: number;
  teacher?: (own: ReturnType<typeof loadWeights>) => Teacher;
}

/** One training step on the golden model, whose routers follow a sine. */
async function train(
  terms: readonly LossTerm[],
  { from = directory, recipe = { gate: 'raw' }, capacity = 1, change = () => {}, step = 0, teacher }: StepOptions = {},
) {
  const spec = readSpec(from);
  const policy = policyOf({ kind: 'elastiformer', ...recipe }, spec) as ElasticPolicy;
  using checkpoint = Checkpoint.open(from);
  using loaded = loadWeights(spec, checkpoint);
  using engine = new Engine();
  using trainable = new Trainable(trainablePlan(policy, spec));
  const start = Float32Array.from({ length: trainable.plan.size }, (_, i) => 0.1 * Math.sin(1.7 * i));
  change(start);
  trainable.params.write(start);
  const losses = resolveLosses(terms, spec);
  const model = { spec, weights: loaded.weights, policy, trainable, engine, batchTokens: 24 };
  using program = trainProgram({ ...model, ...(teacher && { teacher: teacher(loaded) }) }, losses);
  const { dims, feeds } = batchRun(batch);
  const { outputs, counters } = await program.run({
    dims,
    feeds: {
      ...feeds,
      ...capacityFeeds(policy, dims.segments, () => capacity),
      ...lossFeeds(losses, policy, batch, { step, steps: 11, total: 24, capacity: () => capacity }),
    },
  });
  const values = Object.fromEntries(Object.entries(outputs).map(([name, [value]]) => [name, value]));
  return { values, gradient: trainable.grads.readFloat(), counters };
}

/** Adds to one parameter, counted from the end when negative. */
const bump = (i: number, by: number) => (start: Float32Array) => {
  start.set([start.at(i)! + by], (i + start.length) % start.length);
};

const terms: LossTerm[] = [
  { kind: 'kl', weight: 1 },
  { kind: 'kl', weight: 1, temperature: 3 },
  { kind: 'kl', weight: 1, topK: 5 },
  { kind: 'reverse-kl', weight: 1 },
  { kind: 'reverse-kl', weight: 1, topK: 3, temperature: 0.5 },
  { kind: 'jsd', weight: 1, beta: 0.3 },
  { kind: 'cross-entropy', weight: 1 },
  { kind: 'hidden-cosine', weight: 1 },
  { kind: 'hidden-mse', weight: 1, layers: [0] },
  { kind: 'hidden-mse', weight: 1, layers: 'all' },
];

describe('gradients', () => {
  // At full capacity every row enters: through gates that are multipliers the loss is smooth.
  it.each(terms.map((term) => [JSON.stringify(term), term] as const))(
    'of %s are finite differences',
    async (_, term) => {
      const { gradient, values } = await train([term]);
      expect(values[term.kind]).toBeGreaterThan(0);
      const largest = gradient.reduce((most, g) => Math.max(most, Math.abs(g)), 0);
      expect(largest).toBeGreaterThan(1e-5);
      const h = 4e-3;
      for (let n = 0; n < 5; n++) {
        const i = n === 0 ? gradient.findIndex((g) => Math.abs(g) === largest) : Math.floor((n * gradient.length) / 5);
        const at = async (by: number) => {
          const moved = await train([term], { change: bump(i, by) });
          return moved.values[term.kind];
        };
        const difference = ((await at(h)) - (await at(-h))) / (2 * h);
        expect(Math.abs(gradient[i] - difference) / largest, `parameter ${i}`).toBeLessThan(0.03);
      }
    },
  );

  it('of a capacity that is missed point to it, and a capacity that is met has none', async () => {
    const capacity: LossTerm = { kind: 'capacity', weight: 1 };
    const alone = await train([{ kind: 'kl', weight: 1 }], { capacity: 0.25 });
    const { gradient, values } = await train([{ kind: 'kl', weight: 1 }, capacity], { capacity: 0.25 });
    const added = gradient.map((g, i) => g - alone.gradient[i]);
    const at = async (by: number) => {
      const moved = await train([{ kind: 'kl', weight: 1 }, capacity], {
        capacity: 0.25,
        change: bump(-1, by),
      });
      return moved.values.capacity;
    };
    // The last parameter is a bias: a larger one lets more tokens pass, which are too many.
    expect(added.at(-1)).toBeGreaterThan(0);
    expect(((await at(0.01)) - (await at(-0.01))) / 0.02).toBeCloseTo(added.at(-1)!, 4);
    expect(values.loss).toBeCloseTo(values.kl + values.capacity, 6);
    const met = await train([{ kind: 'kl', weight: 1 }, capacity], {
      capacity: 0.5,
      change: (start) => void start.fill(0),
    });
    expect(met.values.capacity).toBeLessThan(1e-12);
  });
});

describe('values', () => {
  /** Log-softmax of the logits of a full model at a temperature, [rows][vocab]. */
  async function distributions(from: string, of: typeof spec, temperature = 1) {
    using checkpoint = Checkpoint.open(from);
    using loaded = loadWeights(of, checkpoint);
    using engine = new Engine();
    const graph = new Graph();
    const weights = bindWeights(graph, loaded.weights);
    const { rows: _, segments: __, ...inputs } = batchInputs(graph, 24);
    graph.output('logits', logits(graph, of, weights, decoder(graph, of, weights, inputs)));
    using program = Program.compile(graph, engine);
    const all = (await program.run(batchRun(batch))).outputs.logits as Float32Array;
    return Array.from({ length: 24 }, (_, r) => {
      const row = Array.from(all.subarray(r * of.vocab, (r + 1) * of.vocab), (v) => v / temperature);
      const lse = Math.log(row.reduce((sum, v) => sum + Math.exp(v), 0));
      return row.map((v) => v - lse);
    });
  }
  const kl = (a: readonly number[], b: readonly number[]) => a.reduce((sum, x, i) => sum + Math.exp(x) * (x - b[i]), 0);
  const mixture = (p: readonly number[], q: readonly number[], beta: number) =>
    p.map((x, i) => Math.log(beta * Math.exp(x) + (1 - beta) * Math.exp(q[i])));
  /** The `count` likeliest of p and a bucket for the rest, of p and of q. */
  const buckets = (p: readonly number[], q: readonly number[], count: number) => {
    const order = p.map((_, i) => i).sort((i, j) => p[j] - p[i]);
    const rest = (x: readonly number[]) => Math.log(order.slice(count).reduce((sum, i) => sum + Math.exp(x[i]), 0));
    return [p, q].map((x) => [...order.slice(0, count).map((i) => x[i]), rest(x)]);
  };
  const expected: Record<string, (p: number[], q: number[]) => number> = {
    kl,
    'kl-2': (p, q) => 9 * kl(p, q),
    'kl-3': (p, q) => {
      const [a, b] = buckets(p, q, 5);
      return kl(a, b);
    },
    'reverse-kl': (p, q) => kl(q, p),
    'reverse-kl-2': (p, q) => {
      const [a, b] = buckets(p, q, 3);
      return 0.25 * kl(b, a);
    },
    jsd: (p, q) => 0.3 * kl(p, mixture(p, q, 0.3)) + 0.7 * kl(q, mixture(p, q, 0.3)),
  };

  it.each([
    ['elastiformer-llama', 'elastiformer-gpt2', 0],
    // Capped logits, whose caps the temperature divides too.
    ['gemma2', 'gemma3', 1.7],
  ])('of %s are those of the equations, of a teacher of another architecture: %s', async (own, other, softcap) => {
    const [directory, otherDirectory] = [own, other].map((name) => join(goldenDirectory, name));
    const spec = readSpec(directory);
    const otherSpec = { ...readSpec(otherDirectory), logitSoftcap: softcap };
    expect(otherSpec.vocab).toBe(spec.vocab);
    using checkpoint = Checkpoint.open(otherDirectory);
    using loaded = loadWeights(otherSpec, checkpoint);
    const compared = terms.filter(({ kind }) => kind !== 'hidden-mse' && kind !== 'hidden-cosine');
    // Gates of routers of zeros are exactly 1: the student is the full model.
    const { values } = await train(compared, {
      from: directory,
      recipe: { gate: 'two-sigma' },
      change: (start) => void start.fill(0),
      teacher: () => ({ spec: otherSpec, weights: loaded.weights }),
    });
    for (const { name, ...term } of resolveLosses(compared, spec)) {
      const { temperature = 1 } = term as { temperature?: number };
      const q = await distributions(directory, spec, temperature);
      const p = await distributions(otherDirectory, otherSpec, temperature);
      const value =
        name === 'cross-entropy'
          ? q.reduce((sum, row, r) => sum - (targets[r] < 0 ? 0 : row[targets[r]]), 0)
          : q.reduce((sum, row, r) => sum + expected[name](p[r], row), 0);
      expect(values[name] / (value / 24), name).toBeCloseTo(1, 4);
    }
  });

  it('hidden states are compared behind the same layers, by default the last, and all count alike', async () => {
    const mse = (layers?: 'all' | readonly number[]): LossTerm => ({
      kind: 'hidden-mse',
      weight: 1,
      ...(layers && { layers }),
    });
    const all = [
      mse(),
      mse([1]),
      mse([0]),
      mse('all'),
      { kind: 'hidden-cosine', weight: 1, layers: 'all' } as LossTerm,
    ];
    const same = await train(all, { recipe: { gate: 'two-sigma' }, change: (start) => void start.fill(0) });
    for (const { name } of resolveLosses(all, spec)) expect(Math.abs(same.values[name]), name).toBeLessThan(1e-9);
    const { values } = await train(all);
    expect(values['hidden-mse']).toBe(values['hidden-mse-2']);
    expect(values['hidden-mse']).not.toBeCloseTo(values['hidden-mse-3'], 6);
    expect(values['hidden-mse-4']).toBeCloseTo((values['hidden-mse-2'] + values['hidden-mse-3']) / 2, 6);
  });

  it('a term of the data alone runs no teacher', async () => {
    const { counters } = await train([{ kind: 'cross-entropy', weight: 1 }]);
    expect(Object.keys(counters).filter((tag) => tag.startsWith('teacher/'))).toEqual([]);
  });
});

describe('weights', () => {
  it('are fed: they follow the step, and gradients are linear in them', async () => {
    const both: LossTerm[] = [
      { kind: 'kl', weight: 1, to: 3 },
      { kind: 'hidden-mse', weight: 2, to: 0 },
    ];
    const [first, last] = [await train(both), await train(both, { step: 10 })];
    expect(first.values.loss).toBeCloseTo(first.values.kl + 2 * first.values['hidden-mse'], 5);
    expect(last.values.loss).toBeCloseTo(3 * last.values.kl, 5);
    expect(last.values.kl).toBe(first.values.kl);
    const kl = await train([{ kind: 'kl', weight: 1 }]);
    const largest = Math.max(...kl.gradient.map(Math.abs));
    for (const [i, g] of last.gradient.entries()) expect(Math.abs(g - 3 * kl.gradient[i]) / largest).toBeLessThan(1e-5);
  });
});

describe('credit', () => {
  const routed = { recipe: { tokens: { attn: 0.5, mlp: 0.5 } }, capacity: 0.5 };

  it('is of all terms of the output together, and weighs what they weigh', async () => {
    const gradient = async (...terms: LossTerm[]) => (await train(terms, routed)).gradient;
    const kl: LossTerm = { kind: 'kl', weight: 1 };
    const mse: LossTerm = { kind: 'hidden-mse', weight: 1e6, layers: [0] };
    const [ofKl, thrice, ofMse, both] = [
      await gradient(kl),
      await gradient({ kind: 'kl', weight: 3 }),
      await gradient({ ...mse, weight: 1 }),
      await gradient(kl, mse),
    ];
    const cosine = (a: Float32Array, b: Float32Array) => {
      const dot = (x: Float32Array, y: Float32Array) => x.reduce((sum, v, i) => sum + v * y[i], 0);
      return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
    };
    expect(Math.max(...ofMse.map(Math.abs))).toBeGreaterThan(0);
    const norm = (a: Float32Array) => Math.sqrt(a.reduce((sum, v) => sum + v * v, 0));
    expect(norm(thrice) / norm(ofKl)).toBeCloseTo(3, 4);
    expect(cosine(thrice, ofKl)).toBeGreaterThan(0.99999);
    expect(cosine(both, ofKl)).toBeLessThan(0.99);
  });

  it('without a teacher needs the layers of the full model, and no head of it', async () => {
    const { counters, gradient } = await train([{ kind: 'cross-entropy', weight: 1 }], routed);
    expect(Math.max(...gradient.map(Math.abs))).toBeGreaterThan(0);
    expect(counters['teacher/L1.mlp'].flops).toBeGreaterThan(0);
    const { counters: compared } = await train([{ kind: 'kl', weight: 1 }], routed);
    const head = 2 * 24 * spec.hidden * spec.vocab;
    expect(counters.head.flops).toBe(2 * head);
    expect(compared.head.flops).toBe(3 * head);
  });
});

describe('distill', () => {
  const root = temporaryDirectory();
  const plan = join(root, 'plan');
  beforeAll(async () => {
    await tinyModel(join(root, 'model'));
    await elastify(join(root, 'model'), { kind: 'elastiformer' }, { out: plan });
  });
  const config = (out: string, more: Partial<DistillConfig>): DistillConfig => ({
    plan,
    out: join(root, out),
    data: { kind: 'documents', documents: stories(60) },
    steps: 6,
    batchTokens: 128,
    sequenceLength: 32,
    calibrationTokens: 256,
    seed: 3,
    ...more,
  });

  it('trains with every term at once, and reports each', async () => {
    const all: LossTerm[] = [
      ...terms.filter((t, i) => terms.findIndex(({ kind }) => kind === t.kind) === i),
      { kind: 'topk-bce', weight: 0.1 },
      { kind: 'capacity', weight: 0.1, to: 0 },
    ];
    const { step } = await distill(config('all', { loss: all }));
    expect(step).toBe(6);
    const lines = readFileSync(join(root, 'all', 'metrics.jsonl'), 'utf8')
      .trim()
      .split('\n')
      .map((l) => JSON.parse(l));
    const first = lines.find((event) => event.type === 'step');
    expect(Object.keys(first.terms).sort()).toEqual([...all.map(({ kind }) => kind), 'agree'].sort());
    const total = all.reduce((sum, { kind, weight }) => sum + weight * first.terms[kind], 0);
    expect(first.loss).toBeCloseTo(total, 4);
  });

  it('does not resume with other terms', async () => {
    const loss: LossTerm[] = [{ kind: 'jsd', weight: 1, to: 0.5 }];
    await distill(config('resumed', { loss, steps: 2 }));
    const other = distill(config('resumed', { loss: [{ kind: 'jsd', weight: 1 }], steps: 2 }));
    await expect(other).rejects.toThrow(/made with losses = .*"to":0.5.* this run has .*"to":1/);
  });
});
