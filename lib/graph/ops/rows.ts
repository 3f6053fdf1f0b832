// Gathers, scatters and reductions over rows.
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';
import { scale } from './elementwise.js';

const gatherRowsOp = defineOp('gather_rows', 'x:f32[N,D] rows:i32[R] -> y:f32[R,D]', [], {
  gradient({ inputs: [, rows], dy, add }) {
    add(0, dy, rows);
  },
});

/** `y[r] = x[rows[r]]`: x f32 [N, D], rows i32 [R] ascending and unique. Returns f32 [R, D]. */
export function gatherRows(x: Node, rows: Node): Node {
  return gatherRowsOp.apply([x, rows])[0]!;
}

const gatherIdsOp = defineOp('gather_ids', 'x:i32[N] rows:i32[R] -> y:i32[R]');

/** `y[r] = x[rows[r]]` of integers: x i32 [N], rows i32 [R]. Returns i32 [R]. */
export function gatherIds(x: Node, rows: Node): Node {
  return gatherIdsOp.apply([x, rows])[0]!;
}

const scatterAddOp = defineOp('scatter_add', 'acc:f32[N,D] x:f32[R,D] rows:i32[R] -> y:f32[N,D]', [], {
  gradient({ inputs: [, , rows], dy, needs, add }) {
    add(0, dy);
    if (needs(1)) add(1, gatherRows(dy, rows!));
  },
});

/** `acc` with `x[r]` added to row `rows[r]`: acc f32 [N, D], x f32 [R, D], rows i32 [R]. Returns f32 [N, D]. */
export function scatterAdd(acc: Node, x: Node, rows: Node): Node {
  return scatterAddOp.apply([acc, x, rows])[0]!;
}

const addRowsOp = defineOp('add_rows', 'residual:f32[N,D] x:f32[R|N,D] rows?:i32[R] gate?:f32[R|N] -> y:f32[N,D]', [], {
  gradient({ inputs: [, x, rows, gate], dy, needs, add }) {
    add(0, dy);
    if (!needs(1) && !needs(3)) return;
    const [dx, dgate] = addRowsGradOp.apply([dy, needs(3) ? x : null, rows, gate], [], {
      without: needs(3) ? [] : ['dgate'],
    });
    add(1, dx!);
    if (needs(3)) add(3, dgate!);
  },
});

const addRowsGradOp = defineOp(
  'add_rows_grad',
  'dy:f32[N,D] x?:f32[R|N,D] rows?:i32[R] gate?:f32[R|N] -> dx:f32[R|N,D] dgate?:f32[R|N]',
);

/**
 * `residual` with `gate[r] x[r]` added to row `rows[r]`: residual f32 [N, D], x f32 [R, D] (or [N, D]), rows i32 [R], gate
 * f32 [R] (or [N]; absent: 1). Returns f32 [N, D]. Counts the rows of x as rows that went through a sub-layer.
 */
export function addRows(
  residual: Node,
  x: Node,
  { rows = null, gate = null }: { rows?: Node | null; gate?: Node | null } = {},
): Node {
  return addRowsOp.apply([residual, x, rows, gate])[0]!;
}

const sumRowsOp = defineOp('sum_rows', 'x:f32[N,D] rows?:i32[R] gate?:f32[R|N] -> y:f32[D]');

/** `sum over r of gate[r] * x[rows[r]]`: x f32 [N, D], rows i32 [R], gate f32 [R] (or [N]). Returns f32 [D]. */
export function sumRows(x: Node, rows: Node | null = null, gate: Node | null = null): Node {
  return sumRowsOp.apply([x, rows, gate])[0]!;
}

const dotOp = defineOp('dot', 'a:f32[*X] b:f32[*X] -> y:f32[1]', [], {
  gradient({ inputs: [a, b], dy, needs, add }) {
    if (needs(0)) add(0, scale(b!, 1, dy));
    if (needs(1)) add(1, scale(a!, 1, dy));
  },
});

/** `sum a * b`: f32 of one shape. Returns f32 [1]. */
export function dot(a: Node, b: Node): Node {
  return dotOp.apply([a, b])[0]!;
}
