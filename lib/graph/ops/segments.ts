// Whole segments: sums and means over their rows, values handed to all rows, and what was decided of them before.
import type { Dim } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';

const segmentSumOp = defineOp('segment_sum', 'x:f32[N,D] offsets:i32[O] -> y:f32[S,D]', ['most', 'mean'], {
  gradient({ inputs: [x, offsets], attrs, dy, add }) {
    const bind = { N: x!.shape[0] };
    add(0, segmentBroadcastOp.apply([dy, offsets], attrs, { bind })[0]!);
  },
});

const segmentBroadcastOp = defineOp('segment_broadcast', 'x:f32[S,D] offsets:i32[O] -> y:f32[N,D]', ['most', 'mean'], {
  gradient({ inputs: [x, offsets], attrs, dy, add }) {
    const bind = { S: x!.shape[0] };
    add(0, segmentSumOp.apply([dy, offsets], attrs, { bind })[0]!);
  },
});

/**
 * Mean over the rows of every segment, or its first `most` rows; 0 of an empty one: x f32 [N, D], offsets i32 [S + 1].
 * Rows are summed in their order. Returns f32 [S, D].
 */
export function segmentMean(
  x: Node,
  offsets: Node,
  segments: Dim | number,
  { most = 0 }: { most?: number } = {},
): Node {
  return segmentSumOp.apply([x, offsets], [most, 1], { bind: { S: segments } })[0]!;
}

/** The values of its segment for every row: x f32 [S, D], offsets i32 [S + 1]. Returns f32 [N, D]. */
export function segmentBroadcast(x: Node, offsets: Node, rows: Dim | number): Node {
  return segmentBroadcastOp.apply([x, offsets], [0, 0], { bind: { N: rows } })[0]!;
}

const latchOp = defineOp('latch', 'x:f32[*X] held:f32[*X] -> y:f32[*X]');

/** What is held, and x where that is NaN: f32 of one shape. No gradient flows through it. */
export function latch(x: Node, held: Node): Node {
  return latchOp.apply([x, held])[0]!;
}
