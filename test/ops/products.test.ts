// Products have the bits of the CPU engine on every device, whichever of a device's loops computes them.
import { test } from 'vitest';
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
  const built = construct(c, ({ dtype, shape, data }: Input) =>
    Tensor.fromData(dtype, shape.map(sizeOf), typed(dtype, data)),
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
    build: ({ x, w, wide, other, b, rows, gate, some, r, dy, acc }) => ({
      y: linear(x, w, { bias: b, act: 'relu', rows }),
      prefix: linear(x, wide, { width: n }),
      gated: linearGated(x, w, w, { bg: b, act: 'relu' }),
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

const all = shapes.flatMap(([m, n, k]) =>
  (['f32', 'bf16', 'f16'] as DType[]).map((dtype) => productsOf(m, n, k, dtype)),
);

// The portable kernels round products and sums separately.
test.skipIf(loadAddon().info().isa === 'portable').each(all)('$name', async (c) => {
  using cpu = new Engine('cpu');
  sameBits(await outputs(c, testEngine()), await outputs(c, cpu), testEngine().device);
});

const narrow = narrowEngine();
if (narrow) test.each(all)('$name: with bf16 activations', (c) => checkNative(c, narrow));
