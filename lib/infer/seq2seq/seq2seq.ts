// Encoder-decoder models at work: a text written for a source, greedily, by sampling or by beam search, as a stream.
import { resolveAssembly, typicalLengths } from '../../elastic/assemblies.js';
import type { Budget, BudgetContext, OperatingPoint } from '../../elastic/budget.js';
import { type Seq2SeqFlops, seq2seqFlops } from '../../model/flops.js';
import { InvalidArgumentError } from '../../native/errors.js';
import { ComputeMeter, requireNumbers } from '../compute.js';
import { type CheckedSampling, checkSampling } from '../engine/generate.js';
import { startStream } from '../engine/stream.js';
import { Writer } from '../engine/writer.js';
import { checkNumber, checkOptions, positiveInteger } from '../options.js';
import { uniform } from '../random.js';
import type { ComputeReport, FinishReason, GenerateChunk, GenerateOptions, GenerateStream, Usage } from '../types.js';
import { BeamSearch } from './beams.js';
import { type Assembled, assembledOf, type Seq2SeqNetwork } from './network.js';
import { type Places, type Ran, type RowResult, Seq2SeqRunner } from './runner.js';
import { isFree, logSoftmax, maxBeams, restrict, type WritingSettings } from './writing.js';

const defaultMaxTokens = 256;
/** What lets any token come at any time and ends no text. */
const endless: Partial<WritingSettings> = {
  ...{ endIds: new Set(), firstIds: [], lastIds: [], minLength: 0, noRepeat: 0, banned: [] },
};
/** Settings of which is kept what they come to. */
const keptModels = 64;
const samplingStream = 0x5a;
const optionNames = [
  ...['maxTokens', 'temperature', 'topK', 'topP', 'stop', 'seed', 'budget', 'signal', 'deadlineMs'],
  ...['beams', 'lengthPenalty', 'earlyStopping'],
];

interface Request extends CheckedSampling {
  readonly source: readonly number[];
  readonly maxTokens: number;
  readonly settings: WritingSettings;
  readonly requested: Budget;
  readonly point: OperatingPoint;
}

/** Calls of one loaded encoder-decoder model; made by `ElasticModel`. */
export class Seq2Seq implements Disposable {
  readonly network: Seq2SeqNetwork;
  readonly #runner: Seq2SeqRunner;
  readonly #closed: AbortSignal;
  readonly #models = new Map<string, Assembled>();

  constructor(network: Seq2SeqNetwork, closed: AbortSignal) {
    this.network = network;
    this.#runner = new Seq2SeqRunner(network);
    this.#closed = closed;
  }

  /** Throws InvalidArgumentError at once for options and sources that cannot be served. */
  generate(source: string | readonly number[], options: GenerateOptions): GenerateStream {
    const request = this.#check(source, options);
    const left = new AbortController();
    const signals = [left.signal, this.#closed, ...(options.signal ? [options.signal] : [])];
    return startStream(
      (emit) => this.#write(request, emit, signals),
      () => left.abort(),
    );
  }

  /** What a budget means; latencies are for so many tokens read and generated. */
  resolve(budget: Budget, { length, maxTokens = 0 }: Omit<BudgetContext, 'profile'> = {}): OperatingPoint {
    const { spec, policy, profiles } = this.network;
    const profile = () => profiles.of(this.network.measuredOn());
    return resolveAssembly(budget, spec, policy, { length: length ?? typicalLengths.source, maxTokens, profile });
  }

  /** Milliseconds of a greedy generation of just so many tokens, whether or not its text would have ended before. */
  async time(
    source: readonly number[],
    { budget, tokens, signal }: { budget: Budget; tokens: number; signal?: AbortSignal },
  ): Promise<ComputeReport['ms']> {
    const request = this.#check(source, { budget, maxTokens: tokens, beams: 1 });
    const settings = { ...request.settings, ...endless };
    const signals = [this.#closed, ...(signal ? [signal] : [])];
    const { usage } = await this.#write({ ...request, settings }, () => {}, signals);
    signal?.throwIfAborted();
    return usage.compute.ms;
  }

  /** Logits after every token of a target, its start included: f32 [tokens, vocab], row by row. */
  async logits(
    source: readonly number[],
    target: readonly number[],
    { budget, signal = this.#closed }: { budget: Budget; signal?: AbortSignal },
  ): Promise<Float32Array> {
    const { point } = this.#check(source, { budget, maxTokens: target.length, beams: 1 });
    const model = this.#assembled(point);
    const { vocab } = this.network.spec.decoder;
    const logits = new Float32Array(target.length * vocab);
    const places = await this.#runner.admit({ model, beams: 1, source: source.length, target: target.length, signal });
    try {
      await this.#runner.read(places, source, signal);
      for (const [position, token] of target.entries()) {
        const row = { slot: places.slots[0], token, position, sampling: null };
        const [result] = (await this.#runner.step(places, [row], signal)).results;
        logits.set((result as Extract<RowResult, { logits: Float32Array }>).logits, position * vocab);
      }
    } finally {
      if (!this.#closed.aborted) this.#runner.leave(places);
    }
    return logits;
  }

  dispose(): void {
    this.#runner.dispose();
    this.network.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  /** What runs at a point; the same object while few others are asked for, so that what is known of its sizes stays. */
  #assembled({ spec: settings }: OperatingPoint): Assembled {
    const key = JSON.stringify(settings);
    const model = this.#models.get(key) ?? assembledOf(this.network, settings);
    if (this.#models.size >= keptModels) this.#models.clear();
    this.#models.set(key, model);
    return model;
  }

  #check(source: string | readonly number[], options: GenerateOptions): Request {
    checkOptions('generate', options, optionNames);
    const { settings: own, tokenizer, spec, maxContext } = this.network;
    const sampling = checkSampling({ spec: spec.decoder, tokenizer }, options);
    const { budget = 'full', earlyStopping = own.earlyStopping, lengthPenalty = own.lengthPenalty } = options;
    const beams = options.beams ?? (sampling.temperature > 0 ? 1 : own.beams);
    checkNumber(
      'generate',
      'beams',
      beams,
      (n) => positiveInteger(n) && n <= maxBeams,
      `an integer from 1 to ${maxBeams}`,
    );
    checkNumber('generate', 'lengthPenalty', lengthPenalty, Number.isFinite, 'a finite number');
    if (typeof earlyStopping !== 'boolean' && earlyStopping !== 'never') {
      throw new InvalidArgumentError(
        `[generate] earlyStopping must be true, false or 'never', got ${String(earlyStopping)}`,
      );
    }
    if (beams > 1 && sampling.temperature > 0) {
      throw new InvalidArgumentError('[generate] beams are searched without a temperature; give one of them');
    }
    if (beams > 1 && sampling.stop.length > 0) {
      throw new InvalidArgumentError('[generate] stop texts need one beam: give beams 1, or no stop');
    }
    const ids = this.#sourceIds(source);
    const maxTokens = Math.min(options.maxTokens ?? own.maxTokens ?? defaultMaxTokens, maxContext);
    this.#runner.requireFits(beams, ids.length, maxTokens);
    const point = this.resolve(budget, { length: ids.length + maxTokens - 1, maxTokens });
    const settings = { ...own, beams, lengthPenalty, earlyStopping };
    return { ...sampling, source: ids, maxTokens, settings, requested: budget, point };
  }

  #sourceIds(source: string | readonly number[]): readonly number[] {
    const { sourceTokenizer, spec, maxContext, dir } = this.network;
    const fail = (message: string) => new InvalidArgumentError(`[generate] the source ${message}`);
    if (typeof source === 'string' && !sourceTokenizer) {
      throw fail(`is a text, which needs a tokenizer, and ${dir} has no tokenizer.json; give token ids`);
    }
    const ids = typeof source === 'string' ? sourceTokenizer!.encode(source) : source;
    if (!Array.isArray(ids)) throw fail('must be a text or a list of token ids');
    const { vocab, maxPositions } = spec.decoder;
    ids.forEach((id, i) => {
      if (Number.isInteger(id) && id >= 0 && id < vocab) return;
      throw fail(`token ${i} must be an id from 0 to ${vocab - 1}, the model's vocabulary, got ${String(id)}`);
    });
    if (ids.length === 0) throw fail('is empty: there is nothing to write a text for');
    if (ids.length > maxContext) {
      throw fail(
        `has ${ids.length} tokens and the context holds ${maxContext}; shorten it, or load the model with a larger maxContext (its own limit is ${maxPositions})`,
      );
    }
    return [...ids];
  }

  async #write(request: Request, emit: (chunk: GenerateChunk) => void, signals: readonly AbortSignal[]) {
    const { source, maxTokens, settings, stop, deadlineMs, requested, point } = request;
    const started = performance.now();
    const deadline = new AbortController();
    const timer = deadlineMs === undefined ? undefined : setTimeout(() => deadline.abort(), deadlineMs).unref();
    const signal = AbortSignal.any([...signals, deadline.signal]);
    // Lets the caller attach to the stream before the first chunk, whatever happens.
    await Promise.resolve();
    const decoded = this.network.tokenizer?.stream() ?? null;
    const writer = new Writer({ decoded, stop, endIds: settings.endIds, maxTokens, emit });
    const model = this.#assembled(point);
    const cost = new Cost(this.network, model);
    let reason: FinishReason = 'length';
    let admitted = Number.NaN;
    let read = Number.NaN;
    let places: Places | null = null;
    try {
      try {
        const { beams } = settings;
        places = await this.#runner.admit({ model, beams, source: source.length, target: maxTokens, signal });
        admitted = performance.now();
        cost.addSource(await this.#runner.read(places, source, signal), source.length);
        read = performance.now();
        if (beams > 1) await this.#search(request, places, writer, cost, signal);
        else await this.#continue(request, places, writer, cost, signal);
        if (writer.stopped) reason = 'stop';
      } catch (error) {
        if (!signal.aborted) throw error;
        reason = signals.some(({ aborted }) => aborted) ? 'abort' : 'deadline';
      }
    } finally {
      clearTimeout(timer);
      if (places && !this.#closed.aborted) this.#runner.leave(places);
    }
    const ended = performance.now();
    const ms = {
      queue: (admitted || ended) - started,
      prefill: (read || ended) - (admitted || ended),
      decode: ended - (read || ended),
      total: ended - started,
    };
    const compute = { requested, level: point.level, effective: point.spec, ...cost.report(ms, writer.count) };
    const usage: Usage = { inputTokens: source.length, cachedTokens: 0, outputTokens: writer.count, compute };
    return { reason, usage };
  }

  /** Greedily or by sampling, token by token. */
  async #continue(request: Request, places: Places, writer: Writer, cost: Cost, signal: AbortSignal): Promise<void> {
    const { settings, maxTokens, temperature, topK, topP, seed, source } = request;
    const target = [settings.startId];
    for (let more = true; more; ) {
      const position = target.length - 1;
      const sampling = [temperature, topK, topP, uniform(seed, position, samplingStream)];
      const free = isFree(settings, target.length, maxTokens);
      const row = { slot: places.slots[0], token: target[position], position, sampling: free ? sampling : null };
      const ran = await this.#runner.step(places, [row], signal);
      cost.addTargets(ran, 1, position, source.length);
      const [result] = ran.results;
      const next = 'token' in result ? result : await this.#restricted(request, result.logits, target, sampling);
      target.push(next.token);
      more = writer.take(next);
    }
  }

  async #restricted({ settings, maxTokens }: Request, logits: Float32Array, target: number[], sampling: number[]) {
    requireNumbers('generate', logits);
    const allowed = logits.slice();
    restrict(settings, allowed, target, maxTokens);
    const token = await this.#runner.choose(allowed, sampling);
    return { token, logprob: logSoftmax(logits)[token] };
  }

  /** The likeliest text that beam search finds, all of it at the end. */
  async #search(request: Request, places: Places, writer: Writer, cost: Cost, signal: AbortSignal): Promise<void> {
    const { settings, maxTokens, source } = request;
    const { startId, renormalize } = settings;
    const search = new BeamSearch({ ...settings, maxTokens });
    for (let position = 0; !search.done; position++) {
      // At first all hypotheses are the same.
      const hypotheses = position === 0 ? search.running.slice(0, 1) : search.running;
      const rows = hypotheses.map(({ tokens }, i) => ({
        ...{ slot: places.slots[i], token: tokens.at(-1) ?? startId, position, sampling: null },
      }));
      const ran = await this.#runner.step(places, rows, signal);
      cost.addTargets(ran, rows.length, position, source.length);
      const logprobs = ran.results.map((result) => {
        const { logits } = result as Extract<RowResult, { logits: Float32Array }>;
        requireNumbers('generate', logits);
        return logSoftmax(logits);
      });
      const scores = logprobs.map((own, i) => {
        const allowed = own.slice();
        restrict(settings, allowed, [startId, ...hypotheses[i].tokens], maxTokens);
        return renormalize ? logSoftmax(allowed) : allowed;
      });
      const each = <T>(values: T[]): T[] => search.running.map((_, i) => values[Math.min(i, values.length - 1)]);
      const parents = search.advance(each(scores), each(logprobs));
      if (!search.done) this.#runner.exchange(places, position === 0 ? parents.map(() => 0) : parents, position + 1);
    }
    const { tokens, logprobs } = search.best;
    for (const [i, token] of tokens.entries()) writer.take({ token, logprob: logprobs[i] });
  }
}

/** What one generation cost: of every run its share by formula. */
class Cost {
  #flops = 0;
  #full = 0;
  readonly #whole: Seq2SeqFlops;
  readonly #own: Seq2SeqFlops;
  readonly #meter: ComputeMeter;

  constructor({ spec }: Seq2SeqNetwork, { flops }: Assembled) {
    this.#whole = seq2seqFlops(spec);
    this.#own = flops;
    this.#meter = new ComputeMeter(spec.decoder);
  }

  addSource(ran: Ran<RowResult>, tokens: number): void {
    this.#add(ran, (of) => of.source(tokens), tokens);
  }

  /** @param own rows of the run that were this generation's, each after so many of its target */
  addTargets(ran: Ran<RowResult>, own: number, before: number, source: number): void {
    this.#meter.add(ran.run, ran.rows);
    this.#add(ran, (of) => own * of.target(before, source), own);
  }

  // Of a run that others shared, as much of what was counted as the formula says; alone, all of it.
  #add({ run, rows }: Ran<RowResult>, byFormula: (of: Seq2SeqFlops) => number, own: number): void {
    const counted = Object.values(run.counters).reduce((sum, { flops }) => sum + flops, 0);
    this.#full += byFormula(this.#whole);
    this.#flops += rows === own ? counted : byFormula(this.#own);
  }

  report(ms: ComputeReport['ms'], tokens: number): Omit<ComputeReport, 'requested' | 'level' | 'effective'> {
    return {
      layersRun: this.#meter.layersRun(),
      ...{ flops: this.#flops, flopsFull: this.#full, ratio: this.#full > 0 ? this.#flops / this.#full : 1 },
      ms,
      tokensPerSecond: tokens > 0 && ms.decode > 0 ? (tokens / ms.decode) * 1000 : null,
    };
  }
}
