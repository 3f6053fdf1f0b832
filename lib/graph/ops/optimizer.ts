// Ops that write to state tensors: gradient accumulation and the optimizer step.
import { InvalidArgumentError } from '../../native/errors.js';
import { boundOf } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';

const accumulateOp = defineOp('accumulate', 'state!:f32[P] x:f32[*X] ->', ['offset', 'stride']);

/**
 * `state[offset + r stride...] += x[r]` for every row r of x, along its last axis: state f32 [P], x f32 of any shape that fits.
 * By default rows lie end to end, when they have as many elements as they can have.
 */
export function accumulate(state: Node, x: Node, offset: number, stride = boundOf(x.shape.at(-1)!)): void {
  const size = x.shape.reduce<number>((product, s) => product * boundOf(s), 1);
  const width = boundOf(x.shape.at(-1)!);
  const rows = size / width;
  const room = boundOf(state.shape[0]);
  const end = offset + (rows - 1) * stride + width;
  if (!Number.isInteger(offset) || offset < 0 || end > room) {
    throw new InvalidArgumentError(`[accumulate] ${size} elements at offset ${offset} do not fit a state of ${room}`);
  }
  if (!Number.isInteger(stride) || (rows > 1 && stride < width)) {
    throw new InvalidArgumentError(`[accumulate] the stride of rows of ${width} must be at least that, got ${stride}`);
  }
  accumulateOp.apply([state, x], [offset, stride]);
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
