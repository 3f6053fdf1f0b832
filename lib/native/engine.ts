// Compiled programs and the engine that runs them on a thread of its own.
import type { DeviceName, DType, NativeEngine, NativeProgram, NativeRunResult, TypedArray } from './addon.js';
import { InvalidArgumentError } from './errors.js';
import { loadAddon } from './load.js';
import type { Tensor } from './tensor.js';
import { fromNative, wrapNative } from './translate.js';

/** A validated and planned program. It keeps the memory of its tensors alive. */
export class CompiledProgram implements Disposable {
  /** The addon's object behind this one. */
  readonly native: NativeProgram;
  /** Bytes of temporaries that a run needs when every dim is at its bound. */
  readonly arenaBytes: number;

  /**
   * @param code - the encoded program, version 1 (see native/runtime/program.h)
   * @param attributes - the attributes of all steps
   * @param opNames - the ops that the steps refer to by index
   * @param tensors - the bound tensors, in the order their entries appear in `code`
   * @param activations - of an engine that is to run it: how temporaries may be stored
   * @throws InvalidProgramError that names the step and op that is wrong
   */
  constructor(
    code: Int32Array,
    attributes: Float64Array,
    opNames: readonly string[],
    tensors: readonly Tensor[],
    activations: Activations = 'f32',
  ) {
    const natives = tensors.map((tensor) => tensor.native);
    this.native = wrapNative(
      () => new (loadAddon().Program)(code, attributes, opNames, natives, activations === 'bf16'),
    );
    this.arenaBytes = this.native.arenaBytes;
  }

  /** Ends the use of this object; idempotent. A pending run of the program goes on safely. */
  dispose(): void {
    this.native.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

/** `auto`: CUDA where it can be used, else the CPU. */
export type DeviceChoice = DeviceName | 'auto';
export const deviceChoices: readonly DeviceChoice[] = ['cpu', 'cuda', 'simt', 'auto'];

/** The device that a choice means on this machine now; whether it can be used is not asked of one that is named. */
export function resolveDevice(choice: string, source: string): DeviceName {
  if (!deviceChoices.includes(choice as DeviceChoice)) {
    throw new InvalidArgumentError(`[Engine] ${source} must be one of ${deviceChoices.join(', ')}, got ${choice}`);
  }
  if (choice !== 'auto') return choice as DeviceName;
  return loadAddon().info().devices.cuda.available ? 'cuda' : 'cpu';
}

/** How activations between ops are stored: bf16 halves their memory and is what tensor cores multiply. */
export type Activations = 'f32' | 'bf16';
export const activationTypes: readonly Activations[] = ['f32', 'bf16'];

/** Runs programs, one after the other, on a native thread. Pending runs keep the process alive; an idle engine does not. */
export class Engine implements Disposable {
  private readonly native: NativeEngine;
  private isDisposed = false;

  /** Where programs run. */
  readonly device: DeviceName;
  /** Programs for this engine are compiled for it. */
  readonly activations: Activations;

  /**
   * @param device - default: `ELASTIFORM_DEVICE`, else the CPU
   * @param options.weights - element type of most weights of the programs to come
   * @param options.activations - default: bf16 on CUDA with such weights, else f32, the only one on the CPU. Arithmetic
   *   is in f32 but for products of bf16 activations with bf16 weights, which tensor cores sum in f32
   * @throws DeviceUnavailableError with the reason and what to do
   * @throws InvalidArgumentError for bf16 activations on the CPU
   */
  constructor(device?: DeviceChoice, options: { activations?: Activations; weights?: DType } = {}) {
    const fromEnvironment = process.env.ELASTIFORM_DEVICE || 'cpu';
    this.device =
      device === undefined ? resolveDevice(fromEnvironment, 'ELASTIFORM_DEVICE') : resolveDevice(device, 'device');
    const { activations = this.device === 'cuda' && options.weights === 'bf16' ? 'bf16' : 'f32' } = options;
    if (!activationTypes.includes(activations)) {
      throw new InvalidArgumentError(
        `[Engine] activations must be one of ${activationTypes.join(', ')}, got ${activations}`,
      );
    }
    if (activations !== 'f32' && this.device === 'cpu') {
      throw new InvalidArgumentError(`[Engine] activations must be f32 on the CPU, got ${activations}`);
    }
    this.activations = activations;
    this.native = wrapNative(() => new (loadAddon().Engine)(this.device));
  }

  get disposed(): boolean {
    return this.isDisposed;
  }

  /**
   * Runs a program. Feeds are copied before this returns; outputs are fresh arrays.
   *
   * @param dims - the value of every dim of the program (constants and produced ones are ignored)
   * @param feeds - one array per feed tensor, in tensor order, with the current sizes
   * @param options.signal - aborts the run; until the promise has settled it then rejects with `signal.reason`, even
   *   where the run had already come to its end
   */
  async run(
    program: CompiledProgram,
    dims: Int32Array,
    feeds: readonly TypedArray[],
    options: { signal?: AbortSignal } = {},
  ): Promise<NativeRunResult> {
    const { signal } = options;
    signal?.throwIfAborted();
    const { promise, id } = wrapNative(() => this.native.run(program.native, dims, feeds));
    const abort = signal && (() => this.native.abort(id));
    if (abort) signal.addEventListener('abort', abort, { once: true });
    try {
      const result = await promise;
      signal?.throwIfAborted();
      return result;
    } catch (error) {
      signal?.throwIfAborted();
      throw fromNative(error);
    } finally {
      if (abort) signal.removeEventListener('abort', abort);
    }
  }

  /** Aborts what runs and ends the thread; pending runs reject with DisposedError. Idempotent. */
  dispose(): void {
    this.isDisposed = true;
    this.native.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
