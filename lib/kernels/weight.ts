// Weights of kernels: arrays in native memory, packed once for products and used by any number of calls.
import { type DType, InvalidArgumentError, Tensor, type TypedArray } from '../native/index.js';
import { describe } from './arguments.js';

/** How the elements of a weight are stored: a `Float32Array`, or a `Uint16Array` of raw bf16 or f16 bits. */
export type WeightDtype = Exclude<DType, 'i32'>;

let weights = 0;

/**
 * A matrix or vector that calls multiply with, made by {@link Kernels.weight}. Its elements are copied into native
 * memory; the first product packs them, later ones reuse that copy. Dispose of it when no more calls will use it, or
 * leave that to the `Kernels` it belongs to.
 */
export class Weight implements Disposable {
  /** `[outputs, inputs]` of a matrix, `[outputs]` of a bias. */
  readonly shape: readonly number[];
  /** How its elements are stored. */
  readonly dtype: WeightDtype;
  /** @internal */
  readonly tensor: Tensor;
  /** @internal Unique in the process. */
  readonly id = weights++;
  readonly #onDispose: (weight: Weight) => void;

  /** @internal */
  constructor(data: TypedArray, shape: readonly number[], dtype: WeightDtype, onDispose: (weight: Weight) => void) {
    const extents = Array.isArray(shape) && shape.length >= 1 && shape.length <= 2;
    if (!extents || shape.some((extent) => !Number.isSafeInteger(extent) || extent < 1)) {
      throw new InvalidArgumentError(
        `[weight] shape must be [outputs, inputs] or [outputs], positive integers, got ${JSON.stringify(shape)}`,
      );
    }
    if (!['f32', 'bf16', 'f16'].includes(dtype)) {
      throw new InvalidArgumentError(`[weight] dtype must be f32, bf16 or f16, got ${String(dtype)}`);
    }
    const [wanted, size] = [dtype === 'f32' ? Float32Array : Uint16Array, shape.reduce((a, b) => a * b, 1)];
    if (!(data instanceof wanted) || data.length !== size) {
      throw new InvalidArgumentError(
        `[weight] data of ${dtype} [${shape}] must be a ${wanted.name} of ${size}, got ${describe(data)}`,
      );
    }
    this.tensor = Tensor.fromData(dtype, shape, data);
    this.shape = this.tensor.shape;
    this.dtype = dtype;
    this.#onDispose = onDispose;
  }

  /** Whether `dispose()` was called, on it or on its `Kernels`. */
  get disposed(): boolean {
    return this.tensor.disposed;
  }

  /** Frees it, and the programs compiled for it; idempotent. A call under way goes on safely. */
  dispose(): void {
    if (this.disposed) return;
    this.tensor.dispose();
    this.#onDispose(this);
  }

  /** The same as `dispose()`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}
