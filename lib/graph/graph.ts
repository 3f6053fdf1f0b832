// A graph of typed nodes: leaves (weights, state, feeds, constants) and the outputs of steps, which are emitted in order.
import type { DType } from '../native/addon.js';
import { InvalidArgumentError } from '../native/errors.js';
import type { Tensor } from '../native/index.js';
import { type Dim, formatShape, type Shape, type Size } from './dims.js';
import { opTable } from './op.js';

/** Where the value of a node comes from when no step computes it. */
export type Leaf =
  | { readonly kind: 'weight' | 'state'; readonly tensor: Tensor }
  | { readonly kind: 'feed' }
  | { readonly kind: 'constant'; readonly values: Float32Array }
  /** The value of another node, through which no gradient flows. */
  | { readonly kind: 'alias'; readonly of: Node };

/** One value: a leaf, or output `output` of a step. */
export interface Node {
  readonly graph: Graph;
  /** Unique in the graph, ascending in creation order. */
  readonly id: number;
  readonly dtype: DType;
  readonly shape: Shape;
  readonly step: Step | null;
  readonly output: number;
  readonly leaf: Leaf | null;
  readonly name: string;
}

/** One call of an op. Steps run in the order of their index. */
export interface Step {
  readonly index: number;
  readonly op: string;
  readonly inputs: readonly (Node | null)[];
  readonly outputs: readonly (Node | null)[];
  readonly attrs: readonly number[];
  readonly tag: string;
  /** The region that is recomputed in the backward pass, or null. */
  readonly checkpoint: CheckpointScope | null;
  /** The first step that computes the same values (this one when there is none): lowering runs only that one. */
  readonly canonical: Step;
}

/** A region whose steps are run again in the backward pass instead of keeping their outputs. */
export interface CheckpointScope {
  readonly id: number;
  /** What the region returned; kept, not recomputed. */
  result: Node | null;
}

interface OutputSpec {
  dtype: DType;
  shape: Shape;
}

export class Graph {
  readonly steps: Step[] = [];
  /** Named results, in the order they were declared. */
  readonly outputs = new Map<string, Node>();
  readonly feeds = new Map<string, Node>();
  /** Dims set at run, by name. */
  readonly dims = new Map<string, Dim>();
  /** The step that produces each produced dim. */
  readonly producers = new Map<Dim, Step>();

  #nodes = 0;
  #scopes = 0;
  #tag = '';
  #scope: CheckpointScope | null = null;
  // Steps of a recomputed region must not merge with the originals: the region's id is part of their keys.
  #recomputing = '';
  // Effects so far: a pure step that reads state equals another only when nothing was written in between.
  #epoch = 0;
  readonly #leaves = new Map<Tensor, Node>();
  readonly #aliases = new Map<Node, Node>();
  readonly #constants = new Map<string, Node>();
  readonly #dimIds = new Map<Dim, number>();
  readonly #byKey = new Map<string, Step>();
  readonly #byValue = new Map<string, Step>();
  readonly #lastWrite = new Map<Node, Step>();

  /**
   * A size that the caller sets at each run, from 1 to `bound`. The same name gives the same dim.
   *
   * @throws InvalidArgumentError when the bound is not a positive integer or the name is taken with another bound.
   */
  dim(name: string, bound: number): Dim {
    const known = this.dims.get(name);
    if (known) {
      if (known.bound === bound) return known;
      throw new InvalidArgumentError(`[dim] ${name} has the bound ${known.bound}, got ${bound}`);
    }
    if (!Number.isInteger(bound) || bound < 1 || bound > 0x7fffffff) {
      throw new InvalidArgumentError(`[dim] the bound of ${name} must be a positive integer, got ${bound}`);
    }
    const dim: Dim = { kind: 'set', name, bound };
    this.dims.set(name, dim);
    this.#dimIds.set(dim, this.#dimIds.size);
    return dim;
  }

  /** A read-only bound tensor. The same tensor gives the same node. */
  weight(tensor: Tensor, name = ''): Node {
    return this.#bound('weight', tensor, name);
  }

  /** A bound tensor that ops may write to: a trainable parameter, a cache, an optimizer moment. */
  state(tensor: Tensor, name = ''): Node {
    if (!tensor.writable) throw new InvalidArgumentError(`[state] ${name || 'the tensor'} is read-only`);
    return this.#bound('state', tensor, name);
  }

  /**
   * Values that the caller hands to each run, by name. The same name gives the same node.
   *
   * @throws InvalidArgumentError when the name is taken with another dtype or shape.
   */
  feed(name: string, dtype: 'f32' | 'i32', shape: Shape): Node {
    const known = this.feeds.get(name);
    if (known) {
      if (known.dtype === dtype && this.#shapeKey(known.shape) === this.#shapeKey(shape)) return known;
      const [was, now] = [`${known.dtype}${formatShape(known.shape)}`, `${dtype}${formatShape(shape)}`];
      throw new InvalidArgumentError(`[feed] ${name} is ${was}, got ${now}`);
    }
    checkRank('feed', shape);
    for (const size of shape) {
      if (typeof size === 'number' ? !Number.isInteger(size) || size < 0 : this.dims.get(size.name) !== size) {
        throw new InvalidArgumentError(`[feed] ${name} has a size that is no dim of this graph: ${formatShape(shape)}`);
      }
    }
    const node = this.#node(dtype, shape, { leaf: { kind: 'feed' }, name });
    this.feeds.set(name, node);
    return node;
  }

  /** Values known while the graph is built, f32. Equal constants are one node. */
  constant(values: readonly number[], shape: readonly number[]): Node {
    const data = Float32Array.from(values);
    const key = `${shape}:${data}`;
    let node = this.#constants.get(key);
    if (!node) {
      node = this.#node('f32', shape, { leaf: { kind: 'constant', values: data } });
      this.#constants.set(key, node);
    }
    return node;
  }

  /** The value of `node` under a name of its own, through which no gradient flows. */
  alias(node: Node): Node {
    this.#own('stopGradient', node);
    let alias = this.#aliases.get(node);
    if (!alias) {
      alias = this.#node(node.dtype, node.shape, { leaf: { kind: 'alias', of: node }, name: node.name });
      this.#aliases.set(node, alias);
    }
    return alias;
  }

  /**
   * Declares a result of every run.
   *
   * @throws InvalidArgumentError when the name is taken, or no step computes the node.
   */
  output(name: string, node: Node): void {
    this.#own('output', node);
    if (this.outputs.has(name)) throw new InvalidArgumentError(`[output] ${name} is already an output`);
    if (!this.resolve(node).step) throw new InvalidArgumentError(`[output] ${name} is not computed by an op`);
    this.outputs.set(name, node);
  }

  /** Counts the steps emitted by `build` under `tag`; the innermost tag wins. */
  tag<T>(tag: string, build: () => T): T {
    const outer = this.#tag;
    this.#tag = tag;
    try {
      return build();
    } finally {
      this.#tag = outer;
    }
  }

  /** The tag of steps emitted now. */
  get currentTag(): string {
    return this.#tag;
  }

  /**
   * Marks the steps emitted by `build`: the backward pass runs them again instead of keeping their outputs, except the
   * returned node and integer outputs. Inside another checkpoint it does nothing of its own.
   */
  checkpoint<T extends Node>(build: () => T): T {
    if (this.#scope) return build();
    const scope: CheckpointScope = { id: this.#scopes++, result: null };
    this.#scope = scope;
    try {
      const node = build();
      scope.result = node;
      return node;
    } finally {
      this.#scope = null;
    }
  }

  /** Emits a pure step of a checkpoint region again, apart from its original. */
  recompute(step: Step, scope: CheckpointScope, inputs: readonly (Node | null)[]): readonly (Node | null)[] {
    this.#recomputing = `recompute ${scope.id}`;
    try {
      return this.emit(step.op, inputs, step.outputs, step.attrs);
    } finally {
      this.#recomputing = '';
    }
  }

  /**
   * Appends one step and returns its outputs; a pure step that was emitted before with the same operands, attributes
   * and outputs is returned instead. Builders (lib/graph/ops) call this after checking shapes.
   */
  emit(
    op: string,
    inputs: readonly (Node | null)[],
    outputs: readonly (OutputSpec | null)[],
    attrs: readonly number[],
  ): (Node | null)[] {
    const definition = opTable.get(op);
    if (!definition) throw new InvalidArgumentError(`[${op}] is not an op`);
    for (const node of inputs) if (node) this.#own(op, node);
    const key = this.#key(op, inputs, outputs, attrs, (node) => node);
    const known = definition.effect ? undefined : this.#byKey.get(key);
    if (known) return [...known.outputs];

    const step: { -readonly [K in keyof Step]: Step[K] } = {
      index: this.steps.length,
      op,
      inputs: [...inputs],
      outputs: [],
      attrs: [...attrs],
      tag: this.#tag,
      checkpoint: this.#scope,
      canonical: undefined as unknown as Step,
    };
    step.outputs = outputs.map(
      (output, i) => output && this.#node(output.dtype, output.shape, { step, output: i, name: `${op}.${i}` }),
    );
    step.canonical = step;
    const produced = outputs.flatMap((output) => output?.shape.filter((size) => this.#isNew(size)) ?? []) as Dim[];
    if (definition.effect) {
      if (this.#scope)
        throw new InvalidArgumentError(`[${op}] writes state and so cannot be recomputed in a checkpoint`);
      this.#epoch++;
      definition.signature.inputs.forEach((operand, i) => {
        const node = inputs[i];
        if (operand.written && node) this.#lastWrite.set(node, step);
      });
    } else {
      this.#byKey.set(key, step);
      if (produced.length === 0) {
        const value = this.#key(op, inputs, outputs, attrs, (node) => this.resolve(node));
        step.canonical = this.#byValue.get(value) ?? step;
        this.#byValue.set(value, step.canonical);
      }
    }
    for (const dim of produced) {
      this.#dimIds.set(dim, this.#dimIds.size);
      this.producers.set(dim, step);
    }
    this.steps.push(step);
    return [...step.outputs];
  }

  /** The node that holds the value at run time: aliases and equal steps are looked through. */
  resolve(node: Node): Node {
    if (node.leaf?.kind === 'alias') return this.resolve(node.leaf.of);
    return node.step ? (node.step.canonical.outputs[node.output] as Node) : node;
  }

  /** The last step that writes a state node, if any. */
  lastWrite(node: Node): Step | null {
    return this.#lastWrite.get(node) ?? null;
  }

  /** A dim for an op that produces one, named after the current tag. The step it is emitted with owns it. */
  producedDim(name: string, bound: number): Dim {
    const base = this.#tag === '' ? name : `${this.#tag}.${name}`;
    const taken = new Set([...this.dims.keys(), ...[...this.producers.keys()].map((dim) => dim.name)]);
    let unique = base;
    for (let i = 2; taken.has(unique); i++) unique = `${base}#${i}`;
    return { kind: 'produced', name: unique, bound };
  }

  #bound(kind: 'weight' | 'state', tensor: Tensor, name: string): Node {
    const known = this.#leaves.get(tensor);
    if (known) {
      if (known.leaf?.kind === kind) return known;
      throw new InvalidArgumentError(`[${kind}] ${name || 'the tensor'} is already bound as ${known.leaf?.kind}`);
    }
    const node = this.#node(tensor.dtype, tensor.shape, { leaf: { kind, tensor }, name });
    this.#leaves.set(tensor, node);
    return node;
  }

  #node(dtype: DType, shape: Shape, rest: { leaf?: Leaf; step?: Step; output?: number; name?: string }): Node {
    const { leaf = null, step = null, output = 0, name = '' } = rest;
    return { graph: this, id: this.#nodes++, dtype, shape: [...shape], step, output, leaf, name };
  }

  #own(op: string, node: Node): void {
    if (node.graph !== this) throw new InvalidArgumentError(`[${op}] operand ${node.name} belongs to another graph`);
  }

  #isNew(size: Size): boolean {
    return typeof size !== 'number' && !this.#dimIds.has(size);
  }

  #shapeKey(shape: Shape): string {
    return shape.map((size) => (typeof size === 'number' ? size : `d${this.#dimIds.get(size) ?? '+'}`)).join();
  }

  #key(
    op: string,
    inputs: readonly (Node | null)[],
    outputs: readonly (OutputSpec | null)[],
    attrs: readonly number[],
    identity: (node: Node) => Node,
  ): string {
    let readsState = false;
    const ids = inputs.map((node) => {
      if (!node) return '-';
      const same = identity(node);
      readsState ||= this.resolve(same).leaf?.kind === 'state';
      return same.id;
    });
    // Output shapes matter to an op without operands; a dim that is about to be produced is new in every call.
    const shapes = outputs.map((output) => (output ? this.#shapeKey(output.shape) : '-'));
    return [op, ids, attrs, shapes.join('/'), readsState ? this.#epoch : '', this.#recomputing].join('|');
  }
}

function checkRank(what: string, shape: Shape): void {
  if (shape.length < 1 || shape.length > 4) {
    throw new InvalidArgumentError(`[${what}] rank must be 1 to 4, got ${formatShape(shape)}`);
  }
}
