// Experts: choices by number and by mass, gates and their gradients, balance; mixed shares in one batch; bad data.
import { expect, test } from 'vitest';
import {
  type ExpertScores,
  expertBalance,
  expertChoice,
  expertGate,
  expertGates,
  expertRules,
  Graph,
  type Node,
  Program,
  routeThreshold,
} from '../../lib/graph/index.js';
import { type Case, cases, failure, inputs, offsetsOf, random, testEngine } from './harness.js';

const rulesAndCounts = expertRules.flatMap((rule) => [2, 5, 33].map((count) => ({ rule, count })));

/** Scores of segments of these lengths. Ties: rounded to quarters. */
function scoresOf(lengths: readonly number[], count: number, seed: number, ties: boolean) {
  const make = inputs(seed);
  const rows = lengths.reduce((a, b) => a + b, 0);
  const next = random(seed);
  const draw = () => (ties ? Math.round(8 * next()) / 4 : 4 * next() - 2);
  const shares = lengths.map((_, s) => [0.5, 0.25, 1, 0.1, 0][s % 5]);
  return {
    z: make.values(Array.from({ length: rows * count }, draw), ['N', rows], count),
    offsets: make.i32(offsetsOf(lengths), lengths.length + 1),
    share: make.values(shares, lengths.length),
  };
}

const scored = (n: Record<string, Node>, rule: ExpertScores['rule']): ExpertScores => ({
  z: n.z,
  offsets: n.offsets,
  share: n.share,
  rule,
});

cases('expert_choice', [
  ...rulesAndCounts.flatMap(({ rule, count }) =>
    [false, true].map(
      (ties): Case => ({
        name: `${rule} of ${count}${ties ? ', ties' : ''}`,
        inputs: scoresOf([7, 1, 40, 9, 3], count, count, ties),
        build: (n) =>
          Object.fromEntries(
            Array.from({ length: Math.min(count, 6) }, (_, e) => [`e${e}`, expertChoice(scored(n, rule), e)]),
          ),
      }),
    ),
  ),
]);

cases('expert_gate', [
  ...rulesAndCounts.flatMap(({ rule, count }) =>
    expertGates.map((mode): Case => {
      const make = inputs(7);
      const lengths = [11, 30, 4];
      const data = scoresOf(lengths, count, 3 + count, false);
      const row = (n: number) => Array.from(data.z.data.slice(n * count, (n + 1) * count));
      // Rows that choose expert 1, so that the renormalised gate is one of the chosen.
      const chosen = Array.from({ length: 45 }, (_, n) => n).filter((n) => n < 41 && row(n)[1] >= Math.max(...row(n)));
      return {
        name: `${mode}, ${rule} of ${count}`,
        inputs: { ...data, rows: make.i32(chosen, ['R', chosen.length]) },
        build: (n) => ({ g: expertGate(scored(n, rule), 1, n.rows, mode) }),
        wrt: ['z'],
        // The value is 1 whatever the scores: its gradient is that of log w.
        ...(mode === 'straight-through' && {
          surrogate: {
            expert_gate: ([z, , , rows]) => [
              {
                shape: rows!.shape,
                data: Float64Array.from(rows!.data, (n) => {
                  const scores = z!.data.subarray(n * count, (n + 1) * count);
                  return scores[1] - Math.log(scores.reduce((sum, v) => sum + Math.exp(v), 0));
                }),
              },
            ],
          },
        }),
      };
    }),
  ),
]);

cases('expert_balance', [
  ...rulesAndCounts.map(
    ({ rule, count }): Case => ({
      name: `${rule} of ${count}`,
      inputs: scoresOf([20, 33, 12, 5, 2], count, 11 + count, false),
      build: (n) => ({ loss: expertBalance(scored(n, rule)) }),
      wrt: ['z'],
    }),
  ),
  {
    name: 'many rows',
    inputs: scoresOf([700, 900, 3, 1, 1], 12, 5, false),
    build: (n) => ({ loss: expertBalance(scored(n, 'top-k')) }),
    wrt: ['z'],
  },
]);

test('equal loads are balanced', async () => {
  const graph = new Graph();
  const scores = [4, 1, 0, 0, 0, 4, 1, 0, 0, 0, 4, 1, 1, 0, 0, 4];
  const z = graph.constant(scores, [4, 4]);
  const share = graph.constant([0.5], [1]);
  graph.output('loss', expertBalance({ z, offsets: graph.feed('offsets', 'i32', [2]), share, rule: 'top-k' }));
  using program = Program.compile(graph, testEngine());
  const { outputs } = await program.run({ feeds: { offsets: Int32Array.of(0, 4) } });
  expect(outputs.loss[0]).toBeCloseTo(0, 6);
});

test('rows of every expert, with the choice as a score', async () => {
  const graph = new Graph();
  const z = graph.feed('z', 'f32', [graph.dim('N', 9), 3]);
  const offsets = graph.feed('offsets', 'i32', [3]);
  const scores: ExpertScores = { z, offsets, share: graph.feed('share', 'f32', [2]), rule: 'top-k' };
  const half = graph.constant([0.5, 0.5], [2]);
  for (let e = 0; e < 3; e++) {
    const routed = routeThreshold(expertChoice(scores, e), offsets, half);
    graph.output(`rows${e}`, routed.rows);
    graph.output(`offsets${e}`, routed.offsets);
  }
  using program = Program.compile(graph, testEngine());
  const { outputs } = await program.run({
    dims: { N: 3 },
    feeds: {
      z: Float32Array.of(3, 2, 1, 1, 1, 1, 0, 5, 6),
      offsets: Int32Array.of(0, 2, 3),
      share: Float32Array.of(1 / 3, 2 / 3),
    },
  });
  expect([0, 1, 2].map((e) => [...outputs[`rows${e}`]])).toEqual([[0, 1], [2], [2]]);
  expect([0, 1, 2].map((e) => [...outputs[`offsets${e}`]])).toEqual([
    [0, 2, 2],
    [0, 0, 1],
    [0, 0, 1],
  ]);
});

test('NaN scores, shares outside 0 to 1, and shares that do not fit the segments are errors', async () => {
  const choose = (z: number[], shares: number[]) =>
    failure(
      (graph) => {
        const offsets = graph.feed('offsets', 'i32', [2]);
        const node = graph.feed('z', 'f32', [graph.dim('N', 4), 2]);
        const share = graph.feed('share', 'f32', [shares.length]);
        graph.output('y', expertChoice({ z: node, offsets, share, rule: 'mass' }, 0));
      },
      {
        dims: { N: 2 },
        feeds: { z: Float32Array.from(z), offsets: Int32Array.of(0, 2), share: Float32Array.from(shares) },
      },
    );
  expect(await choose([1, 2, Number.NaN, 4], [0.5])).toMatchObject({
    code: 'InvalidData',
    message: expect.stringMatching(/\[expert_choice\] z\[2\] is NaN/),
  });
  for (const share of [-0.1, 1.5, Number.NaN]) {
    expect(await choose([1, 2, 3, 4], [share])).toMatchObject({
      code: 'InvalidData',
      message: expect.stringMatching(/share\[0\] must be in \[0, 1\]/),
    });
  }
  expect((await choose([1, 2, 3, 4], [0.5, 0.5])).message).toMatch(/one value per segment wanted/);
  expect(
    await failure((graph) => {
      const z = graph.constant([1, 2], [1, 2]);
      expertChoice(
        { z, offsets: graph.feed('offsets', 'i32', [2]), share: graph.constant([1], [1]), rule: 'top-k' },
        2,
      );
    }),
  ).toMatchObject({ message: expect.stringMatching(/expert must be an integer in \[0, 2\), got 2/) });
});
