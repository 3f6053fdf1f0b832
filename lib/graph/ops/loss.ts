// Losses over a vocabulary product that is never held whole: distillation and cross-entropy.
import { InvalidArgumentError } from '../../native/errors.js';
import { sameShape } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';
import { scale } from './elementwise.js';

const distillKlOp = defineOp(
  'distill_kl',
  'hs:f32[R,K] ht:f32[R,K] w:w[V,K<] weight:f32[R] targets?:i32[R] -> loss:f32[1] row?:f32[R] ' +
    'dh?:f32[R,K] agree?:f32[R] ce?:f32[R]',
  [],
  {
    // The teacher is given: its hidden states get no gradient.
    constant: ['ht'],
    gradient({ outputs: [, row, dh], dy, needs, add }) {
      if (needs(2)) {
        throw new InvalidArgumentError(
          '[distill_kl] w has no gradient: pass it through stopGradient or train it otherwise',
        );
      }
      if (needs(0)) add(0, scale(dh!, 1, dy));
      if (needs(3)) add(3, scale(row!, 1, dy));
    },
  },
);

export interface DistillKl {
  /** f32 [1]: `sum weight[r] row[r]`. The only output that carries a gradient. */
  loss: Node;
  /** f32 [R]: KL of the student from the teacher, nats. */
  row: Node;
  /** f32 [R]: 1 where student and teacher have the same argmax. */
  agree: Node;
  /** f32 [R]: the student's cross-entropy against `targets`, 0 where the target is -1; null without targets. */
  ce: Node | null;
}

/**
 * Forward KL between the next-token distributions of a teacher and a student that share one head: student hs and
 * teacher ht f32 [R, K], head w [V, K], weight f32 [R], targets i32 [R] (-1: none).
 */
export function distillKl(hs: Node, ht: Node, w: Node, weight: Node, targets: Node | null = null): DistillKl {
  const without = targets ? [] : ['ce'];
  const [loss, row, , agree, ce] = distillKlOp.apply([hs, ht, w, weight, targets], [], { without });
  return { loss: loss!, row: row!, agree: agree!, ce };
}

const crossEntropyOp = defineOp(
  'cross_entropy',
  'h:f32[R,K] w:w[V,K<] targets:i32[R] weight:f32[R] -> loss:f32[1] row?:f32[R] dh?:f32[R,K] ' +
    'dw?:f32[V,K] correct?:f32[R]',
  [],
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

/** Cross-entropy of `softmax(h w^T)`: h f32 [R, K], w [V, K], targets i32 [R] (-1: none), weight f32 [R]. */
export function crossEntropy(h: Node, w: Node, targets: Node, weight: Node): CrossEntropy {
  const [loss, row, , , correct] = crossEntropyOp.apply([h, w, targets, weight]);
  return { loss: loss!, row: row!, correct: correct! };
}
