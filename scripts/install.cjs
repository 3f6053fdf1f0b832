// Run by `npm install`: makes sure that a native addon for this machine is there, building it where it is not, and in a
// clone also compiles the TypeScript. ELASTIFORM_SKIP_BUILD=1 skips it; npm's --build-from-source forces the build.
'use strict';

const { spawnSync } = require('node:child_process');
const { existsSync } = require('node:fs');
const { join } = require('node:path');

const root = join(__dirname, '..');

/** Runs a script with this Node; npm's own variables would only confuse the tools. */
function run(script, args) {
  return spawnSync(process.execPath, [script, ...args], { cwd: root, stdio: 'inherit' }).status === 0;
}

/** The path of a dependency's executable script, or null. */
function executable(name, bin) {
  try {
    const manifest = require.resolve(`${name}/package.json`, { paths: [root] });
    const entry = require(manifest).bin;
    return join(manifest, '..', typeof entry === 'string' ? entry : entry[bin]);
  } catch {
    return null;
  }
}

/** Whether a child process can run this: a crash there is an answer, not the end of the installation. */
function succeeds(script) {
  return spawnSync(process.execPath, ['-e', script], { cwd: root, stdio: 'ignore' }).status === 0;
}

/** Whether the package finds an addon that loads. A clone has no dist/ yet, and builds. */
function loads() {
  return succeeds('import("./dist/native/load.js").then(({ loadAddon }) => loadAddon().info())');
}

function buildAddon() {
  const cmakeJs = executable('cmake-js', 'cmake-js');
  const toolset = process.platform === 'win32' ? ['--toolset', 'ClangCL'] : [];
  const built = cmakeJs && run(cmakeJs, ['compile', '--parallel', '2', ...toolset]);
  if (built && succeeds('require("./build/Release/elastiform.node").info()')) return true;
  console.error(`
elastiform: the native addon could not be built. The usual causes:
  1. no C++20 compiler      Debian/Ubuntu: apt install g++       macOS: xcode-select --install
                            Windows: Visual Studio Build Tools with the C++ workload and C++ Clang tools
  2. no cmake (3.20 or newer)  Debian/Ubuntu: apt install cmake  macOS: brew install cmake
  3. headers of another Node   remove the folder build/ and the "nodedir" setting of npm, then install again
The messages above say which. To try again: cd ${root} && ${['npx cmake-js compile', ...toolset].join(' ')}
To install without the addon: ELASTIFORM_SKIP_BUILD=1 npm install`);
  return false;
}

function buildTypeScript() {
  const tsc = executable('typescript', 'tsc');
  if (!tsc || !existsSync(join(root, 'lib')) || !existsSync(join(root, 'tsconfig.build.json'))) return true;
  return run(tsc, ['-p', 'tsconfig.build.json']);
}

if (process.env.ELASTIFORM_SKIP_BUILD !== '1') {
  const forced = ['true', 'elastiform'].includes(process.env.npm_config_build_from_source ?? '');
  const built = (!forced && loads()) || buildAddon();
  if (!built || !buildTypeScript()) process.exitCode = 1;
}
