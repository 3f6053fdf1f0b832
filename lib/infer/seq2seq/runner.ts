// Runs what generations of an encoder-decoder model want next, packed into common runs, in turns.
import { setImmediate } from 'node:timers/promises';
import { sourceCapacityFeeds, sourceKey } from '../../elastic/source_routing.js';
import { Graph, KeptPrograms, Program, type RunResult, sample } from '../../graph/index.js';
import { cacheSource, decodeTarget, encodeSource, targetLogits } from '../../model/seq2seq.js';
import { DisposedError, InvalidArgumentError } from '../../native/errors.js';
import type { Assembled, Seq2SeqNetwork } from './network.js';
import { PagedKeys } from './paged_keys.js';

/** Rows of sources of a run of several, or of one that is longer. */
const packedRows = 1024;
/** Rows of a page of sources. Those of targets have one each: beams exchange them without copies. */
const sourcePageRows = 16;

/** Programs that are kept: three of every assembly. */
const keptPrograms = 48;

/** Places of the hypotheses of one generation, and the pages that they own. */
export interface Places {
  readonly model: Assembled;
  readonly slots: readonly number[];
  readonly sourcePages: readonly number[];
  /** Of every slot, a page for each row of its target that is there or is to come next. */
  readonly targetPages: number[][];
  /** Pages of targets that are kept for it. */
  readonly reserved: number;
}

/** One token of a target that is to be run. */
export interface TargetRow {
  readonly slot: number;
  readonly token: number;
  readonly position: number;
  /** Temperature, top-k, top-p and a random number; null: logits are wanted. */
  readonly sampling: readonly number[] | null;
}

/** What a row gave: a token and its log-probability under the model's distribution, or logits f32 [vocab]. */
export type RowResult = { readonly token: number; readonly logprob: number } | { readonly logits: Float32Array };

/** What a run counted, of which a part is one generation's: as many rows as `share` of the run's FLOPs. */
export interface Ran<T> {
  readonly results: readonly T[];
  readonly run: RunResult;
  readonly rows: number;
}

interface SourceWork {
  readonly kind: 'source';
  readonly model: Assembled;
  readonly slot: number;
  readonly ids: readonly number[];
  readonly signal: AbortSignal;
}
interface TargetWork {
  readonly kind: 'sampled' | 'logits';
  readonly model: Assembled;
  readonly rows: readonly TargetRow[];
  readonly signal: AbortSignal;
}
type Work = SourceWork | TargetWork;

interface Pending<W, T> {
  readonly asked: W;
  resolve(value: T): void;
  reject(reason: unknown): void;
}
interface Admission {
  readonly model: Assembled;
  readonly beams: number;
  readonly source: number;
  readonly target: number;
  readonly signal: AbortSignal;
}

export class Seq2SeqRunner implements Disposable {
  readonly #network: Seq2SeqNetwork;
  readonly #programs = new KeptPrograms(keptPrograms);
  readonly #freeSlots: number[];
  #keys: { readonly source: PagedKeys; readonly target: PagedKeys } | null = null;
  #reserved = 0;
  #waiting: Pending<Admission, Places>[] = [];
  #work: Pending<Work, Ran<RowResult>>[] = [];
  #turning = false;
  #disposed = false;

  constructor(network: Seq2SeqNetwork) {
    this.#network = network;
    this.#freeSlots = Array.from({ length: network.maxSequences }, (_, i) => network.maxSequences - 1 - i);
  }

  /** Throws InvalidArgumentError for what would not fit empty caches. */
  requireFits(beams: number, source: number, target: number): void {
    const { maxSequences, cacheRows } = this.#network;
    if (beams > maxSequences) {
      throw new InvalidArgumentError(
        `[generate] ${beams} beams need as many sequences, and the model was loaded with maxSequences ${maxSequences}`,
      );
    }
    const pages = Math.floor(cacheRows / sourcePageRows);
    if (beams * target <= cacheRows && Math.ceil(source / sourcePageRows) <= pages) return;
    throw new InvalidArgumentError(
      `[generate] ${beams} beams of ${target} tokens for a source of ${source} need more than the ${cacheRows} rows that kvCacheBytes leaves for targets, or for sources; lower maxTokens or beams, or load the model with a larger kvCacheBytes`,
    );
  }

  /** Waits until as many hypotheses as beams have places, for a source and targets of so many tokens; first come, first served. */
  admit(asked: Admission): Promise<Places> {
    return new Promise((resolve, reject) => {
      this.#waiting.push({ asked, resolve, reject });
      this.#wake();
    });
  }

  /** Ends what `admit` began. */
  leave({ slots, sourcePages, targetPages, reserved }: Places): void {
    const { source, target } = this.#bound();
    source.pool.release(sourcePages);
    for (const pages of targetPages) target.pool.release(pages);
    this.#freeSlots.push(...slots);
    this.#reserved -= reserved;
    this.#wake();
  }

  /** Reads a source, whose keys and values all slots of its places see then. */
  async read(places: Places, ids: readonly number[], signal: AbortSignal): Promise<Ran<RowResult>> {
    const ran = await this.#run({ kind: 'source', model: places.model, slot: places.slots[0], ids, signal });
    for (const slot of places.slots) this.#bound().source.set(slot, places.sourcePages, ids.length);
    return ran;
  }

  /** Runs one token of some targets of a generation, each after those that its slot holds. */
  step({ model }: Places, rows: readonly TargetRow[], signal: AbortSignal): Promise<Ran<RowResult>> {
    const kind = rows.every(({ sampling }) => sampling !== null) ? 'sampled' : 'logits';
    return this.#run({ kind, model, rows, signal });
  }

  /** Slot i goes on with the target that slot `parents[i]` has; each of `length` tokens. */
  exchange(places: Places, parents: readonly number[], length: number): void {
    const { target } = this.#bound();
    const before = places.targetPages.map((pages) => pages.slice());
    for (const parent of parents) target.pool.share(before[parent].slice(0, length));
    for (const pages of before) target.pool.release(pages);
    for (const [i, slot] of places.slots.entries()) {
      places.targetPages[i] = [...before[parents[i]].slice(0, length), ...target.pool.take(1)];
      target.set(slot, places.targetPages[i], length);
    }
  }

  /** One token for logits, f32 [vocab], of which some may be minus infinity. */
  async choose(logits: Float32Array, sampling: readonly number[]): Promise<number> {
    const { outputs } = await this.#chooser().run({
      dims: {},
      feeds: { logits, sampling: Float32Array.from(sampling) },
    });
    return (outputs.token as Int32Array)[0];
  }

  dispose(): void {
    this.#disposed = true;
    this.#programs.dispose();
    this.#keys?.source.dispose();
    this.#keys?.target.dispose();
    this.#keys = null;
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  /** Allocated when the first source is read. */
  #bound() {
    if (this.#disposed) throw new DisposedError('[model] it was disposed');
    const { spec, maxSequences: slots, maxContext: slotRows, cacheRows: rows } = this.#network;
    const { layers, kvHeads, headDim } = spec.decoder;
    const shape = { layers, width: kvHeads * headDim, slots, slotRows, rows };
    this.#keys ??= {
      source: new PagedKeys({ ...shape, pageRows: sourcePageRows, rows: Math.max(rows, sourcePageRows) }),
      target: new PagedKeys({ ...shape, pageRows: 1 }),
    };
    return this.#keys;
  }

  #run(asked: Work): Promise<Ran<RowResult>> {
    return new Promise((resolve, reject) => {
      this.#work.push({ asked, resolve, reject });
      this.#wake();
    });
  }

  #wake(): void {
    if (this.#turning) return;
    this.#turning = true;
    void this.#turn();
  }

  async #turn(): Promise<void> {
    do {
      // Lets every generation say what it wants next after what it got; where there is only one, it has said it.
      if (!this.#alone()) await setImmediate();
      this.#work = this.#work.filter(stillWanted);
      this.#waiting = this.#waiting.filter(stillWanted);
      this.#admitWaiting();
      for (const kind of ['source', 'sampled', 'logits'] as const) {
        const chosen = this.#choose(kind);
        if (chosen.length > 0) await this.#execute(kind, chosen);
      }
    } while (this.#work.length > 0);
    this.#turning = false;
  }

  /** Whether all hypotheses that have places are in the one piece of work there is. */
  #alone(): boolean {
    const [only] = this.#work;
    if (this.#work.length !== 1 || this.#waiting.length > 0 || only.asked.kind === 'source') return false;
    return only.asked.rows.length === this.#network.maxSequences - this.#freeSlots.length;
  }

  #admitWaiting(): void {
    for (;;) {
      const [next] = this.#waiting;
      if (!next) return;
      try {
        const { source, target } = this.#bound();
        const { model, beams, source: sourceRows, target: targetRows } = next.asked;
        const pages = source.pagesOf(sourceRows);
        const reserved = beams * targetRows;
        if (beams > this.#freeSlots.length || pages > source.pool.free) return;
        if (reserved > target.pool.size - this.#reserved) return;
        this.#waiting.shift();
        this.#reserved += reserved;
        const slots = this.#freeSlots.splice(-beams);
        const sourcePages = source.pool.take(pages);
        // A single target gets all of its pages at once, so that tables change no more.
        const targetPages = slots.map(() => target.pool.take(beams === 1 ? targetRows : 1));
        for (const [i, slot] of slots.entries()) {
          source.set(slot, sourcePages, 0);
          target.set(slot, targetPages[i], 0);
        }
        next.resolve({ model, slots, sourcePages, targetPages, reserved });
      } catch (error) {
        this.#waiting.shift();
        next.reject(error);
      }
    }
  }

  /** Of one kind the oldest work, and what of the same settings fits its run. */
  #choose(kind: Work['kind']): Pending<Work, Ran<RowResult>>[] {
    let left = kind === 'source' ? this.#sourceRows() : this.#network.maxSequences;
    const keyOf = ({ model: { key, capacities } }: Work) =>
      kind === 'source' ? `${key} ${sourceKey(capacities)}` : key;
    const first = this.#work.find(({ asked }) => asked.kind === kind);
    const oldest = first && keyOf(first.asked);
    const chosen = this.#work.filter(({ asked }) => {
      const rows = asked.kind === 'source' ? asked.ids.length : asked.rows.length;
      if (asked.kind !== kind || keyOf(asked) !== oldest || rows > left) return false;
      left -= rows;
      return true;
    });
    this.#work = this.#work.filter((pending) => !chosen.includes(pending));
    return chosen;
  }

  #sourceRows(): number {
    return Math.max(this.#network.maxContext, packedRows);
  }

  async #execute(kind: Work['kind'], chosen: readonly Pending<Work, Ran<RowResult>>[]): Promise<void> {
    const signals = chosen.map(({ asked }) => asked.signal);
    // Work that is alone is stopped by its own signal, other work when all of it is aborted.
    const stop = signals.length > 1 ? new AbortController() : null;
    const signal = stop?.signal ?? signals[0];
    const stopWhenAlone = () => {
      if (signals.every(({ aborted }) => aborted)) stop!.abort();
    };
    if (stop) for (const one of signals) one.addEventListener('abort', stopWhenAlone);
    try {
      const { source, target } = this.#bound();
      source.sync();
      target.sync();
      const works = chosen.map(({ asked }) => asked);
      const done =
        kind === 'source'
          ? await this.#runSources(works as SourceWork[], signal)
          : await this.#runTargets(kind, works as TargetWork[], signal);
      for (const [i, { resolve }] of chosen.entries()) resolve(done[i]);
    } catch (error) {
      this.#keys?.source.invalidate();
      this.#keys?.target.invalidate();
      for (const { asked, reject } of chosen) reject(asked.signal.aborted ? asked.signal.reason : error);
    } finally {
      if (stop) for (const one of signals) one.removeEventListener('abort', stopWhenAlone);
    }
  }

  async #runSources(works: readonly SourceWork[], signal: AbortSignal): Promise<Ran<RowResult>[]> {
    const offsets = Int32Array.from({ length: works.length + 1 });
    for (const [s, { ids }] of works.entries()) offsets[s + 1] = offsets[s] + ids.length;
    const rows = offsets[works.length];
    const { model } = works[0];
    const run = await this.#program('source', model).run({
      dims: { rows, segments: works.length, offsets: works.length + 1, ...model.dims },
      feeds: {
        ids: Int32Array.from(works.flatMap(({ ids }) => ids)),
        positions: Int32Array.from(works.flatMap(({ ids }) => [...ids.keys()])),
        offsets,
        slots: Int32Array.from(works, ({ slot }) => slot),
        ...sourceCapacityFeeds(works.map(({ model }) => model.capacities)),
      },
      signal,
    });
    for (const { slot, ids } of works) this.#bound().source.appended(slot, ids.length);
    return works.map(() => ({ results: [], run, rows }));
  }

  async #runTargets(kind: 'sampled' | 'logits', works: readonly TargetWork[], signal: AbortSignal) {
    const rows = works.flatMap((work) => work.rows);
    const { model } = works[0];
    const run = await this.#program(kind, model).run({
      dims: { rows: rows.length, offsets: rows.length + 1, ...model.dims },
      feeds: {
        ids: Int32Array.from(rows, ({ token }) => token),
        positions: Int32Array.from(rows, ({ position }) => position),
        offsets: Int32Array.from({ length: rows.length + 1 }, (_, s) => s),
        slots: Int32Array.from(rows, ({ slot }) => slot),
        ...(kind === 'sampled' && { sampling: Float32Array.from(rows.flatMap(({ sampling }) => sampling!)) }),
      },
      signal,
    });
    for (const { slot } of rows) this.#bound().target.appended(slot, 1);
    const { outputs } = run;
    const { vocab } = this.#network.spec.decoder;
    let at = 0;
    return works.map((work) => {
      const results = work.rows.map((): RowResult => {
        const row = at++;
        return kind === 'sampled'
          ? { token: outputs.token[row], logprob: outputs.logprob[row] }
          : { logits: (outputs.logits as Float32Array).subarray(row * vocab, (row + 1) * vocab) };
      });
      return { results, run, rows: rows.length };
    });
  }

  #chooser(): Program {
    return this.#programs.get('choose', () => {
      const graph = new Graph();
      const logits = graph.feed('logits', 'f32', [1, this.#network.spec.decoder.vocab]);
      graph.output('token', sample(logits, graph.feed('sampling', 'f32', [1, 4])).ids);
      return Program.compile(graph, this.#network.engine);
    });
  }

  /**
   * `source`: appends keys and values of sources. `sampled`, `logits`: one row for each of some targets, and a token or the
   * logits after it. Layers of an assembly have the caches of as many first ones.
   */
  #program(kind: Work['kind'], { program, capacities, bind, select }: Assembled): Program {
    const { maxSequences, spec } = this.#network;
    const sources = kind === 'source';
    return this.#programs.get(`${kind} ${program}${sources ? ` ${sourceKey(capacities)}` : ''}`, () => {
      const graph = new Graph();
      const nodes = bind(graph);
      const keys = this.#bound();
      const rows = graph.dim('rows', sources ? this.#sourceRows() : maxSequences);
      const segments = sources ? graph.dim('segments', maxSequences) : rows;
      const selectors = select(graph, segments);
      const feed = (name: string, size = rows) => graph.feed(name, 'i32', [size]);
      const inputs = {
        ...{ ids: feed('ids'), positions: feed('positions') },
        offsets: feed('offsets', graph.dim('offsets', maxSequences + 1)),
      };
      const slots = feed('slots', segments);
      if (sources) {
        const features = encodeSource(graph, spec, nodes, inputs, { selector: selectors.encoder });
        cacheSource(graph, nodes, { features, offsets: inputs.offsets }, keys.source.caches(graph, slots));
        return Program.compile(graph, this.#network.engine);
      }
      const own = keys.target.caches(graph, slots);
      const caches = (layer: number) => [own(layer)];
      const seen = { caches: keys.source.caches(graph, slots) };
      const x = decodeTarget(graph, spec, nodes, { ...inputs, caches }, seen, { selector: selectors.decoder });
      const logits = targetLogits(graph, spec, nodes, x);
      if (kind === 'logits') graph.output('logits', logits);
      else {
        const { ids, logprob } = sample(logits, graph.feed('sampling', 'f32', [rows, 4]));
        graph.output('token', ids);
        graph.output('logprob', logprob);
      }
      return Program.compile(graph, this.#network.engine);
    });
  }
}

/** Whether it is; if not, whoever asked is told. */
function stillWanted<T extends Pending<{ readonly signal: AbortSignal }, never>>({ asked, reject }: T): boolean {
  if (asked.signal.aborted) reject(asked.signal.reason);
  return !asked.signal.aborted;
}
