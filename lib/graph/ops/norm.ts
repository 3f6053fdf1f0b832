// RMSNorm and LayerNorm over all rows or over selected rows written compact.
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';

export interface NormOptions {
  eps: number;
  /** Rows to normalise, i32 [R]; the result has R rows. Without it, every row. */
  rows?: Node | null;
}

const rmsNormOp = defineOp('rms_norm', 'x:f32[N,D] weight:w[D] rows?:i32[R] -> y:f32[R|N,D] rstd?:f32[R|N]', ['eps'], {
  gradient({ inputs: [x, weight, rows], outputs: [, rstd], dy, add }) {
    const [dx, dweight] = rmsNormGradOp.apply([dy, x, weight, rstd, rows]);
    add(0, dx!, rows);
    add(1, dweight!);
  },
});

const rmsNormGradOp = defineOp(
  'rms_norm_grad',
  'dy:f32[R|N,D] x:f32[N,D] weight:w[D] rstd:f32[R|N] rows?:i32[R] -> dx:f32[R|N,D] dweight?:f32[D]',
);

/** `x / sqrt(mean(x^2) + eps) * weight`: x f32 [N, D], weight [D]. Returns f32 [R or N, D]. */
export function rmsNorm(x: Node, weight: Node, { eps, rows = null }: NormOptions): Node {
  return rmsNormOp.apply([x, weight, rows], [eps])[0]!;
}

const layerNormOp = defineOp(
  'layer_norm',
  'x:f32[N,D] weight:w[D] bias?:w[D] rows?:i32[R] -> y:f32[R|N,D] mean?:f32[R|N] rstd?:f32[R|N]',
  ['eps'],
  {
    gradient({ inputs: [x, weight, , rows], outputs: [, mean, rstd], dy, add }) {
      const [dx, dweight, dbias] = layerNormGradOp.apply([dy, x, weight, mean, rstd, rows]);
      add(0, dx!, rows);
      add(1, dweight!);
      add(2, dbias!);
    },
  },
);

const layerNormGradOp = defineOp(
  'layer_norm_grad',
  'dy:f32[R|N,D] x:f32[N,D] weight:w[D] mean:f32[R|N] rstd:f32[R|N] rows?:i32[R] -> dx:f32[R|N,D] ' +
    'dweight?:f32[D] dbias?:f32[D]',
);

/** `(x - mean) / sqrt(var + eps) * weight + bias`: x f32 [N, D], weight and bias [D]. Returns f32 [R or N, D]. */
export function layerNorm(x: Node, weight: Node, bias: Node | null, { eps, rows = null }: NormOptions): Node {
  return layerNormOp.apply([x, weight, bias, rows], [eps])[0]!;
}
