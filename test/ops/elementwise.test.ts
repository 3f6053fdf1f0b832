// zeros, add, scale, activation, gated_activation and the ops on rows.
import { expect, test } from 'vitest';
import {
  type Act,
  activation,
  activations,
  add,
  addRows,
  dot,
  gatedActivation,
  gatherIds,
  gatherRows,
  gradients,
  scale,
  scatterAdd,
  sumRows,
  zeros,
} from '../../lib/graph/index.js';
import { type Case, cases, failure, inputs } from './harness.js';

const sizes = [
  [1, 1],
  [3, 17],
  [17, 33],
  [33, 3],
] as const;

cases(
  'add',
  sizes.map(([m, n]): Case => {
    const make = inputs(m);
    return {
      name: `[${m},${n}]`,
      inputs: { a: make.f32(['M', m], n), b: make.f32(['M', m], n) },
      build: ({ a, b }) => ({ y: add(a, b) }),
      wrt: ['a', 'b'],
    };
  }),
);

cases('scale', [
  {
    name: 'by a factor',
    inputs: { x: inputs(1).f32(['M', 17], 33) },
    build: ({ x }) => ({ y: scale(x, -2.5) }),
    wrt: ['x'],
  },
  {
    name: 'by a factor and a scalar',
    inputs: { x: inputs(2).f32(['M', 37]), s: inputs(3).f32(1) },
    build: ({ x, s }) => ({ y: scale(x, 0.3, s) }),
    wrt: ['x', 's'],
  },
]);

cases('zeros', [
  {
    name: 'added to rows',
    inputs: { x: inputs(4).f32(['M', 5], 7) },
    build: ({ x }) => ({ y: add(x, zeros(x.graph, x.shape)), z: zeros(x.graph, [3, 2]) }),
  },
]);

// Tails included: large magnitudes must neither overflow nor become NaN.
const wide = (seed: number, count: number) => {
  const { next } = inputs(seed);
  return Array.from({ length: count }, (_, i) => (i < 8 ? [-100, -30, -9, -5, 5, 9, 30, 100][i] : next() * 8 - 4));
};

cases(
  'activation',
  activations.map(
    (act: Act): Case => ({
      name: act,
      inputs: { x: inputs(5).values(wide(5, 3 * 33), ['M', 3], 33) },
      build: ({ x }) => ({ y: activation(x, act) }),
      wrt: ['x'],
    }),
  ),
);

cases(
  'gated_activation',
  activations.map((act: Act): Case => {
    const make = inputs(6);
    return {
      name: act,
      inputs: { g: make.values(wide(6, 3 * 17), ['M', 3], 17), u: make.f32(['M', 3], 17) },
      build: ({ g, u }) => ({ y: gatedActivation(g, u, act) }),
      wrt: ['g', 'u'],
    };
  }),
);

cases(
  'gather_rows',
  (
    [
      [1, 1, 1],
      [17, 3, 5],
      [33, 17, 33],
      [33, 20, 17],
    ] as const
  ).map(([n, d, r]): Case => {
    const make = inputs(n);
    return {
      name: `${r} of ${n} rows of ${d}`,
      inputs: { x: make.f32(['N', n], d), rows: make.rows('R', r, n) },
      build: ({ x, rows }) => ({ y: gatherRows(x, rows) }),
      wrt: ['x'],
    };
  }),
);

cases(
  'add_rows',
  (
    [
      [1, 1, null],
      [17, 3, 5],
      [33, 17, 33],
      [9, 64, null],
    ] as const
  ).flatMap(([n, d, r]) =>
    [false, true].map((gated): Case => {
      const make = inputs(n);
      return {
        name: `${r ?? 'all'} of ${n} rows of ${d}${gated ? ', gated' : ''}`,
        inputs: {
          residual: make.f32(['N', n], d),
          x: make.f32(r === null ? ['N', n] : ['R', r], d),
          ...(r === null ? {} : { rows: make.rows('R', r, n) }),
          ...(gated ? { gate: make.f32(r === null ? ['N', n] : ['R', r]) } : {}),
        },
        build: ({ residual, x, rows, gate }) => ({ y: addRows(residual, x, { rows, gate }) }),
        wrt: gated ? ['residual', 'x', 'gate'] : ['residual', 'x'],
      };
    }),
  ),
);

cases('gather_ids', [
  {
    name: '5 of 17',
    inputs: { x: inputs(7).ids(1000, ['N', 17]), rows: inputs(8).rows('R', 5, 17) },
    build: ({ x, rows }) => ({ y: gatherIds(x, rows) }),
  },
]);

cases(
  'scatter_add',
  (
    [
      [1, 1, 1],
      [17, 3, 5],
      [33, 17, 33],
      [33, 20, 17],
    ] as const
  ).map(([n, d, r]): Case => {
    const make = inputs(n + 1);
    return {
      name: `${r} of ${n} rows of ${d}`,
      inputs: { acc: make.f32(['N', n], d), x: make.f32(['R', r], d), rows: make.rows('R', r, n) },
      build: ({ acc, x, rows }) => ({ y: scatterAdd(acc, x, rows) }),
      wrt: ['acc', 'x'],
    };
  }),
);

cases('sum_rows', [
  {
    name: 'all rows',
    inputs: { x: inputs(9).f32(['N', 33], 17) },
    build: ({ x }) => ({ y: sumRows(x) }),
  },
  {
    name: 'gated rows',
    inputs: { x: inputs(10).f32(['N', 33], 3), rows: inputs(11).rows('R', 17, 33), gate: inputs(12).f32(['R', 17]) },
    build: ({ x, rows, gate }) => ({ y: sumRows(x, rows, gate) }),
  },
  {
    name: 'gate of every row',
    inputs: { x: inputs(10).f32(['N', 300], 5), gate: inputs(12).f32(['N', 300]) },
    build: ({ x, gate }) => ({ y: sumRows(x, null, gate) }),
  },
  {
    name: 'more rows than a device sums at once',
    inputs: { x: inputs(10).f32(['N', 9000], 35), rows: inputs(11).rows('R', 8500, 9000) },
    build: ({ x, rows }) => ({ y: sumRows(x, rows) }),
  },
]);

cases(
  'dot',
  [1, 17, 1000, 200_000].map((n): Case => {
    const make = inputs(n);
    return {
      name: `${n}`,
      inputs: { a: make.f32(['N', n]), b: make.f32(['N', n]) },
      build: ({ a, b }) => ({ y: dot(a, b) }),
      wrt: n > 1000 ? undefined : ['a', 'b'],
    };
  }),
);

test('rows past the end, descending or twice are InvalidData', async () => {
  for (const rows of [
    [0, 5],
    [-1, 0],
    [2, 1],
    [1, 1],
  ]) {
    const feeds = { x: new Float32Array(10), rows: Int32Array.from(rows) };
    const error = await failure(
      (g) => g.output('y', gatherRows(g.feed('x', 'f32', [5, 2]), g.feed('rows', 'i32', [2]))),
      { feeds },
    );
    expect(error, `${rows}`).toMatchObject({ code: 'InvalidData' });
    expect(error.message).toContain('gather_rows');
  }
});

test('builders name the op and the shapes', () => {
  return expect(
    failure((g) => void add(g.feed('a', 'f32', [2, 3]), g.feed('b', 'f32', [3, 2]))),
  ).resolves.toMatchObject({
    code: 'InvalidArgument',
    message: '[add] operands must have one shape: [2,3] in a:f32[2,3], b:f32[3,2]',
  });
});

test('sum_rows has no gradient and says so', () => {
  return expect(
    failure((g) => {
      const x = g.feed('x', 'f32', [2, 3]);
      gradients(dot(sumRows(x), sumRows(x)), [x]);
    }),
  ).resolves.toMatchObject({ code: 'InvalidArgument', message: '[sum_rows] no gradient flows through its output y' });
});
