// Safetensors: checkpoints mapped read-only, with every claim of their headers checked, and a writer.
import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import type { DType, TypedArray } from '../native/addon.js';
import { InvalidArgumentError, InvalidFileError } from '../native/errors.js';
import { Mapping, Tensor } from '../native/index.js';
import { replaceFile, sha256File } from './files.js';

/** Sizes in bytes of the element types of the format. */
const ELEMENT_BYTES: Readonly<Record<string, number>> = {
  BOOL: 1,
  U8: 1,
  I8: 1,
  F8_E4M3: 1,
  F8_E5M2: 1,
  F8_E8M0: 1,
  I16: 2,
  U16: 2,
  F16: 2,
  BF16: 2,
  I32: 4,
  U32: 4,
  F32: 4,
  I64: 8,
  U64: 8,
  F64: 8,
  C64: 8,
};

/** Size in bytes of an element type, as files spell it. */
export const elementBytes = (dtype: string): number => ELEMENT_BYTES[dtype];

/** An element type that floats are stored in, by the name it has in files. */
export function floatDtype(dtype: string): 'f32' | 'bf16' | 'f16' {
  const found = DTYPES[dtype];
  if (found === undefined || found === 'i32') {
    throw new InvalidFileError(`[safetensors] the element type must be F32, BF16 or F16, got ${dtype}`);
  }
  return found;
}

/** Lists the shards of a checkpoint of several files. */
export const checkpointIndex = 'model.safetensors.index.json';

/** Element types that can be computed with. Others are listed, and refused when asked for. */
const DTYPES: Readonly<Record<string, DType>> = { F32: 'f32', BF16: 'bf16', F16: 'f16', I32: 'i32' };
const FILE_DTYPES: Readonly<Record<DType, string>> = { f32: 'F32', bf16: 'BF16', f16: 'F16', i32: 'I32' };

// The limit of the reference implementation.
const MAX_HEADER_BYTES = 100_000_000;
const MAX_RANK = 4;

export interface TensorInfo {
  /** As the file spells it: `F32`, `BF16`, `I64`, ... */
  readonly dtype: string;
  readonly shape: readonly number[];
  /** The file the tensor lies in. */
  readonly file: string;
  /** Bytes from the start of the file. */
  readonly begin: number;
  readonly end: number;
}

/** What a file of tensors, or a directory of such files, offers. Read-only tensors keep their mapping alive. */
export interface TensorSource extends Disposable {
  names(): string[];
  has(name: string): boolean;
  /** @throws InvalidFileError when there is no such tensor. */
  info(name: string): TensorInfo;
  /**
   * A read-only view of the mapped file, the same object at every call; it is disposed with its source.
   *
   * @throws InvalidFileError when there is no such tensor or its element type cannot be computed with.
   */
  tensor(name: string): Tensor;
  dispose(): void;
}

/** One mapped `.safetensors` file. */
export class SafetensorsFile implements TensorSource {
  readonly #entries: ReadonlyMap<string, TensorInfo>;
  readonly #tensors = new Map<string, Tensor>();
  readonly #mapping: Mapping;

  /**
   * @param metadata the header's `__metadata__`, empty when absent
   */
  private constructor(
    readonly path: string,
    readonly metadata: Readonly<Record<string, string>>,
    entries: ReadonlyMap<string, TensorInfo>,
    mapping: Mapping,
  ) {
    this.#entries = entries;
    this.#mapping = mapping;
  }

  /** See {@link openSafetensors}. */
  static open(path: string): SafetensorsFile {
    const mapping = new Mapping(path);
    try {
      const { metadata, entries } = readHeader(path, mapping);
      return new SafetensorsFile(path, metadata, entries, mapping);
    } catch (error) {
      mapping.dispose();
      throw error;
    }
  }

  names(): string[] {
    return [...this.#entries.keys()];
  }

  has(name: string): boolean {
    return this.#entries.has(name);
  }

  info(name: string): TensorInfo {
    return this.#entry(name);
  }

  tensor(name: string): Tensor {
    let tensor = this.#tensors.get(name);
    if (!tensor) {
      tensor = this.#view(name, this.#entry(name));
      this.#tensors.set(name, tensor);
    }
    return tensor;
  }

  dispose(): void {
    for (const tensor of this.#tensors.values()) tensor.dispose();
    this.#tensors.clear();
    this.#mapping.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  #entry(name: string): TensorInfo {
    const entry = this.#entries.get(name);
    if (!entry) throw new InvalidFileError(`[safetensors] ${this.path} has no tensor ${name}`);
    return entry;
  }

  #view(name: string, { dtype: fileDtype, shape, begin, end }: TensorInfo): Tensor {
    const dtype = DTYPES[fileDtype];
    if (dtype === undefined) {
      const supported = Object.keys(DTYPES).join(', ');
      throw tensorError(this.path, name, `has the element type ${fileDtype}; supported are ${supported}`);
    }
    if (shape.length > MAX_RANK) {
      throw tensorError(this.path, name, `has rank ${shape.length}, the most is ${MAX_RANK}`);
    }
    const sizes = shape.length === 0 ? [1] : [...shape];
    if (begin % ELEMENT_BYTES[fileDtype] === 0) return Tensor.view(this.#mapping, begin, dtype, sizes);
    // Writers align the data; one that did not costs a copy.
    const bytes = this.#mapping.read(begin, end - begin).slice().buffer;
    return Tensor.fromData(dtype, sizes, dataArray(dtype, bytes));
  }
}

/**
 * Maps one `.safetensors` file and checks its header: sizes, element types, shapes, and that the tensors cover the data
 * exactly, without gap or overlap.
 *
 * @throws InvalidFileError naming the file, and the tensor where one is at fault.
 */
export function openSafetensors(path: string): SafetensorsFile {
  return SafetensorsFile.open(path);
}

/** A directory's `model.safetensors`, or the shards that its `model.safetensors.index.json` lists. */
export class Checkpoint implements TensorSource {
  #sha256: Promise<string> | undefined;

  private constructor(
    readonly directory: string,
    private readonly files: readonly SafetensorsFile[],
    private readonly location: ReadonlyMap<string, SafetensorsFile>,
  ) {}

  /**
   * Maps every file of the checkpoint and checks all headers.
   *
   * @throws InvalidFileError naming the file, and the tensor where one is at fault.
   */
  static open(directory: string): Checkpoint {
    const single = join(directory, 'model.safetensors');
    const index = join(directory, checkpointIndex);
    if (existsSync(single)) {
      const file = openSafetensors(single);
      return new Checkpoint(directory, [file], new Map(file.names().map((name) => [name, file])));
    }
    if (!existsSync(index)) {
      throw new InvalidFileError(`[safetensors] ${directory} has neither model.safetensors nor ${checkpointIndex}`);
    }
    const weightMap = readIndex(index);
    const files = new Map<string, SafetensorsFile>();
    try {
      const location = new Map<string, SafetensorsFile>();
      for (const [name, shard] of weightMap) {
        let file = files.get(shard);
        if (!file) {
          if (!existsSync(join(directory, shard))) {
            throw tensorError(index, name, `is in ${shard}, which does not exist`);
          }
          file = openSafetensors(join(directory, shard));
          files.set(shard, file);
        }
        if (!file.has(name)) throw tensorError(index, name, `is not in ${shard}, where the index places it`);
        location.set(name, file);
      }
      return new Checkpoint(directory, [...files.values()], location);
    } catch (error) {
      for (const file of files.values()) file.dispose();
      throw error;
    }
  }

  names(): string[] {
    return [...this.location.keys()];
  }

  has(name: string): boolean {
    return this.location.has(name);
  }

  info(name: string): TensorInfo {
    return this.#file(name).info(name);
  }

  tensor(name: string): Tensor {
    return this.#file(name).tensor(name);
  }

  /** The header's `__metadata__` of one of the files. */
  metadataOf(path: string): Readonly<Record<string, string>> {
    return this.files.find((file) => file.path === path)!.metadata;
  }

  /**
   * Identifies the weights: the SHA-256 of the file in hexadecimal; with several shards, that of their hashes joined in
   * the order of their names.
   */
  sha256(): Promise<string> {
    this.#sha256 ??= this.#hash();
    return this.#sha256;
  }

  dispose(): void {
    for (const file of this.files) file.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  async #hash(): Promise<string> {
    const hashes: string[] = [];
    for (const path of this.files.map((file) => file.path).sort()) hashes.push(await sha256File(path));
    return hashes.length === 1 ? hashes[0] : createHash('sha256').update(hashes.join('')).digest('hex');
  }

  #file(name: string): SafetensorsFile {
    const file = this.location.get(name);
    if (!file) throw new InvalidFileError(`[safetensors] ${this.directory} has no tensor ${name}`);
    return file;
  }
}

function tensorError(path: string, name: string, message: string): InvalidFileError {
  // Names come from the file: keep a hostile one from flooding the message.
  const shown = name.length > 200 ? `${name.slice(0, 200)}...` : name;
  return new InvalidFileError(`[safetensors] ${path}: tensor ${shown} ${message}`);
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function isSize(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

function readHeader(
  path: string,
  mapping: Mapping,
): { metadata: Readonly<Record<string, string>>; entries: Map<string, TensorInfo> } {
  const fail = (message: string) => new InvalidFileError(`[safetensors] ${path}: ${message}`);
  const size = mapping.byteLength;
  if (size < 8) throw fail(`truncated: ${size} bytes, the header's length alone takes 8`);
  const lengthBytes = mapping.read(0, 8);
  const length = new DataView(lengthBytes.buffer, lengthBytes.byteOffset, 8).getBigUint64(0, true);
  if (length > BigInt(MAX_HEADER_BYTES)) {
    throw fail(`the header claims ${length} bytes, the most is ${MAX_HEADER_BYTES}`);
  }
  const start = 8 + Number(length);
  if (start > size) throw fail(`truncated: the header claims ${length} bytes, ${size - 8} follow`);

  let text: string;
  let header: unknown;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(mapping.read(8, Number(length)));
    header = JSON.parse(text);
  } catch (error) {
    throw new InvalidFileError(`[safetensors] ${path}: the header is not JSON: ${(error as Error).message}`, {
      cause: error,
    });
  }
  if (!isObject(header)) throw fail('the header is not a JSON object');

  const { __metadata__: metadata = {}, ...tensors } = header;
  if (!isObject(metadata) || !Object.values(metadata).every((value) => typeof value === 'string')) {
    throw fail('__metadata__ does not map names to strings');
  }
  const entries = new Map<string, TensorInfo>();
  for (const [name, value] of Object.entries(tensors)) entries.set(name, readEntry(path, name, value, start, size));

  // JSON.parse keeps the last of equal keys; the text has one colon for each key written.
  const keys = Object.keys(header).length + Object.keys(metadata).length + 3 * entries.size;
  if (countColons(text) !== keys) throw fail('the header names a tensor or a field twice');

  let end = start;
  for (const [name, entry] of [...entries].sort(([, a], [, b]) => a.begin - b.begin || a.end - b.end)) {
    if (entry.begin < end) throw tensorError(path, name, `overlaps another: it begins at byte ${entry.begin} < ${end}`);
    if (entry.begin > end) throw tensorError(path, name, `leaves a gap: it begins at byte ${entry.begin} > ${end}`);
    end = entry.end;
  }
  if (end !== size) throw fail(`${size - end} bytes follow the last tensor`);
  return { metadata: metadata as Record<string, string>, entries };
}

function readEntry(path: string, name: string, value: unknown, start: number, size: number): TensorInfo {
  const fail = (message: string) => tensorError(path, name, message);
  if (!isObject(value) || Object.keys(value).sort().join() !== 'data_offsets,dtype,shape') {
    throw fail('is not described by dtype, shape and data_offsets');
  }
  const { dtype, shape, data_offsets: offsets } = value;
  if (typeof dtype !== 'string' || !Object.hasOwn(ELEMENT_BYTES, dtype)) {
    throw fail(`has the unknown element type ${JSON.stringify(dtype).slice(0, 50)}`);
  }
  if (!Array.isArray(shape) || !shape.every(isSize)) throw fail('has a shape that is no list of sizes');
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isSize) || offsets[0] > offsets[1]) {
    throw fail('has data_offsets that are no ascending pair of positions');
  }
  const [begin, end] = [start + offsets[0], start + offsets[1]];
  if (end > size) throw fail(`ends at byte ${end} of a file of ${size} bytes (truncated?)`);
  const bytes = shape.reduce((product, n) => product * n, ELEMENT_BYTES[dtype]);
  if (bytes !== end - begin) {
    throw fail(`of shape [${shape}] and type ${dtype} takes ${bytes} bytes, its data_offsets span ${end - begin}`);
  }
  return { dtype, shape, file: path, begin, end };
}

// Colons outside strings of a text that is known to be JSON.
function countColons(text: string): number {
  let count = 0;
  let inString = false;
  for (let i = 0; i < text.length; i++) {
    const c = text[i];
    if (inString && c === '\\') i++;
    else if (c === '"') inString = !inString;
    else if (c === ':' && !inString) count++;
  }
  return count;
}

function readIndex(path: string): Map<string, string> {
  const fail = (message: string) => new InvalidFileError(`[safetensors] ${path}: ${message}`);
  let index: unknown;
  try {
    index = JSON.parse(readFileSync(path, 'utf8'));
  } catch (error) {
    throw new InvalidFileError(`[safetensors] ${path} is not JSON: ${(error as Error).message}`, { cause: error });
  }
  const map = isObject(index) ? index.weight_map : undefined;
  if (!isObject(map) || Object.keys(map).length === 0) throw fail('has no weight_map');
  for (const [name, shard] of Object.entries(map)) {
    const plain = typeof shard === 'string' && basename(shard) === shard && !/[\\/:\0]/.test(shard);
    if (!plain || !shard.endsWith('.safetensors')) {
      throw tensorError(
        path,
        name,
        `must be in a .safetensors file of the same directory, got ${JSON.stringify(shard)}`,
      );
    }
  }
  return new Map(Object.entries(map) as [string, string][]);
}

function dataArray(dtype: DType, buffer: ArrayBuffer): TypedArray {
  if (dtype === 'f32') return new Float32Array(buffer);
  return dtype === 'i32' ? new Int32Array(buffer) : new Uint16Array(buffer);
}

/** One tensor to write. `data`: Float32Array for f32, Int32Array for i32, Uint16Array (bits) for bf16 and f16. */
export interface TensorData {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly data: TypedArray;
}

/**
 * Writes a `.safetensors` file that is complete or absent whenever the process stops.
 *
 * @param metadata strings for the header's `__metadata__`
 * @throws InvalidArgumentError when a shape does not fit its data.
 * @throws FileSystemError when the disk is full or the file system refuses.
 */
export async function writeSafetensors(
  path: string,
  tensors: Readonly<Record<string, TensorData>>,
  metadata: Readonly<Record<string, string>> = {},
): Promise<void> {
  for (const [name, { dtype, shape, data }] of Object.entries(tensors)) {
    const length = shape.reduce((product, n) => product * n, 1);
    const kind = dataArray(dtype, new ArrayBuffer(0)).constructor;
    if (length !== data.length || data.constructor !== kind || name === '__metadata__') {
      throw new InvalidArgumentError(
        `[safetensors] cannot write ${name}: ${dtype}[${shape}] needs ${kind.name}(${length}), ` +
          `got ${data.constructor.name}(${data.length})`,
      );
    }
  }
  // Wide elements first: every tensor is then aligned to its element size.
  const sorted = Object.entries(tensors).sort(
    ([a, x], [b, y]) => y.data.BYTES_PER_ELEMENT - x.data.BYTES_PER_ELEMENT || (a < b ? -1 : 1),
  );
  const described = sorted.map(([name, { dtype, shape }]) => ({ name, dtype: FILE_DTYPES[dtype], shape }));
  const { head } = safetensorsHeader(described, metadata);
  await replaceFile(path, async (handle) => {
    await writeAll(handle, head);
    for (const [, { data }] of sorted) {
      await writeAll(handle, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    }
  });
}

/** The bytes of a file before its tensors, which follow in this order, and how many bytes those take. */
export function safetensorsHeader(
  tensors: readonly (Pick<TensorInfo, 'dtype' | 'shape'> & { name: string })[],
  metadata: Readonly<Record<string, string>>,
): { head: Buffer; size: number } {
  let size = 0;
  const header: [string, unknown][] = Object.keys(metadata).length > 0 ? [['__metadata__', metadata]] : [];
  for (const { name, dtype, shape } of tensors) {
    const end = size + shape.reduce((product, n) => product * n, ELEMENT_BYTES[dtype]);
    header.push([name, { dtype, shape, data_offsets: [size, end] }]);
    size = end;
  }
  // fromEntries makes even __proto__ a property like any other.
  const json = Buffer.from(JSON.stringify(Object.fromEntries(header)));
  const head = Buffer.alloc(8 + Math.ceil(json.length / 8) * 8, ' ');
  head.writeBigUInt64LE(BigInt(head.length - 8));
  json.copy(head, 8);
  return { head, size };
}

/** Writes all bytes: one write call takes at most 2 GiB and may write less than it was given. */
export async function writeAll(handle: { write: FileWrite }, bytes: Uint8Array): Promise<void> {
  const piece = 1 << 30;
  for (let at = 0; at < bytes.length; ) {
    at += (await handle.write(bytes, at, Math.min(piece, bytes.length - at))).bytesWritten;
  }
}

type FileWrite = (bytes: Uint8Array, offset: number, length: number) => Promise<{ bytesWritten: number }>;
