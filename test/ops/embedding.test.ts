// embedding and its gradient.
import { expect, test } from 'vitest';
import { Graph } from '../../lib/graph/graph.js';
import { embedding, gradients, Program } from '../../lib/graph/index.js';
import { type DType, Tensor } from '../../lib/native/index.js';
import { type Case, cases, compare, failure, inputs, testEngine } from './harness.js';

cases('embedding', [
  ...(['f32', 'bf16', 'f16'] as DType[]).flatMap((dtype) =>
    [17, 20].map((width): Case => {
      const make = inputs(1);
      return {
        name: `${dtype} table of width ${width}`,
        inputs: { table: make.weight(dtype, 33, width), ids: make.ids(33, ['R', 9]) },
        build: ({ table, ids }) => ({ y: embedding(table, ids) }),
      };
    }),
  ),
  ...[4, 5].map((width): Case => {
    const make = inputs(width);
    // Some ids many times and apart, most not at all.
    const ids = Array.from({ length: 2000 }, () => (Math.floor(make.next() * 40) ** 2 * 7) % 1200);
    return {
      name: `2000 ids of 1200 rows of ${width}, many of them equal`,
      inputs: { table: make.param(1200, width), ids: make.i32(ids, ['R', 2000]) },
      build: ({ table, ids }) => ({ y: embedding(table, ids) }),
      wrt: ['table'],
    };
  }),
  ...(
    [
      [1, 1, 1],
      [3, 17, 33],
      [33, 3, 17],
    ] as const
  ).map(([v, d, r]): Case => {
    const make = inputs(v);
    return {
      name: `${r} ids of ${v} rows of ${d}`,
      inputs: { table: make.param(v, d), ids: make.ids(v, ['R', r]) },
      build: ({ table, ids }) => ({ y: embedding(table, ids) }),
      wrt: ['table'],
    };
  }),
]);

test('an id past the vocabulary, or a negative one, is InvalidData', async () => {
  using table = Tensor.fromData('f32', [5, 2], new Float32Array(10));
  for (const id of [5, -1, 0x7fffffff, -0x80000000]) {
    const feeds = { ids: Int32Array.of(0, id) };
    const error = await failure((g) => g.output('y', embedding(g.weight(table), g.feed('ids', 'i32', [2]))), { feeds });
    expect(error).toMatchObject({ code: 'InvalidData' });
    expect(error.message).toContain('embedding');
  }
});

test('ids of a run before, which were more, have no effect', async () => {
  using table = Tensor.alloc('f32', [50, 4]);
  const g = new Graph();
  const [w, r] = [g.state(table), g.dim('R', 40)];
  const y = embedding(w, g.feed('ids', 'i32', [r]));
  g.output('dw', gradients(y, [w], { seed: g.feed('dy', 'f32', [r, 4]) })[0]);
  using program = Program.compile(g, testEngine());
  for (const count of [40, 7]) {
    const make = inputs(count);
    const [ids, dy] = [make.ids(50, count).data, make.f32(count, 4).data];
    const feeds = { ids: Int32Array.from(ids), dy: Float32Array.from(dy) };
    const { outputs } = await program.run({ dims: { R: count }, feeds });
    const sums = Array(200).fill(0);
    dy.forEach((value, i) => {
      sums[ids[i >> 2] * 4 + (i & 3)] += value;
    });
    compare(outputs.dw, sums, 1e-6, `gradient of ${count} ids`);
  }
});
