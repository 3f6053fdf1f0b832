// Finds and loads the native addon on first use.
import { createRequire } from 'node:module';
import { dirname, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { NativeAddon } from './addon.js';
import { InternalError } from './errors.js';

const require = createRequire(import.meta.url);
const packageRoot = resolve(dirname(fileURLToPath(import.meta.url)), '../..');

let loaded: NativeAddon | undefined;

/**
 * The native addon, loaded on the first call: the file named by `ELASTIFORM_NATIVE_PATH`, else the build in
 * `build/Release`, else the prebuilt binary for this platform.
 *
 * @throws InternalError that lists every attempt and the command that builds the addon.
 */
export function loadAddon(): NativeAddon {
  loaded ??= load();
  return loaded;
}

function load(): NativeAddon {
  const attempts: string[] = [];
  const attempt = (what: string, call: () => NativeAddon): NativeAddon | undefined => {
    try {
      return call();
    } catch (error) {
      attempts.push(`  ${what}: ${error instanceof Error ? error.message.trim().split('\n')[0] : String(error)}`);
      return undefined;
    }
  };
  const path = process.env.ELASTIFORM_NATIVE_PATH;
  const addon =
    (path ? attempt(`ELASTIFORM_NATIVE_PATH=${path}`, () => require(resolve(path))) : undefined) ??
    attempt(packageRoot, () => require('node-gyp-build')(packageRoot));
  if (!addon) throw new InternalError(explain(attempts));
  process.once('exit', () => addon.stopEngines());
  return addon;
}

function explain(attempts: string[]): string {
  const header = process.report?.getReport() as { header?: { glibcVersionRuntime?: string } } | undefined;
  const glibc = header?.header?.glibcVersionRuntime;
  const libc = process.platform === 'linux' ? `, ${glibc ? `glibc ${glibc}` : 'no glibc'}` : '';
  return [
    `[native] the elastiform addon could not be loaded on ${process.platform}-${process.arch}${libc}, ` +
      `Node ${process.versions.node} with Node-API ${process.versions.napi} (9 is needed). Tried:`,
    ...attempts,
    `Build it with a C++20 compiler and cmake: cd ${packageRoot} && npx cmake-js compile`,
  ].join('\n');
}
