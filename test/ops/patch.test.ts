// Patches of linear, linear_gated and linear_add: ranks, stored dtypes, prefixes, gradients, and what zeros must not change.
import { describe, expect, test } from 'vitest';
import { Graph } from '../../lib/graph/graph.js';
import { activation, linear, linearAdd, linearGated, type Node, Program } from '../../lib/graph/index.js';
import { type DType, type Engine, Tensor } from '../../lib/native/index.js';
import { type Case, cases, failure, inputs, narrowEngine, sameBits, testEngine, typed } from './harness.js';

const dtypes: DType[] = ['f32', 'bf16', 'f16'];
const ranks = [1, 2, 8, 17];

cases('linear', [
  ...ranks.map((rank): Case => {
    const make = inputs(40 + rank);
    return {
      name: `rank ${rank}`,
      inputs: {
        x: make.f32(['M', 9], 19),
        w: make.param(21, 19),
        bias: make.param(21),
        rows: make.rows('R', 5, 9),
        u: make.f32(['R', 5], rank),
        b: make.param(21, rank),
      },
      build: ({ x, w, bias, rows, u, b }) => ({ y: linear(x, w, { bias, act: 'silu', rows, patch: { u, b } }) }),
      wrt: ['x', 'w', 'bias', 'u', 'b'],
    };
  }),
  ...dtypes.flatMap((dtype) =>
    dtypes.map((other): Case => {
      const make = inputs(76);
      return {
        name: `${other} on a ${dtype} weight, prefixes of both set at run`,
        inputs: {
          x: make.f32(['M', 7], ['K', 35]),
          w: make.weight(dtype, 48, 40),
          u: make.f32(['M', 7], ['P', 5]),
          b: make.weight(other, 50, 8),
        },
        dims: { W: [37, 48] },
        build: ({ x, w, u, b }, { W }) => ({ y: linear(x, w, { act: 'gelu', width: W, patch: { u, b } }) }),
        wrt: ['x', 'u'],
      };
    }),
  ),
  {
    // As a model has it: x feeds both factors, and its gradient comes from both.
    name: 'u of the same rows of x',
    inputs: {
      x: inputs(77).f32(['M', 9], 19),
      w: inputs(78).weight('bf16', 21, 19),
      a: inputs(79).param(4, 19),
      b: inputs(80).param(21, 4),
      rows: inputs(81).rows('R', 5, 9),
    },
    build: ({ x, w, a, b, rows }) => ({
      y: linear(x, w, { act: 'silu', rows, patch: { u: linear(x, a, { rows }), b } }),
    }),
    wrt: ['x', 'a', 'b'],
  },
]);

cases('linear_gated', [
  ...ranks.map((rank): Case => {
    const make = inputs(50 + rank);
    return {
      name: `ranks ${rank} and ${rank + 3}`,
      inputs: {
        x: make.f32(['M', 9], 19),
        wg: make.param(21, 19),
        wu: make.param(21, 19),
        bu: make.param(21),
        gateU: make.f32(['M', 9], rank),
        gateB: make.param(21, rank),
        upU: make.f32(['M', 9], rank + 3),
        upB: make.param(21, rank + 3),
      },
      build: ({ x, wg, wu, bu, gateU, gateB, upU, upB }) => ({
        y: linearGated(x, wg, wu, {
          bu,
          act: 'silu',
          gatePatch: { u: gateU, b: gateB },
          upPatch: { u: upU, b: upB },
        }),
      }),
      wrt: ['x', 'wg', 'wu', 'bu', 'gateU', 'gateB', 'upU', 'upB'],
    };
  }),
  ...(['gate', 'up'] as const).map((part): Case => {
    const make = inputs(70);
    return {
      name: `the ${part} product alone, of selected rows`,
      inputs: {
        x: make.f32(['M', 9], 19),
        wg: make.weight('bf16', 21, 19),
        wu: make.weight('bf16', 21, 19),
        rows: make.rows('R', 4, 9),
        u: make.f32(['R', 4], 6),
        b: make.param(21, 6),
      },
      build: ({ x, wg, wu, rows, u, b }) => ({
        y: linearGated(x, wg, wu, { act: 'gelu', rows, [`${part}Patch`]: { u, b } }),
      }),
      wrt: ['x', 'u', 'b'],
    };
  }),
]);

cases('linear_add', [
  ...ranks.map((rank): Case => {
    const make = inputs(60 + rank);
    return {
      name: `rank ${rank}`,
      inputs: {
        r: make.f32(['N', 17], 9),
        x: make.f32(['R', 5], 21),
        w: make.param(9, 21),
        rows: make.rows('R', 5, 17),
        bias: make.param(9),
        gate: make.f32(['R', 5]),
        u: make.f32(['R', 5], rank),
        b: make.param(9, rank),
      },
      build: ({ r, x, w, bias, rows, gate, u, b }) => ({
        y: linearAdd(r, x, w, { bias, rows, gate, patch: { u, b } }),
      }),
      wrt: ['r', 'x', 'w', 'bias', 'gate', 'u', 'b'],
    };
  }),
  {
    name: 'every row, without a gate',
    inputs: {
      r: inputs(71).f32(['N', 6], 5),
      x: inputs(72).f32(['N', 6], 7),
      w: inputs(73).weight('f32', 5, 7),
      u: inputs(74).f32(['N', 6], 3),
      b: inputs(75).param(5, 3),
    },
    build: ({ r, x, w, u, b }) => ({ y: linearAdd(r, x, w, { patch: { u, b } }) }),
    wrt: ['r', 'x', 'u', 'b'],
  },
  {
    // The gate alone has a gradient, which has a part of the patch.
    name: 'a gate between constants',
    inputs: {
      r: inputs(83).f32(['N', 6], 5),
      x: inputs(84).f32(['N', 6], 7),
      w: inputs(85).weight('f32', 5, 7),
      u: inputs(86).f32(['N', 6], 3),
      b: inputs(87).weight('bf16', 5, 3),
      gate: inputs(88).f32(['N', 6]),
    },
    build: ({ r, x, w, u, b, gate }) => ({ y: linearAdd(r, x, w, { gate, patch: { u, b } }) }),
    wrt: ['gate'],
  },
]);

/** Every product of x and one weight, with `patch` or without, in a program of its own. */
async function productsWith(
  engine: Engine,
  feeds: Record<'x' | 'r' | 'u', Float32Array>,
  tensors: { w: Tensor; b: Tensor },
  patched: boolean,
) {
  const g = new Graph();
  const [n, k] = tensors.w.shape;
  const m = feeds.x.length / k;
  const [x, r] = [g.feed('x', 'f32', [m, k]), g.feed('r', 'f32', [m, n])];
  const u = g.feed('u', 'f32', [m, feeds.u.length / m]);
  const w = g.weight(tensors.w);
  // Activations that a device may store as bf16, as what comes from other ops.
  const narrow = activation(x, 'none');
  const patch = patched ? { u: activation(u, 'none'), b: g.state(tensors.b) } : null;
  g.output('plain', linear(narrow, w, { act: 'silu', patch }));
  g.output('gated', linearGated(narrow, w, w, { act: 'silu', gatePatch: patch, upPatch: patch }));
  g.output('added', linearAdd(r, narrow, w, { patch }));
  if (!patched) g.output('u', activation(u, 'none'));
  using program = Program.compile(g, engine);
  const { plain, gated, added } = (await program.run({ feeds })).outputs;
  return { plain, gated, added };
}

describe.each([
  [1, 40, 72, 5],
  [9, 40, 70, 5],
  [70, 130, 40, 19],
])('[%i,%i] of %i, rank %i', (m, n, k, rank) => {
  const make = inputs(82);
  const floats = (...shape: number[]) => Float32Array.from(make.f32(...shape).data);
  const feeds = { x: floats(m, k), r: floats(m, n), u: floats(m, rank) };
  const weight = typed('bf16', make.weight('bf16', n, k).data);

  test('zeros change no bit', async () => {
    using w = Tensor.fromData('bf16', [n, k], weight);
    using b = Tensor.alloc('f32', [n, rank]);
    for (const engine of [testEngine(), narrowEngine()]) {
      if (!engine) continue;
      const [patched, without] = [true, false].map((patch) => productsWith(engine, feeds, { w, b }, patch));
      sameBits(await patched, await without, engine.activations);
    }
  });

  test('a row does not depend on the rows beside it', async () => {
    using w = Tensor.fromData('bf16', [n, k], weight);
    using b = Tensor.alloc('f32', [n, rank]);
    b.write(floats(n, rank));
    const row = m - 1;
    const single = {
      x: feeds.x.slice(row * k),
      r: feeds.r.slice(row * n),
      u: feeds.u.slice(row * rank),
    };
    const whole = await productsWith(testEngine(), feeds, { w, b }, true);
    const last = Object.fromEntries(Object.entries(whole).map(([name, y]) => [name, y.slice(row * n)]));
    sameBits(await productsWith(testEngine(), single, { w, b }, true), last, 'one row');
  });
});

test('flops of patches are counted', async () => {
  const [w, b] = [Tensor.alloc('f32', [24, 8]), Tensor.alloc('f32', [24, 3])];
  const g = new Graph();
  const [n, r] = [g.dim('N', 50), g.dim('R', 50)];
  const [x, rows] = [g.feed('x', 'f32', [n, 8]), g.feed('rows', 'i32', [r])];
  const patch = { u: g.feed('u', 'f32', [r, 3]), b: g.state(b) };
  const weight = g.state(w);
  g.output(
    'y',
    g.tag('plain', () => linear(x, weight, { rows, patch })),
  );
  g.output(
    'z',
    g.tag('gated', () => linearGated(x, weight, weight, { act: 'silu', rows, upPatch: patch })),
  );
  using program = Program.compile(g, testEngine());
  const feeds = { x: new Float32Array(72), rows: Int32Array.of(0, 3, 4, 8), u: new Float32Array(12) };
  const { counters } = await program.run({ dims: { N: 9, R: 4 }, feeds });
  expect(counters).toEqual({
    plain: { flops: 2 * 4 * 24 * (8 + 3), rows: 0 },
    gated: { flops: 2 * 4 * 24 * (8 + 8 + 3), rows: 0 },
  });
  w.dispose();
  b.dispose();
});

describe('shapes that do not fit are named', () => {
  const parts = (g: Graph, u: number[], b: number[]) => ({
    x: g.feed('x', 'f32', [5, 3]),
    w: g.weight(Tensor.alloc('f32', [4, 3]), 'w'),
    patch: { u: g.feed('u', 'f32', u), b: g.state(Tensor.alloc('f32', b), 'b') },
  });
  const message = async (build: (g: Graph) => Node | undefined) => {
    const error = await failure((g) => void build(g));
    expect(error).toMatchObject({ code: 'InvalidArgument' });
    return error.message;
  };

  test.each([
    ['rows', [6, 2], [4, 2], '[linear] M must be the same in every operand: 5 in x:f32[5,3], u:f32[6,2]'],
    ['rank', [5, 3], [4, 2], '[linear] P is 3 in u:f32[5,3], more than b:f32[4,2] has'],
    ['outputs', [5, 2], [3, 2], '[linear] N is 4 in w:f32[4,3], more than b:f32[3,2] has'],
  ])('%s', async (_, u, b, expected) => {
    const text = await message((g) => {
      const { x, w, patch } = parts(g, u, b);
      return linear(x, w, { patch });
    });
    expect(text).toBe(expected);
  });

  test('u without b', async () => {
    const error = await failure(
      (g) => {
        const { x, w, patch } = parts(g, [5, 2], [4, 2]);
        g.output('y', linear(x, w, { patch: { u: patch.u, b: null as unknown as Node } }));
      },
      { feeds: { x: new Float32Array(15), u: new Float32Array(10) } },
    );
    expect(error).toMatchObject({ code: 'InvalidProgram' });
    expect(error.message).toContain('[linear] u and b must be given together, got u alone');
  });
});
