// Copies of checkpoints, against plain loops: tensors of several pieces, cut, put in another order, and changed.
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, expect, test } from 'vitest';
import { toBf16 } from '../../lib/io/rounding.js';
import { Checkpoint, openSafetensors, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { copyCheckpoint, type TensorPlan } from '../../lib/io/slices.js';
import { temporaryDirectory } from '../temporary.js';

const root = temporaryDirectory();

// Pieces are 4 MiB: both matrices take several.
const [rows, columns] = [5000, 301];
const values = Float32Array.from({ length: rows * columns }, (_, i) => (i * 7919) % 10_007);
const from = join(root, 'from');
const to = join(root, 'to');
beforeAll(async () => {
  for (const dir of [from, to]) mkdirSync(dir);
  const tensors: Record<string, TensorData> = {
    matrix: { dtype: 'f32', shape: [rows, columns], data: values },
    narrow: { dtype: 'bf16', shape: [columns, rows], data: toBf16(values) },
    vector: { dtype: 'f32', shape: [rows], data: values.slice(0, rows) },
    ids: { dtype: 'i32', shape: [3], data: Int32Array.of(1, 2, 3) },
  };
  await writeSafetensors(join(from, 'model.safetensors'), tensors, { format: 'pt' });
});

async function copied(plan: (name: string) => TensorPlan | null) {
  const bytes = await copyCheckpoint(from, to, plan);
  const file = openSafetensors(join(to, 'model.safetensors'));
  expect(file.metadata).toEqual({ format: 'pt' });
  const read = (name: string) => ({ shape: [...file.info(name).shape], data: file.tensor(name).readFloat() });
  return { bytes, read, file };
}

test('all of it', async () => {
  const { bytes, file } = await copied(() => null);
  using source = Checkpoint.open(from);
  // Millions of numbers: expect takes seconds for each.
  const stored = (checkpoint: Pick<Checkpoint, 'tensor'>, name: string) =>
    Buffer.from(checkpoint.tensor(name).read().buffer);
  for (const name of source.names()) expect(stored(file, name).equals(stored(source, name)), name).toBe(true);
  expect(bytes).toBe(4 * rows * columns + 2 * rows * columns + 4 * rows + 12);
});

const order = Uint32Array.from({ length: rows }, (_, i) => (i * 1231) % rows);
test.each([
  ['first rows', { axis: 0, kept: 4001 }],
  ['rows in another order', { axis: 0, kept: order }],
] as const)('%s, and those of a vector', async (_, slice) => {
  const { read } = await copied((name) => (name === 'matrix' || name === 'vector' ? { slice } : null));
  const kept = typeof slice.kept === 'number' ? Array.from({ length: slice.kept }, (_, i) => i) : [...slice.kept];
  const matrix = read('matrix');
  expect(matrix.shape).toEqual([kept.length, columns]);
  const wrong = kept.findIndex((row, r) =>
    [0, 150, columns - 1].some((c) => matrix.data[r * columns + c] !== values[row * columns + c]),
  );
  expect(wrong).toBe(-1);
  expect([...read('vector').data]).toEqual(kept.map((row) => values[row]));
});

test.each([
  ['first columns', 4001],
  ['columns in another order', order],
] as const)('%s', async (_, kept) => {
  const { read } = await copied((name) => (name === 'narrow' ? { slice: { axis: 1, kept } } : null));
  const chosen = typeof kept === 'number' ? Array.from({ length: kept }, (_, i) => i) : [...kept];
  const { shape, data } = read('narrow');
  expect(shape).toEqual([columns, chosen.length]);
  using source = Checkpoint.open(from);
  const whole = source.tensor('narrow').readFloat();
  const wrong = chosen.findIndex((column, c) =>
    [0, 150, columns - 1].some((r) => data[r * chosen.length + c] !== whole[r * rows + column]),
  );
  expect(wrong).toBe(-1);
});

test('changed row by row, as floats of any type', async () => {
  const edit = (data: Float32Array, first: number, count: number) => {
    const width = data.length / count;
    for (let i = 0; i < data.length; i++) data[i] = 2 * (first + Math.floor(i / width)) + (i % width === 0 ? 1 : 0);
  };
  const plan = {
    matrix: { edit, slice: { axis: 0, kept: 4900 } },
    narrow: { edit, slice: { axis: 1, kept: 10 } },
  } as const;
  const { read } = await copied((name) => plan[name as keyof typeof plan] ?? null);
  const { data } = read('matrix');
  expect(data.length).toBe(4900 * columns);
  expect(data.findIndex((value, i) => value !== 2 * Math.floor(i / columns) + (i % columns === 0 ? 1 : 0))).toBe(-1);
  const narrow = read('narrow');
  expect(narrow.shape).toEqual([columns, 10]);
  // bf16 holds whole numbers up to 256.
  expect([...narrow.data.slice(0, 30)]).toEqual([0, 1, 2].flatMap((r) => [2 * r + 1, ...new Array(9).fill(2 * r)]));
});
