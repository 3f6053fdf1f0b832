// Whole or unchanged files, typed errors, hashes and directory locks.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  FileSystemError,
  LOCK_FILE,
  lockDirectory,
  readJson,
  replaceFile,
  sha256File,
  writeFileAtomic,
} from '../../lib/io/files.js';
import { InvalidFileError } from '../../lib/native/errors.js';

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'elastiform-files-'));
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));

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
