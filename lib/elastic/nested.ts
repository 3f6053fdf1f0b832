// Nested feed-forwards (MatFormer, arXiv 2310.07707): sub-models are prefixes of the units, of a width chosen at each run.
import { type Dim, type Graph, routeThreshold, zeros } from '../graph/index.js';
import type { RowsAtWidth, Selector } from '../model/select.js';
import type { ModelSpec } from '../model/spec.js';

/** How units were ordered before training, the most important first: by scores of activations or of gradients, or not. */
export const unitScores = ['activation', 'taylor', 'none'] as const;
export type UnitScores = (typeof unitScores)[number];

/** What was trained at several widths: corrections of a frozen model, the feed-forwards, everything, or modules beside frozen layers. */
export type NestedTraining = 'lora' | 'ffn' | 'all' | 'modules';
export const nestedTrainings: readonly NestedTraining[] = ['lora', 'ffn', 'all', 'modules'];

/** Layers whose feed-forward runs at any width: a prefix of its units. */
export interface Nested {
  /** Ascending. Of an encoder-decoder model all of the decoder, and with them those of the encoder and all modules. */
  layers: readonly number[];
  /** Shares of the units that it is trained at, ascending; the last is 1. */
  granularities: readonly number[];
  /** Widths are multiples of so many units. */
  alignment: number;
  scores: UnitScores;
  /** Widths that a search found best at their cost, from the cheapest on, each as shares of the nested layers. */
  searched?: readonly (readonly number[])[];
  /** SHA-256 of the weights before their units were put in order. */
  permutedFrom?: string;
  /** Absent until trained: slices run, but at whatever quality the order of the units gives. */
  trained?: NestedTraining;
}

/**
 * A share of a feed-forward's units in (0, 1], or a number of them above 1; one for all nested layers or one for each. Of an encoder-decoder
 * model one for all parts.
 */
export type FfnWidth = number | readonly number[];

/**
 * The largest power of two, at most 64, of which all granularities are multiples. Where one is no whole number of units, the
 * largest that divides the units into at least eight parts; granularities are then rounded to it.
 */
export function defaultAlignment(granularities: readonly number[], ffn: number): number {
  const widths = granularities.map((share) => Math.round(share * ffn));
  const exact = widths.every((width, i) => Math.abs(width - granularities[i] * ffn) <= 1e-6 * ffn);
  const fits = (a: number) => (exact ? widths.every((width) => width % a === 0) : ffn % a === 0 && ffn / a >= 8);
  return [64, 32, 16, 8, 4, 2].find(fits) ?? 1;
}

/** The multiple of the alignment nearest to a share of the units. */
export function alignedWidth(share: number, { alignment }: Pick<Nested, 'alignment'>, ffn: number): number {
  return Math.max(1, Math.round((share * ffn) / alignment)) * alignment;
}

/** What a granularity is called as a level: `ffn50`. */
export const widthName = (share: number): string => `ffn${Math.round(share * 1e4) / 100}`;

/** Widths of the granularities, in units, ascending. */
export const granularityWidths = (nested: Pick<Nested, 'granularities' | 'alignment'>, ffn: number): number[] =>
  nested.granularities.map((share) => alignedWidth(share, nested, ffn));

/**
 * What is wrong with a width of nested layers, or null. Shares are rounded to the alignment; units must be multiples of it.
 */
export function widthProblem(width: unknown, { layers, alignment }: Nested, ffn: number): string | null {
  const list = Array.isArray(width) ? width : [width];
  if (Array.isArray(width) && width.length !== layers.length) {
    return `must be one width, or ${layers.length}, one per nested layer, got ${JSON.stringify(width)}`;
  }
  for (const value of list) {
    const share = typeof value === 'number' && value > 0 && value <= 1;
    const units = Number.isInteger(value) && value > 1 && value <= ffn;
    if (!share && !units) {
      return `must be a share in (0, 1] or a number of units up to ${ffn}, got ${JSON.stringify(value)}`;
    }
    if (units && value % alignment !== 0) {
      const below = Math.floor(value / alignment) * alignment;
      const near = [below, below + alignment].filter((n) => n > 0 && n <= ffn);
      return `must be a multiple of the alignment ${alignment}, such as ${near.join(' or ')}, got ${value}`;
    }
  }
  return null;
}

/** Units of the feed-forward of every layer, [layers], at a width without a problem; null where all are whole. */
export function layerWidths(width: FfnWidth, nested: Nested, layers: number, ffn: number): number[] | null {
  const widths = new Array<number>(layers).fill(ffn);
  for (const [i, layer] of nested.layers.entries()) {
    const value = typeof width === 'number' ? width : width[i];
    widths[layer] = value > 1 ? value : alignedWidth(value, nested, ffn);
  }
  return widths.every((units) => units === ffn) ? null : widths;
}

/** Mean share of the units of nested layers that a width leaves. */
export function meanWidth(
  { ffnWidth = 1 }: { ffnWidth?: FfnWidth },
  nested: Nested,
  spec: Pick<ModelSpec, 'layers' | 'ffn'>,
): number {
  const widths = layerWidths(ffnWidth, nested, spec.layers, spec.ffn);
  return widths ? nested.layers.reduce((sum, layer) => sum + widths[layer], 0) / (nested.layers.length * spec.ffn) : 1;
}

/** Widths of all layers as settings: the share of each nested layer, or one where they are alike. */
export function widthShares(widths: readonly number[], { layers }: Nested, ffn: number): FfnWidth {
  const shares = layers.map((layer) => widths[layer] / ffn);
  return shares.every((share) => share === shares[0]) ? shares[0] : shares;
}

/**
 * Mix'n'Match: from every layer at the least granularity to every layer whole, the assignments whose widths do not fall with
 * depth and differ by one granularity at most, each one layer wider than the one before; [layers] units each.
 */
export function mixAndMatch(nested: Nested, layers: number, ffn: number): number[][] {
  const widths = granularityWidths(nested, ffn);
  const whole = new Array<number>(layers).fill(ffn);
  const ladder = [whole.map((units, layer) => (nested.layers.includes(layer) ? widths[0] : units))];
  for (const width of widths.slice(1)) {
    for (const layer of nested.layers.toReversed()) ladder.push(ladder.at(-1)!.with(layer, width));
  }
  return ladder;
}

/** The models that budgets choose among, from the cheapest on, [layers] units each: those searched, else Mix'n'Match. */
export function widthLadder(nested: Nested, layers: number, ffn: number): number[][] {
  const whole = new Array<number>(layers).fill(ffn);
  return (
    nested.searched?.map((shares) => layerWidths(shares, nested, layers, ffn) ?? whole) ??
    mixAndMatch(nested, layers, ffn)
  );
}

/** Whether vectors at these widths, [layers] units, are for comparison with those of the full model: it was trained at all of them. */
export const sharesSpace = (widths: readonly number[], nested: Nested, ffn: number): boolean =>
  nested.trained !== undefined &&
  nested.layers.every((layer) => granularityWidths(nested, ffn).includes(widths[layer]));

/** The dim of one width for all feed-forwards of a program. */
export const sharedWidth = 'ffn';

/** One width for all feed-forwards of a program, as that dim. */
export function oneWidth(graph: Graph, ffn: number): NonNullable<Selector['width']> {
  const dim = graph.dim(sharedWidth, ffn);
  return () => dim;
}

const widthDim = (layer: number, group = 0): string => (group === 0 ? `ffn.${layer}` : `ffn.${layer}/${group}`);
const groupFeed = (layer: number, group: number): string => `ffn.${layer}/${group}.sequences`;

/**
 * The width of every nested layer as a dim that is set at run: no width needs a program of its own.
 *
 * @param most units that there are, by layer; default `ffn`
 * @param group of `nestedWidths`
 */
export function nestedWidth(
  graph: Graph,
  { layers }: Nested,
  ffn: number,
  most: readonly number[] | null = null,
  group = 0,
): NonNullable<Selector['width']> {
  const dims = new Map<number, Dim>(
    layers.map((layer) => [layer, graph.dim(widthDim(layer, group), most?.[layer] ?? ffn)]),
  );
  return (layer) => dims.get(layer) ?? null;
}

/** Numbers of widths of a layer that programs are made for: widths of a run are as many at most, in every layer. */
const groupCounts = [1, 2, 4];
export const mostWidths = Math.max(...groupCounts);

/** The least of these that has room for widths, [nested layers] lists. */
export const widthGroups = (widths: readonly (readonly number[])[]): number =>
  groupCounts.find((count) => widths.every(({ length }) => length <= count))!;

/**
 * Sequences of several widths in one run: those that are alike in a layer are a group there, whose rows multiply with a
 * prefix of the units of its own. Dims and feeds: `groupDims`, `groupFeeds`.
 *
 * @param segments the sequences
 * @param most units that there are, by layer; default `ffn`
 */
export function nestedWidths(
  graph: Graph,
  nested: Nested,
  ffn: number,
  most: readonly number[] | null,
  { segments, groups }: { segments: Dim | number; groups: number },
): NonNullable<Selector['widths']> {
  const widths = Array.from({ length: groups }, (_, group) => nestedWidth(graph, nested, ffn, most, group));
  return ({ layer, rows, residual, offsets }) => {
    if (!nested.layers.includes(layer)) return null;
    const none = zeros(graph, [(rows ?? residual).shape[0], 1]);
    return widths.map((width, group): RowsAtWidth => {
      const threshold = graph.feed(groupFeed(layer, group), 'f32', [segments]);
      return { rows: routeThreshold(none, offsets, threshold).rows, width: width(layer)! };
    });
  };
}

/**
 * Values of the dims of `nestedWidths`, of one group also of those of `nestedWidth`.
 *
 * @param widths those of each nested layer in turn, in units; groups without one have no rows
 */
export function groupDims({ layers }: Nested, widths: readonly (readonly number[])[]): Record<string, number> {
  const groups = [...Array(widthGroups(widths)).keys()];
  const dims = layers.flatMap((layer, i) =>
    groups.map((group) => [widthDim(layer, group), widths[i][group] ?? widths[i][0]] as const),
  );
  return Object.fromEntries(dims);
}

/**
 * Feeds of `nestedWidths`, f32 [segments] each: minus infinity for the sequences of a group and infinity for others, as thresholds.
 *
 * @param units of a layer, by sequence
 */
export function groupFeeds(
  { layers }: Nested,
  widths: readonly (readonly number[])[],
  units: readonly ((layer: number) => number)[],
): Record<string, Float32Array> {
  const groups = [...Array(widthGroups(widths)).keys()];
  if (groups.length === 1) return {};
  const feeds = layers.flatMap((layer, i) =>
    groups.map((group) => {
      const own = (of: (layer: number) => number) => of(layer) === widths[i][group];
      const thresholds = units.map((of) => (own(of) ? Number.NEGATIVE_INFINITY : Number.POSITIVE_INFINITY));
      return [groupFeed(layer, group), Float32Array.from(thresholds)] as const;
    }),
  );
  return Object.fromEntries(feeds);
}

/** Values of these dims; `widths` [layers] in units, null: all whole. Nothing for a model that is not nested. */
export function widthDims(
  nested: Nested | undefined,
  widths: readonly number[] | null,
  ffn: number,
): Record<string, number> {
  return Object.fromEntries((nested?.layers ?? []).map((layer) => [widthDim(layer), widths?.[layer] ?? ffn]));
}

/** The layer whose width a dim is, by the dim's name, or null. */
export function layerOfDim(name: string): number | null {
  const layer = /^ffn\.(\d+)$/.exec(name)?.[1];
  return layer === undefined ? null : Number(layer);
}

/**
 * Checks granularities and alignment for a model and returns them as a policy has them.
 *
 * Fails for shares that are none of a multiple of the alignment each, or two that have the same width.
 */
export function nestedOf(
  {
    granularities,
    alignment,
    layers,
    scores,
  }: Omit<Nested, 'alignment' | 'trained' | 'permutedFrom' | 'searched'> & {
    alignment?: number;
  },
  ffn: number,
  fail: (what: string) => never,
): Nested {
  const shown = JSON.stringify(granularities);
  const list = Array.isArray(granularities) && granularities.length > 0;
  if (!list || !granularities.every((share) => typeof share === 'number' && share > 0 && share <= 1)) {
    fail(`granularities must be shares in (0, 1], such as [0.25, 0.5, 1], got ${shown}`);
  }
  if (granularities.at(-1) !== 1) fail(`granularities must end with 1, the whole feed-forward, got ${shown}`);
  if (alignment !== undefined && !(Number.isInteger(alignment) && alignment >= 1 && ffn % alignment === 0)) {
    fail(`alignment must be a positive integer that divides the feed-forward's width ${ffn}, got ${String(alignment)}`);
  }
  const nested: Nested = {
    layers,
    granularities,
    alignment: alignment ?? defaultAlignment(granularities, ffn),
    scores,
  };
  const widths = granularityWidths(nested, ffn);
  const off = granularities.find((share, i) => Math.abs(share * ffn - widths[i]) > 1e-6 * ffn);
  if (alignment !== undefined && off !== undefined) {
    const near = alignedWidth(off, nested, ffn);
    fail(
      `the granularity ${off} is ${off * ffn} of ${ffn} units, no multiple of the alignment ${alignment}; the nearest is ${near / ffn}`,
    );
  }
  if (widths.some((width, i) => i > 0 && width <= widths[i - 1])) {
    fail(`granularities must ascend by at least the alignment of ${nested.alignment} units, got ${shown} of ${ffn}`);
  }
  return nested;
}
