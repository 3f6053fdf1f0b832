// route_topk, route_threshold, gate, topk_bce.
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { Graph } from '../../lib/graph/graph.js';
import {
  dot,
  gate,
  gatherRows,
  Program,
  routeThreshold,
  routeTopk,
  topkBce,
  topkCredit,
} from '../../lib/graph/index.js';
import { type Case, cases, checkNative, compare, failure, inputs, offsetsOf, testEngine } from './harness.js';
import { f64 } from './reference.js';

function routed(
  op: typeof routeTopk,
  seed: number,
  lengths: readonly number[],
  perSegment: readonly number[],
  // Few distinct scores: ties are common.
  score = (next: () => number) => Math.round(next() * 8 - 4) / 4,
): Case {
  const make = inputs(seed);
  const n = lengths.reduce((a, b) => a + b, 0);
  return {
    name: lengths.length > 20 ? `${lengths.length} segments` : `segments ${lengths}, ${perSegment}`,
    inputs: {
      z: make.values(
        Array.from({ length: n }, () => score(make.next)),
        ['N', n],
        1,
      ),
      offsets: make.i32(offsetsOf(lengths), ['O', lengths.length + 1]),
      perSegment: make.values(perSegment, ['S', lengths.length]),
      x: make.f32(['N', n], 3),
    },
    // A consumer of the produced rows, sized by what was produced.
    build: ({ z, offsets, perSegment: p, x }) => {
      const route = op(z, offsets, p);
      return { rows: route.rows, offsets: route.offsets, y: gatherRows(x, route.rows) };
    },
  };
}

/** Scores of every size and sign, both zeros, and infinities. */
const anyScore = (next: () => number): number => {
  const kind = next();
  if (kind < 0.1) return kind < 0.05 ? 0 : -0;
  if (kind < 0.14) return kind < 0.12 ? 2e38 * 2 : -2e38 * 2;
  return (next() - 0.5) * 10 ** (80 * next() - 42);
};
const many = Array.from({ length: 100 }, (_, i) => (i * 7) % 11);

cases('route_topk', [
  routed(routeTopk, 1, [1], [1]),
  routed(routeTopk, 2, [17, 0, 33], [0.5, 0.5, 0.25]),
  routed(routeTopk, 3, [10, 10, 10], [0, 1, 0.3]),
  routed(routeTopk, 4, [100], [0.7]),
  routed(routeTopk, 5, [0, 1], [0.5, 0]),
  // 0.1 as f32 is a little more than a tenth: still 1 of 10 rows.
  routed(routeTopk, 6, [10, 30], [0.1, 0.1]),
  // As many rows as a device holds in registers, and more: ties are told apart from one part to the next.
  routed(routeTopk, 10, [8192, 8193, 20_000], [0.5, 0.25, 0.9]),
  routed(routeTopk, 11, [9000, 8000], [0.3, 0.6], anyScore),
  // Segments that share a block, some whole.
  routed(routeTopk, 16, Array(12).fill(700), [0.5, 0.4, 0.3, 0.2, 1, 1, 1, 1, 0.1, 1, 0, 0.9]),
  // Both zeros are equal.
  routed(routeTopk, 18, [50], [0.5], (next) => (next() < 0.5 ? 0 : -0)),
  routed(
    routeTopk,
    12,
    many,
    many.map((length) => length / 10),
  ),
]);

cases('route_threshold', [
  routed(routeThreshold, 7, [17, 0, 33], [0, 0, 0.5]),
  routed(routeThreshold, 8, [9, 9], [Number.NEGATIVE_INFINITY, Number.POSITIVE_INFINITY]),
  routed(routeThreshold, 9, [5], [100]),
  // More rows than are placed at once, segments that end with a part of them, and empty ones.
  routed(routeThreshold, 13, [8192, 0, 3000, 1, 5191, 0], [0, 0, 0.5, -0.5, 0.25, 0]),
  routed(routeThreshold, 14, [5000, 700], [0, 1e-3], anyScore),
  routed(routeThreshold, 17, [60_000, 80_000], [0.5, 0]),
  routed(
    routeThreshold,
    15,
    many,
    many.map((length) => length / 10 - 0.5),
  ),
]);

test('route_topk, any segments', async () => {
  const segment = fc.record({ length: fc.integer({ min: 0, max: 60 }), capacity: fc.integer({ min: 0, max: 20 }) });
  await fc.assert(
    fc.asyncProperty(
      fc.array(segment, { minLength: 1, maxLength: 6 }).filter((all) => all.some(({ length }) => length > 0)),
      fc.nat(),
      (segments, seed) =>
        checkNative(
          routed(
            routeTopk,
            seed,
            segments.map(({ length }) => length),
            segments.map(({ capacity }) => capacity / 20),
          ),
        ),
    ),
    { numRuns: 30, seed: 3 },
  );
});

for (const mode of [0, 1, 2] as const) {
  cases(`gate mode ${mode}`, [
    {
      name: '7 of 17',
      inputs: { z: inputs(mode).f32(['N', 17], 1), rows: inputs(5).rows('R', 7, 17), c: inputs(6).f32(['R', 7]) },
      build: ({ z, rows, c }) => ({ loss: dot(gate(z, rows, mode), c) }),
      // Straight-through: the value is 1, the gradient that of log sigmoid.
      wrt: mode === 0 ? ['z'] : ['z', 'c'],
      surrogate:
        mode === 0
          ? {
              gate: ([z, rows]) => [
                f64(
                  rows!.shape,
                  Array.from(rows!.data, (n) => -Math.log1p(Math.exp(-z!.data[n]))),
                ),
              ],
            }
          : undefined,
    },
  ]);
}

cases(
  'topk_bce',
  (
    [
      [1, 1],
      [17, 5],
      [4, 4],
      [40_000, 7000],
    ] as const
  ).map(([n, r]): Case => {
    const make = inputs(n);
    return {
      name: `${r} of ${n}`,
      inputs: {
        z: make.values(
          make.f32(n, 1).data.map((v, i) => (i === 0 ? 60 : 6 * v)),
          ['N', n],
          1,
        ),
        rows: make.rows('R', r, n),
      },
      build: ({ z, rows }) => ({ loss: topkBce(z, rows) }),
      wrt: ['z'],
    };
  }),
);

/** `counts[s]` rows of segment s were selected. */
function credit(seed: number, d: number, lengths: readonly number[], counts: readonly number[], spread = 3): Case {
  const make = inputs(seed);
  const n = lengths.reduce((a, b) => a + b, 0);
  return {
    name: `${counts} of segments ${lengths}, ${d} features, scores to ${spread}`,
    inputs: {
      dy: make.f32(['N', n], d),
      before: make.f32(['N', n], d),
      after: make.f32(['N', n], d),
      z: make.values(
        make.f32(n, 1).data.map((v) => v * spread),
        ['N', n],
        1,
      ),
      offsets: make.i32(offsetsOf(lengths), ['O', lengths.length + 1]),
      rowOffsets: make.i32(offsetsOf(counts), ['O', lengths.length + 1]),
      weight: make.f32(['N', n]),
    },
    build: ({ dy, before, after, z, offsets, rowOffsets, weight }) => ({
      dz: topkCredit(dy, before, after, z, offsets, rowOffsets, weight),
    }),
  };
}

cases('topk_credit', [
  credit(1, 1, [1], [1]),
  credit(2, 1, [2], [1]),
  credit(3, 3, [17, 0, 33], [4, 0, 32]),
  credit(4, 17, [9, 10, 11], [0, 10, 1]),
  credit(5, 33, [64, 1, 5], [32, 0, 4], 40),
  // Enough rows for several threads.
  credit(6, 600, [150, 67], [75, 20], 8),
  // More rows than a device holds in registers.
  credit(8, 2, [10_000, 30], [4000, 20]),
  {
    name: 'ties at the threshold',
    inputs: {
      ...credit(7, 4, [6], [3]).inputs,
      z: inputs(0).values([1, 2, 1, 1, 0, 1], ['N', 6], 1),
    },
    build: credit(7, 4, [6], [3]).build,
  },
]);

interface CreditData {
  z: readonly number[];
  /** What every row changes in the loss: dy is 1 and before 0. */
  change: readonly number[];
  offsets?: readonly number[];
  starts: readonly number[];
}

async function runCredit({ z, change, offsets = [0, z.length], starts }: CreditData): Promise<number[]> {
  const n = z.length;
  const g = new Graph();
  const rows = (name: string) => g.feed(name, 'f32', [n, 1]);
  const [segments, rowOffsets] = ['offsets', 'starts'].map((name) => g.feed(name, 'i32', [offsets.length]));
  const weight = g.feed('weight', 'f32', [n]);
  g.output('dz', topkCredit(rows('dy'), rows('before'), rows('after'), rows('z'), segments, rowOffsets, weight));
  using program = Program.compile(g, testEngine());
  const ones = new Float32Array(n).fill(1);
  const { outputs } = await program.run({
    feeds: {
      dy: ones,
      before: new Float32Array(n),
      after: Float32Array.from(change),
      z: Float32Array.from(z),
      offsets: Int32Array.from(offsets),
      starts: Int32Array.from(starts),
      weight: ones,
    },
  });
  return [...outputs.dz];
}

test('topk_credit is the gradient of a soft top-k that keeps its number of rows', async () => {
  const make = inputs(21);
  const [n, k] = [23, 7];
  const z = Array.from({ length: n }, () => Math.fround(6 * make.next() - 3));
  const change = Array.from({ length: n }, () => Math.fround(2 * make.next() - 1));
  const size = change.reduce((sum, value) => sum + Math.abs(value), 0) / n;
  const sigmoid = (x: number) => 1 / (1 + Math.exp(-x));
  const kept = (scores: readonly number[], tau: number) => scores.reduce((sum, v) => sum + sigmoid(v - tau), 0);
  const order = [...z].sort((a, b) => b - a);
  const count = kept(z, (order[k - 1] + order[k]) / 2);
  const value = (scores: readonly number[]) => {
    let [low, high] = [-20, 20];
    for (let i = 0; i < 100; ++i) {
      const middle = (low + high) / 2;
      if (kept(scores, middle) > count) low = middle;
      else high = middle;
    }
    return scores.reduce((sum, v, i) => sum + (change[i] / size) * sigmoid(v - low), 0);
  };
  const dz = await runCredit({ z, change, starts: [0, k] });
  const h = 1e-4;
  const slopes = z.map((v, i) => (value(z.with(i, v + h)) - value(z.with(i, v - h))) / (2 * h));
  compare(dz, slopes, 1e-6, 'dz');
});

test('topk_credit is zero where there is nothing to learn', async () => {
  const change = [1, -1, 2, 3];
  const none = [0, 0, 0, 0];
  expect(await runCredit({ z: [1, 2, 3, 4], change: none, starts: [0, 2] })).toEqual(none);
  // Every slope underflows, or the threshold is infinite.
  expect(await runCredit({ z: [2000, -2000, 2000, -2000], change, starts: [0, 2] })).toEqual(none);
  for (const z of [
    [Number.POSITIVE_INFINITY, 0, 1, 2],
    [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY],
  ]) {
    expect(await runCredit({ z, change, starts: [0, 1] })).toEqual(none);
  }
  // An infinite score away from the threshold is out of its reach.
  const dz = await runCredit({ z: [Number.POSITIVE_INFINITY, 0, 1, 2], change, starts: [0, 2] });
  expect(Math.abs(dz[0])).toBe(0);
  expect(dz.slice(1).every((v) => Number.isFinite(v) && v !== 0)).toBe(true);
});

test('topk_credit: NaN scores and row counts that do not fit are InvalidData', async () => {
  const good: CreditData = { z: [1, 2, 3, 4], change: [1, 2, 3, 4], offsets: [0, 2, 4], starts: [0, 1, 2] };
  await expect(runCredit(good)).resolves.toHaveLength(4);
  for (const bad of [
    { z: [1, Number.NaN, 3, 4] },
    { starts: [1, 1, 2] },
    { starts: [0, 3, 4] },
    { starts: [0, 2, 1] },
    { starts: [0, 1, 4] },
    { starts: [0, -1, 0] },
    { starts: [0, 0, 0x7fffffff] },
    { offsets: [0, 3, 2] },
    { offsets: [0, 2, 5] },
  ]) {
    const run = runCredit({ ...good, ...bad });
    await expect(run, JSON.stringify(bad)).rejects.toMatchObject({ code: 'InvalidData' });
    await expect(run).rejects.toThrow('[topk_credit]');
  }
});

const route = (z: readonly number[], perSegment: number, op = routeTopk) =>
  failure(
    (g) => {
      const n = z.length;
      const p = g.feed('p', 'f32', [1]);
      g.output('rows', op(g.feed('z', 'f32', [n, 1]), g.feed('offsets', 'i32', [2]), p).rows);
    },
    {
      feeds: {
        z: Float32Array.from(z),
        offsets: Int32Array.of(0, z.length),
        p: Float32Array.of(perSegment),
      },
    },
  );

test('NaN scores and capacities outside 0 to 1 are InvalidData', async () => {
  expect(await route([1, Number.NaN, 2], 0.5)).toMatchObject({ code: 'InvalidData' });
  expect(await route([1, Number.NaN, 2], 0.5, routeThreshold)).toMatchObject({ code: 'InvalidData' });
  expect(await route([1, 2], Number.NaN, routeThreshold)).toMatchObject({ code: 'InvalidData' });
  for (const capacity of [2, -0.5, Number.NaN, Number.POSITIVE_INFINITY]) {
    const error = await route([1, 2], capacity);
    expect(error, `${capacity}`).toMatchObject({ code: 'InvalidData' });
    expect(error.message).toContain('route_topk');
  }
});

test('the number of produced rows is reported, and sizes what follows', async () => {
  const g = new Graph();
  const n = g.dim('N', 100);
  const z = g.feed('z', 'f32', [n, 1]);
  const { rows } = g.tag('L0.attn', () => routeTopk(z, g.feed('offsets', 'i32', [3]), g.feed('c', 'f32', [2])));
  g.output('rows', rows);
  using program = Program.compile(g, testEngine());
  const { outputs, dims } = await program.run({
    dims: { N: 6 },
    feeds: {
      z: Float32Array.of(1, 3, 2, 5, 5, 5),
      offsets: Int32Array.of(0, 3, 6),
      c: Float32Array.of(0.5, 0.4),
    },
  });
  expect([...outputs.rows]).toEqual([1, 2, 3, 4]);
  expect(dims).toEqual({ N: 6, 'L0.attn.rows': 4 });
});
