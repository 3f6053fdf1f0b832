// From a budget to capacities and thresholds: finds the point of the calibrated path that costs what may be spent.
import { attentionFlops, feedForwardFlops, forwardFlops, keyValueFlops } from '../model/flops.js';
import { type Place, type Projection, placeOf, places } from '../model/select.js';
import type { ModelSpec } from '../model/spec.js';
import { InvalidArgumentError } from '../native/errors.js';
import {
  type Axis,
  axes,
  axisTraits,
  type Capacity,
  capacityRule,
  type ElasticSpec,
  expertAxisOf,
  isCapacity,
  meanCapacity,
  perAxis,
  specByAxis,
  specKeys,
  specOfAxes,
} from './axes.js';
import {
  type Calibration,
  type ElasticPolicy,
  type Level,
  qualityMetric,
  type Routing,
  routedLayers,
  routerCapacities,
  routerPlaces,
  thresholds,
  usedShare,
} from './policy.js';
import { type DeviceProfile, expectedMs, type LatencyMetric, latencyMetrics } from './profile.js';

/**
 * What a call may spend: a share of the full model's FLOPs in (0, 1], 'full', the name of a level, or explicit settings. Or
 * what it must reach: with `latencyMs` the costliest level that takes at most so many milliseconds by the times measured on
 * this device, in total (the default), until the first token (`ttft`) or for each further one (`tpot`); with `minQuality` the
 * cheapest level whose next token is the full model's at so many positions, by the lower end of what was measured.
 */
export type Budget =
  | number
  | 'full'
  | (string & {})
  | { latencyMs: number; metric?: LatencyMetric }
  | { minQuality: number }
  | { spec: ElasticSpec };

/** A budget as the command line takes it: `0.7`, `p70`, `ttft:200ms`, `quality:0.95`; explicit settings as JSON. */
export function budgetText(budget: Budget): string {
  if (typeof budget !== 'object') return String(budget);
  if ('latencyMs' in budget) return `${budget.metric ?? 'total'}:${budget.latencyMs}ms`;
  return 'minQuality' in budget ? `quality:${budget.minQuality}` : JSON.stringify(budget.spec);
}

/** What a budget is resolved for. */
export interface BudgetContext {
  /**
   * Tokens of the sequences it is meant for: attention's part of the cost grows with it. Default: the length the model was
   * calibrated at.
   */
  length?: number;
  /** Of these, tokens generated; default none: a text is only read. */
  maxTokens?: number;
  /** The times of this device; throws when there are none. */
  profile?: () => DeviceProfile;
}

/** A budget resolved for a model. */
export interface OperatingPoint {
  /** Name of the level asked for, or null. */
  level: string | null;
  /** Settings that differ from full. */
  spec: ElasticSpec;
  /** Mean share over the routed layers of each axis; 1 where none is routed. */
  capacity: Record<Axis, number>;
  /** No routing at all: the plain backbone runs. */
  full: boolean;
  /** What decides at every router (`thresholds` of policy.ts); empty when full. */
  thresholds: ReadonlyMap<string, number>;
  /** Expected FLOPs over those of the full model, at the length the budget was resolved for. */
  flopsRatio: number;
  /** How the budget was resolved, for a person. */
  why: string;
}

/** What decides about the cost of a sub-layer. */
type Costed = Routing & Pick<ElasticPolicy, 'lora'>;

/** Of the tokens of a sequence, and of the experts of a sub-layer that each uses. */
interface Shares {
  tokens: number;
  experts: number;
}

// Expected FLOPs of one sub-layer when the share `tokens` of a sequence of `length` rows enters it, and uses the share
// `experts` of what it is cut into, with the routers that it takes to choose them: none at 0 and 1.
function routedFlops(
  spec: ModelSpec,
  policy: Routing,
  place: Place,
  { tokens, experts }: Shares,
  length: number,
): number {
  if (tokens <= 0 || experts <= 0) return 0;
  const cut = experts < 1 ? policy[expertAxisOf(place)]! : null;
  const used = cut ? usedShare(cut, experts) : 1;
  const entered = tokens * length;
  const tokenRouter = tokens < 1 ? 2 * length * spec.hidden : 0;
  const routers = tokenRouter + (cut ? 2 * entered * spec.hidden * cut.count : 0);
  if (place === 'mlp') return routers + used * feedForwardFlops(spec, entered);
  if (cut?.keys === 'selected') return routers + attentionFlops(spec, [used * entered]);
  // What rows with keys cost as keys and the rest as queries of them.
  const own = tokens < 1 && policy.tokens.attn!.keys === 'selected';
  const keys = keyValueFlops(spec, own ? entered : length);
  const whole = own ? attentionFlops(spec, [entered]) - keys : tokens * (attentionFlops(spec, [length]) - keys);
  return routers + keys + used * whole;
}

/** FLOPs of the corrections of one sub-layer's projections, at the shares of `routedFlops`. */
export function loraFlops(
  spec: ModelSpec,
  policy: Costed,
  { layer, place, tokens, experts }: Shares & { layer: number; place: Place },
  length: number,
): number {
  const { lora } = policy;
  if (!lora?.layers.includes(layer) || tokens <= 0 || experts <= 0) return 0;
  const { hidden, ffn, heads, kvHeads, headDim } = spec;
  const cut = experts < 1 ? policy[expertAxisOf(place)]! : null;
  const part = cut ? usedShare(cut, experts) : 1;
  const used = part * (cut?.count ?? 1);
  const [q, kv, units] = [part * heads * headDim, kvHeads * headDim, part * ffn];
  const entered = tokens * length;
  const own = cut?.keys === 'selected';
  const keys = own || (tokens < 1 && policy.tokens.attn?.keys === 'selected') ? entered : length;
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
  const here = lora.targets.filter((projection) => placeOf(projection) === place);
  return 2 * lora.rank * here.reduce((sum, projection) => sum + perRank[projection], 0);
}

/**
 * Expected FLOPs of one sequence of `length` tokens with every token's logits, routers included, over those of the full
 * model. Capacities near 1 may pass 1 a little, by the cost of routers.
 *
 * @param capacities one per router, in the order of execution
 */
export function flopsRatio(spec: ModelSpec, policy: Costed, capacities: readonly number[], length: number): number {
  const { perLayer, total } = forwardFlops(spec, [length]);
  const subLayers = Array.from({ length: spec.layers }, (_, layer) =>
    places.map((place) => ({ layer, place, tokens: 1, experts: 1 })),
  ).flat();
  for (const [i, { layer, place, axis }] of routerPlaces(policy).entries()) {
    const shares = subLayers.find((s) => s.layer === layer && s.place === place)!;
    shares[axisTraits[axis].routes] = capacities[i];
  }
  let saved = 0;
  for (const shares of subLayers) {
    saved += perLayer[shares.place] - routedFlops(spec, policy, shares.place, shares, length);
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

/** The point of the path that costs the share `ratio` at `length` tokens, or null when even its end costs more. */
const solvePath = (
  spec: ModelSpec,
  policy: Costed,
  { path }: Pick<Calibration, 'path'>,
  ratio: number,
  length: number,
): number[] | null => pointOnPath(path, (capacities) => flopsRatio(spec, policy, capacities, length), ratio);

/**
 * Resolves a budget. A number becomes the point of the calibrated path that costs this share.
 *
 * @param policy null for a plain checkpoint, which has only the full budget.
 * @throws InvalidArgumentError when the budget is malformed, names no level, is below what routing can reach, needs
 * routers that are missing or not trained, or measurements that are missing.
 */
export function resolveBudget(
  budget: Budget,
  spec: ModelSpec,
  policy: ElasticPolicy | null,
  context: BudgetContext = {},
): OperatingPoint {
  const at = context.length ?? policy?.calibration?.sequenceLength ?? 512;
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
    return routedPoint(axisCapacities(routed, capacities), spec, routed, at, null);
  }
  if (typeof budget === 'object' && budget !== null) {
    const keys = Object.keys(budget).sort().join();
    if ('latencyMs' in budget && (keys === 'latencyMs' || keys === 'latencyMs,metric')) {
      return withinLatency(budget, levelPoints(spec, needRouters(policy, budget), at), { ...context, length: at });
    }
    if ('minQuality' in budget && keys === 'minQuality') {
      const routed = needRouters(policy, budget);
      return withQuality(budget.minQuality, levelPoints(spec, routed, at), routed.levels);
    }
    if ('spec' in budget && keys === 'spec' && typeof budget.spec === 'object' && budget.spec !== null) {
      return explicit(budget.spec, spec, policy, at, null);
    }
  }
  throw new InvalidArgumentError(
    `[budget] a budget must be a number in (0, 1], 'full', a level, {latencyMs, metric}, {minQuality} or {spec}, got ${JSON.stringify(budget)}`,
  );
}

/** A level with its settings as they are written. */
interface LevelPoint {
  readonly name: string;
  readonly spec: ElasticSpec;
  readonly point: OperatingPoint;
}

/** Full and every level of a model, the costliest first. */
function levelPoints(spec: ModelSpec, policy: ElasticPolicy, length: number): LevelPoint[] {
  const full: LevelPoint = { name: 'full', spec: {}, point: fullPoint('full') };
  const others = policy.levels.filter(({ name }) => name !== 'full');
  const points = others.map((level) => ({
    ...{ name: level.name, spec: level.spec },
    point: explicit(level.spec, spec, policy, length, level.name),
  }));
  return [full, ...points].sort((a, b) => b.point.flopsRatio - a.point.flopsRatio);
}

function withinLatency(
  { latencyMs, metric = 'total' }: { latencyMs: number; metric?: LatencyMetric },
  levels: readonly LevelPoint[],
  { length, maxTokens = 0, profile }: BudgetContext & { length: number },
): OperatingPoint {
  if (!(typeof latencyMs === 'number' && Number.isFinite(latencyMs) && latencyMs > 0))
    throw new InvalidArgumentError(`[budget] latencyMs must be a positive number, got ${JSON.stringify(latencyMs)}`);
  if (!latencyMetrics.includes(metric)) {
    throw new InvalidArgumentError(
      `[budget] metric must be one of ${latencyMetrics.join(', ')}, got ${JSON.stringify(metric)}`,
    );
  }
  if (!profile) throw new InvalidArgumentError('[budget] a latency budget needs a loaded model, whose device it means');
  const times = profile();
  const call = { prompt: Math.max(length - Math.max(maxTokens - 1, 0), 1), generated: maxTokens };
  const measured = levels.flatMap(({ name, spec, point }) => {
    const found = times.levels.find(
      (entry) => entry.level === name && JSON.stringify(entry.spec) === JSON.stringify(spec),
    );
    return found ? [{ name, point, ms: expectedMs(times, found, metric, call) }] : [];
  });
  if (measured.length === 0) {
    throw new InvalidArgumentError(
      '[budget] the times measured on this device are of other levels than the model has; measure again with `elastiform eval --record`',
    );
  }
  const what = `${metric} of ${call.prompt} tokens${maxTokens > 0 ? ` and ${maxTokens} generated` : ''}`;
  const chosen = measured.find(({ ms }) => ms <= latencyMs);
  if (!chosen) {
    const fastest = measured.reduce((a, b) => (b.ms < a.ms ? b : a));
    throw new InvalidArgumentError(
      `[budget] no level keeps ${latencyMs} ms (${what}): the fastest, ${fastest.name}, takes ${fastest.ms.toFixed(1)} ms on this device; allow more, or ask for fewer tokens`,
    );
  }
  const { name, point, ms } = chosen;
  const why = `${name} is the costliest level within ${latencyMs} ms: ${ms.toFixed(1)} ms, ${what}, by the times measured on this device; ${point.why}`;
  return { ...point, why };
}

function withQuality(least: number, points: readonly LevelPoint[], levels: ElasticPolicy['levels']): OperatingPoint {
  if (!(typeof least === 'number' && least > 0 && least <= 1))
    throw new InvalidArgumentError(`[budget] minQuality must be in (0, 1], got ${JSON.stringify(least)}`);
  const quality = new Map(levels.map(({ name, quality }) => [name, quality?.[qualityMetric]]));
  const measured = points.flatMap(({ name, point }) => {
    const value = name === 'full' ? { value: 1, lo: 1 } : quality.get(name);
    return value ? [{ name, point, ...value }] : [];
  });
  if (measured.length === 1) {
    throw new InvalidArgumentError(
      '[budget] the quality of no level was measured yet; measure it: elastiform eval DIR --data FILE --record',
    );
  }
  // Full is among them, and the costliest comes first.
  const { name, point, value, lo } = measured.findLast((level) => level.lo >= least)!;
  const why = `${name} is the cheapest level that agrees with the full model at ${least} of positions: ${value.toFixed(3)}, at least ${lo.toFixed(3)}; ${point.why}`;
  return { ...point, why };
}

function fullPoint(level: string | null): OperatingPoint {
  return {
    level,
    spec: {},
    capacity: perAxis(() => 1),
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
    if (!specKeys.includes(key))
      throw new InvalidArgumentError(`[budget] unknown axis '${key}'; there are ${specKeys.join(', ')}`);
  }
  for (const place of Object.keys(wanted.tokenCapacity ?? {})) {
    if (places.includes(place as Place)) continue;
    throw new InvalidArgumentError(`[budget] unknown place '${place}' in tokenCapacity; it takes ${places.join(', ')}`);
  }
  const shares: AxisShares = {};
  for (const [axis, value] of Object.entries(specByAxis(wanted)) as [Axis, unknown][]) {
    if (value === undefined) continue;
    const name = axisTraits[axis].setting;
    const layers = policy ? routedLayers(policy, axis).length : 0;
    if (!isCapacity(value, layers)) {
      throw new InvalidArgumentError(`[budget] ${name} must be ${capacityRule(layers)}, got ${JSON.stringify(value)}`);
    }
    if (isFull(value)) continue;
    if (routedLayers(needRouters(policy, { spec: wanted }), axis).length === 0) {
      throw new InvalidArgumentError(
        `[budget] ${name} is ${JSON.stringify(value)}, but ${axis} has no routers in this model`,
      );
    }
    shares[axis] = value;
  }
  if (Object.keys(shares).length === 0) return fullPoint(level);
  return routedPoint(shares, spec, needRouters(policy, { spec: wanted }), length, level);
}

type AxisShares = Partial<Record<Axis, Capacity>>;

const isFull = (share: Capacity): boolean => [share].flat().every((c) => c === 1);

/** Capacities of all routers as shares per axis. */
function axisCapacities(policy: Routing, capacities: readonly number[]): AxisShares {
  const routers = routerPlaces(policy);
  return Object.fromEntries(
    axes
      .filter((axis) => routedLayers(policy, axis).length > 0)
      .map((axis) => [axis, capacities.filter((_, i) => routers[i].axis === axis)]),
  );
}

function routedPoint(
  shares: AxisShares,
  spec: ModelSpec,
  policy: ElasticPolicy,
  length: number,
  level: string | null,
): OperatingPoint {
  const capacities = routerCapacities(policy, shares);
  const mean = (axis: Axis) => meanCapacity(shares[axis] ?? 1);
  const notes = axes.flatMap((axis) => {
    if (mean(axis) === 1) return [];
    const low = policy.capacity[axis]?.[0] ?? 1;
    const below = mean(axis) < low ? `, below the ${low * 100} % it was trained for` : '';
    return `${(mean(axis) * 100).toFixed(1)} % ${axisTraits[axis].of}${below}`;
  });
  return {
    level,
    spec: specOfAxes(shares),
    capacity: perAxis(mean),
    full: false,
    thresholds: thresholds(policy, needCalibration(policy), capacities),
    flopsRatio: flopsRatio(spec, policy, capacities, length),
    why: `${notes.join('; ')}, for sequences of ${length} tokens`,
  };
}

/** Levels `full` and p90 to p40 (per cent of the full FLOPs), as far as the path reaches, at sequences of `length`. */
export function standardLevels(
  spec: ModelSpec,
  policy: Costed,
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
      spec: specOfAxes(axisCapacities(policy, capacities)),
      flopsRatio: Math.round(flopsRatio(spec, policy, capacities, length) * 1e4) / 1e4,
    });
  }
  return levels;
}
