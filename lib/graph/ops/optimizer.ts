// Ops that write to state tensors: gradient accumulation and the optimizer step.
import { InvalidArgumentError } from '../../native/errors.js';
import { boundOf } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';

const accumulateOp = defineOp('accumulate', 'state!:f32[P] x:f32[*X] ->', ['offset']);

/** `state[offset...] += x`: state f32 [P], x f32 of any shape that fits. */
export function accumulate(state: Node, x: Node, offset: number): void {
  const size = x.shape.reduce<number>((product, s) => product * boundOf(s), 1);
  const room = boundOf(state.shape[0]);
  if (!Number.isInteger(offset) || offset < 0 || offset + size > room) {
    throw new InvalidArgumentError(`[accumulate] ${size} elements at offset ${offset} do not fit a state of ${room}`);
  }
  accumulateOp.apply([state, x], [offset]);
}

const adamwOp = defineOp('adamw', 'p!:f32[P] g!:f32[P] m!:f32[P] v!:f32[P] hyper:f32[8] -> grad_norm:f32[1]', [
  'decay_count',
]);

/**
 * One AdamW step on p with the gradient g, which is set to 0; m and v are the moments; all state f32 [P]. `hyper` f32
 * [8]: lr, beta1, beta2, eps, weight decay, clip norm (0: off), 1 - beta1^t, 1 - beta2^t. Decay applies to the first
 * `decayCount` elements. Returns the gradient's norm before clipping, f32 [1]; when it is not finite nothing but g changes.
 */
export function adamw(p: Node, g: Node, m: Node, v: Node, hyper: Node, decayCount: number): Node {
  return adamwOp.apply([p, g, m, v, hyper], [decayCount])[0]!;
}
