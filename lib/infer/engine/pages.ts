// Which pages of a pool are taken, and by how many: sequences with a common beginning own its pages together.
import { InternalError } from '../../native/errors.js';

export class PagePool {
  /** Pages in all. */
  readonly size: number;
  /** How many own each page. */
  readonly #owners: Uint32Array;
  /** Free pages; the last is taken next, so that low ones are used again before others are touched at all. */
  readonly #free: number[];

  constructor(size: number) {
    this.size = size;
    this.#owners = new Uint32Array(size);
    this.#free = Array.from({ length: size }, (_, i) => size - 1 - i);
  }

  get free(): number {
    return this.#free.length;
  }

  /** Pages that have one owner now. The caller has asked for no more than are free. */
  take(count: number): number[] {
    if (count > this.free) throw new InternalError(`[pages] ${count} pages asked for, and ${this.free} are free`);
    return Array.from({ length: count }, () => {
      const page = this.#free.pop()!;
      this.#owners[page] = 1;
      return page;
    });
  }

  /** One more owner for each. */
  share(pages: readonly number[]): void {
    for (const page of pages) {
      this.#requireOwned(page);
      this.#owners[page]++;
    }
  }

  /** One owner less for each; pages of the last one are free. */
  release(pages: readonly number[]): void {
    for (const page of pages) {
      this.#requireOwned(page);
      if (--this.#owners[page] === 0) this.#free.push(page);
    }
  }

  /** Whether a page has several owners: none of them may write to it. */
  shared(page: number): boolean {
    return this.#owners[page] > 1;
  }

  #requireOwned(page: number): void {
    if (!(this.#owners[page] > 0)) throw new InternalError(`[pages] page ${page} belongs to nobody`);
  }
}
