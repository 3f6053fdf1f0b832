// Token routing: which rows enter a sub-layer in training, at inference, and in the two baselines.
import type { Dim } from '../graph/dims.js';
import type { Graph, Node } from '../graph/graph.js';
import { gate, linear, routeThreshold, routeTopk, stopGradient } from '../graph/index.js';
import type { Place, RowSelection, Selector, SubLayer } from '../model/select.js';
import { type ElasticPolicy, type GateMode, gateModes, routerId, routerPlaces } from './policy.js';

/** Parameters of one router in a graph: weight [1, hidden], bias [1]. */
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
  /** Rows that entered, i32 [R]. */
  rows: Node;
}

/** Name of the feed f32 [S] with the capacity of every segment at a place. */
export const capacityFeed = (place: Place): string => `capacity.${place}`;
/** Name of the feed f32 [S] with a router's logit threshold for every segment; minus infinity passes all rows. */
export const thresholdFeed = (id: string): string => `threshold.${id}`;
/** Name of the feed f32 [N, 1] with the scores that stand in for a router's logits in the random baseline. */
export const scoreFeed = (id: string): string => `score.${id}`;

const gateMode = (mode: GateMode): 0 | 1 | 2 => gateModes.indexOf(mode) as 0 | 1 | 2;

function logits(s: SubLayer, router: RouterNodes): Node {
  return linear(s.normed(), router.weight, { bias: router.bias });
}

/**
 * Top-k routing per segment, for training. Feeds `capacity.attn` and `capacity.mlp`, f32 [segments], whichever place is
 * routed. `routed` fills, in the order of execution, while the decoder is built.
 */
export function trainingSelector(
  graph: Graph,
  policy: ElasticPolicy,
  routers: (id: string) => RouterNodes,
  segments: Dim | number,
): Selector & { readonly routed: readonly RoutedPlace[] } {
  const routed: RoutedPlace[] = [];
  const capacity = (place: Place) => graph.feed(capacityFeed(place), 'f32', [segments]);
  return {
    routed,
    runs: () => true,
    rows(s: SubLayer): RowSelection | null {
      if (!policy.tokens[s.place]?.layers.includes(s.layer)) return null;
      const id = routerId(s.layer, s.place);
      const router = routers(id);
      const z = logits(s, router);
      const detached = linear(stopGradient(s.normed()), router.weight, { bias: router.bias });
      const { rows, offsets } = routeTopk(z, s.offsets, capacity(s.place));
      routed.push({ id, layer: s.layer, place: s.place, z, detached, rows });
      return { rows, offsets, gate: gate(z, rows, gateMode(policy.gate)) };
    },
  };
}

/**
 * Threshold routing, causal, for inference. Feeds `threshold.<router id>`, f32 [segments], one per router. A
 * straight-through gate has the value 1 and so needs no operand here.
 */
export function inferenceSelector(
  graph: Graph,
  policy: ElasticPolicy,
  routers: (id: string) => RouterNodes,
  segments: Dim | number,
): Selector {
  return {
    runs: () => true,
    rows(s: SubLayer): RowSelection | null {
      if (!policy.tokens[s.place]?.layers.includes(s.layer)) return null;
      const id = routerId(s.layer, s.place);
      const z = logits(s, routers(id));
      const { rows, offsets } = routeThreshold(z, s.offsets, graph.feed(thresholdFeed(id), 'f32', [segments]));
      if (policy.gate === 'straight-through') return { rows, offsets };
      return { rows, offsets, gate: gate(z, rows, gateMode(policy.gate)) };
    },
  };
}

/**
 * Baseline: the same share of rows as a router would take, chosen by scores that the caller feeds at random
 * (`score.<router id>`, f32 [rows, 1]; `capacity.<place>`, f32 [segments]).
 */
export function randomSelector(
  graph: Graph,
  policy: Pick<ElasticPolicy, 'tokens'>,
  rows: Dim | number,
  segments: Dim | number,
): Selector {
  const capacity = (place: Place) => graph.feed(capacityFeed(place), 'f32', [segments]);
  return {
    runs: () => true,
    rows(s: SubLayer): RowSelection | null {
      if (!policy.tokens[s.place]?.layers.includes(s.layer)) return null;
      const scores = graph.feed(scoreFeed(routerId(s.layer, s.place)), 'f32', [rows, 1]);
      return routeTopk(scores, s.offsets, capacity(s.place));
    },
  };
}

/** Baseline: leaves whole sub-layers out for every row. `dropped` holds router ids, `layers.{i}.{attn|mlp}.token`. */
export function droppedSelector(dropped: ReadonlySet<string>): Selector {
  return { runs: (layer, place) => !dropped.has(routerId(layer, place)), rows: () => null };
}

/** Router nodes read from constant tensors; `tensors` holds weight [1, hidden] and bias [1] per router id. */
export function routerNodes(
  graph: Graph,
  tensors: ReadonlyMap<string, { weight: Parameters<Graph['weight']>[0]; bias: Parameters<Graph['weight']>[0] }>,
): (id: string) => RouterNodes {
  return (id) => {
    const { weight, bias } = tensors.get(id)!;
    return { weight: graph.weight(weight, `${id}.weight`), bias: graph.weight(bias, `${id}.bias`) };
  };
}

/** Ids of the routers of a policy, for callers that feed one value per router. */
export const routerIds = (policy: ElasticPolicy): string[] => routerPlaces(policy).map((r) => r.id);
