// scripts/prebuild/check.mjs: takes the prebuilt addon, and finds what may be wrong with one.
import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, inject, it } from 'vitest';
import { cleanEnvironment, root, run } from './tools.js';

const folder = join(root, 'prebuilds', `${process.platform}-${process.arch}`);
const prebuilt = readdirSync(folder).map((file) => join(folder, file))[0];
const check = (...args: string[]) => run(process.execPath, ['scripts/prebuild/check.mjs', ...args], root);

/** Links a library from C++ in the folder of the tests. */
function library(name: string, source: string, ...flags: string[]): string {
  const file = join(inject('folder'), `${name}.node`);
  writeFileSync(`${file}.cc`, source);
  execFileSync('c++', ['-shared', '-fPIC', '-o', file, `${file}.cc`, ...flags], { env: cleanEnvironment() });
  return file;
}

it('takes the prebuilt addon', () => {
  const { code, stdout, stderr } = check(prebuilt);
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
  expect(stdout).toMatch(/loads: portable/);
});

it('finds a file that is too large, and no file at all', () => {
  expect(check('--max-mb', '1', prebuilt)).toMatchObject({
    code: 1,
    stderr: `${prebuilt}: is larger than 1 MB\n`,
  });
  expect(check().code).toBe(1);
});

it('finds a damaged file', () => {
  const damaged = join(inject('folder'), 'damaged.node');
  writeFileSync(damaged, 'no addon');
  const { code, stderr } = check(damaged);
  expect(code).toBe(1);
  expect(stderr).toMatch(/does not load: /);
});

it.skipIf(process.platform !== 'linux')('finds a glibc that is too new', () => {
  const { code, stderr } = check('--glibc', '2.5', prebuilt);
  expect(code).toBe(1);
  expect(stderr).toMatch(/needs glibc 2\.\d\d, newer than 2\.5\n/);
});

it.skipIf(process.platform !== 'linux')('finds what an ELF file needs, shows and names', () => {
  const source = `#include <string>
    const char* built = "${root}/native";
    int text(int n) { return std::stoi(std::to_string(n)); }`;
  const { code, stderr } = check(library('foreign', source, '-Wl,-rpath,/opt'));
  expect(code).toBe(1);
  for (const problem of [
    'needs libstdc++.so.6',
    'of a shared C++ library',
    'has a path to search libraries in',
    'would be unloaded with its last worker thread',
    'exports _Z4texti',
    'exports built',
    'does not export napi_register_module_v1',
    `names the folder ${root}`,
    'does not load: ',
  ]) {
    expect(stderr).toContain(problem);
  }
});

// The addon of `npm run build` has none where there is no NVIDIA driver.
it.skipIf(existsSync('/proc/driver/nvidia/version'))(
  'finds an addon without CUDA kernels where they are wanted',
  () => {
    const { code, stderr } = check('--max-mb', '999', '--cuda', 'build/Release/elastiform.node');
    expect(code).toBe(1);
    expect(stderr).toContain('has no CUDA kernels');
  },
);
