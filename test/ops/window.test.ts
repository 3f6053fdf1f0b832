// Attention with windows and with capped scores: over packed segments, over caches, of all rows and of selected ones.
import { describe, expect, test } from 'vitest';
import {
  attention,
  attentionCached,
  Graph,
  gatherRows,
  gradients,
  Program,
  routeThreshold,
} from '../../lib/graph/index.js';
import { appended, cacheInputs, cacheOf, TestCache } from './caches.js';
import { type Case, cases, failure, inputs, narrowEngine, offsetsOf, testEngine } from './harness.js';
import { picks, scored, stored, withSelection } from './selection.js';

const engines = [testEngine(), narrowEngine()].filter((engine) => engine !== null);

// [lengths, heads, heads of keys, their dim, window, softcap]: windows shorter than a tile, across tiles, and longer than all.
const layouts = [
  [[9, 1, 17], 2, 1, 4, 1, 0],
  [[9, 0, 17], 4, 2, 8, 5, 0.6],
  [[40], 1, 1, 3, 0, 0.4],
  [[33, 5], 3, 1, 17, 1000, 2],
] as const;
// The same on several tiles of rows and keys.
const large = [
  [[300, 9, 70], 1, 1, 64, 130, 0],
  [[200, 41], 8, 2, 128, 33, 0.8],
  [[150], 7, 1, 40, 64, 0.5],
  [[140, 30], 2, 1, 256, 50, 1.5],
  [[90, 41], 3, 1, 32, 7, 0],
] as const;

cases(
  'attention',
  layouts.map(([lengths, heads, kvHeads, dh, window, softcap]): Case => {
    const n = lengths.reduce<number>((a, b) => a + b, 0);
    const make = inputs(n);
    return {
      name: `segments ${lengths}, ${heads}/${kvHeads} heads of ${dh}, window ${window}, softcap ${softcap}`,
      inputs: {
        q: make.f32(['R', n], heads * dh),
        k: make.f32(['R', n], kvHeads * dh),
        v: make.f32(['R', n], kvHeads * dh),
        offsets: make.i32(offsetsOf(lengths), ['O', lengths.length + 1]),
      },
      build: ({ q, k, v, offsets }) => ({
        y: attention(q, k, v, offsets, { heads, kvHeads, causal: true, scale: 0.9, window, softcap }),
      }),
      wrt: ['q', 'k', 'v'],
    };
  }),
);

cases(
  'attention of all rows and of some, with gradients',
  large.map(([lengths, heads, kvHeads, dh, window, softcap]) =>
    withSelection(
      `segments ${lengths}, ${heads}/${kvHeads} heads of ${dh}, window ${window}, softcap ${softcap}`,
      lengths,
      dh,
      { heads, kvHeads, causal: true, scale: dh === 40 ? -0.5 : 0.5, window, softcap },
    ),
  ),
);

cases(
  'attention_cached',
  layouts.flatMap(([lengths, heads, kvHeads, dh, window, softcap]) =>
    [0, 300].map((past): Case => {
      const n = lengths.reduce<number>((a, b) => a + b, 0);
      const segments = lengths.length;
      const make = inputs(n);
      return {
        name: `segments ${lengths} after ${past}, ${heads}/${kvHeads} heads of ${dh}, window ${window}, softcap ${softcap}`,
        inputs: {
          q: make.f32(['N', n], heads * dh),
          k: make.f32(['N', n], kvHeads * dh),
          v: make.f32(['N', n], kvHeads * dh),
          offsets: make.i32(offsetsOf(lengths), ['O', segments + 1]),
          ...cacheInputs(make, {
            past: new Array(segments).fill(past),
            ...{ capacity: past + 64, width: kvHeads * dh, pageRows: 16 },
          }),
        },
        build: ({ q, k, v, offsets, ...cache }) => ({
          y: appended(q, k, v, offsets, cacheOf(cache), { heads, kvHeads, scale: 0.9, window, softcap }),
        }),
      };
    }),
  ),
);

test.each(engines)(
  'a query gets its bits and counts its pairs whatever others there are: $activations',
  async (engine) => {
    for (const [lengths, heads, kvHeads, dh, window, softcap] of large) {
      const n = lengths.reduce<number>((a, b) => a + b, 0);
      const make = inputs(11);
      const [q, k, v] = [heads, kvHeads, kvHeads].map((h) => Float32Array.from(make.f32(n, h * dh).data));
      const g = new Graph();
      const [all, keys, values] = [
        stored(g.feed('q', 'f32', [n, heads * dh])),
        stored(g.feed('k', 'f32', [n, kvHeads * dh])),
        stored(g.feed('v', 'f32', [n, kvHeads * dh])),
      ];
      const segments = g.feed('offsets', 'i32', [lengths.length + 1]);
      const threshold = g.feed('threshold', 'f32', [lengths.length]);
      const { z, threshold: passed } = scored(lengths, picks['every third row']);
      const selected = routeThreshold(g.feed('z', 'f32', [n, 1]), segments, threshold);
      const options = { heads, kvHeads, causal: true, scale: 0.7, window, softcap };
      const some = g.tag('some', () =>
        attention(gatherRows(all, selected.rows), keys, values, segments, { ...options, selected }),
      );
      const every = g.tag('every', () => attention(all, keys, values, segments, options));
      g.output('some', stored(some));
      g.output('expected', stored(gatherRows(every, selected.rows)));
      using program = Program.compile(g, engine);
      const { outputs, counters } = await program.run({
        feeds: {
          ...{ q, k, v },
          offsets: Int32Array.from(offsetsOf(lengths)),
          z: Float32Array.from(z),
          threshold: Float32Array.from(passed),
        },
      });
      expect(outputs.some, `${lengths}`).toEqual(outputs.expected);
      const pairs = (pick: (i: number) => boolean) =>
        lengths.reduce<number>((sum, length) => {
          for (let i = 0; i < length; i++) if (pick(i)) sum += Math.min(i + 1, window);
          return sum;
        }, 0);
      expect(counters.some.flops).toBe(4 * dh * heads * pairs((i) => picks['every third row'](i, 0)));
      expect(counters.every.flops).toBe(4 * dh * heads * pairs(() => true));
    }
  },
);

describe.each([8, 100, 200])('heads of %i', (dh) => {
  // Few and many queries, with and without splits of the keys, are different kernels on a device.
  test.each([1, 9])('a query of %i caches gets the same bits whatever the other queries are', async (segments) => {
    const [heads, kvHeads, fresh, past, capacity] = [4, 2, 20, 430, 460];
    const make = inputs(segments);
    const rows = fresh * segments;
    const floats = (...shape: number[]) => Float32Array.from(make.f32(...shape).data);
    const q = floats(rows, heads * dh);
    const held = Array.from({ length: segments }, () => [0, 1].map(() => floats(past + fresh, kvHeads * dh)));
    const row = (data: Float32Array, i: number) => data.subarray(i * heads * dh, (i + 1) * heads * dh);
    const run = async (queries: readonly number[], window: number) => {
      using caches = new TestCache({
        past: new Array(segments).fill(past + fresh),
        ...{ capacity, width: kvHeads * dh, pageRows: 32 },
      });
      held.forEach(([keys, values], s) => {
        caches.fill(s, keys, values);
      });
      const g = new Graph();
      const starts = g.feed('starts', 'i32', [segments + 1]);
      const selected = { rows: g.feed('rows', 'i32', [queries.length]), offsets: starts };
      const query = g.feed('q', 'f32', [queries.length, heads * dh]);
      const options = { heads, kvHeads, scale: 1, selected, window, softcap: 3 };
      g.output(
        'y',
        attentionCached(query, g.feed('offsets', 'i32', [segments + 1]), caches.bind(g, segments), options),
      );
      using program = Program.compile(g, testEngine());
      const ends = Int32Array.from({ length: segments + 1 }, (_, s) => s * fresh);
      const { outputs } = await program.run({
        feeds: {
          q: Float32Array.from(queries.flatMap((i) => [...row(q, i)])),
          offsets: ends,
          rows: Int32Array.from(queries),
          slots: Int32Array.from(caches.layout.slots),
          starts: ends.map((end) => queries.filter((i) => i < end).length),
        },
      });
      return outputs.y as Float32Array;
    };
    const some = Array.from({ length: segments }, (_, s) => [0, 3 + s, fresh - 1].map((i) => s * fresh + i)).flat();
    for (const window of [20, 150]) {
      const every = await run(
        Array.from({ length: rows }, (_, i) => i),
        window,
      );
      const alone = await run(some, window);
      some.forEach((i, at) => {
        expect(row(alone, at), `row ${i}, window ${window}`).toEqual(row(every, i));
      });
    }
  });
});

test.each(engines)('a window as long as the segment has the bits of no window: $activations', async (engine) => {
  const [n, heads, dh] = [150, 2, 40];
  const make = inputs(5);
  const data = ['q', 'k', 'v'].map((name) => [name, Float32Array.from(make.f32(n, heads * dh).data)] as const);
  const g = new Graph();
  const [q, k, v] = data.map(([name]) => stored(g.feed(name, 'f32', [n, heads * dh])));
  const offsets = g.feed('offsets', 'i32', [2]);
  for (const window of [0, n]) {
    const y = attention(q, k, v, offsets, { heads, kvHeads: heads, causal: true, scale: 1, window });
    g.output(`y${window}`, stored(y));
    gradients(y, [q, k, v], { seed: stored(q) }).forEach((node, i) => {
      g.output(`d${i} ${window}`, stored(node));
    });
  }
  using program = Program.compile(g, engine);
  const { outputs } = await program.run({ feeds: { ...Object.fromEntries(data), offsets: Int32Array.of(0, n) } });
  for (const name of ['y', 'd0 ', 'd1 ', 'd2 ']) expect(outputs[`${name}${n}`], name).toEqual(outputs[`${name}0`]);
});

test.each([
  [{ window: -1 }, true, 'window must be an integer in [0, 2147483647], got -1'],
  [{ window: 1.5 }, true, 'window must be an integer in [0, 2147483647], got 1.5'],
  [{ window: 4 }, false, 'a window needs causal attention'],
  [{ softcap: -1 }, true, 'softcap must be a positive number, got -1'],
  [{ softcap: 1e-50 }, true, 'softcap must be a positive number, got 1e-50'],
  [{ softcap: Number.NaN }, true, 'softcap must be a finite number, got NaN'],
])('%j is refused (causal: %s)', async (options, causal, message) => {
  const feeds = { x: new Float32Array(8), offsets: Int32Array.of(0, 4) };
  const error = await failure(
    (g) => {
      const x = g.feed('x', 'f32', [4, 2]);
      const y = attention(x, x, x, g.feed('offsets', 'i32', [2]), {
        heads: 1,
        kvHeads: 1,
        causal,
        scale: 1,
        ...options,
      });
      g.output('y', y);
    },
    { feeds },
  );
  expect(error.message).toContain(`[attention] `);
  expect(error.message).toContain(message);
});
