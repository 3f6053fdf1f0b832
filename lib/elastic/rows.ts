// Routing: which rows enter a sub-layer and which experts they use, in training, at inference, and in the two baselines.
import type { Dim } from '../graph/dims.js';
import type { Graph, Node } from '../graph/graph.js';
import {
  add,
  type ExpertScores,
  expertChoice,
  expertGate,
  gate,
  gatherRows,
  linear,
  type Routed,
  routeThreshold,
  routeTopk,
  stopGradient,
  zeros,
} from '../graph/index.js';
import type { EnteredRows, ExpertSelection, Place, RowSelection, Selector, SubLayer } from '../model/select.js';
import { type ExpertAxis, expertAxisOf, routerId } from './axes.js';
import { type ElasticPolicy, type Experts, type GateMode, gateModes, type Routing } from './policy.js';

/** Parameters of one router in a graph: weight [outputs, hidden], bias [outputs]. */
export interface RouterNodes {
  weight: Node;
  bias: Node;
}

/** What a router decided in a training graph. */
export interface RoutedPlace {
  id: string;
  layer: number;
  place: Place;
  /** Logits of every row, f32 [N, 1]. */
  z: Node;
  /** The same logits as a function of the router only: no gradient reaches the router's input (auxiliary loss). */
  detached: Node;
  /** Rows that entered, i32 [R], and where every segment starts among them, i32 [S + 1]. */
  rows: Node;
  offsets: Node;
}

/** How the rows of a sub-layer chose among its experts in a training graph. */
export interface RoutedExperts {
  id: string;
  /** Scores that experts were chosen by, as a function of the router only: no gradient reaches the router's input. */
  detached: ExpertScores;
}

/** Name of the feed f32 [S] with a router's capacity for every segment. */
export const capacityFeed = (id: string): string => `capacity.${id}`;
/** Name of the feed f32 [N, outputs] with what is added to a router's logits before rows are chosen in training. */
export const noiseFeed = (id: string): string => `noise.${id}`;
/** Name of the feed f32 [S] with a router's logit threshold, or share or mass of experts, for every segment. */
export const thresholdFeed = (id: string): string => `threshold.${id}`;
/** Name of the feed f32 [N, outputs] with the scores that stand in for a router's logits in the random baseline. */
export const scoreFeed = (id: string): string => `score.${id}`;

const gateMode = (mode: GateMode): 0 | 1 | 2 => gateModes.indexOf(mode) as 0 | 1 | 2;

const gated = (selected: RowSelection, z: Node, mode: GateMode): RowSelection =>
  mode === 'straight-through' ? selected : { ...selected, gate: (rows) => gate(z, rows, gateMode(mode)) };

const routed = (policy: Pick<ElasticPolicy, 'tokens'>, s: SubLayer): boolean =>
  policy.tokens[s.place]?.layers.includes(s.layer) ?? false;

function selection(policy: Pick<ElasticPolicy, 'tokens'>, s: SubLayer, { rows, offsets }: Routed): RowSelection {
  return { rows, offsets, ...(s.place === 'attn' && policy.tokens.attn?.keys === 'all' && { allKeys: true }) };
}

function logits(s: SubLayer, router: RouterNodes): Node {
  return linear(s.normed(), router.weight, { bias: router.bias });
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

/** A sub-layer is there unless one of its routers is absent. */
const runsUnless = (absent: (id: string) => boolean): Selector['runs'] => {
  return (layer, place) => !absent(routerId(layer, place)) && !absent(routerId(layer, expertAxisOf(place)));
};

/** The rows that choose each expert, by scores of those that entered. `gateOf` may give none, which is 1. */
function chosenExperts(
  scores: ExpertScores,
  { count, keys }: Experts,
  gateOf: (expert: number, rows: Node) => Node | undefined,
): ExpertSelection[] {
  // What is chosen is 1 and the rest 0: above 0 are the rows to take.
  const threshold = zeros(scores.z.graph, scores.share.shape);
  return Array.from({ length: count }, (_, expert) => {
    const chosen = routeThreshold(expertChoice(scores, expert), scores.offsets, threshold);
    const gate = gateOf(expert, chosen.rows);
    return { ...chosen, ...(gate && { gate }), ownKeys: keys === 'selected' };
  });
}

/**
 * Top-k routing per segment, for training. Feeds `capacity.<router id>`, f32 [segments], one per router; with `explore`
 * also `noise.<router id>`, f32 [rows, 1], which counts in choosing rows. `routed` fills, in the order of execution, while
 * the decoder is built. A straight-through gate has the value 1 and so needs no operand; its gradient is `topkCredit`'s.
 */
export function trainingSelector(
  graph: Graph,
  policy: ElasticPolicy,
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
      const explored = (z: Node): Node => {
        if (!explore) return z;
        const noise = graph.feed(noiseFeed(id), 'f32', [entered.residual.shape[0], count]);
        return add(z, entered.rows ? gatherRows(noise, entered.rows) : noise);
      };
      const z = expertLogits(entered, router);
      const scores: ExpertScores = { z: explored(z), offsets: entered.offsets, share, rule: 'top-k' };
      const detached = expertLogits({ ...entered, x: stopGradient(entered.x) }, router);
      experts.push({ id, detached: { ...scores, z: explored(detached) } });
      return chosenExperts(scores, cut, (expert, rows) => expertGate(scores, expert, rows, mode));
    },
    rows(s: SubLayer): RowSelection | null {
      if (!routed(policy, s)) return null;
      const id = routerId(s.layer, s.place);
      const router = routers(id);
      const z = logits(s, router);
      const detached = linear(stopGradient(s.normed()), router.weight, { bias: router.bias });
      const scores = explore ? add(z, graph.feed(noiseFeed(id), 'f32', z.shape)) : z;
      const chosen = routeTopk(scores, s.offsets, graph.feed(capacityFeed(id), 'f32', [segments]));
      all.push({ id, layer: s.layer, place: s.place, z, detached, ...chosen });
      return gated(selection(policy, s, chosen), z, policy.gate);
    },
  };
}

/**
 * Threshold routing, causal, for inference. Feeds `threshold.<router id>`, f32 [segments], one per router.
 *
 * @param known thresholds that all runs share: where one is infinite every row passes or none, so there is no router to
 *   run, nothing to feed, and a sub-layer that none enters is left out with its keys and values. Default none.
 */
export function inferenceSelector(
  graph: Graph,
  policy: ElasticPolicy,
  routers: (id: string) => RouterNodes,
  segments: Dim | number,
  known: ReadonlyMap<string, number> = new Map(),
): Selector {
  return {
    runs: runsUnless((id) => known.get(id) === Number.POSITIVE_INFINITY),
    experts(entered: EnteredRows): ExpertSelection[] | null {
      const cut = expertsOf(policy, entered);
      if (!cut || known.get(cut.id) === Number.NEGATIVE_INFINITY) return null;
      const { id, gate: mode } = cut;
      const share = graph.feed(thresholdFeed(id), 'f32', [segments]);
      const z = expertLogits(entered, routers(id));
      const scores: ExpertScores = { z, offsets: entered.offsets, share, rule: cut.rule };
      return chosenExperts(scores, cut, (expert, rows) =>
        mode === 'straight-through' ? undefined : expertGate(scores, expert, rows, mode),
      );
    },
    rows(s: SubLayer): RowSelection | null {
      const id = routerId(s.layer, s.place);
      if (!routed(policy, s) || known.get(id) === Number.NEGATIVE_INFINITY) return null;
      const z = logits(s, routers(id));
      const chosen = routeThreshold(z, s.offsets, graph.feed(thresholdFeed(id), 'f32', [segments]));
      return gated(selection(policy, s, chosen), z, policy.gate);
    },
  };
}

/** The same selector; the rows that enter each routed sub-layer become outputs of the graph, i32, named by router id. */
export function recordedSelector(graph: Graph, selector: Selector): Selector {
  return {
    ...selector,
    rows(s: SubLayer): RowSelection | null {
      const selection = selector.rows(s);
      if (selection) graph.output(routerId(s.layer, s.place), selection.rows);
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
 * (`score.<router id>`, f32 [rows, 1]; `capacity.<router id>`, f32 [segments]). Sub-layers in `absent`, router ids, are
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
      const z = entered.rows ? gatherRows(all, entered.rows) : all;
      const share = graph.feed(capacityFeed(id), 'f32', [segments]);
      return chosenExperts({ z, offsets: entered.offsets, share, rule: 'top-k' }, cut, () => undefined);
    },
    rows(s: SubLayer): RowSelection | null {
      if (!routed(policy, s)) return null;
      const id = routerId(s.layer, s.place);
      const scores = graph.feed(scoreFeed(id), 'f32', [rows, 1]);
      return selection(policy, s, routeTopk(scores, s.offsets, graph.feed(capacityFeed(id), 'f32', [segments])));
    },
  };
}

/** Baseline: leaves whole sub-layers out for every row. `dropped` holds router ids, `layers.{i}.{attn|mlp}.token`. */
export function droppedSelector(dropped: ReadonlySet<string>): Selector {
  return { runs: (layer, place) => !dropped.has(routerId(layer, place)), rows: () => null };
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
