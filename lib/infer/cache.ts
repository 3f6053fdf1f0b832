// Caches of keys and values, and the programs bound to them: one set per generation under way, reused afterwards.
import type { OperatingPoint } from '../elastic/budget.js';
import type { Graph, Program } from '../graph/index.js';
import type { KvCache } from '../model/blocks.js';
import { Tensor } from '../native/index.js';
import type { Network } from './network.js';
import { compileDecode, ProgramCache } from './programs.js';

interface LayerTensors {
  /** f32 [1, context, kvHeads * headDim] */
  readonly k: Tensor;
  readonly v: Tensor;
  /** i32 [1]: rows held. Layers differ: a routed layer holds only the rows that entered it. */
  readonly lengths: Tensor;
}

/** Caches for one sequence. */
export class Session {
  readonly #network: Network;
  readonly #layers: readonly LayerTensors[];
  readonly #programs = new ProgramCache();

  constructor(network: Network) {
    const { spec, maxContext } = network;
    const shape = [1, maxContext, spec.kvHeads * spec.headDim];
    this.#network = network;
    this.#layers = Array.from({ length: spec.layers }, () => ({
      k: Tensor.alloc('f32', shape),
      v: Tensor.alloc('f32', shape),
      lengths: Tensor.alloc('i32', [1]),
    }));
  }

  /** The caches as state of a graph. */
  bind(graph: Graph): KvCache[] {
    return this.#layers.map(({ k, v, lengths }) => ({
      k: graph.state(k),
      v: graph.state(v),
      lengths: graph.state(lengths),
    }));
  }

  /** The program that appends rows and gives the next token at a budget. */
  program(point: OperatingPoint): Program {
    return this.#programs.get('decode', point, () => compileDecode(this.#network, this, point));
  }

  reset(): void {
    for (const { lengths } of this.#layers) lengths.write(new Int32Array(1));
  }

  dispose(): void {
    this.#programs.dispose();
    for (const { k, v, lengths } of this.#layers) {
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
