// Whole or unchanged files, typed errors, hashes and directory locks.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { beforeEach, describe, expect, it } from 'vitest';
import {
  editJson,
  FileSystemError,
  jsonWithFloats,
  LOCK_FILE,
  lockDirectory,
  newDirectory,
  readJson,
  replaceDirectory,
  replaceFile,
  sha256File,
  writeFileAtomic,
} from '../../lib/io/files.js';
import { InvalidFileError } from '../../lib/native/errors.js';
import { temporaryDirectory } from '../temporary.js';

let directory: string;
beforeEach(() => {
  directory = temporaryDirectory();
});

describe('replaceFile', () => {
  it('replaces a file and leaves nothing else behind', async () => {
    const path = join(directory, 'a.json');
    await writeFileAtomic(path, 'one');
    await writeFileAtomic(path, new TextEncoder().encode('two'));
    expect(readFileSync(path, 'utf8')).toBe('two');
    expect(readdirSync(directory)).toEqual(['a.json']);
  });

  it('keeps the old file and removes the temporary one when the disk is full', async () => {
    const path = join(directory, 'a.bin');
    await writeFileAtomic(path, 'old');
    const full = replaceFile(path, async (handle) => {
      await handle.writeFile('half');
      throw Object.assign(new Error('write ENOSPC'), { code: 'ENOSPC' });
    });
    await expect(full).rejects.toThrow(FileSystemError);
    await expect(full).rejects.toThrow(`[files] cannot write ${path}: the disk is full`);
    expect(readFileSync(path, 'utf8')).toBe('old');
    expect(readdirSync(directory)).toEqual(['a.bin']);
  });

  it('names a directory that is missing', async () => {
    const path = join(directory, 'none', 'a.json');
    await expect(writeFileAtomic(path, '')).rejects.toThrow(`cannot write ${path}: no such file or directory`);
  });
});

describe('directories as a whole', () => {
  const fill = (text: string) => async (dir: string) => writeFileSync(join(dir, 'a'), text);
  const fails = async (dir: string) => {
    writeFileSync(join(dir, 'a'), 'half');
    throw new Error('stopped');
  };

  it('a new one appears with its parents, and does not replace what is there', async () => {
    const out = join(directory, 'new', 'out');
    await expect(newDirectory('x', out, fails)).rejects.toThrow('stopped');
    expect(readdirSync(join(directory, 'new'))).toEqual([]);
    mkdirSync(out);
    await newDirectory('x', out, fill('one'));
    await expect(newDirectory('x', out, fill('two'))).rejects.toThrow(
      `[x] out must be a new or empty directory, got ${out}`,
    );
    const file = join(out, 'a');
    await expect(newDirectory('x', file, fill('two'))).rejects.toThrow(`cannot read ${file}`);
    expect(readFileSync(file, 'utf8')).toBe('one');
  });

  it('a new one does not replace what came there meanwhile', async () => {
    const out = join(directory, 'out');
    const late = newDirectory('x', out, async (dir) => {
      await fill('late')(dir);
      await newDirectory('x', out, fill('first'));
    });
    await expect(late).rejects.toThrow(`[x] cannot write ${out}: `);
    expect(readFileSync(join(out, 'a'), 'utf8')).toBe('first');
    expect(readdirSync(directory)).toEqual(['out']);
  });

  it('an old one is replaced, or stays when anything fails', async () => {
    const out = join(directory, 'out');
    await replaceDirectory('x', out, fill('one'));
    await expect(replaceDirectory('x', out, fails)).rejects.toThrow('stopped');
    expect(readFileSync(join(out, 'a'), 'utf8')).toBe('one');
    expect(await replaceDirectory('x', out, async (dir) => fill('two')(dir).then(() => 'result'))).toBe('result');
    expect(readFileSync(join(out, 'a'), 'utf8')).toBe('two');
    expect(readdirSync(directory)).toEqual(['out']);
  });
});

describe('readJson', () => {
  it('parses', async () => {
    writeFileSync(join(directory, 'a.json'), '{"a":1}');
    expect(await readJson(join(directory, 'a.json'))).toEqual({ a: 1 });
  });

  it('names a file that is missing or no JSON', async () => {
    const path = join(directory, 'a.json');
    await expect(readJson(path)).rejects.toThrow(InvalidFileError);
    await expect(readJson(path)).rejects.toThrow(`${path}: no such file`);
    writeFileSync(path, '{"a":');
    await expect(readJson(path)).rejects.toThrow(InvalidFileError);
    await expect(readJson(path)).rejects.toThrow(`${path} is not JSON`);
  });
});

it('sha256File hashes files larger than one read', async () => {
  const bytes = Buffer.alloc(3_000_000, 'elastic');
  writeFileSync(join(directory, 'a.bin'), bytes);
  expect(await sha256File(join(directory, 'a.bin'))).toBe(createHash('sha256').update(bytes).digest('hex'));
  await expect(sha256File(join(directory, 'b.bin'))).rejects.toThrow(FileSystemError);
});

describe('lockDirectory', () => {
  const write = (pid: number, host = hostname()) =>
    writeFileSync(join(directory, LOCK_FILE), JSON.stringify({ pid, host, id: 'x' }));

  it('is exclusive until released', async () => {
    const lock = await lockDirectory(directory);
    await expect(lockDirectory(directory)).rejects.toThrow(FileSystemError);
    await expect(lockDirectory(directory)).rejects.toThrow(`is being written by process ${process.pid}`);
    await lock.release();
    await using _again = await lockDirectory(directory);
    expect(readdirSync(directory)).toEqual([LOCK_FILE]);
  });

  it('lets one of many in', async () => {
    const tries = await Promise.allSettled(Array.from({ length: 8 }, () => lockDirectory(directory)));
    expect(tries.filter((t) => t.status === 'fulfilled')).toHaveLength(1);
  });

  it('takes over the lock of a dead process, once', async () => {
    const { pid } = spawnSync(process.execPath, ['-e', '']);
    for (let round = 0; round < 20; round++) {
      write(pid);
      const tries = await Promise.allSettled(Array.from({ length: 8 }, () => lockDirectory(directory)));
      expect(tries.filter((t) => t.status === 'fulfilled')).toHaveLength(1);
      for (const t of tries) if (t.status === 'rejected') expect(t.reason).toBeInstanceOf(FileSystemError);
      expect(readdirSync(directory)).toEqual([LOCK_FILE]);
    }
    expect(JSON.parse(readFileSync(join(directory, LOCK_FILE), 'utf8')).pid).toBe(process.pid);
  });

  it('leaves the lock of another machine or of unknown origin alone', async () => {
    const { pid } = spawnSync(process.execPath, ['-e', '']);
    write(pid, 'another-host');
    await expect(lockDirectory(directory)).rejects.toThrow(`process ${pid} on another-host`);
    writeFileSync(join(directory, LOCK_FILE), '');
    await expect(lockDirectory(directory)).rejects.toThrow(`if it is gone, remove ${join(directory, LOCK_FILE)}`);
  });

  it('does not remove a lock that is no longer its own', async () => {
    const lock = await lockDirectory(directory);
    write(process.pid);
    await lock.release();
    expect(readdirSync(directory)).toEqual([LOCK_FILE]);
  });
});

it('numbers of fields that are floats are written with a point', () => {
  const object = { a: 50, b: 50, c: { a: 0.5, b: [0, { a: [-3, 1e-7, 0.25, 1e21] }] }, d: '\u0001', e: null, a2: 1 };
  const text = jsonWithFloats(object, ['a']);
  expect(text.replaceAll(/\s+/g, ' ')).toBe(
    '{ "a": 50.0, "b": 50, "c": { "a": 0.5, "b": [ 0, { "a": [ -3.0, 1e-7, 0.25, 1e+21 ] } ] }, "d": "\\u0001", "e": null, "a2": 1 }',
  );
});

it('a JSON text is edited, and numbers that stay are written as they were', () => {
  const text = '{"a": 50.0, "b": [1e-05, -2, {"c": 1.50}], "d": "3.0 \\" 4.0", "e": null, "f": {"7": 8.0}, "g": 9}';
  const edited = editJson(text, ({ g: _, ...json }) => ({ ...json, h: 10, i: '11' }));
  expect(edited.replaceAll(/\s+/g, ' ')).toBe(
    '{ "a": 50.0, "b": [ 1e-05, -2, { "c": 1.50 } ], "d": "3.0 \\" 4.0", "e": null, "f": { "7": 8.0 }, "h": 10, "i": "11" }',
  );
});
