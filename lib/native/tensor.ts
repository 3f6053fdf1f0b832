// Tensors in native memory and files mapped into it.
import type { DType, NativeMapping, NativeTensor, TypedArray } from './addon.js';
import { DisposedError } from './errors.js';
import { loadAddon } from './load.js';
import { wrapNative } from './translate.js';

/** A file mapped read-only. Tensors made from it keep the mapping alive after its own `dispose()`. */
export class Mapping implements Disposable {
  /** The addon's object behind this one. */
  readonly native: NativeMapping;
  /** Size of the file in bytes. */
  readonly byteLength: number;

  /**
   * Maps the whole file at `path`.
   * @throws InvalidFileError when it is missing, empty or not a regular file.
   */
  constructor(path: string) {
    this.native = wrapNative(() => new (loadAddon().Mapping)(path));
    this.byteLength = this.native.byteLength;
  }

  /** A copy of `length` bytes from byte `offset` on. */
  read(offset: number, length: number): Uint8Array {
    return wrapNative(() => this.native.read(offset, length));
  }

  /** Ends the use of this object; idempotent. */
  dispose(): void {
    this.native.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

/**
 * A dense array in native memory: a weight (read-only) or a state (writable). Its memory is freed by `dispose()`, or
 * later with the last slice, program or running job that uses it; garbage collection is only the safety net.
 */
export class Tensor implements Disposable {
  /** The addon's object behind this one. */
  readonly native: NativeTensor;
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly writable: boolean;
  readonly #parts = new Map<string, Tensor>();

  private constructor(native: NativeTensor) {
    this.native = native;
    this.dtype = native.dtype;
    this.shape = Object.freeze(native.shape);
    this.writable = native.writable;
  }

  /** A writable tensor of zeros. */
  static alloc(dtype: DType, shape: readonly number[]): Tensor {
    return wrapNative(() => new Tensor(loadAddon().Tensor.alloc(dtype, shape)));
  }

  /** A read-only copy of `data`: Float32Array for f32, Int32Array for i32, Uint16Array (raw bits) for bf16 and f16. */
  static fromData(dtype: DType, shape: readonly number[], data: TypedArray): Tensor {
    return wrapNative(() => new Tensor(loadAddon().Tensor.fromData(dtype, shape, data)));
  }

  /** A read-only view of a mapped file, starting at byte `byteOffset`, which must be a multiple of the element size. */
  static view(mapping: Mapping, byteOffset: number, dtype: DType, shape: readonly number[]): Tensor {
    return wrapNative(() => new Tensor(loadAddon().Tensor.view(mapping.native, byteOffset, dtype, shape)));
  }

  /** Number of elements. */
  get size(): number {
    return this.shape.reduce((product, extent) => product * extent, 1);
  }

  get disposed(): boolean {
    return this.native.disposed;
  }

  /**
   * A view that shares this tensor's memory and writability: `shape` starting `elementOffset` elements after the first,
   * with `strides` in elements (contiguous when left out). It may not reach past this tensor.
   */
  slice(elementOffset: number, shape: readonly number[], strides?: readonly number[]): Tensor {
    return wrapNative(() => new Tensor(this.native.slice(elementOffset, shape, strides)));
  }

  /**
   * Part `index` of `count` equal parts along an axis of a matrix, as a slice that lives as long as this tensor: the same
   * object at every call. Its products read the packed copy of this tensor where its rows fill whole panels of that.
   */
  part(axis: 0 | 1, index: number, count: number): Tensor {
    const key = `${axis} ${index} ${count}`;
    let part = this.#parts.get(key);
    if (!part) {
      part = wrapNative(() => new Tensor(this.native.part(axis, index, count)));
      this.#parts.set(key, part);
    }
    return part;
  }

  /** Element type of the packed copy that matrix products make of this weight. Before its first use. */
  setPackAs(dtype: DType): void {
    wrapNative(() => this.native.setPackAs(dtype));
  }

  /** A copy of the elements (bf16 and f16 as raw bits). The tensor must be contiguous, and no pending run write to it. */
  read(): TypedArray {
    return wrapNative(() => this.native.read());
  }

  /** A copy of a floating tensor, converted to f32, with any strides. No pending run may write to it. */
  readFloat(): Float32Array {
    return wrapNative(() => this.native.readFloat());
  }

  /** Replaces all elements. The tensor must be writable, contiguous, and used by no pending run. */
  write(data: TypedArray): void {
    wrapNative(() => this.native.write(data));
  }

  /** Ends the use of this object; idempotent. A run that uses the tensor goes on safely. */
  dispose(): void {
    for (const part of this.#parts.values()) part.dispose();
    this.native.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  /** @throws DisposedError after `dispose()`. */
  assertAlive(): void {
    if (this.disposed) throw new DisposedError('[Tensor] used after dispose()');
  }
}
