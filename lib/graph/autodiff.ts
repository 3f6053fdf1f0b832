// Reverse-mode differentiation as a graph transform: every gradient is written with ops of the same graph.
import { InvalidArgumentError } from '../native/errors.js';
import { formatShape, sameShape } from './dims.js';
import type { CheckpointScope, Graph, Node, Step } from './graph.js';
import { type GradientContext, type Op, opTable } from './op.js';
import { add, zeros } from './ops/elementwise.js';
import { scatterAdd } from './ops/rows.js';

export interface GradientOptions {
  /** Gradient of `loss`, of its shape; with it the loss may have any shape. By default 1, for a loss of f32 [1]. */
  seed?: Node;
  /**
   * Called with the index in `wrt` and its gradient as soon as nothing more is added to it, so that what consumes it
   * (accumulate, an optimizer step) can be emitted there and its memory be freed early. The tag is the backward step's.
   */
  onGradient?: (index: number, gradient: Node) => void;
}

/** Gradient under construction: a dense part, and parts that cover some rows only. */
interface Pending {
  dense: Node | null;
  sparse: { rows: Node; value: Node }[];
}

/**
 * Gradients of a scalar (or, with a seed, of `sum loss * seed`).
 *
 * Only steps between `wrt` and `loss` are walked, in reverse order of creation; tensors outside `wrt` (frozen weights)
 * get no gradient and no product is emitted for them. Backward steps are tagged `<tag of the forward step>/grad`.
 *
 * @param loss f32 [1], or any shape with a seed.
 * @param wrt f32 nodes: parameters, feeds or intermediate values.
 * @returns one node per entry of `wrt`, of the same shape, or of that of the prefix which products use; zeros where the loss
 *   does not depend on it.
 * @throws InvalidArgumentError when a gradient reaches an op that has none, or state was overwritten since it was read.
 */
export function gradients(loss: Node, wrt: readonly Node[], options: GradientOptions = {}): Node[] {
  return new Backward(loss, wrt, options).run();
}

const gradTag = (step: Step): string => (step.tag === '' ? 'grad' : `${step.tag}/grad`);

class Backward {
  readonly #graph: Graph;
  readonly #pending = new Map<Node, Pending>();
  readonly #results: (Node | null)[];
  readonly #recomputed = new Map<CheckpointScope, Map<Node, Node>>();

  constructor(
    readonly loss: Node,
    readonly wrt: readonly Node[],
    readonly options: GradientOptions,
  ) {
    this.#graph = loss.graph;
    this.#results = wrt.map(() => null);
    const wanted = options.seed?.shape ?? [1];
    if (loss.dtype !== 'f32' || !sameShape(loss.shape, wanted)) {
      throw new InvalidArgumentError(
        `[gradients] the loss must be f32${formatShape(wanted)}, got ${loss.dtype}${formatShape(loss.shape)}`,
      );
    }
    for (const node of wrt) {
      if (node.graph !== loss.graph) {
        throw new InvalidArgumentError(`[gradients] ${node.name} belongs to another graph than the loss`);
      }
      if (node.dtype !== 'f32') {
        throw new InvalidArgumentError(`[gradients] only f32 nodes have a gradient, got ${node.name} of ${node.dtype}`);
      }
    }
  }

  run(): Node[] {
    const steps = this.#graph.steps.slice(0, (this.loss.step?.index ?? -1) + 1);
    const depends = this.#dependents(steps);
    const walked = this.#reached(steps, depends);
    // A gradient is complete when the earliest step that adds to it has been walked.
    const firstUse = new Map<Node, Step>();
    for (const step of walked) {
      for (const node of step.inputs) if (node && !firstUse.has(node)) firstUse.set(node, step);
    }
    const finishedBy = new Map<Step, number[]>();
    this.wrt.forEach((node, i) => {
      const step = firstUse.get(node);
      if (step) finishedBy.set(step, [...(finishedBy.get(step) ?? []), i]);
    });
    const wanted = new Set(this.wrt);

    this.#add(this.loss, this.options.seed ?? this.#graph.constant([1], [1]), null);
    for (const step of walked.reverse()) {
      this.#graph.tag(gradTag(step), () => {
        this.#walk(step, depends, wanted);
        for (const i of finishedBy.get(step) ?? []) this.#finish(i);
      });
    }
    return this.wrt.map((_, i) => this.#results[i] ?? this.#finish(i));
  }

  /** Nodes whose value depends on `wrt` along paths that carry gradients. */
  #dependents(steps: readonly Step[]): Set<Node> {
    const depends = new Set(this.wrt);
    for (const step of steps) {
      const op = opTable.get(step.op) as Op;
      if (!step.inputs.some((node, i) => node && depends.has(node) && op.differentiable(i))) continue;
      for (const node of step.outputs) if (node?.dtype === 'f32') depends.add(node);
    }
    return depends;
  }

  /** Steps whose gradient is needed, in order of creation. */
  #reached(steps: readonly Step[], depends: ReadonlySet<Node>): Step[] {
    const reached = new Set([this.loss]);
    const walked: Step[] = [];
    for (const step of [...steps].reverse()) {
      if (!step.outputs.some((node) => node && reached.has(node) && depends.has(node))) continue;
      const op = opTable.get(step.op) as Op;
      const inputs = step.inputs.filter((node, i) => node && depends.has(node) && op.differentiable(i));
      if (inputs.length === 0) continue;
      for (const node of inputs) reached.add(node as Node);
      walked.push(step);
    }
    return walked.reverse();
  }

  #walk(step: Step, depends: ReadonlySet<Node>, wanted: ReadonlySet<Node>): void {
    const op = opTable.get(step.op) as Op;
    const dys = step.outputs.map((node) => node && this.#combine(node, wanted.has(node)));
    if (dys.every((dy) => !dy)) return;
    dys.forEach((dy, i) => {
      if (dy && (i > 0 || !op.gradient)) {
        throw new InvalidArgumentError(
          `[${op.name}] no gradient flows through its output ${op.signature.outputs[i].name}`,
        );
      }
    });
    for (const node of step.inputs) {
      const write = node && this.#graph.lastWrite(node);
      if (write && write.index > step.index) {
        throw new InvalidArgumentError(
          `[gradients] ${node.name} was overwritten by ${write.op} after ${op.name} read it`,
        );
      }
    }
    const context: GradientContext = {
      inputs: step.inputs.map((node) => node && this.#value(node, step.checkpoint)),
      outputs: step.outputs.map((node) => node && this.#value(node, step.checkpoint)),
      attrs: step.attrs,
      dy: dys[0] as Node,
      needs: (i) => {
        const node = step.inputs[i];
        return node !== null && depends.has(node) && op.differentiable(i);
      },
      add: (i, value, rows = null) => {
        const node = step.inputs[i];
        if (node && context.needs(i)) this.#add(node, value, rows);
      },
      take: (i, rows = null) => {
        const node = step.inputs[i];
        return node && context.needs(i) ? this.#take(node, rows) : null;
      },
    };
    op.gradient?.(context);
  }

  /** The value that a gradient rule reads: recomputed for the inner nodes of the checkpoint region of its step. */
  #value(node: Node, scope: CheckpointScope | null): Node {
    if (node.leaf?.kind === 'alias') return this.#value(node.leaf.of, scope);
    const step = node.step;
    if (!scope || step?.checkpoint !== scope || node === scope.result || node.dtype === 'i32') return node;
    const copies = this.#recomputed.get(scope) ?? new Map<Node, Node>();
    this.#recomputed.set(scope, copies);
    const known = copies.get(node);
    if (known) return known;
    const inputs = step.inputs.map((input) => input && this.#value(input, scope));
    const outputs = this.#graph.tag(gradTag(step), () => this.#graph.recompute(step, scope, inputs));
    step.outputs.forEach((output, i) => {
      if (output) copies.set(output, outputs[i] as Node);
    });
    return copies.get(node) as Node;
  }

  #add(node: Node, value: Node, rows: Node | null): void {
    const pending = this.#pending.get(node) ?? { dense: null, sparse: [] };
    this.#pending.set(node, pending);
    if (!rows) {
      pending.dense = pending.dense ? add(pending.dense, value) : value;
      return;
    }
    const same = pending.sparse.find((part) => part.rows === rows);
    if (same) same.value = add(same.value, value);
    else pending.sparse.push({ rows, value });
  }

  #take(node: Node, rows: Node | null): Node | null {
    const pending = this.#pending.get(node);
    if (!pending) return null;
    if (!rows) {
      const dense = pending.dense;
      pending.dense = null;
      return dense;
    }
    const i = pending.sparse.findIndex((part) => part.rows === rows);
    return i < 0 ? null : pending.sparse.splice(i, 1)[0].value;
  }

  /** The whole gradient of a node, or null when nothing was added. `keep`: it is asked for again. */
  #combine(node: Node, keep: boolean): Node | null {
    const pending = this.#pending.get(node);
    if (!pending) return null;
    let total = pending.dense;
    for (const { value, rows } of pending.sparse)
      total = scatterAdd(total ?? zeros(this.#graph, node.shape), value, rows);
    if (keep) this.#pending.set(node, { dense: total, sparse: [] });
    else this.#pending.delete(node);
    return total;
  }

  #finish(i: number): Node {
    const node = this.wrt[i];
    const gradient = this.#combine(node, true) ?? zeros(this.#graph, node.shape);
    this.#results[i] = gradient;
    this.options.onGradient?.(i, gradient);
    return gradient;
  }
}
