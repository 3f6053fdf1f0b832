// Products have the bits of the CPU engine on every device, whichever of a device's loops computes them.
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { linear, linearAdd, linearDw, linearDx, linearGated, Program } from '../../lib/graph/index.js';
import { type DType, Engine, loadAddon, Tensor, type TypedArray } from '../../lib/native/index.js';
import {
  type Case,
  checkNative,
  construct,
  type Input,
  inputs,
  narrowEngine,
  type Size,
  sameBits,
  testEngine,
  typed,
} from './harness.js';

const sizeOf = (size: Size): number => (typeof size === 'number' ? size : size[1]);

async function outputs(c: Case, engine: Engine): Promise<Record<string, TypedArray>> {
  const built = construct(
    c,
    ({ dtype, shape, data }: Input) => Tensor.fromData(dtype, shape.map(sizeOf), typed(dtype, data)),
    engine.activations === 'bf16',
  );
  for (const [name, node] of Object.entries(built.outputs)) built.graph.output(name, node);
  using program = Program.compile(built.graph, engine);
  const { outputs } = await program.run(built.run);
  for (const tensor of built.tensors.values()) tensor.dispose();
  return outputs;
}

// Rows, outputs, inputs: few rows (whole pieces of 16 bytes, and not), some, more than a device's smaller tiles, and
// tiles enough for the larger ones; depths with and without a rest.
const shapes = [
  [1, 70, 264],
  [5, 33, 8],
  [8, 40, 500],
  [8, 40, 37],
  [9, 33, 136],
  [41, 1, 72],
  [70, 3, 130],
  [27, 70, 264],
  [32, 16, 128],
  [33, 70, 40],
  [60, 19, 67],
  [140, 130, 24],
  [300, 300, 37],
  [257, 260, 64],
] as const;

const productsOf = (m: number, n: number, k: number, dtype: DType): Case => {
  const make = inputs(m + n + k);
  const selected = Math.ceil(m / 2);
  return {
    name: `[${m},${k}] x [${n},${k}] of ${dtype}`,
    inputs: {
      x: make.f32(['M', m], k),
      w: make.weight(dtype, n, k),
      v: make.weight(dtype, n, k),
      wide: make.weight(dtype, n + 3, k + 8),
      other: make.weight('f32', n, k),
      b: make.weight(dtype, n),
      rows: make.rows('R', selected, m),
      gate: make.f32(['R', selected]),
      some: make.f32(['R', selected], k),
      r: make.f32(['M', m], n),
      dy: make.f32(['M', m], n),
      acc: make.f32(['M', m], k),
    },
    build: ({ x, w, v, wide, other, b, rows, gate, some, r, dy, acc }) => ({
      y: linear(x, w, { bias: b, act: 'relu', rows }),
      prefix: linear(x, wide, { width: n }),
      gated: linearGated(x, w, v, { bg: b, act: 'relu' }),
      mixed: linearGated(x, w, other, { act: 'relu', rows }),
      added: linearAdd(r, some, w, { bias: b, rows, gate }),
      dx: linearDx(dy, w),
      accumulated: linearDx(dy, w, acc),
      dw: linearDw(dy, x),
      dwGated: linearDw(dy, x, { dyrows: rows, xrows: rows, gate }),
    }),
    // Results are rounded to bf16 once, which is half of this.
    narrowTolerance: 0.004,
  };
};

// Patches of few columns and of more than a step of k has, to every product of a weight.
const patchShapes = [
  [1, 70, 264, 8],
  [5, 33, 8, 3],
  [27, 70, 264, 17],
  [33, 70, 40, 64],
  [60, 19, 67, 2],
  [70, 3, 130, 4],
  [300, 300, 37, 40],
] as const;

const patchesOf = (m: number, n: number, k: number, rank: number, dtype: DType, other: DType): Case => {
  const make = inputs(m + n + k + rank);
  const selected = Math.ceil(m / 2);
  return {
    name: `[${m},${k}] x [${n},${k}] of ${dtype} + ${rank} ${other}`,
    inputs: {
      x: make.f32(['M', m], k),
      w: make.weight(dtype, n, k),
      v: make.weight(dtype, n, k),
      bias: make.weight('f32', n),
      rows: make.rows('R', selected, m),
      gate: make.f32(['R', selected]),
      some: make.f32(['R', selected], k),
      r: make.f32(['M', m], n),
      u: make.f32(['M', m], rank),
      few: make.f32(['R', selected], rank),
      b: make.weight(other, n, rank),
      wide: make.weight(other, n + 3, rank + 5),
    },
    build: ({ x, w, v, bias, rows, gate, some, r, u, few, b, wide }) => ({
      y: linear(x, w, { bias, act: 'relu', rows, patch: { u: few, b: wide } }),
      gated: linearGated(x, w, v, { act: 'relu', gatePatch: { u, b }, upPatch: { u, b: wide } }),
      upOnly: linearGated(x, w, v, { bg: bias, act: 'relu', rows, upPatch: { u: few, b } }),
      gateOnly: linearGated(x, w, v, { act: 'relu', rows, gatePatch: { u: few, b } }),
      added: linearAdd(r, some, w, { bias, rows, gate, patch: { u: few, b } }),
    }),
    narrowTolerance: 0.004,
  };
};

const all = shapes.flatMap(([m, n, k]) =>
  (['f32', 'bf16', 'f16'] as DType[]).map((dtype) => productsOf(m, n, k, dtype)),
);
for (const [m, n, k, rank] of patchShapes) {
  all.push(patchesOf(m, n, k, rank, 'f32', 'f32'), patchesOf(m, n, k, rank, 'bf16', 'f32'));
  all.push(patchesOf(m, n, k, rank, 'bf16', 'bf16'), patchesOf(m, n, k, rank, 'f16', 'bf16'));
}

// The portable kernels round products and sums separately.
test.skipIf(loadAddon().info().isa === 'portable').each(all)('$name', async (c) => {
  using cpu = new Engine('cpu');
  sameBits(await outputs(c, testEngine()), await outputs(c, cpu), testEngine().device);
});

const narrow = narrowEngine();
if (narrow) test.each(all)('$name: with bf16 activations', (c) => checkNative(c, narrow));

/** A weight of which a prefix is used: what lies beyond is NaN, and must not have any effect. */
function widened(input: Input, rows: number, columns: number): Input {
  const [n, k] = input.shape.map(sizeOf);
  const data = Array.from({ length: rows * columns }, (_, i) => {
    const [r, c] = [Math.floor(i / columns), i % columns];
    return r < n && c < k ? input.data[r * k + c] : Number.NaN;
  });
  return { ...input, shape: [rows, columns], data };
}

// For the four multiprocessors of the emulated device: pairs of blocks with tiles of 256 columns, twice and with more of k
// than the stages hold, and with tiles of 128, for products of few tiles; blocks by themselves where C is not as high;
// all this for one weight, for two, and across k.
const tensorShapes = [
  [260, 504, 136],
  [260, 72, 504],
  [140, 130, 136],
  [520, 100, 200],
  [100, 760, 40],
  [100, 504, 40],
  [100, 72, 704],
] as const;

const onTensorCores = ([m, n, k]: readonly [number, number, number]): Case => {
  const make = inputs(m + n + k);
  const selected = Math.ceil(m / 2);
  return {
    name: `[${m},${k}] x [${n},${k}]`,
    inputs: {
      x: make.f32(['M', m], k),
      w: make.weight('bf16', n, k),
      v: make.weight('bf16', n, k),
      b: make.weight('f32', n),
      rows: make.rows('R', selected, m),
      gate: make.f32(['R', selected]),
      some: make.f32(['R', selected], k),
      r: make.f32(['M', m], n),
      dy: make.f32(['M', m], n),
      acc: make.f32(['M', m], k),
    },
    build: ({ x, w, v, b, rows, gate, some, r, dy, acc }) => ({
      added: linearAdd(r, some, w, { bias: b, rows, gate }),
      y: linear(x, w, { bias: b, act: 'relu' }),
      gated: linearGated(x, w, v, { bg: b, act: 'silu', rows }),
      accumulated: linearDx(dy, w, acc),
    }),
    wrt: ['some', 'gate'],
    narrowTolerance: 0.004,
  };
};

// The used part of a weight is set at run, and rows of the activations need not begin at multiples of 16 bytes.
const ofPrefixes = ([m, n, k]: readonly [number, number, number]): Case => {
  const make = inputs(m + n + k);
  const wide = () => widened(make.weight('bf16', n, k), n + 5, Math.ceil((k + 3) / 8) * 8);
  return {
    name: `prefix of [${n},${k}] of wider weights`,
    inputs: {
      x: make.f32(['M', m], ['K', k]),
      dy: make.f32(['M', m], ['N', n]),
      still: make.f32(['M', m], k),
      w: wide(),
      v: wide(),
    },
    build: ({ x, dy, still, w, v }) => ({
      y: linear(x, w, { width: dy.shape[1] }),
      constant: linear(still, w, { width: n }),
      gated: linearGated(x, w, v, { act: 'relu', width: dy.shape[1] }),
      dx: linearDx(dy, w, null, x.shape[1]),
      dxConstant: linearDx(dy, w, null, k),
    }),
    narrowTolerance: 0.004,
  };
};

const tensorCases = [
  ...tensorShapes.map(onTensorCores),
  patchesOf(260, 504, 136, 16, 'bf16', 'f32'),
  patchesOf(140, 130, 136, 70, 'bf16', 'bf16'),
  patchesOf(100, 504, 40, 5, 'bf16', 'f32'),
  ...(
    [
      [300, 260, 100],
      [140, 121, 72],
      [150, 128, 192],
    ] as const
  ).map(ofPrefixes),
];

if (narrow) test.each(tensorCases)('on tensor cores: $name', (c) => checkNative(c, narrow));

// The emulation adds in one order, whatever computes; GPUs need not.
if (testEngine().device === 'simt') {
  // Of a device before Hopper, and of one that cannot run two neighbouring blocks at once.
  describe.each([
    ['ELASTIFORM_SIMT_CAPABILITY', '80', tensorCases],
    ['ELASTIFORM_SIMT_MULTIPROCESSORS', '1', tensorCases.slice(0, 2)],
  ] as const)('by mma.sync, %s=%s', (name, value, cases) => {
    let engine: Engine;
    /** The device is asked when an engine records a program. */
    const onSuchDevice = (c: Parameters<typeof outputs>[0]) => {
      process.env[name] = value;
      return outputs(c, engine).finally(() => delete process.env[name]);
    };
    beforeAll(async () => {
      engine = new Engine(undefined, { activations: 'bf16' });
      await onSuchDevice(onTensorCores([1, 1, 1]));
    });
    afterAll(() => engine.dispose());
    test.each([...cases])('$name: the bits of wgmma', async (c) => {
      sameBits(await onSuchDevice(c), await outputs(c, narrow as Engine), 'mma.sync');
    });
  });

  test.each([504, 72])('wgmma fetches the %i columns that it adds to ahead, each line once', async (n) => {
    const make = inputs(n);
    const [m, selected, k] = [300, 200, 520];
    const before = loadAddon().emulatedWork().prefetches;
    await outputs(
      {
        name: 'lines',
        inputs: {
          r: make.f32(['M', m], n),
          some: make.f32(['R', selected], k),
          w: make.weight('bf16', n, k),
          rows: make.rows('R', selected, m),
        },
        build: ({ r, some, w, rows }) => ({ added: linearAdd(r, some, w, { rows }) }),
      },
      narrow as Engine,
    );
    const line = 128 / Float32Array.BYTES_PER_ELEMENT;
    expect(loadAddon().emulatedWork().prefetches - before).toBe(selected * Math.ceil(n / line));
  });
}
