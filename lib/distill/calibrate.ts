// Calibration: the path along which compute is taken away, quantiles of router logits on it, and a check of thresholds.

import { isExperts, meanCapacity } from '../elastic/axes.js';
import { flopsRatio, pointOnPath } from '../elastic/budget.js';
import { type Calibration, type RouterPlace, routerPlaces, thresholds } from '../elastic/policy.js';
import { thresholdFeeds } from '../elastic/rows.js';
import { allocationPath } from './allocate.js';
import { batchRun, firstBatches } from './batches.js';
import type { Batch, TokenData } from './data.js';
import type { TrainEvent } from './events.js';
import type { DivergenceProbe } from './probe.js';
import { capacityFeeds, type DistillModel, logitsProgram, thresholdProgram } from './steps.js';

const points = 65;
/** Mean capacities at which quantiles are taken. */
const gridSize = 8;
/** The path goes on down to this part of the least capacity trained for. */
const reach = 0.5;
/** Routers whose logits spread less tell no tokens apart. */
const leastSpread = 1e-6;
/** A router whose share of rows is further than this from its capacity is reported. */
const tolerance = 0.1;

type Warning = Extract<TrainEvent, { type: 'warn' }>;

/**
 * Finds the path on the probe's batches, then runs about `tokens` tokens of the data at mean capacities along it and keeps
 * the quantiles of every router's logits. Returns the calibration and warnings about routers that tell no tokens apart,
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
  const routers = routerPlaces(policy);
  const ids = routers.flatMap(({ id, axis }) => (isExperts(axis) ? [] : [id]));
  const count = batches.reduce((sum, batch) => sum + batch.ids.length, 0);
  const length = typicalLength(batches);

  using program = ids.length > 0 ? logitsProgram(model) : null;
  /** Logits of every router of tokens, sorted, with all at these capacities. */
  const sortedLogits = async (capacities: readonly number[]): Promise<Map<string, Float32Array>> => {
    const logits = new Map(ids.map((id) => [id, new Float32Array(count)]));
    if (!program) return logits;
    let at = 0;
    for (const batch of batches) {
      const { dims, feeds } = batchRun(batch);
      const { outputs } = await program.run({
        dims,
        feeds: { ...feeds, ...capacityFeeds(policy, dims.segments, (router) => capacities[router]) },
        signal,
      });
      for (const id of ids) logits.get(id)!.set(outputs[id] as Float32Array, at);
      at += batch.ids.length;
    }
    for (const values of logits.values()) values.sort();
    return logits;
  };

  const full = await sortedLogits(routers.map(() => 1));
  const collapsed = new Set([...full].filter(([, z]) => z[count - 1] - z[0] < leastSpread).map(([id]) => id));
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
  const quantiles = new Map(ids.map((id) => [id, new Float32Array(capacities.length * points)]));
  for (const [row, mean] of capacities.entries()) {
    for (const [id, sorted] of mean === 1 ? full : await sortedLogits(onPath(path, mean)))
      fillQuantiles(sorted, quantiles.get(id)!.subarray(row * points, (row + 1) * points));
  }
  const calibration: Calibration = { path, capacities, points, tokens: count, sequenceLength: length, quantiles };
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

function fillQuantiles(sorted: Float32Array, into: Float32Array): void {
  for (let j = 0; j < points; j++) {
    const x = (j / (points - 1)) * (sorted.length - 1);
    const i = Math.min(Math.floor(x), sorted.length - 1);
    const next = sorted[Math.min(i + 1, sorted.length - 1)];
    into[j] = sorted[i] + (next - sorted[i]) * (x - i);
  }
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
  const { policy } = model;
  const capacities = onPath(calibration.path, calibration.capacities[Math.floor(calibration.capacities.length / 2)]);
  const wanted = thresholds(policy, calibration, capacities);
  // Where no router has to choose tokens there is nothing to miss, and nothing to run.
  const chooses = ({ id, axis }: RouterPlace) => !isExperts(axis) && Number.isFinite(wanted.get(id));
  if (!routerPlaces(policy).some(chooses)) return [];
  const asked = new Map(routerPlaces(policy).map(({ id }, i) => [id, capacities[i]]));
  const passed = new Map<string, number>();
  using program = thresholdProgram(model, wanted);
  for (const batch of batches) {
    const { dims, feeds } = batchRun(batch);
    const { outputs } = await program.run({
      dims,
      feeds: { ...feeds, ...thresholdFeeds(wanted, dims.segments) },
      signal,
    });
    for (const [id, rows] of Object.entries(outputs)) passed.set(id, (passed.get(id) ?? 0) + rows.length);
  }
  return [...passed].flatMap(([id, rows]) => {
    const capacity = asked.get(id)!;
    const share = rows / calibration.tokens;
    if (Math.abs(share - capacity) <= tolerance) return [];
    const message = `${id}: its threshold for capacity ${capacity.toFixed(2)} passes ${share.toFixed(2)} of the tokens`;
    return [{ type: 'warn', code: 'capacity-off-target', message } satisfies Warning];
  });
}
