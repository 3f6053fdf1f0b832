// How capacities are divided: shapes for training, and the measured path that budgets lie on.
import { describe, expect, it } from 'vitest';
import { allocationPath, sensitivities, shapedCapacities } from '../../lib/distill/allocate.js';
import type { DivergenceProbe } from '../../lib/distill/probe.js';
import { meanCapacity } from '../../lib/elastic/axes.js';
import { flopsRatio } from '../../lib/elastic/cost.js';
import { type ElastiformerRecipe, policyOf } from '../../lib/elastic/elastify.js';
import { routerPlaces } from '../../lib/elastic/policy.js';
import { specFromConfig } from '../../lib/model/spec.js';
import { tinyConfig } from './tiny.js';

const spec = specFromConfig({ ...tinyConfig, vocab_size: 64 }, 'config.json');
const base = { name: 'tiny', weightsSha256: '', tokenizerSha256: null };
const policy = { ...policyOf({ kind: 'elastiformer' }, spec), base };
const routers = routerPlaces(policy);

/** A model whose divergence is `kl(capacities)`. */
function probe(kl: (capacities: readonly number[]) => number) {
  let measured = 0;
  const measure = async (capacities: readonly number[]) => {
    measured++;
    return { kl: kl(capacities), agree: 1 };
  };
  return { probe: { measure } as unknown as DivergenceProbe, measured: () => measured };
}
/** Leaving out router i altogether costs `costs[i]`; the first tokens left out cost less than the last. */
const separable = (costs: readonly number[]) => (capacities: readonly number[]) =>
  capacities.reduce((sum, c, i) => sum + costs[i] * (1 - c) ** 2, 0);

describe('sensitivities', () => {
  it('are logs of the divergence without each sub-layer, beyond that at full capacity', async () => {
    const costs = [1, 2, 3, 4, 5, 6];
    const raw = probe((capacities) => 0.5 + separable(costs)(capacities));
    const got = await sensitivities(raw.probe, policy);
    for (const [i, value] of got.entries()) expect(value).toBeCloseTo(Math.log(costs[i]), 6);
    expect(raw.measured()).toBe(7);
  });

  it('refuse a model that computes NaN', async () => {
    await expect(sensitivities(probe(() => Number.NaN).probe, policy)).rejects.toThrow(/layers.0.attn.token .* NaN/);
  });
});

describe('shaped capacities', () => {
  const sensitivity = [-4, 8, -2, -1, 0, 1];

  it('have the mean asked for in each place, and spare what cannot be spared', () => {
    for (const mean of [0.3, 0.5, 0.9]) {
      const shaped = shapedCapacities(sensitivity, policy, { attn: mean, mlp: mean });
      for (const place of ['attn', 'mlp'] as const) {
        expect(meanCapacity(shaped.filter((_, i) => routers[i].place === place))).toBeCloseTo(mean, 6);
      }
      expect(shaped[1]).toBeGreaterThan(Math.max(shaped[3], shaped[5]));
      expect(shaped[0]).toBeLessThan(shaped[2]);
      expect(Math.min(...shaped)).toBeGreaterThan(0);
      expect(Math.max(...shaped)).toBeLessThanOrEqual(1);
    }
    expect(shapedCapacities(sensitivity, policy, { attn: 1, mlp: 1 })).toEqual([1, 1, 1, 1, 1, 1]);
  });

  it('are equal where sub-layers are alike', () => {
    const shaped = shapedCapacities([2, 2, 2, 2, 2, 2], policy, { attn: 0.4, mlp: 0.7 });
    for (const [i, c] of shaped.entries()) expect(c).toBeCloseTo(routers[i].place === 'attn' ? 0.4 : 0.7, 9);
  });
});

describe('the path', () => {
  const costs = [1, 100, 0.01, 2, 3, 0.5];
  const find = (options: { lowers?: (id: string) => boolean; least?: number } = {}) => {
    const { probe: measured } = probe(separable(costs));
    const { lowers = () => true, least = 0.5 } = options;
    return allocationPath(measured, spec, policy, lowers, { length: 64, least });
  };

  it('starts full, lowers one router a step, and ends at the share asked for', async () => {
    const path = await find();
    expect(path[0]).toEqual([1, 1, 1, 1, 1, 1]);
    for (let i = 1; i < path.length; i++) {
      const changed = path[i].filter((c, r) => c !== path[i - 1][r]);
      expect(changed).toHaveLength(1);
      expect(flopsRatio(spec, policy, path[i], 64)).toBeLessThan(flopsRatio(spec, policy, path[i - 1], 64));
    }
    expect(flopsRatio(spec, policy, path.at(-1)!, 64)).toBeLessThanOrEqual(0.5);
    expect(flopsRatio(spec, policy, path.at(-2)!, 64)).toBeGreaterThan(0.5);
  });

  it('takes first from those that cost least, and spares what cannot be spared', async () => {
    const path = await find();
    const first = path.find((capacities) => capacities.some((c) => c < 1))!;
    expect(first.findIndex((c) => c < 1)).toBe(2);
    expect(path.at(-1)![1]).toBe(1);
  });

  it('is no worse than any other division at steps of a quarter that costs as much', async () => {
    const path = await find();
    const kl = separable(costs);
    const steps = [1, 0.75, 0.5, 0.25, 0];
    const all = routers.reduce<number[][]>((lists, _) => lists.flatMap((l) => steps.map((s) => [...l, s])), [[]]);
    for (const point of path) {
      const cost = flopsRatio(spec, policy, point, 64);
      const best = Math.min(...all.filter((c) => flopsRatio(spec, policy, c, 64) <= cost + 1e-9).map(kl));
      // Greedy with steps of one or two quarters: optimal for a convex divergence.
      expect(kl(point)).toBeLessThan(best * 1.25 + 1e-9);
    }
  });

  it('leaves whole sub-layers out where parts of them are worse than none', async () => {
    const part = new Map([
      [1, 0],
      [0.75, 0.001],
      [0, 0.1],
    ]);
    const { probe: measured } = probe((capacities) => capacities.reduce((sum, c) => sum + (part.get(c) ?? 10), 0));
    const path = await allocationPath(measured, spec, policy, () => true, { length: 64, least: 0.5 });
    expect(path.flat().every((c) => c === 0 || c === 1)).toBe(true);
    expect(flopsRatio(spec, policy, path.at(-1)!, 64)).toBeLessThanOrEqual(0.5);
  });

  it('leaves out a sub-layer by its router of tokens, or of experts where it has no other', async () => {
    const withHeads = (recipe: Partial<ElastiformerRecipe>) => ({
      ...policyOf({ kind: 'elastiformer', ...recipe, heads: { group: 'head' } }, spec),
      base,
    });
    for (const [policy, least] of [
      [withHeads({}), 0],
      [withHeads({ tokens: { attn: 1 } }), 0.25],
    ] as const) {
      const heads = routerPlaces(policy).flatMap(({ axis }, i) => (axis === 'heads' ? [i] : []));
      const { probe: measured } = probe((capacities) => capacities.reduce((sum, c) => sum + 1 - c, 0));
      const path = await allocationPath(measured, spec, policy, () => true, { length: 64, least: 0.01 });
      expect(Math.min(...heads.map((i) => path.at(-1)![i]))).toBe(least);
      expect(flopsRatio(spec, policy, path.at(-1)!, 64)).toBeLessThan(flopsRatio(spec, policy, path[1], 64));
    }
  });

  it('leaves routers that cannot choose at full capacity', async () => {
    const path = await find({ lowers: (id) => id !== routers[2].id });
    expect(path.every((capacities) => capacities[2] === 1)).toBe(true);
  });
});
