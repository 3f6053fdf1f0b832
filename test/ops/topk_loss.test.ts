// top_logits and topk_divergence.
import { describe, expect, test } from 'vitest';
import { Graph, gradients, Program, type TopLogits, topkDivergence, topLogits } from '../../lib/graph/index.js';
import { type DType, Tensor } from '../../lib/native/index.js';
import { type Case, cases, compare, failure, inputs, testEngine } from './harness.js';

const sizes = [
  // Rows, vocabulary, width, largest.
  [1, 3, 2, 3],
  [3, 17, 33, 1],
  [33, 65, 3, 7],
  [5, 600, 17, 513],
  [2, 4099, 3, 64],
  [140, 9, 3, 4],
] as const;

cases(
  'top_logits',
  sizes.map(([r, v, k, t], i): Case => {
    const make = inputs(r + v);
    return {
      name: `${t} of ${v}, ${r} rows, width ${k}`,
      inputs: { h: make.f32(['R', r], k), w: make.weight((['f32', 'bf16', 'f16'] as DType[])[i % 3], v, k + (i % 2)) },
      build: ({ h, w }) => ({ ...topLogits(h, w, t) }),
      tolerance: 5e-5,
      narrowTolerance: 5e-5,
    };
  }),
);

/** Ascending ids of every row, and log-probabilities that with the rest add up to about 1. */
function given(make: ReturnType<typeof inputs>, r: number, v: number, t: number) {
  const [ids, logp, rest]: number[][] = [[], [], []];
  for (let i = 0; i < r; ++i) {
    const all = Array.from({ length: v }, (_, id) => ({ id, at: make.next() })).sort((a, b) => a.at - b.at);
    ids.push(
      ...all
        .slice(0, t)
        .map(({ id }) => id)
        .sort((a, b) => a - b),
    );
    // Nothing is left of a vocabulary that is known whole.
    const shares = Array.from({ length: t + 1 }, (_, k) => (k === v ? 0 : 0.05 + make.next()));
    const logs = shares.map((share) => Math.log(share / shares.reduce((a, b) => a + b)) + 0.01 * make.next());
    logp.push(...logs.slice(0, t));
    rest.push(logs[t]);
  }
  return { ids: make.i32(ids, ['R', r], t), logp: make.values(logp, ['R', r], t), rest: make.values(rest, ['R', r]) };
}

cases(
  'topk_divergence',
  sizes.flatMap(([r, v, k, t], i) =>
    (['kl', 'reverse-kl'] as const).map((kind): Case => {
      const make = inputs(r + v);
      return {
        name: `${kind}: ${t} of ${v}, ${r} rows, width ${k}`,
        inputs: {
          hs: make.f32(['R', r], k),
          w: make.weight((['f32', 'bf16', 'f16'] as DType[])[i % 3], v, k + (i % 2)),
          weight: make.f32(['R', r]),
          ...given(make, r, v, t),
        },
        build: ({ hs, w, weight, ids, logp, rest }) => ({
          ...topkDivergence(hs, w, { ids, logp, rest }, weight, kind),
        }),
        wrt: ['hs', 'weight'],
        tolerance: 5e-5,
        narrowTolerance: 0.03,
      };
    }),
  ),
);

/** The largest logits of numbers times a head, and both divergences from them of students that are numbers too. */
async function ofNumbers(head: readonly number[], hs: readonly number[], ht: readonly number[], count: number) {
  const r = hs.length;
  using w = Tensor.fromData('f32', [head.length, 1], Float32Array.from(head));
  const g = new Graph();
  const [student, teacher] = [g.feed('hs', 'f32', [r, 1]), g.feed('ht', 'f32', [r, 1])];
  const weight = g.feed('weight', 'f32', [r]);
  const top = topLogits(teacher, g.weight(w), count);
  for (const name of ['ids', 'logp', 'rest'] as const) g.output(name, top[name]);
  for (const kind of ['kl', 'reverse-kl'] as const) {
    const { loss, row } = topkDivergence(student, g.weight(w), top, weight, kind);
    g.output(kind, row);
    g.output(`d ${kind}`, gradients(loss, [student])[0]);
  }
  using program = Program.compile(g, testEngine());
  const feeds = { hs: Float32Array.from(hs), ht: Float32Array.from(ht), weight: new Float32Array(r).fill(1) };
  return (await program.run({ feeds })).outputs;
}

describe('top_logits', () => {
  test('of equal logits the first, of both zeros too', async () => {
    const ties = Array.from({ length: 1500 }, (_, i) => (i % 3 === 0 ? 1 : i % 3 === 1 ? -0 : 0));
    const { ids } = await ofNumbers(ties, [1, 1], [1, -1], 502);
    const ones = Array.from({ length: 500 }, (_, i) => 3 * i);
    expect([...ids.slice(0, 502)]).toEqual([...ones, 1, 2].sort((a, b) => a - b));
    expect([...ids.slice(502)]).toEqual(Array.from({ length: 502 }, (_, i) => Math.floor(i / 2) * 3 + 1 + (i % 2)));
  });

  test('takes logits of -inf, and NaN, last', async () => {
    const inf = Number.POSITIVE_INFINITY;
    const { ids, logp, rest } = await ofNumbers([-inf, 2, -inf, 2, -inf], [1], [1], 3);
    expect([...ids]).toEqual([0, 1, 3]);
    const least = Math.log(2 ** -126);
    compare(logp, [least, -Math.log(2), -Math.log(2)], 1e-6, 'logp');
    compare(rest, [least], 1e-6, 'rest');
    const nan = await ofNumbers([1, Number.NaN, 3, 2], [1, 1], [1, 0], 2);
    expect([...nan.ids]).toEqual([2, 3, 0, 2]);
    for (const name of ['logp', 'rest', 'kl', 'reverse-kl'])
      expect([...nan[name]].every(Number.isNaN), name).toBe(true);
  });

  test('of a vocabulary that is wanted whole nothing is left', async () => {
    const { ids, logp, rest, kl } = await ofNumbers([-900, -901, -903], [1], [1], 3);
    expect([...ids]).toEqual([0, 1, 2]);
    expect(Array.from(logp, Math.exp).reduce((a, b) => a + b)).toBeCloseTo(1, 5);
    compare(rest, [Math.log(2 ** -126)], 1e-6, 'rest');
    compare(kl, [0], 1e-6, 'kl');
  });
});

describe('topk_divergence', () => {
  test('of a student that is the teacher is 0 but for rounding, and so is its gradient', async () => {
    const make = inputs(3);
    const head = Array.from({ length: 3000 }, () => 4 * make.next() - 2);
    const all = await ofNumbers(head, [1, -3, 6], [1, -3, 6], 20);
    for (const name of ['kl', 'reverse-kl', 'd kl', 'd reverse-kl']) compare(all[name], [0, 0, 0], 2e-6, name);
  });

  test('logits as far apart as floats are do not overflow', async () => {
    const far = await ofNumbers([1e38, 0, -1e38], [1], [-1], 1);
    const least = Math.log(2 ** -126);
    expect([...far.ids]).toEqual([2]);
    compare(far.kl, [-least], 1e-5, 'kl');
    compare(far['reverse-kl'], [-least], 1e-5, 'reverse-kl');
  });

  const attempt = (ids: readonly number[], columns: number) =>
    failure(
      (g) => {
        const w = g.weight(Tensor.fromData('f32', [5, 2], new Float32Array(10)));
        const top: TopLogits = {
          ids: g.feed('ids', 'i32', [2, columns]),
          logp: g.feed('logp', 'f32', [2, columns]),
          rest: g.feed('rest', 'f32', [2]),
        };
        g.output('loss', topkDivergence(g.feed('h', 'f32', [2, 2]), w, top, g.feed('weight', 'f32', [2])).loss);
      },
      {
        feeds: {
          h: new Float32Array(4),
          ids: Int32Array.from(ids),
          logp: new Float32Array(2 * columns),
          rest: new Float32Array(2),
          weight: new Float32Array(2),
        },
      },
    );

  test.each([
    [[0, 1, 4, 5], 'ids[3] must be in [5, 5) (ascending, unique), got 5'],
    [[0, 1, -1, 2], 'ids[2] must be in [0, 5) (ascending, unique), got -1'],
    [[3, 3, 0, 1], 'ids[1] must be in [4, 5) (ascending, unique), got 3'],
    [[3, 1, 0, 1], 'ids[1] must be in [4, 5) (ascending, unique), got 1'],
  ])('ids %j are InvalidData', async (ids, message) => {
    expect(await attempt(ids, 2)).toMatchObject({ code: 'InvalidData', message: expect.stringContaining(message) });
  });

  test('more ids than the vocabulary has are InvalidProgram', async () => {
    const error = await attempt(new Array(12).fill(0), 6);
    expect(error).toMatchObject({ code: 'InvalidProgram' });
    expect(error.message).toContain('ids must have 1 to 5 columns');
  });
});
