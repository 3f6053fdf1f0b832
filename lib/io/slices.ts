// Copies of checkpoints whose tensors keep some of their rows or columns, get other values or names, or are left out: streamed,
// whatever their size.
import { existsSync } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { InvalidFileError } from '../native/errors.js';
import { Tensor } from '../native/index.js';
import { readJson, replaceFile, writeFileAtomic } from './files.js';
import { rounded } from './rounding.js';
import {
  Checkpoint,
  checkpointIndex,
  elementBytes,
  floatDtype,
  safetensorsHeader,
  type TensorInfo,
  writeAll,
} from './safetensors.js';

/** What a copy keeps along an axis of a tensor: its first `kept`, or those of these indices in their order. */
export interface Slice {
  readonly axis: 0 | 1;
  readonly kept: number | Uint32Array;
}

/** What becomes of a tensor in a copy. */
export interface TensorPlan {
  /** Its name in the copy; null: it is left out. Absent: its own. */
  name?: string | null;
  /** Absent: all of it. */
  slice?: Slice;
  /**
   * Changes the values of some rows of a matrix, f32 [rows, kept columns], the first of which is row `first` of the tensor;
   * they are stored as they were. Where rows are kept in another order, not possible.
   */
  edit?: (values: Float32Array, first: number, rows: number) => void;
}

const chunkBytes = 1 << 22;

export interface CopyOptions {
  signal?: AbortSignal;
  onProgress?: (done: number, total: number) => unknown;
}

/**
 * Copies the weights of a checkpoint, file by file; a file of which nothing is kept is left out, and the index names what is
 * written. Only what is kept is read, a few MiB at a time.
 *
 * @param planOf null: the whole tensor as it is
 * @returns bytes of the tensors that were written
 */
export async function copyCheckpoint(
  from: string,
  out: string,
  planOf: (name: string) => TensorPlan | null,
  { signal, onProgress }: CopyOptions = {},
): Promise<number> {
  using checkpoint = Checkpoint.open(from);
  const copied = checkpoint.names().flatMap((stored) => {
    const { name = stored, ...plan } = planOf(stored) ?? {};
    return name === null ? [] : [{ name, info: checkpoint.info(stored), ...plan }];
  });
  let [done, bytes] = [0, 0];
  for (const file of new Set(copied.map(({ info }) => info.file))) {
    // Wide elements first: every tensor is then aligned to its element size.
    const tensors = copied
      .filter(({ info }) => info.file === file)
      .sort((a, b) => elementBytes(b.info.dtype) - elementBytes(a.info.dtype) || a.info.begin - b.info.begin);
    const { head, size } = safetensorsHeader(
      tensors.map(({ name, info, slice }) => ({ name, dtype: info.dtype, shape: keptShape(info.shape, slice) })),
      checkpoint.metadataOf(file),
    );
    bytes += size;
    const source = await open(file, 'r');
    try {
      await replaceFile(join(out, basename(file)), async (handle) => {
        await writeAll(handle, head);
        for (const { info, ...plan } of tensors) {
          await copyTensor(source, handle, info, plan, signal);
          await onProgress?.(++done, copied.length);
        }
      });
    } finally {
      await source.close();
    }
  }
  const index = join(from, checkpointIndex);
  if (existsSync(index)) {
    const json = (await readJson(index)) as { metadata?: object };
    const metadata = { ...json.metadata, total_size: bytes };
    const weight_map = Object.fromEntries(copied.map(({ name, info }) => [name, basename(info.file)]));
    await writeFileAtomic(
      join(out, checkpointIndex),
      `${JSON.stringify({ ...json, metadata, weight_map }, null, 2)}\n`,
    );
  }
  return bytes;
}

/** A tensor of a file, and what becomes of it in a copy. */
export interface CopiedTensor extends Omit<TensorPlan, 'name'> {
  readonly info: TensorInfo;
}

/**
 * Copies tensors of files into one new file, each under a name of its own, a few MiB at a time.
 *
 * @returns bytes of the tensors that were written
 */
export async function copyTensors(
  out: string,
  tensors: ReadonlyMap<string, CopiedTensor>,
  { signal, onProgress, metadata = {} }: CopyOptions & { metadata?: Readonly<Record<string, string>> } = {},
): Promise<number> {
  // Wide elements first: every tensor is then aligned to its element size.
  const sorted = [...tensors].sort(([, a], [, b]) => elementBytes(b.info.dtype) - elementBytes(a.info.dtype));
  const { head, size } = safetensorsHeader(
    sorted.map(([name, { info, slice }]) => ({ name, dtype: info.dtype, shape: keptShape(info.shape, slice) })),
    metadata,
  );
  const sources = new Map<string, FileHandle>();
  try {
    for (const [, { info }] of sorted) {
      const { file } = info;
      if (!sources.has(file)) sources.set(file, await open(file, 'r'));
    }
    await replaceFile(out, async (handle) => {
      await writeAll(handle, head);
      for (const [i, [, { info, ...plan }]] of sorted.entries()) {
        await copyTensor(sources.get(info.file)!, handle, info, plan, signal);
        await onProgress?.(i + 1, sorted.length);
      }
    });
  } finally {
    for (const source of sources.values()) await source.close();
  }
  return size;
}

const keptOf = ({ kept }: Slice): number => (typeof kept === 'number' ? kept : kept.length);

const keptShape = (shape: readonly number[], slice?: Slice): number[] =>
  shape.map((size, axis) => (axis === slice?.axis ? keptOf(slice) : size));

async function copyTensor(
  from: FileHandle,
  to: FileHandle,
  { dtype, shape, begin, file }: TensorInfo,
  { slice, edit }: TensorPlan,
  signal?: AbortSignal,
): Promise<void> {
  const width = elementBytes(dtype);
  // A vector is one row.
  const [rows, columns] = shape.length < 2 ? [1, shape[0] ?? 1] : [shape[0], shape.slice(1).reduce((a, b) => a * b, 1)];
  const rowBytes = columns * width;
  // A row may be a whole vector, which fits in memory.
  const together = Math.max(1, Math.floor(chunkBytes / rowBytes));
  const read = async (at: number, length: number): Promise<Uint8Array<ArrayBuffer>> => {
    signal?.throwIfAborted();
    const bytes = new Uint8Array(length);
    for (let done = 0; done < length; ) {
      const { bytesRead } = await from.read(bytes, done, length - done, at + done);
      if (bytesRead === 0) throw new InvalidFileError(`[safetensors] ${file} became shorter while it was read`);
      done += bytesRead;
    }
    return bytes;
  };
  const byColumns = slice && (shape.length < 2 || slice.axis === 1);
  const order = slice && !byColumns && typeof slice.kept !== 'number' ? slice.kept : null;
  const last = slice && !byColumns ? keptOf(slice) : rows;
  for (let first = 0; first < last; first += together) {
    const count = Math.min(together, last - first);
    const bytes = order
      ? joined(
          await Promise.all(
            [...order.subarray(first, first + count)].map((row) => read(begin + row * rowBytes, rowBytes)),
          ),
        )
      : await read(begin + first * rowBytes, count * rowBytes);
    const kept = byColumns ? keptColumns(bytes, count, width, slice) : bytes;
    await writeAll(to, edit ? edited(kept, dtype, (values) => edit(values, first, count)) : kept);
  }
}

function joined(parts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const result = new Uint8Array(parts.length * parts[0].length);
  for (const [i, part] of parts.entries()) result.set(part, i * part.length);
  return result;
}

/** Elements of a type that can be computed with, changed as floats. */
function edited(bytes: Uint8Array<ArrayBuffer>, dtype: string, edit: (values: Float32Array) => void): Uint8Array {
  const stored = floatDtype(dtype);
  const elements = stored === 'f32' ? new Float32Array(bytes.buffer) : new Uint16Array(bytes.buffer);
  using tensor = Tensor.fromData(stored, [elements.length], elements);
  const values = tensor.readFloat();
  edit(values);
  const { buffer, byteOffset, byteLength } = rounded(values, stored);
  return new Uint8Array(buffer, byteOffset, byteLength);
}

/** Some columns of a matrix [rows, columns] with elements of `width` bytes. */
function keptColumns(
  source: Uint8Array<ArrayBuffer>,
  rows: number,
  width: number,
  slice: Slice,
): Uint8Array<ArrayBuffer> {
  const { kept } = slice;
  const count = keptOf(slice);
  const result = new Uint8Array(rows * count * width);
  if (typeof kept === 'number') {
    const rowBytes = source.length / rows;
    for (let row = 0; row < rows; row++) {
      result.set(source.subarray(row * rowBytes, row * rowBytes + kept * width), row * kept * width);
    }
    return result;
  }
  const elements = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array, 8: Float64Array }[width]!;
  const [from, to] = [new elements(source.buffer), new elements(result.buffer)];
  const columns = from.length / rows;
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < count; i++) to[row * count + i] = from[row * columns + kept[i]];
  }
  return result;
}
