// From a budget to capacities and thresholds: finds the point of the calibrated path that costs what may be spent.
import { attentionFlops, feedForwardFlops, forwardFlops, keyValueFlops } from '../model/flops.js';
import { type Place, places } from '../model/select.js';
import type { ModelSpec } from '../model/spec.js';
import { InvalidArgumentError } from '../native/errors.js';
import {
  type Calibration,
  type ElasticPolicy,
  type ElasticSpec,
  isTokenCapacity,
  type Level,
  meanCapacity,
  routerCapacities,
  routerPlaces,
  type TokenCapacity,
  thresholds,
  tokenCapacityRule,
} from './policy.js';

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
  /** Mean share of tokens over the routed layers of each place; 1 where none is routed. */
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

type Routing = Pick<ElasticPolicy, 'tokens' | 'layers'>;

// Expected FLOPs of one sub-layer when the share c of a sequence of `length` rows enters it, with the router that it takes
// to choose them: none at 0 and 1.
function routedFlops(spec: ModelSpec, policy: Routing, place: Place, c: number, length: number): number {
  if (c <= 0) return 0;
  if (c >= 1) return place === 'mlp' ? feedForwardFlops(spec, length) : attentionFlops(spec, [length]);
  const router = 2 * length * spec.hidden;
  if (place === 'mlp') return router + feedForwardFlops(spec, c * length);
  if (policy.tokens.attn!.keys === 'selected') return router + attentionFlops(spec, [c * length]);
  return router + c * attentionFlops(spec, [length]) + (1 - c) * keyValueFlops(spec, length);
}

/**
 * Expected FLOPs of one sequence of `length` tokens with every token's logits, routers included, over those of the full
 * model. Capacities near 1 may pass 1 a little, by the cost of routers.
 *
 * @param capacities one per router, in the order of execution
 */
export function flopsRatio(spec: ModelSpec, policy: Routing, capacities: readonly number[], length: number): number {
  const { perLayer, total } = forwardFlops(spec, [length]);
  const saved = routerPlaces(policy).map(
    ({ place }, i) => perLayer[place] - routedFlops(spec, policy, place, capacities[i], length),
  );
  return (total - saved.reduce((a, b) => a + b, 0)) / total;
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

/** The point of the path that costs the share `ratio` at `length` tokens, or null when even its end costs more. */
const solvePath = (
  spec: ModelSpec,
  policy: Routing,
  { path }: Pick<Calibration, 'path'>,
  ratio: number,
  length: number,
): number[] | null => pointOnPath(path, (capacities) => flopsRatio(spec, policy, capacities, length), ratio);

/**
 * Resolves a budget. A number becomes the point of the calibrated path that costs this share.
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
    const calibration = needCalibration(routed);
    const capacities = solvePath(spec, routed, calibration, budget, at);
    if (!capacities) {
      const floor = flopsRatio(spec, routed, calibration.path.at(-1)!, at);
      throw new InvalidArgumentError(
        `[budget] budget ${budget} cannot be reached: this model was calibrated down to ${floor.toFixed(3)} of the FLOPs at ${at} tokens; ask for ${(Math.ceil(floor * 100) / 100).toFixed(2)} or more`,
      );
    }
    return routedPoint(placeCapacities(routed, capacities), spec, routed, at, null);
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

function needCalibration({ calibration }: ElasticPolicy): Calibration {
  if (calibration) return calibration;
  throw new InvalidArgumentError(
    '[budget] this model has routers that were never trained, so only budget 1 runs; train them with `elastiform distill`',
  );
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
  const capacity: Shares = {};
  for (const [place, value] of Object.entries(wanted.tokenCapacity ?? {})) {
    if (!places.includes(place as Place)) {
      throw new InvalidArgumentError(
        `[budget] unknown place '${place}' in tokenCapacity; it takes ${places.join(', ')}`,
      );
    }
    if (value === undefined) continue;
    const layers = policy?.tokens[place as Place]?.layers.length ?? 0;
    if (!isTokenCapacity(value, layers)) {
      throw new InvalidArgumentError(
        `[budget] tokenCapacity.${place} must be ${tokenCapacityRule(layers)}, got ${JSON.stringify(value)}`,
      );
    }
    if (isFull(value)) continue;
    if (!needRouters(policy, { spec: wanted }).tokens[place as Place]) {
      throw new InvalidArgumentError(
        `[budget] tokenCapacity.${place} is ${JSON.stringify(value)}, but ${place} has no routers in this model`,
      );
    }
    capacity[place as Place] = value;
  }
  if (Object.keys(capacity).length === 0) return fullPoint(level);
  return routedPoint(capacity, spec, needRouters(policy, { spec: wanted }), length, level);
}

type Shares = { attn?: TokenCapacity; mlp?: TokenCapacity };

const isFull = (share: TokenCapacity): boolean => [share].flat().every((c) => c === 1);

/** Capacities of all routers as shares per place. */
function placeCapacities(policy: Routing, capacities: readonly number[]): Shares {
  const shares: Shares = {};
  for (const place of places) {
    if (policy.tokens[place]) shares[place] = capacities.filter((_, i) => routerPlaces(policy)[i].place === place);
  }
  return shares;
}

function routedPoint(
  tokenCapacity: Shares,
  spec: ModelSpec,
  policy: ElasticPolicy,
  length: number,
  level: string | null,
): OperatingPoint {
  const capacities = routerCapacities(policy, tokenCapacity);
  const mean = { attn: meanCapacity(tokenCapacity.attn ?? 1), mlp: meanCapacity(tokenCapacity.mlp ?? 1) };
  const notes = places.flatMap((place) => {
    if (mean[place] === 1) return [];
    const low = policy.capacity[place]?.[0] ?? 1;
    const below = mean[place] < low ? `, below the ${low * 100} % it was trained for` : '';
    return `${(mean[place] * 100).toFixed(1)} % of tokens into ${place}${below}`;
  });
  return {
    level,
    spec: { tokenCapacity },
    capacity: mean,
    full: false,
    thresholds: thresholds(policy, needCalibration(policy), capacities),
    flopsRatio: flopsRatio(spec, policy, capacities, length),
    why: `${notes.join('; ')}, for sequences of ${length} tokens`,
  };
}

/** Levels `full` and p90 to p40 (per cent of the full FLOPs), as far as the path reaches, at sequences of `length`. */
export function standardLevels(
  spec: ModelSpec,
  policy: Routing,
  calibration: Pick<Calibration, 'path'>,
  length: number,
): Level[] {
  const levels: Level[] = [{ name: 'full', spec: {}, flopsRatio: 1 }];
  for (const percent of [90, 80, 70, 60, 50, 40]) {
    const solved = solvePath(spec, policy, calibration, percent / 100, length);
    if (!solved) break;
    const capacities = solved.map((c) => Math.round(c * 1e4) / 1e4);
    levels.push({
      name: `p${percent}`,
      spec: { tokenCapacity: placeCapacities(policy, capacities) },
      flopsRatio: Math.round(flopsRatio(spec, policy, capacities, length) * 1e4) / 1e4,
    });
  }
  return levels;
}
