// Attention of which every token uses some heads: gradients of the routers, training, and the trained model at budgets.
import { join } from 'node:path';
import { describe, expect, it, test } from 'vitest';
import { massesBefore } from '../../lib/distill/calibrate.js';
import { distill } from '../../lib/distill/distill.js';
import { resolveBudget } from '../../lib/elastic/budget.js';
import { type ElastiformerRecipe, elastify, policyOf } from '../../lib/elastic/elastify.js';
import { routerPlaces } from '../../lib/elastic/policy.js';
import { readElastic } from '../../lib/elastic/store.js';
import { loadModel } from '../../lib/infer/model.js';
import { evaluate } from '../../lib/infer/quality/evaluate.js';
import { attentionFlops, forwardFlops, keyValueFlops } from '../../lib/model/flops.js';
import { layerOf } from '../../lib/model/spec.js';
import { goldenDirectory, readSpec } from '../model/golden.js';
import { trainStep } from './step.js';
import { checkGreedy, stories, temporaryDirectory, tinyDistilling, tinyModel } from './tiny.js';

describe.each(['elastiformer-llama', 'elastiformer-gpt2', 'gemma2'])('%s', (name) => {
  const { heads, postNorms } = readSpec(join(goldenDirectory, name));
  const step = (recipe: Partial<ElastiformerRecipe>, values?: Float32Array, capacity?: number) =>
    trainStep(join(goldenDirectory, name), recipe, values, capacity);

  it.each([
    { gate: 'softmax', group: 'head' },
    { gate: 'renormalised', group: 'head' },
    { gate: 'softmax', keys: 'selected' },
  ] as const)('gradients of %o are finite differences', async (recipe) => {
    const { gradient, start } = await step({ heads: recipe });
    const largest = gradient.reduce((most, g) => Math.max(most, Math.abs(g)), 0);
    if (postNorms && !('group' in recipe)) {
      // One expert of two: a norm of what it adds undoes its gate.
      expect(largest).toBeLessThan(1e-5);
      return;
    }
    expect(largest).toBeGreaterThan(1e-4);
    const h = 5e-4;
    for (let n = 0; n < 8; n++) {
      const i = Math.floor((n * gradient.length) / 8);
      const at = async (delta: number) => (await step({ heads: recipe }, start.with(i, start[i] + delta))).kl;
      const difference = ((await at(h)) - (await at(-h))) / (2 * h);
      expect(Math.abs(gradient[i] - difference) / largest, `parameter ${i}`).toBeLessThan(0.05);
    }
  });

  it('straight-through gates of heads train beside routers of tokens, blocks and corrections', async () => {
    const { gradient, plan, kl } = await step({
      tokens: { attn: 0.5, mlp: 0.5 },
      heads: {},
      blocks: { count: 4 },
      lora: { rank: 1, targets: ['q', 'k', 'v', 'o'] },
    });
    expect(kl).toBeGreaterThan(0);
    const trained = new Map<string, boolean>();
    for (const { name, offset, size } of plan.parameters) {
      if (name.endsWith('.bias')) continue;
      // No row may have chosen a part of a correction.
      const whole = name.replace(/\.\d+$/, '');
      const moves = gradient.subarray(offset, offset + size).some((g) => g !== 0);
      trained.set(whole, moves || (trained.get(whole) ?? false));
    }
    expect([...trained].filter(([, moves]) => !moves)).toEqual([]);
    expect(trained.size).toBeGreaterThan(4);
  });

  it('half of the heads cost half of the work on them, and all of them next to no divergence', async () => {
    const half = await step({ heads: { group: 'head' } });
    const all = await step({ heads: { group: 'head' } }, undefined, 1);
    expect(Math.abs(all.kl)).toBeLessThan(1e-5);
    const tag = `L0.attn/${heads}`;
    const share = Math.ceil(heads / 2) / heads;
    expect(half.counters[tag].rows / all.counters[tag].rows).toBeCloseTo(share, 6);
    expect(half.counters[tag].flops).toBeLessThan((share + 0.1) * all.counters[tag].flops);
  });
});

describe.each([
  { heads: {}, count: 2, tokens: { attn: [0.4, 1] as const } },
  { heads: { group: 'head' as const }, count: 4, blocks: { count: 4 } },
  { heads: { keys: 'selected' as const, gate: 'renormalised' as const }, count: 2, lora: { rank: 1 } },
])('a trained model of %o', ({ count, ...recipe }) => {
  const root = temporaryDirectory();
  const [backbone, plan, out] = ['backbone', 'plan', 'run'].map((name) => join(root, name));

  test('is saved, generates at budgets what the full forward pass says, and reports what it spent', async () => {
    await tinyModel(backbone);
    await elastify(backbone, { kind: 'elastiformer', ...recipe }, { out: plan });
    await distill(tinyDistilling(plan, out, { optimizer: { lr: 2e-2 } }));
    const elastic = (await readElastic(out))!;
    expect(elastic.warnings).toEqual([]);
    expect(elastic.policy.heads).toMatchObject({ layers: [0, 1, 2], count, keys: recipe.heads.keys ?? 'all' });
    expect(routerPlaces(elastic.policy).find(({ axis }) => axis === 'heads')).toMatchObject({
      id: 'layers.0.attn.heads',
      outputs: count,
    });
    const spec = readSpec(out);
    expect(elastic.policy.levels.length).toBeGreaterThan(1);

    await using model = await loadModel(out);
    await using plain = await loadModel(backbone);
    const ids = model.network.tokenizer!.encode('The cat saw the dog by the lake.');
    expect(await model.logits(ids, { budget: 1 })).toEqual(await plain.logits(ids));
    expect(model.resolve({ spec: { headShare: 0.5 } }).why).toMatch(/50.0 % of the heads of attention/);

    const some = await checkGreedy(model, ids, { spec: { headShare: 0.5 } });
    expect([...some.layersRun.attn]).toEqual([0.5, 0.5, 0.5]);
    await checkGreedy(model, ids, { spec: { headShare: [1, 0, 0.5] } });
    // A later generation at another budget finds caches of another shape.
    await checkGreedy(model, ids, { spec: {} });
    if (recipe.tokens) {
      const both = await checkGreedy(model, ids, { spec: { tokenCapacity: { attn: 0.6 }, headShare: 0.5 } });
      expect(both.layersRun.attn.every((share) => share > 0 && share <= 0.5)).toBe(true);
    }
    if (recipe.blocks) await checkGreedy(model, ids, { spec: { headShare: 0.75, blockShare: 0.5 } });

    const [{ usage }] = await model.score([ids], { budget: { spec: { headShare: [0.5, 1, 1] } } });
    const { total, perLayer } = forwardFlops(spec, [ids.length]);
    const kv = keyValueFlops(spec, ids.length);
    const router = 2 * ids.length * spec.hidden * count;
    // The pairs that are scored depend on which rows choose a head.
    const least =
      recipe.heads.keys === 'selected'
        ? attentionFlops(layerOf(spec, 0), [ids.length / 2])
        : kv + (perLayer[0].attn - kv) / 2;
    const expected = (total - perLayer[0].attn + router + least) / total;
    expect(usage.compute.ratio).toBeGreaterThan(expected - 0.01);
    expect(usage.compute.ratio).toBeLessThan(expected + 0.03);
    const { flopsRatio } = resolveBudget({ spec: { headShare: [0.5, 1, 1] } }, spec, elastic.policy, {
      length: ids.length,
    });
    expect(usage.compute.ratio).toBeCloseTo(flopsRatio, 1.5);

    const trace = await model.trace(ids, { budget: { spec: { headShare: [0.5, 1, 1] } } });
    expect([...trace.headShare]).toEqual([0.5, 1, 1]);
    const { levels } = await evaluate(model, {
      data: stories(4),
      budgets: [{ spec: { headShare: 0.5 } }],
      baselines: ['random', 'drop'],
      speed: false,
    });
    const [routed, random, drop] = levels;
    expect([...random.layersRun.attn]).toEqual([...routed.layersRun.attn]);
    expect(random.ratio).toBeLessThan(routed.ratio + 0.02);
    // Nothing is left out that has no router.
    expect(drop.dropped!.length).toBeGreaterThan(0);
    expect(drop.dropped!.filter((id) => !id.includes('attn'))).toEqual([]);
  });
});

test('experts by mass are as many as were asked for on the mean, and differ between tokens', async () => {
  const root = temporaryDirectory();
  const [backbone, plan, out] = ['backbone', 'plan', 'run'].map((name) => join(root, name));
  await tinyModel(backbone);
  const heads = { group: 'head', rule: 'mass' } as const;
  await elastify(backbone, { kind: 'elastiformer', heads, blocks: { count: 8, rule: 'mass' } }, { out: plan });
  const data = stories(120);
  await distill(tinyDistilling(plan, out, { calibrationTokens: 1024 }));
  const { policy } = (await readElastic(out))!;
  expect([...policy.calibration!.quantiles.keys()]).toEqual(routerPlaces(policy).map(({ id }) => id));

  await using model = await loadModel(out);
  const ids = model.network.tokenizer!.encode('The cat saw the dog by the lake.');
  await checkGreedy(model, ids, { spec: { headShare: 0.5, blockShare: 0.6 } });
  const spec = { headShare: 0.6, blockShare: 0.4 };
  const { levels } = await evaluate(model, { data, budgets: [{ spec }, 0.8], baselines: ['random'], speed: false });
  const mean = (shares: Float32Array) => shares.reduce((a, b) => a + b, 0) / shares.length;
  const [routed, random, budget] = levels;
  expect(mean(routed.layersRun.attn)).toBeCloseTo(0.6, 1);
  expect(mean(routed.layersRun.mlp)).toBeCloseTo(0.4, 1);
  // Not a whole number of experts: tokens use more or fewer.
  expect(routed.layersRun.attn.some((share) => Math.abs(share * 4 - Math.round(share * 4)) > 0.01)).toBe(true);
  expect(mean(random.layersRun.attn)).toBeCloseTo(mean(routed.layersRun.attn), 1);
  expect(mean(random.layersRun.mlp)).toBeCloseTo(mean(routed.layersRun.mlp), 1);
  expect(budget.ratio).toBeCloseTo(0.8, 1);
});

test('masses are those of the softmax before each expert, the best first', () => {
  const z = Float32Array.of(0, Math.log(2), Math.log(5), 7, 7, 7);
  const masses = [0, 5 / 8, 7 / 8, 0, 1 / 3, 2 / 3];
  massesBefore(z, 3).forEach((mass, i) => {
    expect(mass).toBeCloseTo(masses[i], 6);
  });
});

describe('recipes', () => {
  const spec = { layers: 2, hidden: 32, ffn: 64, gated: true, heads: 4, kvHeads: 2 };
  const policy = (heads: object, more: object = {}, sizes: object = {}) =>
    policyOf({ kind: 'elastiformer', heads, ...more } as ElastiformerRecipe, { ...spec, ...sizes });

  test('make groups experts where heads share keys', () => {
    expect(policy({}).heads).toEqual({
      layers: [0, 1],
      count: 2,
      gate: 'straight-through',
      rule: 'top-k',
      keys: 'all',
    });
    expect(policy({ group: 'head' }).heads?.count).toBe(4);
    expect(policy({}, {}, { kvHeads: 4 }).heads?.count).toBe(4);
    expect(policy({}, {}, { kvHeads: 1 }).heads?.count).toBe(4);
    expect(policy({ share: 0.5 })).toMatchObject({ tokens: {}, capacity: { heads: [0.5, 0.5] } });
  });

  test.each([
    [{ group: 'kv' }, {}, {}, /heads.group must be one of head, gqa, got "kv"/],
    [
      { group: 'gqa' },
      {},
      { kvHeads: 1 },
      /heads.group 'gqa' makes 1 expert of attention, and there must be at least 2/,
    ],
    [{}, {}, { heads: 1, kvHeads: 1 }, /makes 1 expert/],
    [{ keys: 'some' }, {}, {}, /heads.keys must be one of all, selected/],
    [{ keys: 'selected', group: 'head' }, {}, {}, /heads.keys must be 'all' where heads share keys: 4 experts share 2/],
    [{ keys: 'selected' }, { tokens: { attn: 0.5 } }, {}, /keys must be 'selected' too/],
    [{ share: 2 }, {}, {}, /heads.share: capacity must be in \(0, 1\], got 2/],
    [{ gate: 'raw' }, {}, {}, /heads.gate must be one of straight-through, softmax, renormalised/],
    [{ rule: 'xmoe' }, {}, {}, /heads.rule must be one of top-k, mass/],
    [{ count: 2 }, {}, {}, /unknown key 'heads.count'/],
  ])('%o with %o is refused', (heads, more, sizes, message) => {
    expect(() => policy(heads, more, sizes)).toThrow(message);
  });
});
