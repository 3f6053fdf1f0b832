// Checks of what callers hand to kernels.
import { type Act, activations } from '../graph/ops/names.js';
import { InvalidArgumentError } from '../native/errors.js';

/** What a value is, for messages: `Float32Array of 12`, `undefined`. */
export function describe(value: unknown): string {
  if (ArrayBuffer.isView(value) && 'length' in value) return `${value.constructor.name} of ${value.length}`;
  if (Array.isArray(value)) return `Array of ${value.length}`;
  return typeof value === 'object' && value !== null ? (value.constructor?.name ?? 'object') : String(value);
}

/** The number of rows of `width` features in x. */
export function rowsOf(api: string, name: string, x: unknown, width: number): number {
  if (x instanceof Float32Array && x.length % width === 0) return x.length / width;
  throw new InvalidArgumentError(
    `[${api}] ${name} must be a Float32Array of rows of ${width} elements, got ${describe(x)}`,
  );
}

/** Throws unless `values` is f32 of this length. */
export function floats(api: string, name: string, values: unknown, length: number, or = ''): void {
  if (values instanceof Float32Array && values.length === length) return;
  throw new InvalidArgumentError(`[${api}] ${name} must be ${or}a Float32Array of ${length}, got ${describe(values)}`);
}

/** How many rows are selected; null: all. */
export function selectedOf(api: string, rows: unknown): number | null {
  if (rows === undefined) return null;
  if (rows instanceof Int32Array) return rows.length;
  throw new InvalidArgumentError(`[${api}] rows must be an Int32Array, ascending and unique, got ${describe(rows)}`);
}

/** A prefix of `all` units; default all. */
export function widthOf(api: string, width: unknown, all: number): number {
  if (width === undefined) return all;
  if (Number.isInteger(width) && (width as number) >= 1 && (width as number) <= all) return width as number;
  throw new InvalidArgumentError(`[${api}] width must be an integer from 1 to ${all}, got ${String(width)}`);
}

/** Throws unless it is an activation function. */
export function checkAct(api: string, act: Act): void {
  if (activations.includes(act)) return;
  throw new InvalidArgumentError(`[${api}] act must be one of ${activations.join(', ')}, got ${String(act)}`);
}
