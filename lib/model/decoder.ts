// A decoder assembled from blocks: from token ids to the residual stream, and from there to logits.
import type { Graph, Node } from '../graph/graph.js';
import { type Cache, linear } from '../graph/index.js';
import { attentionBlock, type BlockContext, embed, feedForwardBlock, norm } from './blocks.js';
import { type Place, type Selector, selectEverything } from './select.js';
import type { ModelSpec } from './spec.js';
import type { DecoderNodes } from './weights.js';

export interface DecoderInputs {
  /** Token ids of all sequences end to end, i32 [N]. */
  readonly ids: Node;
  /** Position of every row in its sequence, i32 [N]. */
  readonly positions: Node;
  /** Where the sequences begin and the last one ends, i32 [S + 1]. */
  readonly offsets: Node;
  /**
   * To continue sequences from earlier runs: the caches of a layer, one for each of so many equal parts of its heads of
   * keys and values. A layer is cut into as many parts in every run.
   */
  readonly caches?: (layer: number, parts: number) => readonly Cache[];
}

export interface DecoderOptions {
  /**
   * Comes before the tags that work is counted under: `embed`, `L{layer}.attn`, `L{layer}.mlp`, the latter two with
   * `/{count}` for what is done once for each of so many experts.
   */
  readonly tagPrefix?: string;
  /** Run every block again in the backward pass instead of keeping what it computed. */
  readonly recompute?: boolean;
  /** Filled with the residual stream before the first sub-layer and after each that runs, f32 [N, D]. */
  readonly residuals?: Node[];
}

/** The tag under which the work of a sub-layer is counted. */
export const subLayerTag = (layer: number, place: Place): string => `L${layer}.${place}`;

/**
 * Builds a decoder.
 *
 * @returns the residual stream after the last layer, before the final norm, f32 [N, D]
 */
export function decoder(
  graph: Graph,
  spec: ModelSpec,
  weights: DecoderNodes,
  inputs: DecoderInputs,
  selector: Selector = selectEverything,
  { tagPrefix = '', recompute = false, residuals = [] }: DecoderOptions = {},
): Node {
  const { ids, positions, offsets, caches } = inputs;
  const context: BlockContext = { graph, spec, positions, offsets, selector };
  let x = graph.tag(`${tagPrefix}embed`, () => embed(spec, weights, ids, positions));
  residuals.push(x);
  weights.layers.forEach((layer, i) => {
    const run = (place: Place, build: () => Node) => {
      if (!selector.runs(i, place)) return;
      x = graph.tag(tagPrefix + subLayerTag(i, place), build);
      residuals.push(x);
    };
    const block = () => {
      run('attn', () => attentionBlock(context, i, x, layer, caches && ((parts) => caches(i, parts))));
      run('mlp', () => feedForwardBlock(context, i, x, layer));
      return x;
    };
    if (recompute) graph.checkpoint(block);
    else block();
  });
  return x;
}

/** The final norm of all rows of the residual stream x [N, D], or of `rows` written compact: what the head multiplies. */
export function finalNorm(spec: ModelSpec, weights: DecoderNodes, x: Node, rows: Node | null = null): Node {
  return norm(spec, x, weights.finalNorm, rows);
}

/** Logits of all rows, or of `rows`: f32 [N or R, vocab]. Counted under `head`. */
export function logits(
  graph: Graph,
  spec: ModelSpec,
  weights: DecoderNodes,
  x: Node,
  { rows = null, tagPrefix = '' }: { rows?: Node | null; tagPrefix?: string } = {},
): Node {
  return graph.tag(`${tagPrefix}head`, () => linear(finalNorm(spec, weights, x, rows), weights.head));
}
