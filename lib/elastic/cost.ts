// What a model costs at capacities and widths, by formula.
import { attentionFlops, feedForwardFlops, forwardFlops, keyValueFlops } from '../model/flops.js';
import { type Place, type Projection, placeOf, places } from '../model/select.js';
import { type LayerSpec, layerOf, type ModelSpec } from '../model/spec.js';
import { axisTraits, expertAxisOf, isExperts, ofSequences } from './axes.js';
import {
  type Calibration,
  type ElasticPolicy,
  keysOf,
  type Routing,
  routerPlaces,
  rowAxisOf,
  usedShare,
} from './policy.js';

/** What decides about the cost of a sub-layer. */
export type Costed = Routing & Pick<ElasticPolicy, 'lora' | 'nested'>;

/** Of the tokens of a sequence, of the experts of a sub-layer that each uses, and the units of its feed-forward. */
interface Shares {
  tokens: number;
  experts: number;
  units: number;
}

// Expected FLOPs of one sub-layer when the share `tokens` of a sequence of `length` rows enters it, or the share of sequences,
// and uses the share `experts` of what it is cut into, with the routers that it takes to choose them: none at 0 and 1.
function routedFlops(
  spec: ModelSpec & LayerSpec,
  policy: Routing,
  { layer, place }: { layer: number; place: Place },
  { tokens, experts, units }: Shares,
  length: number,
): number {
  if (tokens <= 0 || experts <= 0) return 0;
  const axis = rowAxisOf(policy, layer, place);
  if (axis && tokens < 1 && ofSequences(axis)) {
    const router = axisTraits[axis].places[0] === place ? 2 * spec.hidden : 0;
    return router + tokens * routedFlops(spec, policy, { layer, place }, { tokens: 1, experts, units }, length);
  }
  const cut = experts < 1 ? policy[expertAxisOf(place)]! : null;
  const used = cut ? usedShare(cut, experts) : 1;
  const entered = tokens * length;
  const decides = axis !== null && axisTraits[axis].places[0] === place;
  const tokenRouter = tokens < 1 && decides ? 2 * length * spec.hidden : 0;
  const routers = tokenRouter + (cut ? 2 * entered * spec.hidden * cut.count : 0);
  if (place === 'mlp') return routers + used * feedForwardFlops({ ...spec, ffn: units }, entered);
  if (cut?.keys === 'selected') return routers + attentionFlops(spec, [used * entered]);
  // What rows with keys cost as keys and the rest as queries of them.
  const own = tokens < 1 && keysOf(policy, layer) === 'selected';
  const keys = keyValueFlops(spec, own ? entered : length);
  const whole = own ? attentionFlops(spec, [entered]) - keys : tokens * (attentionFlops(spec, [length]) - keys);
  return routers + keys + used * whole;
}

/** FLOPs of the corrections of one sub-layer's projections, at the shares of `routedFlops`. */
export function loraFlops(
  spec: ModelSpec,
  policy: Costed,
  { layer, place, tokens, experts, units: width }: Shares & { layer: number; place: Place },
  length: number,
): number {
  const { lora } = policy;
  if (!lora?.layers.includes(layer) || tokens <= 0 || experts <= 0) return 0;
  const { hidden, heads, kvHeads, headDim } = spec;
  const cut = experts < 1 ? policy[expertAxisOf(place)]! : null;
  const part = cut ? usedShare(cut, experts) : 1;
  const used = part * (cut?.count ?? 1);
  const [q, kv, units] = [part * heads * headDim, kvHeads * headDim, part * width];
  const shared = spec.perLayer[layer].keysOf !== null;
  const entered = tokens * length;
  const own = cut?.keys === 'selected';
  const keys = own || (tokens < 1 && keysOf(policy, layer) === 'selected') ? entered : length;
  const perRank: Record<Projection, number> = {
    q: entered * (hidden + q),
    k: keys * (hidden + (own ? part : 1) * kv),
    v: keys * (hidden + (own ? part : 1) * kv),
    // every expert adds to the residual stream by itself
    o: entered * (q + used * hidden),
    gate: entered * (hidden + units),
    up: entered * (hidden + units),
    down: entered * (units + used * hidden),
  };
  const here = lora.targets.filter(
    (projection) => placeOf(projection) === place && !(shared && (projection === 'k' || projection === 'v')),
  );
  return 2 * lora.rank * here.reduce((sum, projection) => sum + perRank[projection], 0);
}

/**
 * Expected FLOPs of one sequence of `length` tokens with every token's logits, routers included, over those of the full
 * model. Capacities near 1 may pass 1 a little, by the cost of routers.
 *
 * @param capacities one per router, in the order of execution
 * @param widths units of every layer's feed-forward, [layers]; null: all
 */
export function flopsRatio(
  spec: ModelSpec,
  policy: Costed,
  capacities: readonly number[],
  length: number,
  widths: readonly number[] | null = null,
): number {
  const { perLayer, total } = forwardFlops(spec, [length]);
  const subLayers = Array.from({ length: spec.layers }, (_, layer) =>
    places.map((place) => ({
      layer,
      place,
      tokens: 1,
      experts: 1,
      units: widths?.[layer] ?? spec.perLayer[layer].ffn,
    })),
  ).flat();
  for (const [i, { layer, places: decided, axis }] of routerPlaces(policy).entries()) {
    for (const shares of subLayers.filter((s) => s.layer === layer && decided.includes(s.place))) {
      shares[isExperts(axis) ? 'experts' : 'tokens'] = capacities[i];
    }
  }
  let saved = 0;
  for (const shares of subLayers) {
    const { layer, place } = shares;
    saved += perLayer[layer][place] - routedFlops(layerOf(spec, layer), policy, shares, shares, length);
    saved -= loraFlops(spec, policy, shares, length);
  }
  return (total - saved) / total;
}

/** The first capacities on the path where `measure`, which falls along it, is at most `target`; null when it never is. */
export function pointOnPath(
  path: Calibration['path'],
  measure: (capacities: readonly number[]) => number,
  target: number,
): number[] | null {
  const after = path.findIndex((capacities) => measure(capacities) <= target);
  if (after < 0) return null;
  if (after === 0) return [...path[0]];
  const between = (t: number) => path[after - 1].map((c, i) => c + (path[after][i] - c) * t);
  let low = 0;
  let high = 1;
  for (let i = 0; i < 50; i++) {
    const middle = (low + high) / 2;
    if (measure(between(middle)) <= target) high = middle;
    else low = middle;
  }
  return between(high);
}
