// The parts of a decoder block: attention and feed-forward, over all rows or over those that a selector lets in.
import type { Graph, Node } from '../graph/graph.js';
import {
  add,
  attention,
  attentionCached,
  boundOf,
  embedding,
  gatedActivation,
  gatherIds,
  layerNorm,
  linearAdd,
  rmsNorm,
  rope,
  zeros,
} from '../graph/index.js';
import { type Matrix, matrix, type ProductRows, product, productAdd, productGated, weightPart } from './products.js';
import type { Place, Projection, RowSelection, Selector, UnitPart } from './select.js';
import type { ModelSpec } from './spec.js';
import type { Affine, DecoderNodes, LayerWeights } from './weights.js';

/** Keys and values of one layer, kept between runs; all are state nodes. */
export interface KvCache {
  /** f32 [S, T, kvHeads * headDim] */
  readonly k: Node;
  readonly v: Node;
  /** Rows cached of every segment, i32 [S]. */
  readonly lengths: Node;
}

/** What every block of one decoder shares. */
export interface BlockContext {
  readonly graph: Graph;
  readonly spec: ModelSpec;
  /** Position of every row in its sequence, i32 [N]. */
  readonly positions: Node;
  /** Segments, i32 [S + 1]. */
  readonly offsets: Node;
  readonly selector: Selector;
}

/** The norm of a spec over all rows of x [N, D], or over `rows` written compact. */
export function norm(spec: ModelSpec, x: Node, { weight, bias }: Affine<Node>, rows: Node | null = null): Node {
  const options = { eps: spec.eps, rows };
  return spec.norm === 'rms' ? rmsNorm(x, weight, options) : layerNorm(x, weight, bias ?? null, options);
}

/** Token (and learned position) embeddings: f32 [N, D]. */
export function embed(spec: ModelSpec, weights: DecoderNodes, ids: Node, positions: Node): Node {
  const tokens = embedding(weights.embed, ids);
  return spec.rope ? tokens : add(tokens, embedding(weights.positions!, positions));
}

interface Entry {
  /** The normalised rows to read: all of them, or only those selected. */
  readonly x: Node;
  /** Rows of `x` to gather while multiplying. */
  readonly gather: Node | null;
  readonly selection: RowSelection | null;
}

// Asks the selector which rows enter. When all rows normalised are needed, the products gather from those; otherwise only
// the selected rows are normalised, compact.
function enter(context: BlockContext, layer: number, place: Place, residual: Node, weights: Affine<Node>): Entry {
  const { spec, selector, offsets } = context;
  let all: Node | null = null;
  const normed = () => {
    all ??= norm(spec, residual, weights);
    return all;
  };
  const selection = selector.rows({ layer, place, residual, normed, offsets });
  if (!selection) return { x: normed(), gather: null, selection };
  if (all || selection.allKeys) return { x: normed(), gather: selection.rows, selection };
  return { x: norm(spec, residual, weights, selection.rows), gather: null, selection };
}

// Adds the sub-layer's output to the rows that entered.
function leave(residual: Node, y: Node, out: Matrix, selection: RowSelection | null): Node {
  return productAdd(residual, y, out, { rows: selection?.rows, gate: selection?.gate?.(selection.rows) });
}

/**
 * `residual + o(attention(q, k, v))` of the normalised rows; rows that do not enter are no queries, and keys only when the
 * selection says so.
 *
 * @param cache where keys and values of earlier runs are and those of this run go; without it, segments attend to
 *   themselves only
 */
export function attentionBlock(
  context: BlockContext,
  layer: number,
  residual: Node,
  weights: LayerWeights<Node>,
  cache?: KvCache,
): Node {
  const { graph, spec } = context;
  const { heads, kvHeads, headDim } = spec;
  const { x, gather, selection } = enter(context, layer, 'attn', residual, weights.norm1);
  const of = (projection: 'q' | 'k' | 'v' | 'o') => matrix(context, layer, weights[projection], projection);
  const turn = (y: Node, entered: RowSelection | null) => {
    if (!spec.rope) return y;
    const { invFreq } = spec.rope;
    const positions = entered ? gatherIds(context.positions, entered.rows) : context.positions;
    return rope(y, positions, graph.constant([...invFreq], [invFreq.length]), { headDim });
  };
  const keep = selection?.allKeys ?? false;
  const [keyRows, keySelection] = keep ? [null, null] : [gather, selection];
  const q = turn(product(x, of('q'), { rows: gather }), selection);
  const k = turn(product(x, of('k'), { rows: keyRows }), keySelection);
  const v = product(x, of('v'), { rows: keyRows });
  const offsets = keySelection?.offsets ?? context.offsets;
  const options = {
    heads,
    kvHeads,
    scale: 1 / Math.sqrt(headDim),
    ...(keep && selection && { selected: selection }),
  };
  const y = cache
    ? attentionCached(q, k, v, offsets, cache.lengths, cache.k, cache.v, options)
    : attention(q, k, v, offsets, { ...options, causal: true });
  return leave(residual, y, of('o'), selection);
}

/** `residual + down(act(gate(x)) * up(x))` of the normalised rows, or `residual + down(act(up(x)))`. */
export function feedForwardBlock(
  context: BlockContext,
  layer: number,
  residual: Node,
  { norm2, gate, up, down }: LayerWeights<Node>,
): Node {
  const { act } = context.spec;
  const { x, gather, selection } = enter(context, layer, 'mlp', residual, norm2);
  const of = (weights: Affine<Node>, projection: Projection, part?: UnitPart) =>
    matrix(context, layer, weights, projection, part);
  const hidden = (rows: ProductRows, part?: UnitPart) =>
    gate
      ? productGated(x, of(gate, 'gate', part), of(up, 'up', part), { ...rows, act })
      : product(x, of(up, 'up', part), { ...rows, act });
  const offsets = selection?.offsets ?? context.offsets;
  const entered = { layer, place: 'mlp', x, gather, residual, rows: selection?.rows ?? null, offsets } as const;
  const blocks = context.selector.experts?.(entered);
  if (!blocks) return leave(residual, hidden({ rows: gather }), of(down, 'down'), selection);

  // A sum over blocks of units: each reads and adds to the rows that chose it, one block after the other.
  const { graph } = context;
  let y = residual;
  graph.tag(`${graph.currentTag}/${blocks.length}`, () => {
    for (const [index, { rows, gate: factor }] of blocks.entries()) {
      const part = { index, count: blocks.length };
      const at = selection ? gatherIds(selection.rows, rows) : rows;
      const units = hidden({ rows: gather ? at : rows, among: { gather, rows } }, part);
      const token = selection?.gate?.(at);
      const both = token && factor ? gatedActivation(token, factor, 'none') : (token ?? factor);
      y = productAdd(y, units, of(down, 'down', part), { rows: at, gate: both });
    }
  });
  return down.bias ? graph.tag(`${graph.currentTag}.bias`, () => addBias(y, down, selection ?? null)) : y;
}

// Once for every row that entered, whatever it chose: a product with zeros that has the bias.
function addBias(residual: Node, { weight, bias }: Affine<Node>, selection: RowSelection | null): Node {
  const count = selection ? selection.rows.shape[0] : residual.shape[0];
  const rows = selection?.rows;
  const column = weightPart(residual.graph, weight, 1, { index: 0, count: boundOf(weight.shape[1]) });
  return linearAdd(residual, zeros(residual.graph, [count, 1]), column, {
    bias,
    rows,
    gate: selection?.gate?.(selection.rows),
  });
}
