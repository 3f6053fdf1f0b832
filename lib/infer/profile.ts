// Measures how long prompts and tokens take at every level of a model, as generation runs them.
import { type Budget, type OperatingPoint, resolveBudget } from '../elastic/budget.js';
import type { DeviceProfile, LevelTimes } from '../elastic/profile.js';
import { thresholdFeeds } from '../elastic/rows.js';
import { InvalidArgumentError } from '../native/errors.js';
import { Session } from './cache.js';
import type { ElasticModel } from './model.js';
import type { Network } from './network.js';
import { checkOptions, positiveInteger } from './options.js';
import { compileDecode, decodeRows } from './programs.js';
import { median } from './statistics.js';

export interface ProfileOptions {
  /** Token ids of the text to time on: routers let through what they do on such text. Repeated when it is short. */
  ids: readonly number[];
  /** Lengths in tokens, ascending; default 16, 128 and 512, or what the context holds. */
  lengths?: readonly number[];
  onProgress?: (event: { phase: string; done: number; total: number }) => void;
  signal?: AbortSignal;
}

const defaultLengths = [16, 128, 512];
/** After one to warm up. */
const timedRuns = 5;
/** Tokens decoded after a prompt; the time of one is their median. */
const decoded = 8;

/**
 * Times full and every level of a loaded model on its device: prompts until the next token, and single tokens after them.
 * @throws InvalidArgumentError for lengths that the context does not hold, or no token.
 */
export async function profile(model: ElasticModel, options: ProfileOptions): Promise<DeviceProfile> {
  checkOptions('profile', options, ['ids', 'lengths', 'onProgress', 'signal']);
  const { network } = model;
  const most = network.maxContext - decoded;
  const last = Math.min(defaultLengths.at(-1)!, most);
  const lengths = options.lengths ?? [...defaultLengths.filter((length) => length < last), last];
  const ascend = lengths.every((n, i) => positiveInteger(n) && n <= most && (i === 0 || n > lengths[i - 1]));
  if (lengths.length === 0 || !ascend) {
    throw new InvalidArgumentError(
      `[profile] lengths must be ascending numbers of tokens up to ${most}, which the context holds, got ${JSON.stringify(lengths)}`,
    );
  }
  if (options.ids.length === 0) throw new InvalidArgumentError('[profile] ids must hold a token');
  const named = (network.policy?.levels ?? []).filter(({ name }) => name !== 'full');
  const wanted = [{ name: 'full', spec: {} }, ...named];
  const levels: LevelTimes[] = [];
  const session = new Session(network);
  try {
    for (const [done, { name, spec }] of wanted.entries()) {
      options.onProgress?.({ phase: `times of ${name}`, done, total: wanted.length });
      const budget: Budget = { spec };
      const point = resolveBudget(budget, network.spec, network.policy);
      const times = await timeLevel(network, session, point, lengths, options);
      levels.push({ level: name, spec, ...times });
    }
  } finally {
    session.dispose();
  }
  return { version: 1, on: network.measuredOn(), lengths: [...lengths], levels };
}

async function timeLevel(
  network: Network,
  session: Session,
  point: OperatingPoint,
  lengths: readonly number[],
  { ids, signal }: ProfileOptions,
): Promise<Pick<LevelTimes, 'prefillMs' | 'decodeMs'>> {
  using program = compileDecode(network, session, point);
  const fixed = { ...thresholdFeeds(point.thresholds, 1), sampling: Float32Array.of(0, 0, 1, 0) };
  const append = async (from: number, count: number): Promise<void> => {
    const range = Int32Array.from({ length: count }, (_, i) => from + i);
    await program.run({
      dims: { rows: count },
      feeds: {
        ...fixed,
        ids: range.map((at) => ids[at % ids.length]),
        positions: range,
        offsets: Int32Array.of(0, count),
        last: Int32Array.of(count - 1),
      },
      signal,
    });
  };
  const timed = async (run: () => Promise<void>): Promise<number> => {
    const started = performance.now();
    await run();
    return performance.now() - started;
  };
  const chunk = decodeRows(network);
  const result: { prefillMs: number[]; decodeMs: number[] } = { prefillMs: [], decodeMs: [] };
  for (const length of lengths) {
    const [prefill, decode]: [number[], number[]] = [[], []];
    for (let run = 0; run <= timedRuns; run++) {
      session.reset();
      const first = await timed(async () => {
        for (let at = 0; at < length; at += chunk) await append(at, Math.min(chunk, length - at));
      });
      const next: number[] = [];
      for (let i = 0; i < decoded; i++) next.push(await timed(() => append(length + i, 1)));
      if (run === 0) continue;
      prefill.push(first);
      decode.push(median(next));
    }
    result.prefillMs.push(median(prefill));
    result.decodeMs.push(median(decode));
  }
  return result;
}
