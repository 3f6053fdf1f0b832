// Products with the matrices of a layer, whole or in parts of their units, each with its low-rank correction if it has one.
import type { Graph, Node } from '../graph/graph.js';
import {
  type Act,
  gatedActivation,
  gatherRows,
  linear,
  linearAdd,
  linearGated,
  type Patch,
  type Size,
} from '../graph/index.js';
import { InvalidArgumentError } from '../native/errors.js';
import { type LowRank, type Projection, type Selector, type UnitPart, unitAxis } from './select.js';
import type { Affine } from './weights.js';

/** A matrix of a layer, or part of one, as products read it. */
export interface Matrix extends Omit<Affine<Node>, 'patch'> {
  readonly patch: LowRank | null;
}

/** A whole matrix with the correction that it has. */
export const wholeMatrix = (affine: Affine<Node>): Matrix => ({ ...affine, patch: affine.patch ?? null });

/**
 * A projection of a layer, or a part of its units. A part of the outputs has its part of the bias; a part of the inputs
 * has none, for the bias counts once.
 */
export function matrix(
  { graph, selector }: { graph: Graph; selector: Selector },
  layer: number,
  affine: Affine<Node>,
  projection: Projection,
  part?: UnitPart,
): Matrix {
  const { weight, bias } = affine;
  const patch = selector.patch?.(layer, projection, part) ?? null;
  if (!part) return patch ? { weight, bias, patch } : wholeMatrix(affine);
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

/** The rows of x that a product reads. */
export interface ProductRows {
  /** i32 [R]; null: all. */
  rows?: Node | null;
  /** They are the rows `rows` among the rows `gather` of x (null: among all), for which other parts are computed, too. */
  among?: { readonly gather: Node | null; readonly rows: Node };
  /** Where they are in the residual stream, i32 [R]; null: they are all its rows. */
  at: Node | null;
}

// x[rows] a^T, with b; what all parts of a projection share is computed once.
function patchOf(x: Node, patch: LowRank | null, { rows, among, at }: ProductRows): Patch | null {
  if (!patch) return null;
  const { a, b, mask } = patch;
  const u = among ? gatherRows(linear(x, a, { rows: among.gather }), among.rows) : linear(x, a, { rows });
  return { u: mask ? gatedActivation(at ? gatherRows(mask, at) : mask, u, 'none') : u, b };
}

interface OfRows extends ProductRows {
  act?: Act;
  /** Only so many outputs, a prefix. */
  width?: Size;
}

// Products of several parts come one after another, behind what their corrections read, so that they run as one.

/** `act(x[rows] w^T + bias)` of every matrix, f32 [R or N, outputs]. */
export function products(x: Node, of: readonly (OfRows & { matrix: Matrix })[]): Node[] {
  const patches = of.map(({ matrix, ...rows }) => patchOf(x, matrix.patch, rows));
  return of.map(({ matrix: { weight, bias }, rows, act, width }, i) =>
    linear(x, weight, { bias, rows, act, width, patch: patches[i] }),
  );
}

/** The same of one matrix. */
export const product = (x: Node, matrix: Matrix, rows: OfRows): Node => products(x, [{ ...rows, matrix }])[0];

/** `act(x[rows] gate^T) * (x[rows] up^T)` of every pair of matrices, with their biases: f32 [R or N, outputs]. */
export function productsGated(x: Node, of: readonly (OfRows & { act: Act; gate: Matrix; up: Matrix })[]): Node[] {
  const patches = of.map(({ gate, up, ...rows }) => ({
    gatePatch: patchOf(x, gate.patch, rows),
    upPatch: patchOf(x, up.patch, rows),
  }));
  return of.map(({ gate, up, act, width, rows }, i) =>
    linearGated(x, gate.weight, up.weight, { bg: gate.bias, bu: up.bias, act, width, rows, ...patches[i] }),
  );
}

/** What is added to a sum: `gate[r] (x[r] w^T + bias)`, x f32 [R, inputs], to row `rows[r]`. */
export interface Addend {
  x: Node;
  matrix: Matrix;
  rows?: Node | null;
  gate?: Node | null;
  /** Where these rows are in the residual stream. */
  at: Node | null;
}

/** `sum` with every addend, in their order: f32 [N, D]. */
export function productsAdd(sum: Node, addends: readonly Addend[]): Node {
  const patches = addends.map(({ x, matrix, at }) => patchOf(x, matrix.patch, { at }));
  return addends.reduce(
    (y, { x, matrix: { weight, bias }, rows, gate }, i) =>
      linearAdd(y, x, weight, { bias, rows, gate, patch: patches[i] }),
    sum,
  );
}
