// A text in the caches, and one generation of it: the runs that append rows, what they sample, and what they computed.
import type { OperatingPoint } from '../../elastic/budget.js';
import { ComputeMeter } from '../compute.js';
import type { Network } from '../network.js';
import { uniform } from '../random.js';
import type { SequenceKeys } from './cache.js';
import type { Done, SampledToken, Scheduler, Work } from './scheduler.js';

const samplingStream = 0x5a;

/** A text at a budget, with an adapter or none, and its rows in the caches. */
export class Sequence {
  readonly point: OperatingPoint;
  readonly #adapter: number;
  /** Its tokens: those with rows in the caches, and after them those that have yet to be run. */
  readonly ids: number[];
  readonly #scheduler: Scheduler;
  readonly #keys: SequenceKeys;
  #length: number;

  /** @param from begins with the text and the rows of this one */
  constructor(scheduler: Scheduler, { point, adapter }: { point: OperatingPoint; adapter: number }, from?: Sequence) {
    this.point = point;
    this.#adapter = adapter;
    this.ids = from ? [...from.ids] : [];
    this.#scheduler = scheduler;
    this.#keys = from ? scheduler.cache.fork(from.#keys) : scheduler.cache.open(point);
    this.#length = from?.length ?? 0;
  }

  /** Rows in the caches. */
  get length(): number {
    return this.#length;
  }

  fork(): Sequence {
    return new Sequence(this.#scheduler, { point: this.point, adapter: this.#adapter }, this);
  }

  /** Waits for its turn to run, with memory for `rows` rows in all. Errors: those of `Scheduler.admit`. */
  admit(rows: number, signal: AbortSignal): Promise<void> {
    return this.#scheduler.admit(this.#keys, rows, signal);
  }

  /** Lets others run. */
  leave(): void {
    this.#scheduler.leave(this.#keys);
  }

  async append(work: Omit<Work, 'keys' | 'start' | 'adapter'>): Promise<Done> {
    const done = await this.#scheduler.run({
      ...work,
      ...{ keys: this.#keys, adapter: this.#adapter, start: this.#length },
    });
    this.#length += work.ids.length;
    return done;
  }

  /** Forgets all rows but the first ones. */
  truncate(rows: number): void {
    if (rows === this.#length) return;
    this.#length = rows;
    this.#scheduler.cache.truncate(this.#keys, rows);
  }

  /** Gives its memory back. */
  release(): void {
    this.#scheduler.cache.release(this.#keys);
  }
}

export interface GenerationOptions {
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly seed: number;
  /** Tokens of the text that are not generated. */
  readonly given: number;
  readonly signal: AbortSignal;
}

/** What one call runs of a sequence that was admitted. */
export class Generation {
  /** What all runs computed. */
  readonly meter: ComputeMeter;
  /** Runs whose program ran for the first time. */
  coldRuns = 0;
  /** Runs that `read` took. */
  readRuns = 0;
  readonly #network: Network;
  readonly #sequence: Sequence;
  readonly #options: GenerationOptions;

  constructor(network: Network, sequence: Sequence, options: GenerationOptions) {
    this.meter = new ComputeMeter(network.spec);
    this.#network = network;
    this.#sequence = sequence;
    this.#options = options;
  }

  /** Rows in the caches. */
  get length(): number {
    return this.#sequence.length;
  }

  /** Rows of one run at most. */
  get mostRows(): number {
    return this.#network.limits.maxBatchTokens;
  }

  /**
   * Runs the tokens of the text that are not in the caches, up to so many rows, in chunks that begin at fixed places of it
   * whatever else runs.
   *
   * @returns what comes after them; null: there were none
   */
  async read(rows: number): Promise<SampledToken | null> {
    const { ids, point } = this.#sequence;
    const { chunkRows } = this.#network.limits;
    let next: SampledToken | null = null;
    for (; this.length < rows; this.readRuns++) {
      const end = Math.min(rows, (Math.floor(this.length / chunkRows) + 1) * chunkRows);
      next = await this.append(Int32Array.from(ids.slice(this.length, end)), point);
    }
    return next;
  }

  /** Appends tokens, and samples what comes after the last. */
  async append(ids: Int32Array, point: OperatingPoint): Promise<SampledToken> {
    const [next] = await this.#run(ids, point, 1);
    return next;
  }

  /** Appends tokens, and samples what comes after each of them. */
  verify(ids: Int32Array, point: OperatingPoint): Promise<SampledToken[]> {
    return this.#run(ids, point, ids.length);
  }

  /** Forgets all rows but the first ones. */
  truncate(rows: number): void {
    this.#sequence.truncate(rows);
  }

  // Samples after the last `sampled` rows. A token is drawn by the random number of its place in the text, whoever draws it.
  async #run(ids: Int32Array, point: OperatingPoint, sampled: number): Promise<SampledToken[]> {
    const { temperature, topK, topP, seed, given, signal } = this.#options;
    signal.throwIfAborted();
    const first = this.length + ids.length - sampled + 1 - given;
    const sampling = Array.from({ length: sampled }, (_, i) => [
      ...[temperature, topK, topP],
      uniform(seed, Math.max(0, first + i), samplingStream),
    ]);
    const { tokens, counted, warm } = await this.#sequence.append({ ids, point, sampling, signal });
    if (!warm) this.coldRuns++;
    this.meter.add(counted, ids.length);
    return tokens;
  }
}
