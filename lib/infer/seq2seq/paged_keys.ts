// Keys and values of sequences in slots, the same pages in every layer.
import type { Cache, Graph, Node } from '../../graph/index.js';
import { Tensor } from '../../native/index.js';
import { PagePool } from '../engine/pages.js';

export interface PagedKeysOptions {
  readonly layers: number;
  /** Features of a row: heads of keys times their size. */
  readonly width: number;
  readonly slots: number;
  /** Rows that a slot may hold. */
  readonly slotRows: number;
  readonly pageRows: number;
  /** Rows of all pages. */
  readonly rows: number;
}

/** The caches of one stack of layers that all see the same rows. Who owns which pages is the caller's to say. */
export class PagedKeys implements Disposable {
  readonly pool: PagePool;
  readonly pageRows: number;
  readonly #options: PagedKeysOptions;
  /** f32 [pages, pageRows, width] of every layer. */
  readonly #k: Tensor[];
  readonly #v: Tensor[];
  /** i32 [layers, slots] and of every layer [slots]; i32 [slots, pages of a slot]. */
  readonly #lengths: Tensor;
  readonly #lengthsOf: Tensor[];
  readonly #table: Tensor;
  readonly #held: Int32Array;
  readonly #pages: Int32Array;
  #stale = true;

  constructor(options: PagedKeysOptions) {
    const { layers, width, slots, slotRows, pageRows, rows } = options;
    const pages = Math.ceil(rows / pageRows);
    const each = <T>(make: (layer: number) => T): T[] => Array.from({ length: layers }, (_, layer) => make(layer));
    this.#options = options;
    this.pageRows = pageRows;
    this.pool = new PagePool(pages);
    this.#k = each(() => Tensor.alloc('f32', [pages, pageRows, width]));
    this.#v = each(() => Tensor.alloc('f32', [pages, pageRows, width]));
    this.#lengths = Tensor.alloc('i32', [layers, slots]);
    this.#lengthsOf = each((layer) => this.#lengths.slice(layer * slots, [slots]));
    this.#table = Tensor.alloc('i32', [slots, Math.ceil(slotRows / pageRows)]);
    this.#held = new Int32Array(slots);
    this.#pages = new Int32Array(this.#table.size).fill(-1);
  }

  /** Pages that hold so many rows. */
  pagesOf(rows: number): number {
    return Math.ceil(rows / this.pageRows);
  }

  /** What a slot holds from now on: so many rows, in these pages, which may have room for more. */
  set(slot: number, pages: readonly number[], rows: number): void {
    const perSlot = this.#table.shape[1];
    this.#pages.fill(-1, slot * perSlot, (slot + 1) * perSlot);
    this.#pages.set(pages, slot * perSlot);
    this.#held[slot] = rows;
    this.#stale = true;
  }

  /** Programs have appended rows to a slot. */
  appended(slot: number, rows: number): void {
    this.#held[slot] += rows;
  }

  /** Writes what was set. No run may be under way. */
  sync(): void {
    if (!this.#stale) return;
    this.#stale = false;
    this.#table.write(this.#pages);
    const { layers, slots } = this.#options;
    const lengths = new Int32Array(layers * slots);
    for (let layer = 0; layer < layers; layer++) lengths.set(this.#held, layer * slots);
    this.#lengths.write(lengths);
  }

  /** A run failed: what it appended, in which layers, is not known. */
  invalidate(): void {
    this.#stale = true;
  }

  /** The cache of a layer, as state of a graph whose segments are the sequences in `slots`, i32 [S]. */
  caches(graph: Graph, slots: Node): (layer: number) => Cache {
    const pages = graph.state(this.#table);
    return (layer) => ({
      ...{ slots, pages, lengths: graph.state(this.#lengthsOf[layer]) },
      ...{ k: graph.state(this.#k[layer]), v: graph.state(this.#v[layer]) },
    });
  }

  dispose(): void {
    for (const tensor of [...this.#k, ...this.#v, ...this.#lengthsOf, this.#lengths, this.#table]) tensor.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
