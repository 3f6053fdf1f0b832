// rope, attention over packed segments, and attention with a cache.
import { describe, expect, test } from 'vitest';
import { Graph, type Node } from '../../lib/graph/graph.js';
import {
  activation,
  attention,
  attentionCached,
  type Cache,
  cacheAppend,
  gatherRows,
  gradients,
  type HeadOptions,
  Program,
  rope,
  routeThreshold,
  scatterAdd,
} from '../../lib/graph/index.js';
import { Tensor } from '../../lib/native/index.js';
import { type Case, cases, compare, failure, inputs, narrowEngine, offsetsOf, testEngine } from './harness.js';

/** Attention over caches to which k and v were appended. */
function appended(q: Node, k: Node, v: Node, offsets: Node, cache: Cache, options: HeadOptions): Node {
  cacheAppend(k, v, offsets, cache);
  return attentionCached(q, offsets, cache, options);
}

/** Every way of storing activations that the device of the tests has. */
const engines = [testEngine(), narrowEngine()].filter((engine) => engine !== null);
/** What may be stored like the activations between ops, as feeds, outputs and the residual stream may not. */
const stored = (node: Node): Node => activation(node, 'none');

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

/** Whether row i of a segment is a query. */
type Pick = (i: number, segment: number) => boolean;

const picks: Record<string, Pick> = {
  'every third row': (i) => i % 3 === 1,
  'most rows': (i) => i % 5 !== 0,
  'every row': () => true,
  'one segment': (_, segment) => segment === 0,
  'no row': () => false,
};

/** Scores of the rows, and the threshold of every segment that those picked pass. */
function scored(lengths: readonly number[], pick: Pick): { z: number[]; threshold: number[] } {
  const z = lengths.flatMap((length, s) => Array.from({ length }, (_, i) => (pick(i, s) ? 1 : -1)));
  return { z, threshold: lengths.map(() => 0) };
}

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
        y: appended(q, k, v, offsets, { lengths, k: cacheK, v: cacheV }, { heads, kvHeads, scale: 0.4 }),
      }),
    };
  }),
);

cases(
  'attention_cached of selected rows',
  (
    [
      [[1], [0], 4, 'every row'],
      [[3, 0, 2], [2, 5, 0], 5, 'every third row'],
      [[17], [16], 40, 'most rows'],
      [[4, 1, 1], [0, 7, 3], 8, 'one segment'],
      [[5, 70], [3, 61], 140, 'every third row'],
      [[2, 3], [1, 0], 5, 'no row'],
    ] as const
  ).map(([fresh, past, capacity, pick]): Case => {
    const [heads, kvHeads, dh] = [4, 2, 6];
    const n = fresh.reduce<number>((a, b) => a + b, 0);
    const make = inputs(n + capacity);
    const cache = make.f32(past.length, capacity, kvHeads * dh).data;
    const { z, threshold } = scored(fresh, picks[pick]);
    return {
      name: `${pick} of new ${fresh} after ${past} of ${capacity}`,
      inputs: {
        q: make.f32(['N', n], heads * dh),
        k: make.f32(['N', n], kvHeads * dh),
        v: make.f32(['N', n], kvHeads * dh),
        offsets: make.i32(offsetsOf(fresh), ['O', fresh.length + 1]),
        z: make.values(z, ['N', n], 1),
        threshold: make.values(threshold, ['S', fresh.length]),
        lengths: make.state('i32', past, past.length),
        cacheK: make.state('f32', cache, past.length, capacity, kvHeads * dh),
        cacheV: make.state('f32', [...cache].reverse(), past.length, capacity, kvHeads * dh),
      },
      build: ({ q, k, v, offsets, z, threshold, lengths, cacheK, cacheV }) => {
        const selected = routeThreshold(z, offsets, threshold);
        const queries = gatherRows(q, selected.rows);
        const options = { heads, kvHeads, scale: 0.4, selected };
        return { y: appended(queries, k, v, offsets, { lengths, k: cacheK, v: cacheV }, options) };
      },
    };
  }),
);

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
  const cache = { lengths: step.state(lengths), k: step.state(cacheK), v: step.state(cacheV) };
  step.output('y', appended(...feeds(step, 1), cache, options));
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

/** Attention of all rows and of some, with the gradients of both. */
function withSelection(
  name: string,
  lengths: readonly number[],
  heads: number,
  kvHeads: number,
  dh: number,
  causal: boolean,
  scale: number,
): Case {
  const n = lengths.reduce((a, b) => a + b, 0);
  const make = inputs(dh);
  const { z, threshold } = scored(lengths, picks['every third row']);
  return {
    name: `${name}${causal ? 'causal' : 'full'}`,
    inputs: {
      q: make.f32(['N', n], heads * dh),
      k: make.f32(['N', n], kvHeads * dh),
      v: make.f32(['N', n], kvHeads * dh),
      offsets: make.i32(offsetsOf(lengths), ['O', lengths.length + 1]),
      z: make.values(z, ['N', n], 1),
      threshold: make.values(threshold, ['S', lengths.length]),
    },
    build: ({ q, k, v, offsets, z, threshold }) => {
      const options = { heads, kvHeads, causal, scale };
      const selected = routeThreshold(z, offsets, threshold);
      const some = attention(gatherRows(q, selected.rows), k, v, offsets, { ...options, selected });
      const [y, dy] = [attention(q, k, v, offsets, options), stored(scatterAdd(stored(q), some, selected.rows))];
      const [dq, dk, dv] = gradients(y, [q, k, v], { seed: dy });
      const [dqSome, dkSome, dvSome] = gradients(some, [q, k, v], { seed: gatherRows(q, selected.rows) });
      return { y, some, dq, dk, dv, dqSome, dkSome, dvSome };
    },
    narrowTolerance: 0.008,
  };
}

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
        `segments ${lengths}, ${heads}/${kvHeads} heads of ${dh}, scale ${scale}, `,
        lengths,
        heads,
        kvHeads,
        dh,
        causal,
        scale,
      ),
    ),
  ),
);

describe.each([8, 33, 64, 100, 130])('heads of %i', (dh) => {
  // Tiles of keys and queries with and without tails, on every path a device may have for a width of heads.
  cases(
    'attention',
    [true, false].map((causal) => withSelection('', [37, 0, 66, 1], 4, 2, dh, causal, 1 / Math.sqrt(dh))),
  );

  // How many queries there are, and how many segments, may decide how a device goes about it.
  test.each([1, 9])('a query of %i caches gets the same bits whatever the other queries are', async (segments) => {
    const [heads, kvHeads, fresh, past, capacity] = [4, 2, 20, 430, 460];
    const make = inputs(segments);
    const rows = fresh * segments;
    const floats = (...shape: number[]) => Float32Array.from(make.f32(...shape).data);
    const [q, k, v] = [heads, kvHeads, kvHeads].map((h) => floats(rows, h * dh));
    const cache = [0, 1].map(() => floats(segments, capacity, kvHeads * dh));
    const row = (data: Float32Array, i: number) => data.subarray(i * heads * dh, (i + 1) * heads * dh);
    const run = async (queries: readonly number[]) => {
      const shape = [segments, capacity, kvHeads * dh];
      const state = [Tensor.alloc('i32', [segments]), Tensor.alloc('f32', shape), Tensor.alloc('f32', shape)] as const;
      state[0].write(new Int32Array(segments).fill(past));
      state[1].write(cache[0]);
      state[2].write(cache[1]);
      const g = new Graph();
      const [keys, values] = ['k', 'v'].map((name) => g.feed(name, 'f32', [rows, kvHeads * dh]));
      const selected = {
        rows: g.feed('rows', 'i32', [queries.length]),
        offsets: g.feed('starts', 'i32', [segments + 1]),
      };
      const [lengths, cacheK, cacheV] = state.map((tensor) => g.state(tensor));
      const query = g.feed('q', 'f32', [queries.length, heads * dh]);
      const offsets = g.feed('offsets', 'i32', [segments + 1]);
      const options = { heads, kvHeads, scale: 1, selected };
      g.output('y', appended(query, keys, values, offsets, { lengths, k: cacheK, v: cacheV }, options));
      using program = Program.compile(g, testEngine());
      const ends = Int32Array.from({ length: segments + 1 }, (_, s) => s * fresh);
      const { outputs } = await program.run({
        feeds: {
          q: Float32Array.from(queries.flatMap((i) => [...row(q, i)])),
          ...{ k, v, offsets: ends },
          rows: Int32Array.from(queries),
          starts: ends.map((end) => queries.filter((i) => i < end).length),
        },
      });
      expect([...state[0].read()]).toEqual(new Array(segments).fill(past + fresh));
      const held = state[1].read().subarray(past * kvHeads * dh, (past + fresh) * kvHeads * dh);
      expect(held).toEqual(k.subarray(0, fresh * kvHeads * dh));
      for (const tensor of state) tensor.dispose();
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
    const [lengths, cacheK, cacheV] = [
      Tensor.alloc('i32', [2]),
      Tensor.alloc('f32', [2, n, 2]),
      Tensor.alloc('f32', [2, n, 2]),
    ];
    lengths.write(Int32Array.of(n, n));
    const error = await failure(
      (g) => {
        const q = g.feed('q', 'f32', [rows.length, 2]);
        const [k, v] = ['k', 'v'].map((name) => g.feed(name, 'f32', [n, 2]));
        const selected = { rows: g.feed('rows', 'i32', [rows.length]), offsets: g.feed('starts', 'i32', [3]) };
        const segments = g.feed('offsets', 'i32', [3]);
        if (op === 'attention_cached') {
          const cache = { lengths: g.state(lengths), k: g.state(cacheK), v: g.state(cacheV) };
          g.output('y', attentionCached(q, segments, cache, { heads, kvHeads, scale, selected }));
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
        },
      },
    );
    for (const tensor of [lengths, cacheK, cacheV]) tensor.dispose();
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

describe.each([
  ['offsets', [1, 2, 4], [4, 4], 'attention_cached'],
  ['offsets', [0, 3, 2], [4, 4], 'attention_cached'],
  ['offsets', [0, -1, 4], [4, 4], 'attention_cached'],
  ['lengths', [0, 2, 4], [2, 1], 'attention_cached'],
  ['lengths', [0, 2, 4], [2, 7], 'attention_cached'],
  ['lengths', [0, 2, 4], [-1, 2], 'attention_cached'],
  ['offsets', [0, 3, 2], [0, 0], 'cache_append'],
  ['offsets', [0, 2, 3], [0, 0], 'cache_append'],
  ['lengths', [0, 2, 4], [0, 5], 'cache_append'],
  ['lengths', [0, 2, 4], [-1, 0], 'cache_append'],
])('bad %s %j with lengths %j: %s', (operand, ends, held, op) => {
  test.each(op === 'cache_append' ? [false] : [false, true])('is InvalidData, selected rows: %s', async (some) => {
    const [lengths, k, v] = [Tensor.alloc('i32', [2]), Tensor.alloc('f32', [2, 6, 2]), Tensor.alloc('f32', [2, 6, 2])];
    lengths.write(Int32Array.from(held));
    const error = await failure(
      (g) => {
        const offsets = g.feed('offsets', 'i32', [3]);
        const cache = { lengths: g.state(lengths), k: g.state(k), v: g.state(v) };
        const selected = some ? { rows: g.feed('rows', 'i32', [2]), offsets: g.feed('starts', 'i32', [3]) } : undefined;
        const x = g.feed('x', 'f32', [some ? 2 : 4, 2]);
        const options = { heads: 1, kvHeads: 1, scale: 1, ...(selected && { selected }) };
        if (op === 'cache_append') cacheAppend(x, x, offsets, cache);
        else g.output('y', attentionCached(x, offsets, cache, options));
      },
      {
        feeds: {
          x: new Float32Array(some ? 4 : 8).fill(1),
          offsets: Int32Array.from(ends),
          ...(some && { rows: Int32Array.of(0, 3), starts: Int32Array.of(0, 1, 2) }),
        },
      },
    );
    expect(error).toMatchObject({ code: 'InvalidData' });
    expect(error.message).toContain(`[${op}] ${operand}[`);
    expect([...lengths.read()]).toEqual(held);
    expect([...k.read(), ...v.read()].every((value) => value === 0)).toBe(true);
    for (const tensor of [lengths, k, v]) tensor.dispose();
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
