// Generation of text: prefill in chunks, then token by token, at a budget, as a stream.
import type { Budget, OperatingPoint } from '../../elastic/budget.js';
import { forwardFlops } from '../../model/flops.js';
import { InvalidArgumentError } from '../../native/errors.js';
import type { ComputeMeter } from '../compute.js';
import { adapterNumber, defaultBudget, type Network, resolveFor } from '../network.js';
import { checkNumber, checkOptions, naturalNumber, positiveInteger } from '../options.js';
import { seedLimit } from '../random.js';
import type {
  ComputeReport,
  FinishReason,
  GenerateChunk,
  GenerateOptions,
  GenerateStream,
  PrefillOptions,
  Usage,
} from '../types.js';
import type { SampledToken, Scheduler } from './scheduler.js';
import { Generation, Sequence } from './sequence.js';
import { checkSpeculative, type Draft, Speculation } from './speculate.js';
import { startStream } from './stream.js';
import { Writer } from './writer.js';

const defaultMaxTokens = 256;
const optionNames = [
  ...['maxTokens', 'temperature', 'topK', 'topP', 'stop', 'seed', 'budget', 'adapter', 'speculative', 'signal'],
  'deadlineMs',
];
/** Those of a text that was read before. */
const heldNames = ['budget', 'adapter'];
/** Longest time of a timer, milliseconds, exclusive. */
const timerLimit = 2 ** 31;

/** How tokens are chosen, and what ends a text besides their number; checked, with defaults. */
export interface CheckedSampling {
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly stop: readonly string[];
  readonly seed: number;
  readonly deadlineMs: number | undefined;
}

interface Request extends CheckedSampling {
  readonly prompt: Int32Array;
  readonly maxTokens: number;
  readonly budget: Budget;
  readonly point: OperatingPoint;
  readonly adapter: number;
  readonly draft: Draft | null;
}

/** What generations of one model share; `closed` ends them when the model is disposed. */
export interface Engine {
  readonly network: Network;
  readonly scheduler: Scheduler;
  readonly closed: AbortSignal;
}

/** A sequence that is kept, and the budget that was asked for it. */
export interface Held {
  readonly sequence: Sequence;
  readonly budget: Budget;
}

/** One that is continued, and who wants to know when that has ended. */
export interface Continued extends Held {
  ended(): void;
}

/**
 * Starts generating after a prompt, or after what a sequence holds and the prompt.
 * Throws InvalidArgumentError at once for options, prompts and budgets that cannot be served.
 */
export function generate(
  engine: Engine,
  prompt: string | readonly number[],
  options: GenerateOptions,
  held: Continued | null = null,
): GenerateStream {
  const request = check(engine, prompt, options, held);
  const left = new AbortController();
  return startStream(
    (emit) => run(engine, request, held, emit, [left.signal, ...signalsOf(engine, options)]),
    () => left.abort(),
  );
}

const signalsOf = ({ closed }: Engine, { signal }: { signal?: AbortSignal }): AbortSignal[] => [
  closed,
  ...(signal ? [signal] : []),
];

/**
 * Reads all of a prompt but its last token, which is run with what comes after it.
 * Throws at once as `generate` does. Rejects with the signal's reason.
 */
export async function prefill(
  engine: Engine,
  prompt: string | readonly number[],
  options: PrefillOptions,
): Promise<Held & { usage: Usage }> {
  checkOptions('prefill', options, ['budget', 'adapter', 'signal']);
  const { network, scheduler } = engine;
  const { budget = defaultBudget(network) } = options;
  checkSignal('prefill', options.signal);
  const ids = promptIds(network, prompt);
  requireRoom('prefill', network, ids.length);
  const point = resolveFor(network, budget, { length: ids.length });
  const adapter = adapterNumber('prefill', network, options.adapter);
  const rows = ids.length - 1;
  scheduler.requireFits('prefill', point, rows);
  const signal = AbortSignal.any(signalsOf(engine, options));
  const sequence = new Sequence(scheduler, { point, adapter });
  const started = performance.now();
  try {
    await sequence.admit(rows, signal);
    sequence.ids.push(...ids);
    const admitted = performance.now();
    const generation = new Generation(network, sequence, { ...greedy, given: ids.length, signal });
    await generation.read(rows);
    const ended = performance.now();
    const compute = computeReport(network, generation.meter, {
      ...{ budget, point, tokensPerSecond: null },
      ...{ rows, cached: 0, headRows: generation.readRuns },
      ms: { queue: admitted - started, prefill: ended - admitted, decode: 0, total: ended - started },
    });
    return { sequence, budget, usage: { inputTokens: ids.length, cachedTokens: 0, outputTokens: 0, compute } };
  } catch (error) {
    sequence.release();
    throw error;
  } finally {
    sequence.leave();
  }
}

const greedy = { temperature: 0, topK: 0, topP: 1, seed: 0 };

function check(
  { network, scheduler }: Engine,
  prompt: string | readonly number[],
  options: GenerateOptions,
  held: Held | null,
): Request {
  checkOptions('generate', options, held ? optionNames.filter((name) => !heldNames.includes(name)) : optionNames);
  const { maxTokens = defaultMaxTokens, budget = held?.budget ?? defaultBudget(network) } = options;
  const sampling = checkSampling(network, options);
  const ids = held ? moreIds(network, prompt) : promptIds(network, prompt);
  const given = (held?.sequence.ids.length ?? 0) + ids.length;
  // The last token generated needs no row of its own.
  const room = requireRoom('generate', network, given);
  const most = Math.min(maxTokens, room);
  const rows = given + most - 1;
  const resolve = (asked: Budget) => resolveFor(network, asked, { length: rows, maxTokens: most });
  const point = held?.sequence.point ?? resolve(budget);
  scheduler.requireFits('generate', point, rows);
  return {
    prompt: ids,
    maxTokens: most,
    ...sampling,
    budget,
    point,
    adapter: adapterNumber('generate', network, options.adapter),
    draft: checkSpeculative(network, options.speculative, budget, point, resolve),
  };
}

/** Throws InvalidArgumentError for values out of range. */
export function checkSampling(
  { spec, tokenizer }: { spec: { readonly vocab: number }; tokenizer: object | null },
  options: GenerateOptions,
): CheckedSampling {
  const { temperature = 0, topK = 0, topP = 1, stop = [], deadlineMs, seed } = options;
  checkNumber('generate', 'maxTokens', options.maxTokens, positiveInteger, 'a positive integer');
  checkNumber('generate', 'temperature', temperature, (t) => Number.isFinite(t) && t >= 0, 'zero or more');
  checkNumber('generate', 'topK', topK, naturalNumber, 'an integer of zero or more');
  checkNumber('generate', 'topP', topP, (p) => p > 0 && p <= 1, 'in (0, 1]');
  checkNumber('generate', 'seed', seed, (s) => naturalNumber(s) && s < seedLimit, 'an integer in [0, 2^32)');
  checkNumber('generate', 'deadlineMs', deadlineMs, (ms) => ms > 0 && ms < timerLimit, 'milliseconds in (0, 2^31)');
  if (!Array.isArray(stop) || stop.some((s) => typeof s !== 'string' || s === '')) {
    throw new InvalidArgumentError('[generate] stop must be a list of texts that are not empty');
  }
  if (stop.length > 0 && !tokenizer) {
    throw new InvalidArgumentError('[generate] stop needs a tokenizer, and this model has no tokenizer.json');
  }
  checkSignal('generate', options.signal);
  return {
    ...{ temperature, topP, stop, deadlineMs },
    topK: Math.min(topK, spec.vocab),
    seed: seed ?? Math.floor(Math.random() * seedLimit),
  };
}

function checkSignal(api: string, signal: unknown): void {
  if (signal === undefined || signal instanceof AbortSignal) return;
  throw new InvalidArgumentError(`[${api}] signal must be an AbortSignal`);
}

/** Tokens that can be generated after so many given ones. */
function requireRoom(api: string, { maxContext, spec }: Network, given: number): number {
  if (given <= maxContext) return maxContext - given + 1;
  throw new InvalidArgumentError(
    `[${api}] the prompt has ${given} tokens and the context holds ${maxContext}; shorten it, or load the model with a larger maxContext (its own limit is ${spec.maxPositions})`,
  );
}

/** Checked ids of a prompt; an empty one becomes the token a text starts from. */
export function promptIds(network: Network, prompt: string | readonly number[]): Int32Array {
  const ids = idsOf(network, prompt, true);
  if (ids.length > 0) return ids;
  if (network.startId === null) {
    throw new InvalidArgumentError(
      '[generate] the prompt is empty and the model has neither a BOS nor an EOS token to start from',
    );
  }
  return Int32Array.of(network.startId);
}

/** Checked ids of what continues a text, maybe none. */
const moreIds = (network: Network, more: string | readonly number[]): Int32Array => idsOf(network, more, false);

function idsOf(
  { tokenizer, spec }: Network,
  prompt: string | readonly number[],
  addSpecialTokens: boolean,
): Int32Array {
  if (typeof prompt === 'string' && prompt !== '' && !tokenizer) {
    throw new InvalidArgumentError(
      '[generate] a text prompt needs a tokenizer, and this model has no tokenizer.json; give token ids',
    );
  }
  const ids = typeof prompt === 'string' ? (tokenizer?.encode(prompt, { addSpecialTokens }) ?? []) : prompt;
  if (!Array.isArray(ids))
    throw new InvalidArgumentError('[generate] the prompt must be a text or a list of token ids');
  ids.forEach((id, i) => {
    if (!Number.isInteger(id) || id < 0 || id >= spec.vocab) {
      throw new InvalidArgumentError(
        `[generate] prompt token ${i} must be an id from 0 to ${spec.vocab - 1}, the model's vocabulary, got ${String(id)}`,
      );
    }
  });
  return Int32Array.from(ids);
}

async function run(
  { network, scheduler }: Engine,
  request: Request,
  held: Continued | null,
  emit: (chunk: GenerateChunk) => void,
  signals: readonly AbortSignal[],
) {
  const { prompt, maxTokens, budget, point, draft, deadlineMs } = request;
  const { tokenizer, endIds } = network;
  const started = performance.now();
  const deadline = new AbortController();
  const timer = deadlineMs === undefined ? undefined : setTimeout(() => deadline.abort(), deadlineMs).unref();
  const signal = AbortSignal.any([...signals, deadline.signal]);
  // Lets the caller attach to the stream before the first chunk, whatever happens.
  await Promise.resolve();
  const sequence = held?.sequence ?? new Sequence(scheduler, request);
  const cachedTokens = sequence.length;
  const given = sequence.ids.length + prompt.length;
  const generation = new Generation(network, sequence, { ...request, given, signal });
  const speculation = draft && new Speculation(generation, scheduler.draftLengths, { point, draft, endIds });
  let sampled = 0;
  let reason: FinishReason = 'length';
  let admitted = Number.NaN;
  let prefilled = Number.NaN;
  try {
    try {
      await sequence.admit(given + maxTokens - 1, signal);
      admitted = performance.now();
      sequence.ids.push(...prompt);
      const decoded = tokenizer?.stream([...sequence.ids]) ?? null;
      const writer = new Writer({ decoded, stop: request.stop, endIds, maxTokens, emit });
      // Whether generation goes on after a token.
      const take = (next: SampledToken): boolean => {
        sampled++;
        sequence.ids.push(next.token);
        const more = writer.take(next);
        if (writer.stopped) reason = 'stop';
        return more;
      };
      let next = [(await generation.read(given))!];
      prefilled = performance.now();
      while (next.every(take)) {
        const { token } = next.at(-1)!;
        next = speculation
          ? await speculation.advance(token, maxTokens - sampled)
          : [await generation.append(Int32Array.of(token), point)];
      }
    } catch (error) {
      if (!signal.aborted) throw error;
      reason = signals.some(({ aborted }) => aborted) ? 'abort' : 'deadline';
    }
    const ended = performance.now();
    // Of drafts and of what was verified in vain there is nothing in it.
    const rows = (sampled === 0 ? sequence.length : given + sampled - 1) - cachedTokens;
    // The last token has no row yet: it is run with what comes after it. Nor have drafts behind a stop.
    if (sampled > 0) sequence.truncate(sequence.ids.length - 1);
    const ms = {
      queue: (admitted || ended) - started,
      prefill: (prefilled || ended) - (admitted || ended),
      decode: ended - (prefilled || ended),
      total: ended - started,
    };
    const compute = computeReport(network, generation.meter, {
      ...{ budget, point, rows, ms },
      cached: cachedTokens,
      headRows: generation.readRuns + Math.max(0, sampled - 1),
      tokensPerSecond: sampled > 1 && ms.decode > 0 ? ((sampled - 1) / ms.decode) * 1000 : null,
      ...(speculation && { speculative: speculation.report }),
    });
    return { reason, usage: { inputTokens: given, cachedTokens, outputTokens: sampled, compute } };
  } finally {
    clearTimeout(timer);
    sequence.leave();
    if (held) held.ended();
    else sequence.release();
  }
}

/** What a call computed, against the full model over as many new rows. */
function computeReport(
  { spec }: Network,
  meter: ComputeMeter,
  {
    budget,
    point,
    rows,
    cached,
    headRows,
    ...rest
  }: Pick<ComputeReport, 'ms' | 'tokensPerSecond' | 'speculative'> & {
    budget: Budget;
    point: OperatingPoint;
    rows: number;
    /** Rows that were in the caches. */
    cached: number;
    headRows: number;
  },
): ComputeReport {
  const flopsFull = rows === 0 ? 0 : forwardFlops(spec, [rows], { cached: [cached], headRows }).total;
  return {
    ...{ requested: budget, level: point.level, effective: point.spec },
    ...{ flops: meter.flops, flopsFull, ratio: flopsFull === 0 ? 1 : meter.flops / flopsFull },
    layersRun: meter.layersRun(),
    ...rest,
  };
}
