// An encoder assembled from blocks: from token ids to features of every token, and from there to scores or one vector a text.
import type { Graph, Node } from '../graph/graph.js';
import { add, embedding, gatherRows, linear, segmentMean, softcap } from '../graph/index.js';
import { InvalidArgumentError } from '../native/errors.js';
import { attentionBlock, type BlockContext, embed, feedForwardBlock, norm } from './blocks.js';
import { subLayerTag } from './decoder.js';
import type { EncoderNodes } from './encoder_weights.js';
import { type Place, type Selector, selectEverything } from './select.js';
import type { EncoderSpec } from './spec.js';
import type { Affine } from './weights.js';

export interface EncoderInputs {
  /** Token ids of all sequences end to end, i32 [N]. */
  readonly ids: Node;
  /** Position of every row in its sequence, i32 [N]. */
  readonly positions: Node;
  /** Kind of every token, i32 [N]; only of models that have token types. */
  readonly types?: Node;
  /** Where the sequences begin and the last one ends, i32 [S + 1]. */
  readonly offsets: Node;
}

export interface EncoderOptions {
  /** Filled with the embeddings and the residual stream after each layer, f32 [N, D]. */
  readonly residuals?: Node[];
  /** What the next layer reads in place of the residual stream after `layer`, f32 [N, D]. */
  readonly after?: (layer: number, x: Node) => Node;
  /** Filled with what the last product of every sub-layer reads: values of its heads or units, f32 [N, heads * headDim or units]. */
  readonly units?: Node[];
  /** Run every layer again in the backward pass instead of keeping what it computed. */
  readonly recompute?: boolean;
}

/** Embeddings of every token, normalised: f32 [N, D]. Counted under `embed`. */
export function encoderEmbeddings(
  graph: Graph,
  spec: EncoderSpec,
  weights: EncoderNodes,
  { ids, positions, types }: Omit<EncoderInputs, 'offsets'>,
): Node {
  return graph.tag('embed', () => {
    const tokens = weights.embedUp
      ? add(linear(embedding(weights.embed, ids), weights.embedUp.weight), embedding(weights.positions, positions))
      : embed(spec, weights, ids, positions);
    return norm(spec, types ? add(tokens, embedding(weights.tokenTypes!, types)) : tokens, weights.embedNorm);
  });
}

/**
 * The residual stream x [N, D] after the layers `from` up to `to`, that one left out. Work is counted under `L{layer}.attn`,
 * `L{layer}.mlp`.
 */
export function encoderLayers(
  graph: Graph,
  spec: EncoderSpec,
  weights: EncoderNodes,
  x: Node,
  { positions, offsets }: Pick<EncoderInputs, 'positions' | 'offsets'>,
  selector: Selector = selectEverything,
  {
    from = 0,
    to = spec.layers,
    residuals = [],
    recompute = false,
    after,
    units,
  }: EncoderOptions & { from?: number; to?: number } = {},
): Node {
  const context: BlockContext = { graph, spec, positions, offsets, selector, units, keys: new Map() };
  let y = x;
  for (const [i, layer] of weights.layers.slice(from, to).entries()) {
    const run = (place: Place, build: () => Node) => {
      if (selector.runs(from + i, place)) y = graph.tag(subLayerTag(from + i, place), build);
    };
    const block = () => {
      run('attn', () => norm(spec, attentionBlock(context, from + i, y, layer), layer.norm1));
      run('mlp', () => norm(spec, feedForwardBlock(context, from + i, y, layer), layer.norm2));
      return y;
    };
    residuals.push(recompute ? graph.checkpoint(block) : block());
    if (after && from + i + 1 < spec.layers) y = after(from + i, y);
  }
  return y;
}

/**
 * Builds an encoder. Work is counted under `embed`, `L{layer}.attn`, `L{layer}.mlp`.
 *
 * @param selector rows that it keeps out of a sub-layer are normalised after it all the same
 * @returns features of every token, f32 [N, D]
 */
export function encoder(
  graph: Graph,
  spec: EncoderSpec,
  weights: EncoderNodes,
  inputs: EncoderInputs,
  selector: Selector = selectEverything,
  { residuals = [], ...options }: EncoderOptions = {},
): Node {
  const x = encoderEmbeddings(graph, spec, weights, inputs);
  residuals.push(x);
  return encoderLayers(graph, spec, weights, x, inputs, selector, { residuals, ...options });
}

/**
 * What the head makes of features x [N, D], or of `rows` of them, i32 [R]: scores of tokens or classes before softmax, f32
 * [N or R, vocab or classes]. Counted under `head`.
 */
export function headLogits(
  graph: Graph,
  spec: EncoderSpec,
  { head }: EncoderNodes,
  x: Node,
  rows: Node | null = null,
): Node {
  if (!head) throw new InvalidArgumentError(`[model] a model for ${spec.encoder.task} has no head`);
  const { headAct } = spec.encoder;
  return graph.tag('head', () => {
    const act = headAct === 'tanh' ? 'none' : headAct;
    const dense = linear(x, head.dense.weight, { bias: head.dense.bias, rows, act });
    // tanh is a cap of 1.
    const y = headAct === 'tanh' ? softcap(dense, 1) : dense;
    return linear(head.norm ? norm(spec, y, head.norm) : y, head.out.weight, { bias: head.out.bias });
  });
}

/**
 * Scores before softmax of an exit's head, `weight tanh(h) + bias` of rows `tokens` i32 [S] of the residual stream x [N, D]
 * (COST-EFF, arXiv 2210.15523): f32 [S, classes]. Counted under `exit`.
 */
export function exitLogits(graph: Graph, { weight, bias }: Affine<Node>, x: Node, tokens: Node): Node {
  // tanh is a cap of 1.
  return graph.tag('exit', () => linear(softcap(gatherRows(x, tokens), 1), weight, { bias }));
}

/** How one vector is made of the features of a text's tokens: their mean, the first one's, the last one's. */
export type Pooling = 'mean' | 'cls' | 'last';
export const poolings: readonly Pooling[] = ['mean', 'cls', 'last'];

/**
 * One vector for each of S sequences: features x [N, D], offsets i32 [S + 1], `tokens` i32 [S]: the first row of each sequence, or
 * the last one for 'last'. Returns f32 [S, D]. Counted under `pool`.
 */
export function pool(graph: Graph, x: Node, offsets: Node, tokens: Node, pooling: Pooling): Node {
  return graph.tag('pool', () =>
    pooling === 'mean' ? segmentMean(x, offsets, tokens.shape[0]) : gatherRows(x, tokens),
  );
}
