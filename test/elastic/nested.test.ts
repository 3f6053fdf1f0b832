// Nested feed-forwards as policies: recipes, alignment, Mix'n'Match, budgets by formula, the file format.
import { describe, expect, it } from 'vitest';
import { type Budget, resolveBudget } from '../../lib/elastic/budget.js';
import { policyFromJson, policyToJson } from '../../lib/elastic/config.js';
import { flopsRatio } from '../../lib/elastic/cost.js';
import { policyOf, type Recipe } from '../../lib/elastic/elastify.js';
import { standardLevels } from '../../lib/elastic/levels.js';
import { defaultAlignment, mixAndMatch } from '../../lib/elastic/nested.js';
import type { ElasticPolicy } from '../../lib/elastic/policy.js';
import { forwardFlops } from '../../lib/model/flops.js';
import { specFromConfig } from '../../lib/model/spec.js';

const spec = specFromConfig(
  {
    model_type: 'llama',
    vocab_size: 100,
    hidden_size: 32,
    intermediate_size: 128,
    num_hidden_layers: 3,
    num_attention_heads: 4,
    num_key_value_heads: 2,
  },
  'config.json',
);
const base = { name: 'tiny', weightsSha256: 'a'.repeat(64), tokenizerSha256: null };
const matformer = { kind: 'matformer', granularities: [0.25, 0.5, 1], alignment: 16 } as const;
const { alignment: _, ...unaligned } = matformer;
const policyFor = (recipe: Recipe | readonly Recipe[]): ElasticPolicy => ({ ...policyOf(recipe, spec), base });
const nested = policyFor(matformer);
const resolve = (budget: Budget, policy: ElasticPolicy | null = nested) =>
  resolveBudget(budget, spec, policy, { length: 64 });

describe('recipes', () => {
  it('nests all layers, aligned so that every granularity is a multiple', () => {
    expect(policyFor(unaligned)).toMatchObject({
      nested: { layers: [0, 1, 2], granularities: [0.25, 0.5, 1], alignment: 32, scores: 'none' },
      tokens: {},
    });
    const eighths = [0.125, 0.25, 0.5, 1];
    expect([8192, 3072, 11008, 88].map((ffn) => defaultAlignment(eighths, ffn))).toEqual([64, 64, 32, 1]);
    expect([128, 86, 97].map((ffn) => defaultAlignment([0.3, 1], ffn))).toEqual([16, 2, 1]);
  });

  it('composes with routing of tokens and corrections', () => {
    const policy = policyFor([
      { kind: 'elastiformer', tokens: { attn: 0.5 }, lora: { rank: 2 } },
      { ...matformer, layers: [1] },
    ]);
    expect(policy).toMatchObject({ tokens: { attn: {} }, nested: { layers: [1] }, lora: { targets: ['q', 'v'] } });
    expect(policyFor({ ...matformer, lora: { rank: 2 } }).lora?.targets).toEqual(['gate', 'up', 'down']);
  });

  it.each([
    [{ ...matformer, granularities: [0.5] }, /granularities must end with 1/],
    [{ ...matformer, granularities: [] }, /granularities must be shares/],
    [{ ...matformer, granularities: [0, 1] }, /granularities must be shares/],
    [{ ...matformer, granularities: 0.5 }, /granularities must be shares/],
    [{ ...matformer, granularities: [0.5, 0.25, 1] }, /must ascend by at least the alignment of 16 units/],
    [{ ...unaligned, granularities: [0.49, 0.5, 1] }, /must ascend by at least the alignment of 16 units/],
    [{ ...matformer, granularities: [0.3, 1] }, /the granularity 0.3 is 38.4 of 128 units, no multiple/],
    [{ ...matformer, alignment: 24 }, /alignment must be a positive integer that divides .* 128, got 24/],
    [{ ...matformer, alignment: 64 }, /0.25 is 32 of 128 units, no multiple of the alignment 64; the nearest is 0.5/],
    [{ ...matformer, rank: 'size' }, /rank must be one of activation/],
    [{ ...matformer, layers: [3] }, /layers must be ids from 0 to 2/],
    [[matformer, matformer], /two recipes of kind 'matformer'/],
    [[matformer, null], /recipe must be an object/],
    [[], /there is no recipe/],
    [
      [
        { kind: 'elastiformer', lora: { rank: 1 } },
        { ...matformer, lora: { rank: 1 } },
      ],
      /lora must be in one recipe/,
    ],
    [
      [
        { kind: 'elastiformer', blocks: { count: 4 }, layers: [0, 1] },
        { ...matformer, layers: [1, 2] },
      ],
      /must be in layers whose feed-forward is not cut into blocks, as 1 is/,
    ],
  ])('refuses %j', (recipe, message) => {
    expect(() => policyOf(recipe as never, spec)).toThrow(message);
  });
});

it("Mix'n'Match: never falling with depth, one granularity apart, one layer at a time", () => {
  const ladder = mixAndMatch(nested.nested!, 3, 128);
  expect(ladder).toEqual([
    [32, 32, 32],
    [32, 32, 64],
    [32, 64, 64],
    [64, 64, 64],
    [64, 64, 128],
    [64, 128, 128],
    [128, 128, 128],
  ]);
  expect(mixAndMatch({ ...nested.nested!, layers: [0, 2] }, 3, 128)[1]).toEqual([32, 128, 64]);
});

describe('budgets', () => {
  const total = forwardFlops(spec, [64]).total;
  const perUnit = 2 * 64 * 32 * 3;
  const ratio = (widths: readonly number[]) =>
    (total - perUnit * widths.reduce((saved, units) => saved + 128 - units, 0)) / total;

  it('a share is the widest rung within it', () => {
    for (const rung of mixAndMatch(nested.nested!, 3, 128).slice(0, -1)) {
      expect(flopsRatio(spec, nested, [], 64, rung)).toBeCloseTo(ratio(rung), 12);
      expect(resolve(ratio(rung) + 1e-9)).toMatchObject({ widths: rung, full: false });
      expect(resolve(ratio(rung) + 1e-9).flopsRatio).toBeCloseTo(ratio(rung), 12);
    }
    expect(resolve(0.999).widths).toEqual([64, 128, 128]);
    expect(() => resolve(ratio([32, 32, 32]) - 0.01)).toThrow(/cannot be reached: this model reaches down to/);
  });

  it('corrections cost as much as they are wide', () => {
    const corrected = policyFor({ ...matformer, lora: { rank: 2 } });
    const widths = [32, 64, 128];
    const own = widths.reduce((sum, units) => sum + 2 * 2 * 64 * 3 * (32 + units), 0);
    const difference = flopsRatio(spec, corrected, [], 64, widths) - flopsRatio(spec, nested, [], 64, widths);
    expect(difference * total).toBeCloseTo(own, 3);
  });

  it('widths are shares, rounded to the alignment, or units', () => {
    const width = (ffnWidth: unknown) => resolve({ spec: { ffnWidth } as never }).widths;
    expect(width(0.3)).toEqual([32, 32, 32]);
    expect(width(0.001)).toEqual([16, 16, 16]);
    expect(width(48)).toEqual([48, 48, 48]);
    expect(width([0.5, 16, 1])).toEqual([64, 16, 128]);
    expect(width(1)).toBe(null);
    expect(width(128)).toBe(null);
    expect(resolve({ spec: { ffnWidth: 128 } }).full).toBe(true);
    expect(resolve({ spec: { ffnWidth: 48 } })).toMatchObject({ spec: { ffnWidth: 0.375 } });
    expect(resolve({ spec: { ffnWidth: [64, 16, 1] } }).why).toMatch(
      /of 64 units in 1, of 16 in 1, of 128 in 1 of 3 layers, some below the 32 that are trained/,
    );
  });

  it.each([
    [40, /must be a multiple of the alignment 16, such as 32 or 48, got 40/],
    [8, /must be a multiple of the alignment 16, such as 16, got 8/],
    [129, /must be a share in \(0, 1\] or a number of units up to 128, got 129/],
    [1.5, /must be a share/],
    [0, /must be a share/],
    [-1, /must be a share/],
    [Number.NaN, /must be a share/],
    ['half', /must be a share/],
    [[0.5, 0.5], /must be one width, or 3, one per nested layer/],
    [[0.5, 0.5, null], /must be a share/],
    [{}, /must be a share/],
  ])('refuses the width %j', (ffnWidth, message) => {
    expect(() => resolve({ spec: { ffnWidth } as never })).toThrow(message);
  });

  it('models that are not nested have no widths', () => {
    const routed = policyFor({ kind: 'elastiformer' });
    expect(() => resolve({ spec: { ffnWidth: 0.5 } }, routed)).toThrow(/no feed-forward of this model is nested/);
    expect(() => resolve({ spec: { ffnWidth: 0.5 } }, null)).toThrow(/no feed-forward of this model is nested/);
  });

  it('routers take the rest below the narrowest widths', () => {
    const policy = policyFor([{ kind: 'elastiformer', tokens: { mlp: [0.2, 1] } }, matformer]);
    const quantiles = new Map(
      [0, 1, 2].map((layer) => [`layers.${layer}.mlp.token`, Float32Array.from([0, 0.25, 0.5, 0.75, 1])]),
    );
    const path = [
      [1, 1, 1],
      [0.5, 0.5, 0.5],
    ];
    const calibration = { path, capacities: [0.5], points: 5, tokens: 10, sequenceLength: 64, quantiles };
    const both = { ...policy, calibration };
    expect(resolve(0.8, both)).toMatchObject({ spec: { ffnWidth: expect.anything() }, capacity: { mlp: 1 } });
    expect(Object.keys(resolve(0.8, both).spec)).toEqual(['ffnWidth']);
    const narrow = flopsRatio(spec, both, [1, 1, 1], 64, [32, 32, 32]);
    const below = resolve(narrow - 0.02, both);
    expect(below.widths).toEqual([32, 32, 32]);
    expect(below.capacity.mlp).toBeLessThan(1);
    expect(below.flopsRatio).toBeCloseTo(narrow - 0.02, 6);
    // Without calibration the widths are there all the same.
    expect(resolve(0.8, policy).widths).toEqual(resolve(0.8, both).widths);
    expect(() => resolve(narrow - 0.02, policy)).toThrow(/cannot be reached/);
    expect(() => resolve({ spec: { tokenCapacity: { mlp: 0.5 } } }, policy)).toThrow(/never trained/);
  });
});

describe('elastic_config.json', () => {
  const policy: ElasticPolicy = {
    ...nested,
    nested: { ...nested.nested!, trained: 'all', scores: 'taylor' },
    levels: standardLevels(spec, nested, null, 64),
  };
  const json = () => JSON.parse(JSON.stringify(policyToJson(policy)));

  it('comes back as it was written', () => {
    const warnings: string[] = [];
    expect(policyFromJson(json(), 'f.json', spec, warnings)).toEqual(policy);
    expect(warnings).toEqual([]);
    expect(policy.levels.map(({ name }) => name)).toEqual(['full', 'p90', 'p80', 'p70', 'p60', 'ffn50', 'ffn25']);
  });

  it.each([
    ['alignment', { alignment: 24 }, /ffn.alignment must be a positive integer that divides/],
    ['granularities', { granularities: [0.5, 0.25, 1] }, /ffn.granularities must be ascending shares up to 1/],
    ['a last granularity below 1', { granularities: [0.5] }, /ffn.granularities/],
    ['scores', { scores: 'magic' }, /ffn.scores must be one of activation, taylor, none/],
    ['an order that does not fit the scores', { permuted: false }, /ffn.permuted must be true/],
    ['training', { trained: 'half' }, /ffn.trained must be one of lora, ffn, all/],
    ['nested', { nested: 1 }, /ffn.nested must be true/],
    ['layers', { layers: [0, 3] }, /ffn.layers must be ascending layer ids below 3/],
  ])('refuses bad %s', (_, change, message) => {
    expect(() => policyFromJson({ ...json(), ffn: { ...json().ffn, ...change } }, 'f.json', spec, [])).toThrow(message);
  });

  it('refuses widths of levels that are none, or where nothing is nested', () => {
    const level = (ffnWidth: unknown) => ({ ...json(), levels: [{ name: 'a', spec: { ffnWidth } }] });
    expect(() => policyFromJson(level(40), 'f.json', spec, [])).toThrow(/levels\[0\].spec.ffnWidth must be a multiple/);
    const { ffn: _, ...plain } = level(0.5);
    expect(() => policyFromJson(plain, 'f.json', spec, [])).toThrow(/ffnWidth must be absent: no layer is nested/);
  });
});
