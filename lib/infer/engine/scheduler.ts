// Continuous batching: what sequences want to run next is packed into common runs, step by step, in turns that are fair.
import { setImmediate } from 'node:timers/promises';
import type { OperatingPoint } from '../../elastic/budget.js';
import type { Program, RunResult } from '../../graph/index.js';
import { InvalidArgumentError, OutOfMemoryError } from '../../native/errors.js';
import {
  appendedRows,
  cachedCompany,
  decisionFeeds,
  jointDecisions,
  jointDims,
  keepsEveryRow,
  packedBatch,
  RunWidths,
  sequenceCounters,
} from '../mixed.js';
import type { Network } from '../network.js';
import {
  adapterFeeds,
  budgetDims,
  compileStep,
  maxDraftTokens,
  ProgramCache,
  packedDims,
  type StepLimits,
} from '../programs.js';
import type { ModelLoad } from '../types.js';
import { KeyValueCache, type SequenceKeys } from './cache.js';
import { decidedFeeds, keepDecided, skippedAttention } from './decided.js';
import type { DraftLength } from './draft.js';

export interface SampledToken {
  token: number;
  /** Under the model's distribution before temperature, top-k and top-p. */
  logprob: number;
}

/** Rows that a sequence wants to append in one run. */
export interface Work {
  readonly keys: SequenceKeys;
  readonly point: OperatingPoint;
  /** Its number (`adapterNumber`). */
  readonly adapter: number;
  readonly ids: Int32Array;
  /** Position of the first of them in its text. */
  readonly start: number;
  /** Temperature, top-k, top-p and a random number of every token sampled: those after the last rows. */
  readonly sampling: readonly (readonly number[])[];
  readonly signal: AbortSignal;
}

/** What became of it. */
export interface Done {
  readonly tokens: SampledToken[];
  /** Its share of what the run counted. */
  readonly counted: Pick<RunResult, 'counters' | 'dims'>;
  /** Whether the run's program had run before: a first run takes longer. */
  readonly warm: boolean;
}

interface Pending<Asked, Given> {
  readonly asked: Asked;
  resolve(given: Given): void;
  reject(reason: unknown): void;
}

/** A sequence that is to be bound with pages for `rows` rows. */
interface Admission {
  readonly keys: SequenceKeys;
  readonly rows: number;
  readonly signal: AbortSignal;
}

/** Work of so few rows goes before further chunks of prompts: tokens of running sequences, and drafts to verify. */
const fewRows = maxDraftTokens + 1;
/** Budgets that come and go make many mixes of a few, each with a program of its own. */
const keptPrograms = 16;

export class Scheduler {
  readonly cache: KeyValueCache;
  /** What speculative decoding learnt, by budget and draft. */
  readonly draftLengths = new Map<string, DraftLength>();
  readonly #network: Network;
  readonly #limits: StepLimits;
  readonly #programs: ProgramCache;
  /** Programs that have run. */
  readonly #ran = new WeakSet<Program>();
  readonly #companies = new WeakMap<OperatingPoint, string>();
  readonly #slots = new Map<SequenceKeys, number>();
  /** Both from the oldest on. */
  #waiting: Pending<Admission, void>[] = [];
  #work: Pending<Work, Done>[] = [];
  #turning = false;

  constructor(network: Network) {
    const { maxSequences, maxBatchTokens, kvCacheBytes } = network.limits;
    this.#network = network;
    this.#programs = new ProgramCache(network, keptPrograms);
    this.cache = new KeyValueCache(network, maxSequences, kvCacheBytes);
    this.#limits = { rows: maxBatchTokens, sequences: maxSequences, sampled: Math.max(maxSequences, fewRows) };
  }

  get load(): ModelLoad {
    const { size, free, pageBytes } = this.cache;
    return {
      running: this.#slots.size,
      waiting: this.#waiting.length,
      kvCacheBytes: size * pageBytes,
      kvCacheUsed: (size - free) * pageBytes,
    };
  }

  /**
   * Throws InvalidArgumentError where a sequence of so many rows would not fit an empty cache.
   */
  requireFits(api: string, point: OperatingPoint, rows: number): void {
    const { cache } = this;
    const needed = cache.missing(cache.open(point), rows);
    if (needed <= cache.size) return;
    throw new InvalidArgumentError(
      `[${api}] ${rows} tokens need ${needed * cache.pageBytes} bytes of keys and values, and kvCacheBytes leaves ${cache.size * cache.pageBytes}; shorten the prompt, lower maxTokens, or load the model with a larger kvCacheBytes`,
    );
  }

  /**
   * Waits until a sequence can run and has pages for `rows` rows; those who came first go first.
   *
   * @throws OutOfMemoryError when pages are missing that nothing that runs will give back
   * @throws the signal's reason
   */
  admit(keys: SequenceKeys, rows: number, signal: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#waiting.push({ asked: { keys, rows, signal }, resolve, reject });
      this.#wake();
    });
  }

  /** Ends what `admit` began; the rows stay. */
  leave(keys: SequenceKeys): void {
    const slot = this.#slots.get(keys);
    if (slot === undefined) return;
    this.#slots.delete(keys);
    this.cache.unbind(slot);
    this.cache.trim(keys);
    this.#wake();
  }

  /** Runs the work of an admitted sequence, in a run with that of others. */
  run(work: Work): Promise<Done> {
    return new Promise((resolve, reject) => {
      this.#work.push({ asked: work, resolve, reject });
      this.#wake();
    });
  }

  dispose(): void {
    this.#programs.dispose();
    this.cache.dispose();
  }

  #wake(): void {
    if (this.#turning) return;
    this.#turning = true;
    void this.#turn();
  }

  async #turn(): Promise<void> {
    for (let busy = true; busy; ) {
      // Lets every sequence say what it wants next after what it got.
      await setImmediate();
      this.#work = dropAborted(this.#work);
      this.#waiting = dropAborted(this.#waiting);
      busy = (await this.#admitWaiting()) || this.#work.length > 0;
      if (this.#work.length > 0) await this.#execute(this.#choose());
    }
    this.#turning = false;
  }

  /** Whether any could be. */
  async #admitWaiting(): Promise<boolean> {
    let admitted = false;
    for (;;) {
      const [next] = this.#waiting;
      if (!next || this.#slots.size === this.#limits.sequences) return admitted;
      const { keys, rows } = next.asked;
      const missing = this.cache.missing(keys, rows) - this.cache.free;
      if (missing > 0 && this.#slots.size > 0) return admitted;
      this.#waiting.shift();
      try {
        if (missing > 0) {
          throw new OutOfMemoryError(
            `[generate] ${rows} tokens need ${missing * this.cache.pageBytes} bytes of keys and values more than are free, and nothing that runs will free any; dispose of prefilled sequences, or load the model with a larger kvCacheBytes`,
          );
        }
        await this.cache.reserve(keys, rows);
        this.#slots.set(keys, this.cache.bind(keys));
        next.resolve();
        admitted = true;
      } catch (error) {
        next.reject(error);
      }
    }
  }

  // The oldest work, and what may share its run: first what has few rows, then chunks of prompts, from the oldest on. What
  // does not fit now is older next time, so nobody waits for ever.
  #choose(): Pending<Work, Done>[] {
    const [oldest, ...others] = this.#work;
    const company = this.#companyOf(oldest.asked.point);
    const few = ({ asked }: Pending<Work, Done>) => asked.ids.length <= fewRows;
    const chosen = new Set<Pending<Work, Done>>();
    const left = { rows: this.#limits.rows, sampled: this.#limits.sampled };
    const widths = new RunWidths(this.#network);
    for (const pending of [oldest, ...others.filter(few), ...others.filter((other) => !few(other))]) {
      const { point, ids, sampling } = pending.asked;
      if (ids.length > left.rows || sampling.length > left.sampled || this.#companyOf(point) !== company) continue;
      if (!widths.join(point)) continue;
      left.rows -= ids.length;
      left.sampled -= sampling.length;
      chosen.add(pending);
    }
    this.#work = this.#work.filter((pending) => !chosen.has(pending));
    return [...chosen];
  }

  #companyOf(point: OperatingPoint): string {
    const known = this.#companies.get(point) ?? cachedCompany(this.#network, point);
    this.#companies.set(point, known);
    return known;
  }

  async #execute(chosen: readonly Pending<Work, Done>[]): Promise<void> {
    const stop = new AbortController();
    const stopWhenAlone = () => {
      if (chosen.every(({ asked }) => asked.signal.aborted)) stop.abort();
    };
    for (const { asked } of chosen) asked.signal.addEventListener('abort', stopWhenAlone);
    try {
      const done = await this.#step(
        chosen.map(({ asked }) => asked),
        stop.signal,
      );
      for (const [i, { resolve }] of chosen.entries()) resolve(done[i]);
    } catch (error) {
      for (const { asked, reject } of chosen) reject(asked.signal.aborted ? asked.signal.reason : error);
    } finally {
      for (const { asked } of chosen) asked.signal.removeEventListener('abort', stopWhenAlone);
    }
  }

  async #step(works: readonly Work[], signal: AbortSignal): Promise<Done[]> {
    const network = this.#network;
    const joint = jointDecisions(network, works);
    const chooses = [...joint.thresholds.values()].some(Number.isFinite);
    // Alone, with keys of every row, it is known what was appended and whose work it was.
    const recorded = chooses && (works.length > 1 || !keepsEveryRow(network, works[0].point));
    const program = this.#programs.get(recorded ? 'recorded step' : 'step', joint, () =>
      compileStep(network, this.cache, this.#limits, joint, recorded),
    );
    const batch = packedBatch(works);
    const positions = works.flatMap(({ ids, start }) => Array.from(ids, (_, i) => start + i));
    const last = works.flatMap(({ sampling }, s) => sampling.map((_, i) => batch.offsets[s + 1] - sampling.length + i));
    const decided = works.map(({ keys }) => keys.decided);
    this.cache.sync();
    const result = await program.run({
      dims: { ...packedDims(batch), sampled: last.length, ...jointDims(network, joint) },
      feeds: {
        ...batch,
        ...decisionFeeds(network, joint, works),
        ...decidedFeeds(network, joint, decided),
        ...adapterFeeds(
          network,
          works.map(({ adapter }) => adapter),
        ),
        positions: Int32Array.from(positions),
        slots: Int32Array.from(works, ({ keys }) => this.#slots.get(keys)!),
        last: Int32Array.from(last),
        sampling: Float32Array.from(works.flatMap(({ sampling }) => sampling.flat())),
      },
      signal,
    });
    const warm = this.#ran.has(program);
    this.#ran.add(program);
    const counters =
      works.length === 1
        ? [result.counters]
        : sequenceCounters(network, batch, joint, result, works, {
            headRows: (s) => works[s].sampling.length,
            cached: (s, layer, part) => works[s].keys.rows[layer * network.spec.kvHeads + part],
          });
    for (const [s, appended] of appendedRows(network, batch, joint, result).entries()) {
      for (const [list, rows] of appended.entries()) works[s].keys.rows[list] += rows;
    }
    keepDecided(
      network,
      joint,
      result,
      works.map(({ keys, point }) => ({ decided: keys.decided, point })),
    );
    for (const { keys } of works) {
      for (const layer of skippedAttention(network, keys.point, keys.decided)) {
        if (keys.parts[layer] > 0) this.cache.close(keys, layer);
      }
    }
    const { token, logprob } = result.outputs;
    let at = 0;
    return works.map(({ sampling, point }, s) => {
      const tokens = sampling.map(() => ({ token: token[at], logprob: logprob[at++] }));
      return { tokens, counted: { counters: counters[s], dims: budgetDims(network, point) }, warm };
    });
  }
}

/** Those whose signal is not aborted; the others are told. */
function dropAborted<T extends Pending<{ signal: AbortSignal }, never>>(all: readonly T[]): T[] {
  return all.filter(({ asked: { signal }, reject }) => {
    if (signal.aborted) reject(signal.reason);
    return !signal.aborted;
  });
}
