// The signature language of ops (documented in native/ops/op.h): parsing, and inferring output shapes from operands.
import { InvalidArgumentError } from '../native/errors.js';
import { boundOf, formatShape, formatSize, type Shape, type Size, sameShape } from './dims.js';
import type { Node } from './graph.js';

interface DimPattern {
  /** A letter, or null for a constant. */
  readonly letter: string | null;
  readonly constant: number;
  /** `A<`: the current size may be smaller than this operand's. */
  readonly prefix: boolean;
  /** `A|B`: the letter that stands in when A is bound by no operand. */
  readonly otherwise: string | null;
  /** `+R`: produced while the op runs. */
  readonly produced: boolean;
}

export interface Operand {
  readonly name: string;
  readonly optional: boolean;
  /** The op writes to it: a state tensor. */
  readonly written: boolean;
  readonly dtype: 'f32' | 'i32' | 'w';
  /** Null when the whole shape is one variable, of any rank. */
  readonly dims: readonly DimPattern[] | null;
  readonly whole: string | null;
}

export interface Signature {
  readonly inputs: readonly Operand[];
  readonly outputs: readonly Operand[];
}

export function parseSignature(text: string): Signature {
  const [inputs, outputs] = text.split('->').map((side) => side.trim().split(/\s+/).filter(Boolean).map(parseOperand));
  return { inputs, outputs };
}

function parseOperand(text: string): Operand {
  const [, name, mark, dtype, dims] = /^(\w+)([?!]?):(f32|i32|w)\[(.*)\]$/.exec(text)!;
  const whole = dims.startsWith('*') ? dims.slice(1) : null;
  return {
    name,
    optional: mark === '?',
    written: mark === '!',
    dtype: dtype as Operand['dtype'],
    dims: whole ? null : dims.split(',').map(parseDim),
    whole,
  };
}

function parseDim(text: string): DimPattern {
  const [, plus, body, less, otherwise] = /^(\+?)(\w+)(<?)(?:\|(\w))?$/.exec(text)!;
  const isConstant = /^\d+$/.test(body);
  return {
    letter: isConstant ? null : body,
    constant: isConstant ? Number(body) : 0,
    prefix: less === '<',
    otherwise: otherwise ?? null,
    produced: plus === '+',
  };
}

/** `x:f32[3,4]`, as errors show an operand. */
const describe = (operand: Operand, node: Node): string => `${operand.name}:${node.dtype}${formatShape(node.shape)}`;

/**
 * Checks operands against a signature and returns the shapes of its outputs.
 *
 * @param bind sizes of letters that no operand fixes (a prefix of a weight, heads, rows to be produced).
 * @param whole the shape of `*X` when no operand fixes it.
 * @throws InvalidArgumentError naming the op, the operands and their shapes.
 */
export function inferShapes(
  op: string,
  signature: Signature,
  inputs: readonly (Node | null)[],
  bind: Readonly<Record<string, Size | undefined>> = {},
  whole: Shape | null = null,
): Shape[] {
  const fail = (message: string): never => {
    throw new InvalidArgumentError(`[${op}] ${message}`);
  };
  if (inputs.length !== signature.inputs.length) {
    fail(`expected ${signature.inputs.length} operands, got ${inputs.length}`);
  }
  const sizes = new Map<string, { size: Size; from: string }>();
  for (const [letter, size] of Object.entries(bind))
    if (size !== undefined) sizes.set(letter, { size, from: 'the options' });
  let shape = whole;
  let shapeFrom = 'the options';

  const match = (letter: string, size: Size, from: string) => {
    const bound = sizes.get(letter);
    if (!bound) sizes.set(letter, { size, from });
    else if (bound.size !== size) {
      fail(`${letter} must be the same in every operand: ${formatSize(bound.size)} in ${bound.from}, ${from}`);
    }
  };
  const present = signature.inputs.flatMap((operand, i) => {
    const node = inputs[i];
    if (!node) return operand.optional ? [] : fail(`operand ${operand.name} is missing`);
    return [{ operand, node, text: describe(operand, node) }];
  });

  for (const { operand, node, text } of present) {
    const floating = node.dtype === 'f32' || node.dtype === 'bf16' || node.dtype === 'f16';
    if (operand.dtype === 'w' ? !floating : node.dtype !== operand.dtype) {
      fail(`${operand.name} must be ${operand.dtype === 'w' ? 'f32, bf16 or f16' : operand.dtype}, got ${text}`);
    }
    if (operand.written && node.leaf?.kind !== 'state')
      fail(`${operand.name} is written to and must be a state tensor`);
    if (!operand.dims) {
      if (shape && !sameShape(shape, node.shape)) {
        fail(`operands must have one shape: ${formatShape(shape)} in ${shapeFrom}, ${text}`);
      }
      shape = node.shape;
      shapeFrom = text;
      continue;
    }
    if (node.shape.length !== operand.dims.length)
      fail(`${operand.name} must have rank ${operand.dims.length}, got ${text}`);
    operand.dims.forEach((dim, axis) => {
      const size = node.shape[axis];
      if (dim.letter === null) {
        if (size !== dim.constant) fail(`axis ${axis} of ${operand.name} must be ${dim.constant}, got ${text}`);
      } else if (!dim.prefix && !dim.otherwise) {
        match(dim.letter, size, text);
      }
    });
  }
  for (const { operand, node, text } of present) {
    operand.dims?.forEach((dim, axis) => {
      const size = node.shape[axis];
      if (dim.letter === null || !dim.prefix) return;
      const used = sizes.get(dim.letter);
      if (!used) sizes.set(dim.letter, { size, from: text });
      else if (boundOf(used.size) > boundOf(size)) {
        fail(`${dim.letter} is ${formatSize(used.size)} in ${used.from}, more than ${text} has`);
      }
    });
  }
  const resolve = (dim: DimPattern): string =>
    dim.otherwise && !sizes.has(dim.letter as string) ? dim.otherwise : (dim.letter as string);
  for (const { operand, node, text } of present) {
    operand.dims?.forEach((dim, axis) => {
      if (dim.otherwise) match(resolve(dim), node.shape[axis], text);
    });
  }
  return signature.outputs.map((output) => {
    if (!output.dims) return shape ?? fail(`the shape of ${output.name} is not known`);
    return output.dims.map((dim) => {
      if (dim.letter === null) return dim.constant;
      return sizes.get(resolve(dim))?.size ?? fail(`size ${dim.letter} of ${output.name} is not known`);
    });
  });
}
