// Products with the matrices of a layer, whole or in parts of their units, each with its low-rank correction if it has one.
import type { Graph, Node } from '../graph/graph.js';
import { type Act, activation, gatedActivation, linear, linearAdd, linearGated } from '../graph/index.js';
import { InvalidArgumentError } from '../native/errors.js';
import { type LowRank, type Projection, type Selector, type UnitPart, unitAxis } from './select.js';
import type { Affine } from './weights.js';

/** A matrix of a layer, or part of one, as products read it. */
export interface Matrix extends Affine<Node> {
  readonly patch: LowRank | null;
}

/**
 * A projection of a layer, or a part of its units. A part of the outputs has its part of the bias; a part of the inputs
 * has none, for the bias counts once.
 */
export function matrix(
  { graph, selector }: { graph: Graph; selector: Selector },
  layer: number,
  { weight, bias }: Affine<Node>,
  projection: Projection,
  part?: UnitPart,
): Matrix {
  const patch = selector.patch?.(layer, projection, part) ?? null;
  if (!part) return { weight, bias, patch };
  const axis = unitAxis(projection);
  return {
    weight: weightPart(graph, weight, axis, part),
    ...(bias && axis === 0 && { bias: weightPart(graph, bias, 0, part) }),
    patch,
  };
}

/** A part of a bound weight. */
export function weightPart(graph: Graph, weight: Node, axis: 0 | 1, { index, count }: UnitPart): Node {
  const tensor = weight.leaf?.kind === 'weight' ? weight.leaf.tensor : null;
  if (!tensor) throw new InvalidArgumentError('[model] only frozen weights can be cut into parts');
  return graph.weight(tensor.part(axis, index, count), `${weight.name} ${index}/${count}`);
}

// y + (x[rows] a^T) b^T
function corrected(y: Node, x: Node, { a, b }: LowRank, rows: Node | null): Node {
  return linearAdd(y, linear(x, a, { rows }), b);
}

/** `act(x[rows] w^T + bias)`, f32 [R or N, outputs]. */
export function product(
  x: Node,
  m: Matrix,
  { rows = null, act = 'none' }: { rows?: Node | null; act?: Act } = {},
): Node {
  const { weight, bias, patch } = m;
  if (!patch) return linear(x, weight, { bias, rows, act });
  const y = corrected(linear(x, weight, { bias, rows }), x, patch, rows);
  return act === 'none' ? y : activation(y, act);
}

/** `act(x[rows] gate^T) * (x[rows] up^T)`, with their biases: f32 [R or N, outputs]. */
export function productGated(x: Node, gate: Matrix, up: Matrix, rows: Node | null, act: Act): Node {
  if (!gate.patch && !up.patch) {
    return linearGated(x, gate.weight, up.weight, { bg: gate.bias, bu: up.bias, act, rows });
  }
  return gatedActivation(product(x, gate, { rows }), product(x, up, { rows }), act);
}

/** `residual` with `gate[r] (x[r] w^T + bias)` added to row `rows[r]`: f32 [N, D]. */
export function productAdd(
  residual: Node,
  x: Node,
  { weight, bias, patch }: Matrix,
  { rows, gate }: { rows?: Node | null; gate?: Node | null } = {},
): Node {
  const y = linearAdd(residual, x, weight, { bias, rows, gate });
  return patch ? linearAdd(y, linear(x, patch.a), patch.b, { rows, gate }) : y;
}
