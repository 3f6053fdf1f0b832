// accumulate and adamw.
import { expect, test } from 'vitest';
import { accumulate, adamw, gatherRows, type Node, scale } from '../../lib/graph/index.js';
import { Tensor } from '../../lib/native/index.js';
import { type Case, cases, checkNative, failure, inputs } from './harness.js';

cases('accumulate', [
  {
    name: 'at an offset, twice',
    inputs: { state: inputs(1).param(40), x: inputs(2).f32(3, 5), y: inputs(3).f32(7) },
    build: ({ state, x, y }) => {
      accumulate(state, x, 4);
      accumulate(state, x, 4);
      accumulate(state, y, 33);
      return { z: scale(y, 2) };
    },
  },
  {
    name: 'vectors, at an offset of a whole number of them and at another',
    inputs: { state: inputs(1).param(3000), x: inputs(2).f32(['N', 2001]) },
    build: ({ state, x }) => {
      accumulate(state, x, 8);
      accumulate(state, x, 9);
      return { z: scale(x, 2) };
    },
  },
  ...[
    [7, 3, 10],
    [64, 8, 20],
    [40, 40, 40],
  ].map(([rows, width, stride]) => ({
    name: `${rows} rows of ${width}, fewer of one less, ${stride} apart`,
    inputs: {
      state: inputs(1).param(rows * stride + 4),
      x: inputs(2).f32(rows, width),
      y: inputs(3).f32(['N', rows - 3], width - 1),
    },
    build: ({ state, x, y }: Record<string, Node>) => {
      accumulate(state, x, 4, stride);
      accumulate(state, y, 0, stride);
      return { z: scale(x, 2) };
    },
  })),
]);

const hyper = (clip: number, step: number) => [0.01, 0.9, 0.95, 1e-8, 0.1, clip, 1 - 0.9 ** step, 1 - 0.95 ** step];

function optimizer(name: string, count: number, clip: number, decayCount: number, spoil?: number): Case {
  const make = inputs(count);
  const gradient = make.param(count);
  return {
    name,
    inputs: {
      p: make.param(count),
      g: spoil === undefined ? gradient : { ...gradient, data: gradient.data.with(count >> 1, spoil) },
      m: make.param(count),
      v: make.state(
        'f32',
        make.f32(count).data.map((x) => Math.fround(x * x + 0.01)),
        count,
      ),
      hyper: make.values(hyper(clip, 3), 8),
    },
    build: ({ p, g, m, v, hyper: h }) => ({ norm: adamw(p, g, m, v, h, decayCount) }),
  };
}

cases('adamw', [
  optimizer('one parameter', 1, 0, 1),
  optimizer('decay of a part, no clipping', 1000, 0, 333),
  optimizer('clipped', 5000, 1, 5000),
  optimizer('norm below the clip', 33, 1000, 0),
  optimizer('several sums of squares', 100_001, 2, 10_002),
]);

for (const bad of [Number.NaN, Number.POSITIVE_INFINITY]) {
  test(`a gradient of ${bad} changes nothing but itself`, async () => {
    const c = optimizer('bad', 100, 1, 100, bad);
    await checkNative({
      ...c,
      // The norm itself is not a number to compare: it is not an output here.
      build: (nodes, dims) => {
        c.build(nodes, dims);
        return { z: scale(nodes.hyper, 2) };
      },
    });
  });
}

test('a step that fails leaves states to the steps before it', async () => {
  const state = Tensor.alloc('f32', [4]);
  state.write(Float32Array.of(1, 2, 3, 4));
  const error = await failure(
    (g) => accumulate(g.state(state), gatherRows(g.feed('x', 'f32', [3, 2]), g.feed('rows', 'i32', [2])), 0),
    { feeds: { x: new Float32Array(6).fill(1), rows: Int32Array.of(0, 3) } },
  );
  expect(error).toMatchObject({ code: 'InvalidData' });
  expect([...state.read()]).toEqual([1, 2, 3, 4]);
  state.dispose();
});

test('what does not fit the state is refused', async () => {
  const error = await failure((g) => accumulate(g.state(Tensor.alloc('f32', [10])), g.feed('x', 'f32', [4]), 7));
  expect(error.message).toBe('[accumulate] 4 elements at offset 7 do not fit a state of 10');
  const rows = (stride: number) =>
    failure((g) => accumulate(g.state(Tensor.alloc('f32', [10])), g.feed('x', 'f32', [3, 2]), 0, stride));
  expect((await rows(5)).message).toMatch('6 elements at offset 0 do not fit a state of 10');
  expect((await rows(1)).message).toMatch('the stride of rows of 2 must be at least that, got 1');
});

test('a read-only tensor is no state', async () => {
  const w = Tensor.fromData('f32', [10], new Float32Array(10));
  const error = await failure((g) => void g.state(w, 'w'));
  expect(error.message).toBe('[state] w is read-only');
  const written = await failure((g) => accumulate(g.weight(w, 'w'), g.feed('x', 'f32', [4]), 0));
  expect(written.message).toBe('[accumulate] state is written to and must be a state tensor');
  w.dispose();
});
