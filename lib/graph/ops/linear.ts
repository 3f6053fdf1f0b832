// Linear layers: plain, gated, and added to the residual stream at selected rows, each with low-rank patches; with their
// gradients. Of a weight of which a prefix is used, the gradient is that of the prefix.
import type { Size } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp, type GradientContext } from '../op.js';
import { actCode, activationGrad, gatedActivationGrad } from './elementwise.js';
import { type Act, activations } from './names.js';
import { sumRows } from './rows.js';

const linearDxOp = defineOp('linear_dx', 'dy:f32[R,N] w:w[N<,K<] acc?:f32[R,K] -> dx:f32[R,K]');

/**
 * `dy w (+ acc)`, the gradient of a product's input: dy f32 [R, N], w [>=N, >=width], acc f32 [R, width].
 * Returns f32 [R, width]; `width` is by default all columns of w.
 */
export function linearDx(dy: Node, w: Node, acc: Node | null = null, width: Size = w.shape[1]): Node {
  return linearDxOp.apply([dy, w, acc], [], { bind: { K: width } })[0]!;
}

const linearDwOp = defineOp(
  'linear_dw',
  'dy:f32[A,N] x:f32[B,K] dyrows?:i32[R] xrows?:i32[Q] gate?:f32[R|A] -> dw:f32[N,K]',
);

/**
 * `dw[n,k] = sum over r of gate[r] dy[dyrows[r], n] x[xrows[r], k]`: dy f32 [A, N], x f32 [B, K]. Returns f32 [N, K].
 */
export function linearDw(
  dy: Node,
  x: Node,
  { dyrows = null, xrows = null, gate = null }: { dyrows?: Node | null; xrows?: Node | null; gate?: Node | null } = {},
): Node {
  return linearDwOp.apply([dy, x, dyrows, xrows, gate])[0]!;
}

/**
 * A low-rank addition to a product (LoRA, arXiv 2106.09685): `u b^T` is part of the sum that `x w^T` is, before bias and
 * activation. With zeros in `b` the result has the bits of the product without.
 */
export interface Patch {
  /** `x[rows] A^T`, f32 [rows of the product, rank]. */
  u: Node;
  /** [N, rank] or larger: LoRA's B with the scale in it. */
  b: Node;
}

type Gradients = Pick<GradientContext, 'needs' | 'add' | 'take'>;

/** Adds to the gradients of a patch, operands `at` and `at + 1`, for dy of x w^T + u b^T: f32 [R, N]. */
function patchGradient(at: number, u: Node | null, b: Node | null, dy: Node, to: Gradients): void {
  if (!u || !b) return;
  const rank = u.shape[1];
  if (to.needs(at)) to.add(at, linearDx(dy, b, to.take(at), rank));
  if (to.needs(at + 1)) to.add(at + 1, linearDw(dy, u));
}

const linearOp = defineOp(
  'linear',
  'x:f32[M,K] w:w[N<,K<] bias?:w[N<] rows?:i32[R] u?:f32[R|M,P] b?:w[N<,P<] -> y:f32[R|M,N] pre?:f32[R|M,N]',
  ['act'],
  {
    gradient({ inputs: [x, w, , rows, u, b], outputs: [, pre], attrs: [act], dy, needs, add, take }) {
      const dpre = act === 0 ? dy : activationGrad(dy, pre!, activations[act]);
      if (needs(1)) add(1, linearDw(dpre, x!, { xrows: rows }));
      if (needs(2)) add(2, sumRows(dpre));
      patchGradient(4, u, b, dpre, { needs, add, take });
      if (needs(0)) add(0, linearDx(dpre, w!, take(0, rows), x!.shape[1]), rows);
    },
  },
);

export interface LinearOptions {
  /** [N]. */
  bias?: Node | null;
  act?: Act;
  /** Rows of x to multiply, i32 [R]; the result has R rows. Without it, every row. */
  rows?: Node | null;
  /** Outputs to compute: a prefix of w's. */
  width?: Size;
  patch?: Patch | null;
}

/**
 * `act(x[rows] w^T + u b^T + bias)`: x f32 [M, K], w [N, K] or larger (a prefix is used), u and b of `patch`.
 * Returns f32 [R or M, N].
 */
export function linear(
  x: Node,
  w: Node,
  { bias = null, act = 'none', rows = null, width, patch = null }: LinearOptions = {},
): Node {
  const operands = [x, w, bias, rows, patch?.u ?? null, patch?.b ?? null];
  return linearOp.apply(operands, [actCode('linear', act)], { bind: { N: width } })[0]!;
}

const linearGatedOp = defineOp(
  'linear_gated',
  'x:f32[M,K] wg:w[N<,K<] wu:w[N<,K<] bg?:w[N<] bu?:w[N<] rows?:i32[R] gate_u?:f32[R|M,P] gate_b?:w[N<,P<] ' +
    'up_u?:f32[R|M,Q] up_b?:w[N<,Q<] -> y:f32[R|M,N] g?:f32[R|M,N] u?:f32[R|M,N]',
  ['act'],
  {
    gradient({ inputs, outputs: [, g, u], attrs: [act], dy, needs, add, take }) {
      const [x, wg, wu, , , rows, gateU, gateB, upU, upB] = inputs;
      const { dg, du } = gatedActivationGrad(dy, g!, u!, activations[act]);
      const k = x!.shape[1];
      for (const [weight, bias, d] of [[1, 3, dg] as const, [2, 4, du] as const]) {
        if (needs(weight)) add(weight, linearDw(d, x!, { xrows: rows }));
        if (needs(bias)) add(bias, sumRows(d));
      }
      patchGradient(6, gateU, gateB, dg, { needs, add, take });
      patchGradient(8, upU, upB, du, { needs, add, take });
      if (needs(0)) add(0, linearDx(du, wu!, linearDx(dg, wg!, take(0, rows), k), k), rows);
    },
  },
);

export interface LinearGatedOptions {
  /** Bias of the gate product, [N]. */
  bg?: Node | null;
  /** Bias of the up product, [N]. */
  bu?: Node | null;
  act: Act;
  rows?: Node | null;
  width?: Size;
  /** To the gate product. */
  gatePatch?: Patch | null;
  /** To the up product. */
  upPatch?: Patch | null;
}

/**
 * `act(x wg^T + bg) * (x wu^T + bu)`, patches added to the products: x f32 [M, K], wg and wu [N, K] or larger.
 * Returns f32 [R or M, N].
 */
export function linearGated(
  x: Node,
  wg: Node,
  wu: Node,
  { bg = null, bu = null, act, rows = null, width, gatePatch = null, upPatch = null }: LinearGatedOptions,
): Node {
  const patches = [gatePatch, upPatch].flatMap((patch) => [patch?.u ?? null, patch?.b ?? null]);
  const operands = [x, wg, wu, bg, bu, rows, ...patches];
  return linearGatedOp.apply(operands, [actCode('linear_gated', act)], { bind: { N: width } })[0]!;
}

const linearAddOp = defineOp(
  'linear_add',
  'residual:f32[N,D] x:f32[R|N,K] w:w[D<,K<] bias?:w[D<] rows?:i32[R] gate?:f32[R|N] u?:f32[R|N,P] b?:w[D<,P<] ' +
    '-> y:f32[N,D]',
  [],
  {
    gradient({ inputs: [, x, w, bias, rows, gate, u, b], dy, needs, add }) {
      // Adds to the gradients of operand `at`, a factor of a product with `weight`, and of the gate.
      const addProduct = (at: number, factor: Node, weight: Node, bias: Node | null) => {
        if (!needs(at) && !needs(5)) return;
        // The factor is kept for the gate's gradient only.
        const kept = needs(5) ? factor : null;
        const options = { bind: { K: factor.shape[1] }, without: needs(5) ? [] : ['dgate'] };
        const [dx, dgate] = linearAddGradOp.apply([dy, kept, weight, bias, rows, gate], [], options);
        add(at, dx!);
        if (dgate) add(5, dgate);
      };
      if (needs(2)) add(2, linearDw(dy, x!, { dyrows: rows, gate }));
      if (needs(3)) add(3, sumRows(dy, rows, gate));
      if (needs(7)) add(7, linearDw(dy, u!, { dyrows: rows, gate }));
      addProduct(1, x!, w!, bias);
      if (u && b) addProduct(6, u, b, null);
      add(0, dy);
    },
  },
);

const linearAddGradOp = defineOp(
  'linear_add_grad',
  'dy:f32[N,D] x?:f32[R|N,K] w:w[D<,K<] bias?:w[D<] rows?:i32[R] gate?:f32[R|N] -> dx:f32[R|N,K] dgate?:f32[R|N]',
);

export interface LinearAddOptions {
  /** [D]. */
  bias?: Node | null;
  /** Rows of the residual that receive row r of x, i32 [R]. Without it, x has a row for each. */
  rows?: Node | null;
  /** Factor of every row of x, f32 [R] (or [N]). */
  gate?: Node | null;
  patch?: Patch | null;
}

/**
 * `residual` with `gate[r] * (x[r] w^T + u[r] b^T + bias)` added to row `rows[r]`: residual f32 [N, D], x f32 [R or N, K],
 * w [D, K] or larger. Returns f32 [N, D]. Counts one row per row of x.
 */
export function linearAdd(
  residual: Node,
  x: Node,
  w: Node,
  { bias = null, rows = null, gate = null, patch = null }: LinearAddOptions = {},
): Node {
  return linearAddOp.apply([residual, x, w, bias, rows, gate, patch?.u ?? null, patch?.b ?? null])[0]!;
}
