// Lowering: a graph becomes the flat arrays that the native runtime validates, plans and runs.
import type { DType } from '../native/addon.js';
import { InvalidArgumentError } from '../native/errors.js';
import type { Tensor } from '../native/index.js';
import type { Dim, Shape, Size } from './dims.js';
import type { Graph, Node, Step } from './graph.js';
import { type Op, opTable } from './op.js';

/** A value known when the graph was built, to be bound as a tensor. */
export interface Constant {
  readonly values: Float32Array;
  readonly shape: readonly number[];
}

/** A lowered graph. The layout of `code` is described at `encode`. */
export interface Lowered {
  code: Int32Array;
  attrs: Float64Array;
  /** Names that the op numbers of `code` index. */
  opNames: string[];
  /** Bound tensors in order of appearance in `code`. */
  tensors: (Tensor | Constant)[];
  /** The dim of every entry of the dim table; null for constants. */
  dims: (Dim | null)[];
  /** Feeds in order of appearance in `code`. */
  feeds: Node[];
  /** Output names, each with its position among the output tensors of `code`. */
  outputs: { name: string; position: number }[];
  tags: string[];
}

const magic = 0x454c4153;
const version = 1;
const dtypes: readonly DType[] = ['f32', 'bf16', 'f16', 'i32'];
const tensorKinds = { temp: 0, bound: 1, feed: 2, output: 3 } as const;
const dimKinds = { const: 0, set: 1, produced: 2 } as const;

/**
 * Lowers what reaches an output or an effect; everything else, and optional outputs nobody reads, is left out.
 *
 * @throws InvalidArgumentError when nothing is left.
 */
export function lower(graph: Graph): Lowered {
  return new Lowering(graph).encode();
}

class Lowering {
  readonly #used = new Set<Node>();
  readonly #live: Step[];
  readonly #outputs: { name: string; node: Node }[];

  readonly #dims: { dim: Dim | null; kind: number; value: number }[] = [];
  readonly #dimIndex = new Map<Size, number>();
  readonly #tensorCode: number[] = [];
  readonly #tensorIndex = new Map<Node, number>();
  readonly #bound: (Tensor | Constant)[] = [];
  readonly #feeds: Node[] = [];
  readonly #outputOrder: Node[] = [];

  constructor(readonly graph: Graph) {
    this.#outputs = [...graph.outputs].map(([name, node]) => ({ name, node: graph.resolve(node) }));
    for (const { node } of this.#outputs) this.#use(node);
    const live: Step[] = [];
    for (const step of [...graph.steps].reverse()) {
      if (!this.#op(step).effect && !step.outputs.some((node) => node && this.#used.has(node))) continue;
      live.push(step);
      for (const node of step.inputs) if (node) this.#use(graph.resolve(node));
    }
    this.#live = live.reverse();
    if (live.length === 0) {
      throw new InvalidArgumentError(
        '[compile] the graph has no outputs and no effects: declare one with graph.output',
      );
    }
  }

  /**
   * ```
   * magic, version, nDims, nTensors, nSteps, nTags,
   * nDims    x (kind, value)                       0 constant, 1 set at run, 2 produced; value: the constant or the bound
   * nTensors x (kind, dtype, rank, d0, d1, d2, d3) 0 temp, 1 bound, 2 feed, 3 output; d: dim numbers, -1 beyond the rank
   * nSteps   x (op, tag, nIn, nOut, nAttr, attrStart, in..., out...)   tensor numbers, -1 for an absent one
   * ```
   */
  encode(): Lowered {
    const opNames: string[] = [];
    const tags: string[] = [];
    const attrs: number[] = [];
    const steps: number[] = [];
    for (const step of this.#live) {
      const inputs = step.inputs.map((node) => (node ? this.#tensor(this.graph.resolve(node)) : -1));
      const { signature } = this.#op(step);
      const outputs = step.outputs.map((node, i) =>
        node && (this.#used.has(node) || !signature.outputs[i].optional) ? this.#tensor(node) : -1,
      );
      const [op, tag] = [intern(opNames, step.op), intern(tags, step.tag)];
      steps.push(op, tag, inputs.length, outputs.length, step.attrs.length, attrs.length, ...inputs, ...outputs);
      attrs.push(...step.attrs);
    }
    const header = [magic, version, this.#dims.length, this.#tensorCode.length / 7, this.#live.length, tags.length];
    return {
      code: Int32Array.from([
        ...header,
        ...this.#dims.flatMap(({ kind, value }) => [kind, value]),
        ...this.#tensorCode,
        ...steps,
      ]),
      attrs: Float64Array.from(attrs),
      opNames,
      tensors: this.#bound,
      dims: this.#dims.map(({ dim }) => dim),
      feeds: this.#feeds,
      outputs: this.#outputs.map(({ name, node }) => ({ name, position: this.#outputOrder.indexOf(node) })),
      tags,
    };
  }

  #op(step: Step): Op {
    return opTable.get(step.op) as Op;
  }

  #use(node: Node): void {
    this.#used.add(node);
    // A tensor sized by a produced dim needs the step that produces it.
    for (const size of node.shape) {
      const producer = typeof size === 'number' ? undefined : this.graph.producers.get(size);
      for (const output of producer?.outputs ?? []) if (output?.shape.includes(size)) this.#used.add(output);
    }
  }

  #tensor(node: Node): number {
    const known = this.#tensorIndex.get(node);
    if (known !== undefined) return known;
    const index = this.#tensorIndex.size;
    this.#tensorIndex.set(node, index);
    this.#tensorCode.push(this.#kind(node), dtypes.indexOf(node.dtype), ...this.#shape(node.shape));
    return index;
  }

  #kind(node: Node): number {
    if (node.leaf?.kind === 'feed') {
      this.#feeds.push(node);
      return tensorKinds.feed;
    }
    if (node.leaf?.kind === 'constant') {
      this.#bound.push({ values: node.leaf.values, shape: node.shape as number[] });
      return tensorKinds.bound;
    }
    if (node.leaf?.kind === 'weight' || node.leaf?.kind === 'state') {
      this.#bound.push(node.leaf.tensor);
      return tensorKinds.bound;
    }
    if (!this.#outputs.some((output) => output.node === node)) return tensorKinds.temp;
    this.#outputOrder.push(node);
    return tensorKinds.output;
  }

  #shape(shape: Shape): number[] {
    const dims = shape.map((size) => this.#dim(size));
    return [shape.length, ...dims, ...Array<number>(4 - dims.length).fill(-1)];
  }

  #dim(size: Size): number {
    const known = this.#dimIndex.get(size);
    if (known !== undefined) return known;
    const index = this.#dims.length;
    this.#dimIndex.set(size, index);
    if (typeof size === 'number') this.#dims.push({ dim: null, kind: dimKinds.const, value: size });
    else this.#dims.push({ dim: size, kind: dimKinds[size.kind], value: size.bound });
    return index;
  }
}

function intern(names: string[], name: string): number {
  const index = names.indexOf(name);
  return index < 0 ? names.push(name) - 1 : index;
}
