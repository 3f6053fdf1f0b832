// Losses over a vocabulary product that is never held whole, and distances between residual streams.
import { InvalidArgumentError } from '../../native/errors.js';
import { sameShape } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp, type GradientRule } from '../op.js';
import { scale } from './elementwise.js';
import { type DivergenceKind, divergenceKinds } from './names.js';

/** Hands the gradient that a loss has computed, and its rows, to hidden states and row weights; heads are frozen. */
const lossGradient =
  (op: string, heads: readonly number[], weight: number): GradientRule =>
  ({ outputs: [, row, dh], dy, needs, add }) => {
    if (heads.some((i) => needs(i))) {
      throw new InvalidArgumentError(
        `[${op}] its head has no gradient: pass it through stopGradient or train it otherwise`,
      );
    }
    if (needs(0)) add(0, scale(dh!, 1, dy));
    if (needs(weight)) add(weight, scale(row!, 1, dy));
  };

const divergenceOp = defineOp(
  'divergence',
  'hs:f32[R,K] ht:f32[R,J] w:w[V,K<] weight:f32[R] targets?:i32[R] wt?:w[V,J<] -> loss:f32[1] row?:f32[R] ' +
    'dh?:f32[R,K] agree?:f32[R] ce?:f32[R]',
  ['kind', 'beta', 'softcap', 'teacher_softcap'],
  // The teacher is given: its hidden states get no gradient.
  { constant: ['ht'], gradient: lossGradient('divergence', [2, 5], 3) },
);

export interface DivergenceOptions {
  /** Default `kl`: of the student from the teacher, KL(p || q). */
  kind?: DivergenceKind;
  /** The teacher's share of the mixture of `jsd`, between 0 and 1; default 0.5. */
  beta?: number;
  /** i32 [R], -1: none. */
  targets?: Node | null;
  /** The teacher's head [V, J]; default: the student's. */
  wt?: Node | null;
  /** c > 0: logits x of the student, or of the teacher, become c tanh(x / c). Default 0: they do not. */
  softcap?: number;
  teacherSoftcap?: number;
}

export interface Divergence {
  /** f32 [1]: `sum weight[r] row[r]`. The only output that carries a gradient. */
  loss: Node;
  /** f32 [R]: divergence of the student from the teacher, nats. */
  row: Node;
  /** f32 [R]: 1 where student and teacher have the same argmax. */
  agree: Node;
  /** f32 [R]: the student's cross-entropy against `targets`, 0 where the target is -1; null without targets. */
  ce: Node | null;
}

/**
 * Divergence between the next-token distributions of a student, hs f32 [R, K] with head w [V, K], and a teacher, ht
 * f32 [R, J] with head `wt` [V, J]; weight f32 [R].
 */
export function divergence(
  hs: Node,
  ht: Node,
  w: Node,
  weight: Node,
  { kind = 'kl', beta = 0.5, targets = null, wt = null, softcap = 0, teacherSoftcap = 0 }: DivergenceOptions = {},
): Divergence {
  const without = targets ? [] : ['ce'];
  const attributes = [divergenceKinds.indexOf(kind), beta, softcap, teacherSoftcap];
  const [loss, row, , agree, ce] = divergenceOp.apply([hs, ht, w, weight, targets, wt], attributes, { without });
  return { loss: loss!, row: row!, agree: agree!, ce };
}

const topLogitsOp = defineOp('top_logits', 'h:f32[R,K] w:w[V,K<] -> ids:i32[R,T] logp:f32[R,T] rest:f32[R]', [
  'softcap',
]);

/** The largest logits of every row, and what is left. */
export interface TopLogits {
  /** i32 [R, T], ascending; of equal logits the first. */
  ids: Node;
  /** f32 [R, T]: their log-probabilities, nats. */
  logp: Node;
  /** f32 [R]: logarithm of the probability of all other ids. */
  rest: Node;
}

/**
 * The `count` largest of `h w^T`, a few rows at a time: h f32 [R, K], w [V, K], softcap as in `divergence`. No gradient
 * flows through it.
 */
export function topLogits(h: Node, w: Node, count: number, softcap = 0): TopLogits {
  const [ids, logp, rest] = topLogitsOp.apply([h, w], [softcap], { bind: { T: count } });
  return { ids: ids!, logp: logp!, rest: rest! };
}

const topkDivergenceOp = defineOp(
  'topk_divergence',
  'hs:f32[R,K] w:w[V,K<] ids:i32[R,T] logp:f32[R,T] rest:f32[R] weight:f32[R] -> loss:f32[1] row?:f32[R] ' +
    'dh?:f32[R,K]',
  ['kind', 'softcap'],
  { constant: ['logp', 'rest'], gradient: lossGradient('topk_divergence', [1], 5) },
);

/**
 * Divergence of a student, hs f32 [R, K] with head w [V, K], from a teacher of which the largest probabilities are
 * known, on those ids and one bucket for all others; weight f32 [R]. `loss` f32 [1] carries a gradient, `row` is f32 [R].
 * softcap as in `divergence`, of the student.
 */
export function topkDivergence(
  hs: Node,
  w: Node,
  { ids, logp, rest }: TopLogits,
  weight: Node,
  kind: 'kl' | 'reverse-kl' = 'kl',
  softcap = 0,
): { loss: Node; row: Node } {
  const attributes = [divergenceKinds.indexOf(kind), softcap];
  const [loss, row] = topkDivergenceOp.apply([hs, w, ids, logp, rest, weight], attributes);
  return { loss: loss!, row: row! };
}

/** Distances between rows of residual streams, in the order of the native code. */
export const hiddenDistances = ['mse', 'cosine'] as const;

const hiddenDistanceOp = defineOp(
  'hidden_distance',
  'x:f32[R,D] y:f32[R,D] weight:f32[R] -> loss:f32[1] row?:f32[R] dx?:f32[R,D]',
  ['kind'],
  { constant: ['y'], gradient: lossGradient('hidden_distance', [], 2) },
);

/**
 * `mean (x - y)^2` or `1 - cos(x, y)` of every row: x and y f32 [R, D], weight f32 [R]; y gets no gradient. `loss`
 * f32 [1] is `sum weight[r] row[r]` and carries a gradient, `row` is f32 [R].
 */
export function hiddenDistance(
  x: Node,
  y: Node,
  weight: Node,
  kind: (typeof hiddenDistances)[number],
): { loss: Node; row: Node } {
  const [loss, row] = hiddenDistanceOp.apply([x, y, weight], [hiddenDistances.indexOf(kind)]);
  return { loss: loss!, row: row! };
}

const crossEntropyOp = defineOp(
  'cross_entropy',
  'h:f32[R,K] w:w[V,K<] targets:i32[R] weight:f32[R] -> loss:f32[1] row?:f32[R] dh?:f32[R,K] ' +
    'dw?:f32[V,K] correct?:f32[R]',
  ['softcap'],
  {
    gradient({ inputs: [, w], outputs: [, row, dh, dw], dy, needs, add }) {
      if (needs(0)) add(0, scale(dh!, 1, dy));
      if (needs(1)) {
        if (!sameShape(dw!.shape, w!.shape)) {
          throw new InvalidArgumentError('[cross_entropy] the gradient of w needs all of its columns to be used');
        }
        add(1, scale(dw!, 1, dy));
      }
      if (needs(3)) add(3, scale(row!, 1, dy));
    },
  },
);

export interface CrossEntropy {
  /** f32 [1]: `sum weight[r] row[r]`. The only output that carries a gradient. */
  loss: Node;
  /** f32 [R]: `-log p(target)`, nats, 0 where the target is -1. */
  row: Node;
  /** f32 [R]: 1 where the target has the largest logit. */
  correct: Node;
}

/**
 * Cross-entropy of `softmax(h w^T)`: h f32 [R, K], w [V, K], targets i32 [R] (-1: none), weight f32 [R], softcap as in
 * `divergence`.
 */
export function crossEntropy(h: Node, w: Node, targets: Node, weight: Node, softcap = 0): CrossEntropy {
  const [loss, row, , , correct] = crossEntropyOp.apply([h, w, targets, weight], [softcap]);
  return { loss: loss!, row: row!, correct: correct! };
}
