// RMSNorm and LayerNorm over all rows or over selected rows written compact.
import { InvalidArgumentError } from '../../native/errors.js';
import { boundOf, formatShape } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';

export interface NormOptions {
  eps: number;
  /** Rows to normalise, i32 [R]; the result has R rows. Without it, every row. */
  rows?: Node | null;
}

const rmsNormOp = defineOp(
  'rms_norm',
  'x:f32[N,D] weight:w[F] rows?:i32[R] -> y:f32[R|N,D] rstd?:f32[R|N,G]',
  ['eps', 'offset'],
  {
    gradient({ inputs: [x, weight, rows], outputs: [, rstd], attrs: [, offset], dy, add }) {
      const [dx, dweight] = rmsNormGradOp.apply([dy, x, weight, rstd, rows], [offset]);
      add(0, dx!, rows);
      add(1, dweight!);
    },
  },
);

const rmsNormGradOp = defineOp(
  'rms_norm_grad',
  'dy:f32[R|N,D] x:f32[N,D] weight:w[F] rstd:f32[R|N,G] rows?:i32[R] -> dx:f32[R|N,D] dweight?:f32[F]',
  ['offset'],
);

/**
 * `x / sqrt(mean(x^2) + eps) * (offset + weight)`: x f32 [N, D], weight [F], where D is a multiple of F: each F features
 * (of a head, say) are normalised by themselves. Returns f32 [R or N, D].
 *
 * @param options.offset default 0
 */
export function rmsNorm(
  x: Node,
  weight: Node,
  { eps, rows = null, offset = 0 }: NormOptions & { offset?: number },
): Node {
  const [width, features] = [boundOf(x.shape[1] ?? 0), boundOf(weight.shape[0] ?? 0)];
  if (!(features > 0) || width % features !== 0) {
    throw new InvalidArgumentError(
      `[rms_norm] weight must be as wide as x or a part of it, got x:${formatShape(x.shape)} weight:${formatShape(weight.shape)}`,
    );
  }
  return rmsNormOp.apply([x, weight, rows], [eps, offset], { bind: { G: width / features } })[0]!;
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
