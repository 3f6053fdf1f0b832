// rms_norm and layer_norm, over all rows and over selected rows.
import { expect, test } from 'vitest';
import { layerNorm, rmsNorm } from '../../lib/graph/index.js';
import { type Case, cases, failure, inputs } from './harness.js';

const shapes = [
  [1, 1, null],
  [3, 17, null],
  [33, 3, null],
  [17, 33, 5],
  [9, 64, 9],
  // Rows wider than what one warp takes, of an odd width too; more rows than partial sums of the gradient.
  [9, 1100, 5],
  [2, 1027, null],
  // Wider than what the registers of a warp or a block hold of a row.
  [3, 601, null],
  [2, 900, null],
  [2, 2053, 1],
  [2, 8204, null],
  [4200, 4, null],
] as const;

cases('rms_norm', [
  ...shapes.map(([n, d, r]): Case => {
    const make = inputs(n);
    return {
      name: r === null ? `[${n},${d}]` : `${r} of [${n},${d}]`,
      inputs: {
        x: make.f32(['N', n], d),
        weight: make.param(d),
        ...(r === null ? {} : { rows: make.rows('R', r, n) }),
      },
      build: ({ x, weight, rows }) => ({ y: rmsNorm(x, weight, { eps: 1e-5, rows }) }),
      wrt: ['x', 'weight'],
    };
  }),
  {
    name: 'bf16 weight',
    inputs: { x: inputs(1).f32(['N', 3], 19), weight: inputs(2).weight('bf16', 19) },
    build: ({ x, weight }) => ({ y: rmsNorm(x, weight, { eps: 1e-6 }) }),
    wrt: ['x'],
  },
  // Parts of rows normalised by themselves, as heads are, with and without an offset of the weights.
  ...(
    [
      [5, 2, 3, null],
      [7, 4, 8, 4],
      [3, 6, 17, 2],
      [40, 3, 64, null],
      [2, 2, 1100, null],
    ] as const
  ).flatMap(([n, heads, dh, r]) =>
    [0, 1].map((offset): Case => {
      const make = inputs(n);
      return {
        name: `${r === null ? '' : `${r} of `}[${n}, ${heads} x ${dh}], offset ${offset}`,
        inputs: {
          x: make.f32(['N', n], heads * dh),
          weight: make.param(dh),
          ...(r === null ? {} : { rows: make.rows('R', r, n) }),
        },
        build: ({ x, weight, rows }) => ({ y: rmsNorm(x, weight, { eps: 1e-5, rows, offset }) }),
        wrt: ['x', 'weight'],
      };
    }),
  ),
  {
    name: 'a row of zeros',
    inputs: { x: inputs(1).values(Array(8).fill(0), ['N', 1], 8), weight: inputs(2).weight('f16', 8) },
    build: ({ x, weight }) => ({ y: rmsNorm(x, weight, { eps: 1e-5 }) }),
  },
]);

cases('layer_norm', [
  ...shapes
    // One feature has no variance: its gradient is 0 times a large factor.
    .filter(([, d]) => d > 1)
    .flatMap(([n, d, r]) =>
      [true, false].map((biased): Case => {
        const make = inputs(n + 1);
        return {
          name: `${r === null ? '' : `${r} of `}[${n},${d}]${biased ? ' with bias' : ''}`,
          inputs: {
            x: make.f32(['N', n], d),
            weight: make.param(d),
            ...(biased ? { bias: make.param(d) } : {}),
            ...(r === null ? {} : { rows: make.rows('R', r, n) }),
          },
          build: ({ x, weight, bias, rows }) => ({ y: layerNorm(x, weight, bias ?? null, { eps: 1e-5, rows }) }),
          wrt: biased ? ['x', 'weight', 'bias'] : ['x', 'weight'],
        };
      }),
    ),
  {
    name: 'a large mean',
    inputs: {
      x: inputs(3).values(
        inputs(3)
          .f32(2, 64)
          .data.map((v) => v + 1000),
        ['N', 2],
        64,
      ),
      weight: inputs(4).weight('f32', 64),
      bias: inputs(5).weight('bf16', 64),
    },
    build: ({ x, weight, bias }) => ({ y: layerNorm(x, weight, bias, { eps: 1e-5 }) }),
    tolerance: 2e-4,
  },
  {
    name: 'f16 weight and bias',
    inputs: { x: inputs(6).f32(['N', 5], 20), weight: inputs(7).weight('f16', 20), bias: inputs(8).weight('f16', 20) },
    build: ({ x, weight, bias }) => ({ y: layerNorm(x, weight, bias, { eps: 1e-5 }) }),
    wrt: ['x'],
  },
]);

test('a weight that is no part of the rows is named', async () => {
  const error = await failure((g) => {
    rmsNorm(g.feed('x', 'f32', [3, 8]), g.feed('w', 'f32', [3]), { eps: 1e-5 });
  });
  expect(error).toMatchObject({ code: 'InvalidArgument' });
  expect(error.message).toBe('[rms_norm] weight must be as wide as x or a part of it, got x:[3,8] weight:[3]');
});
