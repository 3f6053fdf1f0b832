// Points of a model that cost what they may: widths by Mix'n'Match, capacities on the calibrated path, and levels made of them.
import type { ModelSpec } from '../model/spec.js';
import { type Axis, axes, type Capacity, type ElasticSpec, specOfAxes } from './axes.js';
import { type Costed, flopsRatio, pointOnPath } from './cost.js';
import { layerWidths, widthLadder, widthName, widthShares } from './nested.js';
import { type Calibration, type Level, type Routing, routedLayers, routerPlaces } from './policy.js';

/** Tokens of the sequences that levels are for where nothing was calibrated. */
export const planLength = 512;

/** Capacities of all routers in the order of execution, and widths of all feed-forwards, [layers]; null: whole. */
export interface Solution {
  capacities: number[];
  widths: readonly number[] | null;
}

/** The path of the routers, whole without one, and widths of nested feed-forwards, the widest last. */
function rangeOf(spec: ModelSpec, policy: Costed, calibration: Pick<Calibration, 'path'> | null) {
  const ladder = policy.nested ? widthLadder(policy.nested, spec.layers, spec.ffn) : [];
  return { ladder, path: calibration?.path ?? [routerPlaces(policy).map(() => 1)] };
}

/**
 * What costs the share `ratio` of the full FLOPs at `length` tokens: the widest nested feed-forwards within it, and where even
 * the narrowest cost more, the point of the path beside those. Null when all that can be taken away costs more.
 */
export function solve(
  spec: ModelSpec,
  policy: Costed,
  calibration: Pick<Calibration, 'path'> | null,
  ratio: number,
  length: number,
): Solution | null {
  const { ladder, path } = rangeOf(spec, policy, calibration);
  const [whole] = path;
  const widths = ladder.findLast((rung) => flopsRatio(spec, policy, whole, length, rung) <= ratio);
  if (widths) return { capacities: [...whole], widths };
  const narrowest = ladder[0] ?? null;
  const capacities = pointOnPath(path, (point) => flopsRatio(spec, policy, point, length, narrowest), ratio);
  return capacities && { capacities, widths: narrowest };
}

/** The least share of the full FLOPs that `solve` reaches. */
export function leastRatio(
  spec: ModelSpec,
  policy: Costed,
  calibration: Pick<Calibration, 'path'> | null,
  length: number,
): number {
  const { ladder, path } = rangeOf(spec, policy, calibration);
  return flopsRatio(spec, policy, path.at(-1)!, length, ladder[0]);
}

export type AxisShares = Partial<Record<Axis, Capacity>>;

export const isFull = (share: Capacity): boolean => [share].flat().every((c) => c === 1);

/** Capacities of all routers as shares per axis; none where all are full. */
export function axisCapacities(policy: Routing, capacities: readonly number[]): AxisShares {
  if (isFull(capacities)) return {};
  const routers = routerPlaces(policy);
  return Object.fromEntries(
    axes
      .filter((axis) => routedLayers(policy, axis).length > 0)
      .map((axis) => [axis, capacities.filter((_, i) => routers[i].axis === axis)]),
  );
}

/** The settings of shares and widths. */
export const specOf = (
  { ffn }: ModelSpec,
  { nested }: Costed,
  shares: AxisShares,
  widths: readonly number[] | null,
): ElasticSpec => ({ ...specOfAxes(shares), ...(widths && { ffnWidth: widthShares(widths, nested!, ffn) }) });

/**
 * Levels `full`, p90 to p40 (per cent of the full FLOPs), as far as widths and the path reach, and one for every granularity of
 * nested feed-forwards, such as `ffn50`, at sequences of `length`.
 */
export function standardLevels(
  spec: ModelSpec,
  policy: Costed,
  calibration: Pick<Calibration, 'path'> | null,
  length: number,
): Level[] {
  const levels: Level[] = [{ name: 'full', spec: {}, flopsRatio: 1 }];
  const add = (name: string, { capacities, widths }: Solution) =>
    levels.push({
      name,
      spec: specOf(spec, policy, axisCapacities(policy, capacities), widths),
      flopsRatio: Math.round(flopsRatio(spec, policy, capacities, length, widths) * 1e4) / 1e4,
    });
  for (const percent of [90, 80, 70, 60, 50, 40]) {
    const solved = solve(spec, policy, calibration, percent / 100, length);
    if (!solved) break;
    add(`p${percent}`, { ...solved, capacities: solved.capacities.map((c) => Math.round(c * 1e4) / 1e4) });
  }
  const { nested } = policy;
  for (const share of nested?.granularities.slice(0, -1).toReversed() ?? []) {
    const widths = layerWidths(share, nested!, spec.layers, spec.ffn);
    add(widthName(share), { capacities: routerPlaces(policy).map(() => 1), widths });
  }
  return levels;
}
