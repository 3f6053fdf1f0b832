// Files and directories: whole-file reads with typed errors, writes that appear complete or not at all, hashes, locks.
import { createHash, randomBytes } from 'node:crypto';
import { createReadStream, existsSync } from 'node:fs';
import { type FileHandle, mkdir, open, readdir, readFile, rename, rm, rmdir } from 'node:fs/promises';
import { hostname } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { ElastiformError, InvalidArgumentError, InvalidFileError } from '../native/errors.js';

/** The file system refused: disk full, no permission, a directory in use by another process. `cause` has the reason. */
export class FileSystemError extends ElastiformError {
  readonly code = 'FileSystem';
  constructor(message: string, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
  }
}

const EXPLANATIONS: Record<string, string> = {
  ENOSPC: 'the disk is full',
  EDQUOT: 'the disk quota is used up',
  EFBIG: 'the file is larger than the file system or a limit allows',
  EACCES: 'permission denied',
  EPERM: 'not permitted; on Windows also when another program has the file open',
  EBUSY: 'the file is in use',
  EROFS: 'the file system is read-only',
  ENOENT: 'no such file or directory',
  ENOTDIR: 'a part of the path is not a directory',
  EISDIR: 'it is a directory',
  EEXIST: 'something of another kind is there',
  EMFILE: 'too many open files',
};

/** Code of a Node.js system error (`ENOENT`, ...), or undefined. */
export function systemCode(error: unknown): string | undefined {
  const code = error instanceof Error ? (error as NodeJS.ErrnoException).code : undefined;
  return code !== undefined && /^E[A-Z0-9]+$/.test(code) ? code : undefined;
}

function fileSystemError(action: string, path: string, error: unknown): unknown {
  const code = systemCode(error);
  if (code === undefined) return error;
  return new FileSystemError(`[files] cannot ${action} ${path}: ${EXPLANATIONS[code] ?? code}`, error);
}

/**
 * Calls the file system; what it refuses comes out typed.
 *
 * @param action - what is done to `path`, for the message: `create`, `append to`
 * @throws FileSystemError when the disk is full or the file system refuses.
 */
export async function inFileSystem<T>(action: string, path: string, call: () => Promise<T>): Promise<T> {
  try {
    return await call();
  } catch (error) {
    throw fileSystemError(action, path, error);
  }
}

/**
 * Replaces `path` by what `write` writes: under a temporary name beside it, synced, then renamed. When anything fails the
 * temporary file is removed and `path` is as it was.
 *
 * @throws FileSystemError when the disk is full or the file system refuses.
 */
export async function replaceFile(path: string, write: (handle: FileHandle) => Promise<void>): Promise<void> {
  const temporary = `${path}.${process.pid}.${randomBytes(4).toString('hex')}.tmp`;
  try {
    const handle = await open(temporary, 'wx');
    try {
      await write(handle);
      await handle.sync();
    } finally {
      await handle.close();
    }
    await rename(temporary, path);
    await syncDirectory(dirname(path));
  } catch (error) {
    await rm(temporary, { force: true }).catch(() => {});
    throw fileSystemError('write', path, error);
  }
}

/** Makes renames in a directory durable. Windows has no such call: directories cannot be opened there. */
export async function syncDirectory(directory: string): Promise<void> {
  if (process.platform === 'win32') return;
  const handle = await open(directory, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/**
 * Writes a whole file so that it is complete or unchanged whenever the process or the machine stops.
 *
 * @throws FileSystemError when the disk is full or the file system refuses.
 */
export function writeFileAtomic(path: string, data: string | Uint8Array): Promise<void> {
  return replaceFile(path, (handle) => handle.writeFile(data));
}

/**
 * Makes a directory as a whole: `fill` fills another one beside it, which then takes the place of `out` and of all that `out`
 * holds. When anything fails `out` is as it was and nothing else is left.
 *
 * @param api - names the call in errors
 * @throws FileSystemError when the disk is full or the file system refuses, and what `fill` throws.
 */
export function replaceDirectory<T>(api: string, out: string, fill: (dir: string) => Promise<T>): Promise<T> {
  return wholeDirectory(api, out, fill, true);
}

/**
 * The same for a directory that must be new or empty.
 *
 * @throws InvalidArgumentError when it is neither; otherwise as replaceDirectory.
 */
export async function newDirectory<T>(api: string, out: string, fill: (dir: string) => Promise<T>): Promise<T> {
  if (existsSync(out) && (await inFileSystem('read', out, () => readdir(out))).length > 0) {
    throw new InvalidArgumentError(`[${api}] out must be a new or empty directory, got ${out}`);
  }
  return await wholeDirectory(api, out, fill, false);
}

async function wholeDirectory<T>(
  api: string,
  out: string,
  fill: (dir: string) => Promise<T>,
  replaces: boolean,
): Promise<T> {
  const path = resolve(out);
  await inFileSystem('create', dirname(path), () => mkdir(dirname(path), { recursive: true }));
  const work = `${path}.partial-${randomBytes(4).toString('hex')}`;
  const aside = `${work}.old`;
  try {
    await inFileSystem('create', work, () => mkdir(work));
    const result = await fill(work);
    try {
      if (existsSync(path)) {
        // An empty directory needs no detour.
        await rmdir(path).catch((cause) => (replaces ? rename(path, aside) : Promise.reject(cause)));
      }
      await rename(work, path);
    } catch (cause) {
      if (existsSync(aside) && !existsSync(path)) await rename(aside, path);
      throw new FileSystemError(
        `[${api}] cannot write ${out}: ${(cause as Error).message}; another process may be writing it`,
        cause,
      );
    }
    return result;
  } finally {
    await rm(work, { recursive: true, force: true });
    await rm(aside, { recursive: true, force: true });
  }
}

/**
 * Parses a JSON file.
 *
 * @throws InvalidFileError naming the file when it is missing or is not JSON.
 */
export async function readJson(path: string): Promise<unknown> {
  return (await readJsonText(path)).json;
}

/** The same with the text of the file. */
export async function readJsonText(path: string): Promise<{ text: string; json: unknown }> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    const code = systemCode(error);
    throw new InvalidFileError(`[files] cannot read ${path}: ${EXPLANATIONS[code ?? ''] ?? error}`, { cause: error });
  }
  try {
    return { text, json: JSON.parse(text) };
  } catch (error) {
    throw new InvalidFileError(`[files] ${path} is not JSON: ${(error as Error).message}`, { cause: error });
  }
}

/**
 * A JSON text of an object that readers with types take: numbers of the fields named, and in their lists, have a point, 50.0 for
 * 50, which JavaScript does not tell apart.
 */
export function jsonWithFloats(object: object, fields: readonly string[]): string {
  const text = JSON.stringify(object, (key, value) => (fields.includes(key) ? asFloats(value) : value), 2);
  return unmarked(text);
}

/** A number, or the numbers of a list, as `editJson` takes them to be written with a point. */
export function asFloats(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(asFloats);
  // Large ones are written with an exponent, as floats.
  return typeof value === 'number' && /^-?\d+$/.test(String(value)) ? `\0${value}.0` : value;
}

/** Texts that begin with NUL as numbers. */
const unmarked = (json: string): string => json.replaceAll(/"\\u0000([^"]*)"/g, '$1');

/**
 * A JSON text of an object with the object changed by `edit`. Numbers that stay are written as they were: readers with types
 * tell 50.0 from 50, which JavaScript does not.
 */
export function editJson(text: string, edit: (json: Record<string, unknown>) => Record<string, unknown>): string {
  // While it is an object, a number is a text that begins with NUL.
  const marked = text.replaceAll(
    /("(?:[^"\\]|\\.)*")|(-?\d[\d.eE+-]*)/g,
    (_, string, number) => string ?? `"\\u0000${number}"`,
  );
  return unmarked(JSON.stringify(edit(JSON.parse(marked)), null, 2));
}

/** SHA-256 of a file's bytes in hexadecimal, read in pieces. */
export async function sha256File(path: string): Promise<string> {
  const hash = createHash('sha256');
  try {
    for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20 })) hash.update(chunk);
  } catch (error) {
    throw fileSystemError('read', path, error);
  }
  return hash.digest('hex');
}

/** Held by the one process that may write to a directory. */
export interface DirectoryLock extends AsyncDisposable {
  release(): Promise<void>;
}

export const LOCK_FILE = '.elastiform.lock';

/**
 * Takes the right to write to an existing directory, for this process. The lock of a process that died on this machine is
 * taken over.
 *
 * @throws FileSystemError when somebody else holds it: the message says who, and which file to remove if they are gone.
 */
export async function lockDirectory(directory: string): Promise<DirectoryLock> {
  const path = join(directory, LOCK_FILE);
  const own = JSON.stringify({ pid: process.pid, host: hostname(), id: randomBytes(8).toString('hex') });
  try {
    if (await createExclusive(path, own)) return directoryLock(path, own);
    if (isStale(await readLock(path))) {
      // Several processes may find the same dead lock. The one that creates this file looks again, and replaces it.
      const takeover = `${path}.takeover`;
      if (!(await createExclusive(takeover, own))) throw heldError(directory, takeover, await readLock(takeover));
      try {
        if (isStale(await readLock(path))) {
          await writeFileAtomic(path, own);
          return directoryLock(path, own);
        }
      } finally {
        await rm(takeover, { force: true });
      }
    }
  } catch (error) {
    throw fileSystemError('lock', directory, error);
  }
  throw heldError(directory, path, await readLock(path));
}

// Whether the file was not there before.
async function createExclusive(path: string, text: string): Promise<boolean> {
  let handle: FileHandle;
  try {
    handle = await open(path, 'wx');
  } catch (error) {
    if (systemCode(error) === 'EEXIST') return false;
    throw error;
  }
  try {
    await handle.writeFile(text);
  } catch (error) {
    await rm(path, { force: true });
    throw error;
  } finally {
    await handle.close();
  }
  return true;
}

const readLock = (path: string) => readFile(path, 'utf8').catch(() => '');

function directoryLock(path: string, own: string): DirectoryLock {
  const release = async () => {
    // Somebody who removed our lock by hand may hold the directory now.
    if ((await readLock(path)) === own) await rm(path, { force: true });
  };
  return { release, [Symbol.asyncDispose]: release };
}

function parseLock(text: string): { pid: number; host: string } | null {
  try {
    const { pid, host } = JSON.parse(text);
    return Number.isInteger(pid) && pid > 0 && typeof host === 'string' ? { pid, host } : null;
  } catch {
    return null;
  }
}

function isStale(text: string): boolean {
  const holder = parseLock(text);
  if (!holder || holder.host !== hostname()) return false;
  try {
    process.kill(holder.pid, 0);
    return false;
  } catch (error) {
    return systemCode(error) === 'ESRCH';
  }
}

function heldError(directory: string, path: string, text: string): FileSystemError {
  const holder = parseLock(text);
  const who = holder ? `process ${holder.pid} on ${holder.host}` : 'another process';
  return new FileSystemError(`[files] ${directory} is being written by ${who}; if it is gone, remove ${path}`);
}
