// Packs the package once for all tests, with its prebuilt addon and without, into a folder outside the repository, where
// no node_modules above helps out.
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { TestProject } from 'vitest/node';
import { root } from './tools.js';

declare module 'vitest' {
  interface ProvidedContext {
    /** The folder of everything below. */
    folder: string;
    /** What `npm pack --json` says: its file, in `folder`, and what is in it. */
    packed: { filename: string; size: number; unpackedSize: number; files: { path: string; size: number }[] };
    /** The tarball without prebuilds/. */
    bare: string;
  }
}

export default function setup(project: TestProject) {
  const folder = mkdtempSync(join(tmpdir(), 'elastiform-package-'));
  const pack = ['pack', '--json', '--ignore-scripts', '--pack-destination', folder];
  const [packed] = JSON.parse(execFileSync('npm', pack, { cwd: root, encoding: 'utf8' }));
  const work = join(folder, 'bare');
  mkdirSync(work);
  execFileSync('tar', ['-xzf', join(folder, packed.filename), '-C', work]);
  rmSync(join(work, 'package/prebuilds'), { recursive: true, force: true });
  execFileSync('tar', ['-czf', join(folder, 'bare.tgz'), '-C', work, 'package']);
  rmSync(work, { recursive: true });
  project.provide('folder', folder);
  project.provide('packed', packed);
  project.provide('bare', join(folder, 'bare.tgz'));
  return () => rmSync(folder, { recursive: true, force: true });
}
