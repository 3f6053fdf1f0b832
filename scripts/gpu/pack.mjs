// Makes a folder that runs the tests and benchmarks on a GPU host without Node or network; see docs/gpu.md. Usage: node
// scripts/gpu/pack.mjs [--out build/gpu] [--prebuilt FOLDER]; binaries of FOLDER are taken as they are, without it those
// of the release build (scripts/prebuild), of which only what has changed is compiled.
import { execFileSync, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import fs from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { loadConfigFromFile } from 'vite';
import { findNvcc } from '../prebuild/nvcc.mjs';

const root = path.resolve(import.meta.dirname, '../..');
const LIMIT = 30 * 2 ** 20; // what GPU hosts take, with room for the repository beside it

// Data that nothing of the bundle reads, and what Python leaves.
const UNUSED = /^test\/golden\/encoders\/|\.pyc$/;

const { values } = parseArgs({
  options: {
    out: { type: 'string', default: 'build/gpu' },
    prebuilt: { type: 'string' },
  },
});
const build = path.resolve(root, values.prebuilt ?? 'build/prebuild/build');
const out = path.resolve(root, values.out);
const work = path.join(root, 'build/gpu-work');
const files = path.join(work, 'files');

const log = (message) => console.log(`[pack] ${message}`);
const run = (command, ...args) => execFileSync(command, args, { cwd: root, stdio: ['ignore', 'inherit', 'inherit'] });
const read = (command, ...args) => execFileSync(command, args, { cwd: root, encoding: 'utf8' }).trim();
const bin = (name) => path.join(root, 'node_modules/.bin', name);

function* walk(folder) {
  for (const entry of fs.readdirSync(folder, { withFileTypes: true })) {
    const full = path.join(folder, entry.name);
    if (entry.isDirectory()) yield* walk(full);
    else if (entry.isFile()) yield full;
    else throw new Error(`${full} is no plain file`);
  }
}
function copy(from, to, keep = () => true) {
  for (const file of fs.statSync(from).isDirectory() ? walk(from) : [from]) {
    const relative = path.relative(from, file);
    if (!keep(relative)) continue;
    const target = relative ? path.join(to, relative) : to;
    fs.mkdirSync(path.dirname(target), { recursive: true });
    fs.copyFileSync(file, target);
  }
}

/** The addon of a release, and the native tests, which run the kernels on the device too. */
function buildNative() {
  if (values.prebuilt) return;
  if (!findNvcc()) throw new Error('a bundle needs nvcc (CUDACXX names it), or --prebuilt FOLDER');
  log('building the addon and the native tests with CUDA: what has changed');
  run(process.execPath, 'scripts/prebuild/cmake-js-as-node-gyp.mjs');
}

function packNative() {
  for (const [from, to] of [
    ['Release/elastiform.node', 'build/Release/elastiform.node'],
    ['elastiform_tests', 'bin/elastiform_tests'],
  ]) {
    const target = path.join(files, to);
    copy(path.join(build, from), target);
    fs.chmodSync(target, 0o755);
    run('strip', '--strip-all', target);
  }
}

/** With the x86 filter, and for files up to 96 MiB a dictionary that holds all of it. */
async function compress(file) {
  const flags = ['--keep', '--force', '--x86', '--lzma2=preset=9e,dict=96MiB,lc=4', file];
  const child = spawn('xz', flags, { stdio: ['ignore', 'inherit', 'inherit'] });
  const [code] = await once(child, 'close');
  if (code !== 0) throw new Error(`xz ${file}: exit code ${code}`);
  return `${file}.xz`;
}

/** Node of the machine that packs, stripped and compressed once per version. */
async function packNode() {
  const cached = path.join(root, 'build', `node-${process.version}-${process.arch}.xz`);
  if (!fs.existsSync(cached)) {
    log('compressing node (a minute or two), while the rest is made');
    const stripped = path.join(work, 'node');
    fs.copyFileSync(fs.realpathSync(process.execPath), stripped);
    run('strip', stripped);
    fs.renameSync(await compress(stripped), cached);
  }
  copy(cached, path.join(out, 'node.xz'));
  const prefix = path.resolve(path.dirname(fs.realpathSync(process.execPath)), '..');
  const places = ['LICENSE', 'share/doc/nodejs/LICENSE', 'share/doc/node/LICENSE', 'share/doc/nodejs/copyright'];
  const licence = places.map((place) => path.join(prefix, place)).find((place) => fs.existsSync(place));
  if (!licence) throw new Error(`no licence of Node found in ${prefix}: ${places.join(', ')}`);
  copy(licence, path.join(out, 'node.LICENSE'));
}

/** Test files of the vitest project that runs on the emulated device. */
async function testFiles() {
  const { config } = await loadConfigFromFile({ command: 'build', mode: 'test' }, 'vitest.config.ts', root);
  const { include } = config.test.projects.find(({ test }) => test.name === 'simt').test;
  const matchers = include.map((pattern) => {
    const source = pattern
      .replaceAll(/[.+^$()|[\]\\]/g, '\\$&')
      .replaceAll(/\{([^}]*)\}/g, (_, list) => `(${list.replaceAll(',', '|')})`)
      .replaceAll('**/', '\0')
      .replaceAll('*', '[^/]*')
      .replaceAll('\0', '(.*/)?');
    return new RegExp(`^${source}$`);
  });
  const files = [...walk(path.join(root, 'test'))].map((file) => path.relative(root, file));
  return files.filter((file) => matchers.some((matcher) => matcher.test(file))).sort();
}

/** dist/ and the tests, compiled; the tests import dist/ where they imported lib/. */
async function compile() {
  log('compiling TypeScript');
  run(
    bin('tsc'),
    '-p',
    'tsconfig.build.json',
    '--outDir',
    path.join(files, 'dist'),
    '--declaration',
    'false',
    '--sourceMap',
    'false',
    '--inlineSources',
    'false',
  );
  const tests = await testFiles();
  const project = path.join(work, 'tsconfig.json');
  const compiled = path.join(work, 'compiled');
  const options = {
    noEmit: false,
    rootDir: root,
    outDir: compiled,
    noUnusedLocals: false,
    typeRoots: [path.join(root, 'node_modules/@types')],
  };
  fs.writeFileSync(
    project,
    JSON.stringify({
      extends: path.join(root, 'tsconfig.json'),
      compilerOptions: options,
      include: [],
      files: tests.map((file) => path.join(root, file)),
    }),
  );
  run(bin('tsc'), '-p', project);
  for (const file of walk(path.join(compiled, 'test'))) {
    const source = fs.readFileSync(file, 'utf8').replaceAll(/(from|import\()(\s*')((?:\.\.\/)+)lib\//g, '$1$2$3dist/');
    const target = path.join(files, path.relative(compiled, file));
    fs.mkdirSync(path.dirname(target), { recursive: true });
    fs.writeFileSync(target, source);
  }
  return tests.map((file) => file.replace(/\.ts$/, '.js'));
}

/** Packages that the compiled files import, and what those need. */
function packModules() {
  const wanted = new Set(['@vitest/expect', 'chai']);
  for (const folder of ['dist', 'test']) {
    for (const file of walk(path.join(files, folder))) {
      if (!file.endsWith('.js')) continue;
      const imports = /^(?:(?:import|export)\b[^'"\n;]*|\} )from ['"]([^'".][^'"]*)['"];$/gm;
      for (const [, name] of fs.readFileSync(file, 'utf8').matchAll(imports)) {
        if (!name.startsWith('node:'))
          wanted.add(
            name
              .split('/')
              .slice(0, name.startsWith('@') ? 2 : 1)
              .join('/'),
          );
      }
    }
  }
  wanted.delete('vitest');
  const queue = [...wanted];
  const packages = {};
  while (queue.length) {
    const name = queue.pop();
    const from = path.join(root, 'node_modules', name);
    if (name in packages) continue;
    const manifest = JSON.parse(fs.readFileSync(path.join(from, 'package.json'), 'utf8'));
    packages[name] = { version: manifest.version, license: manifest.license };
    // Types need no package at run time.
    const needs = Object.keys(manifest.dependencies ?? {}).filter((need) => !need.startsWith('@types/'));
    queue.push(...needs.filter((need) => fs.existsSync(path.join(root, 'node_modules', need))));
    copy(from, path.join(files, 'node_modules', name), (file) => !/\.(d\.[cm]?ts|map|md)$/.test(file));
  }
  copy(path.join(root, 'scripts/gpu/vitest'), path.join(files, 'node_modules/vitest'));
  return packages;
}

/** Files that name a folder of this machine. */
function findPaths() {
  return [...walk(files)].filter((file) => fs.readFileSync(file).includes(root));
}

for (const folder of [out, work]) fs.rmSync(folder, { recursive: true, force: true });
for (const folder of [out, files]) fs.mkdirSync(folder, { recursive: true });
buildNative();
packNative();
const node = packNode();
const tests = await compile();
const packages = packModules();
for (const name of [
  'package.json',
  'LICENSE',
  'test/golden',
  'benchmarks/gpu',
  'benchmarks/harness',
  'benchmarks/model/random.mjs',
]) {
  copy(path.join(root, name), path.join(files, name), (file) => !UNUSED.test(path.join(name, file)));
}
for (const name of ['tests.mjs', 'agree.mjs', 'finish.mjs']) {
  copy(path.join(root, 'scripts/gpu', name), path.join(files, 'scripts/gpu', name));
}
/** Bytes of the files that begin with the same `depth` names. */
function sizesOf(depth) {
  const sizes = {};
  for (const file of walk(files)) {
    const part = path.relative(files, file).split('/').slice(0, depth).join('/');
    sizes[part] = (sizes[part] ?? 0) + fs.statSync(file).size;
  }
  return sizes;
}
const sizes = sizesOf(1);
log('compressing the rest');
const archive = path.join(work, 'files.tar');
run('tar', '--sort=name', '--mtime=@0', '--owner=0', '--group=0', '--numeric-owner', '-cf', archive, '-C', files, '.');
await node;
copy(await compress(archive), path.join(out, 'files.tar.xz'));
copy(path.join(root, 'scripts/gpu/run.sh'), path.join(out, 'run.sh'));

const changed = read('git', 'status', '--porcelain', '--', 'lib', 'native', 'benchmarks', 'scripts', 'test') !== '';
const packed = Object.fromEntries([...walk(out)].map((file) => [path.relative(out, file), fs.statSync(file).size]));
const total = Object.values(packed).reduce((sum, size) => sum + size, 0);
const digest = (file) =>
  createHash('sha256')
    .update(fs.readFileSync(path.join(out, file)))
    .digest('hex');
const manifest = {
  format: 1,
  commit: read('git', 'rev-parse', 'HEAD') + (changed ? ' with changes' : ''),
  node: process.version,
  sizes: { packed, total, unpacked: sizes },
  sha256: Object.fromEntries(['node.xz', 'files.tar.xz'].map((file) => [file, digest(file)])),
  packages,
  tests,
};
fs.writeFileSync(path.join(out, 'manifest.json'), `${JSON.stringify(manifest, null, 1)}\n`);

const mebibytes = (bytes) => `${(bytes / 2 ** 20).toFixed(2)} MiB`.padStart(10);
const list = (entries) => {
  for (const [name, size] of Object.entries(entries).sort((a, b) => b[1] - a[1])) {
    if (size >= 2 ** 14) console.log(`${mebibytes(size)}  ${name}`);
  }
};
console.log('unpacked, beside Node:');
list(sizes);
console.log('packed:');
list(packed);
console.log(
  `${mebibytes(total)}  in all, at most ${mebibytes(LIMIT).trim()}; ${tests.length} test files; ${manifest.commit}`,
);
const problems = findPaths().map((file) => `${path.relative(files, file)} names a folder of this machine`);
if (total > LIMIT) {
  console.log('the largest parts:');
  list(
    Object.fromEntries(
      Object.entries(sizesOf(3))
        .sort((a, b) => b[1] - a[1])
        .slice(0, 20),
    ),
  );
  problems.push('the bundle is too large');
}
for (const problem of problems) console.error(`[pack] ${problem}`);
process.exitCode = problems.length ? 1 : 0;
fs.rmSync(work, { recursive: true });
log(`run it: bash ${path.relative(process.cwd(), path.join(out, 'run.sh'))} --help`);
