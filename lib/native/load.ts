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
 * The native addon, loaded on the first call: the file named by `ELASTIFORM_NATIVE_PATH` and no other, or without that the
 * build in `build/Release`, else the prebuilt binary for this platform.
 *
 * @throws InternalError that says what was tried, why it does not load and what to do.
 */
export function loadAddon(): NativeAddon {
  loaded ??= load();
  return loaded;
}

function load(): NativeAddon {
  const path = process.env.ELASTIFORM_NATIVE_PATH;
  let addon: NativeAddon;
  try {
    addon = path ? require(resolve(path)) : require('node-gyp-build')(packageRoot);
  } catch (error) {
    throw new InternalError(explain(path, error instanceof Error ? error.message : String(error)), { cause: error });
  }
  process.once('exit', () => addon.stopEngines());
  return addon;
}

function explain(path: string | undefined, cause: string): string {
  const header = process.report?.getReport() as { header?: { glibcVersionRuntime?: string } } | undefined;
  const glibc = header?.header?.glibcVersionRuntime;
  const libc = process.platform === 'linux' ? `, ${glibc ? `glibc ${glibc}` : 'no glibc'}` : '';
  return [
    `[native] the elastiform addon could not be loaded on ${process.platform}-${process.arch}${libc}, ` +
      `Node ${process.versions.node} with Node-API ${process.versions.napi} (9 is needed):`,
    `  ${path ? `ELASTIFORM_NATIVE_PATH=${path}` : packageRoot}: ${cause.trim().split('\n')[0]}`,
    path
      ? 'Name an addon that was built for this platform, or unset ELASTIFORM_NATIVE_PATH.'
      : `Build it with a C++20 compiler and cmake: cd ${packageRoot} && npx cmake-js compile`,
  ].join('\n');
}
