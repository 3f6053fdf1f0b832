// Texts scored in one run, each at its own budget: bit for bit what each gives alone, and rows and FLOPs that add up.
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { Budget } from '../../lib/elastic/budget.js';
import type { ElastiformerRecipe } from '../../lib/elastic/elastify.js';
import { packRuns } from '../../lib/infer/mixed.js';
import { type ElasticModel, loadModel } from '../../lib/infer/model.js';
import { keyValueFlops } from '../../lib/model/flops.js';
import { InvalidArgumentError } from '../../lib/native/errors.js';
import { elasticDirectories } from './fixture.js';

const texts = [
  'The cat saw the dog by the lake. The owl led the pig.',
  'The pig hid the owl by the wood.',
  'The hen',
  'The fox fed the hen by the barn. The cat met the dog by the hill.',
  'The dog met the fox.',
  'The owl',
  'The cat hid.',
];
const share = (tokenCapacity: object): Budget => ({ spec: { tokenCapacity } as object });

const cases: [string, Partial<ElastiformerRecipe>, Budget[], { runs: number }][] = [
  ...(['all', 'selected'] as const).map((keys): (typeof cases)[number] => [
    `tokens, keys of ${keys} rows`,
    { keys },
    // Whole, absent and routed sub-layers meet in every layer and place.
    [
      'full',
      0.8,
      share({ attn: [0, 1, 0.4], mlp: [1, 0.6, 0] }),
      share({ attn: [0.5, 0, 1], mlp: [0, 1, 0.5] }),
      0.65,
      share({ attn: [1, 1, 0], mlp: [0, 1, 1] }),
      share({ mlp: [0, 0, 0] }),
    ],
    { runs: 1 },
  ]),
  [
    'gates that are not 1',
    { gate: 'raw' },
    [0.8, share({ attn: 0.5, mlp: 0.5 }), 'full', share({ attn: 0.7, mlp: [0.4, 0, 0.5] }), 'full', 0.8, 'full'],
    { runs: 3 },
  ],
  [
    'tokens and blocks',
    { tokens: { attn: [0.3, 1], mlp: [0.3, 1] }, blocks: { count: 4 } },
    [
      { spec: { blockShare: 0.5 } },
      { spec: { blockShare: 0.75, tokenCapacity: { mlp: [0.5, 0.5, 0] } } },
      'full',
      { spec: { blockShare: [0.25, 0.5, 0.5], tokenCapacity: { mlp: [0, 0.6, 1], attn: [0.5, 0, 1] } } },
      { spec: { blockShare: [1, 0.5, 1] } },
      { spec: { blockShare: [0, 0.5, 0.5] } },
      'full',
    ],
    { runs: 3 },
  ],
  [
    'tokens and corrections',
    { lora: { rank: 2, targets: ['q', 'k', 'o', 'up'] } },
    ['full', 0.8, share({ attn: [0, 1, 0.4], mlp: [1, 0.6, 0] }), share({ attn: [0.5, 0, 1] }), 0.6, 'full', 0.8],
    { runs: 2 },
  ],
  ...(['all', 'selected'] as const).map((keys): (typeof cases)[number] => [
    `heads with keys of ${keys} heads`,
    { tokens: { attn: [0.3, 1] }, keys, heads: { group: keys === 'all' ? 'head' : 'gqa', keys } },
    [
      { spec: { headShare: 0.5 } },
      'full',
      { spec: { headShare: 0.5, tokenCapacity: { attn: 0.5 } } },
      { spec: { headShare: [0.5, 1, 0.5] } },
      { spec: { headShare: 0.5, tokenCapacity: { attn: [0, 1, 0.4] } } },
      'full',
      { spec: { headShare: 0.5, tokenCapacity: { attn: [0.4, 0.5, 0] } } },
    ],
    { runs: 3 },
  ]),
  [
    'blocks alone',
    { blocks: { count: 2 } },
    [
      { spec: { blockShare: 0.5 } },
      'full',
      { spec: { blockShare: [0.5, 0.5, 0] } },
      { spec: { blockShare: [0.5, 0.5, 0] } },
      'full',
      { spec: { blockShare: [0.5, 0.5, 1] } },
      { spec: { blockShare: 0.5 } },
    ],
    { runs: 4 },
  ],
];

describe.each(cases)('%s', (_, recipe, budgets, { runs }) => {
  let model: ElasticModel;
  beforeAll(async () => {
    model = await loadModel((await elasticDirectories(recipe)).elastic);
  });
  afterAll(() => model.dispose());

  test('scores have the bits of every text alone', async () => {
    const together = await model.score(texts, { budget: budgets });
    for (const [i, text] of texts.entries()) {
      const [alone] = await model.score([text], { budget: budgets[i] });
      expect(together[i].tokens).toEqual(alone.tokens);
      expect(together[i].logprobs, text).toEqual(alone.logprobs);
      const [a, b] = [together[i].usage.compute, alone.usage.compute];
      expect([a.requested, a.level, a.effective]).toEqual([budgets[i], b.level, b.effective]);
      // The same rows enter everywhere, whoever else is there.
      expect(a.layersRun).toEqual(b.layersRun);
      // Routers, and keys and values that others need, may come on top.
      expect(a.flops).toBeGreaterThanOrEqual(b.flops);
    }
  });

  test('sequences share as few runs as their budgets allow', () => {
    const sequences = texts.map((text, i) => {
      const ids = Int32Array.from(model.network.tokenizer!.encode(text));
      return { ids, point: model.resolve(budgets[i], { length: ids.length }) };
    });
    const packed = packRuns(model.network, sequences, { rows: 1000, segments: 64 });
    expect(packed).toHaveLength(runs);
    expect(packed.flat().sort()).toEqual([...texts.keys()]);
  });

  test('texts of one budget cost in one run what each costs alone', async () => {
    for (const budget of new Set([budgets[0], budgets[3], 'full'])) {
      const together = await model.score(texts, { budget });
      for (const [i, text] of texts.entries()) {
        const [alone] = await model.score([text], { budget });
        // How corrections' two products divide their cost is not the same for every projection.
        const off = Math.abs(together[i].usage.compute.flops / alone.usage.compute.flops - 1);
        expect(off).toBeLessThanOrEqual(recipe.lora ? 1e-3 : 0);
        expect(together[i].logprobs).toEqual(alone.logprobs);
      }
    }
  });
});

describe('a model with token routers', () => {
  let model: ElasticModel;
  beforeAll(async () => {
    model = await loadModel((await elasticDirectories()).elastic);
  });
  afterAll(() => model.dispose());

  test('what a run needs for others is counted where it runs', async () => {
    const { spec } = model.network;
    const noAttention = share({ attn: [0, 0, 0] });
    const [a, b] = await model.score(texts.slice(0, 2), { budget: ['full', noAttention] });
    const [aloneA] = await model.score([texts[0]]);
    const [aloneB] = await model.score([texts[1]], { budget: noAttention });
    // Alone neither runs a router, and the second has no keys and values.
    const routers = (rows: number) => spec.layers * 2 * rows * spec.hidden;
    const [n, m] = [a.tokens.length, b.tokens.length];
    expect(a.usage.compute.flops).toBe(aloneA.usage.compute.flops + routers(n));
    const keys = spec.layers * keyValueFlops(spec, m);
    expect(b.usage.compute.flops).toBe(aloneB.usage.compute.flops + routers(m) + keys);
    expect([...b.usage.compute.layersRun.attn]).toEqual([0, 0, 0]);
  });

  test('texts that do not fit one run come in several, in order', async () => {
    const many = Array.from({ length: 40 }, (_, i) => texts[i % texts.length]);
    const budgets = many.map((_, i): Budget => (i % 3 === 0 ? 'full' : i % 3 === 1 ? 0.8 : 0.6));
    const together = await model.score(many, { budget: budgets });
    const lengths = many.map((text) => model.network.tokenizer!.encode(text).length);
    expect(lengths.reduce((a, b) => a + b, 0)).toBeGreaterThan(model.network.maxContext);
    for (const i of [0, 7, 20, 39]) {
      const [alone] = await model.score([many[i]], { budget: budgets[i] });
      expect(together[i].logprobs).toEqual(alone.logprobs);
    }
  });

  test('budgets that do not fit the texts are typed errors', async () => {
    await expect(model.score(['a', 'b'], { budget: [0.8] })).rejects.toThrow(
      /one budget or one for each of the 2 texts, got 1/,
    );
    await expect(model.score(['a'], { budget: [0] })).rejects.toThrow(InvalidArgumentError);
    expect(await model.score([], { budget: [] })).toEqual([]);
  });
});
