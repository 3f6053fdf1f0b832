// Policies: recipes, the JSON format, thresholds from quantiles, and budgets from the cost model.

import { describe, expect, it } from 'vitest';
import { perAxis, routerId } from '../../lib/elastic/axes.js';
import { resolveBudget } from '../../lib/elastic/budget.js';
import { policyFromJson, policyToJson } from '../../lib/elastic/config.js';
import { flopsRatio } from '../../lib/elastic/cost.js';
import { policyOf, type Recipe } from '../../lib/elastic/elastify.js';
import { standardLevels } from '../../lib/elastic/levels.js';
import {
  type Calibration,
  type ElasticPolicy,
  routerCapacities,
  routerPlaces,
  thresholds,
} from '../../lib/elastic/policy.js';
import { forwardFlops, keyValueFlops } from '../../lib/model/flops.js';
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

function calibrated(recipe: Recipe): ElasticPolicy & { calibration: Calibration } {
  const policy: ElasticPolicy = { ...policyOf(recipe, spec), base };
  // First the last router is taken away, then the first, then all go to a fifth.
  const full = routerPlaces(policy).map(() => 1);
  const path = [
    full,
    full.with(-1, 0),
    full.with(-1, 0).with(0, 0),
    full.map((_, i) => (i === 0 ? 0 : 0.2)).with(-1, 0),
  ];
  // Quantiles q -> q + 10 * capacity of the grid.
  const capacities = [0.4, 0.8];
  const points = 5;
  const table = Float32Array.from(
    { length: 10 },
    (_, i) => (i % points) / (points - 1) + 10 * capacities[Math.floor(i / points)],
  );
  const quantiles = new Map(routerPlaces(policy).map(({ id }) => [id, table]));
  return {
    ...policy,
    calibration: { path, capacities, points, tokens: 100, sequenceLength: 64, quantiles },
  };
}

describe('recipes', () => {
  it('routes every layer in both places by default, straight through', () => {
    const policy = policyOf({ kind: 'elastiformer' }, spec);
    expect(policy).toMatchObject({ gate: 'straight-through', capacity: { attn: [0.3, 1], mlp: [0.3, 1] } });
    expect(policy.tokens.attn?.keys).toBe('all');
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
    [{ kind: 'cost-eff' }, /kind must be 'elastiformer', 'matformer' or 'router-tuning', got "cost-eff"/],
    [{ kind: 'elastiformer', loraRank: 1 }, /unknown recipe key 'loraRank'/],
    [{ kind: 'elastiformer', tokens: { attn: 0 } }, /tokens.attn: capacity must be in \(0, 1\], got 0/],
    [{ kind: 'elastiformer', tokens: { mlp: 2 } }, /capacity must be in \(0, 1\], got 2/],
    [{ kind: 'elastiformer', tokens: { mlp: Number.NaN } }, /capacity must be in/],
    [{ kind: 'elastiformer', tokens: { mlp: [0.9, 0.5] } }, /range must ascend/],
    [{ kind: 'elastiformer', tokens: { head: 0.5 } }, /unknown place 'head'/],
    [{ kind: 'elastiformer', tokens: {} }, /must route tokens of attn, mlp or both, or heads or blocks/],
    [{ kind: 'elastiformer', layers: [4] }, /layers must be ids from 0 to 3, got 4/],
    [{ kind: 'elastiformer', layers: [] }, /layers must be/],
    [{ kind: 'elastiformer', gate: 'soft' }, /gate must be one of/],
    [{ kind: 'elastiformer', keys: 'some' }, /keys must be one of all, selected, got "some"/],
    [null, /recipe must be an object/],
  ])('refuses %j', (recipe, message) => {
    expect(() => policyOf(recipe as never, spec)).toThrow(message);
  });
});

describe('Router-Tuning', () => {
  const of = (recipe: object) => policyOf({ kind: 'router-tuning', ...recipe } as Recipe, spec);

  it('routes attention by sequence in half of the layers, the last one never', () => {
    expect(of({})).toMatchObject({
      ...{ gate: 'straight-through', tokens: {}, sequences: { attn: { layers: [1, 2] } } },
      capacity: { 'attn-sequence': [0.3, 1] },
    });
    expect(routerPlaces(of({})).map(({ id }) => id)).toEqual(['layers.1.attn.sequence', 'layers.2.attn.sequence']);
    expect(of({ layers: 3 }).sequences?.attn?.layers).toEqual([0, 1, 2]);
    expect(of({ layers: [3] }).sequences?.attn?.layers).toEqual([3]);
  });

  it('routes tokens with the keys of those that enter, and whole blocks by one router', () => {
    expect(of({ granularity: 'token' }).tokens).toEqual({ attn: { layers: [1, 2], keys: 'selected' } });
    const block = of({ target: 'block', granularity: 'token', keys: 'all', lora: { rank: 2 } });
    expect(block.tokens).toEqual({ block: { layers: [1, 2], keys: 'all' } });
    expect(block.lora?.rank).toBe(2);
    expect(routerPlaces(block)[0]).toMatchObject({ id: 'layers.1.block.token', places: ['attn', 'mlp'], outputs: 1 });
  });

  it.each([
    [{ target: 'head' }, /target must be one of attn, mlp, block, got "head"/],
    [{ granularity: 'word' }, /granularity must be one of sequence, token, got "word"/],
    [{ layers: 4 }, /layers must be a number from 1 to 3/],
    [{ layers: [9] }, /layers must be ids from 0 to 3/],
    [{ capacity: 0 }, /capacity must be in \(0, 1\]/],
    [{ keys: 'all' }, /keys is for tokens of attn and block/],
    [{ keys: 'some', granularity: 'token' }, /keys must be one of all, selected/],
    [{ gate: 'raw' }, /unknown recipe key 'gate'/],
  ])('refuses %j', (recipe, message) => {
    expect(() => of(recipe)).toThrow(message);
  });

  it.each([
    [{ kind: 'elastiformer', tokens: { attn: 0.5 } }, {}, /layer 1 has tokenCapacity.attn and sequenceCapacity.attn/],
    [{ kind: 'elastiformer', blocks: { count: 2 } }, { target: 'block' }, /layer 1 has sequenceCapacity.block/],
    [{ kind: 'elastiformer', tokens: { attn: 0.5 } }, { granularity: 'token' }, /tokens of attn are in two recipes/],
    [{ kind: 'elastiformer', tokens: { mlp: 0.5 }, gate: 'raw' }, {}, /gate 'straight-through'/],
  ])('and %j does not go with %j', (other, recipe, message) => {
    expect(() => policyOf([other, { kind: 'router-tuning', ...recipe }] as Recipe[], spec)).toThrow(message);
  });

  it('goes with routers of other sub-layers, and comes back from its file', () => {
    const recipes = [{ kind: 'elastiformer', tokens: { mlp: 0.5 } }, { kind: 'router-tuning' }] as Recipe[];
    const policy: ElasticPolicy = { ...policyOf(recipes, spec), base };
    const level = { name: 'some', spec: { tokenCapacity: { mlp: 0.5 }, sequenceCapacity: { attn: [0, 0.5] } } };
    const json = JSON.parse(JSON.stringify(policyToJson({ ...policy, levels: [level] })));
    const warnings: string[] = [];
    expect(policyFromJson(json, 'f.json', spec, warnings)).toEqual({ ...policy, levels: [level] });
    expect(warnings).toEqual([]);
    const attn = { ...json.sequences.attn, decide_at: 'token' };
    expect(() => policyFromJson({ ...json, sequences: { attn } }, 'f.json', spec, [])).toThrow(
      /sequences.attn.decide_at must be "prefill", got "token"/,
    );
    expect(() => policyFromJson({ ...json, gate: 'raw' }, 'f.json', spec, [])).toThrow(/needs the gate/);
    expect(() => resolveBudget({ spec: { sequenceCapacity: { mlp: 0.5 } } }, spec, policy)).toThrow(
      /sequenceCapacity.mlp is 0.5, but mlp-sequence has no routers/,
    );
    expect(() => resolveBudget({ spec: { sequenceCapacity: { head: 0.5 } as never } }, spec, policy)).toThrow(
      /unknown place 'head' in sequenceCapacity; it takes attn, mlp, block/,
    );
  });

  it('costs what the sequences that enter do, and a router once for each', () => {
    const { perLayer, total } = forwardFlops(spec, [64]);
    const policy = of({ layers: [1] });
    const router = (2 * spec.hidden) / total;
    expect(flopsRatio(spec, policy, [0.5], 64)).toBeCloseTo(1 - (0.5 * perLayer[1].attn) / total + router, 12);
    const block = of({ target: 'block', layers: [1] });
    const { attn, mlp } = perLayer[1];
    expect(flopsRatio(spec, block, [0.25], 64)).toBeCloseTo(1 - (0.75 * (attn + mlp)) / total + router, 12);
    const tokens = of({ target: 'block', granularity: 'token', layers: [1] });
    const entered = forwardFlops(spec, [16]).perLayer[1];
    const rest = 1 - (attn + mlp - entered.attn - entered.mlp) / total + 64 * router;
    expect(flopsRatio(spec, tokens, [0.25], 64)).toBeCloseTo(rest, 12);
  });
});

describe('elastic_config.json', () => {
  const policy = calibrated({ kind: 'elastiformer', layers: [0, 2], tokens: { attn: 0.5, mlp: [0.3, 0.9] } });
  const json = () =>
    JSON.parse(
      JSON.stringify(policyToJson({ ...policy, levels: standardLevels(spec, policy, policy.calibration, 64) })),
    );

  it('comes back as it was written', () => {
    const warnings: string[] = [];
    const read = policyFromJson(json(), 'f.json', spec, warnings);
    expect(warnings).toEqual([]);
    expect({ ...read, calibration: { ...read.calibration, quantiles: policy.calibration?.quantiles } }).toEqual({
      ...policy,
      levels: standardLevels(spec, policy, policy.calibration, 64),
    });
  });

  it('keeps tiles of tokens that choose experts together, and refuses those it cannot have', () => {
    const tiled = calibrated({ kind: 'elastiformer', heads: { tile: 64 }, blocks: { count: 2, tile: 32 } });
    const json = JSON.parse(JSON.stringify(policyToJson(tiled)));
    const warnings: string[] = [];
    const read = policyFromJson(json, 'f.json', spec, warnings);
    expect(warnings).toEqual([]);
    expect(read.heads).toEqual(tiled.heads);
    expect(read.blocks).toEqual(tiled.blocks);
    expect([read.heads!.tile, read.blocks!.tile]).toEqual([64, 32]);
    for (const tile of [31, 32.5, 2 ** 24 + 1, '32', null]) {
      expect(() => policyFromJson({ ...json, blocks: { ...json.blocks, tile } }, 'f.json', spec, [])).toThrow(
        /f.json: blocks.tile must be an integer from 32 to 16777216/,
      );
    }
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
      { calibration: { path: [[1, 1, 1, 1]], capacities: [], points: 3, tokens: 1, sequence_length: 1 } },
      /capacities/,
    ],
    [
      'a path of other routers',
      { calibration: { path: [[1, 1]], capacities: [0.5], points: 3, tokens: 1, sequence_length: 1 } },
      /calibration.path\[0\] must be 4 capacities/,
    ],
    [
      'attention without a rule for keys',
      { tokens: { attn: { layers: [0, 2], train_capacity: [0.5, 1] } } },
      /tokens.attn.keys must be one of all, selected/,
    ],
    [
      'a level for another number of layers',
      { levels: [{ name: 'a', spec: { tokenCapacity: { mlp: [1, 0.5, 0.5] } } }] },
      /tokenCapacity.mlp must be in \(0, 1\] or 2 numbers in \[0, 1\]/,
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

  const at = (attn: number, mlp: number) =>
    thresholds(policy, policy.calibration, routerCapacities(policy, { attn, mlp }));

  it('by mass are the c quantiles of the masses before experts, and never so small that none is used', () => {
    const cut = calibrated({ kind: 'elastiformer', layers: [0, 1], heads: { group: 'head', rule: 'mass' } });
    // Points 0, 1/4, 1/2, 3/4, 1 at mean capacities 0.4 and 0.8.
    const table = Float32Array.of(0, 0, 0.5, 0.6, 0.8, 0, 0.2, 0.4, 0.8, 1);
    const quantiles = new Map(routerPlaces(cut).map(({ id }) => [id, table]));
    const massAt = (first: number, second: number) =>
      thresholds(cut, { ...cut.calibration, quantiles }, [first, second]).get(routerId(0, 'heads'));
    expect(massAt(0.5, 0.1)).toBeCloseTo(0.5, 6);
    expect(massAt(0.625, 0.1)).toBeCloseTo(0.55, 6);
    expect(massAt(0.75, 0.85)).toBeCloseTo(0.8, 6);
    // Halfway between both rows.
    expect(massAt(0.75, 0.45)).toBeCloseTo(0.7, 6);
    expect(massAt(0.2, 0.1)).toBe(1e-6);
    expect(massAt(1, 0.5)).toBe(Number.NEGATIVE_INFINITY);
    expect(massAt(0, 0.5)).toBe(Number.POSITIVE_INFINITY);
  });

  it('are the 1 - c quantiles, interpolated between calibrated capacities', () => {
    expect(at(0.4, 0.4).get(id)).toBeCloseTo(4.6);
    expect(at(0.6, 0.6).get(id)).toBeCloseTo(6.4);
    expect(at(1, 0.6).get(id)).toBeCloseTo(8.4);
    expect(at(1, 0.6).get(routerId(0, 'attn'))).toBe(Number.NEGATIVE_INFINITY);
    expect(at(1, 0).get(id)).toBe(Number.POSITIVE_INFINITY);
  });

  it('are infinite for both routers of a sub-layer that does not run', () => {
    const cut = calibrated({ kind: 'elastiformer', tokens: { mlp: [0.3, 1] }, blocks: { count: 2 } });
    const layers = cut.tokens.mlp!.layers.length;
    const first = (c: number) => [c, ...new Array(layers - 1).fill(0.5)];
    for (const [mlp, blocks] of [
      [first(0), first(0.5)],
      [first(0.5), first(0)],
    ]) {
      const result = thresholds(cut, cut.calibration, routerCapacities(cut, { mlp, blocks }));
      expect(result.get(id)).toBe(Number.POSITIVE_INFINITY);
      expect(result.get(routerId(0, 'blocks'))).toBe(Number.POSITIVE_INFINITY);
      expect(result.get(routerId(1, 'blocks'))).toBe(0.5);
    }
  });

  it('let everything pass where a router scores all tokens alike', () => {
    const quantiles = new Map(policy.calibration.quantiles).set(id, new Float32Array(10).fill(2));
    const result = thresholds(policy, { ...policy.calibration, quantiles }, routerCapacities(policy, { mlp: 0.5 }));
    expect(result.get(id)).toBe(Number.NEGATIVE_INFINITY);
    expect(result.get(routerId(1, 'mlp'))).toBeGreaterThan(0);
  });
});

describe('budgets', () => {
  const policy = calibrated({ kind: 'elastiformer' });

  it('cost what they say, by the model of the kernels', () => {
    for (const budget of [0.5, 0.7, 0.95]) {
      const point = resolveBudget(budget, spec, policy);
      expect(point.full).toBe(false);
      expect(point.flopsRatio).toBeCloseTo(budget, 6);
      expect(flopsRatio(spec, policy, routerCapacities(policy, point.spec.tokenCapacity!), 64)).toBe(point.flopsRatio);
    }
    const {
      total,
      perLayer: [perLayer],
      head,
    } = forwardFlops(spec, [64]);
    // Routers choose, and cost, only between none and all.
    const routers = 4 * 2 * 64 * spec.hidden;
    const at = (keys: 'all' | 'selected', attn: number, mlp: number) => {
      const routing = calibrated({ kind: 'elastiformer', keys });
      return flopsRatio(spec, routing, routerCapacities(routing, { attn, mlp }), 64) * total;
    };
    expect(at('all', 1, 1)).toBeCloseTo(total, 3);
    expect(at('all', 0, 1)).toBeCloseTo(4 * perLayer.mlp + head, 3);
    expect(at('all', 1, 0.5)).toBeCloseTo(4 * (perLayer.attn + perLayer.mlp / 2) + head + routers, 3);
    // Half the queries see all keys.
    const half = (perLayer.attn + keyValueFlops(spec, 64)) / 2;
    expect(at('all', 0.5, 1)).toBeCloseTo(4 * (half + perLayer.mlp) + head + routers, 3);
    expect(at('selected', 0.5, 1)).toBeCloseTo(
      4 * (forwardFlops(spec, [32]).perLayer[0].attn + perLayer.mlp) + head + routers,
      3,
    );
  });

  it('lie on the calibrated path', () => {
    const { path } = policy.calibration;
    const cost = path.map((capacities) => flopsRatio(spec, policy, capacities, 64));
    const middle = resolveBudget((cost[1] + cost[2]) / 2, spec, policy);
    expect(middle.thresholds.get(routerId(3, 'mlp'))).toBe(Number.POSITIVE_INFINITY);
    const attn = middle.spec.tokenCapacity!.attn as number[];
    expect(attn[0]).toBeGreaterThan(0);
    expect(attn[0]).toBeLessThan(1);
    expect(attn.slice(1)).toEqual([1, 1, 1]);
  });

  it('give the plain backbone when full', () => {
    for (const budget of [1, 'full', { spec: {} }, { spec: { tokenCapacity: { mlp: 1 } } }] as const) {
      expect(resolveBudget(budget, spec, policy)).toMatchObject({ full: true, flopsRatio: 1, spec: {} });
      expect(resolveBudget(budget, spec, null).full).toBe(true);
    }
  });

  it('take levels by name and explicit settings', () => {
    const levels = standardLevels(spec, policy, policy.calibration, 64);
    const point = resolveBudget('p70', spec, { ...policy, levels });
    expect(point).toMatchObject({ level: 'p70', full: false });
    expect(point.flopsRatio).toBeCloseTo(0.7, 3);
    const half = resolveBudget({ spec: { tokenCapacity: { mlp: 0.5 } } }, spec, policy);
    expect(half.capacity).toEqual({ ...perAxis(() => 1), mlp: 0.5 });
    expect(half.spec).toEqual({ tokenCapacity: { mlp: 0.5 } });
    const layers = resolveBudget({ spec: { tokenCapacity: { mlp: [1, 1, 0.5, 0] } } }, spec, policy);
    expect(layers.capacity).toEqual({ ...perAxis(() => 1), mlp: 0.625 });
    expect(layers.thresholds.get(routerId(3, 'mlp'))).toBe(Number.POSITIVE_INFINITY);
  });

  it.each([
    [0, /must be in \(0, 1\], got 0/],
    [2, /must be in \(0, 1\], got 2/],
    [Number.NaN, /must be in \(0, 1\]/],
    [
      0.01,
      /cannot be reached: this model was calibrated down to 0\.\d+ of the FLOPs at 64 tokens; ask for 0\.\d+ or more/,
    ],
    ['p7', /no level is named 'p7'; there are full/],
    [{ spec: { width: 1 } }, /unknown axis 'width'/],
    [
      { spec: { tokenCapacity: { mlp: 0 } } },
      /tokenCapacity.mlp must be in \(0, 1\] or 4 numbers in \[0, 1\], one per layer, got 0/,
    ],
    [{ spec: { tokenCapacity: { head: 1 } } }, /unknown place 'head'/],
    [{ latency: 3 }, /must be a number in/],
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
