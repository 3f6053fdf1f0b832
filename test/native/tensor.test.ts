// Tensors and mappings: what they hold, what they share, what they refuse.
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import {
  DisposedError,
  InvalidArgumentError,
  InvalidFileError,
  loadAddon,
  Mapping,
  Tensor,
} from '../../lib/native/index.js';
import { temporaryDirectory } from '../temporary.js';

const memory = () => loadAddon().memory();

describe('Tensor', () => {
  it('allocates zeros and is written and read whole', () => {
    using tensor = Tensor.alloc('f32', [2, 3]);
    expect(tensor.read()).toEqual(new Float32Array(6));
    expect([tensor.dtype, tensor.shape, tensor.writable, tensor.size]).toEqual(['f32', [2, 3], true, 6]);
    const data = Float32Array.from([1, 2, 3, 4, 5, 6]);
    tensor.write(data);
    data[0] = 9;
    expect([...tensor.read()]).toEqual([1, 2, 3, 4, 5, 6]);
  });

  it('copies data in with fromData, and is then read-only', () => {
    using ids = Tensor.fromData('i32', [3], Int32Array.from([7, -1, 2]));
    expect(ids.read()).toEqual(Int32Array.from([7, -1, 2]));
    expect(ids.writable).toBe(false);
    expect(() => ids.write(new Int32Array(3))).toThrow('[Tensor.write] the tensor is read-only');
    using half = Tensor.fromData('bf16', [2], Uint16Array.from([0x3f80, 0xc000]));
    expect(half.read()).toEqual(Uint16Array.from([0x3f80, 0xc000]));
    expect(half.readFloat()).toEqual(Float32Array.from([1, -2]));
    using shared = Tensor.fromData('f32', [2], new Float32Array(new SharedArrayBuffer(16), 4, 2).fill(3));
    expect(shared.read()).toEqual(Float32Array.from([3, 3]));
  });

  it('slices share memory, strides included', () => {
    using matrix = Tensor.alloc('f32', [2, 3]);
    using row = matrix.slice(3, [3]);
    row.write(Float32Array.from([4, 5, 6]));
    expect([...matrix.read()]).toEqual([0, 0, 0, 4, 5, 6]);
    using transposed = matrix.slice(0, [3, 2], [1, 3]);
    expect([...transposed.readFloat()]).toEqual([0, 4, 0, 5, 0, 6]);
    expect(() => transposed.read()).toThrow('must be contiguous');
    using column = transposed.slice(1, [2], [3]);
    expect([...column.readFloat()]).toEqual([0, 5]);
    expect(() => matrix.slice(4, [3])).toThrow("[Tensor.slice] elements 4 to 7 reach past the tensor's 6");
    expect(() => matrix.slice(7, [])).toThrow(InvalidArgumentError);
    expect(() => matrix.slice(0, [2, 2], [1])).toThrow('strides must have 2 entries, got 1');
    expect(() => matrix.slice(0, [2 ** 30, 2 ** 30])).toThrow('more than 2^46 elements');
    expect(() => matrix.slice(0, [2], [2 ** 50])).toThrow('reach past 2^46 elements');
    expect(() => matrix.slice(0, [2], [-1])).toThrow(InvalidArgumentError);
  });

  it('names the argument that is wrong', () => {
    expect(() => Tensor.alloc('f64' as 'f32', [1])).toThrow(
      "[Tensor.alloc] dtype must be 'f32', 'bf16', 'f16' or 'i32'",
    );
    expect(() => Tensor.alloc('f32', [1.5])).toThrow('[Tensor.alloc] shape[0] must be an integer in [0, ');
    expect(() => Tensor.alloc('f32', [1, 1, 1, 1, 1])).toThrow('at most 4 integers');
    expect(() => Tensor.fromData('f32', [3], new Float32Array(2))).toThrow('data must hold 3 elements, got 2');
    expect(() => Tensor.fromData('f32', [2], new Int32Array(2))).toThrow('data must be a Float32Array');
    expect(() => Tensor.alloc('f32', [2 ** 44])).toThrow(/cannot allocate 70368744177664 bytes .* for a tensor/);
    using ids = Tensor.alloc('i32', [2]);
    expect(() => ids.readFloat()).toThrow('dtype must be f32, bf16 or f16, got i32');
    expect(() => ids.setPackAs('bf16')).toThrow(InvalidArgumentError);
  });

  it('counts its memory and frees it with the last slice', () => {
    const before = memory();
    const tensor = Tensor.alloc('f32', [1000]);
    const slice = tensor.slice(10, [5]);
    expect(memory().heapBytes - before.heapBytes).toBe(4000);
    expect(memory().tensors - before.tensors).toBe(2);
    tensor.dispose();
    tensor.dispose();
    expect(tensor.disposed).toBe(true);
    expect(() => tensor.read()).toThrow(DisposedError);
    expect(() => tensor.slice(0, [1])).toThrow('[Tensor] used after dispose()');
    expect(memory().heapBytes - before.heapBytes).toBe(4000);
    expect([...slice.read()]).toEqual([0, 0, 0, 0, 0]);
    slice.dispose();
    expect(memory()).toEqual(before);
  });

  it('cannot be made around the addon', () => {
    const { Tensor: Native } = loadAddon() as unknown as { Tensor: new () => unknown };
    expect(() => new Native()).toThrow('make tensors with');
  });
});

describe('Mapping', () => {
  let folder: string;
  beforeAll(() => {
    folder = temporaryDirectory();
  });

  it('reads a file and keeps it mapped while tensors use it', () => {
    const before = memory();
    const path = join(folder, 'data');
    writeFileSync(path, new Uint8Array(Float32Array.from([0, 1, 2, 3, 4]).buffer));
    const mapping = new Mapping(path);
    expect(mapping.byteLength).toBe(20);
    expect(mapping.read(4, 4)).toEqual(Uint8Array.from([0, 0, 0x80, 0x3f]));
    expect(memory().mappedBytes - before.mappedBytes).toBe(20);
    const tensor = Tensor.view(mapping, 4, 'f32', [2, 2]);
    mapping.dispose();
    expect(() => mapping.read(0, 1)).toThrow(DisposedError);
    expect([...tensor.read()]).toEqual([1, 2, 3, 4]);
    expect(tensor.writable).toBe(false);
    tensor.dispose();
    expect(memory()).toEqual(before);
  });

  it('refuses views and reads outside the file', () => {
    const path = join(folder, 'small');
    writeFileSync(path, new Uint8Array(10));
    using mapping = new Mapping(path);
    expect(() => Tensor.view(mapping, 2, 'f32', [2])).toThrow('byteOffset must be a multiple of 4, got 2');
    expect(() => Tensor.view(mapping, 4, 'f32', [2])).toThrow('2 elements of f32 from byte 4 on do not fit in the 10');
    expect(() => Tensor.view(mapping, 12, 'bf16', [1])).toThrow(InvalidArgumentError);
    expect(() => mapping.read(8, 3)).toThrow('[Mapping.read] length must be an integer in [0, 2], got 3');
    expect(() => mapping.read(-1, 1)).toThrow(InvalidArgumentError);
  });

  it('says why a file cannot be mapped', () => {
    const empty = join(folder, 'empty');
    writeFileSync(empty, '');
    expect(() => new Mapping(empty)).toThrow(`[mapFile] ${empty}: the file is empty`);
    expect(() => new Mapping(folder)).toThrow(`[mapFile] ${folder}: not a regular file`);
    expect(() => new Mapping(join(folder, 'missing'))).toThrow(InvalidFileError);
  });
});
