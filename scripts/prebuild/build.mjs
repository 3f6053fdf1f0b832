// npm run build:prebuilds: the addon for a release in prebuilds/<platform>-<arch>, made by prebuildify and checked by
// check.mjs. Incremental: shares build/prebuild with ptxas-gate.mjs. Options are those of check.mjs.
import { spawnSync } from 'node:child_process';
import { mkdirSync, readdirSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import prebuildify from 'prebuildify';
import { findNvcc } from './nvcc.mjs';

const here = dirname(fileURLToPath(import.meta.url));
const root = resolve(here, '../..');
const cwd = join(root, 'build/prebuild');
const nvcc = findNvcc();
console.log(nvcc ? `CPU and CUDA kernels, with ${nvcc}` : 'CPU kernels alone: there is no nvcc (CUDACXX names one)');

mkdirSync(cwd, { recursive: true });
const shim = join(here, 'cmake-js-as-node-gyp.mjs');
await promisify(prebuildify)({
  name: 'elastiform',
  napi: true,
  strip: true,
  tagLibc: process.platform === 'linux',
  cwd, // where it looks for build/Release, so that a developer's own build stays
  out: root,
  nodeGyp: process.platform === 'win32' ? `"${process.execPath}" "${shim}"` : shim, // there prebuildify uses a shell
});

const folder = join(root, 'prebuilds', `${process.platform}-${process.arch}`);
const files = readdirSync(folder).map((file) => join(folder, file));
const flags = [...process.argv.slice(2), ...(nvcc ? ['--cuda'] : []), ...files];
const checked = spawnSync(process.execPath, [join(here, 'check.mjs'), ...flags], { stdio: 'inherit' });
process.exit(checked.status ?? 1);
