// distill_kl and cross_entropy.
import { expect, test } from 'vitest';
import { crossEntropy, distillKl, gradients, scale } from '../../lib/graph/index.js';
import { type DType, Tensor } from '../../lib/native/index.js';
import { type Case, cases, checkNative, failure, inputs } from './harness.js';

const sizes = [
  [1, 3, 2],
  [3, 17, 33],
  [33, 65, 3],
  [70, 33, 8],
  [5, 600, 17],
] as const;

/** Targets below `v`, every third missing. */
const targetsOf = (make: ReturnType<typeof inputs>, r: number, v: number) =>
  make.i32(
    Array.from({ length: r }, (_, i) => (i % 3 === 2 ? -1 : Math.floor(make.next() * v))),
    ['R', r],
  );

cases('distill_kl', [
  ...sizes.flatMap(([r, v, k]) =>
    [true, false].map((withTargets): Case => {
      const make = inputs(r + v);
      return {
        name: `${r} rows, vocabulary ${v}, width ${k}${withTargets ? ', targets' : ''}`,
        inputs: {
          hs: make.f32(['R', r], k),
          ht: make.f32(['R', r], k),
          w: make.weight('f32', v, k),
          weight: make.f32(['R', r]),
          ...(withTargets ? { targets: targetsOf(make, r, v) } : {}),
        },
        build: ({ hs, ht, w, weight, targets }) => {
          const { loss, row, agree, ce } = distillKl(hs, ht, w, weight, targets ?? null);
          return { loss, row, agree, ...(ce ? { ce } : {}) };
        },
        wrt: ['hs', 'weight'],
        tolerance: 5e-5,
      };
    }),
  ),
  ...(['bf16', 'f16'] as DType[]).map((dtype): Case => {
    const make = inputs(9);
    return {
      name: `${dtype} head, of which a prefix of columns, and a scaled loss`,
      inputs: {
        hs: make.f32(['R', 9], 19),
        ht: make.f32(['R', 9], 19),
        w: make.weight(dtype, 50, 24),
        weight: make.f32(['R', 9]),
        s: make.f32(1),
      },
      build: ({ hs, ht, w, weight, s }) => ({ loss: scale(distillKl(hs, ht, w, weight).loss, 0.5, s) }),
      wrt: ['hs', 's'],
      tolerance: 5e-5,
    };
  }),
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

test('identical hidden states have no divergence and agree', async () => {
  const make = inputs(11);
  const c: Case = {
    name: 'equal',
    inputs: { h: make.f32(['R', 9], 17), w: make.weight('f32', 33, 17), weight: make.f32(['R', 9]) },
    build: ({ h, w, weight }) => {
      const { loss, row, agree } = distillKl(h, scale(h, 1), w, weight);
      return { loss, row, agree };
    },
    tolerance: 1e-6,
  };
  await checkNative(c);
});

test('a target past the vocabulary, or below -1, is InvalidData', async () => {
  using w = Tensor.fromData('f32', [5, 2], new Float32Array(10));
  const h = new Float32Array(4);
  for (const target of [5, -2, 0x7fffffff]) {
    const feeds = { h, weight: Float32Array.of(1, 1), targets: Int32Array.of(0, target) };
    for (const op of ['cross_entropy', 'distill_kl']) {
      const error = await failure(
        (g) => {
          const [x, weight] = [g.feed('h', 'f32', [2, 2]), g.feed('weight', 'f32', [2])];
          const targets = g.feed('targets', 'i32', [2]);
          if (op === 'cross_entropy') g.output('loss', crossEntropy(x, g.weight(w), targets, weight).loss);
          else g.output('ce', distillKl(x, x, g.weight(w), weight, targets).ce!);
        },
        { feeds },
      );
      expect(error, `${op} ${target}`).toMatchObject({ code: 'InvalidData' });
      expect(error.message).toContain(op);
    }
  }
});

test('distill_kl gives no gradient to its head, and says so', async () => {
  const error = await failure((g) => {
    const w = g.state(Tensor.alloc('f32', [5, 2]));
    const h = g.feed('h', 'f32', [2, 2]);
    gradients(distillKl(h, h, w, g.feed('weight', 'f32', [2])).loss, [w]);
  });
  expect(error).toMatchObject({ code: 'InvalidArgument' });
  expect(error.message).toContain('[distill_kl] w has no gradient');
});
