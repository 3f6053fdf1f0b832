// Reading and writing safetensors, and refusing every kind of corrupt file.
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { beforeEach, describe, expect, it } from 'vitest';
import { FileSystemError, sha256File } from '../../lib/io/files.js';
import { Checkpoint, openSafetensors, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { InvalidArgumentError, InvalidFileError } from '../../lib/native/errors.js';
import { temporaryDirectory } from '../temporary.js';

let directory: string;
let path: string;
beforeEach(() => {
  directory = temporaryDirectory();
  path = join(directory, 'model.safetensors');
});

const f32 = (shape: number[], ...values: number[]): TensorData => ({
  dtype: 'f32',
  shape,
  data: Float32Array.from(values),
});

/** A file from a header (object or text) and data bytes. */
function store(header: unknown, data: number | Uint8Array = 0, length?: bigint): void {
  const text = Buffer.from(typeof header === 'string' ? header : JSON.stringify(header));
  const head = Buffer.alloc(8);
  head.writeBigUInt64LE(length ?? BigInt(text.length));
  writeFileSync(path, Buffer.concat([head, text, typeof data === 'number' ? Buffer.alloc(data) : data]));
}

const entry = (begin: number, end: number, shape = [(end - begin) / 4], dtype: unknown = 'F32') => ({
  dtype,
  shape,
  data_offsets: [begin, end],
});

describe('a written file', () => {
  it('reads back, mapped and read-only', async () => {
    const tensors: Record<string, TensorData> = {
      half: { dtype: 'f16', shape: [3], data: Uint16Array.of(0x3c00, 0xc000, 0x3800) },
      'a.weight': f32([2, 3], 1, 2, 3, 4, 5, 6),
      ids: { dtype: 'i32', shape: [2], data: Int32Array.of(-1, 7) },
      brain: { dtype: 'bf16', shape: [1, 1], data: Uint16Array.of(0x3f80) },
      one: f32([], 8),
      none: f32([0, 4]),
    };
    await writeSafetensors(path, tensors, { format: 'pt', note: 'grüße' });
    expect(readdirSync(directory)).toEqual(['model.safetensors']);
    using file = openSafetensors(path);
    expect(file.metadata).toEqual({ format: 'pt', note: 'grüße' });
    expect(file.names().sort()).toEqual(Object.keys(tensors).sort());
    expect(file.info('a.weight')).toMatchObject({ dtype: 'F32', shape: [2, 3], file: path });
    const weight = file.tensor('a.weight');
    expect(weight).toMatchObject({ dtype: 'f32', shape: [2, 3], writable: false });
    expect(weight.read()).toEqual(tensors['a.weight'].data);
    expect(file.tensor('a.weight')).toBe(weight);
    expect([...file.tensor('half').readFloat()]).toEqual([1, -2, 0.5]);
    expect([...file.tensor('brain').readFloat()]).toEqual([1]);
    expect(file.tensor('ids').read()).toEqual(tensors.ids.data);
    expect([...file.tensor('one').read()]).toEqual([8]);
    expect(file.has('none')).toBe(true);
    expect(() => file.tensor('absent')).toThrow(`${path} has no tensor absent`);
  });

  it('is refused when data and shape differ, and nothing is written', async () => {
    await expect(writeSafetensors(path, { a: f32([3], 1, 2) })).rejects.toThrow(InvalidArgumentError);
    await expect(
      writeSafetensors(path, { a: { dtype: 'bf16', shape: [1], data: Float32Array.of(1) } }),
    ).rejects.toThrow('bf16[1] needs Uint16Array(1), got Float32Array(1)');
    await expect(writeSafetensors(join(directory, 'no', 'x'), {})).rejects.toThrow(FileSystemError);
    expect(readdirSync(directory)).toEqual([]);
  });

  it('keeps any names and values', async () => {
    const anyTensors = fc.dictionary(
      fc.string({ unit: 'grapheme' }).filter((name) => name !== '__metadata__'),
      fc.array(fc.float({ noNaN: true })),
      { noNullPrototype: true },
    );
    await fc.assert(
      fc.asyncProperty(anyTensors, async (values) => {
        const tensors = Object.fromEntries(Object.entries(values).map(([k, v]) => [k, f32([v.length], ...v)]));
        await writeSafetensors(path, tensors);
        using file = openSafetensors(path);
        expect(file.names().sort()).toEqual(Object.keys(values).sort());
        for (const [name, { data }] of Object.entries(tensors)) {
          if (data.length > 0) expect(file.tensor(name).read()).toEqual(data);
        }
      }),
      { numRuns: 30, examples: [[Object.fromEntries([['__proto__', [1]]])]] },
    );
  });
});

describe('a file from elsewhere', () => {
  it('may pad its header, have metadata only, and hold data that is not aligned', () => {
    store(`{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  `, new Uint8Array(Float32Array.of(1, 2).buffer));
    using file = openSafetensors(path);
    expect([...file.tensor('a').read()]).toEqual([1, 2]);
    for (let pad = 0; pad < 4; pad++) {
      store(`{"a":${JSON.stringify(entry(0, 4))}}${' '.repeat(pad)}`, new Uint8Array(Float32Array.of(3).buffer));
      using other = openSafetensors(path);
      expect([...other.tensor('a').read()]).toEqual([3]);
    }
    store({ __metadata__: { a: 'b:"c"\\' } });
    using empty = openSafetensors(path);
    expect(empty.names()).toEqual([]);
  });

  it('lists tensors of types that cannot be computed with', () => {
    store({ mask: entry(0, 4, [4], 'BOOL'), wide: entry(4, 12, [1], 'F64'), deep: entry(12, 16, [1, 1, 1, 1, 1]) }, 16);
    using file = openSafetensors(path);
    expect(file.info('mask').dtype).toBe('BOOL');
    expect(() => file.tensor('mask')).toThrow(InvalidFileError);
    expect(() => file.tensor('wide')).toThrow(
      'tensor wide has the element type F64; supported are F32, BF16, F16, I32',
    );
    expect(() => file.tensor('deep')).toThrow('tensor deep has rank 5');
  });
});

describe('a corrupt file', () => {
  const cases: [string, () => void, string][] = [
    ['is empty', () => writeFileSync(path, ''), 'the file is empty'],
    ['ends in the length', () => writeFileSync(path, 'abc'), 'truncated: 3 bytes'],
    ['ends in the header', () => store('{}', 0, 50n), 'truncated: the header claims 50 bytes, 2 follow'],
    ['claims a huge header', () => store('{}', 0, 0xffffffffffffffffn), 'the header claims 18446744073709551615 bytes'],
    ['claims a large header', () => store('{}', 0, 100_000_001n), 'the most is 100000000'],
    ['has no JSON', () => store('{"a":'), 'the header is not JSON'],
    ['has no UTF-8', () => store(Buffer.from([0x7b, 0x22, 0xff, 0x22]).toString('latin1')), 'the header is not JSON'],
    ['has a list', () => store([]), 'the header is not a JSON object'],
    ['has a number', () => store('7'), 'the header is not a JSON object'],
    ['is nested deeply', () => store('['.repeat(100_000)), 'the header is not JSON'],
    ['has no strings as metadata', () => store({ __metadata__: { a: 1 } }), '__metadata__'],
    ['has a null tensor', () => store({ a: null }), 'tensor a is not described'],
    ['lacks a field', () => store({ a: { dtype: 'F32', shape: [] } }), 'tensor a is not described'],
    ['has another field', () => store({ a: { ...entry(0, 4), x: {} } }, 4), 'tensor a is not described'],
    [
      'has an unknown type',
      () => store({ a: entry(0, 4, [1], 'F31') }, 4),
      'tensor a has the unknown element type "F31"',
    ],
    ['has a type of the prototype', () => store({ a: entry(0, 4, [1], 'toString') }, 4), 'unknown element type'],
    ['has a type that is no string', () => store({ a: entry(0, 4, [1], 3) }, 4), 'unknown element type 3'],
    ['has a negative size', () => store({ a: entry(0, 4, [-1]) }, 4), 'tensor a has a shape that is no list of sizes'],
    ['has a broken size', () => store({ a: entry(0, 4, [0.5]) }, 4), 'tensor a has a shape'],
    ['has a shape of text', () => store({ a: { dtype: 'F32', shape: 'x', data_offsets: [0, 4] } }, 4), 'a shape'],
    ['has a huge shape', () => store({ a: entry(0, 4, [2 ** 40, 2 ** 40, 2 ** 40]) }, 4), 'tensor a of shape'],
    [
      'has one offset',
      () => store({ a: { dtype: 'F32', shape: [1], data_offsets: [0] } }, 4),
      'tensor a has data_offsets',
    ],
    ['has reversed offsets', () => store({ a: entry(4, 0, [1]) }, 4), 'tensor a has data_offsets'],
    ['has negative offsets', () => store({ a: entry(-4, 0, [1]) }, 4), 'tensor a has data_offsets'],
    ['ends in the data', () => store({ a: entry(0, 8) }, 4), 'tensor a ends at byte'],
    [
      'has a size that is not the shape',
      () => store({ a: entry(0, 8, [3]) }, 8),
      'takes 12 bytes, its data_offsets span 8',
    ],
    ['has overlapping tensors', () => store({ a: entry(0, 8), b: entry(4, 12) }, 12), 'tensor b overlaps'],
    ['has equal tensors', () => store({ a: entry(0, 8), b: entry(0, 8) }, 8), 'tensor b overlaps'],
    ['has a gap', () => store({ a: entry(0, 4), b: entry(8, 12) }, 12), 'tensor b leaves a gap'],
    ['begins with a gap', () => store({ a: entry(4, 8) }, 8), 'tensor a leaves a gap'],
    ['has bytes at its end', () => store({ a: entry(0, 4) }, 7), '3 bytes follow the last tensor'],
    [
      'names a tensor twice',
      () => store(`{"a":${JSON.stringify(entry(0, 4))},"\\u0061":${JSON.stringify(entry(0, 4))}}`, 4),
      'names a tensor or a field twice',
    ],
    [
      'names a field twice',
      () => store('{"a":{"dtype":"F64","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
      'names a tensor or a field twice',
    ],
  ];

  it.each(cases)('%s', (_, write, message) => {
    write();
    expect(() => openSafetensors(path)).toThrow(InvalidFileError);
    expect(() => openSafetensors(path)).toThrow(path);
    expect(() => openSafetensors(path)).toThrow(message);
  });

  it('that is missing or a directory', () => {
    expect(() => openSafetensors(path)).toThrow(InvalidFileError);
    expect(() => openSafetensors(directory)).toThrow(InvalidFileError);
  });

  it('cut anywhere gives a typed error', async () => {
    await writeSafetensors(path, { a: f32([2], 1, 2), b: f32([1], 3) });
    const whole = readFileSync(path);
    for (let length = 0; length < whole.length; length++) {
      writeFileSync(path, whole.subarray(0, length));
      expect(() => openSafetensors(path)).toThrow(InvalidFileError);
    }
  });

  it('with any byte changed loads or gives a typed error', async () => {
    await writeSafetensors(path, { a: f32([2], 1, 2), b: f32([1], 3) }, { format: 'pt' });
    const whole = readFileSync(path);
    fc.assert(
      fc.property(fc.nat(whole.length - 13), fc.integer({ min: 0, max: 255 }), (at, value) => {
        const changed = Buffer.from(whole);
        changed[at] = value;
        writeFileSync(path, changed);
        try {
          using file = openSafetensors(path);
          for (const name of file.names()) file.tensor(name);
        } catch (error) {
          expect(error).toBeInstanceOf(InvalidFileError);
        }
      }),
      { numRuns: 300 },
    );
  });
});

describe('Checkpoint', () => {
  const shard = (i: number) => `model-0000${i}-of-00002.safetensors`;
  const index = (weight_map: unknown) =>
    writeFileSync(join(directory, 'model.safetensors.index.json'), JSON.stringify({ metadata: {}, weight_map }));
  const shards = async () => {
    await writeSafetensors(join(directory, shard(1)), { a: f32([1], 1), extra: f32([1], 9) });
    await writeSafetensors(join(directory, shard(2)), { b: f32([1], 2) });
  };

  it('opens a single file', async () => {
    await writeSafetensors(path, { a: f32([1], 1) });
    using checkpoint = Checkpoint.open(directory);
    expect(checkpoint.names()).toEqual(['a']);
    expect([...checkpoint.tensor('a').read()]).toEqual([1]);
    expect(await checkpoint.sha256()).toBe(await sha256File(path));
  });

  it('opens shards', async () => {
    await shards();
    index({ a: shard(1), b: shard(2) });
    using checkpoint = Checkpoint.open(directory);
    expect(checkpoint.names()).toEqual(['a', 'b']);
    expect([...checkpoint.tensor('b').read()]).toEqual([2]);
    expect(checkpoint.info('b').file).toBe(join(directory, shard(2)));
    expect(await checkpoint.sha256()).toMatch(/^[0-9a-f]{64}$/);
    expect(() => checkpoint.info('extra')).toThrow(`${directory} has no tensor extra`);
  });

  it('refuses a directory without weights', () => {
    expect(() => Checkpoint.open(directory)).toThrow(InvalidFileError);
    expect(() => Checkpoint.open(directory)).toThrow(`${directory} has neither model.safetensors nor`);
  });

  it('refuses an index that does not fit', async () => {
    await shards();
    mkdirSync(join(directory, 'sub'));
    const cases: [unknown, string][] = [
      [{ a: shard(3) }, `tensor a is in ${shard(3)}, which does not exist`],
      [{ a: shard(2) }, `tensor a is not in ${shard(2)}`],
      [{ a: `../${shard(1)}` }, 'tensor a must be in a .safetensors file of the same directory'],
      [{ a: `sub/${shard(1)}` }, 'the same directory'],
      [{ a: `sub\\${shard(1)}` }, 'the same directory'],
      [{ a: join(directory, shard(1)) }, 'the same directory'],
      [{ a: '..' }, 'the same directory'],
      [{ a: 'c:x.safetensors' }, 'the same directory'],
      [{ a: 'x\0.safetensors' }, 'the same directory'],
      [{ a: 1 }, 'the same directory'],
      [{}, 'has no weight_map'],
      [[], 'has no weight_map'],
      [undefined, 'has no weight_map'],
    ];
    for (const [map, message] of cases) {
      index(map);
      expect(() => Checkpoint.open(directory)).toThrow(InvalidFileError);
      expect(() => Checkpoint.open(directory)).toThrow(message);
      expect(() => Checkpoint.open(directory)).toThrow('model.safetensors.index.json');
    }
    writeFileSync(join(directory, 'model.safetensors.index.json'), '{');
    expect(() => Checkpoint.open(directory)).toThrow('is not JSON');
  });
});
