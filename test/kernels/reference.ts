// What kernels compute, in float64 and as plainly as it can be written.
import { random } from '../ops/harness.js';

/** Rows of numbers. */
export type Matrix = readonly (readonly number[])[];

/** Values in (-1, 1) that are exact in f32. */
export function floats(seed: number, count: number): Float32Array {
  const next = random(seed);
  return Float32Array.from({ length: count }, () => next() * 2 - 1);
}

export const matrix = (values: ArrayLike<number>, columns: number): number[][] =>
  Array.from({ length: values.length / columns }, (_, r) =>
    Array.from({ length: columns }, (_, c) => values[r * columns + c]),
  );

export const flat = (m: Matrix): number[] => m.flat();

/** `x w^T + bias`. */
export const product = (x: Matrix, w: Matrix, bias?: ArrayLike<number>): number[][] =>
  x.map((row) => w.map((of, n) => row.reduce((sum, v, k) => sum + v * of[k], bias?.[n] ?? 0)));

export const act: Record<string, (x: number) => number> = {
  none: (x) => x,
  relu: (x) => Math.max(0, x),
  silu: (x) => x / (1 + Math.exp(-x)),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
};

export function softmax(z: readonly number[]): number[] {
  const largest = Math.max(...z);
  const e = z.map((v) => Math.exp(v - largest));
  const total = e.reduce((a, b) => a + b);
  return e.map((v) => v / total);
}

export const argmax = (z: readonly number[]): number => z.indexOf(Math.max(...z));

/** The `ceil(capacity T)` best of every segment, and where segments start among them. */
export function topk(z: ArrayLike<number>, offsets: readonly number[], capacity: readonly number[]) {
  const rows: number[] = [];
  const starts = [0];
  for (const [s, share] of capacity.entries()) {
    const all = Array.from({ length: offsets[s + 1] - offsets[s] }, (_, i) => offsets[s] + i);
    const best = all.sort((a, b) => z[b] - z[a] || a - b).slice(0, Math.ceil(share * all.length - 1e-6));
    rows.push(...best.sort((a, b) => a - b));
    starts.push(rows.length);
  }
  return { rows, starts };
}
