// The compute of the full model by formula, counted as the kernels count it: a multiply and an add are two.
import type { Place } from './select.js';
import type { Seq2SeqSpec } from './seq2seq_spec.js';
import { type EncoderSpec, type LayerSpec, layerOf, type ModelSpec } from './spec.js';

/** Keys that a query with `keys` up to its own sees through a window; 0: all. */
export const inWindow = (keys: number, window: number): number => (window > 0 ? Math.min(keys, window) : keys);

/**
 * (query, key) pairs that causal attention sees: without a window a segment of T new rows after c cached ones has
 * `c T + T (T + 1) / 2`.
 *
 * @param lengths new rows of every segment
 * @param cached rows that came before in every segment; default none
 * @param window keys that a query sees at most; default 0, all
 */
export function causalPairs(lengths: readonly number[], cached: readonly number[] = [], window = 0): number {
  // Of the first n rows of a sequence.
  const first = (n: number): number => {
    const inside = inWindow(n, window);
    return (inside * (inside + 1)) / 2 + (n - inside) * window;
  };
  return lengths.reduce((sum, t, i) => sum + first((cached[i] ?? 0) + t) - first(cached[i] ?? 0), 0);
}

/** The sizes of one attention sub-layer. */
type AttentionSizes = Pick<
  ModelSpec & LayerSpec,
  'hidden' | 'heads' | 'kvHeads' | 'headDim' | 'window' | 'keysOf' | 'encoder'
>;

/** FLOPs of one attention sub-layer: its products of all rows, and scores and sums over the pairs seen. */
export function attentionFlops(
  sizes: AttentionSizes,
  lengths: readonly number[],
  cached: readonly number[] = [],
): number {
  const { hidden, heads, headDim, window, keysOf, encoder } = sizes;
  const rows = lengths.reduce((sum, t) => sum + t, 0);
  const pairs = encoder ? lengths.reduce((sum, t) => sum + t * t, 0) : causalPairs(lengths, cached, window);
  const products = 2 * rows * hidden * headDim * 2 * heads;
  return products + (keysOf === null ? keyValueFlops(sizes, rows) : 0) + 4 * headDim * heads * pairs;
}

/** FLOPs of the keys and values of `rows` rows, a part of attentionFlops where the layer has its own. */
export function keyValueFlops(sizes: Pick<ModelSpec, 'hidden' | 'kvHeads' | 'headDim'>, rows: number): number {
  const { hidden, kvHeads, headDim } = sizes;
  return 2 * rows * hidden * headDim * 2 * kvHeads;
}

/** FLOPs of one feed-forward sub-layer over `rows` rows. */
export function feedForwardFlops(
  { hidden, ffn, gated }: Pick<ModelSpec, 'hidden' | 'ffn' | 'gated'>,
  rows: number,
): number {
  return 2 * rows * hidden * ffn * (gated ? 3 : 2);
}

/** FLOPs of several residual streams, and of what comes with them, over `rows` rows. */
export function streamFlops({ hidden, layers, streams }: ModelSpec, rows: number): number {
  if (!streams) return 0;
  const { count, laurelRank, perLayerWidth } = streams;
  // Twice a router and its coefficients, LAuReL's product, and three products with a layer's own embedding.
  const mixing = 2 * hidden * count + count * count * (count + 1);
  const perLayer = mixing + 2 * hidden * laurelRank + 3 * hidden * perLayerWidth;
  return 2 * rows * (layers * perLayer + 2 * (count - 1) * hidden * hidden);
}

/** FLOPs of the logits of `rows` rows. */
export function headFlops({ hidden, vocab }: ModelSpec, rows: number): number {
  return 2 * rows * hidden * vocab;
}

export interface ForwardFlops {
  readonly perLayer: readonly Readonly<Record<Place, number>>[];
  /** What is not in sub-layers: several residual streams. */
  readonly streams: number;
  readonly head: number;
  /** All of this. */
  readonly total: number;
}

/**
 * FLOPs of a forward pass of the full model. One decoding step has one new row per segment: `lengths` all 1, `cached` the
 * contexts. Of an encoder every row sees all of its segment, and the head is that of classes, if there is one.
 *
 * @param lengths new rows of every segment
 * @param options.cached rows that came before in every segment; default none
 * @param options.headRows rows whose logits are computed; default all new rows
 */
export function forwardFlops(
  spec: ModelSpec,
  lengths: readonly number[],
  { cached = [], headRows }: { cached?: readonly number[]; headRows?: number } = {},
): ForwardFlops {
  const rows = lengths.reduce((sum, t) => sum + t, 0);
  const perLayer = spec.perLayer.map((_, i) => {
    const layer = layerOf(spec, i);
    return { attn: attentionFlops(layer, lengths, cached), mlp: feedForwardFlops(layer, rows) };
  });
  const head = spec.encoder ? classifierFlops(spec as EncoderSpec, lengths.length) : headFlops(spec, headRows ?? rows);
  const streams = streamFlops(spec, rows);
  return { perLayer, streams, head, total: perLayer.reduce((sum, { attn, mlp }) => sum + attn + mlp, streams + head) };
}

/** FLOPs of the head of classes for so many sequences; 0 of an encoder without. */
function classifierFlops({ hidden, encoder }: EncoderSpec, sequences: number): number {
  return encoder.task === 'sequence-classification' ? 2 * sequences * hidden * (hidden + encoder.labels.length) : 0;
}

/** Layers of an encoder that run, `to` left out, and the units of every layer's feed-forward, [layers]; default all. */
export interface EncoderPart {
  readonly from?: number;
  readonly to?: number;
  readonly widths?: readonly number[] | null;
}

/**
 * FLOPs of an encoder over sequences of so many rows.
 *
 * @param end what comes after the layers: the head (of all rows for tokens, of one for classes), that of an exit, or nothing that
 * counts
 */
export function encoderFlops(
  spec: EncoderSpec,
  lengths: readonly number[],
  end: 'head' | 'exit' | 'none',
  { from = 0, to = spec.layers, widths = null }: EncoderPart = {},
): number {
  const { hidden, encoder, vocab } = spec;
  const rows = lengths.reduce((sum, t) => sum + t, 0);
  let dense = from === 0 ? 2 * rows * (encoder.embeddingRank ?? 0) * hidden : 0;
  for (let i = from; i < to; i++) {
    const layer = layerOf(spec, i);
    const { gated, ffn } = layer;
    dense += attentionFlops(layer, lengths) + feedForwardFlops({ hidden, gated, ffn: widths?.[i] ?? ffn }, rows);
  }
  if (end === 'none') return dense;
  if (end === 'exit') return dense + 2 * lengths.length * hidden * encoder.labels.length;
  const classifies = encoder.task === 'sequence-classification';
  return dense + (classifies ? classifierFlops(spec, lengths.length) : 2 * rows * hidden * (hidden + vocab));
}

/** FLOPs of reading a source of so many tokens, with the keys and values that the layers of the decoder see of it. */
export function sourceFlops({ encoder, decoder }: Seq2SeqSpec, tokens: number): number {
  return encoderFlops(encoder, [tokens], 'none') + decoder.layers * keyValueFlops(decoder, tokens);
}

/** FLOPs of what generations of an encoder-decoder model are made of. */
export interface Seq2SeqFlops {
  /** Of reading a source of so many tokens. */
  source(tokens: number): number;
  /** Of one token of a target after so many, for a source of so many. */
  target(before: number, source: number): number;
}

/** Those of the model as it is. */
export const seq2seqFlops = (spec: Seq2SeqSpec): Seq2SeqFlops => ({
  source: (tokens) => sourceFlops(spec, tokens),
  target: (before, source) => targetFlops(spec, before, source),
});

/** FLOPs of reading a source of so many tokens and writing so many of a target. */
export function writingFlops(of: Seq2SeqFlops, source: number, target: number): number {
  // Every token costs as much more than the one before.
  const [first, last] = [0, target - 1].map((before) => of.target(before, source));
  return of.source(source) + (target * (first + last)) / 2;
}

/** FLOPs of one token of a target after so many, its logits included, for a source of so many tokens. */
export function targetFlops({ decoder }: Seq2SeqSpec, before: number, source: number): number {
  const { hidden, heads, headDim, layers } = decoder;
  const cross = 2 * hidden * headDim * heads * 2 + 4 * headDim * heads * source;
  return forwardFlops(decoder, [1], { cached: [before] }).total + layers * cross;
}
