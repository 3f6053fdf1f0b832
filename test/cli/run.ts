// Runs the built command line in child processes, and makes the small inputs that its tests share.
import { type ChildProcess, spawn } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { temporaryDirectory } from '../temporary.js';

const root = resolve(import.meta.dirname, '../..');
export const main = resolve(root, 'dist/cli/main.js');
/** The model in the repository. */
export const shipped = resolve(root, 'models/tiny');
export const version = (JSON.parse(readFileSync(resolve(root, 'package.json'), 'utf8')) as { version: string }).version;

export interface Outcome {
  /** Exit code; null when a signal ended the process. */
  code: number | null;
  stdout: string;
  stderr: string;
}

export interface Running {
  readonly child: ChildProcess;
  readonly ended: Promise<Outcome>;
}

/** Starts `elastiform ...args`; `wrapper` is a command that execs its arguments. */
export function start(args: readonly string[], wrapper: readonly string[] = []): Running {
  const [command, ...rest] = [...wrapper, process.execPath, main, ...args];
  const child = spawn(command, rest, { stdio: ['ignore', 'pipe', 'pipe'], timeout: 110_000 });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text) => {
    stdout += text;
  });
  child.stderr.setEncoding('utf8').on('data', (text) => {
    stderr += text;
  });
  const ended = new Promise<Outcome>((done, fail) => {
    child.on('error', fail);
    child.on('close', (code) => done({ code, stdout, stderr }));
  });
  return { child, ended };
}

/** Runs `elastiform ...args` to its end. */
export const run = (...args: string[]): Promise<Outcome> => start(args).ended;

/** What `--json` printed: one line that holds one object. */
export function json(outcome: Outcome): Record<string, unknown> {
  const lines = outcome.stdout.split('\n');
  if (lines.length !== 2 || lines[1] !== '') throw new Error(`not one line: ${outcome.stdout}\n${outcome.stderr}`);
  return JSON.parse(lines[0]);
}

/** A fresh directory, removed after the tests of the file, with a short text to train on in train.txt. */
export function workDirectory(): string {
  const path = temporaryDirectory();
  const text = readFileSync(join(shipped, 'train.txt'), 'utf8').slice(0, 1500);
  writeFileSync(join(path, 'train.txt'), text);
  return path;
}

/** Flags of a training of the shipped model whose steps take some milliseconds. */
export function quickTraining(work: string): string[] {
  const config = join(work, 'quick.json');
  writeFileSync(config, JSON.stringify({ calibrationTokens: 256 }));
  const flags = ['-c', config, '--data', join(work, 'train.txt'), '--sequence-length', '32', '--batch-tokens', '64'];
  return [...flags, '--seed', '1'];
}
