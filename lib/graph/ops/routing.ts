// Routing: which rows of every segment enter a sub-layer, their gates, and the loss that makes a router causal.
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
  return route(routeTopkOp, z, offsets, capacity);
}

const routeThresholdOp = defineOp(
  'route_threshold',
  'z:f32[N,1] offsets:i32[O] threshold:f32[S] -> rows:i32[+R] row_offsets:i32[O]',
);

/** The rows with `z > threshold_s`: z f32 [N, 1], offsets i32 [S + 1], threshold f32 [S] (minus infinity: all rows). */
export function routeThreshold(z: Node, offsets: Node, threshold: Node): Routed {
  return route(routeThresholdOp, z, offsets, threshold);
}

function route(op: typeof routeTopkOp, z: Node, offsets: Node, perSegment: Node): Routed {
  const rows = z.graph.producedDim('rows', boundOf(z.shape[0]));
  const [selected, rowOffsets] = op.apply([z, offsets, perSegment], [], { bind: { R: rows } });
  return { rows: selected!, offsets: rowOffsets! };
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
