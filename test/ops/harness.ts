// One case of an op: random inputs and a builder. Checked against float64: forward, gradients, and the addon's results.
import { afterAll, describe, expect, test } from 'vitest';
import { gradients } from '../../lib/graph/autodiff.js';
import type { Dim, Shape } from '../../lib/graph/dims.js';
import { Graph, type Node } from '../../lib/graph/graph.js';
import { activation } from '../../lib/graph/ops/elementwise.js';
import { Program, type RunOptions } from '../../lib/graph/program.js';
import { type DType, Engine, loadAddon, Tensor, type TypedArray } from '../../lib/native/index.js';
import { type Environment, interpret } from './interpreter.js';
import { f64, type Reference, type Value } from './reference.js';

/** A constant, or the name and current size of a dim that is set at run (its bound is larger). */
export type Size = number | readonly [name: string, size: number];

export interface Input {
  kind: 'feed' | 'weight' | 'state';
  dtype: DType;
  shape: readonly Size[];
  data: readonly number[];
}

export interface Case {
  name: string;
  inputs: Record<string, Input>;
  /** Dims beside those of the inputs: current size and bound. */
  dims?: Record<string, readonly [size: number, bound: number]>;
  /** Returns named outputs. The gradient is taken of the first. */
  build: (nodes: Record<string, Node>, dims: Record<string, Dim>) => Record<string, Node>;
  /** Inputs to differentiate with respect to. */
  wrt?: readonly string[];
  /** References for the finite differences, where the gradient is by design not that of the value. */
  surrogate?: Record<string, Reference>;
  /** Largest difference of the addon's results from float64, relative to the largest magnitude of each result. */
  tolerance?: number;
  /** The same with activations stored as bf16, when the tests run on a device that can. Default: 0.02. */
  narrowTolerance?: number;
}

/** A small seeded generator (mulberry32): uniform in [0, 1). */
export function random(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

const sizeOf = (size: Size): number => (typeof size === 'number' ? size : size[1]);
export const elements = (shape: readonly Size[]): number => shape.reduce<number>((n, size) => n * sizeOf(size), 1);

/** Where every segment starts, and the end: `[0, a, a + b, ...]`. */
export function offsetsOf(lengths: readonly number[]): number[] {
  const offsets = [0];
  for (const length of lengths) offsets.push(offsets[offsets.length - 1] + length);
  return offsets;
}

/** Makers of random inputs; every value is exact in the dtype it is stored in. */
export function inputs(seed: number) {
  const next = random(seed);
  const floats = (shape: readonly Size[]) => Array.from({ length: elements(shape) }, () => Math.fround(next() * 2 - 1));
  // Multiples of 1/64 below 2 have at most 7 significant bits: exact in bf16 and f16 too.
  const coarse = (shape: readonly Size[]) =>
    Array.from({ length: elements(shape) }, () => Math.round((next() * 2 - 1) * 64) / 64);
  const data = (kind: Input['kind'], dtype: DType, shape: readonly Size[], values: readonly number[]): Input => ({
    kind,
    dtype,
    shape,
    data: values,
  });
  return {
    next,
    f32: (...shape: Size[]) => data('feed', 'f32', shape, floats(shape)),
    values: (values: readonly number[], ...shape: Size[]) => data('feed', 'f32', shape, values.map(Math.fround)),
    i32: (values: readonly number[], ...shape: Size[]) => data('feed', 'i32', shape, values),
    /** Integers below `limit`. */
    ids: (limit: number, ...shape: Size[]) =>
      data(
        'feed',
        'i32',
        shape,
        Array.from({ length: elements(shape) }, () => Math.floor(next() * limit)),
      ),
    /** `count` ascending rows of `of`. */
    rows: (name: string, count: number, of: number) => {
      const all = Array.from({ length: of }, (_, i) => ({ i, at: next() }));
      const chosen = all.sort((a, b) => a.at - b.at).slice(0, count);
      const rows = chosen.map(({ i }) => i).sort((a, b) => a - b);
      return data('feed', 'i32', [[name, count]], rows);
    },
    weight: (dtype: DType, ...shape: number[]) => data('weight', dtype, shape, coarse(shape)),
    /** A trainable parameter. */
    param: (...shape: number[]) => data('state', 'f32', shape, floats(shape)),
    state: (dtype: 'f32' | 'i32', values: readonly number[], ...shape: number[]) => data('state', dtype, shape, values),
  };
}

const bf16Bits = (value: number): number => new Uint32Array(Float32Array.of(value).buffer)[0] >>> 16;

function f16Bits(value: number): number {
  const bits = new Uint32Array(Float32Array.of(value).buffer)[0];
  if (value === 0) return bits >>> 16;
  return ((bits >>> 16) & 0x8000) | ((((bits >>> 23) & 0xff) - 112) << 10) | ((bits >>> 13) & 0x3ff);
}

export function typed(dtype: DType, data: readonly number[]): TypedArray {
  if (dtype === 'i32') return Int32Array.from(data);
  if (dtype === 'bf16') return Uint16Array.from(data, bf16Bits);
  if (dtype === 'f16') return Uint16Array.from(data, f16Bits);
  return Float32Array.from(data);
}

/** A tensor without memory, for graphs that are not run by the addon. */
export const fakeTensor = (dtype: DType, shape: readonly number[], writable: boolean): Tensor =>
  ({ dtype, shape, writable }) as unknown as Tensor;

function nativeTensor({ dtype, shape, data, kind }: Input): Tensor {
  const sizes = shape.map(sizeOf);
  if (kind === 'weight') return Tensor.fromData(dtype, sizes, typed(dtype, data));
  const tensor = Tensor.alloc(dtype, sizes);
  tensor.write(typed(dtype, data));
  return tensor;
}

interface Built {
  graph: Graph;
  outputs: Record<string, Node>;
  grads: Record<string, Node>;
  tensors: Map<string, Tensor>;
  run: { dims: Record<string, number>; feeds: Record<string, TypedArray> };
  env: (data?: Record<string, readonly number[]>) => Environment;
}

/** The nearest bf16, ties to even. */
function roundToBf16(value: number): number {
  const words = new Uint32Array(Float32Array.of(value).buffer);
  words[0] = (words[0] + 0x7fff + ((words[0] >>> 16) & 1)) & 0xffff0000;
  return new Float32Array(words.buffer)[0];
}

/**
 * Builds the graph of a case, with its gradients for the cotangent `$seed`.
 *
 * @param narrow what goes in is exact in bf16, and passes like what comes out through an op that may store it so
 */
export function construct(c: Case, tensorOf: (input: Input) => Tensor, narrow = false): Built {
  const cast = (node: Node): Node => (narrow && node.dtype === 'f32' ? activation(node, 'none') : node);
  const exact = (input: Input): Input =>
    narrow && input.kind === 'feed' && input.dtype === 'f32' ? { ...input, data: input.data.map(roundToBf16) } : input;
  const graph = new Graph();
  const sizes: Record<string, number> = {};
  const dim = (name: string, size: number, bound: number): Dim => {
    sizes[name] = size;
    return graph.dim(name, bound);
  };
  const shapeOf = (shape: readonly Size[]): Shape =>
    shape.map((size) => (typeof size === 'number' ? size : dim(size[0], size[1], size[1] + 3)));
  const dims = Object.fromEntries(Object.entries(c.dims ?? {}).map(([name, d]) => [name, dim(name, ...d)]));
  const tensors = new Map<string, Tensor>();
  const nodes: Record<string, Node> = {};
  for (const [name, input] of Object.entries(c.inputs)) {
    if (input.kind === 'feed') {
      nodes[name] = cast(graph.feed(name, input.dtype as 'f32' | 'i32', shapeOf(input.shape)));
    } else {
      const tensor = tensorOf(input);
      tensors.set(name, tensor);
      nodes[name] = graph[input.kind](tensor, name);
    }
  }
  const outputs = c.build(nodes, dims);
  const feeds = Object.entries(c.inputs).flatMap(([name, input]) =>
    input.kind === 'feed' ? [[name, exact(input)]] : [],
  );
  const all: Record<string, Input> = Object.fromEntries(feeds);
  const grads: Record<string, Node> = {};
  if (c.wrt) {
    const [y] = Object.values(outputs);
    const seed = graph.feed('$seed', 'f32', y.shape);
    const shape = y.shape.map((size): Size => (typeof size === 'number' ? size : [size.name, sizes[size.name]]));
    all.$seed = exact(inputs(77).f32(...shape));
    const found = gradients(
      y,
      c.wrt.map((name) => nodes[name]),
      { seed: cast(seed) },
    );
    c.wrt.forEach((name, i) => {
      grads[name] = cast(found[i]);
    });
  }
  const value = (name: string, input: Input, data?: Record<string, readonly number[]>): Value =>
    f64(input.shape.map(sizeOf), data?.[name] ?? input.data);
  return {
    graph,
    outputs: Object.fromEntries(Object.entries(outputs).map(([name, node]) => [name, cast(node)])),
    grads,
    tensors,
    run: {
      dims: sizes,
      feeds: Object.fromEntries(Object.entries(all).map(([name, input]) => [name, typed(input.dtype, input.data)])),
    },
    env: (data) => ({
      dims: sizes,
      feeds: Object.fromEntries(Object.entries(all).map(([name, input]) => [name, value(name, input, data)])),
      tensors: new Map([...tensors].map(([name, tensor]) => [tensor, value(name, c.inputs[name], data)])),
    }),
  };
}

/** Gradients of a case in float64 against central differences of the float64 forward. */
export function checkGradients(c: Case, tolerance = 1e-6, limit = 24): void {
  const built = construct(c, (input) => fakeTensor(input.dtype, input.shape.map(sizeOf), input.kind === 'state'));
  const base = interpret(built.graph, built.env());
  const [y] = Object.values(built.outputs);
  const loss = (name: string, data: readonly number[]): number => {
    const env = { ...built.env({ [name]: data }), override: c.surrogate };
    const value = interpret(built.graph, env);
    const seed = env.feeds.$seed.data;
    return value(y).data.reduce((sum, v, i) => sum + v * seed[i], 0);
  };
  const pick = random(5);
  for (const [name, node] of Object.entries(built.grads)) {
    const gradient = base(node).data;
    const { data } = c.inputs[name];
    expect(gradient.length, `size of the gradient of ${name}`).toBe(data.length);
    const every = data.length <= limit;
    for (let n = 0; n < Math.min(data.length, limit); ++n) {
      const i = every ? n : Math.floor(pick() * data.length);
      const h = 1e-5;
      const at = (delta: number) => loss(name, data.with(i, data[i] + delta));
      const difference = (at(h) - at(-h)) / (2 * h);
      const scale = Math.max(1, Math.abs(difference));
      expect(
        Math.abs(gradient[i] - difference) / scale,
        `d/d${name}[${i}]: ${gradient[i]}, ${difference}`,
      ).toBeLessThan(tolerance);
    }
  }
}

let engine: Engine | null = null;
/** The engine of this test file. */
export function testEngine(): Engine {
  engine ??= new Engine();
  return engine;
}
let narrow: Engine | null = null;
/** The one that stores activations as bf16; null on the CPU. */
export function narrowEngine(): Engine | null {
  if (testEngine().device !== 'cpu') narrow ??= new Engine(undefined, { activations: 'bf16' });
  return narrow;
}
afterAll(() => {
  engine?.dispose();
  narrow?.dispose();
});

export function compare(actual: ArrayLike<number>, expected: ArrayLike<number>, tolerance: number, what: string): void {
  expect(actual.length, `size of ${what}`).toBe(expected.length);
  let scale = 1;
  for (let i = 0; i < expected.length; ++i) scale = Math.max(scale, Math.abs(expected[i]));
  for (let i = 0; i < expected.length; ++i) {
    const difference = Math.abs(actual[i] - expected[i]);
    if (!(difference <= tolerance * scale)) {
      expect.fail(`${what}[${i}] is ${actual[i]}, expected ${expected[i]} (largest magnitude ${scale})`);
    }
  }
}

/** `toEqual` for arrays too long for it. */
export function sameBits(
  actual: Readonly<Record<string, TypedArray>>,
  expected: Readonly<Record<string, TypedArray>>,
  what: string,
): void {
  const bytes = ({ buffer, byteOffset, byteLength }: TypedArray) => Buffer.from(buffer, byteOffset, byteLength);
  expect(Object.keys(actual), what).toEqual(Object.keys(expected));
  for (const [name, wanted] of Object.entries(expected)) {
    if (bytes(actual[name]).equals(bytes(wanted))) continue;
    expect(actual[name].length, `${what}: size of ${name}`).toBe(wanted.length);
    const at = wanted.findIndex((value, i) => !Object.is(value, actual[name][i]));
    expect.fail(`${what}: ${name}[${at}] is ${actual[name][at]}, expected ${wanted[at]}`);
  }
}

/** Runs a case through the addon and compares outputs, gradients and state with float64; the same bits on 1 and 2 threads. */
export async function checkNative(c: Case, engine = testEngine()): Promise<void> {
  const narrow = engine.activations === 'bf16';
  const built = construct(c, nativeTensor, narrow);
  const { graph, outputs, grads, tensors } = built;
  const tolerance = narrow ? (c.narrowTolerance ?? 0.02) : (c.tolerance ?? 2e-5);
  const env = built.env();
  const value = interpret(graph, env);
  const wanted = new Map<string, Node>(Object.entries(outputs));
  for (const [name, node] of Object.entries(grads)) if (graph.resolve(node).step) wanted.set(`d ${name}`, node);
  for (const [name, node] of wanted) graph.output(name, node);

  using program = Program.compile(graph, engine);
  const writable = [...tensors].filter(([name]) => c.inputs[name].kind === 'state');
  const runs: { results: Record<string, TypedArray>; state: Record<string, TypedArray> }[] = [];
  for (const threads of [1, 2]) {
    loadAddon().setThreads(threads);
    for (const [name, tensor] of writable) tensor.write(typed(tensor.dtype, c.inputs[name].data));
    const { outputs: results } = await program.run(built.run);
    runs.push({ results, state: Object.fromEntries(writable.map(([name, tensor]) => [name, tensor.read()])) });
  }
  sameBits(runs[1].results, runs[0].results, 'two threads');
  sameBits(runs[1].state, runs[0].state, 'two threads');

  for (const [name, node] of wanted) {
    compare(runs[0].results[name], value(node).data, node.dtype === 'i32' ? 0 : tolerance, name);
  }
  for (const [name, tensor] of writable) {
    compare(runs[0].state[name], (env.tensors.get(tensor) as Value).data, tolerance, `state ${name}`);
  }
  for (const tensor of tensors.values()) tensor.dispose();
}

/** Registers the tests of cases. */
export function cases(op: string, list: readonly Case[]): void {
  describe(op, () => {
    for (const c of list) {
      if (c.wrt) test(`${c.name}: gradients are finite differences`, () => checkGradients(c));
      test(`${c.name}: the addon agrees with float64`, () => checkNative(c));
      const narrow = narrowEngine();
      if (narrow) test(`${c.name}: with bf16 activations too`, () => checkNative(c, narrow));
    }
  });
}

/** Runs a graph whose only purpose is to fail; resolves to the error. */
export async function failure(build: (graph: Graph) => void, run: RunOptions = {}): Promise<Error & { code?: string }> {
  try {
    const graph = new Graph();
    build(graph);
    using program = Program.compile(graph, testEngine());
    await program.run(run);
  } catch (error) {
    return error as Error;
  }
  throw new Error('expected the run to fail');
}
