// Packing keeps documents whole and apart; bad sources are refused with a reason.
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type Batch, readDocuments, splitHeldOut, TokenData } from '../../lib/distill/data.js';
import { temporaryDirectory } from './tiny.js';

const documents = fc.array(fc.array(fc.nat(999), { minLength: 1, maxLength: 40 }), { minLength: 1, maxLength: 30 });

function epoch(data: TokenData, rows: number, seed: number | null, number = 0): Batch[] {
  const batches: Batch[] = [];
  for (let cursor = { epoch: number, segment: 0 }; cursor.epoch === number; ) {
    const next = data.next(cursor, rows, seed);
    batches.push(next.batch);
    cursor = next.cursor;
  }
  return batches;
}

const segmentsOf = ({ ids, targets, positions, offsets }: Batch) =>
  Array.from({ length: offsets.length - 1 }, (_, s) => ({
    ids: [...ids.subarray(offsets[s], offsets[s + 1])],
    targets: [...targets.subarray(offsets[s], offsets[s + 1])],
    positions: [...positions.subarray(offsets[s], offsets[s + 1])],
  }));

describe('packing', () => {
  it('gives every token once an epoch, with restarting positions, next-token targets and no row too many', () => {
    fc.assert(
      fc.property(
        documents,
        fc.integer({ min: 2, max: 12 }),
        fc.nat(20),
        fc.option(fc.nat()),
        (docs, length, extra, seed) => {
          const data = TokenData.fromIds(docs, length, 1);
          const rows = length + extra;
          const batches = epoch(data, rows, seed);
          const expected = docs.flatMap((ids) =>
            Array.from({ length: Math.ceil(ids.length / length) }, (_, i) => ({
              ids: ids.slice(i * length, (i + 1) * length),
              targets: [
                ...ids.slice(i * length + 1, (i + 1) * length + 1),
                ...(ids.length <= (i + 1) * length ? [-1] : []),
              ],
              positions: ids.slice(i * length, (i + 1) * length).map((_, p) => p),
            })),
          );
          const packed = batches.flatMap(segmentsOf);
          const sorted = (list: unknown[]) => list.map((entry) => JSON.stringify(entry)).sort();
          expect(sorted(packed)).toEqual(sorted(expected));
          if (seed === null) expect(packed).toEqual(expected);
          for (const batch of batches) {
            expect(batch.ids.length).toBeGreaterThan(0);
            expect(batch.ids.length).toBeLessThanOrEqual(rows);
            expect(batch.offsets[0]).toBe(0);
            expect(batch.offsets.at(-1)).toBe(batch.ids.length);
          }
          expect(data.batchesPerEpoch(0, rows, seed)).toBe(batches.length);
        },
      ),
    );
  });

  it('continues from a cursor as if it had never stopped', () => {
    const data = TokenData.fromIds(
      Array.from({ length: 50 }, (_, i) => Array(1 + (i % 9)).fill(i)),
      8,
      1,
    );
    let cursor = { epoch: 0, segment: 0 };
    const straight: unknown[] = [];
    const resumed: unknown[] = [];
    for (let i = 0; i < 40; i++) {
      straight.push(data.next(cursor, 16, 3).batch);
      const other = TokenData.fromIds(
        Array.from({ length: 50 }, (_, i) => Array(1 + (i % 9)).fill(i)),
        8,
        1,
      );
      const next = other.next(JSON.parse(JSON.stringify(cursor)), 16, 3);
      resumed.push(next.batch);
      cursor = next.cursor;
    }
    expect(cursor.epoch).toBeGreaterThan(1);
    expect(resumed).toEqual(straight);
  });

  it('shuffles every epoch differently, and by seed', () => {
    const data = TokenData.fromIds(
      Array.from({ length: 100 }, (_, i) => [i]),
      2,
      1,
    );
    const order = (seed: number, number: number) => epoch(data, 100, seed, number)[0].ids.join();
    expect(order(1, 0)).not.toBe(order(1, 1));
    expect(order(1, 0)).not.toBe(order(2, 0));
    expect(order(1, 0)).toBe(order(1, 0));
  });

  it('refuses a batch that cannot hold a sequence', () => {
    expect(() => TokenData.fromIds([[1, 2, 3]], 8, 1).next({ epoch: 0, segment: 0 }, 4, 0)).toThrow(
      /\[data\] a batch of 4 rows cannot hold a sequence of 8 tokens/,
    );
  });
});

describe('sources', () => {
  const dir = temporaryDirectory();
  const file = (name: string, content: string | Uint8Array) => {
    writeFileSync(join(dir, name), content);
    return join(dir, name);
  };

  it('reads text files, lines of JSON and documents in memory', async () => {
    const text = file('a.txt', 'one\ntwo');
    const jsonl = file('a.jsonl', '{"story":"x"}\n\n{"story":"y"}\n');
    expect(await readDocuments({ kind: 'text', files: [text, text] })).toEqual(['one\ntwo', 'one\ntwo']);
    expect(await readDocuments({ kind: 'jsonl', files: jsonl, field: 'story' })).toEqual(['x', 'y']);
    expect(await readDocuments({ kind: 'documents', documents: ['a', '', 'b'] })).toEqual(['a', 'b']);
  });

  it.each([
    ['nothing at all', { kind: 'documents', documents: [] }, 'InvalidData', /the data set is empty/],
    ['only empty files', { kind: 'text', files: file('empty.txt', '') }, 'InvalidData', /empty\.txt holds no text/],
    ['a missing file', { kind: 'text', files: join(dir, 'none.txt') }, 'InvalidFile', /none\.txt/],
    ['a missing file of lines', { kind: 'jsonl', files: join(dir, 'none.jsonl') }, 'InvalidFile', /none\.jsonl/],
    [
      'bytes that are no text',
      { kind: 'text', files: file('b.txt', Uint8Array.of(255, 254, 0)) },
      'InvalidFile',
      /UTF-8/,
    ],
    [
      'a line that is no JSON',
      { kind: 'jsonl', files: file('b.jsonl', '{"text":"a"}\n{') },
      'InvalidFile',
      /b\.jsonl:2 is not JSON/,
    ],
    [
      'a line without the field',
      { kind: 'jsonl', files: file('c.jsonl', '{"a":1}') },
      'InvalidFile',
      /c\.jsonl:1 has no text in field 'text'/,
    ],
    ['an unknown kind', { kind: 'parquet', files: 'x' }, 'InvalidArgument', /kind must be/],
    ['an unknown key', { kind: 'text', files: 'x', field: 'a' }, 'InvalidArgument', /unknown key 'field'/],
    ['documents that are no strings', { kind: 'documents', documents: [1] }, 'InvalidArgument', /must be strings/],
  ])('refuses %s', async (_, source, code, message) => {
    const error = await readDocuments(source as never).catch((e) => e);
    expect(error).toMatchObject({ code });
    expect(error.message).toMatch(message);
  });

  it('sets documents aside by seed, and cuts a single one', () => {
    const docs = Array.from({ length: 20 }, (_, i) => `${i}`);
    const { train, heldOut } = splitHeldOut(docs, 0.2, 5);
    expect(heldOut).toHaveLength(4);
    expect([...train, ...heldOut].sort()).toEqual([...docs].sort());
    expect(splitHeldOut(docs, 0.2, 5)).toEqual({ train, heldOut });
    expect(splitHeldOut(['line\n'.repeat(100)], 0.1, 0).heldOut[0]).toBe('line\n'.repeat(10));
    expect(() => splitHeldOut(docs, 1, 0)).toThrow(/share must be in \(0, 1\)/);
  });
});
