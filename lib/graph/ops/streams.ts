// Ops of models with several residual streams (AltUp), and the sparsity of gates that comes with them.
import { InvalidArgumentError } from '../../native/errors.js';
import { boundOf } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';
import { gatedActivation } from './elementwise.js';
import { sumRows } from './rows.js';

const scaleColumnsOp = defineOp('scale_columns', 'x:f32[N,D] w:w[D] -> y:f32[N,D]', [], {
  gradient({ inputs: [x, w], dy, needs, add }) {
    if (needs(0)) add(0, scaleColumns(dy, w!));
    if (needs(1)) add(1, sumRows(gatedActivation(x!, dy, 'none')));
  },
});

/** `y[r, d] = x[r, d] w[d]`: x f32 [N, D], w [D]. Returns f32 [N, D]. */
export function scaleColumns(x: Node, w: Node): Node {
  return scaleColumnsOp.apply([x, w])[0]!;
}

const addScaledOp = defineOp('add_scaled', 'acc:f32[N,D] x:f32[N,D] c:f32[N,C] -> y:f32[N,D]', ['column', 'offset'], {
  gradient({ inputs: [, x, c], attrs, dy, needs, add }) {
    add(0, dy);
    if (!needs(1) && !needs(2)) return;
    const [dx, dc] = addScaledGradOp.apply([dy, x, c], attrs);
    if (needs(1)) add(1, dx!);
    if (needs(2)) add(2, dc!);
  },
});

const addScaledGradOp = defineOp('add_scaled_grad', 'dy:f32[N,D] x:f32[N,D] c:f32[N,C] -> dx:f32[N,D] dc:f32[N,C]', [
  'column',
  'offset',
]);

/** `acc[r] + (offset + c[r, column]) x[r]`: acc and x f32 [N, D], c f32 [N, C]. Returns f32 [N, D]. */
export function addScaled(acc: Node, x: Node, c: Node, column: number, offset = 0): Node {
  const columns = boundOf(c.shape[1] ?? 0);
  if (!Number.isInteger(column) || column < 0 || column >= columns) {
    throw new InvalidArgumentError(`[add_scaled] column must be one of the ${columns} of c, got ${column}`);
  }
  return addScaledOp.apply([acc, x, c], [column, offset])[0]!;
}

const rescaleRowsOp = defineOp('rescale_rows', 'x:f32[N,D] like:f32[N,D] -> y:f32[N,D]', ['floor'], {
  gradient({ inputs: [x, like], attrs, dy, needs, add }) {
    const [dx, dlike] = rescaleRowsGradOp.apply([dy, x, like], attrs);
    if (needs(0)) add(0, dx!);
    if (needs(1)) add(1, dlike!);
  },
});

const rescaleRowsGradOp = defineOp(
  'rescale_rows_grad',
  'dy:f32[N,D] x:f32[N,D] like:f32[N,D] -> dx:f32[N,D] dlike:f32[N,D]',
  ['floor'],
);

/** Rows of x with the root mean square of those of `like`, `x sqrt(mean(like^2) / max(mean(x^2), floor))`: f32 [N, D]. */
export function rescaleRows(x: Node, like: Node, floor: number): Node {
  return rescaleRowsOp.apply([x, like], [floor])[0]!;
}

const gaussianTopkOp = defineOp('gaussian_topk', 'x:f32[N,D] -> y:f32[N,D]', ['factor'], {
  gradient({ inputs: [x], attrs, dy, add }) {
    add(0, gaussianTopkGradOp.apply([dy, x], attrs)[0]!);
  },
});

const gaussianTopkGradOp = defineOp('gaussian_topk_grad', 'dy:f32[N,D] x:f32[N,D] -> dx:f32[N,D]', ['factor']);

/**
 * What of every row lies above its mean by more than `factor` standard deviations, the rest 0: x f32 [N, D]. With the
 * quantile s of the normal distribution as the factor, about the share 1 - s is left.
 */
export function gaussianTopk(x: Node, factor: number): Node {
  return gaussianTopkOp.apply([x], [factor])[0]!;
}
