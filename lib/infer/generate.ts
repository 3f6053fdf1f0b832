// Generation of text: prefill in chunks, then token by token, at a budget, as a stream.
import type { Budget, OperatingPoint } from '../elastic/budget.js';
import { thresholdFeeds } from '../elastic/rows.js';
import { forwardFlops } from '../model/flops.js';
import { InvalidArgumentError } from '../native/errors.js';

import type { SessionPool } from './cache.js';
import { ComputeMeter } from './compute.js';
import { type Network, resolveFor } from './network.js';
import { checkNumber, checkOptions, naturalNumber, positiveInteger } from './options.js';
import { decodeRows } from './programs.js';
import { seedLimit, uniform } from './random.js';
import { StopFilter } from './stops.js';
import { startStream } from './stream.js';
import type { ComputeReport, FinishReason, GenerateChunk, GenerateOptions, GenerateStream } from './types.js';

const defaultMaxTokens = 256;
const samplingStream = 0x5a;
const optionNames = ['maxTokens', 'temperature', 'topK', 'topP', 'stop', 'seed', 'budget', 'signal'];

interface Request {
  readonly prompt: Int32Array;
  readonly maxTokens: number;
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly stop: readonly string[];
  readonly seed: number;
  readonly budget: Budget;
  readonly point: OperatingPoint;
}

/**
 * Starts generating. `closed` ends it when the model is disposed.
 * Throws InvalidArgumentError at once for options, prompts and budgets that cannot be served.
 */
export function generate(
  network: Network,
  sessions: SessionPool,
  prompt: string | readonly number[],
  options: GenerateOptions,
  closed: AbortSignal,
): GenerateStream {
  const request = check(network, prompt, options);
  const left = new AbortController();
  const signals = [left.signal, closed, ...(options.signal ? [options.signal] : [])];
  const signal = AbortSignal.any(signals);
  return startStream(
    (emit) => run(network, sessions, request, emit, signal),
    () => left.abort(),
  );
}

function check(network: Network, prompt: string | readonly number[], options: GenerateOptions): Request {
  checkOptions('generate', options, optionNames);
  const { maxTokens = defaultMaxTokens, temperature = 0, topK = 0, topP = 1, stop = [], budget = 'full' } = options;
  checkNumber('generate', 'maxTokens', maxTokens, positiveInteger, 'a positive integer');
  checkNumber('generate', 'temperature', temperature, (t) => Number.isFinite(t) && t >= 0, 'zero or more');
  checkNumber('generate', 'topK', topK, naturalNumber, 'an integer of zero or more');
  checkNumber('generate', 'topP', topP, (p) => p > 0 && p <= 1, 'in (0, 1]');
  checkNumber('generate', 'seed', options.seed, (s) => naturalNumber(s) && s < seedLimit, 'an integer in [0, 2^32)');
  if (!Array.isArray(stop) || stop.some((s) => typeof s !== 'string' || s === '')) {
    throw new InvalidArgumentError('[generate] stop must be a list of texts that are not empty');
  }
  if (stop.length > 0 && !network.tokenizer) {
    throw new InvalidArgumentError('[generate] stop needs a tokenizer, and this model has no tokenizer.json');
  }
  if (options.signal !== undefined && !(options.signal instanceof AbortSignal)) {
    throw new InvalidArgumentError('[generate] signal must be an AbortSignal');
  }
  const ids = promptIds(network, prompt);
  // The last token generated needs no row of its own.
  const room = network.maxContext - ids.length + 1;
  if (room < 1) {
    throw new InvalidArgumentError(
      `[generate] the prompt has ${ids.length} tokens and the context holds ${network.maxContext}; shorten it, or load the model with a larger maxContext (its own limit is ${network.spec.maxPositions})`,
    );
  }
  const most = Math.min(maxTokens, room);
  return {
    prompt: ids,
    maxTokens: most,
    temperature,
    topK: Math.min(topK, network.spec.vocab),
    topP,
    stop,
    seed: options.seed ?? Math.floor(Math.random() * seedLimit),
    budget,
    point: resolveFor(network, budget, { length: ids.length + most - 1, maxTokens: most }),
  };
}

/** Checked ids of a prompt; an empty one becomes the token a text starts from. */
export function promptIds(network: Network, prompt: string | readonly number[]): Int32Array {
  const { tokenizer, spec, startId } = network;
  if (typeof prompt === 'string' && prompt !== '' && !tokenizer) {
    throw new InvalidArgumentError(
      '[generate] a text prompt needs a tokenizer, and this model has no tokenizer.json; give token ids',
    );
  }
  const ids = typeof prompt === 'string' ? (tokenizer?.encode(prompt) ?? []) : prompt;
  if (!Array.isArray(ids))
    throw new InvalidArgumentError('[generate] the prompt must be a text or a list of token ids');
  ids.forEach((id, i) => {
    if (!Number.isInteger(id) || id < 0 || id >= spec.vocab) {
      throw new InvalidArgumentError(
        `[generate] prompt token ${i} must be an id from 0 to ${spec.vocab - 1}, the model's vocabulary, got ${String(id)}`,
      );
    }
  });
  if (ids.length > 0) return Int32Array.from(ids);
  if (startId === null) {
    throw new InvalidArgumentError(
      '[generate] the prompt is empty and the model has neither a BOS nor an EOS token to start from',
    );
  }
  return Int32Array.of(startId);
}

async function run(
  network: Network,
  sessions: SessionPool,
  request: Request,
  emit: (chunk: GenerateChunk) => void,
  signal: AbortSignal,
) {
  const { prompt, maxTokens, point } = request;
  const { tokenizer, spec } = network;
  // Lets the caller attach to the stream before the first chunk, whatever happens.
  await Promise.resolve();
  const started = performance.now();
  const session = sessions.acquire();
  try {
    const fixed = thresholdFeeds(point.thresholds, 1);
    const meter = new ComputeMeter(spec.layers);
    let runs = 0;
    let sampled = 0;
    const append = async (ids: Int32Array): Promise<{ token: number; logprob: number }> => {
      const from = meter.rows;
      const u = uniform(request.seed, sampled, samplingStream);
      const result = await session.program(point).run({
        dims: { rows: ids.length },
        feeds: {
          ...fixed,
          ids,
          positions: Int32Array.from(ids, (_, i) => from + i),
          offsets: Int32Array.of(0, ids.length),
          last: Int32Array.of(ids.length - 1),
          sampling: Float32Array.of(request.temperature, request.topK, request.topP, u),
        },
        signal,
      });
      runs++;
      meter.add(result, ids.length);
      return { token: result.outputs.token[0], logprob: result.outputs.logprob[0] };
    };

    const decoded = tokenizer?.stream([...prompt]);
    const filter = new StopFilter(request.stop);
    let prefillMs = 0;
    let reason: FinishReason = 'length';
    try {
      signal.throwIfAborted();
      let next = { token: 0, logprob: 0 };
      const chunk = decodeRows(network);
      for (let at = 0; at < prompt.length; at += chunk) next = await append(prompt.subarray(at, at + chunk));
      prefillMs = performance.now() - started;
      for (;;) {
        sampled++;
        const { token, logprob } = next;
        const ended = network.endIds.has(token);
        const last = ended || sampled === maxTokens;
        const piece = ended ? '' : (decoded?.push(token) ?? '');
        const { text, stopped } = filter.push(last ? piece + (decoded?.end() ?? '') : piece);
        emit({ text: last && !stopped ? text + filter.end() : text, token, logprob });
        if (ended || stopped) reason = 'stop';
        if (last || stopped) break;
        next = await append(Int32Array.of(token));
      }
    } catch (error) {
      if (!signal.aborted) throw error;
      reason = 'abort';
    }

    const total = performance.now() - started;
    const decodeMs = prefillMs === 0 ? 0 : total - prefillMs;
    const flopsFull = meter.rows === 0 ? 0 : forwardFlops(spec, [meter.rows], { headRows: runs }).total;
    const compute: ComputeReport = {
      requested: request.budget,
      level: point.level,
      effective: point.spec,
      flops: meter.flops,
      flopsFull,
      ratio: flopsFull === 0 ? 1 : meter.flops / flopsFull,
      layersRun: meter.layersRun(),
      ms: { prefill: prefillMs === 0 ? total : prefillMs, decode: decodeMs, total },
      tokensPerSecond: sampled > 1 && decodeMs > 0 ? ((sampled - 1) / decodeMs) * 1000 : null,
    };
    return { reason, usage: { inputTokens: prompt.length, outputTokens: sampled, compute } };
  } finally {
    sessions.release(session);
  }
}
