// Corrections of projections (LoRA): the gradient of every one, the backbone at full budget, and what is trained and saved.
import { existsSync, readFileSync } from 'node:fs';
import { cp, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { distill } from '../../lib/distill/distill.js';
import { flopsRatio } from '../../lib/elastic/cost.js';
import { type ElastiformerRecipe, elastify, policyOf } from '../../lib/elastic/elastify.js';
import { type ElasticPolicy, routerPlaces } from '../../lib/elastic/policy.js';
import { readElastic, writeElastic } from '../../lib/elastic/store.js';
import { loadModel } from '../../lib/infer/model.js';
import { projections } from '../../lib/model/select.js';
import { goldenDirectory, largestDifference, readSpec } from '../model/golden.js';
import { trainStep } from './step.js';
import { stories, temporaryDirectory, tinyModel } from './tiny.js';

const root = temporaryDirectory();
type Cases = [string, Partial<ElastiformerRecipe>][];
const everywhere: Cases = [
  ['routed tokens', {}],
  ['keys of selected rows only', { keys: 'selected' }],
  ['blocks', { blocks: { count: 4, gate: 'softmax' } }],
  ['blocks and routed tokens', { blocks: { count: 4, gate: 'softmax' }, tokens: { attn: 0.5, mlp: 0.5 } }],
];
describe.each<[string, Cases]>([
  ['elastiformer-llama', everywhere],
  ['elastiformer-gpt2', everywhere],
  ['gemma2', everywhere],
  // Layer 2 has no keys of its own.
  [
    'gemma3n',
    [['routed tokens', { tokens: { mlp: 0.5 }, lora: { rank: 1, targets: [...projections], layers: [1, 2] } }]],
  ],
])('%s', (name, cases) => {
  const directory = join(goldenDirectory, name);
  const spec = readSpec(directory);
  const targets = projections.filter((projection) => spec.gated || projection !== 'gate');

  const step = (recipe: Partial<ElastiformerRecipe>, values?: Float32Array) =>
    trainStep(directory, { lora: { rank: 2, targets }, ...recipe }, values);

  it.each(cases)('gradients of every correction are finite differences: %s', async (_, recipe) => {
    const { gradient, plan, start } = await step(recipe);
    const matrices = plan.parameters.filter((p) => p.name.includes('.lora_'));
    const seen = new Set(matrices.map((p) => p.name.split('.')[2]));
    expect([...seen]).toEqual([...targets]);
    const largest = Math.max(
      ...matrices.flatMap((p) => [...gradient.subarray(p.offset, p.offset + p.size)].map(Math.abs)),
    );
    for (const { name, offset, size } of matrices) {
      const own = gradient.subarray(offset, offset + size);
      const at = own.reduce((best, g, i) => (Math.abs(g) > Math.abs(own[best]) ? i : best), 0);
      const by = 4e-3;
      const [up, down] = [
        await step(recipe, start.with(offset + at, start[offset + at] + by)),
        await step(recipe, start.with(offset + at, start[offset + at] - by)),
      ];
      const slope = (up.kl - down.kl) / (2 * by);
      expect(Math.abs(slope - own[at]), `${name}: ${slope} and ${own[at]}`).toBeLessThan(
        0.03 * Math.abs(own[at]) + 0.004 * largest,
      );
    }
  });
});

describe('a tiny model', async () => {
  const base = await tinyModel(join(root, 'base'));
  const plan = join(root, 'plan');
  const { trainableParameters } = await elastify(
    base,
    {
      kind: 'elastiformer',
      blocks: { count: 4 },
      tokens: { attn: 0.5 },
      lora: { rank: 2, targets: ['v', 'up', 'down'] },
    },
    { out: plan },
  );
  const train = (out: string, more: object = {}) =>
    distill({
      plan,
      out,
      data: { kind: 'documents', documents: stories(100) },
      device: 'cpu',
      steps: 30,
      batchTokens: 256,
      sequenceLength: 48,
      calibrationTokens: 512,
      seed: 3,
      ...more,
    });
  const out = join(root, 'trained');
  await train(out);

  it('counts what it trains', () => {
    const [hidden, ffn, kv, layers, rank] = [32, 64, 16, 3, 2];
    const routers = layers * (hidden + 1 + 4 * (hidden + 1));
    expect(trainableParameters).toBe(routers + layers * rank * (hidden + kv + 2 * (hidden + ffn)));
  });

  it('is the backbone, to the bit, at full budget, and something else below', async () => {
    await using plain = await loadModel(base);
    await using elastic = await loadModel(out);
    const [text] = stories(1);
    const bits = async (model: typeof plain, budget?: number) => (await model.score([text], { budget }))[0].logprobs;
    expect(await bits(elastic)).toEqual(await bits(plain));
    const { lora, policy } = (await readElastic(out))!;
    expect([...lora!.keys()].sort()).toEqual(
      [0, 1, 2].flatMap((layer) => ['down', 'up', 'v'].map((projection) => `layers.${layer}.${projection}`)).sort(),
    );
    expect(policy.lora).toEqual({ rank: 2, targets: ['v', 'up', 'down'], layers: [0, 1, 2] });
  });

  it('computes below full budget what its routers say with the corrections, counted in the report', async () => {
    await using model = await loadModel(out);
    const text = stories(3).join(' ');
    const spec = { tokenCapacity: { attn: 0.5 }, blockShare: 0.5 };
    const [{ usage }] = await model.score([text], { budget: { spec } });
    expect(usage.compute.flops).toBeGreaterThan(0);
    // The same routers without corrections: another result, less work.
    const { policy, routers } = (await readElastic(out))!;
    const without = join(root, 'without');
    const { lora: _, ...rest } = policy;
    await writeElastic(without, out, rest as ElasticPolicy, routers, null);
    expect(existsSync(join(without, 'adapter'))).toBe(false);
    await using bare = await loadModel(without);
    const [one] = await bare.score([text], { budget: { spec } });
    expect(one.usage.compute.flops).toBeLessThan(usage.compute.flops);
    const [other] = await model.score([text], { budget: { spec } });
    expect(other.logprobs).not.toEqual(one.logprobs);
  });

  it('generates with caches what the full forward pass says', async () => {
    await using model = await loadModel(out);
    const ids = model.network.tokenizer!.encode('The cat saw the dog by the lake.');
    const budget = { spec: { tokenCapacity: { attn: 0.7 }, blockShare: 0.5 } };
    const made = await model.generate(ids, { maxTokens: 6, budget }).ids;
    const { vocab } = model.info;
    for (let i = 0; i < made.length; i++) {
      const logits = await model.logits([...ids, ...made.slice(0, i)], { budget });
      const last = logits.subarray(logits.length - vocab);
      expect(made[i]).toBe(last.indexOf(last.reduce((a, b) => Math.max(a, b))));
    }
  });

  it('counts what corrections cost as budgets expect it', async () => {
    await using model = await loadModel(out);
    const ids = model.network.tokenizer!.encode(stories(1)[0]);
    const [{ usage }] = await model.score([ids], { budget: { spec: { blockShare: 0.5 } } });
    const { policy, spec } = model.network;
    const capacities = routerPlaces(policy!).map(({ axis }) => (axis === 'blocks' ? 0.5 : 1));
    expect(usage.compute.ratio).toBeCloseTo(flopsRatio(spec, policy!, capacities, ids.length), 6);
    expect([...usage.compute.layersRun.attn, ...usage.compute.layersRun.mlp]).toEqual([1, 1, 1, 0.5, 0.5, 0.5]);
  });

  it('continues from trained corrections, and gives the same bits for the same seed', async () => {
    const [a, b] = [join(root, 'again-a'), join(root, 'again-b')];
    await train(a);
    const file = join('adapter', 'adapter_model.safetensors');
    expect(readFileSync(join(a, file)).equals(readFileSync(join(out, file)))).toBe(true);
    await distill({
      plan: out,
      out: b,
      data: { kind: 'documents', documents: stories(100) },
      device: 'cpu',
      steps: 1,
      optimizer: { lr: 1e-12 },
      loraLr: 1e-12,
      batchTokens: 256,
      sequenceLength: 48,
      calibrationTokens: 512,
    });
    const [was, is] = [(await readElastic(out))!.lora!, (await readElastic(b))!.lora!];
    for (const [id, { a: before }] of was) {
      expect(largestDifference(is.get(id)!.a, before)).toBeLessThan(1e-6);
    }
  });

  it.each<[string, (dir: string) => Promise<unknown>, RegExp]>([
    ['changed', (dir) => writeFile(join(dir, 'adapter/adapter_config.json'), '{}'), /does not have the SHA-256/],
    ['missing', (dir) => rm(join(dir, 'adapter'), { recursive: true }), /adapter_config.json is missing/],
  ])('refuses a directory whose adapter was %s', async (how, spoil, message) => {
    const dir = join(root, how);
    await cp(out, dir, { recursive: true });
    await spoil(dir);
    await expect(loadModel(dir)).rejects.toThrow(message);
  });
});

it.each([
  [{ rank: 0 }, /lora.rank must be a positive integer, got 0/],
  [
    { rank: 1, targets: ['q', 'x'] },
    /lora.targets must be some of q, k, v, o, up, down, in this order, got \["q","x"\]/,
  ],
  [{ rank: 1, targets: ['gate'] }, /lora.targets must be some of q, k, v, o, up, down/],
  [{ rank: 1, targets: [] }, /lora.targets/],
  [{ rank: 1, layers: [2] }, /layers must be ids from 0 to 1, got 2/],
  [{ rank: 1, alpha: 2 }, /unknown key 'lora.alpha'/],
])('recipe lora %j is refused', (lora, message) => {
  const spec = { layers: 2, hidden: 32, ffn: 64, heads: 4, kvHeads: 2, gated: false };
  expect(() => policyOf({ kind: 'elastiformer', lora: lora as { rank: number } }, spec)).toThrow(message);
});
