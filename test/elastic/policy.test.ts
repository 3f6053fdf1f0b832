// Policies: recipes, the JSON format, thresholds from quantiles, and budgets from the cost model.
import { describe, expect, it } from 'vitest';
import { flopsRatio, resolveBudget, standardLevels } from '../../lib/elastic/budget.js';
import { policyOf, type Recipe } from '../../lib/elastic/elastify.js';
import {
  type ElasticPolicy,
  policyFromJson,
  policyToJson,
  routerId,
  routerPlaces,
  thresholds,
} from '../../lib/elastic/policy.js';
import { forwardFlops } from '../../lib/model/flops.js';
import { specFromConfig } from '../../lib/model/spec.js';

const spec = specFromConfig(
  {
    model_type: 'llama',
    vocab_size: 100,
    hidden_size: 32,
    intermediate_size: 64,
    num_hidden_layers: 4,
    num_attention_heads: 4,
    num_key_value_heads: 2,
  },
  'config.json',
);
const base = { name: 'tiny', weightsSha256: 'a'.repeat(64), tokenizerSha256: null };

function calibrated(recipe: Recipe): ElasticPolicy {
  const policy: ElasticPolicy = { ...policyOf(recipe, spec), base };
  // Quantiles q -> q + 10 * capacity of the grid.
  const capacities = [0.4, 0.8];
  const points = 5;
  const table = Float32Array.from(
    { length: 10 },
    (_, i) => (i % points) / (points - 1) + 10 * capacities[Math.floor(i / points)],
  );
  const quantiles = new Map(routerPlaces(policy).map(({ id }) => [id, table]));
  return { ...policy, calibration: { capacities, points, tokens: 100, sequenceLength: 64, quantiles } };
}

describe('recipes', () => {
  it('routes every layer in both places by default, straight through', () => {
    const policy = policyOf({ kind: 'elastiformer' }, spec);
    expect(policy).toMatchObject({ gate: 'straight-through', capacity: { attn: [0.3, 1], mlp: [0.3, 1] } });
    expect(routerPlaces(policy).map((r) => r.id)).toEqual(
      [0, 1, 2, 3].flatMap((i) => [routerId(i, 'attn'), routerId(i, 'mlp')]),
    );
  });

  it('takes layers, places, a capacity or a range', () => {
    const policy = policyOf({ kind: 'elastiformer', layers: [3, 1], tokens: { mlp: 0.5 }, gate: 'raw' }, spec);
    expect(policy).toMatchObject({ gate: 'raw', tokens: { mlp: { layers: [1, 3] } }, capacity: { mlp: [0.5, 0.5] } });
    expect(policyOf({ kind: 'elastiformer', layers: 'even' }, spec).tokens.attn?.layers).toEqual([1, 3]);
  });

  it.each([
    [{ kind: 'matformer' }, /kind must be 'elastiformer', got "matformer"/],
    [{ kind: 'elastiformer', loraRank: 1 }, /unknown recipe key 'loraRank'/],
    [{ kind: 'elastiformer', tokens: { attn: 0 } }, /tokens.attn: capacity must be in \(0, 1\], got 0/],
    [{ kind: 'elastiformer', tokens: { mlp: 2 } }, /capacity must be in \(0, 1\], got 2/],
    [{ kind: 'elastiformer', tokens: { mlp: Number.NaN } }, /capacity must be in/],
    [{ kind: 'elastiformer', tokens: { mlp: [0.9, 0.5] } }, /range must ascend/],
    [{ kind: 'elastiformer', tokens: { head: 0.5 } }, /unknown place 'head'/],
    [{ kind: 'elastiformer', tokens: {} }, /must route attn, mlp or both/],
    [{ kind: 'elastiformer', layers: [4] }, /layers must be ids from 0 to 3, got 4/],
    [{ kind: 'elastiformer', layers: [] }, /layers must be/],
    [{ kind: 'elastiformer', gate: 'soft' }, /gate must be one of/],
    [null, /recipe must be an object/],
  ])('refuses %j', (recipe, message) => {
    expect(() => policyOf(recipe as never, spec)).toThrow(message);
  });
});

describe('elastic_config.json', () => {
  const policy = calibrated({ kind: 'elastiformer', layers: [0, 2], tokens: { attn: 0.5, mlp: [0.3, 0.9] } });
  const json = () => JSON.parse(JSON.stringify(policyToJson({ ...policy, levels: standardLevels(spec, policy, 64) })));

  it('comes back as it was written', () => {
    const warnings: string[] = [];
    const read = policyFromJson(json(), 'f.json', spec, warnings);
    expect(warnings).toEqual([]);
    expect({ ...read, calibration: { ...read.calibration, quantiles: policy.calibration?.quantiles } }).toEqual({
      ...policy,
      levels: standardLevels(spec, policy, 64),
    });
  });

  it('warns of unknown keys and keeps going', () => {
    const warnings: string[] = [];
    policyFromJson({ ...json(), tokens: { ...json().tokens, heads: {} }, colour: 1 }, 'f.json', spec, warnings);
    expect(warnings).toEqual(['f.json: unknown key colour is ignored', 'f.json: unknown key tokens.heads is ignored']);
  });

  it.each([
    ['another version', { elastic_version: 2 }, /elastic_version must be 1, got 2/],
    ['no routers', { routers: [] }, /routers must be the routed sub-layers/],
    ['routers that are no list', { routers: 3 }, /routers must be a list/],
    ['an unknown gate', { gate: 'soft' }, /gate must be one of/],
    [
      'a layer the model lacks',
      { tokens: { mlp: { layers: [9], train_capacity: [1, 1] } } },
      /ascending layer ids below 4/,
    ],
    ['a capacity of 0', { tokens: { mlp: { layers: [0], train_capacity: [0, 1] } } }, /train_capacity must be/],
    [
      'a calibration without capacities',
      { calibration: { capacities: [], points: 3, tokens: 1, sequence_length: 1 } },
      /capacities/,
    ],
    [
      'levels with one name',
      {
        levels: [
          { name: 'a', spec: {} },
          { name: 'a', spec: {} },
        ],
      },
      /must be unique/,
    ],
    [
      'a level of capacity 2',
      { levels: [{ name: 'a', spec: { tokenCapacity: { mlp: 2 } } }] },
      /tokenCapacity.mlp must be in/,
    ],
    ['a base that is text', { base: 'x' }, /base must be an object/],
  ])('refuses %s', (_, change, message) => {
    expect(() => policyFromJson({ ...json(), ...change }, 'f.json', spec, [])).toThrow(message);
  });
});

describe('thresholds', () => {
  const policy = calibrated({ kind: 'elastiformer' });
  const id = routerId(0, 'mlp');

  it('are the 1 - c quantiles, interpolated between calibrated capacities', () => {
    expect(thresholds(policy, { attn: 0.4, mlp: 0.4 }).get(id)).toBeCloseTo(4.6);
    expect(thresholds(policy, { attn: 0.6, mlp: 0.6 }).get(id)).toBeCloseTo(6.4);
    expect(thresholds(policy, { attn: 1, mlp: 0.6 }).get(id)).toBeCloseTo(8.4);
    expect(thresholds(policy, { attn: 1, mlp: 0.6 }).get(routerId(0, 'attn'))).toBe(Number.NEGATIVE_INFINITY);
  });

  it('need a calibration below full capacity', () => {
    expect(() => thresholds({ ...policy, calibration: null }, { attn: 0.5, mlp: 1 })).toThrow(/never trained/);
  });
});

describe('budgets', () => {
  const policy = calibrated({ kind: 'elastiformer' });

  it('cost what they say, by the model of the kernels', () => {
    for (const budget of [0.5, 0.7, 0.95]) {
      const point = resolveBudget(budget, spec, policy);
      expect(point.full).toBe(false);
      expect(point.flopsRatio).toBeCloseTo(budget, 6);
      expect(flopsRatio(spec, policy, point.capacity, 64)).toBe(point.flopsRatio);
    }
    const { total, perLayer, head } = forwardFlops(spec, [64]);
    const routers = 4 * 2 * 2 * 64 * spec.hidden;
    expect(flopsRatio(spec, policy, { attn: 1, mlp: 1 }, 64)).toBeCloseTo((total + routers) / total, 12);
    expect(flopsRatio(spec, policy, { attn: 1, mlp: 0.5 }, 64)).toBeCloseTo(
      (4 * (perLayer.attn + perLayer.mlp / 2) + head + routers) / total,
      12,
    );
  });

  it('give the plain backbone when full', () => {
    for (const budget of [1, 'full', { spec: {} }, { spec: { tokenCapacity: { mlp: 1 } } }] as const) {
      expect(resolveBudget(budget, spec, policy)).toMatchObject({ full: true, flopsRatio: 1, spec: {} });
      expect(resolveBudget(budget, spec, null).full).toBe(true);
    }
  });

  it('take levels by name and explicit settings', () => {
    const levels = standardLevels(spec, policy, 64);
    const point = resolveBudget('p70', spec, { ...policy, levels });
    expect(point).toMatchObject({ level: 'p70', full: false });
    expect(point.flopsRatio).toBeCloseTo(0.7, 3);
    const half = resolveBudget({ spec: { tokenCapacity: { mlp: 0.5 } } }, spec, policy);
    expect(half.capacity).toEqual({ attn: 1, mlp: 0.5 });
    expect(half.spec).toEqual({ tokenCapacity: { mlp: 0.5 } });
  });

  it.each([
    [0, /must be in \(0, 1\], got 0/],
    [2, /must be in \(0, 1\], got 2/],
    [Number.NaN, /must be in \(0, 1\]/],
    [0.01, /cannot be reached: what is not routed takes 0\.\d+ of the FLOPs at 64 tokens; ask for 0\.\d+ or more/],
    ['p7', /no level is named 'p7'; there are full/],
    [{ spec: { width: 1 } }, /unknown axis 'width'/],
    [{ spec: { tokenCapacity: { mlp: 0 } } }, /tokenCapacity.mlp must be in \(0, 1\], got 0/],
    [{ spec: { tokenCapacity: { head: 1 } } }, /unknown place 'head'/],
    [{ latencyMs: 3 }, /must be a number in/],
    [null, /must be a number in/],
  ])('refuse %j', (budget, message) => {
    expect(() => resolveBudget(budget as never, spec, policy)).toThrow(message);
  });

  it('refuse what needs routers that are not there', () => {
    expect(() => resolveBudget(0.5, spec, null)).toThrow(/needs routers, and this model has none/);
    const mlpOnly = calibrated({ kind: 'elastiformer', tokens: { mlp: 0.5 } });
    expect(() => resolveBudget({ spec: { tokenCapacity: { attn: 0.5 } } }, spec, mlpOnly)).toThrow(
      /attn has no routers/,
    );
    expect(() => resolveBudget(0.5, spec, { ...policy, calibration: null })).toThrow(/never trained/);
  });
});
