// segment_sum, segment_broadcast, latch.
import { expect, test } from 'vitest';
import { Graph } from '../../lib/graph/graph.js';
import { latch, linear, Program, routeThreshold, segmentBroadcast, segmentMean } from '../../lib/graph/index.js';
import { type Case, cases, failure, inputs, offsetsOf, testEngine } from './harness.js';

const shapes: readonly [lengths: readonly number[], width: number][] = [
  [[1], 1],
  [[5], 33],
  [[3, 0, 17, 1], 12],
  [[0, 4, 0], 130],
  [[40, 70, 2, 9], 257],
];

function of(lengths: readonly number[], width: number, most: number): Case {
  const make = inputs(lengths.length + width);
  const n = lengths.reduce((a, b) => a + b, 0);
  const s = lengths.length;
  return {
    name: `segments ${lengths} of ${width}, ${most > 0 ? `at most ${most} rows` : 'all rows'}`,
    inputs: {
      x: make.f32(['N', n], width),
      offsets: make.i32(offsetsOf(lengths), ['O', s + 1]),
      // Gives the number of segments.
      score: make.f32(['S', s], 1),
    },
    build: ({ x, offsets, score }) => ({ y: segmentMean(x, offsets, score.shape[0], { most }) }),
    wrt: ['x'],
  };
}

cases(
  'segment_sum',
  shapes.flatMap(([lengths, width]) => [0, 1, 3].map((most) => of(lengths, width, most))),
);

cases(
  'segment_broadcast',
  shapes.map(([lengths, width]): Case => {
    const make = inputs(width);
    const n = lengths.reduce((a, b) => a + b, 0);
    return {
      name: `segments ${lengths} of ${width}`,
      inputs: {
        x: make.f32(['S', lengths.length], width),
        offsets: make.i32(offsetsOf(lengths), ['O', lengths.length + 1]),
        row: make.f32(['N', n]),
      },
      build: ({ x, offsets, row }) => ({ y: segmentBroadcast(x, offsets, row.shape[0]) }),
      wrt: ['x'],
    };
  }),
);

cases('latch', [
  {
    name: 'some held',
    inputs: {
      x: inputs(1).f32(['S', 7], 1),
      held: inputs(2).values([0.5, Number.NaN, -1, Number.NaN, 0, 3e30, Number.NaN], ['S', 7], 1),
    },
    build: ({ x, held }) => ({ y: latch(x, held) }),
  },
  {
    name: 'a vector and a tail',
    inputs: {
      x: inputs(3).f32(3, 11),
      held: inputs(4).values(
        Array.from({ length: 33 }, (_, i) => (i % 3 ? i : Number.NaN)),
        3,
        11,
      ),
    },
    build: ({ x, held }) => ({ y: latch(x, held) }),
  },
]);

test("a segment's score and rows have the same bits alone and beside others", async () => {
  const make = inputs(9);
  const [width, length] = [48, 37];
  const own = Float32Array.from(make.f32(length, width).data);
  const weight = Float32Array.from(make.f32(1, width).data);
  const run = async (before: number, after: number) => {
    const graph = new Graph();
    const n = before + length + after;
    const x = graph.feed('x', 'f32', [n, width]);
    const offsets = graph.feed('offsets', 'i32', [4]);
    const z = linear(segmentMean(x, offsets, 3), graph.feed('w', 'f32', [1, width]));
    const threshold = graph.feed('threshold', 'f32', [3]);
    graph.output('z', z);
    graph.output('rows', routeThreshold(segmentBroadcast(z, offsets, n), offsets, threshold).rows);
    using program = Program.compile(graph, testEngine());
    const all = new Float32Array(n * width).map((_, i) => Math.sin(i));
    all.set(own, before * width);
    const feeds = {
      x: all,
      w: weight,
      offsets: Int32Array.of(0, before, before + length, n),
      threshold: Float32Array.of(9e9, -9e9, 9e9),
    };
    return (await program.run({ feeds })).outputs;
  };
  const [alone, among] = [await run(0, 0), await run(70, 13)];
  expect(among.z[1]).toBe(alone.z[1]);
  expect(Array.from(among.rows)).toEqual(Array.from(alone.rows, (row) => row + 70));
});

test('offsets that are none, and too few values, are refused', async () => {
  const mean = (offsets: readonly number[], segments: number) =>
    failure(
      (g) => {
        const x = g.feed('x', 'f32', [5, 2]);
        g.output('y', segmentMean(x, g.feed('offsets', 'i32', [offsets.length]), segments));
      },
      { feeds: { x: new Float32Array(10), offsets: Int32Array.from(offsets) } },
    );
  for (const offsets of [
    [0, 3],
    [1, 5],
    [0, 6],
  ]) {
    expect(await mean(offsets, 1), `${offsets}`).toMatchObject({ code: 'InvalidData' });
  }
  expect(await mean([0, 2, 1, 5], 3)).toMatchObject({ code: 'InvalidData' });
  expect((await mean([0, 2, 5], 3)).message).toContain('one value per segment');
  const spread = await failure(
    (g) => {
      const x = g.feed('x', 'f32', [3, 1]);
      g.output('y', segmentBroadcast(x, g.feed('offsets', 'i32', [3]), 5));
    },
    { feeds: { x: new Float32Array(3), offsets: Int32Array.of(0, 2, 5) } },
  );
  expect(spread.message).toContain('one value per segment');
});
