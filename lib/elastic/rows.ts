// Routing: which rows enter a sub-layer and which experts they use, in training, at inference, and in the two baselines.
import type { Dim } from '../graph/dims.js';
import type { Graph, Node } from '../graph/graph.js';
import {
  add,
  type ExpertGate,
  type ExpertScores,
  expertGate,
  expertRows,
  gate,
  gatherIds,
  gatherRows,
  heldWidth,
  latch,
  linear,
  type Routed,
  routeThreshold,
  routeTopk,
  scatterAdd,
  segmentBroadcast,
  segmentMean,
  stopGradient,
  type TileScores,
  tileScores,
  zeros,
} from '../graph/index.js';
import type { EnteredRows, ExpertSelection, Place, RowSelection, Selector, SubLayer } from '../model/select.js';
import {
  type Axis,
  axes,
  axisTraits,
  type ExpertAxis,
  expertAxisOf,
  isExperts,
  ofSequences,
  type RowAxis,
  routerId,
} from './axes.js';
import {
  type ElasticPolicy,
  type Experts,
  type GateMode,
  gateModes,
  keysOf,
  type Routing,
  rowAxisOf,
} from './policy.js';

/** Parameters of one router in a graph: weight [outputs, hidden], bias [outputs]. */
export interface RouterNodes {
  weight: Node;
  bias: Node;
}

/** What a router of rows decided in a training graph: of N rows each, or of all rows of S segments. */
export interface RoutedPlace {
  id: string;
  layer: number;
  /** The sub-layers that it decides about. */
  places: readonly Place[];
  /** Logits, f32 [N, 1] or [S, 1]. */
  z: Node;
  /** The same logits as a function of the router only: no gradient reaches the router's input (auxiliary loss). */
  detached: Node;
  /** Rows, or segments, that entered, i32 [R], and where every segment starts among them, i32 [S + 1] or [2]. */
  rows: Node;
  offsets: Node;
  /** Of a router of sequences, all segments as one: i32 [2]. */
  span: Node | null;
  /** Values of logits for every row, f32 [N, 1]. */
  perRow: (z: Node) => Node;
}

/** How the rows of a sub-layer chose among its experts in a training graph. */
export interface RoutedExperts {
  id: string;
  layer: number;
  place: Place;
  gate: ExpertGate;
  /** Rows that entered the sub-layer, i32 [R]; null: all. */
  rows: Node | null;
  /** Scores by which these choose, as a function of the router only: no gradient reaches the router's input. */
  detached: ExpertScores;
  /** The same with the noise of exploration, as experts were chosen. */
  explored: ExpertScores;
}

/**
 * Rows that decide about a sequence: its first ones, so many at most. They must be in its first run where it is run in
 * several.
 */
export const decidingRows = 512;

/** Name of the feed f32 [S] with a router's capacity for every segment; of a router of sequences f32 [1], of all of them. */
export const capacityFeed = (id: string): string => `capacity.${id}`;
/** Feed i32 [2] of `trainingSelector` where routers of sequences are: 0 and the number of segments. */
export const spanFeed = 'sequences';
/**
 * Name of the feed f32 [S, decidedWidth] with what a router has decided before about each sequence; NaN: nothing yet, so that the
 * rows of this run decide. Of a router of sequences it is the score, of experts that tiles choose what `tileScores` holds.
 */
export const decidedFeed = (id: string): string => `decided.${id}`;
/** Name of the output of the same shape with what is in force after the run, to be fed in the sequence's further runs. */
export const decidedOutput = (id: string): string => `${decidedFeed(id)}.score`;
/** How many values a router holds between the runs of a sequence; 0: it decides about rows, each by itself. */
export function decidedWidth(policy: Omit<Routing, 'layers'>, axis: Axis): number {
  if (!isExperts(axis)) return ofSequences(axis) ? 1 : 0;
  const { count, tile } = policy[axis]!;
  return tile === undefined ? 0 : heldWidth(count);
}
/** Name of the feed f32 [N, outputs], or [S, 1] of a router of sequences, with what is added to a router's logits before rows are chosen in training. */
export const noiseFeed = (id: string): string => `noise.${id}`;
/** Name of the feed f32 [S] with a router's logit threshold, or share or mass of experts, for every segment. */
export const thresholdFeed = (id: string): string => `threshold.${id}`;
/**
 * Name of the feed f32 [N, outputs] with the scores that stand in for a router's logits in the random baseline; of a router of
 * sequences f32 [S, 1], and those above 0 enter.
 */
export const scoreFeed = (id: string): string => `score.${id}`;

const gateMode = (mode: GateMode): 0 | 1 | 2 => gateModes.indexOf(mode) as 0 | 1 | 2;

const gated = (selected: RowSelection, z: Node, mode: GateMode): RowSelection =>
  mode === 'straight-through' ? selected : { ...selected, gate: (rows) => gate(z, rows, gateMode(mode)) };

/** Asks for the rows of a router once: a router of whole blocks has decided where the first of their sub-layers ran. */
function oncePerRouter(
  policy: Omit<Routing, 'layers'>,
  decide: (subLayer: SubLayer, axis: RowAxis, id: string) => RowSelection | null,
): Selector['rows'] {
  const decided = new Map<string, RowSelection | null>();
  return (s) => {
    const axis = rowAxisOf(policy, s.layer, s.place);
    if (!axis) return null;
    const id = routerId(s.layer, axis);
    if (axisTraits[axis].places[0] === s.place) decided.set(id, decide(s, axis, id));
    return decided.get(id)!;
  };
}

function selection(policy: Omit<Routing, 'layers'>, s: SubLayer, { rows, offsets }: Routed): RowSelection {
  return { rows, offsets, ...(s.place === 'attn' && keysOf(policy, s.layer) === 'all' && { allKeys: true }) };
}

function logits(s: SubLayer, router: RouterNodes): Node {
  return linear(s.normed(), router.weight, { bias: router.bias });
}

/** A router's logits of what sequences are like on the mean over their first rows, f32 [S, 1]. */
function sequenceLogits(x: Node, offsets: Node, segments: Dim | number, router: RouterNodes): Node {
  return linear(segmentMean(x, offsets, segments, { most: decidingRows }), router.weight, { bias: router.bias });
}

/** All rows of the segments whose score, f32 [S, 1], is above their threshold, f32 [S]. */
function wholeSegments(s: SubLayer, score: Node, threshold: Node): Routed {
  return routeThreshold(segmentBroadcast(score, s.offsets, s.residual.shape[0]), s.offsets, threshold);
}

/** The experts of a sub-layer and their router's id; null where it is not cut. */
function expertsOf(
  policy: Pick<Routing, ExpertAxis>,
  { layer, place }: EnteredRows,
): (Experts & { id: string }) | null {
  const axis = expertAxisOf(place);
  const experts = policy[axis];
  return experts?.layers.includes(layer) ? { ...experts, id: routerId(layer, axis) } : null;
}

/** Scores of the rows that entered, f32 [R, count]. */
function expertLogits({ x, gather }: EnteredRows, router: RouterNodes): Node {
  return linear(x, router.weight, { bias: router.bias, rows: gather });
}

/** Scores by which the rows that entered choose: each by its own, or all of a tile by those of the first. */
function choosing(
  z: Node,
  { tile }: Experts,
  { positions, rows, offsets }: EnteredRows,
  held: Node | null = null,
): TileScores {
  if (tile === undefined) return { y: z, next: null };
  return tileScores(z, rows ? gatherIds(positions, rows) : positions, offsets, tile, held);
}

/** A sub-layer is there unless one of its routers is absent. */
const runsUnless = (absent: (id: string) => boolean): Selector['runs'] => {
  return (layer, place) =>
    !axes.some((axis) => axisTraits[axis].places.includes(place) && absent(routerId(layer, axis)));
};

/** Ones, f32 [rows, 1]: a product with nothing that has a bias. */
export const ones = (graph: Graph, rows: Dim | number): Node =>
  linear(zeros(graph, [rows, 1]), graph.constant([0], [1, 1]), { bias: graph.constant([1], [1]) });

/** Gates of the rows that chose an expert; a straight-through one has the value 1. */
const gatesOf = (scores: ExpertScores, mode: ExpertGate) => (expert: number, rows: Node) =>
  mode === 'straight-through' ? undefined : expertGate(scores, expert, rows, mode);

/** The rows that choose each expert, by scores of those that entered. `gateOf` may give none, which is 1. */
function chosenExperts(
  scores: ExpertScores,
  { count, keys }: Experts,
  gateOf: (expert: number, rows: Node) => Node | undefined,
): ExpertSelection[] {
  return Array.from({ length: count }, (_, expert) => {
    const chosen = expertRows(scores, expert);
    const gate = gateOf(expert, chosen.rows);
    return { ...chosen, ...(gate && { gate }), ownKeys: keys === 'selected' };
  });
}

/**
 * Top-k routing, for training, and where sequences are whole when they are run: of the rows of every segment, or of whole segments among those of the batch. Feeds
 * `capacity.<router id>`, f32 [segments] or [1], one per router; with `explore` also `noise.<router id>`, f32 [rows, 1] or
 * [segments, 1], which counts in choosing; `spanFeed`. `routed` fills, in the order of execution, while
 * the decoder is built. A straight-through gate has the value 1 and so needs no operand; its gradient is `topkCredit`'s.
 */
export function trainingSelector(
  graph: Graph,
  policy: Omit<Routing, 'layers'> & Pick<ElasticPolicy, 'gate'>,
  routers: (id: string) => RouterNodes,
  segments: Dim | number,
  { explore = false }: { explore?: boolean } = {},
): Selector & { readonly routed: readonly RoutedPlace[]; readonly routedExperts: readonly RoutedExperts[] } {
  const all: RoutedPlace[] = [];
  const experts: RoutedExperts[] = [];
  return {
    routed: all,
    routedExperts: experts,
    runs: () => true,
    experts(entered: EnteredRows): ExpertSelection[] | null {
      const cut = expertsOf(policy, entered);
      if (!cut) return null;
      const { id, count, gate: mode } = cut;
      const router = routers(id);
      const share = graph.feed(capacityFeed(id), 'f32', [segments]);
      const noisy = (z: Node): Node => {
        if (!explore) return z;
        const noise = graph.feed(noiseFeed(id), 'f32', [entered.residual.shape[0], count]);
        return add(z, entered.rows ? gatherRows(noise, entered.rows) : noise);
      };
      const scoresBy = (z: Node): ExpertScores => ({
        z: choosing(z, cut, entered).y,
        ...{ offsets: entered.offsets, share, rule: 'top-k' },
      });
      const scores = scoresBy(noisy(expertLogits(entered, router)));
      const ofRouter = expertLogits({ ...entered, x: stopGradient(entered.x) }, router);
      const { layer, place, rows } = entered;
      experts.push({
        id,
        layer,
        place,
        gate: mode,
        rows,
        detached: scoresBy(ofRouter),
        explored: scoresBy(noisy(ofRouter)),
      });
      return chosenExperts(scores, cut, gatesOf(scores, mode));
    },
    rows: oncePerRouter(policy, (s, axis, id) => {
      const router = routers(id);
      const { places } = axisTraits[axis];
      const explored = (z: Node) => (explore ? add(z, graph.feed(noiseFeed(id), 'f32', z.shape)) : z);
      if (ofSequences(axis)) {
        const z = sequenceLogits(s.normed(), s.offsets, segments, router);
        const detached = sequenceLogits(stopGradient(s.normed()), s.offsets, segments, router);
        const span = graph.feed(spanFeed, 'i32', [2]);
        const chosen = routeTopk(explored(z), span, graph.feed(capacityFeed(id), 'f32', [1]));
        const perRow = (score: Node) => segmentBroadcast(score, s.offsets, s.residual.shape[0]);
        all.push({ id, layer: s.layer, places, z, detached, ...chosen, span, perRow });
        const one = scatterAdd(zeros(graph, z.shape), ones(graph, chosen.rows.shape[0]), chosen.rows);
        return selection(policy, s, wholeSegments(s, one, zeros(graph, [segments])));
      }
      const z = logits(s, router);
      const detached = linear(stopGradient(s.normed()), router.weight, { bias: router.bias });
      const chosen = routeTopk(explored(z), s.offsets, graph.feed(capacityFeed(id), 'f32', [segments]));
      all.push({ id, layer: s.layer, places, z, detached, ...chosen, span: null, perRow: (score) => score });
      return gated(selection(policy, s, chosen), z, policy.gate);
    }),
  };
}

/**
 * Threshold routing, causal, for inference. Feeds `threshold.<router id>`, f32 [segments], one per router.
 *
 * @param known thresholds that all runs share: where one is infinite every row passes or none, so there is no router to
 *   run, nothing to feed, and a sub-layer that none enters is left out with its keys and values. Default none.
 * @param resumed whether sequences go on in several runs: routers of sequences keep to what they decided in the first, those of
 *   tiles to what they decided about one that goes on (`decidedFeed`, `decidedOutput`). Default: a run holds them whole.
 */
export function inferenceSelector(
  graph: Graph,
  policy: ElasticPolicy,
  routers: (id: string) => RouterNodes,
  segments: Dim | number,
  known: ReadonlyMap<string, number> = new Map(),
  { resumed = false }: { resumed?: boolean } = {},
): Selector {
  return {
    runs: runsUnless((id) => known.get(id) === Number.POSITIVE_INFINITY),
    experts(entered: EnteredRows): ExpertSelection[] | null {
      const cut = expertsOf(policy, entered);
      if (!cut || known.get(cut.id) === Number.NEGATIVE_INFINITY) return null;
      const { id, gate: mode } = cut;
      const share = graph.feed(thresholdFeed(id), 'f32', [segments]);
      const width = resumed ? decidedWidth(policy, expertAxisOf(entered.place)) : 0;
      const held = width > 0 ? graph.feed(decidedFeed(id), 'f32', [segments, width]) : null;
      const { y: z, next } = choosing(expertLogits(entered, routers(id)), cut, entered, held);
      if (next) graph.output(decidedOutput(id), next);
      const scores: ExpertScores = { z, offsets: entered.offsets, share, rule: cut.rule };
      return chosenExperts(scores, cut, gatesOf(scores, mode));
    },
    rows: oncePerRouter(policy, (s, axis, id) => {
      if (known.get(id) === Number.NEGATIVE_INFINITY) return null;
      const threshold = graph.feed(thresholdFeed(id), 'f32', [segments]);
      if (ofSequences(axis)) {
        const now = sequenceLogits(s.normed(), s.offsets, segments, routers(id));
        const score = resumed ? latch(now, graph.feed(decidedFeed(id), 'f32', [segments, 1])) : now;
        if (resumed) graph.output(decidedOutput(id), score);
        return selection(policy, s, wholeSegments(s, score, threshold));
      }
      const z = logits(s, routers(id));
      return gated(selection(policy, s, routeThreshold(z, s.offsets, threshold)), z, policy.gate);
    }),
  };
}

/** What a cache holds of a layer's attention at a budget. */
export interface CachedKeys {
  /** Into how many parts of its heads the cache is cut. */
  parts: number;
  /** Whether every row of the sequence has keys; else their number follows from what routers choose. */
  everyRow: boolean;
  /** Whether this is so but for sequences that skip the attention as wholes, and have none. */
  everyRowOrNone: boolean;
}

/** What `inferenceSelector` with known thresholds lets a layer cache; null: it runs no attention. */
export function cachedKeys(
  policy: Routing,
  known: ReadonlyMap<string, number>,
  layer: number,
  kvHeads: number,
): CachedKeys | null {
  if (!runsUnless((id) => known.get(id) === Number.POSITIVE_INFINITY)(layer, 'attn')) return null;
  const decides = (axis: Axis) =>
    (known.get(routerId(layer, axis)) ?? Number.NEGATIVE_INFINITY) > Number.NEGATIVE_INFINITY;
  const cut = decides('heads');
  const axis = rowAxisOf(policy, layer, 'attn');
  const ownRows = axis !== null && decides(axis) && keysOf(policy, layer) === 'selected';
  const ofHeads = cut && policy.heads!.keys === 'selected';
  return {
    parts: cut ? kvHeads : 1,
    everyRow: !ownRows && !ofHeads,
    everyRowOrNone: !(ownRows && !ofSequences(axis)) && !ofHeads,
  };
}

/** Name of the output i32 with the rows that entered a routed sub-layer. */
export const enteredOutput = (layer: number, place: Place): string => `entered.${layer}.${place}`;

/** The same selector; the rows that enter each routed sub-layer become outputs of the graph. */
export function recordedSelector(graph: Graph, selector: Selector): Selector {
  return {
    ...selector,
    rows(s: SubLayer): RowSelection | null {
      const selection = selector.rows(s);
      if (selection) graph.output(enteredOutput(s.layer, s.place), selection.rows);
      return selection;
    },
  };
}

/** Name of the output i32 with the rows, among those that entered the sub-layer, that chose an expert of a router. */
export const expertRowsOutput = (id: string, expert: number): string => `${id}.${expert}`;

/** The same selector; the rows that chose each expert become outputs of the graph. */
export function recordedExperts(graph: Graph, selector: Selector): Selector {
  return {
    ...selector,
    experts(entered: EnteredRows): readonly ExpertSelection[] | null {
      const experts = selector.experts?.(entered) ?? null;
      const id = routerId(entered.layer, expertAxisOf(entered.place));
      for (const [i, { rows }] of (experts ?? []).entries()) graph.output(expertRowsOutput(id, i), rows);
      return experts;
    },
  };
}

/** Values of the feeds of inferenceSelector for so many segments, when it knows these thresholds. */
export function thresholdFeeds(
  thresholds: ReadonlyMap<string, number>,
  segments: number,
): Record<string, Float32Array> {
  const finite = [...thresholds].filter(([, threshold]) => Number.isFinite(threshold));
  return Object.fromEntries(finite.map(([id, t]) => [thresholdFeed(id), new Float32Array(segments).fill(t)]));
}

/**
 * Baseline: the same share of rows as a router would take, chosen by scores that the caller feeds at random
 * (`score.<router id>`, f32 [rows, 1]; `capacity.<router id>`, f32 [segments]; of sequences `scoreFeed` alone). Sub-layers in `absent`, router ids, are
 * left out.
 */
export function randomSelector(
  graph: Graph,
  policy: Omit<Routing, 'layers'>,
  rows: Dim | number,
  segments: Dim | number,
  absent: ReadonlySet<string> = new Set(),
): Selector {
  return {
    runs: runsUnless((id) => absent.has(id)),
    experts(entered: EnteredRows): ExpertSelection[] | null {
      const cut = expertsOf(policy, entered);
      if (!cut) return null;
      const { id, count } = cut;
      const all = graph.feed(scoreFeed(id), 'f32', [rows, count]);
      const { y: z } = choosing(entered.rows ? gatherRows(all, entered.rows) : all, cut, entered);
      const share = graph.feed(capacityFeed(id), 'f32', [segments]);
      return chosenExperts({ z, offsets: entered.offsets, share, rule: 'top-k' }, cut, () => undefined);
    },
    rows: oncePerRouter(policy, (s, axis, id) => {
      if (ofSequences(axis)) {
        const score = graph.feed(scoreFeed(id), 'f32', [segments, 1]);
        return selection(policy, s, wholeSegments(s, score, zeros(graph, [segments])));
      }
      const scores = graph.feed(scoreFeed(id), 'f32', [rows, 1]);
      return selection(policy, s, routeTopk(scores, s.offsets, graph.feed(capacityFeed(id), 'f32', [segments])));
    }),
  };
}

/** Baseline: leaves whole sub-layers out for every row. `dropped` holds router ids, `layers.{i}.{attn|mlp|block}.token`. */
export function droppedSelector(dropped: ReadonlySet<string>): Selector {
  return { runs: runsUnless((id) => dropped.has(id)), rows: () => null };
}

/** Router nodes read from constant tensors; `tensors` holds weight [outputs, hidden] and bias [outputs] per router id. */
export function routerNodes(
  graph: Graph,
  tensors: ReadonlyMap<string, { weight: Parameters<Graph['weight']>[0]; bias: Parameters<Graph['weight']>[0] }>,
): (id: string) => RouterNodes {
  return (id) => {
    const { weight, bias } = tensors.get(id)!;
    return { weight: graph.weight(weight, `${id}.weight`), bias: graph.weight(bias, `${id}.bias`) };
  };
}
