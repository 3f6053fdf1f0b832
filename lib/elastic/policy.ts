// What is elastic in a model: which sub-layers are routed, by which gates, how capacities map to thresholds, named levels.
import type { ExpertGate, ExpertRule } from '../graph/index.js';
import { isModule, type Modules, partId } from '../model/parts.js';
import { type Place, type Projection, places, projections } from '../model/select.js';
import type { Seq2SeqSpec } from '../model/seq2seq_spec.js';
import type { ModelSpec } from '../model/spec.js';
import {
  type Axis,
  axes,
  axisTraits,
  type Capacity,
  type ElasticSpec,
  type ExpertAxis,
  expertsUsed,
  isExperts,
  meanCapacity,
  ofSequences,
  type RowAxis,
  routerId,
  rowAxes,
  type Target,
} from './axes.js';
import { type Exit, exitId } from './exits.js';
import type { Nested } from './nested.js';
import type { Provenance } from './provenance.js';

/** How a selected row's sub-layer output is scaled; see docs/ops.md, op `gate`. */
export type GateMode = 'straight-through' | 'raw' | 'two-sigma';
export const gateModes: readonly GateMode[] = ['straight-through', 'raw', 'two-sigma'];

/**
 * Which rows routed attention attends to: `all` rows of the sequence have keys and values and routing saves queries, scores
 * and output; with `selected` a row left out is no key either.
 */
export type AttentionKeys = 'all' | 'selected';
export const attentionKeys: readonly AttentionKeys[] = ['all', 'selected'];

/** The metric that `minQuality` is about: the share of positions whose most likely next token is the full model's. */
export const qualityMetric = 'top1_agreement';

/** A measured value, its 95 % interval, and how many tokens it was measured on. */
export interface QualityValue {
  value: number;
  lo: number;
  hi: number;
  n: number;
}

/** A named operating point. `flopsRatio` is analytic, at the calibration's sequence length; `quality` is measured. */
export interface Level {
  name: string;
  spec: ElasticSpec;
  flopsRatio?: number;
  quality?: Record<string, QualityValue>;
}

/**
 * What was measured after training: how compute is best taken away, and the logits that routers then give.
 *
 * `path` holds capacities of all routers in the order of execution; it starts at all 1 and every step lowers one router,
 * the one whose tokens or experts cost the least divergence per FLOP saved. Budgets lie on it.
 *
 * `quantiles.get(id)` is [capacities.length, points], row-major, ascending within a row: the quantiles of a router's
 * logits while the model ran on the path at each mean capacity of `capacities`, since the logits a router sees depend on
 * what the routers before it dropped. Point j is the j/(points-1) quantile.
 *
 * Of routers of experts by mass they are quantiles of the mass that a token's better experts have before each: the share c of
 * all experts is used at a mass that is the c quantile.
 */
export interface Calibration {
  path: readonly (readonly number[])[];
  /** Mean capacities, ascending. */
  capacities: readonly number[];
  points: number;
  /** Tokens measured at each capacity. */
  tokens: number;
  /** Length of the sequences measured, in tokens: budgets are solved for it unless a caller names another. */
  sequenceLength: number;
  quantiles: ReadonlyMap<string, Float32Array>;
}

/** From low to high, both included. */
export type Range = readonly [low: number, high: number];

/** Layers cut into `count` experts, of which every token uses some. */
export interface Experts {
  layers: readonly number[];
  count: number;
  gate: ExpertGate;
  /**
   * How a token's share becomes experts where the model is used: `top-k`, so many of them; `mass`, as many as its scores take
   * to reach a mass of which tokens use the share on the mean. Routers are trained by top-k.
   */
  rule: ExpertRule;
  /**
   * Of heads, whose keys and values a row that enters has: default `all`; with `selected` only those of the heads that it
   * chose.
   */
  keys?: AttentionKeys;
  /**
   * Rows of a sequence in the same tile of so many consecutive positions, [0, tile), [tile, 2 tile), ..., choose together, by the
   * scores of the first of them that enters the sub-layer. Absent: every row by itself.
   */
  tile?: number;
}

// No less: rows that speculative decoding takes back are then of two tiles at most. No more: positions are fewer.
const [leastTile, mostTile] = [32, 2 ** 24];
/** What is wrong with a `tile`, or null. */
export const tileProblem = (tile: unknown): string | null =>
  Number.isInteger(tile) && (tile as number) >= leastTile && (tile as number) <= mostTile
    ? null
    : `an integer from ${leastTile} to ${mostTile}`;

/** Into how many experts a sub-layer can be cut, and the rule in words. */
export function cutRule(axis: ExpertAxis, { heads, kvHeads, ffn }: ModelSizes): [(count: number) => boolean, string] {
  if (axis === 'blocks') {
    const divides = (count: number) => Number.isInteger(count) && count >= 2 && ffn % count === 0;
    return [divides, `an integer from 2 that divides the feed-forward's width ${ffn}`];
  }
  const counts = [...new Set([heads, kvHeads])].filter((count) => count >= 2);
  const words = counts.length > 0 ? `${counts.join(' or ')}, the model's heads` : 'absent: the model has one head';
  return [(count) => counts.includes(count), words];
}
export type ModelSizes = Pick<ModelSpec, 'layers' | 'hidden' | 'ffn' | 'gated' | 'heads' | 'kvHeads'>;

/** Heads have keys of their own only where no other expert shares them. */
export const ownKeysRule = (count: number, kvHeads: number): string | null =>
  count === kvHeads ? null : `'all' where heads share keys: ${count} experts share ${kvHeads}`;

/** Sub-layers of an encoder that tokens of a source enter or skip: those of all its layers and modules. */
export interface SourceTokens {
  /** Of the encoder. */
  readonly layers: number;
  /** Where there are routers, and the mean capacities that they are trained at. */
  readonly capacity: Readonly<Partial<Record<Place, Range>>>;
}

export interface ElasticPolicy {
  version: 1;
  /** The unchanged backbone this policy belongs to. */
  base: { name: string; weightsSha256: string; tokenizerSha256: string | null } & Provenance;
  /** Of the backbone: routers are [1, hidden]. Layers of an encoder-decoder model are its decoder's. */
  hidden: number;
  layers: number;
  gate: GateMode;
  /** Layers that tokens enter or skip, ascending: their attention, their feed-forward, or both together. */
  tokens: {
    attn?: { layers: readonly number[]; keys: AttentionKeys };
    mlp?: { layers: readonly number[] };
    block?: { layers: readonly number[]; keys: AttentionKeys };
  };
  /** Layers that whole sequences enter or skip. */
  sequences?: { [target in Target]?: { layers: readonly number[] } };
  /** Layers of whose attention heads, or groups of heads that share keys and values, are experts. */
  heads?: Experts;
  /** Layers whose feed-forward is cut into blocks of equal width. */
  blocks?: Experts;
  /** Layers whose feed-forward runs at any width. */
  nested?: Nested;
  /** Heads after inner layers of an encoder at which texts may leave, ascending. */
  exits?: readonly Exit[];
  /** Spans of an encoder-decoder model's layers for which one layer may stand. */
  modules?: Modules;
  /** Sub-layers of an encoder-decoder model's encoder that tokens of a source enter or skip. */
  sourceTokens?: SourceTokens;
  /**
   * Corrections of projections by matrices of a rank, which every budget below full has. Of an encoder-decoder model `layers` are all of the
   * decoder, and with them those of the encoder; projections of attention are those of attention to the source, too.
   */
  lora?: { rank: number; targets: readonly Projection[]; layers: readonly number[] };
  /** Mean capacities each axis is trained at: drawn uniformly per sequence; equal ends mean one fixed capacity. */
  capacity: Partial<Record<Axis, Range>>;
  /** Null until trained: a budget below full needs it. */
  calibration: Calibration | null;
  levels: readonly Level[];
}

export interface Router {
  /** [outputs, hidden] */
  weight: Float32Array;
  /** [outputs] */
  bias: Float32Array;
}

/** A router. They are always listed in the order of execution: layer by layer, within one as `axes` are. */
export interface RouterPlace {
  id: string;
  layer: number;
  axis: Axis;
  /** Of whose sub-layer it decides, or of its first one. */
  place: Place;
  /** All sub-layers it decides about. */
  places: readonly Place[];
  /** Scores it gives a token: one, or one for every expert. */
  outputs: number;
}

/** What is routed in a policy. */
export type Routing = Pick<ElasticPolicy, 'tokens' | 'sequences' | ExpertAxis | 'layers'>;

/** The layers routed on an axis, ascending. */
export function routedLayers(policy: Omit<Routing, 'layers'>, axis: Axis): readonly number[] {
  if (isExperts(axis)) return policy[axis]?.layers ?? [];
  return (ofSequences(axis) ? policy.sequences : policy.tokens)?.[axisTraits[axis].target]?.layers ?? [];
}

/** On which axis the rows that enter a sub-layer are chosen; null: all enter. */
export function rowAxisOf(policy: Omit<Routing, 'layers'>, layer: number, place: Place): RowAxis | null {
  for (const axis of rowAxes) {
    if (axisTraits[axis].places.includes(place) && routedLayers(policy, axis).includes(layer)) return axis;
  }
  return null;
}

/** Which rows the attention of a layer attends to where not all enter it; sequences that skip it have no keys there. */
export function keysOf(policy: Omit<Routing, 'layers'>, layer: number): AttentionKeys {
  const axis = rowAxisOf(policy, layer, 'attn');
  return (axis === 'attn' || axis === 'block') && policy.tokens[axis]!.keys === 'all' ? 'all' : 'selected';
}

/** What in a policy does not go together, or null. */
export function routingConflict(policy: Routing & Pick<ElasticPolicy, 'gate'>): string | null {
  for (let layer = 0; layer < policy.layers; layer++) {
    for (const place of places) {
      const own = axes.filter(
        (axis) => axisTraits[axis].places.includes(place) && routedLayers(policy, axis).includes(layer),
      );
      const rows = own.filter((axis) => !isExperts(axis));
      const alone = rows.some((axis) => axisTraits[axis].places.length > 1);
      if (rows.length > 1 || (alone && own.length > 1)) {
        return `layer ${layer} has ${own.map((axis) => axisTraits[axis].setting).join(' and ')}: one router decides which rows enter a sub-layer, and one of whole blocks is the only one of its layer`;
      }
    }
  }
  const whole = rowAxes.find((axis) => axis !== 'attn' && axis !== 'mlp' && routedLayers(policy, axis).length > 0);
  return whole && policy.gate !== 'straight-through'
    ? `${axisTraits[whole].setting} needs the gate 'straight-through', not '${policy.gate}'`
    : null;
}

/** Every router of a policy, in the order of execution. */
export function routerPlaces(policy: Routing): RouterPlace[] {
  return Array.from({ length: policy.layers }, (_, layer) =>
    axes
      .filter((axis) => routedLayers(policy, axis).includes(layer))
      .map((axis) => ({
        id: routerId(layer, axis),
        layer,
        axis,
        place: axisTraits[axis].places[0],
        places: axisTraits[axis].places,
        outputs: isExperts(axis) ? policy[axis]!.count : 1,
      })),
  ).flat();
}

/** A router of an encoder-decoder model, and the part of the encoder that it is of. */
export interface SourceRouter {
  readonly id: string;
  readonly part: string;
  readonly axis: Place;
  readonly outputs: 1;
}

/** `encoder.layers.2.attn.token`, `encoder.modules.2-3.mlp.token`: the name of a router in files. */
export const sourceRouterId = (part: string, place: Place): string =>
  `encoder.${isModule(part) ? 'modules' : 'layers'}.${part}.${place}.token`;

/** Every router of an encoder-decoder model: those of the encoder's layers, then those of its modules. */
export function sourceRouters({
  sourceTokens,
  modules,
}: Pick<ElasticPolicy, 'sourceTokens' | 'modules'>): SourceRouter[] {
  if (!sourceTokens) return [];
  const layers = Array.from({ length: sourceTokens.layers }, (_, i) => String(i));
  const routed = places.filter((place) => sourceTokens.capacity[place]);
  return [...layers, ...(modules?.encoder ?? []).map(partId)].flatMap((part) =>
    routed.map((axis) => ({ id: sourceRouterId(part, axis), part, axis, outputs: 1 as const })),
  );
}

/** Everything of a policy that has a weight [outputs, hidden] and a bias: routers in the order of execution, heads of exits. */
export const headIds = (policy: Routing & Pick<ElasticPolicy, 'exits' | 'sourceTokens' | 'modules'>): string[] => [
  ...routerPlaces(policy).map(({ id }) => id),
  ...sourceRouters(policy).map(({ id }) => id),
  ...(policy.exits ?? []).map(({ afterLayer }) => exitId(afterLayer)),
];

/** What encoders cannot have, or null. */
export function encoderConflict(
  policy: Routing & Pick<ElasticPolicy, 'lora'>,
  { encoder, type }: ModelSpec,
): string | null {
  if (!encoder || (routerPlaces(policy).length === 0 && !policy.lora)) return null;
  return `${type} is an encoder: it has exits and nested feed-forwards, and no ${policy.lora ? 'lora' : 'routers'}`;
}

/** What encoder-decoder models cannot have and others cannot, or null. */
export function modulesConflict(
  policy: Routing & Pick<ElasticPolicy, 'lora' | 'nested' | 'exits' | 'modules'>,
  seq2seq: Seq2SeqSpec | null,
): string | null {
  if (!seq2seq) return policy.modules ? 'modules are for encoder-decoder models' : null;
  const { nested, lora, exits, modules, layers } = policy;
  if (!modules || exits || routerPlaces(policy).length > 0)
    return 'an encoder-decoder model has modules, nested feed-forwards, lora and source_tokens, and no other routers or exits';
  const some = [nested, lora].some((own) => own && own.layers.length < layers);
  if (some) return 'nested feed-forwards and lora of an encoder-decoder model are of all its layers';
  const { encoder, decoder } = seq2seq;
  return nested && encoder.ffn !== decoder.ffn
    ? `nested feed-forwards of an encoder-decoder model are of one width in both stacks, and these have ${encoder.ffn} and ${decoder.ffn} units`
    : null;
}

/** Weights and biases of all routers. */
export function routerParameters(policy: Routing & Pick<ElasticPolicy, 'hidden' | 'sourceTokens' | 'modules'>): number {
  const all = [...routerPlaces(policy), ...sourceRouters(policy)];
  return all.reduce((sum, { outputs }) => sum + outputs * (policy.hidden + 1), 0);
}

/** The share of experts that tokens use on the mean when a share is asked for: whole ones, at least one. */
export const usedShare = ({ count, rule }: Experts, share: number): number =>
  rule === 'mass' ? Math.max(share, 1 / count) : expertsUsed(share, count) / count;

/** Whether routers of an axis have calibrated quantiles; the others need none. */
export const hasQuantiles = (policy: Routing, axis: Axis): boolean => !isExperts(axis) || policy[axis]!.rule === 'mass';

/** Smaller than the mass of a token's best expert. */
const leastMass = 1e-6;

/** One capacity per router, in the order of execution, from shares per axis; absent axes are full. */
export function routerCapacities(policy: Routing, shares: Partial<Record<Axis, Capacity>>): number[] {
  return routerPlaces(policy).map(({ layer, axis }) => {
    const share = shares[axis] ?? 1;
    return typeof share === 'number' ? share : share[routedLayers(policy, axis).indexOf(layer)];
  });
}

/**
 * What decides at each router so that it passes about its capacity: the logit threshold of tokens, the share of experts;
 * minus infinity for full ones, infinity for 0. Quantiles are interpolated linearly between points and between calibrated
 * capacities.
 *
 * @param capacities one per router, in the order of execution
 */
export function thresholds(
  policy: Routing,
  calibration: Calibration,
  capacities: readonly number[],
): Map<string, number> {
  // What dropped rows upstream is the mean capacity over routed sub-layers.
  const mean = meanCapacity(capacities);
  const routers = routerPlaces(policy);
  const name = ({ layer, place }: RouterPlace) => `${layer} ${place}`;
  // Where no token enters or no expert is used the sub-layer does not run, and neither does its other router.
  const absent = new Set(routers.filter((_, i) => capacities[i] <= 0).map(name));
  return new Map(
    routers.map((router, i) => {
      const { id, axis } = router;
      const c = capacities[i];
      if (absent.has(name(router))) return [id, Number.POSITIVE_INFINITY];
      if (c >= 1) return [id, Number.NEGATIVE_INFINITY];
      if (isExperts(axis) && policy[axis]!.rule === 'top-k') return [id, c];
      // Of no mass a token would use no expert, and it uses at least one.
      if (isExperts(axis)) return [id, Math.max(quantile(calibration, id, mean, c), leastMass)];
      // A router that scores all tokens alike cannot choose: all pass.
      const table = calibration.quantiles.get(id)!;
      if (Math.max(...table) === Math.min(...table)) return [id, Number.NEGATIVE_INFINITY];
      return [id, quantile(calibration, id, mean, 1 - c)];
    }),
  );
}

function quantile(calibration: Calibration, id: string, context: number, q: number): number {
  const { capacities, points } = calibration;
  const table = calibration.quantiles.get(id)!;
  const at = (row: number): number => {
    const x = q * (points - 1);
    const i = Math.min(Math.floor(x), points - 2);
    const a = table[row * points + i];
    const b = table[row * points + i + 1];
    return a + (b - a) * (x - i);
  };
  // capacities ascend
  if (context <= capacities[0]) return at(0);
  for (let i = 1; i < capacities.length; i++) {
    if (context <= capacities[i]) {
      const t = (context - capacities[i - 1]) / (capacities[i] - capacities[i - 1]);
      return at(i - 1) * (1 - t) + at(i) * t;
    }
  }
  return at(capacities.length - 1);
}

/** Which layers nested feed-forwards may not be in, or null when they are in none of them. */
export function nestedConflict({ nested, blocks }: Pick<ElasticPolicy, 'nested' | 'blocks'>): string | null {
  const both = nested?.layers.filter((layer) => blocks?.layers.includes(layer)) ?? [];
  return both.length > 0 ? `layers whose feed-forward is not cut into blocks, as ${both.join(', ')} is` : null;
}

/** What is wrong with a list of projections to correct, or null. They stand in the order of `projections`. */
export function targetProblem(targets: unknown, { gated }: Pick<ModelSpec, 'gated'>): string | null {
  const there = projections.filter((projection) => gated || projection !== 'gate');
  const known =
    Array.isArray(targets) &&
    targets.length > 0 &&
    there.filter((projection) => targets.includes(projection)).join() === targets.join();
  return known ? null : `some of ${there.join(', ')}, in this order`;
}
