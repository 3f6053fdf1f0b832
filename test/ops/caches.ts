// Caches of pages for the tests of their ops.
import type { Graph, Node } from '../../lib/graph/graph.js';
import { attentionCached, type Cache, cacheAppend, type HeadOptions } from '../../lib/graph/index.js';
import { Tensor } from '../../lib/native/index.js';
import { type inputs, random } from './harness.js';

export interface CacheShape {
  /** Rows that the segments hold. */
  past: readonly number[];
  /** Rows that a segment has pages for. */
  capacity: number;
  width: number;
  /** Rows of a page. Default: capacity. */
  pageRows?: number;
}

/** Segments in slots of which there is one more, the last ones first, whose pages lie anywhere in the pools. */
export function layout({ past, capacity, pageRows = capacity }: CacheShape) {
  const slots = past.map((_, s) => past.length - s);
  const perSlot = Math.ceil(capacity / pageRows);
  const next = random(past.length + pageRows);
  const free = Array.from({ length: past.length * perSlot + 2 }, (_, page) => ({ page, key: next() }));
  free.sort((a, b) => a.key - b.key);
  const lengths = [0, ...past].map((_, slot) => past[slots.indexOf(slot)] ?? 0);
  const pages = lengths.map((_, slot) => free.splice(0, slot > 0 ? perSlot : 0).map(({ page }) => page));
  // A page behind those there is room for is not there.
  return {
    slots,
    lengths,
    pages: pages.map((own) => Array.from({ length: perSlot + 1 }, (_, i) => own[i] ?? -1)),
    pool: past.length * perSlot + 2,
    pageRows,
  };
}

/** A cache as inputs of a case. */
export function cacheInputs(make: ReturnType<typeof inputs>, shape: CacheShape) {
  const { slots, lengths, pages, pool, pageRows } = layout(shape);
  const rows = [pool, pageRows, shape.width];
  return {
    slots: make.i32(slots, ['S', slots.length]),
    lengths: make.state('i32', lengths, lengths.length),
    pages: make.state('i32', pages.flat(), lengths.length, pages[0].length),
    poolK: make.state('f32', make.f32(...rows).data, ...rows),
    poolV: make.state('f32', make.f32(...rows).data, ...rows),
  };
}

export const cacheOf = ({ slots, lengths, pages, poolK, poolV }: Record<string, Node>): Cache => ({
  ...{ slots, lengths, pages },
  k: poolK,
  v: poolV,
});

/** A cache as tensors. */
export class TestCache implements Disposable {
  readonly lengths: Tensor;
  readonly pages: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly layout: ReturnType<typeof layout>;
  readonly #width: number;

  constructor(shape: CacheShape) {
    this.layout = layout(shape);
    this.#width = shape.width;
    const { lengths, pages, pool, pageRows } = this.layout;
    const rows = [pool, pageRows, shape.width];
    this.lengths = Tensor.alloc('i32', [lengths.length]);
    this.pages = Tensor.alloc('i32', [lengths.length, pages[0].length]);
    [this.k, this.v] = [Tensor.alloc('f32', rows), Tensor.alloc('f32', rows)];
    this.lengths.write(Int32Array.from(lengths));
    this.pages.write(Int32Array.from(pages.flat()));
  }

  /** The cache in a graph; feed `slots` i32 [segments]. */
  bind(graph: Graph, segments: number): Cache {
    const { k, v, lengths, pages } = this;
    return {
      slots: graph.feed('slots', 'i32', [segments]),
      lengths: graph.state(lengths),
      pages: graph.state(pages),
      k: graph.state(k),
      v: graph.state(v),
    };
  }

  /** Writes the rows that segment s holds. */
  fill(s: number, k: Float32Array, v: Float32Array): void {
    const [keys, values] = [this.k.read() as Float32Array, this.v.read() as Float32Array];
    for (let row = 0; row < k.length / this.#width; ++row) {
      keys.set(k.subarray(row * this.#width, (row + 1) * this.#width), this.#at(s, row));
      values.set(v.subarray(row * this.#width, (row + 1) * this.#width), this.#at(s, row));
    }
    this.k.write(keys);
    this.v.write(values);
  }

  /** Rows of keys [from, to) of segment s. */
  keys(s: number, from: number, to: number): Float32Array {
    const keys = this.k.read();
    const rows = Array.from({ length: to - from }, (_, i) => this.#at(s, from + i));
    return Float32Array.from(rows.flatMap((at) => [...keys.subarray(at, at + this.#width)]));
  }

  #at(s: number, row: number): number {
    const { slots, pages, pageRows } = this.layout;
    return (pages[slots[s]][Math.floor(row / pageRows)] * pageRows + (row % pageRows)) * this.#width;
  }

  [Symbol.dispose](): void {
    for (const tensor of [this.lengths, this.pages, this.k, this.v]) tensor.dispose();
  }
}

/** Attention over caches to which k and v were appended. */
export function appended(q: Node, k: Node, v: Node, offsets: Node, cache: Cache, options: HeadOptions): Node {
  cacheAppend(k, v, offsets, cache);
  return attentionCached(q, offsets, cache, options);
}
