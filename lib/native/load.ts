// Finds and loads the native addon on first use.
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { NativeAddon } from './addon.js';
import { AddonLoadError, type LoadAttempt } from './errors.js';

const require = createRequire(import.meta.url);
const packageRoot = resolve(dirname(fileURLToPath(import.meta.url)), '../..');

let loaded: { readonly addon: NativeAddon; readonly path: string } | undefined;

/**
 * The native addon, loaded on the first call: the file named by `ELASTIFORM_NATIVE_PATH` and no other, or without that the
 * first that loads of the build in `build/Release` and the prebuilt binary for this platform.
 *
 * @throws AddonLoadError that says what was tried, why it does not load and what to do.
 */
export function loadAddon(): NativeAddon {
  loaded ??= load();
  return loaded.addon;
}

/** The file that `loadAddon` has loaded or now loads. */
export function addonPath(): string {
  loaded ??= load();
  return loaded.path;
}

function load() {
  const named = process.env.ELASTIFORM_NATIVE_PATH;
  const attempts: LoadAttempt[] = [];
  for (const path of named ? [resolve(named)] : [builtPath(), prebuiltPath()]) {
    if (!existsSync(path)) {
      attempts.push({ path, reason: 'no such file' });
      continue;
    }
    try {
      const addon: NativeAddon = require(path);
      process.once('exit', () => addon.stopEngines());
      return { addon, path };
    } catch (error) {
      const message = error instanceof Error ? error.message : String(error);
      attempts.push({ path, reason: message.trim().split('\n')[0].replace(`${path}: `, '') });
    }
  }
  throw new AddonLoadError(explain(attempts, named !== undefined), attempts);
}

/** Where `cmake-js compile` leaves it. */
function builtPath(): string {
  return join(packageRoot, 'build/Release/elastiform.node');
}

/** Where prebuildify puts it. */
function prebuiltPath(): string {
  const { platform, arch } = process;
  return join(
    packageRoot,
    'prebuilds',
    `${platform}-${arch}`,
    `elastiform${platform === 'linux' ? '.glibc' : ''}.node`,
  );
}

function explain(attempts: readonly LoadAttempt[], named: boolean): string {
  const header = process.report?.getReport() as { header?: { glibcVersionRuntime?: string } } | undefined;
  const glibc = header?.header?.glibcVersionRuntime;
  const libc = process.platform === 'linux' ? `, ${glibc ? `glibc ${glibc}` : 'no glibc'}` : '';
  return [
    `[native] the elastiform addon could not be loaded on ${process.platform}-${process.arch}${libc}, ` +
      `Node ${process.versions.node} with Node-API ${process.versions.napi} (9 is needed):`,
    ...attempts.map(({ path, reason }) => `  ${path}: ${reason}`),
    named
      ? 'ELASTIFORM_NATIVE_PATH names that file: name an addon that was built for this platform, or unset it.'
      : `Build it with a C++20 compiler and cmake: cd ${quoted(packageRoot)} && npx cmake-js compile` +
        (process.platform === 'win32' ? ' --toolset ClangCL' : ''),
  ].join('\n');
}

/** A path as a shell takes it. */
function quoted(path: string): string {
  return /^[\w./\\:@+-]+$/.test(path) ? path : `"${path}"`;
}
