// Ops of residual streams and of sparse gates: scale_columns, add_scaled, rescale_rows, gaussian_topk.
import { expect, test } from 'vitest';
import { addScaled, gaussianTopk, rescaleRows, scaleColumns } from '../../lib/graph/index.js';
import { type Case, cases, failure, inputs } from './harness.js';

const sizes = [
  [1, 1],
  [3, 17],
  [9, 64],
  [2, 1030],
] as const;

cases(
  'scale_columns',
  sizes.flatMap(([n, d]) =>
    [false, true].map((stored): Case => {
      const make = inputs(n);
      return {
        name: `[${n},${d}]${stored ? ', bf16' : ''}`,
        inputs: { x: make.f32(['N', n], d), w: stored ? make.weight('bf16', d) : make.param(d) },
        build: ({ x, w }) => ({ y: scaleColumns(x, w) }),
        wrt: stored ? ['x'] : ['x', 'w'],
      };
    }),
  ),
);

cases(
  'add_scaled',
  sizes.map(([n, d], i): Case => {
    const make = inputs(n);
    return {
      name: `[${n},${d}], column ${i}, offset ${i % 2}`,
      inputs: { acc: make.f32(['N', n], d), x: make.f32(['N', n], d), c: make.f32(['N', n], 4) },
      build: ({ acc, x, c }) => ({ y: addScaled(acc, x, c, i, i % 2) }),
      wrt: ['acc', 'x', 'c'],
    };
  }),
);

cases('rescale_rows', [
  ...sizes.map(([n, d]): Case => {
    const make = inputs(n);
    return {
      name: `[${n},${d}]`,
      inputs: { x: make.f32(['N', n], d), like: make.f32(['N', n], d) },
      build: ({ x, like }) => ({ y: rescaleRows(x, like, 1e-5) }),
      wrt: ['x', 'like'],
    };
  }),
  {
    name: 'rows below the floor, and rows of zeros',
    inputs: {
      x: inputs(1).values([1, 2, 3, 1e-3, 2e-3, -1e-3, 0, 0, 0], ['N', 3], 3),
      like: inputs(2).f32(['N', 3], 3),
    },
    build: ({ x, like }) => ({ y: rescaleRows(x, like, 1e-2) }),
    wrt: ['x', 'like'],
  },
]);

cases('gaussian_topk', [
  ...sizes
    // One feature has no deviation.
    .filter(([, d]) => d > 1)
    .flatMap(([n, d]) =>
      [1.2, -0.3].map((factor): Case => {
        const make = inputs(n + d);
        return {
          name: `[${n},${d}], factor ${factor}`,
          inputs: { x: make.f32(['N', n], d) },
          build: ({ x }) => ({ y: gaussianTopk(x, factor) }),
          wrt: ['x'],
        };
      }),
    ),
  {
    name: 'rows of one value',
    inputs: { x: inputs(1).values([2, 2, 2, 2, 0, 0, 0, 0], ['N', 2], 4) },
    build: ({ x }) => ({ y: gaussianTopk(x, 1) }),
  },
]);

test('columns that c does not have, and floors that are none', async () => {
  const x = new Float32Array(4);
  const error = await failure((g) => {
    const node = g.feed('x', 'f32', [2, 2]);
    addScaled(node, node, node, 2);
  });
  expect(error.message).toBe('[add_scaled] column must be one of the 2 of c, got 2');
  const none = await failure(
    (g) => {
      const node = g.feed('x', 'f32', [2, 2]);
      g.output('y', rescaleRows(node, node, 0));
    },
    { feeds: { x } },
  );
  expect(none).toMatchObject({ code: 'InvalidProgram' });
  expect(none.message).toContain('[rescale_rows] attribute floor must be a positive number, got 0');
});
