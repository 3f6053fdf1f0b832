// Feed-forward layers cut into blocks: gradients of their routers, training, and the trained model at budgets.
import { join } from 'node:path';
import { describe, expect, it, test } from 'vitest';
import { distill } from '../../lib/distill/distill.js';
import type { TrainEvent } from '../../lib/distill/events.js';
import { resolveBudget } from '../../lib/elastic/budget.js';
import { type ElastiformerRecipe, elastify, policyOf } from '../../lib/elastic/elastify.js';
import { routerPlaces } from '../../lib/elastic/policy.js';
import { readElastic } from '../../lib/elastic/store.js';
import { loadModel } from '../../lib/infer/model.js';
import { forwardFlops } from '../../lib/model/flops.js';
import { goldenDirectory, readSpec } from '../model/golden.js';
import { trainStep } from './step.js';
import { stories, temporaryDirectory, tinyDistilling, tinyModel } from './tiny.js';

describe.each(['elastiformer-llama', 'elastiformer-gpt2', 'gemma2'])('%s', (name) => {
  const step = (recipe: Partial<ElastiformerRecipe>, values?: Float32Array, capacity?: number) =>
    trainStep(join(goldenDirectory, name), recipe, values, capacity);

  it.each([
    ['softmax', {}],
    ['renormalised', {}],
    ...(name === 'gemma2' ? ([['softmax', { tile: 32 }]] as const) : []),
  ] as const)('gradients of %s gates are finite differences, %j', async (gate, more) => {
    const recipe = { blocks: { count: 4, gate, ...more } };
    const { gradient, start } = await step(recipe);
    const largest = gradient.reduce((most, g) => Math.max(most, Math.abs(g)), 0);
    expect(largest).toBeGreaterThan(0);
    const h = 5e-4;
    for (let n = 0; n < 8; n++) {
      const i = Math.floor((n * gradient.length) / 8);
      const at = async (delta: number) => (await step(recipe, start.with(i, start[i] + delta))).kl;
      const difference = ((await at(h)) - (await at(-h))) / (2 * h);
      expect(Math.abs(gradient[i] - difference) / largest, `parameter ${i}`).toBeLessThan(0.05);
    }
  });

  it('straight-through gates of blocks train beside routers of tokens', async () => {
    const { gradient, plan, kl } = await step({ tokens: { attn: 0.5, mlp: 0.5 }, blocks: { count: 4 } });
    expect(kl).toBeGreaterThan(0);
    for (const { name, offset, size } of plan.parameters) {
      if (!name.endsWith('.weight')) continue;
      expect(
        gradient.subarray(offset, offset + size).some((g) => g !== 0),
        name,
      ).toBe(true);
    }
  });

  it('blocks that tiles choose train, and cost what blocks of single rows do', async () => {
    const [alone, together] = [await step({ blocks: { count: 4 } }), await step({ blocks: { count: 4, tile: 32 } })];
    const of = ({ gradient, plan }: typeof alone) =>
      plan.parameters
        .filter(({ name }) => name.endsWith('.bias'))
        .map(({ offset, size }) => gradient.slice(offset, offset + size));
    // What one block gains the others lose, whoever decided.
    for (const biases of [of(alone), of(together)]) {
      for (const bias of biases) {
        expect(bias.some((g) => g !== 0)).toBe(true);
        expect(Math.abs(bias.reduce((sum, g) => sum + g, 0))).toBeLessThan(1e-5);
      }
    }
    expect(together.gradient).not.toEqual(alone.gradient);
    expect(together.counters['L0.mlp/4']).toEqual(alone.counters['L0.mlp/4']);
  });

  it('half of the blocks cost half of the work, and all of them next to no divergence', async () => {
    const half = await step({ blocks: { count: 4 } });
    const all = await step({ blocks: { count: 4 } }, undefined, 1);
    expect(Math.abs(all.kl)).toBeLessThan(1e-5);
    const ratio = half.counters['L0.mlp/4'].flops / all.counters['L0.mlp/4'].flops;
    expect(ratio).toBeCloseTo(0.5, 6);
    expect(all.counters['L0.mlp/4'].rows).toBe(4 * 24);
  });
});

describe('a trained model', async () => {
  const root = temporaryDirectory();
  const [model, plan, out] = ['model', 'plan', 'run'].map((name) => join(root, name));
  const events: TrainEvent[] = [];

  test('learns to do with less, and is saved', async () => {
    await tinyModel(model);
    await elastify(model, { kind: 'elastiformer', tokens: { attn: [0.4, 1] }, blocks: { count: 4 } }, { out: plan });
    await distill(
      tinyDistilling(plan, out, {
        evalData: { kind: 'documents', documents: stories(140).slice(120) },
        evalEvery: 60,
        steps: 60,
        optimizer: { lr: 2e-2 },
        onEvent: (event) => void events.push(event),
      }),
    );
    const mean = (e: TrainEvent | undefined) =>
      e?.type === 'eval' ? Object.values(e.levels).reduce((sum, level) => sum + level.kl, 0) : Number.NaN;
    const evals = events.filter((e) => e.type === 'eval');
    expect(mean(evals.at(-1))).toBeLessThan(0.8 * mean(evals[0]));
    const steps = events.filter((e) => e.type === 'step');
    expect(steps[0]).toMatchObject({ terms: { 'load-balance': expect.any(Number), 'topk-bce': expect.any(Number) } });

    const elastic = (await readElastic(out))!;
    expect(elastic.warnings).toEqual([]);
    expect(elastic.policy.blocks).toEqual({ layers: [0, 1, 2], count: 4, gate: 'straight-through', rule: 'top-k' });
    expect(routerPlaces(elastic.policy).map(({ id }) => id)).toContain('layers.1.mlp.blocks');
    const point = resolveBudget(0.75, readSpec(out), elastic.policy);
    expect(point.flopsRatio).toBeCloseTo(0.75, 1);
    expect(point.why).toMatch(/of the blocks of the feed-forward/);
  });

  test('generates at a budget what the full forward pass says, and reports what it spent', async () => {
    await using elastic = await loadModel(out);
    await using backbone = await loadModel(model);
    const ids = elastic.network.tokenizer!.encode('The cat saw the dog by the lake.');
    expect(await elastic.logits(ids, { budget: 1 })).toEqual(await backbone.logits(ids));
    const budget = { spec: { tokenCapacity: { attn: 0.7 }, blockShare: 0.5 } };
    const stream = elastic.generate(ids, { maxTokens: 6, budget });
    const made = await stream.ids;
    const { vocab } = elastic.info;
    for (let i = 0; i < made.length; i++) {
      const logits = await elastic.logits([...ids, ...made.slice(0, i)], { budget });
      const last = logits.subarray(logits.length - vocab);
      expect(made[i]).toBe(last.indexOf(last.reduce((a, b) => Math.max(a, b))));
    }
    const { compute } = await stream.usage;
    expect([...compute.layersRun.mlp]).toEqual([0.5, 0.5, 0.5]);
    expect(compute.ratio).toBeLessThan(0.9);

    const [{ usage }] = await elastic.score([ids], { budget: { spec: { blockShare: [1, 0.25, 0.5] } } });
    expect([...usage.compute.layersRun.mlp]).toEqual([1, 0.25, 0.5]);
    const { spec } = elastic.network;
    const { perLayer, total } = forwardFlops(spec, [ids.length]);
    const routers = 2 * 2 * ids.length * spec.hidden * 4;
    expect(usage.compute.ratio).toBeCloseTo((total - 1.25 * perLayer[0].mlp + routers) / total, 3);
  });

  test('refuses shares it does not have', async () => {
    await using elastic = await loadModel(out);
    await using backbone = await loadModel(model);
    const spec = (blockShare: number | number[]) => ({ budget: { spec: { blockShare } } });
    expect(() => elastic.resolve({ spec: { blockShare: 1.5 } })).toThrow(/blockShare must be in \(0, 1\] or 3 numbers/);
    expect(() => elastic.resolve({ spec: { blockShare: [1, 1] } })).toThrow(/3 numbers in \[0, 1\], one per layer/);
    expect(() => backbone.resolve({ spec: { blockShare: 0.5 } })).toThrow(/needs routers/);
    expect((await elastic.logits([1, 2, 3], spec([0.5, 0, 1]))).every(Number.isFinite)).toBe(true);
  });
});

test.each([
  [{ count: 1 }, /blocks.count must be an integer from 2 that divides the feed-forward's width 64, got 1/],
  [{ count: 5 }, /that divides/],
  [{ count: 4, share: 0 }, /blocks.share: capacity must be in \(0, 1\], got 0/],
  [{ count: 4, gate: 'raw' }, /blocks.gate must be one of straight-through, softmax, renormalised/],
  [{ count: 4, k: 2 }, /unknown key 'blocks.k'; blocks takes count, share, gate, rule, tile/],
  [{ count: 4, tile: 16 }, /blocks.tile must be an integer from 32 to 16777216, got 16/],
])('recipe blocks %j is refused', (blocks, message) => {
  const spec = { layers: 2, hidden: 32, ffn: 64, heads: 4, kvHeads: 2, gated: true };
  expect(() => policyOf({ kind: 'elastiformer', blocks: blocks as { count: number } }, spec)).toThrow(message);
});
