// Faults of the machine around the prebuilt addon's CUDA kernels: no driver worth the name, no device, broken libraries. The
// CPU runs, or a typed error says why not, without noise; and the next run works. Counted as skipped where the addon has none.
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, inject, it } from 'vitest';
import { cleanEnvironment, root, run } from './tools.js';

const folder = join(root, 'prebuilds', `${process.platform}-${process.arch}`);
const addon = existsSync(folder) ? join(folder, readdirSync(folder)[0]) : '';

function elastiform(args: readonly string[], env: NodeJS.ProcessEnv = {}) {
  const given = cleanEnvironment({ ELASTIFORM_NATIVE_PATH: addon, ...env });
  return run(process.execPath, [join(root, 'dist/cli/main.js'), ...args], root, given);
}
const devicesOf = (env?: NodeJS.ProcessEnv) => {
  const { code, stdout, stderr } = elastiform(['doctor', '--json'], env);
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
  return JSON.parse(stdout).devices;
};
const generate = ['generate', 'models/tiny', '--prompt', 'It was', '--max-tokens', '4', '--json'];
const withCuda = process.platform === 'linux' && addon !== '' && !/no CUDA kernels/.test(devicesOf().cuda.description);

/** A folder with a file that the dynamic loader finds first. */
function libraries(name: string): string {
  const path = join(inject('folder'), name);
  mkdirSync(path, { recursive: true });
  return path;
}

/** A driver of that version, 13000 for CUDA 13.0, whose cuInit says so; what else it is asked it refuses. */
function driver(version: number, init: number): NodeJS.ProcessEnv {
  const path = libraries(`driver-${version}-${init}`);
  const source = `#include <string.h>
    int cuInit(unsigned flags) { (void)flags; return ${init}; }
    int cuDriverGetVersion(int* version) { *version = ${version}; return 0; }
    static int refuse(void) { return ${init || 801}; }
    int cuGetProcAddress_v2(const char* name, void** entry, int version, unsigned long long flags, int* found) {
      (void)version, (void)flags;
      *entry = !strcmp(name, "cuInit") ? (void*)cuInit : !strcmp(name, "cuDriverGetVersion") ? (void*)cuDriverGetVersion
             : !strcmp(name, "cuGetProcAddress") ? (void*)cuGetProcAddress_v2 : (void*)refuse;
      if (found) *found = 0;
      return 0;
    }
    int cuGetProcAddress(const char* name, void** entry, int version, unsigned long long flags) {
      return cuGetProcAddress_v2(name, entry, version, flags, 0);
    }`;
  writeFileSync(join(path, 'driver.c'), source);
  execFileSync('cc', ['-shared', '-fPIC', '-o', join(path, 'libcuda.so.1'), join(path, 'driver.c')]);
  return { LD_LIBRARY_PATH: path };
}

/** A library that is none. */
function garbage(name: string): NodeJS.ProcessEnv {
  const path = libraries(`garbage-${name}`);
  writeFileSync(join(path, name), 'not a library');
  return { LD_LIBRARY_PATH: path };
}

describe.skipIf(!withCuda)('the CPU runs, and CUDA is refused with the reason', () => {
  it.each<[string, () => NodeJS.ProcessEnv, RegExp]>([
    ['a driver that is too old', () => driver(11040, 0), /driver is for CUDA 11\.4, this build wants \d+\.\d; install/],
    ['a driver without a device', () => driver(13000, 100), /no CUDA-capable device .*check nvidia-smi/],
    ['a driver that does not start', () => driver(13000, 999), /unknown error .*check nvidia-smi/],
    ['a driver that is no library', () => garbage('libcuda.so.1'), /no NVIDIA driver is loaded; install one/],
    ['CUDA_VISIBLE_DEVICES empty', () => ({ CUDA_VISIBLE_DEVICES: '' }), /CUDA_VISIBLE_DEVICES|no NVIDIA driver/],
  ])('%s', (_, make, reason) => {
    const env = make();
    const { cuda } = devicesOf(env);
    expect(cuda).toMatchObject({ available: false, description: expect.stringMatching(reason) });
    const automatic = elastiform([...generate, '--device', 'auto'], env);
    expect(automatic).toMatchObject({ code: 0, stderr: '' });
    const refused = elastiform([...generate, '--device', 'cuda'], env);
    expect(refused).toMatchObject({ code: 1, stdout: '' });
    expect(refused.stderr).toBe(`elastiform: [device] cuda cannot be used: ${cuda.description}\n`);
    const { code, stdout } = elastiform([...generate, '--device', 'cpu']);
    expect(code).toBe(0);
    expect(JSON.parse(automatic.stdout).ids).toEqual(JSON.parse(stdout).ids);
  });
});

it.skipIf(!withCuda)('a broken libcublasLt changes nothing: it is never loaded', () => {
  const env = garbage('libcublasLt.so.13');
  expect(devicesOf(env)).toEqual(devicesOf());
  expect(elastiform([...generate, '--device', 'auto'], env)).toMatchObject({ code: 0, stderr: '' });
});
