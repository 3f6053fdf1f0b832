// What the tests of the installed package share: folders to install in, and commands as a user would give them.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, realpathSync, symlinkSync, writeFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { inject } from 'vitest';

export const root = resolve(import.meta.dirname, '../..');

/** The environment of a shell that knows nothing of this test run, of npm's settings for it, or of a build of this package. */
export function cleanEnvironment(changes: NodeJS.ProcessEnv = {}): NodeJS.ProcessEnv {
  const foreign = /^(npm_|NODE_|VITEST|TEST$|DEV$|PROD$|MODE$|SSR$|BASE_URL$|INIT_CWD|ELASTIFORM_|CMAKE_)/;
  const own = Object.entries(process.env).filter(([name]) => !foreign.test(name));
  return { ...Object.fromEntries(own), NO_COLOR: '1', ...changes };
}

/** A PATH with a shell, Node and npm, and nothing that compiles. */
export function pathWithoutCompiler(): string {
  const folder = join(inject('folder'), 'bin');
  if (!existsSync(folder)) {
    mkdirSync(folder);
    const npm = join(dirname(process.execPath), 'npm');
    for (const [name, target] of [
      ['node', process.execPath],
      ['npm', npm],
      ['npx', join(dirname(npm), 'npx')],
      ['sh', '/bin/sh'],
    ]) {
      symlinkSync(realpathSync(target), join(folder, name));
    }
  }
  return folder;
}

export interface Outcome {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
  readonly seconds: number;
}

export function run(
  command: string,
  args: readonly string[],
  cwd: string,
  env: NodeJS.ProcessEnv = cleanEnvironment(),
): Outcome {
  const started = performance.now();
  const { status, stdout, stderr } = spawnSync(command, args, { cwd, env, encoding: 'utf8', maxBuffer: 1 << 26 });
  return { code: status, stdout, stderr, seconds: (performance.now() - started) / 1000 };
}

/** Runs a script of the folder's, an ES module unless `name` says otherwise, under this Node. */
export function runScript(folder: string, source: string, name = 'script.mjs', env: NodeJS.ProcessEnv = {}): Outcome {
  writeFileSync(join(folder, name), source);
  return run(process.execPath, [name], folder, cleanEnvironment(env));
}

/** A new folder with an empty package.json. */
export function emptyFolder(name: string): string {
  const folder = join(inject('folder'), name);
  mkdirSync(folder);
  writeFileSync(join(folder, 'package.json'), '{ "private": true }\n');
  return folder;
}

/** `npm install` of a tarball. */
export function install(
  folder: string,
  tarball: string,
  { flags = [] as string[], env = {} as NodeJS.ProcessEnv } = {},
): Outcome {
  const args = ['install', '--no-audit', '--no-fund', '--foreground-scripts', ...flags, tarball];
  return run('npm', args, folder, cleanEnvironment(env));
}

/** The folder of a normal installation that tests share. */
export function installed(): string {
  const folder = join(inject('folder'), 'installed');
  if (existsSync(folder)) return folder;
  const { code, stderr } = install(emptyFolder('installed'), join(inject('folder'), inject('packed').filename));
  if (code !== 0) throw new Error(stderr);
  return folder;
}
