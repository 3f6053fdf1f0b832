// Rotary position embedding.
import { InvalidArgumentError } from '../../native/errors.js';
import { boundOf } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';

const ropeOp = defineOp(
  'rope',
  'x:f32[R,D] positions:i32[R] inv_freq:w[F] -> y:f32[R,D]',
  ['head_dim', 'sign', 'magnitude'],
  {
    constant: ['inv_freq'],
    // The transpose of a rotation turns the other way.
    gradient({ inputs: [, positions, invFreq], attrs: [headDim, sign, magnitude], dy, add }) {
      add(0, ropeOp.apply([dy, positions, invFreq], [headDim, -sign, magnitude])[0]!);
    },
  },
);

export interface RopeOptions {
  headDim: number;
  /** Factor of the rotated features (attention scaling of some rope variants). */
  magnitude?: number;
}

/**
 * Rotates features (i, i + F) of every head by `positions[r] * invFreq[i]`: x f32 [R, heads * headDim], positions
 * i32 [R], invFreq [F] with 2 F <= headDim. Returns f32 of x's shape.
 */
export function rope(x: Node, positions: Node, invFreq: Node, { headDim, magnitude = 1 }: RopeOptions): Node {
  const [width, pairs] = [boundOf(x.shape[1] ?? 0), boundOf(invFreq.shape[0])];
  if (!(headDim > 0) || width % headDim !== 0 || 2 * pairs > headDim) {
    throw new InvalidArgumentError(
      `[rope] head_dim must divide the width of x and hold ${pairs} pairs, got head_dim ${headDim} and width ${width}`,
    );
  }
  return ropeOp.apply([x, positions, invFreq], [headDim, 1, magnitude])[0]!;
}
