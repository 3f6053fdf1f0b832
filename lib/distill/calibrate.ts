// Calibration: quantiles of every router's logits at each capacity of a grid, and a check of what the thresholds pass.
import { type Calibration, type ElasticPolicy, routerPlaces, thresholds } from '../elastic/policy.js';
import { batchRun } from './batches.js';
import type { Batch, TokenData } from './data.js';
import type { TrainEvent } from './events.js';
import { capacityFeeds, type DistillModel, logitsProgram, thresholdFeeds, thresholdProgram } from './steps.js';

const points = 65;
/** Capacities calibrated of a range. */
const gridSize = 8;
/** A router whose share of rows is further than this from its capacity is reported. */
const tolerance = 0.1;

type Warning = Extract<TrainEvent, { type: 'warn' }>;

/**
 * Runs about `tokens` tokens of the data at each capacity and keeps the quantiles of every router's logits.
 * Returns the calibration and warnings about routers that tell no tokens apart or miss their capacity by a lot.
 */
export async function calibrate(
  model: DistillModel,
  data: TokenData,
  { tokens, seed, signal }: { tokens: number; seed: number; signal?: AbortSignal },
): Promise<{ calibration: Calibration; warnings: Warning[] }> {
  const { policy } = model;
  const batches = takeBatches(data, model.batchTokens, tokens, seed);
  const ids = routerPlaces(policy).map((r) => r.id);
  const capacities = capacityGrid(policy);
  const quantiles = new Map(ids.map((id) => [id, new Float32Array(capacities.length * points)]));
  const count = batches.reduce((sum, batch) => sum + batch.ids.length, 0);

  const program = logitsProgram(model);
  try {
    for (const [row, capacity] of capacities.entries()) {
      const logits = new Map(ids.map((id) => [id, new Float32Array(count)]));
      let at = 0;
      for (const batch of batches) {
        const { dims, feeds } = batchRun(batch);
        const { outputs } = await program.run({
          dims,
          feeds: { ...feeds, ...capacityFeeds(policy, dims.segments, () => capacity) },
          signal,
        });
        for (const id of ids) logits.get(id)!.set(outputs[id] as Float32Array, at);
        at += batch.ids.length;
      }
      for (const id of ids)
        fillQuantiles(logits.get(id)!.sort(), quantiles.get(id)!.subarray(row * points, (row + 1) * points));
    }
  } finally {
    program.dispose();
  }
  const calibration: Calibration = {
    capacities,
    points,
    tokens: count,
    sequenceLength: typicalLength(batches),
    quantiles,
  };
  const warnings = [...collapsed(calibration), ...(await offTarget(model, calibration, batches, signal))];
  return { calibration, warnings };
}

/** Capacities to calibrate at: over the range that any place was trained for, ascending. */
function capacityGrid(policy: ElasticPolicy): number[] {
  const ranges = [policy.capacity.attn, policy.capacity.mlp].filter((range) => range !== undefined);
  const low = Math.min(...ranges.map((range) => range[0]));
  const high = Math.max(...ranges.map((range) => range[1]));
  if (low === high) return [low];
  return Array.from({ length: gridSize }, (_, i) => low + ((high - low) * i) / (gridSize - 1));
}

function takeBatches(data: TokenData, rows: number, tokens: number, seed: number): Batch[] {
  const batches: Batch[] = [];
  let cursor = { epoch: 0, segment: 0 };
  for (let count = 0; count < tokens && cursor.epoch === 0; ) {
    const next = data.next(cursor, rows, seed);
    batches.push(next.batch);
    count += next.batch.ids.length;
    cursor = next.cursor;
  }
  return batches;
}

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

function collapsed({ quantiles }: Calibration): Warning[] {
  const dead = [...quantiles].filter(([, table]) => table[points - 1] - table[0] < 1e-6).map(([id]) => id);
  if (dead.length === 0) return [];
  return [
    {
      type: 'warn',
      code: 'router-collapse',
      message: `routers that score all tokens alike and so cannot choose: ${dead.join(', ')}; train longer or raise optimizer.lr`,
    },
  ];
}

async function offTarget(
  model: DistillModel,
  calibration: Calibration,
  batches: readonly Batch[],
  signal?: AbortSignal,
): Promise<Warning[]> {
  const policy = { ...model.policy, calibration };
  const capacity = calibration.capacities[Math.floor((calibration.capacities.length - 1) / 2)];
  const wanted = thresholds(policy, { attn: capacity, mlp: capacity });
  const passed = new Map([...wanted.keys()].map((id) => [id, 0]));
  const program = thresholdProgram({ ...model, policy });
  try {
    for (const batch of batches) {
      const { dims, feeds } = batchRun(batch);
      const { outputs } = await program.run({
        dims,
        feeds: { ...feeds, ...thresholdFeeds(wanted, dims.segments) },
        signal,
      });
      for (const id of passed.keys()) passed.set(id, passed.get(id)! + outputs[id].length);
    }
  } finally {
    program.dispose();
  }
  return [...passed].flatMap(([id, rows]) => {
    const share = rows / calibration.tokens;
    if (Math.abs(share - capacity) <= tolerance) return [];
    const message = `${id}: its threshold for capacity ${capacity.toFixed(2)} passes ${share.toFixed(2)} of the tokens`;
    return [{ type: 'warn', code: 'capacity-off-target', message } satisfies Warning];
  });
}
