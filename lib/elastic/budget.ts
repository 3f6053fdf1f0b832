// From a budget to capacities, thresholds and widths.
import type { ModelSpec } from '../model/spec.js';
import { InvalidArgumentError } from '../native/errors.js';
import {
  type Axis,
  axes,
  axisTraits,
  capacityRule,
  type ElasticSpec,
  isCapacity,
  meanCapacity,
  perAxis,
  specByAxis,
  specKeys,
  type Target,
  targets,
} from './axes.js';
import { flopsRatio } from './cost.js';
import { type ExitSetting, settingProblem } from './exits.js';
import { type AxisShares, axisCapacities, isFull, leastRatio, planLength, solve, specOf } from './levels.js';
import { type FfnWidth, granularityWidths, layerWidths, type Nested, widthProblem } from './nested.js';
import {
  type Calibration,
  type ElasticPolicy,
  type Level,
  qualityMetric,
  routedLayers,
  routerCapacities,
  routerPlaces,
  thresholds,
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
  /** Units of every layer's feed-forward that run, [layers], of an encoder-decoder model of every part of the decoder; null: all of them. */
  widths: readonly number[] | null;
  /** When texts leave at exits; null: all layers run. */
  exit: ExitSetting | null;
  /** No routing, all units, no exits: the plain backbone runs. */
  full: boolean;
  /** What decides at every router (`thresholds` of policy.ts); empty when full. */
  thresholds: ReadonlyMap<string, number>;
  /**
   * Expected FLOPs over those of the full model, at the length the budget was resolved for; of a level with exits as they were
   * measured, of other settings with exits as if no text left.
   */
  flopsRatio: number;
  /** How the budget was resolved, for a person. */
  why: string;
}

/**
 * Resolves a budget. A number becomes widths by Mix'n'Match and, below them, the point of the calibrated path that costs
 * this share.
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
  const at = context.length ?? policy?.calibration?.sequenceLength ?? planLength;
  if (budget === 'full' || budget === 1) return fullPoint(budget === 'full' ? 'full' : null);
  if (typeof budget === 'string') {
    const level = policy?.levels.find((candidate) => candidate.name === budget);
    if (!level) {
      const names = ['full', ...(policy?.levels ?? []).map((l) => l.name).filter((name) => name !== 'full')];
      throw new InvalidArgumentError(`[budget] no level is named '${budget}'; there are ${names.join(', ')}`);
    }
    return levelPoint(level, spec, policy!, at);
  }
  if (typeof budget === 'number') {
    if (!(budget > 0 && budget < 1))
      throw new InvalidArgumentError(`[budget] a budget must be in (0, 1], got ${budget}`);
    const elastic = needRouters(policy, budget);
    if (elastic.exits) return withinRatio(budget, levelPoints(spec, elastic, at));
    const calibration = elastic.nested ? elastic.calibration : needCalibration(elastic);
    const solved = solve(spec, elastic, calibration, budget, at);
    if (!solved) {
      const floor = leastRatio(spec, elastic, calibration, at);
      throw new InvalidArgumentError(
        `[budget] budget ${budget} cannot be reached: this model ${elastic.nested ? 'reaches' : 'was calibrated'} down to ${floor.toFixed(3)} of the FLOPs at ${at} tokens; ask for ${(Math.ceil(floor * 100) / 100).toFixed(2)} or more`,
      );
    }
    return pointOf(axisCapacities(elastic, solved.capacities), solved.widths, spec, elastic, at, null);
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
export interface LevelPoint {
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
    point: levelPoint(level, spec, policy, length),
  }));
  return [full, ...points].sort((a, b) => b.point.flopsRatio - a.point.flopsRatio);
}

/** The point of a level; what exits save is known by measurement alone. */
function levelPoint(
  { name, spec: settings, flopsRatio }: Level,
  spec: ModelSpec,
  policy: ElasticPolicy,
  length: number,
) {
  const point = explicit(settings, spec, policy, length, name);
  return settings.exit && flopsRatio !== undefined ? { ...point, flopsRatio } : point;
}

function withinRatio(ratio: number, levels: readonly LevelPoint[]): OperatingPoint {
  const chosen = levels.find(({ point }) => point.flopsRatio <= ratio);
  if (chosen) return chosen.point;
  const least = levels.at(-1)!;
  throw new InvalidArgumentError(
    `[budget] budget ${ratio} cannot be reached: the cheapest level, ${least.name}, takes ${least.point.flopsRatio.toFixed(3)} of the FLOPs; more levels come from \`elastiform calibrate\``,
  );
}

/** The costliest of some levels, the costliest first, that keeps a latency by what was measured. */
export function withinLatency(
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
      '[budget] the times measured on this device are of other levels than the model has; measure again',
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

/** The cheapest of them that keeps a quality. */
export function withQuality(
  least: number,
  points: readonly LevelPoint[],
  levels: ElasticPolicy['levels'],
): OperatingPoint {
  if (!(typeof least === 'number' && least > 0 && least <= 1))
    throw new InvalidArgumentError(`[budget] minQuality must be in (0, 1], got ${JSON.stringify(least)}`);
  const quality = new Map(levels.map(({ name, quality }) => [name, quality?.[qualityMetric]]));
  const measured = points.flatMap(({ name, point }) => {
    const value = name === 'full' ? { value: 1, lo: 1 } : quality.get(name);
    return value ? [{ name, point, ...value }] : [];
  });
  if (measured.length === 1) {
    throw new InvalidArgumentError(
      '[budget] the quality of no level was measured yet; measure it: elastiform eval DIR --data FILE --record, or of exits elastiform calibrate',
    );
  }
  // Full is among them, and the costliest comes first.
  const { name, point, value, lo } = measured.findLast((level) => level.lo >= least)!;
  const why = `${name} is the cheapest level that agrees with the full model at ${least} of positions: ${value.toFixed(3)}, at least ${lo.toFixed(3)}; ${point.why}`;
  return { ...point, why };
}

export function fullPoint(level: string | null): OperatingPoint {
  return {
    level,
    spec: {},
    capacity: perAxis(() => 1),
    widths: null,
    exit: null,
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
  for (const key of ['tokenCapacity', 'sequenceCapacity'] as const) {
    const unknown = Object.keys(wanted[key] ?? {}).find((target) => !targets.includes(target as Target));
    if (unknown === undefined) continue;
    throw new InvalidArgumentError(`[budget] unknown place '${unknown}' in ${key}; it takes ${targets.join(', ')}`);
  }
  if (wanted.assembly !== undefined) {
    throw new InvalidArgumentError('[budget] assembly must be absent: assemblies are of encoder-decoder models');
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
  const widths = widthsOf(wanted.ffnWidth, spec, policy);
  const problem = wanted.exit === undefined ? null : settingProblem(wanted.exit, policy?.exits);
  if (problem) throw new InvalidArgumentError(`[budget] exit must be ${problem}`);
  if (Object.keys(shares).length === 0 && !widths && !wanted.exit) return fullPoint(level);
  return pointOf(shares, widths, spec, needRouters(policy, { spec: wanted }), length, level, wanted.exit);
}

function widthsOf(width: unknown, { layers, ffn }: ModelSpec, policy: ElasticPolicy | null): number[] | null {
  if (width === undefined || width === 1) return null;
  if (!policy?.nested) {
    throw new InvalidArgumentError(
      `[budget] ffnWidth is ${JSON.stringify(width)}, but no feed-forward of this model is nested; make it so with \`elastiform elastify --nested\``,
    );
  }
  const problem = widthProblem(width, policy.nested, ffn);
  if (problem) throw new InvalidArgumentError(`[budget] ffnWidth ${problem}`);
  return layerWidths(width as FfnWidth, policy.nested, layers, ffn);
}

function pointOf(
  shares: AxisShares,
  widths: readonly number[] | null,
  spec: ModelSpec,
  policy: ElasticPolicy,
  length: number,
  level: string | null,
  exit: ExitSetting | null = null,
): OperatingPoint {
  const capacities = routerCapacities(policy, shares);
  const mean = (axis: Axis) => meanCapacity(shares[axis] ?? 1);
  const notes = axes.flatMap((axis) => {
    if (mean(axis) === 1) return [];
    const low = policy.capacity[axis]?.[0] ?? 1;
    const below = mean(axis) < low ? `, below the ${low * 100} % it was trained for` : '';
    return `${(mean(axis) * 100).toFixed(1)} % ${axisTraits[axis].of}${below}`;
  });
  if (widths) notes.push(widthNote(widths, policy.nested!, spec.ffn));
  if (exit) notes.push('texts leave at exits');
  return {
    level,
    spec: { ...specOf(spec, policy, shares, widths), ...(exit && { exit }) },
    capacity: perAxis(mean),
    widths,
    exit,
    full: false,
    thresholds:
      Object.keys(shares).length > 0
        ? thresholds(policy, needCalibration(policy), capacities)
        : new Map(routerPlaces(policy).map(({ id }) => [id, Number.NEGATIVE_INFINITY])),
    flopsRatio: flopsRatio(spec, policy, capacities, length, widths),
    why: `${notes.join('; ')}, for sequences of ${length} tokens`,
  };
}

/** `feed-forwards of 512 units in 3 layers, of 1024 in 5` */
function widthNote(widths: readonly number[], nested: Nested, ffn: number): string {
  const own = nested.layers.map((layer) => widths[layer]);
  const parts = [...new Set(own)].map(
    (units, i) => `of ${units}${i === 0 ? ' units' : ''} in ${own.filter((n) => n === units).length}`,
  );
  const [least] = granularityWidths(nested, ffn);
  const below = own.some((units) => units < least) ? `, some below the ${least} that are trained` : '';
  return `feed-forwards ${parts.join(', ')} of ${own.length} layers${below}`;
}
