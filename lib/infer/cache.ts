// Caches of keys and values, and the programs bound to them: one set per generation under way, reused afterwards.
import type { OperatingPoint } from '../elastic/budget.js';
import type { Cache, Graph, Program } from '../graph/index.js';
import { Tensor } from '../native/index.js';
import type { Network } from './network.js';
import { compileDecode, ProgramCache } from './programs.js';

/** Keys and values of one layer, or of a part of its heads, and how many rows are held. */
interface CacheTensors {
  /** f32 [1, context, width] */
  readonly k: Tensor;
  readonly v: Tensor;
  /** i32 [1]. They differ: a routed layer may hold only the rows that entered it, and a head those that chose it. */
  readonly lengths: Tensor;
}

/** Caches for one sequence. */
export class Session {
  readonly #network: Network;
  readonly #layers: readonly CacheTensors[];
  /** Parts of a layer's tensors, by layer and number of parts. */
  readonly #parts = new Map<string, readonly CacheTensors[]>();
  readonly #programs = new ProgramCache();

  constructor(network: Network) {
    const { spec, maxContext } = network;
    const shape = [spec.kvHeads, maxContext, spec.headDim];
    this.#network = network;
    this.#layers = Array.from({ length: spec.layers }, () => ({
      k: Tensor.alloc('f32', shape),
      v: Tensor.alloc('f32', shape),
      lengths: Tensor.alloc('i32', [spec.kvHeads]),
    }));
  }

  /** The caches of a layer in so many parts, as state of a graph. Programs that cut a layer differently share nothing. */
  bind(graph: Graph): (layer: number, parts: number) => Cache[] {
    return (layer, parts) =>
      this.#cut(layer, parts).map(({ k, v, lengths }) => ({
        k: graph.state(k),
        v: graph.state(v),
        lengths: graph.state(lengths),
      }));
  }

  #cut(layer: number, parts: number): readonly CacheTensors[] {
    const { spec, maxContext } = this.#network;
    const { k, v, lengths } = this.#layers[layer];
    const shape = [1, maxContext, (spec.kvHeads * spec.headDim) / parts];
    const key = `${layer} ${parts}`;
    const known = this.#parts.get(key);
    const cut = Array.from({ length: known ? 0 : parts }, (_, i) => ({
      k: k.slice(i * shape[1] * shape[2], shape),
      v: v.slice(i * shape[1] * shape[2], shape),
      lengths: lengths.slice(i, [1]),
    }));
    this.#parts.set(key, known ?? cut);
    return known ?? cut;
  }

  /** The program that appends rows and gives the next token at a budget. */
  program(point: OperatingPoint): Program {
    return this.#programs.get('decode', point, () => compileDecode(this.#network, this, point));
  }

  reset(): void {
    for (const { lengths } of this.#layers) lengths.write(new Int32Array(this.#network.spec.kvHeads));
  }

  dispose(): void {
    this.#programs.dispose();
    for (const { k, v, lengths } of [...[...this.#parts.values()].flat(), ...this.#layers]) {
      for (const tensor of [k, v, lengths]) tensor.dispose();
    }
  }
}

/** Hands out sessions; keeps one idle for the next generation. */
export class SessionPool {
  readonly #network: Network;
  #idle: Session | null = null;
  #closed = false;

  constructor(network: Network) {
    this.#network = network;
  }

  acquire(): Session {
    const session = this.#idle ?? new Session(this.#network);
    this.#idle = null;
    session.reset();
    return session;
  }

  release(session: Session): void {
    if (this.#closed || this.#idle) session.dispose();
    else this.#idle = session;
  }

  dispose(): void {
    this.#closed = true;
    this.#idle?.dispose();
    this.#idle = null;
  }
}
