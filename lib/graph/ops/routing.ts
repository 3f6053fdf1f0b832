// Routing: which rows of every segment enter a sub-layer, their gates, and what trains the router.
import { InvalidArgumentError } from '../../native/errors.js';
import { boundOf } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';

/** Rows that were selected, i32 [R] ascending, and where every segment starts among them, i32 [S + 1]. */
export interface Routed {
  rows: Node;
  offsets: Node;
}

const routeTopkOp = defineOp(
  'route_topk',
  'z:f32[N,1] offsets:i32[O] capacity:f32[S] -> rows:i32[+R] row_offsets:i32[O]',
);

/**
 * The `ceil(capacity_s * T_s)` rows of every segment with the largest score: z f32 [N, 1], offsets i32 [S + 1],
 * capacity f32 [S] from 0 to 1. Ties go to the lowest index.
 */
export function routeTopk(z: Node, offsets: Node, capacity: Node): Routed {
  return routed(routeTopkOp, [z, offsets, capacity]);
}

const routeThresholdOp = defineOp(
  'route_threshold',
  'z:f32[N,1] offsets:i32[O] threshold:f32[S] -> rows:i32[+R] row_offsets:i32[O]',
);

/** The rows with `z > threshold_s`: z f32 [N, 1], offsets i32 [S + 1], threshold f32 [S] (minus infinity: all rows). */
export function routeThreshold(z: Node, offsets: Node, threshold: Node): Routed {
  return routed(routeThresholdOp, [z, offsets, threshold]);
}

/** What an op selects of the rows of its first operand. */
export function routed(
  op: typeof routeTopkOp,
  operands: readonly [Node, ...Node[]],
  attrs: readonly number[] = [],
): Routed {
  const [z] = operands;
  const dim = z.graph.producedDim('rows', boundOf(z.shape[0]));
  const [rows, offsets] = op.apply(operands, attrs, { bind: { R: dim } });
  return { rows: rows!, offsets: offsets! };
}

/** How a score becomes a gate. 0 straight-through: value 1, gradient of log sigmoid; 1 sigmoid; 2 twice sigmoid. */
export type GateModeCode = 0 | 1 | 2;

const gateOp = defineOp('gate', 'z:f32[N,1] rows:i32[R] -> g:f32[R]', ['mode'], {
  gradient({ inputs: [z, rows], attrs, dy, add }) {
    add(0, gateGradOp.apply([dy, z, rows], attrs)[0]!);
  },
});

const gateGradOp = defineOp('gate_grad', 'dg:f32[R] z:f32[N,1] rows:i32[R] -> dz:f32[N,1]', ['mode']);

/** Gates of the selected rows: z f32 [N, 1], rows i32 [R]. Returns f32 [R]. */
export function gate(z: Node, rows: Node, mode: GateModeCode): Node {
  if (mode !== 0 && mode !== 1 && mode !== 2)
    throw new InvalidArgumentError(`[gate] mode must be 0, 1 or 2, got ${mode}`);
  return gateOp.apply([z, rows], [mode])[0]!;
}

const topkBceOp = defineOp('topk_bce', 'z:f32[N,1] rows:i32[R] -> loss:f32[1]', [], {
  gradient({ inputs: [z, rows], dy, add }) {
    add(0, topkBceGradOp.apply([dy, z, rows])[0]!);
  },
});

const topkBceGradOp = defineOp('topk_bce_grad', 'dloss:f32[1] z:f32[N,1] rows:i32[R] -> dz:f32[N,1]');

/**
 * Mean over all rows of the binary cross-entropy of sigmoid(z) against "the row was selected": z f32 [N, 1], rows
 * i32 [R]. Returns f32 [1].
 */
export function topkBce(z: Node, rows: Node): Node {
  return topkBceOp.apply([z, rows])[0]!;
}

const topkCreditOp = defineOp(
  'topk_credit',
  'dy:f32[N,D] before:f32[N,D] after:f32[N,D] z:f32[N,1] offsets:i32[O] row_offsets:i32[O] weight:f32[N] -> ' +
    'dz:f32[N,1]',
);

/**
 * Straight-through estimate of the gradient of router scores through the choice of rows itself: what `routeTopk` has no
 * gradient for. `dy . (after - before)` is the first-order change of the loss when a row enters; scaled to a mean
 * magnitude of 1 per segment, it is the slope with which a soft top-k, a sigmoid around the threshold that keeps the
 * same number of rows, moves the scores. Rows near the threshold move most, and what one gains the others lose.
 *
 * A segment gets zeros when none or all of its rows were selected, when no row changes the loss, and where the sigmoid
 * is flat everywhere (scores so far from the threshold that every slope underflows).
 *
 * @param dy f32 [N, D], gradient of the loss with respect to the output of the sub-layer.
 * @param before f32 [N, D], the output when a row does not enter.
 * @param after f32 [N, D], the output when it does.
 * @param z f32 [N, 1], scores; NaN is InvalidData.
 * @param offsets i32 [S + 1] of the N rows.
 * @param rowOffsets i32 [S + 1]: `rowOffsets[s + 1] - rowOffsets[s]` rows of segment s were selected.
 * @param weight f32 [N], factor of every row's gradient.
 * @returns f32 [N, 1]; no gradient flows through it.
 */
export function topkCredit(
  dy: Node,
  before: Node,
  after: Node,
  z: Node,
  offsets: Node,
  rowOffsets: Node,
  weight: Node,
): Node {
  return topkCreditOp.apply([dy, before, after, z, offsets, rowOffsets, weight])[0]!;
}
