// embedding and its gradient.
import { expect, test } from 'vitest';
import { embedding } from '../../lib/graph/index.js';
import { type DType, Tensor } from '../../lib/native/index.js';
import { type Case, cases, failure, inputs } from './harness.js';

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
