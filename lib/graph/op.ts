// Definitions of ops: signature, attributes and gradient rule, by name; and the call that checks operands and emits a step.
import type { DType } from '../native/addon.js';
import { InvalidArgumentError } from '../native/errors.js';
import type { Shape, Size } from './dims.js';
import type { Graph, Node } from './graph.js';
import { inferShapes, parseSignature, type Signature } from './signature.js';

/** What a gradient rule sees of a forward step, and how it hands on gradients. */
export interface GradientContext {
  /** Operands of the forward step (recomputed ones inside a checkpoint), in the order of its signature. */
  readonly inputs: readonly (Node | null)[];
  readonly outputs: readonly (Node | null)[];
  readonly attrs: readonly number[];
  /** Gradient of output 0. No other output of an op carries one. */
  readonly dy: Node;
  /** Whether the gradient of operand i is wanted. False for every frozen tensor. */
  needs(i: number): boolean;
  /** Adds to the gradient of operand i; with `rows`, `value[r]` belongs to row `rows[r]` of the operand. */
  add(i: number, value: Node, rows?: Node | null): void;
  /**
   * Takes back what was added so far to the gradient of operand i in the same layout, for a kernel that accumulates
   * onto it; null when there is none. What is taken must be part of a later `add`.
   */
  take(i: number, rows?: Node | null): Node | null;
}

export type GradientRule = (context: GradientContext) => void;

interface OpOptions {
  /** Gradient of the float operands. Without it, a gradient that reaches the op is an error. */
  gradient?: GradientRule;
  /** Operands that never get a gradient (their value is treated as constant). Integer operands never do. */
  constant?: readonly string[];
}

interface ApplyOptions {
  /** Sizes of letters that no operand fixes; undefined leaves the letter to the operands. */
  bind?: Readonly<Record<string, Size | undefined>>;
  /** The whole shape when no operand fixes it. */
  whole?: Shape;
  /** Names of optional outputs that this call cannot have. */
  without?: readonly string[];
  /** The graph, for an op without operands. */
  graph?: Graph;
}

export interface Op {
  readonly name: string;
  /** As in native/ops/ops.cc, word for word. */
  readonly text: string;
  readonly signature: Signature;
  readonly attributes: readonly string[];
  /** Writes to a state tensor: kept in order, never merged or dropped. */
  readonly effect: boolean;
  readonly gradient: GradientRule | null;
  /** Whether a gradient may flow into operand i. */
  differentiable(i: number): boolean;
  /**
   * Checks operands, infers output shapes and emits a step.
   *
   * @returns one node per output of the signature; null for those in `without`. Outputs nobody uses cost nothing.
   * @throws InvalidArgumentError naming the op and the shapes.
   */
  apply(inputs: readonly (Node | null)[], attrs?: readonly number[], options?: ApplyOptions): (Node | null)[];
}

const ops = new Map<string, Op>();

/** Every op with a builder, by name. */
export const opTable: ReadonlyMap<string, Op> = ops;

export function defineOp(name: string, text: string, attributes: readonly string[] = [], options: OpOptions = {}): Op {
  const signature = parseSignature(text);
  const constant = new Set(options.constant);
  const op: Op = {
    name,
    text,
    signature,
    attributes,
    effect: signature.inputs.some((operand) => operand.written),
    gradient: options.gradient ?? null,
    differentiable: (i) => signature.inputs[i].dtype !== 'i32' && !constant.has(signature.inputs[i].name),
    apply(inputs, attrs = [], { bind, whole, without = [], graph } = {}) {
      attributes.forEach((attribute, i) => {
        if (!Number.isFinite(attrs[i])) {
          throw new InvalidArgumentError(`[${name}] ${attribute} must be a finite number, got ${attrs[i]}`);
        }
      });
      const shapes = inferShapes(name, signature, inputs, bind, whole);
      const owner = graph ?? inputs.find((node) => node)?.graph;
      if (!owner) throw new InvalidArgumentError(`[${name}] needs an operand`);
      const outputs = signature.outputs.map((output, i) =>
        without.includes(output.name) ? null : { dtype: output.dtype as DType, shape: shapes[i] },
      );
      return owner.emit(name, inputs, outputs, attrs);
    },
  };
  ops.set(name, op);
  return op;
}
