// From a budget to capacities: solves the cost model for the share of tokens every routed sub-layer may take.
import { attentionFlops, feedForwardFlops, headFlops } from '../model/flops.js';
import { type Place, places } from '../model/select.js';
import type { ModelSpec } from '../model/spec.js';
import { InvalidArgumentError } from '../native/errors.js';
import { checkCapacity, type ElasticPolicy, type ElasticSpec, type Level, thresholds } from './policy.js';

/**
 * What a call may spend: a share of the full model's FLOPs in (0, 1], 'full', the name of a level, or explicit settings.
 */
export type Budget = number | 'full' | (string & {}) | { spec: ElasticSpec };

/** A budget resolved for a model. */
export interface OperatingPoint {
  /** Name of the level asked for, or null. */
  level: string | null;
  /** Settings that differ from full. */
  spec: ElasticSpec;
  /** Share of tokens per place; 1 where a place is not routed. */
  capacity: { attn: number; mlp: number };
  /** No routing at all: the plain backbone runs. */
  full: boolean;
  /** Logit threshold of every router; empty when full. */
  thresholds: ReadonlyMap<string, number>;
  /** Expected FLOPs over those of the full model, at the length the budget was resolved for. */
  flopsRatio: number;
  /** How the budget was resolved, for a person. */
  why: string;
}

/** Below this capacity a budget counts as out of reach; explicit settings may go lower. */
export const leastCapacity = 0.05;

type Routing = Pick<ElasticPolicy, 'tokens'>;
type Capacity = { attn: number; mlp: number };

/** FLOPs of one sub-layer when `rows` rows of a sequence enter it; fractional rows are an expectation. */
function subLayerFlops(spec: ModelSpec, place: Place, rows: number): number {
  return place === 'attn' ? attentionFlops(spec, [rows]) : feedForwardFlops(spec, rows);
}

/**
 * Expected FLOPs of one sequence of `length` tokens with every token's logits, routers included, over those of the full
 * model. Capacity 1 in every place still pays for routers, so the ratio may pass 1 a little.
 */
export function flopsRatio(spec: ModelSpec, policy: Routing, capacity: Capacity, length: number): number {
  let full = headFlops(spec, length);
  let routed = full;
  for (const place of places) {
    const layers = policy.tokens[place]?.layers.length ?? 0;
    const dense = subLayerFlops(spec, place, length);
    const router = 2 * length * spec.hidden;
    full += spec.layers * dense;
    routed += (spec.layers - layers) * dense + layers * (subLayerFlops(spec, place, capacity[place] * length) + router);
  }
  return routed / full;
}

/** The one capacity for all routed places that costs the share `ratio`, or null when it would be below leastCapacity. */
function solveCapacity(spec: ModelSpec, policy: Routing, ratio: number, length: number): number | null {
  const cost = (c: number) => flopsRatio(spec, policy, { attn: c, mlp: c }, length);
  if (cost(leastCapacity) > ratio) return null;
  let low = leastCapacity;
  let high = 1;
  // The cost ascends with the capacity.
  for (let i = 0; i < 50; i++) {
    const middle = (low + high) / 2;
    if (cost(middle) <= ratio) low = middle;
    else high = middle;
  }
  return low;
}

/**
 * Resolves a budget. A number becomes one capacity for all routed sub-layers.
 *
 * @param policy null for a plain checkpoint, which has only the full budget.
 * @param length tokens of the sequences the share is meant for: attention's part of the cost grows with it. Default: the
 * length the model was calibrated at.
 * @throws InvalidArgumentError when the budget is malformed, names no level, is below what routing can reach, or needs
 * routers that are missing or not trained.
 */
export function resolveBudget(
  budget: Budget,
  spec: ModelSpec,
  policy: ElasticPolicy | null,
  { length }: { length?: number } = {},
): OperatingPoint {
  const at = length ?? policy?.calibration?.sequenceLength ?? 512;
  if (budget === 'full' || budget === 1) return fullPoint(budget === 'full' ? 'full' : null);
  if (typeof budget === 'string') {
    const level = policy?.levels.find((candidate) => candidate.name === budget);
    if (!level) {
      const names = ['full', ...(policy?.levels ?? []).map((l) => l.name).filter((name) => name !== 'full')];
      throw new InvalidArgumentError(`[budget] no level is named '${budget}'; there are ${names.join(', ')}`);
    }
    return explicit(level.spec, spec, policy, at, level.name);
  }
  if (typeof budget === 'number') {
    if (!(budget > 0 && budget < 1))
      throw new InvalidArgumentError(`[budget] a budget must be in (0, 1], got ${budget}`);
    const routed = needRouters(policy, budget);
    const c = solveCapacity(spec, routed, budget, at);
    if (c === null) {
      const floor = flopsRatio(spec, routed, { attn: leastCapacity, mlp: leastCapacity }, at);
      throw new InvalidArgumentError(
        `[budget] budget ${budget} cannot be reached: what is not routed takes ${floor.toFixed(3)} of the FLOPs at ${at} tokens; ask for ${(Math.ceil(floor * 100) / 100).toFixed(2)} or more`,
      );
    }
    return routedPoint({ attn: routed.tokens.attn ? c : 1, mlp: routed.tokens.mlp ? c : 1 }, spec, routed, at, null);
  }
  if (typeof budget === 'object' && budget !== null) {
    const unknown = Object.keys(budget).find((key) => key !== 'spec');
    if (unknown === undefined && typeof budget.spec === 'object' && budget.spec !== null) {
      return explicit(budget.spec, spec, policy, at, null);
    }
  }
  throw new InvalidArgumentError(
    `[budget] a budget must be a number in (0, 1], 'full', a level or {spec}, got ${JSON.stringify(budget)}`,
  );
}

function fullPoint(level: string | null): OperatingPoint {
  return {
    level,
    spec: {},
    capacity: { attn: 1, mlp: 1 },
    full: true,
    thresholds: new Map(),
    flopsRatio: 1,
    why: 'the whole backbone, without routing',
  };
}

function needRouters(policy: ElasticPolicy | null, what: unknown): ElasticPolicy {
  if (policy) return policy;
  throw new InvalidArgumentError(
    `[budget] budget ${JSON.stringify(what)} needs routers, and this model has none; make it elastic with \`elastiform elastify\` and \`elastiform distill\``,
  );
}

function explicit(
  wanted: ElasticSpec,
  spec: ModelSpec,
  policy: ElasticPolicy | null,
  length: number,
  level: string | null,
): OperatingPoint {
  for (const key of Object.keys(wanted)) {
    if (key !== 'tokenCapacity')
      throw new InvalidArgumentError(`[budget] unknown axis '${key}'; there is tokenCapacity`);
  }
  const capacity = { attn: 1, mlp: 1 };
  for (const [place, value] of Object.entries(wanted.tokenCapacity ?? {})) {
    if (!places.includes(place as Place)) {
      throw new InvalidArgumentError(
        `[budget] unknown place '${place}' in tokenCapacity; it takes ${places.join(', ')}`,
      );
    }
    if (value === undefined) continue;
    checkCapacity('budget', `tokenCapacity.${place}`, value);
    if (value < 1 && !needRouters(policy, { spec: wanted }).tokens[place as Place]) {
      throw new InvalidArgumentError(
        `[budget] tokenCapacity.${place} is ${value}, but ${place} has no routers in this model`,
      );
    }
    capacity[place as Place] = value;
  }
  if (capacity.attn === 1 && capacity.mlp === 1) return fullPoint(level);
  return routedPoint(capacity, spec, needRouters(policy, { spec: wanted }), length, level);
}

function routedPoint(
  capacity: Capacity,
  spec: ModelSpec,
  policy: ElasticPolicy,
  length: number,
  level: string | null,
): OperatingPoint {
  const tokenCapacity: { attn?: number; mlp?: number } = {};
  const notes: string[] = [];
  for (const place of places) {
    if (capacity[place] === 1) continue;
    tokenCapacity[place] = capacity[place];
    const low = policy.capacity[place]?.[0] ?? 1;
    notes.push(
      `${(capacity[place] * 100).toFixed(1)} % of tokens into ${place}${capacity[place] < low ? `, below the ${low * 100} % it was trained for` : ''}`,
    );
  }
  return {
    level,
    spec: { tokenCapacity },
    capacity,
    full: false,
    thresholds: thresholds(policy, capacity),
    flopsRatio: flopsRatio(spec, policy, capacity, length),
    why: `${notes.join('; ')}, for sequences of ${length} tokens`,
  };
}

/** Levels `full` and p90 to p40 (per cent of the full FLOPs), as far as routing reaches, at sequences of `length`. */
export function standardLevels(spec: ModelSpec, policy: Routing, length: number): Level[] {
  const levels: Level[] = [{ name: 'full', spec: {}, flopsRatio: 1 }];
  for (const percent of [90, 80, 70, 60, 50, 40]) {
    const c = solveCapacity(spec, policy, percent / 100, length);
    if (c === null) break;
    const rounded = Math.round(c * 1e4) / 1e4;
    const tokenCapacity: { attn?: number; mlp?: number } = {};
    for (const place of places) if (policy.tokens[place]) tokenCapacity[place] = rounded;
    const capacity = { attn: tokenCapacity.attn ?? 1, mlp: tokenCapacity.mlp ?? 1 };
    levels.push({
      name: `p${percent}`,
      spec: { tokenCapacity },
      flopsRatio: Math.round(flopsRatio(spec, policy, capacity, length) * 1e4) / 1e4,
    });
  }
  return levels;
}
