// Experts: choices by number and by mass, gates and their gradients, balance; mixed shares in one batch; bad data.
import { expect, test } from 'vitest';
import {
  type ExpertScores,
  expertBalance,
  expertCredit,
  expertGate,
  expertGates,
  expertRows,
  expertRules,
  Graph,
  heldWidth,
  type Node,
  Program,
  tileScores,
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

/** `starts`: the first position of every segment; `decided`: where its tile before was decided, -1 if nowhere. `gaps`: rows are missing. */
function tiles(
  lengths: readonly number[],
  count: number,
  tile: number,
  { starts = [], decided, gaps = false }: { starts?: number[]; decided?: number[]; gaps?: boolean } = {},
): Case {
  const make = inputs(count + tile);
  const positions = lengths.flatMap((length, s) => {
    let at = (starts[s] ?? 0) - 1;
    return Array.from({ length }, () => {
      at += gaps ? 1 + Math.floor(3 * make.next()) : 1;
      return at;
    });
  });
  const n = positions.length;
  const decisions = (decided ?? []).flatMap((at) => [
    ...Array.from({ length: count }, () => 2 * make.next() - 1),
    at,
    ...Array.from({ length: count }, () => 2 * make.next() - 1),
    at < tile ? -1 : at - tile,
  ]);
  return {
    name: `${count} scores, tiles of ${tile}, segments ${lengths} from ${starts}${gaps ? ', gaps' : ''}${decided ? `, held ${decided}` : ''}`,
    inputs: {
      z: make.f32(['N', n], count),
      positions: make.i32(positions, ['N', n]),
      offsets: make.i32(offsetsOf(lengths), ['O', lengths.length + 1]),
      ...(decided && { held: make.values(decisions, ['S', lengths.length], heldWidth(count)) }),
    },
    build: ({ z, positions, offsets, held }) => {
      const { y, next } = tileScores(z, positions, offsets, tile, held ?? null);
      return { y, ...(next && { next }) };
    },
    wrt: ['z'],
  };
}

cases('tile_scores', [
  tiles([1], 1, 1),
  tiles([9, 1, 30], 5, 4),
  tiles([9, 0, 30, 0], 33, 4, { starts: [3, 0, 6, 9], gaps: true }),
  // The next segment goes on in the same tile.
  tiles([3, 3, 2], 7, 64, { starts: [0, 4, 9] }),
  // The tile of the first rows: decided before, decided in the tile before, not decided; a segment without rows.
  tiles([9, 5, 3, 0], 5, 8, { starts: [3, 8, 6, 9], decided: [1, 7, -1, 8] }),
  // The last tiles: the same as held, one more, two more, several more.
  tiles([2, 8, 12, 60], 16, 8, { starts: [5, 5, 5, 5], decided: [4, 4, 4, 4], gaps: true }),
  tiles([3, 4], 2, 1000000, { starts: [999998, 16777212], decided: [999997, 15999999] }),
  // Enough for several threads.
  tiles([700, 3, 500, 900], 40, 32, { starts: [0, 31, 500, 7], decided: [-1, 30, 499, 6], gaps: true }),
]);

test('tile_scores: positions that do not ascend or are out of range, NaN, held decisions of another width', async () => {
  const run = (positions: number[], { z = 0, width = heldWidth(2), segments = 1, tile = 4 } = {}) =>
    failure(
      (graph) => {
        const at = graph.feed('positions', 'i32', [graph.dim('N', 4)]);
        const scores = graph.feed('z', 'f32', [at.shape[0], 2]);
        const held = graph.feed('held', 'f32', [segments, width]);
        graph.output('y', tileScores(scores, at, graph.feed('offsets', 'i32', [2]), tile, held).y);
      },
      {
        dims: { N: positions.length },
        feeds: {
          z: new Float32Array(2 * positions.length).fill(z),
          positions: Int32Array.from(positions),
          offsets: Int32Array.of(0, positions.length),
          held: new Float32Array(segments * width),
        },
      },
    );
  for (const bad of [[-1], [1, 1], [2, 1], [0, 1 << 24], [-(2 ** 31)]]) {
    expect(await run(bad), `${bad}`).toMatchObject({
      code: 'InvalidData',
      message: expect.stringMatching(/\[tile_scores\] positions\[\d\] must be in .*ascending/),
    });
  }
  expect(await run([1, 2], { z: Number.NaN })).toMatchObject({
    code: 'InvalidData',
    message: expect.stringMatching(/z\[\d\] is NaN/),
  });
  expect(await run([1], { width: 4 })).toMatchObject({
    code: 'InvalidProgram',
    message: expect.stringMatching(/two decisions about 2 experts are 6 values, got 4/),
  });
  expect((await run([1], { segments: 2 })).message).toMatch(/one value per segment wanted/);
  for (const tile of [0, -4, 1.5])
    expect(await run([1], { tile }), `${tile}`).toMatchObject({ code: 'InvalidProgram' });
});

cases('expert_rows', [
  ...rulesAndCounts.flatMap(({ rule, count }) =>
    [false, true].map(
      (ties): Case => ({
        name: `${rule} of ${count}${ties ? ', ties' : ''}`,
        inputs: scoresOf([7, 1, 40, 9, 3], count, count, ties),
        build: (n) =>
          Object.fromEntries(
            Array.from({ length: Math.min(count, 6) }, (_, e) => {
              const { rows, offsets } = expertRows(scored(n, rule), e);
              return Object.entries({ [`rows${e}`]: rows, [`offsets${e}`]: offsets });
            }).flat(),
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

/** `rows`: which of some more rows entered the sub-layer. */
function credit(
  lengths: readonly number[],
  count: number,
  width: number,
  { spread = 1, rows = false, ties = false } = {},
): Case {
  const make = inputs(count + width);
  const { z, ...data } = scoresOf(lengths, count, 3, ties);
  const entered = lengths.reduce((a, b) => a + b, 0);
  const n = rows ? 2 * entered + 1 : entered;
  const names = { h: make.f32(['N', n], count * width), dh: make.f32(['N', n], count * width) };
  const at = Array.from({ length: entered }, (_, r) => 2 * r + 1);
  return {
    name: `${count} of ${width} in segments ${lengths}, scores to ${spread}${rows ? ', some rows' : ''}${ties ? ', ties' : ''}`,
    inputs: {
      ...names,
      z: make.values(
        z.data.map((v) => v * spread),
        rows ? ['R', entered] : ['N', n],
        count,
      ),
      ...data,
      weight: make.f32(['N', n]),
      ...(rows && { rows: make.i32(at, ['R', entered]) }),
    },
    build: (v) => ({ dz: expertCredit(v.h, v.dh, scored(v, 'top-k'), v.weight, v.rows ?? null) }),
  };
}

cases('expert_credit', [
  credit([7, 1, 40, 9, 3], 2, 1),
  credit([7, 0, 40, 9, 3], 5, 12, { spread: 3 }),
  credit([7, 1, 40], 33, 3, { spread: 30, rows: true }),
  credit([40, 9], 8, 33, { ties: true, rows: true }),
  // Enough for several threads.
  credit([600, 70], 4, 150),
]);

interface CreditData {
  z: readonly number[];
  /** What every expert of a row changes in the loss: dh is 1. */
  change: readonly number[];
  share: number;
}

/** Of rows of as many experts as there are scores. */
async function runCredit({ z, change, share }: CreditData): Promise<number[]> {
  const graph = new Graph();
  const rows = (name: string) => graph.feed(name, 'f32', [1, z.length]);
  const scores: ExpertScores = {
    z: rows('z'),
    offsets: graph.feed('offsets', 'i32', [2]),
    share: graph.constant([share], [1]),
    rule: 'top-k',
  };
  graph.output('dz', expertCredit(rows('h'), rows('dh'), scores, graph.constant([1], [1])));
  using program = Program.compile(graph, testEngine());
  const { outputs } = await program.run({
    feeds: {
      h: Float32Array.from(change),
      dh: new Float32Array(z.length).fill(1),
      z: Float32Array.from(z),
      offsets: Int32Array.of(0, 1),
    },
  });
  return [...outputs.dz];
}

test('expert_credit is the gradient of a soft top-k that keeps its number of experts', async () => {
  const [count, k] = [9, 4];
  const next = random(5);
  const z = Array.from({ length: count }, () => Math.fround(6 * next() - 3));
  const change = Array.from({ length: count }, () => Math.fround(2 * next() - 1));
  const size = change.reduce((sum, value) => sum + Math.abs(value), 0) / count;
  const sigmoid = (x: number) => 1 / (1 + Math.exp(-x));
  const kept = (scores: readonly number[], tau: number) => scores.reduce((sum, v) => sum + sigmoid(v - tau), 0);
  const order = [...z].sort((a, b) => b - a);
  const wanted = kept(z, (order[k - 1] + order[k]) / 2);
  const value = (scores: readonly number[]) => {
    let [low, high] = [-20, 20];
    for (let i = 0; i < 100; ++i) {
      const middle = (low + high) / 2;
      if (kept(scores, middle) > wanted) low = middle;
      else high = middle;
    }
    return scores.reduce((sum, v, i) => sum + (change[i] / size) * sigmoid(v - low), 0);
  };
  const dz = await runCredit({ z, change, share: k / count });
  const h = 1e-4;
  const slopes = z.map((v, i) => (value(z.with(i, v + h)) - value(z.with(i, v - h))) / (2 * h));
  for (const [i, slope] of slopes.entries()) expect(dz[i], `dz[${i}]`).toBeCloseTo(slope, 6);
});

test('expert_credit is zero where there is nothing to learn', async () => {
  const none = [0, 0, 0, 0];
  const [z, change] = [
    [1, 2, 3, 4],
    [1, -1, 2, 3],
  ];
  const zeros = async (data: Partial<CreditData>) => {
    const dz = await runCredit({ z, change, share: 0.5, ...data });
    expect(dz.map(Math.abs), JSON.stringify(data)).toEqual(none);
  };
  await zeros({ change: none });
  await zeros({ share: 0 });
  await zeros({ share: 1 });
  await zeros({ z: [2000, -2000, 2000, -2000] });
  await zeros({ z: [Number.POSITIVE_INFINITY, 0, 1, 2], share: 0.25 });
  const dz = await runCredit({ z: [Number.POSITIVE_INFINITY, 0, 1, 2], change, share: 0.5 });
  expect(Math.abs(dz[0])).toBe(0);
  expect(dz.slice(1).every((v) => Number.isFinite(v) && v !== 0)).toBe(true);
});

test('expert_credit: units that experts do not divide, rows that are not there', async () => {
  const run = (units: number, row: number) =>
    failure(
      (graph) => {
        const h = graph.feed('h', 'f32', [3, units]);
        const scores: ExpertScores = {
          z: graph.constant([1, 2], [1, 2]),
          offsets: graph.feed('offsets', 'i32', [2]),
          share: graph.constant([0.5], [1]),
          rule: 'top-k',
        };
        const rows = graph.feed('rows', 'i32', [1]);
        graph.output('dz', expertCredit(h, h, scores, graph.constant([1, 1, 1], [3]), rows));
      },
      { feeds: { h: new Float32Array(3 * units), offsets: Int32Array.of(0, 1), rows: Int32Array.of(row) } },
    );
  expect(await run(5, 0)).toMatchObject({
    code: 'InvalidProgram',
    message: expect.stringMatching(/5 units cannot be cut into 2 experts/),
  });
  for (const row of [-1, 3]) expect(await run(4, row)).toMatchObject({ code: 'InvalidData' });
});

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

test('rows of every expert', async () => {
  const graph = new Graph();
  const z = graph.feed('z', 'f32', [graph.dim('N', 9), 3]);
  const offsets = graph.feed('offsets', 'i32', [3]);
  const scores: ExpertScores = { z, offsets, share: graph.feed('share', 'f32', [2]), rule: 'top-k' };
  for (let e = 0; e < 3; e++) {
    const routed = expertRows(scores, e);
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
        graph.output('rows', expertRows({ z: node, offsets, share, rule: 'mass' }, 0).rows);
      },
      {
        dims: { N: 2 },
        feeds: { z: Float32Array.from(z), offsets: Int32Array.of(0, 2), share: Float32Array.from(shares) },
      },
    );
  expect(await choose([1, 2, Number.NaN, 4], [0.5])).toMatchObject({
    code: 'InvalidData',
    message: expect.stringMatching(/\[expert_rows\] z\[2\] is NaN/),
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
      expertRows({ z, offsets: graph.feed('offsets', 'i32', [2]), share: graph.constant([1], [1]), rule: 'top-k' }, 2);
    }),
  ).toMatchObject({ message: expect.stringMatching(/expert must be an integer in \[0, 2\), got 2/) });
});
