// linear, linear_gated, linear_add and their gradients: tails, prefixes, stored dtypes, selected rows, gates.
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { Graph } from '../../lib/graph/graph.js';
import {
  type Act,
  activations,
  add,
  gradients,
  linear,
  linearAdd,
  linearDw,
  linearDx,
  linearGated,
  type Node,
  Program,
} from '../../lib/graph/index.js';
import { type DType, loadAddon, Tensor } from '../../lib/native/index.js';
import { type Case, cases, checkNative, failure, type Input, inputs, random, testEngine } from './harness.js';

const dtypes: DType[] = ['f32', 'bf16', 'f16'];
const sizes = [
  [1, 1, 1],
  [3, 17, 33],
  [17, 33, 3],
  [33, 3, 17],
  [1, 65, 40],
] as const;

cases('linear', [
  ...sizes.map(([m, n, k]): Case => {
    const make = inputs(m + n);
    return {
      name: `[${m},${k}] x [${n},${k}]`,
      inputs: { x: make.f32(['M', m], k), w: make.param(n, k), b: make.param(n) },
      build: ({ x, w, b }) => ({ y: linear(x, w, { bias: b }) }),
      wrt: ['x', 'w', 'b'],
    };
  }),
  ...activations.flatMap((act: Act) =>
    [null, 5].map((r): Case => {
      const make = inputs(3);
      return {
        name: `${act}${r === null ? '' : ` of ${r} rows`}`,
        inputs: {
          x: make.f32(['M', 9], 19),
          w: make.param(21, 19),
          b: make.param(21),
          ...(r === null ? {} : { rows: make.rows('R', r, 9) }),
        },
        build: ({ x, w, b, rows }) => ({ y: linear(x, w, { bias: b, act, rows }) }),
        wrt: ['x', 'w', 'b'],
      };
    }),
  ),
  ...dtypes.map((dtype): Case => {
    const make = inputs(4);
    return {
      name: `${dtype} weight`,
      inputs: { x: make.f32(['M', 7], 35), w: make.weight(dtype, 37, 35), b: make.weight(dtype, 37) },
      build: ({ x, w, b }) => ({ y: linear(x, w, { bias: b, act: 'silu' }) }),
      wrt: ['x'],
    };
  }),
  {
    name: 'a prefix of outputs set at run',
    inputs: { x: inputs(5).f32(['M', 7], 19), w: inputs(6).weight('f32', 40, 19), b: inputs(7).weight('f32', 40) },
    dims: { W: [11, 40] },
    build: ({ x, w, b }, { W }) => ({ y: linear(x, w, { bias: b, act: 'gelu_tanh', width: W }) }),
    wrt: ['x'],
  },
  {
    name: 'a prefix of inputs set at run',
    inputs: { x: inputs(5).f32(['M', 7], ['W', 13]), w: inputs(6).weight('bf16', 19, 40) },
    build: ({ x, w }) => ({ y: linear(x, w) }),
    wrt: ['x'],
  },
  {
    name: 'a router',
    inputs: { x: inputs(10).f32(['M', 33], 24), w: inputs(11).param(1, 24), b: inputs(12).param(1) },
    build: ({ x, w, b }) => ({ z: linear(x, w, { bias: b }) }),
    wrt: ['x', 'w', 'b'],
  },
  {
    // Inputs in whole vectors, rows of the weight that do not begin at one.
    name: 'a few outputs of wider weights',
    inputs: { x: inputs(10).f32(['M', 9], ['W', 24]), w: inputs(11).weight('f32', 3, 27) },
    build: ({ x, w }) => ({ y: linear(x, w) }),
  },
  {
    // Tiles of large products come in bands of sixteen rows of them.
    name: '2100 rows',
    inputs: { x: inputs(13).f32(['M', 2100], 8), w: inputs(14).weight('bf16', 130, 8) },
    build: ({ x, w }) => ({ y: linear(x, w) }),
  },
]);

cases('linear_gated', [
  ...sizes.map(([m, n, k]): Case => {
    const make = inputs(m + n);
    return {
      name: `[${m},${k}] x [${n},${k}]`,
      inputs: { x: make.f32(['M', m], k), wg: make.param(n, k), wu: make.param(n, k) },
      build: ({ x, wg, wu }) => ({ y: linearGated(x, wg, wu, { act: 'silu' }) }),
      wrt: ['x', 'wg', 'wu'],
    };
  }),
  ...activations.map((act: Act): Case => {
    const make = inputs(13);
    return {
      name: `${act} of selected rows, with biases`,
      inputs: {
        x: make.f32(['M', 9], 19),
        wg: make.param(21, 19),
        wu: make.param(21, 19),
        bg: make.param(21),
        bu: make.param(21),
        rows: make.rows('R', 4, 9),
      },
      build: ({ x, wg, wu, bg, bu, rows }) => ({ y: linearGated(x, wg, wu, { bg, bu, act, rows }) }),
      wrt: ['x', 'wg', 'wu', 'bg', 'bu'],
    };
  }),
  ...dtypes.map((dtype): Case => {
    const make = inputs(14);
    return {
      name: `${dtype} weights, a prefix`,
      inputs: { x: make.f32(['M', 5], 35), wg: make.weight(dtype, 48, 35), wu: make.weight(dtype, 48, 35) },
      dims: { W: [19, 48] },
      build: ({ x, wg, wu }, { W }) => ({ y: linearGated(x, wg, wu, { act: 'gelu', width: W }) }),
      wrt: ['x'],
    };
  }),
]);

cases('linear_add', [
  ...sizes.map(([m, d, k]): Case => {
    const make = inputs(m + d);
    return {
      name: `[${m},${d}] + [${m},${k}] x [${d},${k}]`,
      inputs: { r: make.f32(['N', m], d), x: make.f32(['N', m], k), w: make.param(d, k), b: make.param(d) },
      build: ({ r, x, w, b }) => ({ y: linearAdd(r, x, w, { bias: b }) }),
      wrt: ['r', 'x', 'w', 'b'],
    };
  }),
  ...[true, false].flatMap((gated) =>
    [true, false].flatMap((biased) =>
      [1, 5, 17].map((count): Case => {
        const make = inputs(15 + count);
        return {
          name: `${count} of 17 rows${gated ? ', gated' : ''}${biased ? ', bias' : ''}`,
          inputs: {
            r: make.f32(['N', 17], 9),
            x: make.f32(['R', count], 21),
            w: make.param(9, 21),
            rows: make.rows('R', count, 17),
            ...(biased ? { b: make.param(9) } : {}),
            ...(gated ? { gate: make.f32(['R', count]) } : {}),
          },
          build: ({ r, x, w, b, rows, gate }) => ({ y: linearAdd(r, x, w, { bias: b, rows, gate }) }),
          wrt: ['r', 'x', 'w', ...(biased ? ['b'] : []), ...(gated ? ['gate'] : [])],
        };
      }),
    ),
  ),
  // Several tiles of a device, and a gate's gradient of several parts.
  ...(['f32', 'bf16'] as DType[]).map((dtype): Case => {
    const make = inputs(23);
    return {
      name: `140 of 150 rows, gated, ${dtype} weight, 150 inputs`,
      inputs: {
        r: make.f32(['N', 150], 20),
        x: make.f32(['R', 140], 150),
        w: make.weight(dtype, 20, 150),
        rows: make.rows('R', 140, 150),
        b: make.weight(dtype, 20),
        gate: make.f32(['R', 140]),
      },
      build: ({ r, x, w, b, rows, gate }) => ({ y: linearAdd(r, x, w, { bias: b, rows, gate }) }),
      wrt: ['x', 'gate'],
    };
  }),
  {
    name: 'gate of every row',
    inputs: {
      r: inputs(16).f32(['N', 6], 5),
      x: inputs(17).f32(['N', 6], 7),
      w: inputs(18).weight('f32', 5, 7),
      gate: inputs(19).f32(['N', 6]),
    },
    build: ({ r, x, w, gate }) => ({ y: linearAdd(r, x, w, { gate }) }),
    wrt: ['r', 'x', 'gate'],
  },
  ...dtypes.map((dtype): Case => {
    const make = inputs(20);
    return {
      name: `${dtype} weight, a prefix of inputs`,
      inputs: {
        r: make.f32(['N', 6], 35),
        x: make.f32(['R', 3], ['W', 19]),
        w: make.weight(dtype, 35, 40),
        b: make.weight(dtype, 35),
        rows: make.rows('R', 3, 6),
        gate: make.f32(['R', 3]),
      },
      build: ({ r, x, w, b, rows, gate }) => ({ y: linearAdd(r, x, w, { bias: b, rows, gate }) }),
      wrt: ['r', 'x', 'gate'],
    };
  }),
]);

cases('linear_dx and linear_dw', [
  {
    name: 'accumulating onto what is there',
    inputs: {
      dy: inputs(21).f32(['R', 5], 17),
      w: inputs(22).weight('f16', 17, 33),
      acc: inputs(23).f32(['R', 5], 33),
    },
    build: ({ dy, w, acc }) => ({ dx: linearDx(dy, w, acc) }),
  },
  {
    name: 'both sides gathered, gated',
    inputs: {
      dy: inputs(24).f32(['A', 9], 5),
      x: inputs(25).f32(['B', 12], 7),
      dyrows: inputs(26).rows('R', 6, 9),
      xrows: inputs(27).rows('R', 6, 12),
      gate: inputs(28).f32(['R', 6]),
    },
    build: ({ dy, x, dyrows, xrows, gate }) => ({ dw: linearDw(dy, x, { dyrows, xrows, gate }) }),
  },
  {
    name: 'of one output, gated or gathered',
    inputs: {
      dy: inputs(24).f32(['A', 9], 1),
      x: inputs(25).f32(['A', 9], 7),
      some: inputs(26).f32(['R', 6], 7),
      rows: inputs(27).rows('R', 6, 9),
      gate: inputs(28).f32(['A', 9]),
    },
    build: ({ dy, x, some, rows, gate }) => ({
      gated: linearDw(dy, x, { gate }),
      gathered: linearDw(dy, some, { dyrows: rows }),
    }),
  },
  {
    name: 'many rows',
    inputs: { dy: inputs(29).f32(['A', 700], 5), x: inputs(30).f32(['A', 700], 7) },
    build: ({ dy, x }) => ({ dw: linearDw(dy, x) }),
  },
]);

describe('any shape', () => {
  const shape = fc.record({
    m: fc.integer({ min: 1, max: 70 }),
    n: fc.integer({ min: 1, max: 150 }),
    k: fc.integer({ min: 1, max: 300 }),
    act: fc.constantFrom(...activations),
    dtype: fc.constantFrom(...dtypes),
    selected: fc.boolean(),
    biased: fc.boolean(),
    seed: fc.nat(),
  });
  const optional = (name: string, input: Input | null): Record<string, Input> => (input ? { [name]: input } : {});

  test('linear', async () => {
    await fc.assert(
      fc.asyncProperty(shape, async ({ m, n, k, act, dtype, selected, biased, seed }) => {
        const make = inputs(seed);
        await checkNative({
          name: 'linear',
          inputs: {
            x: make.f32(['M', m], k),
            w: make.weight(dtype, n, k),
            ...optional('bias', biased ? make.weight(dtype, n) : null),
            ...optional('rows', selected ? make.rows('R', (m + 1) >> 1, m) : null),
          },
          build: ({ x, w, bias, rows }) => ({ y: linear(x, w, { bias, act, rows }) }),
          wrt: ['x'],
        });
      }),
      { numRuns: 25, seed: 1 },
    );
  });

  test('linear_add', async () => {
    await fc.assert(
      fc.asyncProperty(shape, async ({ m, n, k, dtype, selected, biased, seed }) => {
        const make = inputs(seed);
        const count = selected ? (m + 1) >> 1 : m;
        await checkNative({
          name: 'linear_add',
          inputs: {
            r: make.f32(['N', m], n),
            x: make.f32([selected ? 'R' : 'N', count], k),
            w: make.weight(dtype, n, k),
            gate: make.f32([selected ? 'R' : 'N', count]),
            ...optional('bias', biased ? make.weight(dtype, n) : null),
            ...optional('rows', selected ? make.rows('R', count, m) : null),
          },
          build: ({ r, x, w, bias, rows, gate }) => ({ y: linearAdd(r, x, w, { bias, rows, gate }) }),
          wrt: ['x', 'gate'],
        });
      }),
      { numRuns: 25, seed: 2 },
    );
  });
});

test('a row does not depend on the rows beside it, a prefix equals the extracted weight: bit for bit', async () => {
  const make = inputs(31);
  const [m, n, k] = [33, 70, 150];
  const [x, w] = [Float32Array.from(make.f32(m, k).data), Float32Array.from(make.f32(n, k).data)];
  const product = async (rows: Float32Array, weight: Float32Array, outputs: number, width: number) => {
    using tensor = Tensor.fromData('f32', [outputs, k], weight);
    const g = new Graph();
    g.output('y', linear(g.feed('x', 'f32', [rows.length / k, k]), g.weight(tensor), { width }));
    using program = Program.compile(g, testEngine());
    return (await program.run({ feeds: { x: rows } })).outputs.y;
  };
  const whole = await product(x, w, n, n);
  for (const row of [0, 7, 32]) {
    const single = await product(x.slice(row * k, (row + 1) * k), w, n, n);
    expect(single).toEqual(whole.slice(row * n, (row + 1) * n));
  }
  expect(await product(x, w, n, 19)).toEqual(await product(x, w.slice(0, 19 * k), 19, 19));
});

test('the same weight transposed and sliced is a view', async () => {
  const make = inputs(32);
  const [n, k, whole] = [17, 19, 40];
  // Stored [k, whole] as GPT-2 does; w is columns 5..5+n, read as [n, k].
  const stored = Float32Array.from(make.f32(k, whole).data);
  const x = Float32Array.from(make.f32(3, k).data);
  using tensor = Tensor.fromData('f32', [k, whole], stored);
  using view = tensor.slice(5, [n, k], [1, whole]);
  const g = new Graph();
  const [xNode, w] = [g.feed('x', 'f32', [3, k]), g.weight(view)];
  const y = linear(xNode, w);
  g.output('y', y);
  g.output('dx', gradients(y, [xNode], { seed: g.feed('dy', 'f32', [3, n]) })[0]);
  using program = Program.compile(g, testEngine());
  const dy = Float32Array.from(make.f32(3, n).data);
  const { outputs } = await program.run({ feeds: { x, dy } });
  for (let r = 0; r < 3; ++r) {
    for (let j = 0; j < n; ++j) {
      let sum = 0;
      for (let i = 0; i < k; ++i) sum += x[r * k + i] * stored[i * whole + 5 + j];
      expect(outputs.y[r * n + j]).toBeCloseTo(sum, 5);
    }
    for (let i = 0; i < k; ++i) {
      let sum = 0;
      for (let j = 0; j < n; ++j) sum += dy[r * n + j] * stored[i * whole + 5 + j];
      expect(outputs.dx[r * k + i]).toBeCloseTo(sum, 5);
    }
  }
});

test('flops and rows are counted from what ran', async () => {
  const g = new Graph();
  const [n, r] = [g.dim('N', 50), g.dim('R', 50)];
  const [w1, w2] = [Tensor.alloc('f32', [24, 8]), Tensor.alloc('f32', [8, 24])];
  const x = g.feed('x', 'f32', [n, 8]);
  const rows = g.feed('rows', 'i32', [r]);
  const hidden = g.tag('up', () => linear(x, g.state(w1), { rows }));
  g.output(
    'y',
    g.tag('down', () => linearAdd(x, hidden, g.state(w2), { rows })),
  );
  g.output(
    'z',
    g.tag('both', () => linearGated(x, g.state(w1), g.state(w1), { act: 'silu', rows })),
  );
  using program = Program.compile(g, testEngine());
  const run = { dims: { N: 9, R: 4 }, feeds: { x: new Float32Array(72), rows: Int32Array.of(0, 3, 4, 8) } };
  const { counters, dims } = await program.run(run);
  expect(dims).toEqual({ N: 9, R: 4 });
  const flops = 2 * 4 * 8 * 24;
  expect(counters).toEqual({ up: { flops, rows: 0 }, down: { flops, rows: 4 }, both: { flops: 2 * flops, rows: 0 } });
  w1.dispose();
  w2.dispose();
});

test('hostile rows are InvalidData', async () => {
  using w = Tensor.fromData('f32', [4, 3], new Float32Array(12));
  const builders: Record<string, (x: Node, w: Node, rows: Node) => Node> = {
    linear: (x, weight, rows) => linear(x, weight, { rows }),
    linear_gated: (x, weight, rows) => linearGated(x, weight, weight, { act: 'silu', rows }),
  };
  for (const [op, build] of Object.entries(builders)) {
    for (const rows of [
      [0, 5],
      [-1, 2],
      [3, 1],
      [2, 2],
    ]) {
      const feeds = { x: new Float32Array(15), rows: Int32Array.from(rows) };
      const error = await failure(
        (g) => g.output('y', build(g.feed('x', 'f32', [5, 3]), g.weight(w), g.feed('rows', 'i32', [2]))),
        { feeds },
      );
      expect(error, `${op} ${rows}`).toMatchObject({ code: 'InvalidData' });
      expect(error.message).toContain(op);
    }
  }
});

test('shapes that do not fit are named', async () => {
  using w = Tensor.fromData('f32', [4, 3], new Float32Array(12));
  expect(await failure((g) => void linear(g.feed('x', 'f32', [5, 8]), g.weight(w)))).toMatchObject({
    code: 'InvalidArgument',
    message: '[linear] K is 8 in x:f32[5,8], more than w:f32[4,3] has',
  });
  expect(await failure((g) => void linear(g.feed('x', 'f32', [5, 3]), g.weight(w), { width: 9 }))).toMatchObject({
    code: 'InvalidArgument',
    message: '[linear] N is 9 in the options, more than w:f32[4,3] has',
  });
});

test('the gradient of a weight of which a prefix is used is that of the prefix', async () => {
  const make = inputs(7);
  const [N, K, R] = [5, 6, 4];
  const values = (...shape: number[]) => Float32Array.from(make.f32(...shape).data);
  const feeds = { x: values(R, K), dy: values(R, K) };
  const whole = { up: values(N, K), gate: values(N, K), bias: values(N), down: values(K, N) };
  const cut = (data: Float32Array, columns: number, rows: number, used: number) =>
    Float32Array.from({ length: rows * used }, (_, i) => data[Math.floor(i / used) * columns + (i % used)]);
  const n = 3;
  const extracted = {
    up: whole.up.slice(0, n * K),
    gate: whole.gate.slice(0, n * K),
    bias: whole.bias.slice(0, n),
    down: cut(whole.down, N, K, n),
  };
  const run = async (weights: typeof whole, units: number, width?: number) => {
    const g = new Graph();
    const state = (data: Float32Array, ...shape: number[]) => {
      const tensor = Tensor.alloc('f32', shape);
      tensor.write(data);
      return g.state(tensor);
    };
    const up = state(weights.up, units, K);
    const gate = state(weights.gate, units, K);
    const bias = state(weights.bias, units);
    const down = state(weights.down, K, units);
    const size = width === undefined ? undefined : g.dim('width', units);
    const x = g.feed('x', 'f32', [R, K]);
    const h = linearGated(x, gate, up, { act: 'silu', bu: bias, width: size });
    const y = linearAdd(x, add(h, linear(x, up, { bias, act: 'gelu', width: size })), down);
    gradients(y, [up, gate, bias, down], { seed: g.feed('dy', 'f32', [R, K]) }).forEach((gradient, i) => {
      g.output(`d${i}`, gradient);
    });
    using program = Program.compile(g, testEngine());
    return (await program.run({ feeds, dims: width === undefined ? {} : { width } })).outputs;
  };
  expect(await run(whole, N, n)).toEqual(await run(extracted, n));
});

test('a weight is packed once and survives changes of the thread count', async () => {
  const make = inputs(33);
  using w = Tensor.fromData('f32', [64, 64], Float32Array.from(make.f32(64, 64).data));
  const x = Float32Array.from(make.f32(9, 64).data);
  const results: unknown[] = [];
  for (const threads of [1, 2, 1]) {
    loadAddon().setThreads(threads);
    const g = new Graph();
    g.output('y', linear(g.feed('x', 'f32', [9, 64]), g.weight(w)));
    using program = Program.compile(g, testEngine());
    results.push((await program.run({ feeds: { x } })).outputs.y);
  }
  expect(results[1]).toEqual(results[0]);
  expect(results[2]).toEqual(results[0]);
});

if (testEngine().device === 'cpu')
  test('parts of a weight read its packed copy', async () => {
    const [units, width, count, rows] = [128, 64, 4, 9];
    const next = random(3);
    const values = (n: number) => Float32Array.from({ length: n }, () => next() - 0.5);
    using up = Tensor.fromData('f32', [units, width], values(units * width));
    using down = Tensor.fromData('f32', [width, units], values(units * width));
    const graph = new Graph();
    const x = graph.feed('x', 'f32', [rows, width]);
    const [all, out] = [graph.weight(up, 'up'), graph.weight(down, 'down')];
    const h = linear(x, all, { act: 'relu' });
    graph.output('h', h);
    let sum = x;
    for (let part = 0; part < count; part++) {
      const own = linear(x, graph.weight(up.part(0, part, count), `up ${part}`), { act: 'relu' });
      graph.output(`h${part}`, own);
      sum = linearAdd(sum, own, graph.weight(down.part(1, part, count), `down ${part}`));
    }
    graph.output('sum', sum);
    graph.output('y', linearAdd(x, h, out));
    const before = loadAddon().memory().packedBytes;
    using program = Program.compile(graph, testEngine());
    const { outputs } = await program.run({ feeds: { x: values(rows * width) } });
    expect(loadAddon().memory().packedBytes - before).toBe(2 * units * width * 4);
    outputs.y.forEach((y, i) => {
      expect(outputs.sum[i]).toBeCloseTo(y, 4);
    });
    const size = units / count;
    for (let part = 0; part < count; part++) {
      for (let r = 0; r < rows; r++) {
        const whole = outputs.h.subarray(r * units + part * size, r * units + (part + 1) * size);
        expect(outputs[`h${part}`].subarray(r * size, (r + 1) * size)).toEqual(whole);
      }
    }
  });
