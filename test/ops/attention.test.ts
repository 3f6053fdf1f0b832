// rope, attention over packed segments, and attention with a cache.
import { expect, test } from 'vitest';
import { Graph } from '../../lib/graph/graph.js';
import { attention, attentionCached, Program, rope } from '../../lib/graph/index.js';
import { Tensor } from '../../lib/native/index.js';
import { type Case, cases, compare, failure, inputs, offsetsOf, testEngine } from './harness.js';

cases(
  'rope',
  (
    [
      [1, 1, 2, 1],
      [5, 3, 8, 4],
      [17, 2, 6, 2],
      [3, 2, 64, 32],
    ] as const
  ).flatMap(([r, heads, dh, pairs]) =>
    [1, 1.3].map((magnitude): Case => {
      const make = inputs(r);
      return {
        name: `${r} rows, ${heads} heads of ${dh}, ${pairs} pairs, magnitude ${magnitude}`,
        inputs: {
          x: make.f32(['R', r], heads * dh),
          positions: make.ids(50, ['R', r]),
          freq: make.weight('f32', pairs),
        },
        build: ({ x, positions, freq }) => ({ y: rope(x, positions, freq, { headDim: dh, magnitude }) }),
        wrt: ['x'],
      };
    }),
  ),
);

const layouts = [
  { lengths: [1], heads: 1, kvHeads: 1, dh: 1 },
  { lengths: [3, 0, 17, 1], heads: 2, kvHeads: 2, dh: 3 },
  { lengths: [5, 9], heads: 4, kvHeads: 2, dh: 8 },
  { lengths: [33], heads: 3, kvHeads: 1, dh: 17 },
  { lengths: [70, 3], heads: 2, kvHeads: 1, dh: 16 },
];

cases(
  'attention',
  layouts.flatMap(({ lengths, heads, kvHeads, dh }) =>
    [true, false].map((causal): Case => {
      const rows = lengths.reduce((a, b) => a + b, 0);
      const make = inputs(rows);
      return {
        name: `segments ${lengths}, ${heads}/${kvHeads} heads of ${dh}, ${causal ? 'causal' : 'full'}`,
        inputs: {
          q: make.f32(['R', rows], heads * dh),
          k: make.f32(['R', rows], kvHeads * dh),
          v: make.f32(['R', rows], kvHeads * dh),
          offsets: make.i32(offsetsOf(lengths), ['O', lengths.length + 1]),
        },
        build: ({ q, k, v, offsets }) => ({
          y: attention(q, k, v, offsets, { heads, kvHeads, causal, scale: 1 / Math.sqrt(dh) }),
        }),
        wrt: ['q', 'k', 'v'],
      };
    }),
  ),
);

cases('attention', [
  {
    name: 'large scores',
    inputs: {
      q: inputs(1).values(
        inputs(1)
          .f32(9, 8)
          .data.map((v) => 40 * v),
        9,
        8,
      ),
      k: inputs(2).f32(9, 8),
      v: inputs(3).f32(9, 8),
      offsets: inputs(4).i32([0, 9], 2),
    },
    build: ({ q, k, v, offsets }) => ({
      y: attention(q, k, v, offsets, { heads: 2, kvHeads: 2, causal: true, scale: 1 }),
    }),
    wrt: ['q', 'k', 'v'],
    tolerance: 1e-4,
  },
]);

cases(
  'attention_cached',
  (
    [
      [[1], [0], 4],
      [[3, 0, 2], [2, 5, 0], 5],
      [[17], [16], 40],
      [[1, 1, 1], [0, 7, 3], 8],
    ] as const
  ).map(([fresh, past, capacity]): Case => {
    const [heads, kvHeads, dh] = [4, 2, 6];
    const rows = fresh.reduce<number>((a, b) => a + b, 0);
    const make = inputs(rows + capacity);
    const cache = make.f32(past.length, capacity, kvHeads * dh).data;
    return {
      name: `new ${fresh} after ${past} of ${capacity}`,
      inputs: {
        q: make.f32(['R', rows], heads * dh),
        k: make.f32(['R', rows], kvHeads * dh),
        v: make.f32(['R', rows], kvHeads * dh),
        offsets: make.i32(offsetsOf(fresh), ['O', fresh.length + 1]),
        lengths: make.state('i32', past, past.length),
        cacheK: make.state('f32', cache, past.length, capacity, kvHeads * dh),
        cacheV: make.state('f32', [...cache].reverse(), past.length, capacity, kvHeads * dh),
      },
      build: ({ q, k, v, offsets, lengths, cacheK, cacheV }) => ({
        y: attentionCached(q, k, v, offsets, lengths, cacheK, cacheV, { heads, kvHeads, scale: 0.4 }),
      }),
    };
  }),
);

test('feeding rows one by one gives what attention gives at once', async () => {
  const [rows, heads, kvHeads, dh] = [7, 2, 1, 8];
  const make = inputs(9);
  const [q, k, v] = [heads, kvHeads, kvHeads].map((h) => Float32Array.from(make.f32(rows, h * dh).data));
  const options = { heads, kvHeads, scale: 0.5 };
  const whole = new Graph();
  const feeds = (g: Graph, n: number) =>
    [
      g.feed('q', 'f32', [n, heads * dh]),
      g.feed('k', 'f32', [n, kvHeads * dh]),
      g.feed('v', 'f32', [n, kvHeads * dh]),
      g.feed('offsets', 'i32', [2]),
    ] as const;
  whole.output('y', attention(...feeds(whole, rows), { ...options, causal: true }));
  using full = Program.compile(whole, testEngine());
  const expected = (await full.run({ feeds: { q, k, v, offsets: Int32Array.of(0, rows) } })).outputs.y;

  const step = new Graph();
  const [lengths, cacheK, cacheV] = [
    Tensor.alloc('i32', [1]),
    Tensor.alloc('f32', [1, rows, kvHeads * dh]),
    Tensor.alloc('f32', [1, rows, kvHeads * dh]),
  ];
  const caches = [step.state(lengths), step.state(cacheK), step.state(cacheV)] as const;
  step.output('y', attentionCached(...feeds(step, 1), ...caches, options));
  using single = Program.compile(step, testEngine());
  const row = (data: Float32Array, i: number) => data.slice((i * data.length) / rows, ((i + 1) * data.length) / rows);
  for (let i = 0; i < rows; ++i) {
    const run = { feeds: { q: row(q, i), k: row(k, i), v: row(v, i), offsets: Int32Array.of(0, 1) } };
    const { y } = (await single.run(run)).outputs;
    compare(y, row(expected as Float32Array, i), 1e-6, `row ${i}`);
  }
  expect([...lengths.read()]).toEqual([rows]);

  // The cache is full: an error, and nothing was written.
  const before = cacheK.read();
  const run = { feeds: { q: row(q, 0), k: row(k, 0), v: row(v, 0), offsets: Int32Array.of(0, 1) } };
  await expect(single.run(run)).rejects.toMatchObject({ code: 'InvalidData' });
  expect(cacheK.read()).toEqual(before);
  expect([...lengths.read()]).toEqual([rows]);
  for (const tensor of [lengths, cacheK, cacheV]) tensor.dispose();
});

test('bad offsets are InvalidData', async () => {
  for (const offsets of [
    [1, 2, 4],
    [0, 3, 2],
    [0, 2, 5],
    [0, -1, 4],
    [0, 2, 3],
  ]) {
    const zeros = new Float32Array(8);
    const error = await failure(
      (g) => {
        const [q, k, v] = ['q', 'k', 'v'].map((name) => g.feed(name, 'f32', [4, 2]));
        const options = { heads: 1, kvHeads: 1, causal: true, scale: 1 };
        g.output('y', attention(q, k, v, g.feed('offsets', 'i32', [3]), options));
      },
      { feeds: { q: zeros, k: zeros, v: zeros, offsets: Int32Array.from(offsets) } },
    );
    expect(error, `${offsets}`).toMatchObject({ code: 'InvalidData' });
    expect(error.message).toContain('attention');
  }
});

test('heads that do not fit are named', async () => {
  const error = await failure((g) => {
    const q = g.feed('q', 'f32', [4, 6]);
    attention(q, q, q, g.feed('offsets', 'i32', [2]), { heads: 4, kvHeads: 4, causal: true, scale: 1 });
  });
  expect(error.message).toBe('[attention] 4 heads and 4 kv heads do not fit q:[4,6] k:[4,6]');
});
