// The seam between a decoder and what is selected in it: which sub-layers run, which rows enter them, what corrects them.
import type { Node, Size } from '../graph/index.js';

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
  /** Factor of what selected rows, i32 [R], add to the residual stream, f32 [R]; absent: 1. */
  readonly gate?: (rows: Node) => Node;
}

/** Rows that chose one expert of a sub-layer. */
export interface ExpertSelection {
  /** Ascending indices into the rows that entered the sub-layer, i32 [R]. */
  readonly rows: Node;
  /** Where the segments of these rows lie, i32 [S + 1]. */
  readonly offsets: Node;
  /** Factor of what each of them adds to the residual stream, f32 [R]; absent: 1. */
  readonly gate?: Node;
  /**
   * Of attention, whether only these rows have keys and values of the expert's heads, which are then no other expert's;
   * default: all rows that have keys in the layer.
   */
  readonly ownKeys?: boolean;
}

/** Rows of a feed-forward for which so many of its units act. */
export interface RowsAtWidth {
  /** Ascending indices into the rows that entered the sub-layer, i32 [R]. */
  readonly rows: Node;
  /** A prefix of the units, at most all. */
  readonly width: Size;
}

/** The rows that entered a sub-layer, as its products read them. */
export interface EnteredRows {
  readonly layer: number;
  readonly place: Place;
  /** Normalised, f32 [N or R, D]. */
  readonly x: Node;
  /** Which rows of `x` entered, i32 [R]; null: all. */
  readonly gather: Node | null;
  /** The residual stream, f32 [N, D]. */
  readonly residual: Node;
  /** Which rows of it they are, i32 [R]; null: all. */
  readonly rows: Node | null;
  /** Their segments, i32 [S + 1]. */
  readonly offsets: Node;
  /** Positions of all rows of the residual stream in their sequences, i32 [N]. */
  readonly positions: Node;
}

/** The matrices of a layer. */
export const projections = ['q', 'k', 'v', 'o', 'gate', 'up', 'down'] as const;
export type Projection = (typeof projections)[number];

/** The axis of a projection [outputs, inputs] that its units, of heads or of the feed-forward, lie along. */
export const unitAxis = (projection: Projection): 0 | 1 => (projection === 'o' || projection === 'down' ? 1 : 0);

/** The sub-layer of a projection. */
export const placeOf = (projection: Projection): Place =>
  projection === 'gate' || projection === 'up' || projection === 'down' ? 'mlp' : 'attn';

/** One of `count` equal parts of the units of a projection. */
export interface UnitPart {
  readonly index: number;
  readonly count: number;
}

/** A low-rank correction of a projection w: `x (w + b a)^T` with a [r, inputs] and b [outputs, r] (LoRA, arXiv 2106.09685). */
export interface LowRank {
  readonly a: Node;
  readonly b: Node;
  /** Which ranks count for each row of the residual stream, 1 or 0: f32 [N, r]. Absent: all. */
  readonly mask?: Node;
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
  /**
   * Of a sub-layer cut into as many experts of equal width, who chose each; null or absent: not cut. Experts of attention
   * are its heads, or groups of them that share a head of keys and values.
   */
  experts?(entered: EnteredRows): readonly ExpertSelection[] | null;
  /** Units of a feed-forward that act: a prefix of them, at most all. Null or absent: all. Not of one cut into experts. */
  width?(layer: number): Size | null;
  /** Where rows differ in that: which have which width, each that entered once. Null or absent: `width` is that of all. */
  widths?(entered: EnteredRows): readonly RowsAtWidth[] | null;
  /** The correction of a projection, or of one part of its units; null or absent: none. */
  patch?(layer: number, projection: Projection, part?: UnitPart): LowRank | null;
}

/** The backbone as it is. */
export const selectEverything: Selector = { runs: () => true, rows: () => null };
