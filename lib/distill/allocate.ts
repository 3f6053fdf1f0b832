// How a share of tokens is divided among sub-layers: a little to those that can spare it, by measured divergence.

import { type Axis, axes, isExperts } from '../elastic/axes.js';
import { flopsRatio } from '../elastic/cost.js';
import { type ElasticPolicy, type RouterPlace, routerPlaces } from '../elastic/policy.js';
import type { ModelSpec } from '../model/spec.js';
import { InvalidDataError } from '../native/errors.js';
import type { DivergenceProbe } from './probe.js';

/** Reports that `done` of about `total` measurements were made. */
type Progress = (done: number, total: number) => unknown;

/** A divergence that is counted as none, nats per token. */
const negligible = 1e-9;

/**
 * Log of the divergence that leaving out a whole sub-layer causes, for every router in the order of execution. Divergence
 * at full capacity, which raw gates have, counts as none. Errors: InvalidDataError when the model computes NaN.
 */
export async function sensitivities(
  probe: DivergenceProbe,
  policy: ElasticPolicy,
  { signal, onProgress }: { signal?: AbortSignal; onProgress?: Progress } = {},
): Promise<number[]> {
  const count = routerPlaces(policy).length;
  const full = Array<number>(count).fill(1);
  const { kl: least } = await probe.measure(full, signal);
  const result: number[] = [];
  for (let i = 0; i < count; i++) {
    const { kl } = await probe.measure(full.with(i, 0), signal);
    if (!Number.isFinite(kl)) {
      throw new InvalidDataError(
        `[distill] without ${routerPlaces(policy)[i].id} the divergence from the full model is ${kl}: check the weights for NaN`,
      );
    }
    result.push(Math.log(Math.max(kl - least, negligible)));
    await onProgress?.(i + 1, count);
  }
  return result;
}

/**
 * Capacities to train at whose mean over the routers of an axis is `mean[axis]`: sigmoid(sensitivity - level), so that a
 * sub-layer nothing can spare stays nearly whole while others give up more, and every router sees many capacities.
 */
export function shapedCapacities(
  sensitivity: readonly number[],
  policy: ElasticPolicy,
  mean: Readonly<Partial<Record<Axis, number>>>,
): number[] {
  const routers = routerPlaces(policy);
  const capacities = Array<number>(routers.length).fill(1);
  for (const axis of axes) {
    const own = routers.flatMap((router, i) => (router.axis === axis ? [i] : []));
    const wanted = mean[axis] ?? 1;
    if (own.length === 0 || wanted >= 1) continue;
    const shares = (level: number) => own.map((i) => 1 / (1 + Math.exp(level - sensitivity[i])));
    const all = own.map((i) => sensitivity[i]);
    let [low, high] = [Math.min(...all) - 40, Math.max(...all) + 40];
    for (let step = 0; step < 60; step++) {
      const middle = (low + high) / 2;
      const got = shares(middle).reduce((a, b) => a + b, 0) / own.length;
      if (got > wanted) low = middle;
      else high = middle;
    }
    shares(high).forEach((share, k) => {
      capacities[own[k]] = share;
    });
  }
  return capacities;
}

/** Capacities that a router may be lowered to: learned choice of a part, and leaving whole sub-layers out. */
const parts = [1, 0.75, 0.5, 0.25, 0];
const whole = [1, 0];

interface Walk {
  probe: DivergenceProbe;
  routers: readonly RouterPlace[];
  /** Whether a router may be lowered at all: one that scores all tokens alike cannot choose among them. */
  lowers: (id: string) => boolean;
  /** Share of the FLOPs. */
  cost: (capacities: readonly number[]) => number;
  /** Where it ends. */
  least: number;
  signal?: AbortSignal;
  onPoint?: (cost: number) => unknown;
}

/** A point of a path. */
interface Point {
  capacities: number[];
  cost: number;
  kl: number;
}

/**
 * From all capacities 1, always the router and next capacity (one or two of `steps` down) with the least divergence per FLOP
 * saved, until at most the share `least` of the FLOPs is left. Candidates are measured lazily: divergence per FLOP mostly
 * grows along the path, so an old value is nearly a lower bound and only the best candidates are measured anew.
 */
async function greedyPath(walk: Walk, steps: readonly number[]): Promise<Point[]> {
  const { probe, routers, lowers, cost, least, signal, onPoint } = walk;
  const point = async (capacities: number[]): Promise<Point> => {
    const { kl } = await probe.measure(capacities, signal);
    return { capacities, cost: cost(capacities), kl };
  };
  const path = [await point(routers.map(() => 1))];
  interface Candidate {
    /** Divergence per share of FLOPs saved. */
    slope: number;
    to: Point;
    /** Length of the path when it was measured. */
    age: number;
  }
  // A sub-layer without any expert is one that no token enters, which is for its router of tokens to say, if it has one.
  const entered = new Set(
    routers.filter(({ axis }) => !isExperts(axis)).map(({ layer, place }) => `${layer} ${place}`),
  );
  const stepsOf = ({ axis, layer, place }: RouterPlace) =>
    steps.filter((share) => share > 0 || !isExperts(axis) || !entered.has(`${layer} ${place}`));
  const below = (i: number) => stepsOf(routers[i]).filter((share) => share < path.at(-1)!.capacities[i]);
  const unknown: Candidate = { slope: Number.NEGATIVE_INFINITY, to: path[0], age: -1 };
  const candidates = new Map(
    routers.flatMap(({ id }, i) => (lowers(id) && below(i).length > 0 ? [[i, unknown] as const] : [])),
  );
  const measure = async (i: number): Promise<Candidate> => {
    const at = path.at(-1)!;
    let best: Candidate | null = null;
    for (const share of below(i).slice(0, 2)) {
      const to = await point(at.capacities.with(i, share));
      const slope = (to.kl - at.kl) / (at.cost - to.cost);
      if (!best || slope < best.slope) best = { slope, to, age: path.length };
    }
    return best!;
  };
  while (candidates.size > 0 && path.at(-1)!.cost > least) {
    const [i, best] = [...candidates].reduce((a, b) => (b[1].slope < a[1].slope ? b : a));
    if (best.age !== path.length) {
      candidates.set(i, await measure(i));
      continue;
    }
    path.push(best.to);
    if (below(i).length === 0) candidates.delete(i);
    else candidates.set(i, { ...best, age: -1 });
    await onPoint?.(best.to.cost);
  }
  return path;
}

/** Mean divergence along a path, by FLOPs down to the share `least`. */
function meanDivergence(path: readonly Point[], least: number): number {
  const end = Math.max(path.at(-1)!.cost, least);
  const sums = path.slice(1).map((to, i) => {
    const from = path[i];
    const low = Math.max(to.cost, end);
    const kl = from.kl + ((to.kl - from.kl) * (from.cost - low)) / (from.cost - to.cost);
    return ((from.kl + kl) / 2) * (from.cost - low);
  });
  return sums.reduce((a, b) => a + b, 0) / (path[0].cost - end);
}

/**
 * The path along which compute is taken away, from all capacities 1 until at most the share `least` of the FLOPs is left. Of
 * two greedy ones, by parts and by whole sub-layers, it is that with the least divergence: the former takes a little from
 * every sub-layer first and never gives it back, the latter is static dropping.
 *
 * @param lowers whether a router may be lowered at all: one that scores all tokens alike cannot choose among them
 * @param length tokens of the sequences that the FLOPs are counted for
 */
export async function allocationPath(
  probe: DivergenceProbe,
  spec: ModelSpec,
  policy: ElasticPolicy,
  lowers: (id: string) => boolean,
  { length, least, signal, onProgress }: { length: number; least: number; signal?: AbortSignal; onProgress?: Progress },
): Promise<number[][]> {
  const cost = (capacities: readonly number[]) => flopsRatio(spec, policy, capacities, length);
  const routers = routerPlaces(policy);
  const start = cost(routers.map(() => 1));
  const paths: Point[][] = [];
  for (const steps of [parts, whole]) {
    const done = (now: number) => 50 * (paths.length + Math.min(1, (start - now) / (start - least)));
    const onPoint = (now: number) => onProgress?.(Math.round(done(now)), 100);
    paths.push(await greedyPath({ probe, routers, lowers, cost, least, signal, onPoint }, steps));
  }
  const [byParts, byWhole] = paths;
  const better = meanDivergence(byWhole, least) < meanDivergence(byParts, least) ? byWhole : byParts;
  return better.map(({ capacities }) => capacities);
}
