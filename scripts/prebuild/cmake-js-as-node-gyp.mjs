#!/usr/bin/env node
// The release build: the addon and the native tests in build/prebuild, only what has changed, with CUDA kernels where
// nvcc is and without the emulated device. prebuildify calls this as it would call node-gyp:
// `rebuild --target=VERSION --devdir=FOLDER --arch=x64 --release`, of which only the architecture matters to cmake-js.
import { spawnSync } from 'node:child_process';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { findNvcc } from './nvcc.mjs';

const here = dirname(fileURLToPath(import.meta.url));
const root = resolve(here, '../..');
const cmakeJs = join(dirname(createRequire(import.meta.url).resolve('cmake-js/package.json')), 'bin/cmake-js');
const { values } = parseArgs({ strict: false, options: { arch: { type: 'string', default: process.arch } } });

const nvcc = findNvcc();
const defines = {
  ELASTIFORM_CUDA: nvcc ? 'ON' : 'OFF',
  ELASTIFORM_SIMT: 'OFF',
  ELASTIFORM_TESTS: 'ON',
  CMAKE_EXPORT_COMPILE_COMMANDS: 'ON', // where ptxas-gate.mjs finds the reports
  ...(nvcc && { CMAKE_CUDA_COMPILER_LAUNCHER: `${process.execPath};${join(here, 'ptxas-report.mjs')}` }),
};
const options = ['--directory', root, '--out', join(root, 'build/prebuild/build'), '--arch', values.arch];
if (process.platform === 'win32') options.push('--toolset', 'ClangCL');
const flags = Object.entries(defines).map(([name, value]) => `--CD${name}=${value}`);
for (const command of ['configure', 'build']) {
  const args = [cmakeJs, command, '--log-level', 'error', '--parallel', '2', ...options, ...flags];
  const { status } = spawnSync(process.execPath, args, { cwd: root, stdio: 'inherit' });
  if (status !== 0) process.exit(status ?? 1);
}
