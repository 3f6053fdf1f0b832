// Measures how long prompts and tokens take at every level of a model, as generation runs them.
import { type Budget, type OperatingPoint, resolveBudget } from '../elastic/budget.js';
import type { Level } from '../elastic/policy.js';
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
  /**
   * Token ids of the text to time on: routers let through what they do on such text, and texts leave at exits. Repeated when it
   * is short. Of an encoder the first and the last are what texts begin and end with.
   */
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
/** Texts of an encoder's level with exits, of which each may leave elsewhere: its time is their mean. */
const timedTexts = 8;

/**
 * Times full and every level of a loaded model on its device: prompts until the next token, and single tokens after them; of an
 * encoder, texts one at a time.
 * @throws InvalidArgumentError for lengths that the context does not hold, batches that are none or an encoder's, or no token.
 */
export async function profile(model: ElasticModel, options: ProfileOptions): Promise<DeviceProfile> {
  checkOptions('profile', options, ['ids', 'lengths', 'batches', 'onProgress', 'signal']);
  if (isEncoder(model)) return profileEncoder(model, options);
  const { network } = model;
  requireWhole('profile', network);
  const lengths = checkedLengths(network.maxContext - decoded, options);
  const { batches = [] } = options;
  if (!Array.isArray(batches) || !batches.every(positiveInteger)) {
    throw new InvalidArgumentError(`[profile] batches must be numbers of prompts, got ${JSON.stringify(batches)}`);
  }
  const levels: LevelTimes[] = [];
  const together: BatchTimes[] = [];
  const kvCacheBytes = defaultCacheBytes(network, 1);
  const scheduler = new Scheduler({ ...network, limits: { ...network.limits, kvCacheBytes } });
  try {
    for (const { name, spec } of wantedLevels(network, options)) {
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
  return { ...profiled(network, lengths, levels), ...(together.length > 0 && { batches: together }) };
}

/** Whether a model is timed by texts, not by prompts and tokens. */
export const isEncoder = ({ info: { task } }: ElasticModel): boolean => task !== 'causal-lm' && task !== 'seq2seq-lm';

async function profileEncoder(model: ElasticModel, options: ProfileOptions): Promise<DeviceProfile> {
  const { network } = model.encoder;
  const lengths = checkedLengths(network.maxContext, options);
  if (options.batches !== undefined) {
    throw new InvalidArgumentError(`[profile] batches are for decoders, and ${network.dir} is an encoder`);
  }
  const levels: LevelTimes[] = [];
  for (const { name, spec } of wantedLevels(network, options)) {
    const budget: Budget = name === 'full' ? 'full' : { spec };
    const prefillMs: number[] = [];
    for (const length of lengths) {
      const each: number[] = [];
      for (let at = 0; at < (spec.exit ? timedTexts : 1); at++) {
        each.push(await timeText(model, textOf(options.ids, length, at * length), budget, options));
      }
      prefillMs.push(each.reduce((sum, ms) => sum + ms, 0) / each.length);
    }
    levels.push({ level: name, spec, prefillMs });
  }
  return profiled(network, lengths, levels);
}

/** A text of `length` tokens: those from a place of `ids` on, between its first and its last one. */
function textOf(ids: readonly number[], length: number, from: number): number[] {
  const inner = ids.length > 2 ? ids.slice(1, -1) : ids;
  const text = Array.from({ length }, (_, i) => inner[(from + i) % inner.length]);
  text[0] = ids[0];
  if (length > 1) text[length - 1] = ids.at(-1)!;
  return text;
}

async function timeText(
  model: ElasticModel,
  text: readonly number[],
  budget: Budget,
  { signal }: ProfileOptions,
): Promise<number> {
  const ms: number[] = [];
  for (let run = 0; run <= timedRuns; run++) {
    const started = performance.now();
    if (model.info.labels.length > 0) await model.classify([text], { budget, signal });
    else await model.embed([text], { budget, signal });
    if (run > 0) ms.push(performance.now() - started);
  }
  return median(ms);
}

type Profiled = Pick<Network, 'policy' | 'measuredOn'>;

/** Full and the levels of a model, as their turns come. */
function* wantedLevels({ policy }: Profiled, { onProgress }: ProfileOptions): Generator<Pick<Level, 'name' | 'spec'>> {
  const named = (policy?.levels ?? []).filter(({ name }) => name !== 'full');
  const wanted = [{ name: 'full', spec: {} }, ...named];
  for (const [done, level] of wanted.entries()) {
    onProgress?.({ phase: `times of ${level.name}`, done, total: wanted.length });
    yield level;
  }
}

function profiled({ policy, measuredOn }: Profiled, lengths: readonly number[], levels: LevelTimes[]): DeviceProfile {
  const weightsSha256 = policy?.base.weightsSha256;
  return {
    ...{ version: 1, on: measuredOn(), ...(weightsSha256 && { weightsSha256 }) },
    ...{ lengths: [...lengths], levels },
  };
}

/** The lengths to time; throws InvalidArgumentError for those above `most`, and where there is no token. */
function checkedLengths(most: number, options: ProfileOptions): readonly number[] {
  const last = Math.min(defaultLengths.at(-1)!, most);
  const lengths = options.lengths ?? [...defaultLengths.filter((length) => length < last), last];
  const ascend = lengths.every((n, i) => positiveInteger(n) && n <= most && (i === 0 || n > lengths[i - 1]));
  if (lengths.length === 0 || !ascend) {
    throw new InvalidArgumentError(
      `[profile] lengths must be ascending numbers of tokens up to ${most}, which the context holds, got ${JSON.stringify(lengths)}`,
    );
  }
  if (options.ids.length === 0) throw new InvalidArgumentError('[profile] ids must hold a token');
  return lengths;
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
): Promise<Required<Pick<LevelTimes, 'prefillMs' | 'decodeMs'>>> {
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
