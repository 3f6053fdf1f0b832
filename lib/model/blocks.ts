// The parts of a block: attention and feed-forward, over all rows or over those that a selector lets in.
import type { Graph, Node } from '../graph/graph.js';
import {
  add,
  addRows,
  attention,
  attentionCached,
  boundOf,
  type Cache,
  cacheAppend,
  embedding,
  gatedActivation,
  gatherIds,
  gaussianTopk,
  type HeadOptions,
  layerNorm,
  linearAdd,
  type Routed,
  rmsNorm,
  rope,
  type Size,
  scale,
  zeros,
} from '../graph/index.js';
import { InvalidArgumentError } from '../native/errors.js';
import {
  type Matrix,
  matrix,
  type ProductRows,
  product,
  products,
  productsAdd,
  productsGated,
  weightPart,
  wholeMatrix,
} from './products.js';
import type { EnteredRows, ExpertSelection, Place, Projection, RowSelection, Selector, UnitPart } from './select.js';
import type { CrossWeights } from './seq2seq_weights.js';
import { layerOf, type ModelSpec } from './spec.js';
import type { Affine, DecoderNodes, LayerWeights } from './weights.js';

/** What every block of one model shares. */
export interface BlockContext {
  readonly graph: Graph;
  readonly spec: ModelSpec;
  /** Position of every row in its sequence, i32 [N]. */
  readonly positions: Node;
  /** Segments, i32 [S + 1]. */
  readonly offsets: Node;
  readonly selector: Selector;
  /** Filled with what the last product of every sub-layer that is not cut reads. */
  readonly units?: Node[];
  /** Added to the scores of self-attention by distance, f32 [heads, 2 m + 1] (`HeadOptions.bias`). */
  readonly bias?: Node;
  /** Keys and values that layers have computed, for those that use them too; by layer. */
  readonly keys: Map<number, LayerKeys>;
}

/** Keys and values of a layer, f32 [N or R, kvHeads * headDim], the segments of their rows, and where they are appended. */
interface LayerKeys {
  readonly k: Node;
  readonly v: Node;
  readonly offsets: Node;
  readonly cache: Cache | undefined;
}

/** The norm of a spec over all rows of x [N, D], or over `rows` written compact; of RMS, over as many features as weights. */
export function norm(spec: ModelSpec, x: Node, { weight, bias }: Affine<Node>, rows: Node | null = null): Node {
  const options = { eps: spec.eps, rows };
  return spec.norm === 'rms'
    ? rmsNorm(x, weight, { ...options, offset: spec.normOffset })
    : layerNorm(x, weight, bias ?? null, options);
}

/** Token (and learned position) embeddings: f32 [N, D]. */
export function embed(
  spec: ModelSpec,
  weights: Pick<DecoderNodes, 'embed' | 'positions'>,
  ids: Node,
  positions: Node,
): Node {
  const tokens = scale(embedding(weights.embed, ids), spec.embedScale);
  return weights.positions ? add(tokens, embedding(weights.positions, positions)) : tokens;
}

interface Entry {
  /** The rows to read, normalised if norms come before sub-layers: all of them, or only those selected. */
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
    all ??= spec.normPlace === 'pre' ? norm(spec, residual, weights) : residual;
    return all;
  };
  const selection = selector.rows({ layer, place, residual, normed, offsets });
  if (!selection) return { x: normed(), gather: null, selection };
  if (all || selection.allKeys || spec.normPlace === 'post') return { x: normed(), gather: selection.rows, selection };
  return { x: norm(spec, residual, weights, selection.rows), gather: null, selection };
}

// Adds the sub-layer's output, normalised where there is a norm for that, to the rows that entered.
function leave(
  { spec, units }: BlockContext,
  residual: Node,
  y: Node,
  out: Matrix,
  post: Affine<Node> | undefined,
  selection: Pick<RowSelection, 'rows' | 'gate'> | null,
): Node {
  units?.push(y);
  const at = selection?.rows ?? null;
  const to = { rows: at, gate: selection?.gate?.(selection.rows) };
  return post
    ? addRows(residual, norm(spec, product(y, out, { at }), post), to)
    : productsAdd(residual, [{ x: y, matrix: out, ...to, at }]);
}

/**
 * `residual + o(attention(q, k, v))` of the normalised rows; rows that do not enter are no queries, and keys only when the
 * selection says so. Cut into experts, it is the sum of theirs.
 *
 * @param caches where keys and values of earlier runs are and those of this run go, one cache for each of so many equal
 *   parts of the heads of keys and values; without it, segments attend to themselves only
 */
export function attentionBlock(
  context: BlockContext,
  layer: number,
  residual: Node,
  weights: LayerWeights<Node>,
  caches?: (parts: number) => readonly Cache[],
): Node {
  const { graph, selector } = context;
  const spec = layerOf(context.spec, layer);
  const { heads, kvHeads, headDim } = spec;
  const { x, gather, selection } = enter(context, layer, 'attn', residual, weights.norm1);
  const of = (projection: 'q' | 'k' | 'v' | 'o', part?: UnitPart) =>
    matrix(context, layer, weights[projection]!, projection, part);
  const entered = entering(context, layer, 'attn', residual, { x, gather, selection });
  const experts = selector.experts?.(entered);

  // `at`: which rows of the residual stream they are; null: all.
  const turn = (y: Node, at: Node | null) => {
    if (!spec.rope) return y;
    const { invFreq } = spec.rope;
    const positions = at ? gatherIds(context.positions, at) : context.positions;
    return rope(y, positions, graph.constant([...invFreq], [invFreq.length]), { headDim });
  };
  const headNorm = (y: Node, weights?: Affine<Node>) => (weights ? norm(spec, y, weights) : y);
  const queries = (readings: readonly Reading[]) =>
    products(
      x,
      readings.map(({ from, part }) => ({ ...from, matrix: of('q', part) })),
    );
  const turnedQuery = (q: Node, { from }: Reading) => turn(headNorm(q, weights.qNorm), from.at);
  const keys = (readings: readonly (Reading & { offsets: Node })[]): LayerKeys[] => {
    const both = products(x, [
      ...readings.map(({ from, part }) => ({ ...from, matrix: of('k', part) })),
      ...readings.map(({ from, part }) => ({ ...from, matrix: of('v', part) })),
    ]);
    const [ks, vs] = [both.slice(0, readings.length), both.slice(readings.length)];
    return readings.map(({ from, part, offsets }, i) => {
      const k = turn(headNorm(ks[i], weights.kNorm), from.at);
      const v = spec.vNorm
        ? rmsNorm(vs[i], graph.constant(new Array<number>(headDim).fill(1), [headDim]), { eps: spec.eps })
        : vs[i];
      const cache = caches?.(part?.count ?? 1)[part?.index ?? 0];
      if (cache) cacheAppend(k, v, offsets, cache);
      return { k, v, offsets, cache };
    });
  };
  const attend = (
    q: Node,
    { k, v, offsets, cache }: LayerKeys,
    shape: Pick<HeadOptions, 'heads' | 'kvHeads'>,
    selected?: Routed,
  ) => {
    const { window, scoreScale, scoreSoftcap: softcap } = spec;
    const options = { ...shape, scale: scoreScale, window, softcap, bias: context.bias, ...(selected && { selected }) };
    return cache
      ? attentionCached(q, offsets, cache, options)
      : attention(q, k, v, offsets, { ...options, causal: spec.encoder === null });
  };
  const keep = selection?.allKeys ?? false;
  const keysOfLayer = (parts: readonly (UnitPart | undefined)[]) => {
    const [from, offsets] = keep
      ? [{ at: null }, context.offsets]
      : [{ rows: gather, at: entered.rows }, entered.offsets];
    return keys(parts.map((part) => ({ from, offsets, part })));
  };

  if (!experts) {
    const reading = { from: { rows: gather, at: entered.rows } };
    const [q] = queries([reading]);
    const own = spec.keysOf === null ? keysOfLayer([undefined])[0] : sharedKeys(context, layer, spec.keysOf);
    context.keys.set(layer, own);
    const ofAllRows = own.offsets === context.offsets;
    const turned = turnedQuery(q, reading);
    const y = attend(turned, own, { heads, kvHeads }, ofAllRows && selection ? selection : undefined);
    return leave(context, residual, y, of('o'), weights.postNorm1, selection);
  }
  const count = experts.length;
  if (heads % count !== 0 || count % kvHeads !== 0) {
    throw new InvalidArgumentError(
      `[model] experts of attention must be ${heads} or a part of it that ${kvHeads} divides, got ${count}`,
    );
  }
  const ownKeys = experts.every((expert) => expert.ownKeys);
  const shared = ownKeys
    ? []
    : keysOfLayer(Array.from({ length: kvHeads }, (_, index) => (kvHeads > 1 ? { index, count: kvHeads } : undefined)));
  return addExperts(context, residual, experts, selection, weights.o, weights.postNorm1, {
    out: (part) => of('o', part),
    units(chosen) {
      const shape = { heads: heads / count, kvHeads: 1 };
      const readings = chosen.map(({ part, rows, offsets, at }) => ({
        from: { rows: gather ? at : rows, among: { gather, rows }, at },
        ...{ part, offsets },
      }));
      const raw = queries(readings);
      const own = ownKeys ? keys(readings) : null;
      const q = raw.map((q, i) => turnedQuery(q, readings[i]));
      if (own) return own.map((keys, i) => attend(q[i], keys, shape));
      return chosen.map(({ part, rows, offsets, at }, i) =>
        attend(q[i], shared[Math.floor((part.index * kvHeads) / count)], shape, { rows: keep ? at : rows, offsets }),
      );
    },
  });
}

/** Keys and values of sources: f32 [N, kvHeads * headDim] and their segments, or in a cache, for targets of one new row each. */
export type CrossKeys = { readonly k: Node; readonly v: Node; readonly offsets: Node } | { readonly cache: Cache };

/** `residual + o(attention(q, k, v))` of the normalised rows of targets and the keys and values of their sources. */
export function crossAttentionBlock(
  { spec, offsets, units }: BlockContext,
  residual: Node,
  weights: CrossWeights<Node>,
  keys: CrossKeys,
): Node {
  const { heads, kvHeads, scoreScale: scale } = spec;
  const x = spec.normPlace === 'pre' ? norm(spec, residual, weights.norm) : residual;
  const q = product(x, wholeMatrix(weights.q), { at: null });
  // The last row that a cache holds sees all of them.
  const y =
    'cache' in keys
      ? attentionCached(q, offsets, keys.cache, { heads, kvHeads, scale })
      : attention(q, keys.k, keys.v, keys.offsets, { heads, kvHeads, scale, causal: false, queries: offsets });
  units?.push(y);
  return productsAdd(residual, [{ x: y, matrix: wholeMatrix(weights.o), at: null }]);
}

function sharedKeys({ keys }: BlockContext, layer: number, owner: number): LayerKeys {
  const found = keys.get(owner);
  if (found) return found;
  throw new InvalidArgumentError(
    `[model] layer ${layer} uses the keys and values of layer ${owner}, whose attention cannot be left out or cut into experts`,
  );
}

/** `residual + down(act(gate(x)) * up(x))` of the normalised rows, or `residual + down(act(up(x)))`. */
export function feedForwardBlock(
  context: BlockContext,
  layer: number,
  residual: Node,
  { norm2, gate, up, down, postNorm2 }: LayerWeights<Node>,
): Node {
  const { act, gateCutoff } = layerOf(context.spec, layer);
  const entry = enter(context, layer, 'mlp', residual, norm2);
  const { x, gather, selection } = entry;
  const of = (weights: Affine<Node>, projection: Projection, part?: UnitPart) =>
    matrix(context, layer, weights, projection, part);
  const hidden = (readings: readonly (Reading & { width?: Size })[]): Node[] => {
    const ups = readings.map(({ from, part, width }) => ({ ...from, width, matrix: of(up, 'up', part) }));
    if (!gate) {
      return products(
        x,
        ups.map((rows) => ({ ...rows, act })),
      );
    }
    const gates = readings.map(({ from, part, width }) => ({ ...from, width, matrix: of(gate, 'gate', part) }));
    if (gateCutoff === null) {
      return productsGated(
        x,
        ups.map(({ matrix, ...rows }, i) => ({ ...rows, act, gate: gates[i].matrix, up: matrix })),
      );
    }
    const open = products(x, gates).map((y) => gaussianTopk(y, gateCutoff));
    return products(x, ups).map((y, i) => gatedActivation(open[i], y, act));
  };
  const entered = entering(context, layer, 'mlp', residual, entry);
  const experts = context.selector.experts?.(entered);
  if (experts && gateCutoff !== null) {
    throw new InvalidArgumentError(
      `[model] the feed-forward of layer ${layer} cannot be cut: which of its units act depends on all of them`,
    );
  }
  // `at`: where they are in the residual stream.
  const some = (rows: Node, at: Node): ProductRows => ({ rows: gather ? at : rows, among: { gather, rows }, at });
  if (experts) {
    return addExperts(context, residual, experts, selection, down, postNorm2, {
      out: (part) => of(down, 'down', part),
      units: (chosen) => hidden(chosen.map(({ part, rows, at }) => ({ from: some(rows, at), part }))),
    });
  }
  const widths = context.selector.widths?.(entered);
  if (!widths) {
    const width = context.selector.width?.(layer) ?? undefined;
    const [y] = hidden([{ from: { rows: gather, at: selection?.rows ?? null }, width }]);
    return leave(context, residual, y, of(down, 'down'), postNorm2, selection);
  }
  // One after the other: each has room for all rows.
  let sum = residual;
  for (const { rows, width } of widths) {
    const at = selection ? gatherIds(selection.rows, rows) : rows;
    const [y] = hidden([{ from: some(rows, at), width }]);
    sum = leave(context, sum, y, of(down, 'down'), postNorm2, { rows: at, gate: selection?.gate });
  }
  return sum;
}

const entering = (
  { offsets, positions }: BlockContext,
  layer: number,
  place: Place,
  residual: Node,
  { x, gather, selection }: Entry,
): EnteredRows => ({
  ...{ layer, place, x, gather, residual },
  rows: selection?.rows ?? null,
  offsets: selection?.offsets ?? offsets,
  positions,
});

/** Rows that a product of a part reads. */
interface Reading {
  from: ProductRows;
  part?: UnitPart;
}

/** The part of an expert, and the rows that chose it, which are `at` in the residual stream. */
type ChosenPart = ExpertSelection & { part: UnitPart; at: Node };

// A sum over experts: each adds to the rows that chose it, one after the other. A norm of what they add needs the sum by
// itself first, of the rows that entered.
function addExperts(
  { graph, spec }: BlockContext,
  residual: Node,
  experts: readonly ExpertSelection[],
  selection: RowSelection | null,
  output: Affine<Node>,
  post: Affine<Node> | undefined,
  { out, units }: { out: (part: UnitPart) => Matrix; units: (chosen: readonly ChosenPart[]) => Node[] },
): Node {
  const entered = selection?.rows ?? null;
  let y = post ? zeros(graph, [(entered ?? residual).shape[0], residual.shape[1]]) : residual;
  const none = output.bias ? zeros(graph, [(post ? y : (entered ?? residual)).shape[0], 1]) : null;
  graph.tag(`${graph.currentTag}/${experts.length}`, () => {
    const chosen = experts.map((expert, index) => ({
      ...expert,
      part: { index, count: experts.length },
      at: entered ? gatherIds(entered, expert.rows) : expert.rows,
    }));
    const gates = chosen.map(({ at, gate }) => {
      const token = post ? undefined : selection?.gate?.(at);
      return token && gate ? gatedActivation(token, gate, 'none') : (token ?? gate);
    });
    const addends = units(chosen).map((x, i) => {
      const { part, rows, at } = chosen[i];
      return { x, matrix: out(part), rows: post ? rows : at, gate: gates[i], at };
    });
    y = productsAdd(y, addends);
  });
  if (none) y = graph.tag(`${graph.currentTag}.bias`, () => addBias(y, none, output, post ? null : selection));
  return post
    ? addRows(residual, norm(spec, y, post), { rows: entered, gate: entered && selection!.gate?.(entered) })
    : y;
}

// Once for every row that entered, whatever it chose: a product of zeros, f32 [R, 1], that has the bias.
function addBias(residual: Node, none: Node, { weight, bias }: Affine<Node>, selection: RowSelection | null): Node {
  const rows = selection?.rows;
  const column = weightPart(residual.graph, weight, 1, { index: 0, count: boundOf(weight.shape[1]) });
  return linearAdd(residual, none, column, {
    bias,
    rows,
    gate: selection?.gate?.(selection.rows),
  });
}
