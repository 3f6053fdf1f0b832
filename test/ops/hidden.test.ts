// hidden_distance.
import { test } from 'vitest';
import { hiddenDistance } from '../../lib/graph/index.js';
import { hiddenDistances } from '../../lib/graph/ops/loss.js';
import { type Case, cases, checkNative, inputs } from './harness.js';

cases(
  'hidden_distance',
  hiddenDistances.flatMap((kind) =>
    [
      [1, 1],
      [3, 17],
      [70, 33],
      [2, 1025],
    ].map(([r, d]): Case => {
      const make = inputs(r + d);
      return {
        name: `${kind}: ${r} rows, width ${d}`,
        inputs: { x: make.f32(['R', r], d), y: make.f32(['R', r], d), weight: make.f32(['R', r]) },
        build: ({ x, y, weight }) => ({ ...hiddenDistance(x, y, weight, kind) }),
        wrt: ['x', 'weight'],
      };
    }),
  ),
);

test('a row of zeros is as far as can be by cosine, and has no gradient', () =>
  checkNative({
    name: 'zeros',
    inputs: {
      x: inputs(1).values([0, 0, 3, 4, 0, 0], 3, 2),
      y: inputs(1).values([1, 2, 0, 0, 0, 0], 3, 2),
      weight: inputs(1).values([1, 1, 1], 3),
    },
    build: ({ x, y, weight }) => ({ ...hiddenDistance(x, y, weight, 'cosine') }),
    wrt: ['x'],
  }));
