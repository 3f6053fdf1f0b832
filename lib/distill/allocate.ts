// How a share of tokens is divided among sub-layers: a little to those that can spare it, by measured divergence.

import { type Axis, axes, isExperts } from '../elastic/axes.js';
import { flopsRatio } from '../elastic/budget.js';
import { type ElasticPolicy, routerPlaces } from '../elastic/policy.js';
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

const steps = [1, 0.75, 0.5, 0.25, 0];

/**
 * The path along which compute is taken away: from all capacities 1, always the router and next capacity (one or two
 * steps down) with the least divergence per FLOP saved, until at most the share `least` of the FLOPs is left. Candidates
 * are measured lazily: divergence per FLOP mostly grows along the path, so an old value is nearly a lower bound and only
 * the best candidates are measured anew.
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
  const routers = routerPlaces(policy);
  const cost = (capacities: readonly number[]) => flopsRatio(spec, policy, capacities, length);
  let at = routers.map(() => 1);
  let { kl } = await probe.measure(at, signal);
  const path = [at];
  interface Candidate {
    /** Divergence per share of FLOPs saved. */
    slope: number;
    to: number;
    kl: number;
    /** Length of the path when it was measured. */
    age: number;
  }
  // A sub-layer without any expert is one that no token enters, which is for the router of tokens to say.
  const stepsOf = (i: number) => (isExperts(routers[i].axis) ? steps.slice(0, -1) : steps);
  const unknown: Candidate = { slope: Number.NEGATIVE_INFINITY, to: 0, kl: 0, age: -1 };
  const candidates = new Map(routers.flatMap(({ id }, i) => (lowers(id) ? [[i, unknown] as const] : [])));
  const measure = async (i: number): Promise<Candidate> => {
    const from = steps.indexOf(at[i]);
    let best: Candidate | null = null;
    for (const to of stepsOf(i).slice(from + 1, from + 3)) {
      const capacities = at.with(i, to);
      const measured = await probe.measure(capacities, signal);
      const slope = (measured.kl - kl) / (cost(at) - cost(capacities));
      if (!best || slope < best.slope) best = { slope, to, kl: measured.kl, age: path.length };
    }
    return best!;
  };
  const start = cost(at);
  while (candidates.size > 0 && cost(at) > least) {
    const [i, best] = [...candidates].reduce((a, b) => (b[1].slope < a[1].slope ? b : a));
    if (best.age !== path.length) {
      candidates.set(i, await measure(i));
      continue;
    }
    at = at.with(i, best.to);
    kl = best.kl;
    path.push(at);
    if (best.to === stepsOf(i).at(-1)) candidates.delete(i);
    else candidates.set(i, { ...best, age: -1 });
    await onProgress?.(Math.round(100 * Math.min(1, (start - cost(at)) / (start - least))), 100);
  }
  return path;
}
