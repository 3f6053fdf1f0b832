// Keys and values of all sequences of a model, in pages of one pool, and the tables that say which page holds which rows.
import type { OperatingPoint } from '../../elastic/budget.js';
import { type Cache, Graph, type Node, Program, pageCopy } from '../../graph/index.js';
import { Tensor } from '../../native/index.js';
import { keysAt } from '../mixed.js';
import type { Network } from '../network.js';
import { maxDraftTokens } from '../programs.js';
import { type Decided, takeBack } from './decided.js';
import { PagePool } from './pages.js';

/** Rows of a page, of one layer: few are left unused at the end of a sequence, and a kernel finds enough side by side. */
export const pageRows = 16;

/**
 * What one sequence has in the pool: only of layers that run attention at its budget. A layer whose heads are routed is cut
 * into parts, each with pages and a number of rows of its own; part p of layer l is list `l * kvHeads + p`.
 */
export interface SequenceKeys {
  /** The budget of its keys: drafts at others leave none behind. */
  readonly point: OperatingPoint;
  /** Into how many parts each layer is cut, [layers]; 0: it has no keys. */
  readonly parts: number[];
  /** Pages of every list, in turn: after the last comes the first again. A page of a part holds `pageRows * parts` of its rows, in the same bytes. */
  readonly pages: readonly number[][];
  /** What routers decided about it, for its further runs. */
  readonly decided: Decided;
  /** Rows held of every list. They differ: routed layers may hold only rows that entered, and heads those that chose them. */
  readonly rows: Int32Array;
}

/** A list of pages of a sequence. */
interface PageList {
  readonly index: number;
  readonly pages: number[];
  /** Rows held, and rows that a page holds. */
  readonly rows: number;
  readonly perPage: number;
  /** Pages at most. */
  readonly most: number;
}

const pagesOf = (rows: number, perPage: number): number => Math.ceil(rows / perPage);

type Limited = Pick<Network, 'spec' | 'maxContext'> & { limits: Pick<Network['limits'], 'chunkRows'> };

/** Pages of a list at most, of a layer in so many parts. */
type PageLimit = (layer: number, parts: number) => number;

/**
 * Of layers with windows rows that every window has passed are overwritten: there are pages for what the rows of a run see, and
 * for as many more as drafts append before they are taken back.
 */
function pageLimit({ spec, maxContext, limits }: Limited): PageLimit {
  const drafted = maxDraftTokens + 1;
  const rows = spec.perLayer.map((_, layer) => {
    const windows = spec.perLayer.filter(({ keysOf }, at) => (keysOf ?? at) === layer).map(({ window }) => window);
    return windows.includes(0) ? maxContext : Math.max(...windows) + Math.max(limits.chunkRows, drafted) + drafted;
  });
  return (layer, parts) => {
    const perPage = pageRows * parts;
    // The first of these rows may be the last of its page.
    return Math.min(pagesOf(maxContext, perPage), pagesOf(rows[layer], perPage) + 1);
  };
}

export class KeyValueCache {
  readonly #network: Network;
  readonly #slots: (SequenceKeys | null)[];
  readonly #pool: PagePool;
  readonly #pageLimit: PageLimit;
  #tensors: CacheTensors | null = null;

  /** @param sequences how many can be bound at a time */
  constructor(network: Network, sequences: number, bytes: number) {
    this.#network = network;
    this.#slots = new Array<null>(sequences).fill(null);
    this.#pool = new PagePool(Math.floor(bytes / pageBytes(network)));
    this.#pageLimit = pageLimit(network);
  }

  /** Pages in all, and those that nobody owns. */
  get size(): number {
    return this.#pool.size;
  }
  get free(): number {
    return this.#pool.free;
  }

  /** Bytes of keys and values that a page holds. */
  get pageBytes(): number {
    return pageBytes(this.#network);
  }

  /** A sequence without rows, at a budget. */
  open(point: OperatingPoint): SequenceKeys {
    const { spec } = this.#network;
    const lists = spec.layers * spec.kvHeads;
    return {
      point,
      parts: Array.from({ length: spec.layers }, (_, layer) => keysAt(this.#network, point, layer)?.parts ?? 0),
      pages: Array.from({ length: lists }, () => []),
      rows: new Int32Array(lists),
      decided: new Map(),
    };
  }

  /** Pages that a sequence does not own yet and needs to hold so many rows in every list. */
  missing(keys: SequenceKeys, rows: number): number {
    return this.#lists(keys).reduce((sum, list) => sum + lacking(list, rows) + this.#shared(list, rows).length, 0);
  }

  /**
   * Gives a sequence the pages that are missing, all its own where rows are to be appended. No run may be under way.
   * @throws OutOfMemoryError where the pool, whose first use this is, cannot be allocated
   */
  async reserve(keys: SequenceKeys, rows: number): Promise<void> {
    const tensors = this.#bound();
    const lists = this.#lists(keys);
    const shared = lists.flatMap((list) => this.#shared(list, rows).map((at) => ({ pages: list.pages, at })));
    if (shared.length > 0) {
      const own = this.#pool.take(shared.length);
      try {
        const from = shared.map(({ pages, at }) => pages[at]);
        await tensors.copyPages(from, own);
        for (const [i, { pages, at }] of shared.entries()) pages[at] = own[i];
        this.#pool.release(from);
      } catch (error) {
        this.#pool.release(own);
        throw error;
      }
    }
    for (const list of lists) list.pages.push(...this.#pool.take(lacking(list, rows)));
  }

  /** Gives back pages that hold nothing. */
  trim(keys: SequenceKeys): void {
    for (const { pages, rows, perPage } of this.#lists(keys)) this.#pool.release(pages.splice(pagesOf(rows, perPage)));
  }

  /** Another sequence with the same rows; both own their pages. */
  fork(keys: SequenceKeys): SequenceKeys {
    this.trim(keys);
    for (const pages of keys.pages) this.#pool.share(pages);
    const { point, parts, pages, rows, decided } = keys;
    return {
      point,
      parts: [...parts],
      pages: pages.map((own) => [...own]),
      rows: rows.slice(),
      decided: new Map(decided),
    };
  }

  /** Gives back the pages of a layer whose attention the sequence has skipped, and will. */
  close(keys: SequenceKeys, layer: number): void {
    for (const { index, pages } of this.#lists(keys)) {
      if (Math.floor(index / this.#network.spec.kvHeads) === layer) this.#pool.release(pages.splice(0));
    }
    keys.parts[layer] = 0;
  }

  /** Gives back all pages. */
  release(keys: SequenceKeys): void {
    keys.rows.fill(0);
    this.trim(keys);
  }

  /** Forgets rows that came since the sequence was bound, where every row has keys in each layer that has pages. */
  truncate(keys: SequenceKeys, rows: number): void {
    for (const { index } of this.#lists(keys)) keys.rows[index] = rows;
    takeBack(keys.decided, rows);
    if (this.#tensors) this.#tensors.staleLengths = true;
  }

  /** Makes a sequence known to programs by a number, its slot. */
  bind(keys: SequenceKeys): number {
    const slot = this.#slots.indexOf(null);
    this.#bound().setPages(slot, keys);
    this.#slots[slot] = keys;
    return slot;
  }

  unbind(slot: number): void {
    this.#slots[slot] = null;
  }

  /** Writes what changed of the tables. No run may be under way. */
  sync(): void {
    this.#bound().write(this.#slots);
  }

  /** The caches of a layer in so many parts, as state of a graph whose segments are the sequences in `slots`, i32 [S]. */
  caches(graph: Graph, slots: Node): (layer: number, parts: number) => Cache[] {
    return this.#bound().caches(graph, slots);
  }

  dispose(): void {
    this.#tensors?.dispose();
    this.#tensors = null;
  }

  /** Allocated when the first sequence runs: reading texts needs none. */
  #bound(): CacheTensors {
    this.#tensors ??= new CacheTensors(this.#network, this.#slots.length, this.#pool.size, this.#pageLimit);
    return this.#tensors;
  }

  #lists({ parts, pages, rows }: SequenceKeys): PageList[] {
    const { kvHeads } = this.#network.spec;
    return parts.flatMap((count, layer) =>
      Array.from({ length: count }, (_, part) => {
        const index = layer * kvHeads + part;
        const most = this.#pageLimit(layer, count);
        return { index, pages: pages[index], rows: rows[index], perPage: pageRows * count, most };
      }),
    );
  }

  /** Where in a list the pages are that rows up to so many would go to though others own them, too. */
  #shared({ pages, rows: held, perPage, most }: PageList, rows: number): number[] {
    const first = Math.floor(held / perPage);
    const written = Array.from(
      { length: Math.min(most, pagesOf(rows, perPage) - first) },
      (_, i) => (first + i) % most,
    );
    return written.filter((at) => at < pages.length && this.#pool.shared(pages[at]));
  }
}

/** Pages that a list has yet to get to hold so many rows. */
const lacking = ({ pages, perPage, most }: PageList, rows: number): number =>
  Math.max(0, Math.min(most, pagesOf(rows, perPage)) - pages.length);

/** The pool and the tables in native memory. Tables are written as a whole: they are small, and change when sequences come. */
class CacheTensors {
  /** Lengths on the host are ahead of those that programs see. */
  staleLengths = false;
  readonly #network: Network;
  readonly #slots: number;
  readonly #pageLimit: PageLimit;
  /** f32 [pages, pageRows, width], and the same memory as [pages, pageRows * parts, width / parts]. */
  readonly #k: Tensor;
  readonly #v: Tensor;
  /** i32 [layers * kvHeads, slots]: lists in the order of SequenceKeys. */
  readonly #lengths: Tensor;
  /** i32 [layers * kvHeads, slots, pages of a list] of layers in so many parts; null: no layer is ever cut. */
  readonly #whole: Table;
  readonly #cut: Table | null;
  readonly #views = new Map<string, Tensor>();
  #copy: Program | null = null;

  constructor(network: Network, slots: number, pages: number, limit: PageLimit) {
    const { spec, policy, maxContext } = network;
    this.#network = network;
    this.#slots = slots;
    this.#pageLimit = limit;
    const shape = [pages, pageRows, spec.kvHeads * spec.headDim];
    this.#k = Tensor.alloc('f32', shape);
    this.#v = Tensor.alloc('f32', shape);
    this.#lengths = Tensor.alloc('i32', [spec.layers * spec.kvHeads, slots]);
    this.#whole = new Table(spec.layers, slots, pagesOf(maxContext, pageRows));
    const cut = policy?.heads && spec.kvHeads > 1;
    this.#cut = cut ? new Table(spec.layers * spec.kvHeads, slots, pagesOf(maxContext, pageRows * spec.kvHeads)) : null;
  }

  setPages(slot: number, { parts, pages }: SequenceKeys): void {
    const { kvHeads } = this.#network.spec;
    const own = (count: number, list: number): readonly number[] => {
      const layer = Math.floor(list / kvHeads);
      if (parts[layer] !== count) return [];
      const most = this.#pageLimit(layer, count);
      const all = pagesOf(this.#network.maxContext, pageRows * count);
      return pages[list].length < most ? pages[list] : Array.from({ length: all }, (_, i) => pages[list][i % most]);
    };
    for (let layer = 0; layer < parts.length; layer++) this.#whole.set(layer, slot, own(1, layer * kvHeads));
    for (let list = 0; this.#cut && list < pages.length; list++) this.#cut.set(list, slot, own(kvHeads, list));
    this.staleLengths = true;
  }

  write(slots: readonly (SequenceKeys | null)[]): void {
    this.#whole.write();
    this.#cut?.write();
    if (!this.staleLengths) return;
    this.staleLengths = false;
    const lengths = new Int32Array(this.#lengths.size);
    for (const [slot, keys] of slots.entries()) {
      for (const [list, rows] of keys?.rows.entries() ?? []) lengths[list * this.#slots + slot] = rows;
    }
    this.#lengths.write(lengths);
  }

  caches(graph: Graph, slots: Node): (layer: number, parts: number) => Cache[] {
    const { spec } = this.#network;
    return (layer, parts) => {
      const pool = [this.#k.shape[0], pageRows * parts, (spec.kvHeads * spec.headDim) / parts];
      return Array.from({ length: parts }, (_, part) => {
        const list = layer * spec.kvHeads + part;
        const table = parts === 1 ? this.#whole : this.#cut!;
        return {
          slots,
          lengths: graph.state(this.#view(`lengths ${list}`, this.#lengths, list * this.#slots, [this.#slots])),
          pages: graph.state(table.of(parts === 1 ? layer : list)),
          k: graph.state(this.#view(`k ${parts}`, this.#k, 0, pool)),
          v: graph.state(this.#view(`v ${parts}`, this.#v, 0, pool)),
        };
      });
    };
  }

  async copyPages(from: readonly number[], to: readonly number[]): Promise<void> {
    this.#copy ??= this.#compileCopy();
    const feeds = { from: Int32Array.from(from), to: Int32Array.from(to) };
    await this.#copy.run({ dims: { pages: from.length }, feeds });
  }

  #compileCopy(): Program {
    const { engine } = this.#network;
    const graph = new Graph();
    const pages = graph.dim('pages', this.#k.shape[0]);
    const pools = { k: graph.state(this.#k), v: graph.state(this.#v) };
    pageCopy(graph.feed('from', 'i32', [pages]), graph.feed('to', 'i32', [pages]), pools);
    return Program.compile(graph, engine);
  }

  dispose(): void {
    for (const owned of [this.#copy, ...this.#views.values(), this.#k, this.#v, this.#lengths, this.#whole, this.#cut])
      owned?.dispose();
  }

  #view(name: string, tensor: Tensor, offset: number, shape: readonly number[]): Tensor {
    const view = this.#views.get(name) ?? tensor.slice(offset, shape);
    this.#views.set(name, view);
    return view;
  }
}

/** Pages of lists, by list and slot. */
class Table {
  readonly #tensor: Tensor;
  readonly #lists: readonly Tensor[];
  readonly #host: Int32Array;
  readonly #slots: number;
  readonly #perList: number;
  #stale = false;

  constructor(lists: number, slots: number, perList: number) {
    this.#tensor = Tensor.alloc('i32', [lists, slots, perList]);
    this.#lists = Array.from({ length: lists }, (_, i) => this.#tensor.slice(i * slots * perList, [slots, perList]));
    this.#host = new Int32Array(this.#tensor.size);
    this.#slots = slots;
    this.#perList = perList;
  }

  /** Of one list, i32 [slots, pages of a list]. */
  of(list: number): Tensor {
    return this.#lists[list];
  }

  /** The pages of a slot; -1 where there is none, which programs refuse to use. */
  set(list: number, slot: number, pages: readonly number[]): void {
    const start = (list * this.#slots + slot) * this.#perList;
    this.#host.fill(-1, start, start + this.#perList);
    this.#host.set(pages, start);
    this.#stale = true;
  }

  write(): void {
    if (this.#stale) this.#tensor.write(this.#host);
    this.#stale = false;
  }

  dispose(): void {
    for (const list of this.#lists) list.dispose();
    this.#tensor.dispose();
  }
}

function pageBytes({ spec }: Pick<Network, 'spec'>): number {
  return 2 * pageRows * spec.kvHeads * spec.headDim * Float32Array.BYTES_PER_ELEMENT;
}

/** Bytes of the default that several sequences may share. */
const sharedBytes = 2 ** 30;

/** One whole context always fits, and of several as many as `sharedBytes` hold. */
export function defaultCacheBytes(model: Limited & Pick<Network, 'policy'>, sequences: number): number {
  const { spec, policy } = model;
  const limit = pageLimit(model);
  // Whole, or cut into parts each of which may have pages that are not full.
  const pages = spec.perLayer.map(({ keysOf }, layer) => {
    if (keysOf !== null) return 0;
    return Math.max(...[1, policy?.heads ? spec.kvHeads : 1].map((parts) => parts * limit(layer, parts)));
  });
  const context = pages.reduce((sum, count) => sum + count, 0) * pageBytes({ spec });
  return Math.max(context, Math.min(sequences * context, sharedBytes));
}
