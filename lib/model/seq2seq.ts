// An encoder-decoder model assembled from blocks: from a source to its features, and from these and a target to logits.
import type { Graph, Node } from '../graph/graph.js';
import { type Cache, cacheAppend, linear, scale } from '../graph/index.js';
import { attentionBlock, type BlockContext, crossAttentionBlock, embed, feedForwardBlock, norm } from './blocks.js';
import type { Change, DecoderInputs } from './decoder.js';
import type { EncoderInputs, EncoderOptions } from './encoder.js';
import type { Stack } from './parts.js';
import { product, wholeMatrix } from './products.js';
import { type Selector, selectEverything } from './select.js';
import type { Seq2SeqSpec } from './seq2seq_spec.js';
import { type CrossWeights, partOf, type Seq2SeqNodes, type StackWeights } from './seq2seq_weights.js';
import type { ModelSpec } from './spec.js';
import type { Affine, LayerWeights } from './weights.js';

/** Tags that work is counted under: sub-layers of the decoder as in any, those of the encoder with E; of modules by their span. */
export const seq2seqTag = (stack: Stack, part: string, place: 'attn' | 'cross' | 'mlp'): string =>
  `${stack === 'encoder' ? 'E' : 'L'}${part}.${place}`;

/** What the decoder reads of its sources: their features, or keys and values that were made of them, by layer. */
export type Source =
  | {
      /** f32 [N, D], all sources end to end. */
      readonly features: Node;
      /** i32 [S + 1] */
      readonly offsets: Node;
    }
  | { readonly caches: (layer: number) => Cache };

/** What is selected in a stack, and what training wants of it beside what it gives. */
export type StackOptions = Pick<EncoderOptions, 'units' | 'recompute'> & {
  /**
   * Of its layers by their places among those that run; default everything. Rows that it keeps out of a sub-layer, or all where that does not
   * run, are normalised after it all the same.
   */
  readonly selector?: Selector;
  /** Filled with the residual stream after each layer, f32 [N, D]. */
  readonly residuals?: Node[];
  /** Filled with what each attention to itself and feed-forward added to and the sum, before that is normalised, f32 [N, D]. */
  readonly changes?: Change[];
};

/** How many `units` a layer fills, what its last products read: its attention's, of a decoder also that to the source, and its feed-forward's. */
export const unitsPerLayer = { encoder: 2, decoder: 3 } as const;

/** Features of sources, f32 [N, D]. Work is counted under `embed`, `E{layer}.attn`, `E{layer}.mlp`. */
export function encodeSource(
  graph: Graph,
  spec: Seq2SeqSpec,
  weights: Seq2SeqNodes,
  inputs: Pick<EncoderInputs, 'ids' | 'positions' | 'offsets'>,
  { residuals = [], recompute = false, ...options }: StackOptions = {},
): Node {
  const { encoder } = weights;
  const context = contextOf(graph, spec.encoder, encoder.bias, inputs, options);
  let x = start(graph, spec.encoder, weights.embed, encoder, inputs);
  encoder.layers.forEach((layer, i) => {
    const at = { stack: 'encoder', part: partOf(encoder, i), i } as const;
    const block = () => feedForward(context, at, selfAttention(context, at, x, layer), layer);
    x = recompute ? graph.checkpoint(block) : block();
    residuals.push(x);
  });
  return encoder.finalNorm ? graph.tag('embed', () => norm(spec.encoder, x, encoder.finalNorm!)) : x;
}

/** Appends the keys and values that every layer of the decoder sees of sources with such features; counted under `L{layer}.cross`. */
export function cacheSource(
  graph: Graph,
  weights: Seq2SeqNodes,
  { features, offsets }: { features: Node; offsets: Node },
  caches: (layer: number) => Cache,
): void {
  weights.decoder.layers.forEach(({ cross }, i) => {
    graph.tag(seq2seqTag('decoder', partOf(weights.decoder, i), 'cross'), () => {
      const { k, v } = crossKeys(cross, features);
      cacheAppend(k, v, offsets, caches(i));
    });
  });
}

const crossKeys = ({ k, v }: Pick<CrossWeights<Node>, 'k' | 'v'>, features: Node) => ({
  k: product(features, wholeMatrix(k), { at: null }),
  v: product(features, wholeMatrix(v), { at: null }),
});

/**
 * What the last layer of the decoder gives, f32 [N, D]. Work is counted under `embed`, `L{layer}.attn`, `L{layer}.cross`,
 * `L{layer}.mlp`.
 *
 * @param inputs.caches of self-attention, to continue targets from earlier runs
 * @param source segment s of the targets reads source s; from caches only targets of one new row each
 */
export function decodeTarget(
  graph: Graph,
  spec: Seq2SeqSpec,
  weights: Seq2SeqNodes,
  inputs: DecoderInputs,
  source: Source,
  { residuals = [], recompute = false, ...options }: StackOptions = {},
): Node {
  const { decoder } = weights;
  const context = contextOf(graph, spec.decoder, decoder.bias, inputs, options);
  let x = start(graph, spec.decoder, weights.embed, decoder, inputs);
  decoder.layers.forEach((layer, i) => {
    const at = { stack: 'decoder', part: partOf(decoder, i), i } as const;
    const block = () => {
      const own = selfAttention(context, at, x, layer, inputs.caches);
      const both = graph.tag(seq2seqTag('decoder', at.part, 'cross'), () => {
        const keys =
          'caches' in source
            ? { cache: source.caches(i) }
            : { ...crossKeys(layer.cross, source.features), offsets: source.offsets };
        return leave(spec.decoder, crossAttentionBlock(context, own, layer.cross, keys), layer.cross.norm);
      });
      return feedForward(context, at, both, layer);
    };
    x = recompute ? graph.checkpoint(block) : block();
    residuals.push(x);
  });
  return decoder.finalNorm ? graph.tag('head', () => norm(spec.decoder, x, decoder.finalNorm!)) : x;
}

/** Logits of all rows of what `decodeTarget` gives: f32 [N, vocab]. Counted under `head`. */
export function targetLogits(graph: Graph, spec: Seq2SeqSpec, { head }: Seq2SeqNodes, x: Node): Node {
  return graph.tag('head', () => linear(scale(x, spec.headScale), head.weight, { bias: head.bias }));
}

type StackContext = BlockContext & Pick<StackOptions, 'changes'>;

const contextOf = (
  graph: Graph,
  spec: ModelSpec,
  bias: Node | undefined,
  { positions, offsets }: Pick<DecoderInputs, 'positions' | 'offsets'>,
  { units, changes, selector = selectEverything }: Pick<StackOptions, 'units' | 'changes' | 'selector'>,
): StackContext => ({ graph, spec, positions, offsets, bias, units, changes, selector, keys: new Map() });

function start(
  graph: Graph,
  spec: ModelSpec,
  table: Node,
  { positions, embedNorm }: StackWeights<Node, unknown>,
  inputs: Pick<DecoderInputs, 'ids' | 'positions'>,
): Node {
  return graph.tag('embed', () => {
    const x = embed(spec, { embed: table, positions }, inputs.ids, inputs.positions);
    return embedNorm ? norm(spec, x, embedNorm) : x;
  });
}

// Where norms come after sub-layers, they are of the residual stream.
const leave = (spec: ModelSpec, x: Node, after: Affine<Node>): Node =>
  spec.normPlace === 'post' ? norm(spec, x, after) : x;

/** A layer of a stack: what it is, and where among those that run. */
interface Place {
  readonly stack: Stack;
  readonly part: string;
  readonly i: number;
}

function selfAttention(
  context: StackContext,
  at: Place,
  x: Node,
  layer: LayerWeights<Node>,
  caches?: DecoderInputs['caches'],
): Node {
  return subLayer(context, at, 'attn', x, layer.norm1, () =>
    attentionBlock(context, at.i, x, layer, caches && ((parts) => caches(at.i, parts))),
  );
}

function feedForward(context: StackContext, at: Place, x: Node, layer: LayerWeights<Node>): Node {
  return subLayer(context, at, 'mlp', x, layer.norm2, () => feedForwardBlock(context, at.i, x, layer));
}

function subLayer(
  { graph, spec, selector, changes }: StackContext,
  { stack, part, i }: Place,
  place: 'attn' | 'mlp',
  before: Node,
  norm: Affine<Node>,
  build: () => Node,
): Node {
  return graph.tag(seq2seqTag(stack, part, place), () => {
    const after = selector.runs(i, place) ? build() : before;
    changes?.push({ before, after });
    return leave(spec, after, norm);
  });
}
