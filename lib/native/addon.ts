// The whole surface of the native addon. Everything else in lib/ goes through the wrappers beside this file.

/** Element types: IEEE single, bfloat16, IEEE half, 32-bit integer. */
export type DType = 'f32' | 'bf16' | 'f16' | 'i32';

/** Carries elements between JavaScript and native memory: bf16 and f16 travel as their 16 bits. */
export type TypedArray = Float32Array | Uint16Array | Int32Array;

/** Where programs run: the CPU, the first NVIDIA GPU, or an emulation of one on the CPU (slow; for tests). */
export type DeviceName = 'cpu' | 'cuda' | 'simt';

/** What the native addon is and finds on this machine. */
export interface NativeInfo {
  /** Of the package it was built for. */
  readonly version: string;
  /** Instruction set in use, and those this machine and build could use. */
  readonly isa: string;
  readonly isaAvailable: string[];
  /** Threads that kernels use, and CPUs this process may run on. */
  readonly threads: number;
  readonly hardwareThreads: number;
  /** Every device: whether it can be used, and its name, or why it cannot and what to do. */
  readonly devices: Readonly<Record<DeviceName, { readonly available: boolean; readonly description: string }>>;
}

/** Live bytes and objects of the process, all worker threads together. */
export interface NativeMemory {
  /** Files mapped read-only. */
  readonly mappedBytes: number;
  /** Tensors in heap memory. */
  readonly heapBytes: number;
  /** Packed copies of weights. */
  readonly packedBytes: number;
  /** Arenas of temporaries and scratch of engines. */
  readonly arenaBytes: number;
  /** Memory of other devices: weights, states, arenas. */
  readonly deviceBytes: number;
  /** Undisposed tensors and programs. */
  readonly tensors: number;
  readonly programs: number;
}

export interface NativeMapping {
  readonly byteLength: number;
  read(offset: number, length: number): Uint8Array;
  dispose(): void;
}

export interface NativeTensor {
  readonly dtype: DType;
  readonly shape: number[];
  readonly writable: boolean;
  readonly disposed: boolean;
  slice(elementOffset: number, shape: readonly number[], strides?: readonly number[]): NativeTensor;
  part(axis: number, index: number, count: number): NativeTensor;
  setPackAs(dtype: DType): void;
  read(): TypedArray;
  readFloat(): Float32Array;
  write(data: TypedArray): void;
  dispose(): void;
}

export interface NativeProgram {
  readonly arenaBytes: number;
  dispose(): void;
}

export interface NativeRunResult {
  /** One array per output tensor, in tensor order, with the sizes the run ended with. */
  readonly outputs: TypedArray[];
  /** The value of every dim, those that ops produced included. */
  readonly dims: Int32Array;
  /** Two numbers per tag: flops, rows. */
  readonly counters: Float64Array;
  /** Milliseconds on the engine's thread. */
  readonly ms: number;
  /** Of these, not spent waiting for a device: all of them on the CPU. */
  readonly hostMs: number;
  /** Milliseconds of the kernels alone, between two events on the device (their emulation, on `simt`); 0 on the CPU. */
  readonly deviceMs: number;
}

export interface NativeEngine {
  run(
    program: NativeProgram,
    dims: Int32Array,
    feeds: readonly TypedArray[],
  ): { promise: Promise<NativeRunResult>; id: number };
  /** Ends a run by its id; one that is over already is left alone. */
  abort(id: number): void;
  dispose(): void;
}

export interface NativeAddon {
  info(): NativeInfo;
  setThreads(threads: number): void;
  opNames(): string[];
  opSignatures(): string[];
  opAttributes(): string[][];
  memory(): NativeMemory;
  /**
   * What the emulated device has done in this process, for tests: kernels, lines they prefetched, copies from and to the host,
   * and `depth`, how many operations came one after the other on the longest path of every recording that was launched.
   */
  emulatedWork(): Record<'launches' | 'prefetches' | 'uploads' | 'uploadedBytes' | 'downloads' | 'depth', number>;
  /** Aborts what runs and joins every engine of this thread: `process.exit()` runs no cleanup hooks. */
  stopEngines(): void;
  readonly Mapping: new (path: string) => NativeMapping;
  readonly Tensor: {
    alloc(dtype: DType, shape: readonly number[]): NativeTensor;
    fromData(dtype: DType, shape: readonly number[], data: TypedArray): NativeTensor;
    view(mapping: NativeMapping, byteOffset: number, dtype: DType, shape: readonly number[]): NativeTensor;
  };
  readonly Program: new (
    code: Int32Array,
    attributes: Float64Array,
    opNames: readonly string[],
    tensors: readonly NativeTensor[],
    narrow: boolean,
  ) => NativeProgram;
  readonly Engine: new (device: DeviceName) => NativeEngine;
}
