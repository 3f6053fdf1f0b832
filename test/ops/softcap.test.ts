// softcap, and losses over a vocabulary whose logits are capped.
import { expect, test } from 'vitest';
import {
  crossEntropy,
  divergence,
  Graph,
  linear,
  Program,
  softcap,
  topkDivergence,
  topLogits,
} from '../../lib/graph/index.js';
import { Tensor } from '../../lib/native/index.js';
import { type Case, cases, compare, failure, inputs, testEngine } from './harness.js';

cases(
  'softcap',
  [0.5, 30].map((cap): Case => {
    const { next, values } = inputs(3);
    const wide = Array.from({ length: 3 * 33 }, (_, i) => (i < 4 ? [-1000, -80, 80, 1000][i] : (next() * 8 - 4) * 5));
    return {
      name: `cap ${cap}`,
      inputs: { x: values(wide, ['M', 3], 33) },
      build: ({ x }) => ({ y: softcap(x, cap) }),
      wrt: ['x'],
    };
  }),
);

const sizes = [
  [3, 17, 33],
  [33, 65, 3],
  [5, 600, 17],
] as const;
const factors = [
  [0.4, 0],
  [0, 0.7],
  [0.5, 0.2],
] as const;

cases(
  'divergence of capped logits',
  sizes.flatMap(([r, v, k], i) =>
    (['kl', 'reverse-kl', 'jsd'] as const).map((kind): Case => {
      const make = inputs(r + v);
      const [cap, teacherSoftcap] = factors[i];
      return {
        name: `${kind}: ${r} rows, vocabulary ${v}, caps ${cap} and ${teacherSoftcap}`,
        inputs: {
          hs: make.f32(['R', r], k),
          ht: make.f32(['R', r], i === 1 ? k + 2 : k),
          w: make.weight('f32', v, k),
          weight: make.f32(['R', r]),
          targets: make.ids(v, ['R', r]),
          ...(i === 1 ? { wt: make.weight('f32', v, k + 2) } : {}),
        },
        build: ({ hs, ht, w, weight, targets, wt }) => {
          const options = { kind, targets, wt, softcap: cap, teacherSoftcap };
          const { loss, row, ce } = divergence(hs, ht, w, weight, options);
          return { loss, row, ce: ce! };
        },
        wrt: ['hs', 'weight'],
        tolerance: 5e-5,
      };
    }),
  ),
);

cases(
  'cross_entropy and the largest of capped logits',
  sizes.map(([r, v, k]): Case => {
    const make = inputs(r * v);
    return {
      name: `${r} rows, vocabulary ${v}`,
      inputs: {
        h: make.f32(['R', r], k),
        w: make.param(v, k),
        weight: make.f32(['R', r]),
        targets: make.ids(v, ['R', r]),
      },
      build: ({ h, w, weight, targets }) => ({
        loss: crossEntropy(h, w, targets, weight, 0.6).loss,
        ...topLogits(h, w, 3, 0.6),
      }),
      wrt: ['h', 'w', 'weight'],
      tolerance: 5e-5,
      narrowTolerance: 0.03,
    };
  }),
);

cases(
  'topk_divergence of capped logits',
  (['kl', 'reverse-kl'] as const).map((kind): Case => {
    const make = inputs(7);
    const [r, v, k] = [4, 50, 9];
    return {
      name: kind,
      inputs: {
        hs: make.f32(['R', r], k),
        w: make.weight('f32', v, k),
        weight: make.f32(['R', r]),
        ids: make.i32(Array.from({ length: r }, () => [3, 17, 49]).flat(), ['R', r], 3),
        logp: make.values(
          Array.from({ length: r * 3 }, () => Math.log(0.2)),
          ['R', r],
          3,
        ),
        rest: make.values(new Array(r).fill(Math.log(0.4)), ['R', r]),
      },
      build: ({ hs, w, weight, ids, logp, rest }) => ({
        ...topkDivergence(hs, w, { ids, logp, rest }, weight, kind, 0.7),
      }),
      wrt: ['hs', 'weight'],
      tolerance: 5e-5,
      narrowTolerance: 0.03,
    };
  }),
);

test('losses see the logits that a capped head gives', async () => {
  const [r, v, k, cap] = [5, 40, 6, 0.8];
  const make = inputs(1);
  using head = Tensor.fromData('f32', [v, k], Float32Array.from(make.f32(v, k).data));
  const g = new Graph();
  const [h, w] = [g.feed('h', 'f32', [r, k]), g.weight(head)];
  g.output('logits', softcap(linear(h, w), cap));
  g.output('ce', crossEntropy(h, w, g.feed('targets', 'i32', [r]), g.feed('weight', 'f32', [r]), cap).row);
  using program = Program.compile(g, testEngine());
  const targets = Int32Array.from({ length: r }, (_, i) => 7 * i);
  const feeds = { h: Float32Array.from(make.f32(r, k).data), targets, weight: new Float32Array(r).fill(1) };
  const { outputs } = await program.run({ feeds });
  const expected = Array.from(targets, (target, i) => {
    const row = [...outputs.logits.subarray(i * v, (i + 1) * v)];
    expect(row.every((logit) => Math.abs(logit) < cap)).toBe(true);
    return Math.log(row.reduce((sum, logit) => sum + Math.exp(logit), 0)) - row[target];
  });
  compare(outputs.ce, expected, 1e-5, 'ce');
});

test.each([-1, 1e-50])('a cap of %s is refused', async (cap) => {
  const error = await failure(
    (g) => {
      g.output('y', softcap(g.feed('x', 'f32', [2]), cap));
    },
    { feeds: { x: new Float32Array(2) } },
  );
  expect(error).toMatchObject({ code: 'InvalidProgram' });
  expect(error.message).toContain('[softcap] attribute cap must be a positive number');
});
