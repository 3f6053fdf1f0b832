// The seam between a decoder and what is selected in it: which sub-layers run, and which rows enter them.
import type { Node } from '../graph/graph.js';

export const places = ['attn', 'mlp'] as const;
/** A sub-layer of a block. */
export type Place = (typeof places)[number];

/** The rows that enter a sub-layer. */
export interface RowSelection {
  /** Ascending row indices, i32 [R]. */
  readonly rows: Node;
  /** Where the segments of the selected rows lie, i32 [S + 1]. */
  readonly offsets: Node;
  /** Whether rows that do not enter attention still have keys and values; default no. */
  readonly allKeys?: boolean;
  /** Factor of what each selected row adds to the residual stream, f32 [R]; absent: 1. */
  readonly gate?: Node;
}

/** What a selector sees of the sub-layer it decides about. */
export interface SubLayer {
  readonly layer: number;
  readonly place: Place;
  /** The residual stream, f32 [N, D]. */
  readonly residual: Node;
  /** All rows normalised, f32 [N, D]; computed only when asked for. */
  readonly normed: () => Node;
  /** Segments of the residual stream, i32 [S + 1]. */
  readonly offsets: Node;
}

/** Decides while a decoder is built. */
export interface Selector {
  /** Whether a sub-layer is there at all. */
  runs(layer: number, place: Place): boolean;
  /** The rows that enter a sub-layer; null: all. */
  rows(subLayer: SubLayer): RowSelection | null;
}

/** The backbone as it is. */
export const selectEverything: Selector = { runs: () => true, rows: () => null };
