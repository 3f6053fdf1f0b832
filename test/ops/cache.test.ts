// Caches of keys and values in pages, and attention over them.
import { describe, expect, test } from 'vitest';
import {
  attention,
  attentionCached,
  cacheAppend,
  Graph,
  gatherRows,
  Program,
  pageCopy,
  routeThreshold,
} from '../../lib/graph/index.js';
import { loadAddon, Tensor } from '../../lib/native/index.js';
import { appended, type CacheShape, cacheInputs, cacheOf, TestCache } from './caches.js';
import { type Case, cases, compare, failure, inputs, offsetsOf, testEngine } from './harness.js';

const [heads, kvHeads, dh] = [4, 2, 6];

// [new rows, rows held, capacity, rows of a page]: pages of one row, with a tail, crossed once and more than once.
const layouts = [
  [[1], [0], 4, 4],
  [[3, 0, 2], [2, 5, 0], 5, 2],
  [[17], [16], 40, 16],
  [[17], [15], 40, 1],
  [[1, 1, 1], [0, 7, 3], 8, 4],
  [[40, 1, 70], [3, 170, 61], 180, 32],
] as const;

cases(
  'attention_cached',
  layouts.flatMap(([fresh, past, capacity, pageRows]) =>
    [0, 3, 90].map((reach): Case => {
      const rows = fresh.reduce<number>((a, b) => a + b, 0);
      const make = inputs(rows + capacity);
      const biased = reach > 0;
      return {
        name: `new ${fresh} after ${past} of ${capacity} in pages of ${pageRows}${biased ? `, a bias of reach ${reach}` : ''}`,
        inputs: {
          q: make.f32(['R', rows], heads * dh),
          k: make.f32(['R', rows], kvHeads * dh),
          v: make.f32(['R', rows], kvHeads * dh),
          offsets: make.i32(offsetsOf(fresh), ['O', fresh.length + 1]),
          ...cacheInputs(make, { past, capacity, pageRows, width: kvHeads * dh }),
          ...(biased && { bias: make.f32(heads, 2 * reach + 1) }),
        },
        build: ({ q, k, v, offsets, bias, ...cache }) => ({
          y: appended(q, k, v, offsets, cacheOf(cache), { heads, kvHeads, scale: 0.4, bias }),
        }),
      };
    }),
  ),
);

/** Whether row i of a segment is a query. */
const picks = {
  'every row': () => true,
  'every third row': (i: number) => i % 3 === 1,
  'most rows': (i: number) => i % 5 !== 0,
  'one segment': (_: number, segment: number) => segment === 0,
  'no row': () => false,
};

cases(
  'attention_cached of selected rows',
  (
    [
      [[1], [0], 4, 4, 'every row'],
      [[3, 0, 2], [2, 5, 0], 5, 3, 'every third row'],
      [[17], [16], 40, 16, 'most rows'],
      [[4, 1, 1], [0, 7, 3], 8, 8, 'one segment'],
      [[5, 70], [3, 61], 140, 32, 'every third row'],
      [[2, 3], [1, 0], 5, 1, 'no row'],
    ] as const
  ).map(([fresh, past, capacity, pageRows, pick]): Case => {
    const n = fresh.reduce<number>((a, b) => a + b, 0);
    const make = inputs(n + capacity);
    const z = fresh.flatMap((rows, s) => Array.from({ length: rows }, (_, i) => (picks[pick](i, s) ? 1 : -1)));
    return {
      name: `${pick} of new ${fresh} after ${past} of ${capacity} in pages of ${pageRows}`,
      inputs: {
        q: make.f32(['N', n], heads * dh),
        k: make.f32(['N', n], kvHeads * dh),
        v: make.f32(['N', n], kvHeads * dh),
        offsets: make.i32(offsetsOf(fresh), ['O', fresh.length + 1]),
        z: make.values(z, ['N', n], 1),
        threshold: make.values(
          fresh.map(() => 0),
          ['S', fresh.length],
        ),
        ...cacheInputs(make, { past, capacity, pageRows, width: kvHeads * dh }),
      },
      build: ({ q, k, v, offsets, z, threshold, ...cache }) => {
        const selected = routeThreshold(z, offsets, threshold);
        const options = { heads, kvHeads, scale: 0.4, selected };
        return { y: appended(gatherRows(q, selected.rows), k, v, offsets, cacheOf(cache), options) };
      },
    };
  }),
);

/** Runs of attention over a cache that grows by k and v, some rows of each segment at a time. */
class Growing implements Disposable {
  readonly cache: TestCache;
  readonly #programs = new Map<string, Program>();
  readonly #shape: CacheShape & { heads: number; kvHeads: number; dh: number; window: number };

  constructor(shape: CacheShape & { heads: number; kvHeads: number; dh: number; window: number }) {
    this.#shape = shape;
    this.cache = new TestCache(shape);
  }

  /** `data`: q, k and v by segment, their new rows. Returns y by segment. */
  async append(segments: readonly number[], data: readonly (readonly Float32Array[])[]): Promise<Float32Array[]> {
    const { heads, kvHeads, dh, window } = this.#shape;
    const lengths = data.map(([q]) => q.length / (heads * dh));
    const offsets = offsetsOf(lengths);
    const rows = offsets[offsets.length - 1];
    const key = `${rows} ${segments.length}`;
    let program = this.#programs.get(key);
    if (!program) {
      const g = new Graph();
      const widths = [heads, kvHeads, kvHeads].map((h) => h * dh);
      const [q, k, v] = ['q', 'k', 'v'].map((name, i) => g.feed(name, 'f32', [rows, widths[i]]));
      const cache = this.cache.bind(g, segments.length);
      const ends = g.feed('offsets', 'i32', [segments.length + 1]);
      g.output('y', appended(q, k, v, ends, cache, { heads, kvHeads, scale: 0.7, window }));
      program = Program.compile(g, testEngine());
      this.#programs.set(key, program);
    }
    const packed = ['q', 'k', 'v'].map((name, i) => {
      return [name, Float32Array.from(data.flatMap((one) => [...one[i]]))] as const;
    });
    const slots = Int32Array.from(segments, (s) => this.cache.layout.slots[s]);
    const { y } = (
      await program.run({ feeds: { ...Object.fromEntries(packed), offsets: Int32Array.from(offsets), slots } })
    ).outputs;
    return lengths.map((_, i) => (y as Float32Array).slice(offsets[i] * heads * dh, offsets[i + 1] * heads * dh));
  }

  [Symbol.dispose](): void {
    for (const program of this.#programs.values()) program.dispose();
    this.cache[Symbol.dispose]();
  }
}

describe.each([
  { heads: 4, kvHeads: 2, dh: 64, window: 0 },
  { heads: 3, kvHeads: 1, dh: 20, window: 50 },
])('pages change no bit: %o', (shape) => {
  const { heads, kvHeads, dh } = shape;
  const totals = [140, 33, 170];
  // Element by element takes long.
  const bits = (x: Float32Array) => Buffer.from(x.buffer, x.byteOffset, x.byteLength).toString('base64');
  const make = inputs(dh);
  const all = totals.map((n) => [heads, kvHeads, kvHeads].map((h) => Float32Array.from(make.f32(n, h * dh).data)));
  const rows = (s: number, from: number, to: number) =>
    all[s].map((x) => x.subarray((from * x.length) / totals[s], (to * x.length) / totals[s]));
  // Prompts, one after the other; then all segments a row at a time, in another order; then some rows at once.
  const grow = async (pageRows: number, together: boolean) => {
    using growing = new Growing({ past: [0, 0, 0], capacity: 180, width: kvHeads * dh, pageRows, ...shape });
    const results: Float32Array[][] = [[], [], []];
    const held = [0, 0, 0];
    const step = async (segments: readonly number[], count: (s: number) => number) => {
      const groups = together ? [segments] : segments.map((s) => [s]);
      for (const group of groups) {
        const data = group.map((s) => rows(s, held[s], held[s] + count(s)));
        (await growing.append(group, data)).forEach((y, i) => {
          results[group[i]].push(y);
          held[group[i]] += count(group[i]);
        });
      }
    };
    await step([0, 1, 2], (s) => totals[s] - 25);
    for (let i = 0; i < 5; ++i) await step([2, 0, 1], () => 1);
    await step([1, 2], () => 20);
    await step([0], () => 20);
    expect([...growing.cache.lengths.read()]).toEqual([0, 170, 33, 140]);
    all.forEach(([, k], s) => {
      expect(bits(growing.cache.keys(s, 0, totals[s]))).toBe(bits(k));
    });
    return results.map((parts) => Float32Array.from(parts.flatMap((part) => [...part])));
  };

  test('nor do other segments and threads', async () => {
    const addon = loadAddon();
    addon.setThreads(1);
    const expected = await grow(180, false);
    const same = async (pageRows: number, together: boolean) => {
      (await grow(pageRows, together)).forEach((y, s) => {
        expect(bits(y), `segment ${s}, pages of ${pageRows}`).toBe(bits(expected[s]));
      });
    };
    addon.setThreads(2);
    for (const pageRows of [1, 7, 16, 32, 100, 180]) await same(pageRows, true);
    await same(32, false);

    for (const [s, n] of totals.entries()) {
      const g = new Graph();
      const [q, k, v] = ['q', 'k', 'v'].map((name, i) => g.feed(name, 'f32', [n, all[s][i].length / n]));
      const options = { heads, kvHeads, scale: 0.7, window: shape.window, causal: true };
      g.output('y', attention(q, k, v, g.feed('offsets', 'i32', [2]), options));
      using program = Program.compile(g, testEngine());
      const [qs, ks, vs] = all[s];
      const { y } = (await program.run({ feeds: { q: qs, k: ks, v: vs, offsets: Int32Array.of(0, n) } })).outputs;
      compare(expected[s], y as Float32Array, 2e-6, `segment ${s}`);
    }
  });
});

test('one pool holds layers cut into parts and whole ones', async () => {
  // Pages of 4 rows of two heads are pages of 8 rows of one head each.
  const [pool, pageRows, width] = [6, 4, 6];
  const [k, v] = [Tensor.alloc('f32', [pool, pageRows, width]), Tensor.alloc('f32', [pool, pageRows, width])];
  const [halfK, halfV] = [k, v].map((tensor) => tensor.slice(0, [pool, 2 * pageRows, width / 2]));
  const lengths = Tensor.alloc('i32', [3, 1]);
  const pages = Tensor.alloc('i32', [3, 1, 2]);
  pages.write(Int32Array.of(4, 1, 5, 0, 2, 3));
  const make = inputs(1);
  const rows = 5;
  const data = { q: make.f32(rows, width).data, k: make.f32(rows, width).data };
  const half = (x: readonly number[], i: number) =>
    Array.from({ length: rows }, (_, r) =>
      x.slice(r * width + (i * width) / 2, r * width + ((i + 1) * width) / 2),
    ).flat();
  const g = new Graph();
  const offsets = g.feed('offsets', 'i32', [2]);
  const slots = g.feed('slots', 'i32', [1]);
  const cache = (i: number, keys: Tensor, values: Tensor) => ({
    lengths: g.state(lengths.slice(i, [1])),
    pages: g.state(pages.slice(2 * i, [1, 2])),
    ...{ slots, k: g.state(keys), v: g.state(values) },
  });
  const feed = (name: string, columns: number) => g.feed(name, 'f32', [rows, columns]);
  const [q, x] = [feed('q', width), feed('x', width)];
  g.output('whole', appended(q, x, x, offsets, cache(0, k, v), { heads: 2, kvHeads: 2, scale: 1 }));
  for (const i of [0, 1]) {
    const own = feed(`x${i}`, width / 2);
    const options = { heads: 1, kvHeads: 1, scale: 1 };
    g.output(`y${i}`, appended(feed(`q${i}`, width / 2), own, own, offsets, cache(i + 1, halfK, halfV), options));
  }
  using program = Program.compile(g, testEngine());
  const { outputs } = await program.run({
    feeds: {
      q: Float32Array.from(data.q),
      x: Float32Array.from(data.k),
      ...Object.fromEntries([0, 1].map((i) => [`q${i}`, Float32Array.from(half(data.q, i))])),
      ...Object.fromEntries([0, 1].map((i) => [`x${i}`, Float32Array.from(half(data.k, i))])),
      offsets: Int32Array.of(0, rows),
      slots: Int32Array.of(0),
    },
  });
  for (const i of [0, 1]) {
    expect(outputs[`y${i}`]).toEqual(Float32Array.from(half([...(outputs.whole as Float32Array)], i)));
  }
  expect([...lengths.read()]).toEqual([rows, rows, rows]);
  for (const tensor of [k, v, halfK, halfV, lengths, pages]) tensor.dispose();
});

describe.each(['cache_append', 'attention_cached'])('%s: what cannot be is InvalidData', (op) => {
  // Two segments in slots 2 and 1 of three, of two pages with two rows each; slot 1's second page is not there.
  const run = async (change: {
    offsets?: readonly number[];
    slots?: readonly number[];
    held?: readonly number[];
    pages?: readonly number[];
    some?: boolean;
  }) => {
    const { offsets = [0, 2, 3], slots = [2, 1], pages = [-1, -1, 4, -1, 0, 3], some = false } = change;
    const held = change.held ?? (op === 'cache_append' ? [0, 1, 2] : [0, 2, 4]);
    const tensors = [
      Tensor.alloc('i32', [3]),
      Tensor.alloc('i32', [3, 2]),
      ...[0, 1].map(() => Tensor.alloc('f32', [5, 2, 2])),
    ];
    tensors[0].write(Int32Array.from(held));
    tensors[1].write(Int32Array.from(pages));
    const build = (g: Graph) => {
      const ends = g.feed('offsets', 'i32', [3]);
      const [lengths, pages, k, v] = tensors.map((tensor) => g.state(tensor));
      const cache = { lengths, pages, k, v, slots: g.feed('slots', 'i32', [slots.length]) };
      const selected = some ? { rows: g.feed('rows', 'i32', [2]), offsets: g.feed('starts', 'i32', [3]) } : undefined;
      const x = g.feed('x', 'f32', [some ? 2 : 3, 2]);
      if (op === 'cache_append') cacheAppend(x, x, ends, cache);
      else
        g.output(
          'y',
          attentionCached(x, ends, cache, { heads: 1, kvHeads: 1, scale: 1, ...(selected && { selected }) }),
        );
    };
    const error = await failure(build, {
      feeds: {
        x: new Float32Array(some ? 4 : 6).fill(1),
        ...{ offsets: Int32Array.from(offsets), slots: Int32Array.from(slots) },
        ...(some && { rows: Int32Array.of(0, 2), starts: Int32Array.of(0, 1, 2) }),
      },
    });
    expect([...tensors[0].read()]).toEqual(held);
    expect(tensors.slice(2).every((pool) => pool.read().every((value) => value === 0))).toBe(true);
    for (const tensor of tensors) tensor.dispose();
    return error;
  };
  const appending = op === 'cache_append';
  const [least, most] = appending ? [0, 3] : [1, 4];

  test.each([
    ['offsets', { offsets: [1, 2, 3] }, 'offsets[0]'],
    ['offsets', { offsets: [0, 4, 3] }, 'offsets['],
    ['offsets', { offsets: [0, -1, 3] }, 'offsets['],
    ['a slot below the first', { slots: [2, -1] }, 'slots[1] must be in [0, 3), got -1'],
    ['a slot past the last', { slots: [3, 1] }, 'slots[0] must be in [0, 3), got 3'],
    ['a slot far away', { slots: [0x7fffffff, 1] }, 'slots[0] must be in [0, 3), got 2147483647'],
    ['a slot twice', { slots: [2, 2], held: [0, 2, 2] }, "must be no other segment's, got 2"],
    ['a negative length', { held: [0, -1, 2] }, `lengths[1] must be in [${least}, ${most}] for`],
    ['a length past all pages', { held: [0, 5, 2] }, `lengths[1] must be in [${least}, ${most}] for`],
    ['a huge length', { held: [0, 0x7fffffff, 2] }, `lengths[1] must be in [${least}, ${most}] for`],
    ['too many rows', { held: appending ? [0, 1, 3] : [0, 1, 5] }, `lengths[2] must be in [${appending ? 0 : 2}, `],
    ['too few rows', { held: appending ? [0, 1, -1] : [0, 1, 1] }, `lengths[2] must be in [${appending ? 0 : 2}, `],
    [
      'no page',
      { held: appending ? [0, 2, 2] : [0, 3, 4] },
      'pages: that of row 2 of slot 1 must be in [0, 5), got -1',
    ],
    [
      'a page past the last',
      { pages: [-1, -1, 5, -1, 0, 3] },
      `pages: that of row ${appending ? 1 : 0} of slot 1 must be in [0, 5), got 5`,
    ],
    [
      'a page far away',
      { pages: [-1, -1, 4, -1, 0, 0x7fffffff] },
      'pages: that of row 2 of slot 2 must be in [0, 5), got 2147483647',
    ],
  ])('%s: %j', async (_, change, message) => {
    for (const some of appending ? [false] : [false, true]) {
      const error = await run({ ...change, some });
      expect(error).toMatchObject({ code: 'InvalidData' });
      expect(error.message).toContain(`[${op}] ${message.startsWith('must') ? 'slots[' : ''}`);
      expect(error.message).toContain(message);
    }
  });

  test('a page of many that is not there', async () => {
    const slotPages = Array.from({ length: 80 }, (_, i) => (i === 70 ? -1 : 0));
    const tensors = [Tensor.alloc('i32', [1]), Tensor.alloc('i32', [1, 80]), Tensor.alloc('f32', [1, 1, 2])];
    tensors[0].write(Int32Array.of(appending ? 0 : 80));
    tensors[1].write(Int32Array.from(slotPages));
    const error = await failure(
      (g) => {
        const [lengths, pages, k] = tensors.map((tensor) => g.state(tensor));
        const cache = { lengths, pages, k, v: k, slots: g.feed('slots', 'i32', [1]) };
        const x = g.feed('x', 'f32', [80, 2]);
        if (appending) cacheAppend(x, x, g.feed('offsets', 'i32', [2]), cache);
        else
          g.output('y', attentionCached(x, g.feed('offsets', 'i32', [2]), cache, { heads: 1, kvHeads: 1, scale: 1 }));
      },
      { feeds: { x: new Float32Array(160), slots: Int32Array.of(0), offsets: Int32Array.of(0, 80) } },
    );
    expect(error).toMatchObject({ code: 'InvalidData' });
    expect(error.message).toContain(`[${op}] pages: that of row 70 of slot 0 must be in [0, 1), got -1`);
    for (const tensor of tensors) tensor.dispose();
  });

  test('another number of slots than segments is an invalid program', async () => {
    for (const slots of [[2], [2, 1, 0]]) {
      const error = await run({ slots });
      expect(error).toMatchObject({ code: 'InvalidProgram' });
      expect(error.message).toContain('per segment wanted: 2 segments, got ');
    }
  });
});

cases(
  'page_copy',
  (
    [
      [[1], [2], 3, 2, 5],
      [[2], [0], 3, 4, 8],
      [[1, 1, 4], [0, 6, 2], 7, 3, 5],
    ] as const
  ).map(([from, to, pool, pageRows, width]): Case => {
    const make = inputs(pool);
    const rows = [pool, pageRows, width];
    return {
      name: `${from} to ${to} of ${rows}`,
      inputs: {
        from: make.i32(from, ['M', from.length]),
        to: make.i32(to, ['M', to.length]),
        k: make.state('f32', make.f32(...rows).data, ...rows),
        v: make.state('f32', make.f32(...rows).data, ...rows),
      },
      build: ({ from, to, k, v }) => {
        pageCopy(from, to, { k, v });
        return {};
      },
    };
  }),
);

test.each([
  [[-1], [0], 'from[0] must be in [0, 4), got -1'],
  [[4], [0], 'from[0] must be in [0, 4), got 4'],
  [[0, 1], [2, 0x7fffffff], 'to[1] must be in [0, 4), got 2147483647'],
  [[0, 1], [3, 3], 'must be copied to once, and not from, got 3'],
  [[0, 1], [3, 0], 'to[1] must be copied to once, and not from, got 0'],
  [[2], [2], 'to[0] must be copied to once, and not from, got 2'],
])('copying pages %j to %j is InvalidData', async (from, to, message) => {
  const pools = [Tensor.alloc('f32', [4, 2, 2]), Tensor.alloc('f32', [4, 2, 2])];
  const data = Float32Array.from({ length: 16 }, (_, i) => i);
  for (const pool of pools) pool.write(data);
  const ids = [from, to].map((pages) => Int32Array.from(pages));
  const error = await failure(
    (g) => {
      const [k, v] = pools.map((pool) => g.state(pool));
      const [a, b] = ['from', 'to'].map((name) => g.feed(name, 'i32', [from.length]));
      pageCopy(a, b, { k, v });
    },
    { feeds: { from: ids[0], to: ids[1] } },
  );
  expect(error).toMatchObject({ code: 'InvalidData' });
  expect(error.message).toContain('[page_copy] ');
  expect(error.message).toContain(message);
  for (const pool of pools) {
    expect(pool.read()).toEqual(data);
    pool.dispose();
  }
});

test('a cache that is full keeps what it holds, and goes on with another page', async () => {
  using cache = new TestCache({ past: [0], capacity: 3, width: 2, pageRows: 2 });
  const g = new Graph();
  const x = g.feed('x', 'f32', [1, 2]);
  cacheAppend(x, x, g.feed('offsets', 'i32', [2]), cache.bind(g, 1));
  using program = Program.compile(g, testEngine());
  const append = (value: number) =>
    program.run({
      feeds: {
        x: new Float32Array(2).fill(value),
        offsets: Int32Array.of(0, 1),
        slots: Int32Array.from(cache.layout.slots),
      },
    });
  for (const value of [1, 2, 3, 4]) await append(value);
  await expect(append(5)).rejects.toMatchObject({ code: 'InvalidData' });
  expect([...cache.lengths.read()]).toEqual([0, 4]);
  expect([...cache.keys(0, 0, 4)]).toEqual([1, 1, 2, 2, 3, 3, 4, 4]);

  const [, own] = cache.layout.pages;
  own[2] = [0, 1, 2, 3].find((page) => !own.includes(page))!;
  cache.pages.write(Int32Array.from(cache.layout.pages.flat()));
  await append(5);
  expect([...cache.keys(0, 0, 5)]).toEqual([1, 1, 2, 2, 3, 3, 4, 4, 5, 5]);
});

test.each(['slots', 'pages', 'offsets'])('lengths that are %s, too, are an invalid program', async (name) => {
  const both = Tensor.alloc('i32', [2]);
  const pool = Tensor.alloc('f32', [2, 2, 2]);
  const error = await failure(
    (g) => {
      const x = g.feed('x', 'f32', [1, 2]);
      const node = g.state(both);
      const one = g.state(both.slice(1, [1]));
      const offsets = name === 'offsets' ? node : g.feed('offsets', 'i32', [2]);
      const slots = name === 'slots' ? one : g.feed('slots', 'i32', [1]);
      const pages = name === 'pages' ? g.state(both.slice(0, [2, 1])) : g.feed('pages', 'i32', [2, 1]);
      cacheAppend(x, x, offsets, { slots, lengths: node, pages, k: g.state(pool), v: g.state(pool) });
    },
    {
      feeds: {
        x: new Float32Array(2),
        ...(name !== 'offsets' && { offsets: Int32Array.of(0, 1) }),
        ...(name !== 'slots' && { slots: Int32Array.of(0) }),
        ...(name !== 'pages' && { pages: Int32Array.of(0, 1) }),
      },
    },
  );
  expect(error).toMatchObject({ code: 'InvalidProgram' });
  expect(error.message).toContain(`[cache_append] lengths and ${name} must not share memory`);
  for (const tensor of [both, pool]) tensor.dispose();
});
