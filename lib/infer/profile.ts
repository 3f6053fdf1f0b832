// Measures how long prompts and tokens take at every level of a model, as generation runs them.
import { type Budget, type OperatingPoint, resolveBudget } from '../elastic/budget.js';
import type { BatchTimes, DeviceProfile, LevelTimes } from '../elastic/profile.js';
import { thresholdFeeds } from '../elastic/rows.js';
import { InvalidArgumentError } from '../native/errors.js';
import { defaultCacheBytes } from './engine/cache.js';
import { Scheduler } from './engine/scheduler.js';
import { Generation, Sequence } from './engine/sequence.js';
import type { ElasticModel } from './model.js';
import { type Network, requireWhole } from './network.js';
import { checkOptions, positiveInteger } from './options.js';
import { budgetDims, budgetSelector, compilePrefill } from './programs.js';
import { median } from './quality/statistics.js';

/** Options of `profile`. */
export interface ProfileOptions {
  /** Token ids of the text to time on: routers let through what they do on such text. Repeated when it is short. */
  ids: readonly number[];
  /** Lengths in tokens, ascending; default 16, 128 and 512, or what the context holds. */
  lengths?: readonly number[];
  /** Numbers of prompts to time in one run, besides one alone; default none. */
  batches?: readonly number[];
  /** Called as the work goes on: what is being done, and how many of its steps are. */
  onProgress?: (event: { phase: string; done: number; total: number }) => void;
  /** Stops the work; the promise rejects with the signal's reason. */
  signal?: AbortSignal;
}

const defaultLengths = [16, 128, 512];
/** After one to warm up. */
const timedRuns = 5;
/** Tokens decoded after a prompt; the time of one is their median. */
const decoded = 8;

/**
 * Times full and every level of a loaded model on its device: prompts until the next token, and single tokens after them.
 * @throws InvalidArgumentError for lengths that the context does not hold, batches that are none, or no token.
 */
export async function profile(model: ElasticModel, options: ProfileOptions): Promise<DeviceProfile> {
  checkOptions('profile', options, ['ids', 'lengths', 'batches', 'onProgress', 'signal']);
  const { network } = model;
  requireWhole('profile', network);
  const most = network.maxContext - decoded;
  const last = Math.min(defaultLengths.at(-1)!, most);
  const lengths = options.lengths ?? [...defaultLengths.filter((length) => length < last), last];
  const ascend = lengths.every((n, i) => positiveInteger(n) && n <= most && (i === 0 || n > lengths[i - 1]));
  if (lengths.length === 0 || !ascend) {
    throw new InvalidArgumentError(
      `[profile] lengths must be ascending numbers of tokens up to ${most}, which the context holds, got ${JSON.stringify(lengths)}`,
    );
  }
  const { batches = [] } = options;
  if (!Array.isArray(batches) || !batches.every(positiveInteger)) {
    throw new InvalidArgumentError(`[profile] batches must be numbers of prompts, got ${JSON.stringify(batches)}`);
  }
  if (options.ids.length === 0) throw new InvalidArgumentError('[profile] ids must hold a token');
  const named = (network.policy?.levels ?? []).filter(({ name }) => name !== 'full');
  const wanted = [{ name: 'full', spec: {} }, ...named];
  const levels: LevelTimes[] = [];
  const together: BatchTimes[] = [];
  const kvCacheBytes = defaultCacheBytes(network, 1);
  const scheduler = new Scheduler({ ...network, limits: { ...network.limits, kvCacheBytes } });
  try {
    for (const [done, { name, spec }] of wanted.entries()) {
      options.onProgress?.({ phase: `times of ${name}`, done, total: wanted.length });
      const budget: Budget = { spec };
      const point = resolveBudget(budget, network.spec, network.policy);
      const times = await timeLevel(network, scheduler, point, lengths, options);
      levels.push({ level: name, spec, ...times });
      for (const batch of batches) {
        const prefillMs = await timeBatch(network, point, lengths, batch, options);
        together.push({ level: name, spec, batch, prefillMs });
      }
    }
  } finally {
    scheduler.dispose();
  }
  const weightsSha256 = network.policy?.base.weightsSha256;
  return {
    ...{ version: 1, on: network.measuredOn(), ...(weightsSha256 && { weightsSha256 }) },
    ...{ lengths: [...lengths], levels, ...(together.length > 0 && { batches: together }) },
  };
}

/** Median milliseconds of `batch` prompts in one run until the token after each, at every length. */
async function timeBatch(
  network: Network,
  point: OperatingPoint,
  lengths: readonly number[],
  batch: number,
  { ids, signal }: ProfileOptions,
): Promise<number[]> {
  const limits = { rows: batch * lengths.at(-1)!, segments: batch };
  using program = compilePrefill(network, limits, (graph, _rows, segments) =>
    budgetSelector(graph, network, point, segments),
  );
  const result: number[] = [];
  for (const length of lengths) {
    const rows = Int32Array.from({ length: batch * length }, (_, i) => i);
    const offsets = Int32Array.from({ length: batch + 1 }, (_, i) => i * length);
    const run = {
      dims: { rows: rows.length, segments: batch, offsets: batch + 1, ...budgetDims(network, point) },
      feeds: {
        ...thresholdFeeds(point.thresholds, batch),
        ...{ ids: rows.map((at) => ids[at % ids.length]), positions: rows.map((at) => at % length), offsets },
        ...{ last: offsets.slice(1).map((end) => end - 1), sampling: new Float32Array(4 * batch) },
      },
      signal,
    };
    const ms: number[] = [];
    for (let i = 0; i <= timedRuns; i++) {
      const started = performance.now();
      await program.run(run);
      if (i > 0) ms.push(performance.now() - started);
    }
    result.push(median(ms));
  }
  return result;
}

async function timeLevel(
  network: Network,
  scheduler: Scheduler,
  point: OperatingPoint,
  lengths: readonly number[],
  { ids, signal = new AbortController().signal }: ProfileOptions,
): Promise<Pick<LevelTimes, 'prefillMs' | 'decodeMs'>> {
  const timed = async (run: () => Promise<unknown>): Promise<number> => {
    const started = performance.now();
    await run();
    return performance.now() - started;
  };
  const result: { prefillMs: number[]; decodeMs: number[] } = { prefillMs: [], decodeMs: [] };
  for (const length of lengths) {
    const [prefill, decode]: [number[], number[]] = [[], []];
    for (let run = 0; run <= timedRuns; run++) {
      const sequence = new Sequence(scheduler, { point, adapter: 0 });
      try {
        await sequence.admit(length + decoded, signal);
        for (let at = 0; at < length + decoded; at++) sequence.ids.push(ids[at % ids.length]);
        const options = { temperature: 0, topK: 0, topP: 1, seed: 0, given: length, signal };
        const generation = new Generation(network, sequence, options);
        const first = await timed(() => generation.read(length));
        const next: number[] = [];
        for (let i = 1; i <= decoded; i++) next.push(await timed(() => generation.read(length + i)));
        if (run === 0) continue;
        prefill.push(first);
        decode.push(median(next));
      } finally {
        sequence.leave();
        sequence.release();
      }
    }
    result.prefillMs.push(median(prefill));
    result.decodeMs.push(median(decode));
  }
  return result;
}
