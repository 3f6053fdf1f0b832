// Calibration: the path along which compute is taken away, quantiles of router logits on it, and a check of thresholds.

import { isExperts, meanCapacity } from '../elastic/axes.js';
import { flopsRatio, pointOnPath } from '../elastic/cost.js';
import { widthDims } from '../elastic/nested.js';
import { type Calibration, hasQuantiles, type RouterPlace, routerPlaces, thresholds } from '../elastic/policy.js';
import { enteredOutput, thresholdFeeds } from '../elastic/rows.js';
import { allocationPath } from './allocate.js';
import { batchRun, firstBatches } from './batches.js';
import type { Batch, TokenData } from './data.js';
import type { TrainEvent } from './events.js';
import type { DivergenceProbe } from './probe.js';
import { capacityFeeds, type DistillModel, evenly, logitsProgram, thresholdProgram } from './steps.js';

const points = 65;
/** Mean capacities at which quantiles are taken. */
const gridSize = 8;
/** The path goes on down to this part of the least capacity trained for. */
const reach = 0.5;
/** Routers whose logits spread less tell no tokens apart. */
const leastSpread = 1e-6;
/** A router whose share of rows is further than this from its capacity is reported. */
const tolerance = 0.1;
/** From here on masses differ by rounding. */
const fullMass = 1 - 1e-6;

type Warning = Extract<TrainEvent, { type: 'warn' }>;

/**
 * Finds the path on the probe's batches, then runs about `tokens` tokens of the data at mean capacities along it and keeps
 * the quantiles of the logits of routers of tokens, and what tokens use of experts by mass. Returns the calibration and warnings about routers that tell no tokens apart,
 * which stay at full capacity on the path, or miss their capacity by a lot.
 */
export async function calibrate(
  model: DistillModel,
  probe: DivergenceProbe,
  data: TokenData,
  {
    tokens,
    seed,
    signal,
    onProgress,
  }: { tokens: number; seed: number; signal?: AbortSignal; onProgress?: (done: number, total: number) => unknown },
): Promise<{ calibration: Calibration; warnings: Warning[] }> {
  const { policy, spec } = model;
  const batches = firstBatches(data, model.batchTokens, tokens, seed);
  const widths = widthDims(policy.nested, null, spec.ffn);
  const routers = routerPlaces(policy);
  const measured = routers.filter(({ axis }) => hasQuantiles(policy, axis));
  const count = batches.reduce((sum, batch) => sum + batch.ids.length, 0);
  const length = typicalLength(batches);

  using program = measured.length > 0 ? logitsProgram(model) : null;
  /** What every router with quantiles gives at these capacities, sorted: logits of tokens, masses before experts. */
  const sortedScores = async (capacities: readonly number[]): Promise<Map<string, Float32Array>> => {
    const found = measured.map(({ outputs }) => new Float32Array(count * outputs));
    const lengths = found.map(() => 0);
    const whole = evenly();
    for (const batch of program ? batches : []) {
      const { dims, feeds } = batchRun(batch);
      const { outputs } = await program!.run({
        dims: { ...dims, ...widths },
        feeds: { ...feeds, ...capacityFeeds(policy, dims.segments, (router) => capacities[router], whole) },
        signal,
      });
      for (const [i, { id, axis, outputs: experts }] of measured.entries()) {
        const z = outputs[id] as Float32Array;
        found[i].set(isExperts(axis) ? massesBefore(z, experts) : z, lengths[i]);
        lengths[i] += z.length;
      }
    }
    return new Map(measured.map(({ id }, i) => [id, found[i].subarray(0, lengths[i]).sort()]));
  };

  const full = await sortedScores(routers.map(() => 1));
  const tokenRouters = measured.filter(({ axis }) => !isExperts(axis)).map(({ id }) => id);
  const collapsed = new Set(tokenRouters.filter((id) => full.get(id)![count - 1] - full.get(id)![0] < leastSpread));
  const lowest = routers.map(({ axis }) => (isExperts(axis) ? 1 : reach) * policy.capacity[axis]![0]);
  const path = await allocationPath(probe, spec, policy, (id) => !collapsed.has(id), {
    length,
    least: flopsRatio(spec, policy, lowest, length),
    signal,
    onProgress,
  });

  const last = meanCapacity(path.at(-1)!);
  const grid = Array.from({ length: gridSize }, (_, i) => 1 - ((1 - last) * (gridSize - 1 - i)) / (gridSize - 1));
  const capacities = [...new Set(grid)];
  const quantiles = new Map(measured.map(({ id }) => [id, new Float32Array(capacities.length * points)]));
  for (const [row, mean] of capacities.entries()) {
    for (const [id, sorted] of mean === 1 ? full : await sortedScores(onPath(path, mean)))
      fillQuantiles(sorted, quantiles.get(id)!.subarray(row * points, (row + 1) * points));
  }
  const calibration: Calibration = {
    path,
    capacities,
    points,
    tokens: count,
    sequenceLength: length,
    quantiles,
  };
  const warnings = [...collapse(collapsed), ...(await offTarget(model, calibration, batches, signal))];
  return { calibration, warnings };
}

/** Capacities of all routers on the path where their mean is `mean`, or its end. */
const onPath = (path: Calibration['path'], mean: number): readonly number[] =>
  pointOnPath(path, meanCapacity, mean) ?? path.at(-1)!;

/** The length at which one sequence has the same attention work per token as the batches: mean over tokens. */
function typicalLength(batches: readonly Batch[]): number {
  let tokens = 0;
  let squares = 0;
  for (const { offsets } of batches) {
    for (let s = 1; s < offsets.length; s++) {
      const length = offsets[s] - offsets[s - 1];
      tokens += length;
      squares += length * length;
    }
  }
  return Math.max(Math.round(squares / tokens), 1);
}

// No values, where no token entered, are zeros: nothing there will be chosen by them.
function fillQuantiles(sorted: Float32Array, into: Float32Array): void {
  if (sorted.length === 0) return;
  for (let j = 0; j < points; j++) {
    const x = (j / (points - 1)) * (sorted.length - 1);
    const i = Math.min(Math.floor(x), sorted.length - 1);
    const next = sorted[Math.min(i + 1, sorted.length - 1)];
    into[j] = sorted[i] + (next - sorted[i]) * (x - i);
  }
}

/** Of every token, with scores z [tokens, experts], the mass of the softmax that its better experts have before each. */
export function massesBefore(z: Float32Array, experts: number): Float32Array {
  const masses = new Float32Array(z.length);
  for (let at = 0; at < z.length; at += experts) {
    const scores = z
      .slice(at, at + experts)
      .sort()
      .reverse();
    const weights = Float64Array.from(scores, (score) => Math.exp(score - scores[0]));
    const total = weights.reduce((a, b) => a + b, 0);
    let before = 0;
    weights.forEach((weight, rank) => {
      masses[at + rank] = before / total;
      before += weight;
    });
  }
  return masses;
}

function collapse(dead: ReadonlySet<string>): Warning[] {
  if (dead.size === 0) return [];
  return [
    {
      type: 'warn',
      code: 'router-collapse',
      message: `routers that score all tokens alike and so cannot choose: ${[...dead].join(', ')}; train longer or raise optimizer.lr`,
    },
  ];
}

async function offTarget(
  model: DistillModel,
  calibration: Calibration,
  batches: readonly Batch[],
  signal?: AbortSignal,
): Promise<Warning[]> {
  const { policy, spec } = model;
  const whole = widthDims(policy.nested, null, spec.ffn);
  const capacities = onPath(calibration.path, calibration.capacities[Math.floor(calibration.capacities.length / 2)]);
  const wanted = thresholds(policy, calibration, capacities);
  const saturated = routerPlaces(policy).flatMap(({ id, axis }, i): Warning[] => {
    const mass = wanted.get(id)!;
    if (!isExperts(axis) || !hasQuantiles(policy, axis) || !(mass > fullMass && mass <= 1)) return [];
    const share = capacities[i].toFixed(2);
    const message = `${id}: its best experts hold all mass, so the share ${share} uses more than it says; train with a smaller optimizer.lr, or choose by rule 'top-k'`;
    return [{ type: 'warn', code: 'capacity-off-target', message }];
  });
  // Where no router has to choose tokens there is nothing to miss, and nothing to run.
  const chooses = ({ id, axis }: RouterPlace) => !isExperts(axis) && Number.isFinite(wanted.get(id));
  if (!routerPlaces(policy).some(chooses)) return saturated;
  const asked = new Map(
    routerPlaces(policy).flatMap((router, i) => (chooses(router) ? [[router.id, capacities[i]]] : [])),
  );
  const passed = new Map<string, number>();
  using program = thresholdProgram(model, wanted);
  for (const batch of batches) {
    const { dims, feeds } = batchRun(batch);
    const { outputs } = await program.run({
      dims: { ...dims, ...whole },
      feeds: { ...feeds, ...thresholdFeeds(wanted, dims.segments) },
      signal,
    });
    for (const { id, layer, place } of routerPlaces(policy)) {
      const entered = outputs[enteredOutput(layer, place)];
      if (entered && asked.has(id)) passed.set(id, (passed.get(id) ?? 0) + entered.length);
    }
  }
  const missed = [...passed].flatMap(([id, rows]) => {
    const capacity = asked.get(id)!;
    const share = rows / calibration.tokens;
    if (Math.abs(share - capacity) <= tolerance) return [];
    const message = `${id}: its threshold for capacity ${capacity.toFixed(2)} passes ${share.toFixed(2)} of the tokens`;
    return [{ type: 'warn', code: 'capacity-off-target', message } satisfies Warning];
  });
  return [...saturated, ...missed];
}
