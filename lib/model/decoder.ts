// A decoder assembled from blocks: from token ids to the residual stream, and from there to logits.
import type { Graph, Node } from '../graph/graph.js';
import { type Cache, linear, softcap } from '../graph/index.js';
import { attentionBlock, type BlockContext, embed, feedForwardBlock, norm } from './blocks.js';
import { type Place, type Selector, selectEverything } from './select.js';
import type { ModelSpec } from './spec.js';
import { Streams, streamsTag } from './streams.js';
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
   * `/{count}` for what is done once for each of so many experts; where there are several residual streams
   * `L{layer}.streams` and `streams`.
   */
  readonly tagPrefix?: string;
  /** Run every block again in the backward pass instead of keeping what it computed; not with several residual streams. */
  readonly recompute?: boolean;
  /** Filled with the residual stream before the first sub-layer and after each that runs, f32 [N, D]; of several the first. */
  readonly residuals?: Node[];
  /** Filled with what each sub-layer that runs made of the residual stream; what mixes several is no part of it. */
  readonly changes?: Change[];
  /**
   * Filled with what the last product of every sub-layer that is not cut into experts reads: values of its heads or units after
   * the activation, f32 [rows that entered, heads * headDim or units].
   */
  readonly units?: Node[];
}

/** The residual stream around a sub-layer, f32 [N, D]. */
export interface Change {
  readonly before: Node;
  readonly after: Node;
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
  { tagPrefix = '', recompute = false, residuals = [], changes = [], units }: DecoderOptions = {},
): Node {
  const { ids, positions, offsets, caches } = inputs;
  const context: BlockContext = { graph, spec, positions, offsets, selector, units, keys: new Map() };
  let x = graph.tag(`${tagPrefix}embed`, () => embed(spec, weights, ids, positions));
  const streams = spec.streams && graph.tag(`${tagPrefix}streams`, () => new Streams(context, weights, ids, x));
  residuals.push(x);
  weights.layers.forEach((layer, i) => {
    const run = (place: Place, build: () => Node) => {
      if (!selector.runs(i, place)) return;
      const before = x;
      x = graph.tag(tagPrefix + subLayerTag(i, place), build);
      changes.push({ before, after: x });
      residuals.push(x);
    };
    const around = (build: (streams: Streams) => Node) => {
      if (streams) x = graph.tag(tagPrefix + streamsTag(i), () => build(streams));
    };
    const block = () => {
      around((streams) => streams.predict(layer));
      run('attn', () => attentionBlock(context, i, x, layer, caches && ((parts) => caches(i, parts))));
      around((streams) => streams.withLaurel(x, layer));
      run('mlp', () => feedForwardBlock(context, i, x, layer));
      around((streams) => streams.correct(x, layer));
      return x;
    };
    if (recompute && !streams) graph.checkpoint(block);
    else block();
  });
  return streams ? graph.tag(`${tagPrefix}streams`, () => streams.join()) : x;
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
  return graph.tag(`${tagPrefix}head`, () =>
    softcap(linear(finalNorm(spec, weights, x, rows), weights.head), spec.logitSoftcap),
  );
}
