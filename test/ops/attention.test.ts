// rope, attention over packed segments, and attention with a cache.
import { describe, expect, test } from 'vitest';
import { Graph } from '../../lib/graph/graph.js';
import {
  attention,
  attentionCached,
  gatherRows,
  gradients,
  Program,
  rope,
  routeThreshold,
  scatterAdd,
} from '../../lib/graph/index.js';
import { appended, TestCache } from './caches.js';
import { type Case, cases, failure, inputs, narrowEngine, offsetsOf, testEngine } from './harness.js';
import { picks, scored, stored, withSelection } from './selection.js';

/** Every way of storing activations that the device of the tests has. */
const engines = [testEngine(), narrowEngine()].filter((engine) => engine !== null);
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

cases(
  'attention of selected rows',
  layouts.flatMap(({ lengths, heads, kvHeads, dh }) =>
    // Long segments with one pick: their finite differences take long.
    Object.keys(picks)
      .slice(0, lengths[0] < 10 ? undefined : 1)
      .flatMap((pick) =>
        [true, false].map((causal): Case => {
          const n = lengths.reduce((a, b) => a + b, 0);
          const make = inputs(n);
          const { z, threshold } = scored(lengths, picks[pick]);
          return {
            name: `${pick} of segments ${lengths}, ${heads}/${kvHeads} heads of ${dh}, ${causal ? 'causal' : 'full'}`,
            inputs: {
              q: make.f32(['N', n], heads * dh),
              k: make.f32(['N', n], kvHeads * dh),
              v: make.f32(['N', n], kvHeads * dh),
              offsets: make.i32(offsetsOf(lengths), ['O', lengths.length + 1]),
              z: make.values(z, ['N', n], 1),
              threshold: make.values(threshold, ['S', lengths.length]),
            },
            build: ({ q, k, v, offsets, z, threshold }) => {
              const selected = routeThreshold(z, offsets, threshold);
              const options = { heads, kvHeads, causal, scale: 1 / Math.sqrt(dh), selected };
              const y = attention(gatherRows(q, selected.rows), k, v, offsets, options);
              return { y: scatterAdd(stored(q), y, selected.rows) };
            },
            wrt: ['q', 'k', 'v'],
          };
        }),
      ),
  ),
);

cases(
  'attention with a bias of distances',
  [
    { lengths: [1], heads: 1, kvHeads: 1, dh: 2, reach: 0 },
    { lengths: [7, 0, 12], heads: 4, kvHeads: 2, dh: 6, reach: 4 },
    { lengths: [9], heads: 3, kvHeads: 3, dh: 4, reach: 20 },
    { lengths: [140, 3], heads: 2, kvHeads: 1, dh: 3, reach: 5 },
  ].flatMap(({ lengths, heads, kvHeads, dh, reach }) =>
    [true, false].flatMap((causal) =>
      [false, true].map((some): Case => {
        const n = lengths.reduce((a, b) => a + b);
        const make = inputs(n);
        const { z, threshold } = scored(lengths, picks[Object.keys(picks)[0]]);
        return {
          name: `of ${some ? 'selected rows of ' : ''}segments ${lengths}, ${heads}/${kvHeads} heads, reach ${reach}, ${causal ? 'causal' : 'full'}`,
          inputs: {
            q: make.f32(['N', n], heads * dh),
            k: make.f32(['N', n], kvHeads * dh),
            v: make.f32(['N', n], kvHeads * dh),
            offsets: make.i32(offsetsOf(lengths), ['O', lengths.length + 1]),
            bias: make.f32(heads, 2 * reach + 1),
            z: make.values(z, ['N', n], 1),
            threshold: make.values(threshold, ['S', lengths.length]),
          },
          build: ({ q, k, v, offsets, bias, z, threshold }) => {
            const options = { heads, kvHeads, causal, scale: 1 / Math.sqrt(dh), bias };
            if (!some) return { y: attention(q, k, v, offsets, options) };
            const selected = routeThreshold(z, offsets, threshold);
            const y = attention(gatherRows(q, selected.rows), k, v, offsets, { ...options, selected });
            return { y: scatterAdd(stored(q), y, selected.rows) };
          },
          wrt: ['q', 'k', 'v'],
        };
      }),
    ),
  ),
);

cases(
  'cross-attention',
  [
    { keys: [5], queries: [3], heads: 2, kvHeads: 2, dh: 4 },
    { keys: [3, 1, 7], queries: [1, 9, 0], heads: 4, kvHeads: 2, dh: 6 },
    { keys: [130, 2], queries: [2, 5], heads: 1, kvHeads: 1, dh: 3 },
  ].map(({ keys, queries, heads, kvHeads, dh }): Case => {
    const [n, r] = [keys, queries].map((lengths) => lengths.reduce((a, b) => a + b));
    const make = inputs(n + r);
    return {
      name: `${queries} queries of segments of ${keys} keys, ${heads}/${kvHeads} heads of ${dh}`,
      inputs: {
        q: make.f32(['R', r], heads * dh),
        k: make.f32(['N', n], kvHeads * dh),
        v: make.f32(['N', n], kvHeads * dh),
        offsets: make.i32(offsetsOf(keys), ['O', keys.length + 1]),
        starts: make.i32(offsetsOf(queries), ['O', keys.length + 1]),
      },
      build: ({ q, k, v, offsets, starts }) => ({
        y: attention(q, k, v, offsets, { heads, kvHeads, causal: false, scale: 1 / Math.sqrt(dh), queries: starts }),
      }),
      wrt: ['q', 'k', 'v'],
    };
  }),
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

test.each(engines)(
  'a selected query gets the bits and counts the pairs that it has among all rows: $activations',
  async (engine) => {
    const [lengths, heads, kvHeads, dh] = [[150, 0, 67], 6, 2, 40];
    const n = lengths.reduce((a, b) => a + b, 0);
    const make = inputs(11);
    const offsets = offsetsOf(lengths);
    const [q, k, v] = [heads, kvHeads, kvHeads].map((h) => Float32Array.from(make.f32(n, h * dh).data));
    for (const causal of [true, false]) {
      for (const [name, pick] of Object.entries(picks)) {
        const { z, threshold } = scored(lengths, pick);
        const g = new Graph();
        const [all, keys, values] = [
          stored(g.feed('q', 'f32', [n, heads * dh])),
          stored(g.feed('k', 'f32', [n, kvHeads * dh])),
          stored(g.feed('v', 'f32', [n, kvHeads * dh])),
        ];
        const segments = g.feed('offsets', 'i32', [lengths.length + 1]);
        const selected = routeThreshold(
          g.feed('z', 'f32', [n, 1]),
          segments,
          g.feed('threshold', 'f32', [lengths.length]),
        );
        const options = { heads, kvHeads, causal, scale: 0.7 };
        const some = g.tag('some', () =>
          attention(gatherRows(all, selected.rows), keys, values, segments, { ...options, selected }),
        );
        g.output('some', stored(some));
        g.output('expected', stored(gatherRows(attention(all, keys, values, segments, options), selected.rows)));
        using program = Program.compile(g, engine);
        const { outputs, counters } = await program.run({
          feeds: {
            ...{ q, k, v },
            offsets: Int32Array.from(offsets),
            z: Float32Array.from(z),
            threshold: Float32Array.from(threshold),
          },
        });
        expect(outputs.some, `${name}, causal ${causal}`).toEqual(outputs.expected);
        let pairs = 0;
        lengths.forEach((length, s) => {
          for (let i = 0; i < length; ++i) if (pick(i, s)) pairs += causal ? i + 1 : length;
        });
        expect(counters.some.flops, name).toBe(4 * dh * heads * pairs);
      }
    }
  },
);

test.each(engines)('keys that no query sees have gradients of exactly zero: $activations', async (engine) => {
  const [n, d] = [70, 8];
  const g = new Graph();
  const [q, k, v] = [
    stored(g.feed('q', 'f32', [2, d])),
    stored(g.feed('k', 'f32', [n, d])),
    stored(g.feed('v', 'f32', [n, d])),
  ];
  const selected = { rows: g.feed('rows', 'i32', [2]), offsets: g.feed('starts', 'i32', [3]) };
  const options = { heads: 2, kvHeads: 2, causal: true, scale: 1, selected };
  const y = attention(q, k, v, g.feed('offsets', 'i32', [3]), options);
  gradients(y, [k, v], { seed: y }).forEach((node, i) => {
    g.output(`d${i}`, stored(node));
  });
  using program = Program.compile(g, engine);
  const make = inputs(3);
  const { outputs } = await program.run({
    feeds: {
      q: Float32Array.from(make.f32(2, d).data),
      k: Float32Array.from(make.f32(n, d).data),
      v: Float32Array.from(make.f32(n, d).data),
      offsets: Int32Array.of(0, 68, n),
      rows: Int32Array.of(1, 4),
      starts: Int32Array.of(0, 2, 2),
    },
  });
  for (const gradient of [outputs.d0, outputs.d1]) {
    expect(gradient.slice(0, 5 * d).every((value) => value !== 0)).toBe(true);
    expect(gradient.slice(5 * d).every((value) => value === 0)).toBe(true);
  }
});

// Several tiles of rows and of keys, with every number of heads to a kv head; the larger scales make weights unequal.
cases(
  'attention over several tiles',
  (
    [
      [[150, 9, 70], 1, 1, 64, 0.6],
      [[90, 0, 45], 8, 2, 128, 0.4],
      [[80], 7, 1, 40, 0.8],
      [[100, 33], 4, 4, 20, 1],
      [[70, 30], 2, 1, 256, -0.3],
      [[40, 41], 3, 1, 32, 0],
      // More tiles than there are blocks.
      [Array.from({ length: 30 }, (_, i) => (i % 3) + 1), 4, 4, 16, 1],
    ] as [number[], number, number, number, number][]
  ).flatMap(([lengths, heads, kvHeads, dh, scale]) =>
    [true, false].map((causal) =>
      withSelection(
        `segments ${lengths}, ${heads}/${kvHeads} heads of ${dh}, scale ${scale}, ${causal ? 'causal' : 'full'}`,
        lengths,
        dh,
        { heads, kvHeads, causal, scale },
      ),
    ),
  ),
);

describe.each([8, 33, 64, 100, 130])('heads of %i', (dh) => {
  // Tiles of keys and queries with and without tails, on every path a device may have for a width of heads.
  cases(
    'attention',
    [true, false].map((causal) =>
      withSelection(causal ? 'causal' : 'full', [37, 0, 66, 1], dh, {
        ...{ heads: 4, kvHeads: 2, causal, scale: 1 / Math.sqrt(dh) },
      }),
    ),
  );

  // How many queries there are, and how many segments, may decide how a device goes about it.
  test.each([1, 9])('a query of %i caches gets the same bits whatever the other queries are', async (segments) => {
    const [heads, kvHeads, fresh, past, capacity] = [4, 2, 20, 430, 460];
    const make = inputs(segments);
    const rows = fresh * segments;
    const floats = (...shape: number[]) => Float32Array.from(make.f32(...shape).data);
    const [q, k, v] = [heads, kvHeads, kvHeads].map((h) => floats(rows, h * dh));
    const held = Array.from({ length: segments }, () => [0, 1].map(() => floats(past, kvHeads * dh)));
    const row = (data: Float32Array, i: number) => data.subarray(i * heads * dh, (i + 1) * heads * dh);
    const run = async (queries: readonly number[]) => {
      using caches = new TestCache({
        past: new Array(segments).fill(past),
        ...{ capacity, width: kvHeads * dh, pageRows: 32 },
      });
      held.forEach(([keys, values], s) => {
        caches.fill(s, keys, values);
      });
      const g = new Graph();
      const [keys, values] = ['k', 'v'].map((name) => g.feed(name, 'f32', [rows, kvHeads * dh]));
      const selected = {
        rows: g.feed('rows', 'i32', [queries.length]),
        offsets: g.feed('starts', 'i32', [segments + 1]),
      };
      const query = g.feed('q', 'f32', [queries.length, heads * dh]);
      const offsets = g.feed('offsets', 'i32', [segments + 1]);
      const options = { heads, kvHeads, scale: 1, selected };
      g.output('y', appended(query, keys, values, offsets, caches.bind(g, segments), options));
      using program = Program.compile(g, testEngine());
      const ends = Int32Array.from({ length: segments + 1 }, (_, s) => s * fresh);
      const { outputs } = await program.run({
        feeds: {
          q: Float32Array.from(queries.flatMap((i) => [...row(q, i)])),
          ...{ k, v, offsets: ends, slots: Int32Array.from(caches.layout.slots) },
          rows: Int32Array.from(queries),
          starts: ends.map((end) => queries.filter((i) => i < end).length),
        },
      });
      expect([...caches.lengths.read()]).toEqual([0, ...new Array(segments).fill(past + fresh)]);
      expect(caches.keys(0, past, past + fresh)).toEqual(k.subarray(0, fresh * kvHeads * dh));
      return outputs.y as Float32Array;
    };
    const every = await run(Array.from({ length: rows }, (_, i) => i));
    const some = Array.from({ length: segments }, (_, s) => [0, 3 + s, fresh - 1].map((i) => s * fresh + i)).flat();
    const alone = await run(some);
    some.forEach((i, at) => {
      expect(row(alone, at), `row ${i}`).toEqual(row(every, i));
    });
  });
});

test('a bias that does not fit is refused when a graph is built', () => {
  const g = new Graph();
  const x = g.feed('x', 'f32', [4, 6]);
  const offsets = g.feed('offsets', 'i32', [2]);
  const bias = (...shape: number[]) => g.feed(`bias ${shape}`, 'f32', shape);
  const options = { heads: 2, kvHeads: 2, causal: true, scale: 1 };
  for (const wrong of [bias(2, 4), bias(3, 5)]) {
    expect(() => attention(x, x, x, offsets, { ...options, bias: wrong })).toThrow(/must be \[2, an odd number\]/);
  }
  const fits = bias(2, 5);
  expect(() => attention(x, x, x, offsets, { ...options, bias: fits, softcap: 3 })).toThrow(/without a softcap/);
  const across = { ...options, causal: false, queries: offsets };
  for (const wrong of [{ bias: fits }, { causal: true }]) {
    expect(() => attention(x, x, x, offsets, { ...across, ...wrong })).toThrow(
      /neither causal nor selected nor with a bias/,
    );
  }
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

describe.each(['attention', 'attention_cached'])('%s: selected rows', (op) => {
  const [heads, kvHeads, scale] = [1, 1, 1];
  const run = async (n: number, offsets: readonly number[], rows: readonly number[], starts: readonly number[]) => {
    using caches = new TestCache({ past: [n, n], capacity: n, width: 2, pageRows: 3 });
    const error = await failure(
      (g) => {
        const q = g.feed('q', 'f32', [rows.length, 2]);
        const [k, v] = ['k', 'v'].map((name) => g.feed(name, 'f32', [n, 2]));
        const selected = { rows: g.feed('rows', 'i32', [rows.length]), offsets: g.feed('starts', 'i32', [3]) };
        const segments = g.feed('offsets', 'i32', [3]);
        if (op === 'attention_cached') {
          g.output('y', attentionCached(q, segments, caches.bind(g, 2), { heads, kvHeads, scale, selected }));
        } else {
          g.output('y', attention(q, k, v, segments, { heads, kvHeads, causal: true, scale, selected }));
        }
      },
      {
        feeds: {
          q: new Float32Array(rows.length * 2),
          k: new Float32Array(n * 2).fill(1),
          v: new Float32Array(n * 2).fill(1),
          offsets: Int32Array.from(offsets),
          rows: Int32Array.from(rows),
          starts: Int32Array.from(starts),
          ...(op === 'attention_cached' && { slots: Int32Array.from(caches.layout.slots) }),
        },
      },
    );
    return error;
  };

  test.each([
    ['of another segment', [2, 3], [0, 1, 2], 'rows'],
    ['before their segment', [0, 1], [0, 1, 2], 'rows'],
    ['out of order', [3, 1], [0, 1, 2], 'rows'],
    ['twice', [1, 1], [0, 2, 2], 'rows'],
    ['past the end', [0, 4], [0, 1, 2], 'rows'],
    ['negative', [-1, 2], [0, 1, 2], 'rows'],
    ['huge', [0, 0x7fffffff], [0, 1, 2], 'rows'],
    ['not all counted', [0, 2], [0, 1, 1], 'row_offsets'],
    ['counted beyond', [0, 2], [0, 1, 3], 'row_offsets'],
    ['counted backwards', [0, 2], [0, 2, 1], 'row_offsets'],
    ['counted from one', [0, 2], [1, 1, 2], 'row_offsets'],
  ])('%s', async (_, rows, starts, operand) => {
    const error = await run(4, [0, 2, 4], rows, starts);
    expect(error).toMatchObject({ code: 'InvalidData' });
    expect(error.message).toContain(operand);
    expect(error.message).toContain(`[${op}]`);
  });
});

test('q and k of different rows need a selection', async () => {
  const error = await failure((g) => {
    const [q, k] = [g.feed('q', 'f32', [3, 2]), g.feed('k', 'f32', [4, 2])];
    attention(q, k, k, g.feed('offsets', 'i32', [2]), { heads: 1, kvHeads: 1, causal: true, scale: 1 });
  });
  expect(error).toMatchObject({ code: 'InvalidArgument' });
  expect(error.message).toBe(
    '[attention] q and k must have the same rows unless some are selected, got q:[3,2] k:[4,2]',
  );
});

test('heads that do not fit are named', async () => {
  const error = await failure((g) => {
    const q = g.feed('q', 'f32', [4, 6]);
    attention(q, q, q, g.feed('offsets', 'i32', [2]), { heads: 4, kvHeads: 4, causal: true, scale: 1 });
  });
  expect(error.message).toBe('[attention] 4 heads and 4 kv heads do not fit q:[4,6] and keys of [6]');
});
