// The compute of the full model by formula, counted as the kernels count it: a multiply and an add are two.
import type { Place } from './select.js';
import type { ModelSpec } from './spec.js';

/**
 * (query, key) pairs that causal attention sees: a segment of T new rows after c cached ones has `c T + T (T + 1) / 2`.
 *
 * @param lengths new rows of every segment
 * @param cached rows that came before in every segment; default none
 */
export function causalPairs(lengths: readonly number[], cached: readonly number[] = []): number {
  return lengths.reduce((sum, t, i) => sum + (cached[i] ?? 0) * t + (t * (t + 1)) / 2, 0);
}

/** FLOPs of one attention sub-layer: four products of all rows, and scores and sums over the pairs seen. */
export function attentionFlops(spec: ModelSpec, lengths: readonly number[], cached: readonly number[] = []): number {
  const { hidden, heads, kvHeads, headDim } = spec;
  const rows = lengths.reduce((sum, t) => sum + t, 0);
  const products = 2 * rows * hidden * headDim * (2 * heads + 2 * kvHeads);
  return products + 4 * headDim * heads * causalPairs(lengths, cached);
}

/** FLOPs of the keys and values of `rows` rows, a part of attentionFlops. */
export function keyValueFlops({ hidden, kvHeads, headDim }: ModelSpec, rows: number): number {
  return 2 * rows * hidden * headDim * 2 * kvHeads;
}

/** FLOPs of one feed-forward sub-layer over `rows` rows. */
export function feedForwardFlops({ hidden, ffn, gated }: ModelSpec, rows: number): number {
  return 2 * rows * hidden * ffn * (gated ? 3 : 2);
}

/** FLOPs of the logits of `rows` rows. */
export function headFlops({ hidden, vocab }: ModelSpec, rows: number): number {
  return 2 * rows * hidden * vocab;
}

export interface ForwardFlops {
  /** Of one layer; all layers are alike. */
  readonly perLayer: Readonly<Record<Place, number>>;
  readonly head: number;
  /** All layers and the head. */
  readonly total: number;
}

/**
 * FLOPs of a forward pass of the full model. One decoding step has one new row per segment: `lengths` all 1, `cached` the
 * contexts.
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
  const perLayer = { attn: attentionFlops(spec, lengths, cached), mlp: feedForwardFlops(spec, rows) };
  const head = headFlops(spec, headRows ?? rows);
  return { perLayer, head, total: spec.layers * (perLayer.attn + perLayer.mlp) + head };
}
