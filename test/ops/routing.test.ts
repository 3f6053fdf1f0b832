// route_topk, route_threshold, gate, topk_bce.
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { Graph } from '../../lib/graph/graph.js';
import { dot, gate, gatherRows, Program, routeThreshold, routeTopk, topkBce } from '../../lib/graph/index.js';
import { type Case, cases, checkNative, failure, inputs, offsetsOf, testEngine } from './harness.js';
import { f64 } from './reference.js';

function routed(op: typeof routeTopk, seed: number, lengths: readonly number[], perSegment: readonly number[]): Case {
  const make = inputs(seed);
  const n = lengths.reduce((a, b) => a + b, 0);
  return {
    name: `segments ${lengths}, ${perSegment}`,
    inputs: {
      // Few distinct scores: ties are common.
      z: make.values(
        Array.from({ length: n }, () => Math.round(make.next() * 8 - 4) / 4),
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

cases('route_topk', [
  routed(routeTopk, 1, [1], [1]),
  routed(routeTopk, 2, [17, 0, 33], [0.5, 0.5, 0.25]),
  routed(routeTopk, 3, [10, 10, 10], [0, 1, 0.3]),
  routed(routeTopk, 4, [100], [0.7]),
  routed(routeTopk, 5, [0, 1], [0.5, 0]),
  // 0.1 as f32 is a little more than a tenth: still 1 of 10 rows.
  routed(routeTopk, 6, [10, 30], [0.1, 0.1]),
]);

cases('route_threshold', [
  routed(routeThreshold, 7, [17, 0, 33], [0, 0, 0.5]),
  routed(routeThreshold, 8, [9, 9], [Number.NEGATIVE_INFINITY, Number.POSITIVE_INFINITY]),
  routed(routeThreshold, 9, [5], [100]),
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
