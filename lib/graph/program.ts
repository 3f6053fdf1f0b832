// A compiled graph: bound tensors, one memory plan, and runs by dims and feeds.
import {
  CompiledProgram,
  DisposedError,
  type Engine,
  InvalidArgumentError,
  Tensor,
  type TypedArray,
} from '../native/index.js';
import type { Dim } from './dims.js';
import type { Graph } from './graph.js';
import { type Lowered, lower } from './lowering.js';

export interface RunOptions {
  /** Value of every dim that is set at run, by name. */
  dims?: Record<string, number>;
  /** Values of every feed, by name: Float32Array or Int32Array of exactly the current size. */
  feeds?: Record<string, TypedArray>;
  /** Stops the run between steps; the promise rejects with AbortError. */
  signal?: AbortSignal;
}

export interface RunResult {
  /** Outputs by name, at their current sizes. */
  outputs: Record<string, TypedArray>;
  /** Every dim of the program by name, those that ops produced included. */
  dims: Record<string, number>;
  /** What ran, by the tag of its steps: floating-point operations, and rows that entered sub-layers. */
  counters: Record<string, { flops: number; rows: number }>;
  /** Time from start to end on the engine's thread, milliseconds. */
  ms: number;
  /** Of these, not spent waiting for a device: all of them on the CPU. */
  hostMs: number;
  /** Milliseconds of the kernels alone, between two events on the device; 0 on the CPU. */
  deviceMs: number;
}

/** Owns native memory: dispose it, or declare it with `using`. Bound tensors stay the caller's. */
export class Program implements Disposable {
  /** Bytes of intermediate memory that a run needs when every dim is at its bound. */
  readonly arenaBytes: number;
  #disposed = false;

  private constructor(
    private readonly compiled: CompiledProgram,
    private readonly engine: Engine,
    private readonly lowered: Lowered,
    /** Names that the graph declared; those no step needs may be given and are ignored. */
    private readonly declared: { dims: ReadonlySet<string>; feeds: ReadonlySet<string> },
  ) {
    this.arenaBytes = compiled.arenaBytes;
  }

  /**
   * Lowers and validates a graph and plans its memory. The graph may be dropped or extended afterwards; the program
   * keeps the memory of its bound tensors alive.
   *
   * @throws InvalidArgumentError when the graph computes nothing, InvalidProgramError when the runtime rejects it.
   */
  static compile(graph: Graph, engine: Engine): Program {
    const lowered = lower(graph);
    const constants: Tensor[] = [];
    const tensors = lowered.tensors.map((bound) => {
      if (bound instanceof Tensor) return bound;
      const tensor = Tensor.fromData('f32', bound.shape, bound.values);
      constants.push(tensor);
      return tensor;
    });
    try {
      const compiled = new CompiledProgram(lowered.code, lowered.attrs, lowered.opNames, tensors, engine.activations);
      const declared = { dims: new Set(graph.dims.keys()), feeds: new Set(graph.feeds.keys()) };
      return new Program(compiled, engine, lowered, declared);
    } finally {
      for (const tensor of constants) tensor.dispose();
    }
  }

  /**
   * Runs once on the engine's thread. Runs of one engine go one after the other, in the order they were asked for.
   *
   * @throws InvalidArgumentError for a missing, unknown or out-of-bounds dim and a missing, unknown or wrongly sized feed.
   */
  async run({ dims = {}, feeds = {}, signal }: RunOptions = {}): Promise<RunResult> {
    if (this.#disposed) throw new DisposedError('[Program] it was disposed');
    const result = await this.engine.run(this.compiled, this.#sizes(dims), this.#data(feeds, dims), { signal });
    const { outputs, tags } = this.lowered;
    return {
      outputs: Object.fromEntries(outputs.map(({ name, position }) => [name, result.outputs[position]])),
      dims: Object.fromEntries(this.lowered.dims.flatMap((dim, i) => (dim ? [[dim.name, result.dims[i]]] : []))),
      counters: Object.fromEntries(
        tags.map((tag, i) => [tag, { flops: result.counters[2 * i], rows: result.counters[2 * i + 1] }]),
      ),
      ms: result.ms,
      hostMs: result.hostMs,
      deviceMs: result.deviceMs,
    };
  }

  /** Ends the use of the program; idempotent. A pending run goes on safely. */
  dispose(): void {
    this.#disposed = true;
    this.compiled.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  #sizes(values: Record<string, number>): Int32Array {
    checkNames('dim', Object.keys(values), this.declared.dims);
    return Int32Array.from(this.lowered.dims, (dim) => {
      if (dim?.kind !== 'set') return dim?.bound ?? 0;
      return currentSize(dim, values);
    });
  }

  #data(values: Record<string, TypedArray>, dims: Record<string, number>): TypedArray[] {
    checkNames('feed', Object.keys(values), this.declared.feeds);
    return this.lowered.feeds.map((node) => {
      const data = values[node.name];
      if (!data) throw new InvalidArgumentError(`[run] feed ${node.name} is missing`);
      const wanted = node.dtype === 'i32' ? Int32Array : Float32Array;
      const shape = node.shape.map((size) => (typeof size === 'number' ? size : currentSize(size, dims)));
      const length = shape.reduce((product, size) => product * size, 1);
      if (!(data instanceof wanted) || data.length !== length) {
        throw new InvalidArgumentError(
          `[run] feed ${node.name} must be ${wanted.name} of ${length} ([${shape}]), ` +
            `got ${data.constructor.name} of ${data.length}`,
        );
      }
      return data;
    });
  }
}

function currentSize(dim: Dim, values: Record<string, number>): number {
  const value = values[dim.name];
  if (value === undefined) throw new InvalidArgumentError(`[run] dim ${dim.name} is missing`);
  if (!Number.isInteger(value) || value < 1 || value > dim.bound) {
    throw new InvalidArgumentError(`[run] dim ${dim.name} must be an integer from 1 to ${dim.bound}, got ${value}`);
  }
  return value;
}

function checkNames(kind: string, given: readonly string[], declared: ReadonlySet<string>): void {
  for (const name of given) {
    if (!declared.has(name)) {
      const known = [...declared].join(', ') || 'none';
      throw new InvalidArgumentError(`[run] there is no ${kind} ${name}; the graph has: ${known}`);
    }
  }
}
