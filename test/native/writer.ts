// Writes encoded programs (native/runtime/program.h says how), for tests of the native layer alone.
import { CompiledProgram, type DType, type Tensor } from '../../lib/native/index.js';

const dtypes: readonly DType[] = ['f32', 'bf16', 'f16', 'i32'];

/** Indices are returned in the order of the calls, from 0, for dims and for tensors. */
export class ProgramWriter {
  readonly dims: number[] = [];
  readonly tensors: number[] = [];
  readonly steps: number[] = [];
  readonly attributes: number[] = [];
  readonly opNames: string[] = [];
  readonly bound: Tensor[] = [];
  tags = 1;
  #stepCount = 0;

  constant(value: number): number {
    return this.#dim(0, value);
  }
  set(bound: number): number {
    return this.#dim(1, bound);
  }
  produced(bound: number): number {
    return this.#dim(2, bound);
  }
  #dim(kind: number, value: number): number {
    this.dims.push(kind, value);
    return this.dims.length / 2 - 1;
  }

  temp(dims: number[], dtype: DType = 'f32'): number {
    return this.#tensor(0, dtype, dims);
  }
  weight(tensor: Tensor): number {
    this.bound.push(tensor);
    const dims = tensor.shape.map((extent) => this.constant(extent));
    return this.#tensor(1, tensor.dtype, dims);
  }
  feed(dims: number[], dtype: DType = 'f32'): number {
    return this.#tensor(2, dtype, dims);
  }
  output(dims: number[], dtype: DType = 'f32'): number {
    return this.#tensor(3, dtype, dims);
  }
  #tensor(kind: number, dtype: DType, dims: number[]): number {
    this.tensors.push(kind, dtypes.indexOf(dtype), dims.length, ...dims, ...Array(4 - dims.length).fill(-1));
    return this.tensors.length / 7 - 1;
  }

  step(op: string, inputs: number[], outputs: number[], attributes: number[] = [], tag = 0): void {
    if (!this.opNames.includes(op)) this.opNames.push(op);
    const counts = [inputs.length, outputs.length, attributes.length, this.attributes.length];
    this.steps.push(this.opNames.indexOf(op), tag, ...counts, ...inputs, ...outputs);
    this.attributes.push(...attributes);
    this.#stepCount++;
  }

  code(): Int32Array {
    const header = [0x454c4153, 1, this.dims.length / 2, this.tensors.length / 7, this.#stepCount, this.tags];
    return Int32Array.from([...header, ...this.dims, ...this.tensors, ...this.steps]);
  }

  compile(): CompiledProgram {
    return new CompiledProgram(this.code(), Float64Array.from(this.attributes), this.opNames, this.bound);
  }
}

/** `steps` activations of up to `size` elements, one after the other, then their result: as long a run as wanted. */
export function longProgram(steps: number, size: number): CompiledProgram {
  const writer = new ProgramWriter();
  const n = writer.set(size);
  let x = writer.feed([n]);
  for (let i = 0; i < steps; i++) {
    const y = writer.temp([n]);
    writer.step('activation', [x], [y], [2]);
    x = y;
  }
  writer.step('scale', [x, -1], [writer.output([n])], [1]);
  return writer.compile();
}
