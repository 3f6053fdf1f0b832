// divergence and cross_entropy.
import { expect, test } from 'vitest';
import { crossEntropy, divergence, Graph, gradients, Program, scale } from '../../lib/graph/index.js';
import { type DType, Tensor } from '../../lib/native/index.js';
import { type Case, cases, checkNative, compare, failure, inputs, narrowEngine, testEngine } from './harness.js';

const sizes = [
  [1, 3, 2],
  [3, 17, 33],
  [33, 65, 3],
  [70, 33, 8],
  [5, 600, 17],
  [2, 4099, 3],
  [3, 9002, 2],
] as const;

/** Targets below `v`, every third missing. */
const targetsOf = (make: ReturnType<typeof inputs>, r: number, v: number) =>
  make.i32(
    Array.from({ length: r }, (_, i) => (i % 3 === 2 ? -1 : Math.floor(make.next() * v))),
    ['R', r],
  );

const kinds = ['kl', 'reverse-kl', 'jsd'] as const;

cases('divergence', [
  ...sizes.flatMap(([r, v, k], i) =>
    kinds.flatMap((kind) =>
      [true, false].map((withTargets): Case => {
        const make = inputs(r + v);
        // Every other size has a teacher with a head of its own.
        const j = i % 2 === 1 ? k + 5 : k;
        return {
          name: `${kind}: ${r} rows, vocabulary ${v}, width ${k}${j === k ? '' : ', wt'}${withTargets ? ', targets' : ''}`,
          inputs: {
            hs: make.f32(['R', r], k),
            ht: make.f32(['R', r], j),
            w: make.weight('f32', v, k),
            weight: make.f32(['R', r]),
            ...(withTargets ? { targets: targetsOf(make, r, v) } : {}),
            ...(j === k ? {} : { wt: make.weight('f32', v, j) }),
          },
          build: ({ hs, ht, w, weight, targets, wt }) => {
            const { loss, row, agree, ce } = divergence(hs, ht, w, weight, { kind, beta: 0.3, targets, wt });
            return { loss, row, agree, ...(ce ? { ce } : {}) };
          },
          wrt: ['hs', 'weight'],
          tolerance: 5e-5,
        };
      }),
    ),
  ),
  ...(['bf16', 'f16'] as DType[]).flatMap((dtype) =>
    kinds.map((kind): Case => {
      const make = inputs(9);
      return {
        name: `${kind}: ${dtype} heads, of which a prefix of columns, and a scaled loss`,
        inputs: {
          hs: make.f32(['R', 9], 19),
          ht: make.f32(['R', 9], 13),
          w: make.weight(dtype, 50, 24),
          wt: make.weight(dtype, 50, 16),
          weight: make.f32(['R', 9]),
          s: make.f32(1),
        },
        build: ({ hs, ht, w, weight, s, wt }) => ({
          loss: scale(divergence(hs, ht, w, weight, { kind, wt }).loss, 0.5, s),
        }),
        wrt: ['hs', 's'],
        tolerance: 5e-5,
      };
    }),
  ),
]);

cases('cross_entropy', [
  ...sizes.map(([r, v, k]): Case => {
    const make = inputs(r + v);
    return {
      name: `${r} rows, vocabulary ${v}, width ${k}`,
      inputs: {
        h: make.f32(['R', r], k),
        w: make.param(v, k),
        targets: targetsOf(make, r, v),
        weight: make.f32(['R', r]),
      },
      build: ({ h, w, targets, weight }) => {
        const { loss, row, correct } = crossEntropy(h, w, targets, weight);
        return { loss, row, correct };
      },
      wrt: ['h', 'w', 'weight'],
      tolerance: 5e-5,
    };
  }),
  ...(['bf16', 'f16'] as DType[]).map((dtype): Case => {
    const make = inputs(10);
    return {
      name: `${dtype} head`,
      inputs: {
        h: make.f32(['R', 9], 19),
        w: make.weight(dtype, 50, 19),
        targets: targetsOf(make, 9, 50),
        weight: make.f32(['R', 9]),
      },
      build: ({ h, w, targets, weight }) => ({ loss: crossEntropy(h, w, targets, weight).loss }),
      wrt: ['h'],
    };
  }),
]);

test.each([
  // Two chunks of logits in one of gradients; on few multiprocessors two of both, as dh is wide.
  [260, 5, 3],
  [131, 3, 600],
  // Rows of gradients in bf16 that are longer than the vocabulary, of more than one step on tensor cores.
  [131, 69, 600],
])('chunks of %i rows, vocabulary %i, width %i', async (r, v, k) => {
  const make = inputs(12);
  const h = make.f32(['R', r], k);
  const [w, targets, weight] = [make.param(v, k), targetsOf(make, r, v), make.f32(['R', r])];
  const ofTeacher = (kind: (typeof kinds)[number], j: number): Case => ({
    name: kind,
    inputs: {
      hs: h,
      ht: make.f32(['R', r], j),
      w: make.weight('bf16', v, k),
      weight,
      targets,
      ...(j === k ? {} : { wt: make.weight('bf16', v, j) }),
    },
    build: ({ hs, ht, w, weight, targets, wt }) => {
      const { loss, row, ce } = divergence(hs, ht, w, weight, { kind, targets, wt });
      return { loss, row, ce: ce! };
    },
    wrt: ['hs', 'weight'],
  });
  const all: Case[] = [
    ofTeacher('kl', k),
    ofTeacher('jsd', k + 3),
    {
      name: 'cross_entropy',
      inputs: { h, w, targets, weight },
      build: ({ h, w, targets, weight }) => {
        const { loss, row } = crossEntropy(h, w, targets, weight);
        return { loss, row };
      },
      wrt: ['h', 'w', 'weight'],
    },
  ];
  for (const c of all) {
    await checkNative({ ...c, tolerance: 1e-4 });
    const narrow = narrowEngine();
    if (narrow) await checkNative({ ...c, narrowTolerance: 0.05 }, narrow);
  }
});

/** All losses, and their gradients, of hidden states that are numbers: the logits are these times the head. */
async function ofNumbers(head: readonly number[], hs: readonly number[], ht: readonly number[], targets: number[]) {
  const r = hs.length;
  using w = Tensor.fromData('f32', [head.length, 1], Float32Array.from(head));
  const g = new Graph();
  const [student, teacher] = [g.feed('hs', 'f32', [r, 1]), g.feed('ht', 'f32', [r, 1])];
  const [weight, wanted] = [g.feed('weight', 'f32', [r]), g.feed('targets', 'i32', [r])];
  const kl = divergence(student, teacher, g.weight(w), weight, { targets: wanted });
  const [reverse, jsd] = (['reverse-kl', 'jsd'] as const).map((kind) =>
    divergence(student, teacher, g.weight(w), weight, { kind, beta: 0.2 }),
  );
  const plain = crossEntropy(student, g.weight(w), wanted, weight);
  const nodes = {
    row: kl.row,
    reverse: reverse.row,
    jsd: jsd.row,
    agree: kl.agree,
    ce: kl.ce!,
    crossEntropy: plain.row,
    correct: plain.correct,
  };
  for (const [name, node] of Object.entries(nodes)) g.output(name, node);
  g.output('dkl', gradients(kl.loss, [student])[0]);
  g.output('dreverse', gradients(reverse.loss, [student])[0]);
  g.output('djsd', gradients(jsd.loss, [student])[0]);
  g.output('dce', gradients(plain.loss, [student])[0]);
  using program = Program.compile(g, testEngine());
  const feeds = {
    hs: Float32Array.from(hs),
    ht: Float32Array.from(ht),
    weight: new Float32Array(r).fill(1),
    targets: Int32Array.from(targets),
  };
  return (await program.run({ feeds })).outputs;
}

test('logits of -inf are as good as absent', async () => {
  const make = inputs(13);
  const head = Array.from({ length: 9001 }, (_, i) =>
    i < 4500 || i % 7 === 0 ? Number.NEGATIVE_INFINITY : i < 6000 ? -200 : 4 * make.next(),
  );
  const present = head.filter(Number.isFinite);
  const at = [5003, 8000];
  const all = await ofNumbers(head, [1, 2], [1.5, 2], at);
  const without = await ofNumbers(
    present,
    [1, 2],
    [1.5, 2],
    at.map((i) => present.indexOf(head[i], present.length - head.slice(i).filter(Number.isFinite).length)),
  );
  for (const name of ['row', 'reverse', 'jsd', 'agree', 'ce', 'crossEntropy', 'correct']) {
    compare(all[name], [...without[name]], 1e-6, name);
  }
});

test('logits as far apart as floats are do not overflow', async () => {
  const { row, reverse, jsd, agree, ce, crossEntropy, dkl, dreverse, djsd, dce } = await ofNumbers(
    [1e38, 0, -1e38],
    [1, 1],
    [-1, 1],
    [2, 0],
  );
  compare(reverse, [2e38, 0], 1e-6, 'reverse');
  // Of distributions that share nothing: the entropy of the mixture's weights.
  compare(jsd, [-0.2 * Math.log(0.2) - 0.8 * Math.log(0.8), 0], 1e-6, 'jsd');
  for (const values of [dreverse, djsd]) compare(values, [0, 0], 0, 'certain either way');
  compare(row, [2e38, 0], 1e-6, 'row');
  compare(agree, [0, 1], 0, 'agree');
  for (const values of [ce, crossEntropy, dce]) compare(values, [2e38, 0], 1e-6, 'cross-entropy');
  compare(dkl, [2e38, 0], 1e-6, 'dkl');
});

test('a row with NaN is NaN, agrees with nothing and leaves other rows alone', async () => {
  const head = Array.from({ length: 5000 }, (_, i) => Math.sin(i));
  const nan = await ofNumbers(head, [1, Number.NaN, 2], [1, Number.NaN, 1], [7, 7, -1]);
  const plain = await ofNumbers(head, [1, 1, 2], [1, 1, 1], [7, 7, -1]);
  for (const [name, values] of Object.entries(nan)) {
    expect([values[0], values[2]], name).toEqual([plain[name][0], plain[name][2]]);
    expect(values[1], name).toBe(name === 'agree' || name === 'correct' ? 0 : Number.NaN);
  }
  for (const at of [0, 3000, 4999]) {
    const { row, agree, correct, crossEntropy } = await ofNumbers(head.with(at, Number.NaN), [1], [1], [3]);
    expect([row[0], agree[0], correct[0], crossEntropy[0]], `NaN at ${at}`).toEqual([Number.NaN, 0, 0, Number.NaN]);
  }
});

test('of equal logits the first is the prediction', async () => {
  const ties = [
    [5, 6],
    [4, 2048],
    [2047, 2048],
    [3, 4096],
    [4095, 4100],
    [0, 4999],
    [2050, 4098, 4999],
  ];
  for (const at of ties) {
    const head = Array.from({ length: 5000 }, (_, i) => (at.includes(i) ? 1 : 0.25 * Math.sin(i)));
    const { correct } = await ofNumbers(
      head,
      at.map(() => 1),
      at.map(() => 1),
      at,
    );
    expect([...correct], `${at}`).toEqual(at.map((_, i) => (i === 0 ? 1 : 0)));
    // A teacher that prefers the last of them.
    const hidden = head.map((x, i) => (i === at.at(-1) ? x + 1 : x));
    using w = Tensor.fromData('f32', [5000, 2], Float32Array.from(head.flatMap((x, i) => [x, hidden[i]])));
    const g = new Graph();
    const [hs, ht] = [g.feed('hs', 'f32', [2, 2]), g.feed('ht', 'f32', [2, 2])];
    g.output('agree', divergence(hs, ht, g.weight(w), g.feed('weight', 'f32', [2])).agree);
    using program = Program.compile(g, testEngine());
    const weight = Float32Array.of(1, 1);
    const { outputs } = await program.run({
      feeds: { hs: Float32Array.of(1, 0, 1, 0), ht: Float32Array.of(0, 1, 1, 0), weight },
    });
    expect([...outputs.agree], `${at}`).toEqual([0, 1]);
  }
});

test('identical hidden states have no divergence, no gradient and agree, exactly', async () => {
  const make = inputs(11);
  const hidden = make.values(
    Array.from({ length: 9 }, () => 40 * make.next() - 20),
    9,
  ).data;
  for (const v of [33, 9001]) {
    const head = Array.from({ length: v }, () => 2 * make.next() - 1);
    const all = await ofNumbers(head, hidden, hidden, new Array(9).fill(-1));
    for (const name of ['row', 'reverse', 'jsd']) expect([...all[name]], name).toEqual(new Array(9).fill(0));
    expect([...all.agree]).toEqual(new Array(9).fill(1));
    for (const name of ['dkl', 'dreverse', 'djsd'])
      expect(
        [...all[name]].every((d) => d === 0),
        name,
      ).toBe(true);
  }
});

test('a target past the vocabulary, or below -1, is InvalidData', async () => {
  using w = Tensor.fromData('f32', [5, 2], new Float32Array(10));
  const h = new Float32Array(4);
  for (const target of [5, -2, 0x7fffffff]) {
    const feeds = { h, weight: Float32Array.of(1, 1), targets: Int32Array.of(0, target) };
    for (const op of ['cross_entropy', 'divergence']) {
      const error = await failure(
        (g) => {
          const [x, weight] = [g.feed('h', 'f32', [2, 2]), g.feed('weight', 'f32', [2])];
          const targets = g.feed('targets', 'i32', [2]);
          if (op === 'cross_entropy') g.output('loss', crossEntropy(x, g.weight(w), targets, weight).loss);
          else g.output('ce', divergence(x, x, g.weight(w), weight, { targets }).ce!);
        },
        { feeds },
      );
      expect(error, `${op} ${target}`).toMatchObject({ code: 'InvalidData' });
      expect(error.message).toContain(op);
    }
  }
});

test('divergence gives no gradient to its heads, and says so', async () => {
  for (const other of [false, true]) {
    const error = await failure((g) => {
      const w = g.state(Tensor.alloc('f32', [5, 2]));
      const frozen = g.weight(Tensor.fromData('f32', [5, 2], new Float32Array(10)));
      const h = g.feed('h', 'f32', [2, 2]);
      const weight = g.feed('weight', 'f32', [2]);
      const { loss } = other ? divergence(h, h, frozen, weight, { wt: w }) : divergence(h, h, w, weight);
      gradients(loss, [w]);
    });
    expect(error).toMatchObject({ code: 'InvalidArgument' });
    expect(error.message).toContain('[divergence] its head has no gradient');
  }
});

test('divergence refuses a teacher of another width without a head, and shares that are none', async () => {
  const refused = (width: number, beta: number) =>
    failure(
      (g) => {
        const w = g.weight(Tensor.fromData('f32', [5, 3], new Float32Array(15)));
        const [hs, ht] = [g.feed('hs', 'f32', [2, 2]), g.feed('ht', 'f32', [2, width])];
        g.output('loss', divergence(hs, ht, w, g.feed('weight', 'f32', [2]), { kind: 'jsd', beta }).loss);
      },
      { feeds: { hs: new Float32Array(4), ht: new Float32Array(2 * width), weight: new Float32Array(2) } },
    );
  expect((await refused(3, 0.5)).message).toContain('[divergence] ht must be as wide as hs, 2, or have a wt, got 3');
  for (const beta of [0, 1, -0.5, 1 - 1e-12]) {
    expect(await refused(2, beta)).toMatchObject({ code: 'InvalidProgram', message: expect.stringContaining('beta') });
  }
});
