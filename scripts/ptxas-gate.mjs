// Holds what ptxas says about the kernels of the release build (scripts/prebuild) against native/device/ptxas.json:
// registers, shared memory (the struct of SHARED_MEMORY, which is what launches give), tensor-core instructions. Fails on
// spills, stack frames, serialised wgmma (C75xx), warnings, and on any change of the table. Compiles what has changed since
// the last build for a release.
// node scripts/ptxas-gate.mjs [--update]
// With cuobjdump (on PATH or named by CUOBJDUMP) the machine code is searched for local memory and tensor instructions.
import { execFileSync, spawnSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { findNvcc } from './prebuild/nvcc.mjs';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..');
const build = join(root, 'build/prebuild/build');
const tablePath = join(root, 'native/device/ptxas.json');
const architectures = ['sm_80', 'sm_90a'];
const { values } = parseArgs({ options: { update: { type: 'boolean', default: false } } });

/** The kernel's name without what differs between builds: namespaces, the hash of a source's path, parameters. */
function readable(symbols) {
  const demangled = spawnSync('c++filt', { input: symbols.join('\n'), encoding: 'utf8' })
    .stdout.trim()
    .split('\n');
  return demangled.map((name) =>
    name
      .replaceAll(/_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}(_\d+)?::|\(anonymous namespace\)::/g, '')
      .replaceAll('elastiform::cuda::', '')
      .replace(/^void /, '')
      .replace(/\((?!\w+\)\d)(?:(?!>\().)*\)$/, ''),
  );
}

const problems = [];

/** The kernels of one source, from the report of its compilation: { sm_80: { kernel: { registers, shared, tensor } } }. */
function kernelsOf(source, object) {
  const { output, ptx } = JSON.parse(readFileSync(`${object}.ptxas.json`, 'utf8'));
  for (const line of output.split('\n')) {
    if (/\(C75\d\d\)|\bwarning\b/i.test(line)) problems.push(`${source}: ${line.trim()}`);
  }
  const kernels = Object.fromEntries(architectures.map((arch) => [arch, {}]));
  const blocks = output
    .split(/Compiling entry function '/)
    .slice(1)
    .map((text) => [text, ...text.match(/^(\w+)' for '(\w+)'/).slice(1)]);
  const names = readable(blocks.map(([, symbol]) => symbol));
  blocks.forEach(([text, symbol, arch], i) => {
    const [stack, stores, loads] = /(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads/
      .exec(text)
      .slice(1)
      .map(Number);
    if (stack || stores || loads) {
      problems.push(`${source} for ${arch}: ${names[i]} has a stack of ${stack} bytes and spills ${stores} + ${loads}`);
    }
    kernels[arch][names[i]] = {
      registers: Number(/Used (\d+) registers/.exec(text)[1]),
      shared: Number(/(\d+) bytes smem/.exec(text)?.[1] ?? 0) + ptx[arch][symbol].shared,
      tensor: ptx[arch][symbol].tensor,
    };
  });
  for (const arch of architectures) {
    const hasTensor = Object.values(kernels[arch]).some((kernel) => kernel.tensor > 0);
    if (hasCuobjdump) inspect(object, source, arch, hasTensor);
  }
  return kernels;
}

const cuobjdump = process.env.CUOBJDUMP ?? 'cuobjdump';
const hasCuobjdump = spawnSync(cuobjdump, ['--version']).status === 0;

/** Machine code: no local memory, and tensor instructions where PTX has them. */
function inspect(object, source, arch, hasTensor) {
  const flags = ['--dump-sass', '--gpu-architecture', arch, object];
  const code = execFileSync(cuobjdump, flags, { encoding: 'utf8', maxBuffer: 1 << 30 });
  const count = (pattern) => code.match(pattern)?.length ?? 0;
  const local = count(/\b(LDL|STL)\b/g);
  const tensor = count(/\bH(G)?MMA\b/g);
  if (local) problems.push(`${source} for ${arch}: ${local} accesses to local memory`);
  if (hasTensor && !tensor) problems.push(`${source} for ${arch}: no tensor-core instruction in the machine code`);
  console.log(`${source} for ${arch}: ${tensor} tensor-core instructions in machine code`);
}

function compare(wanted, measured, arch) {
  for (const source of new Set([...Object.keys(wanted), ...Object.keys(measured)])) {
    const [before, now] = [wanted[source] ?? {}, measured[source] ?? {}];
    for (const kernel of new Set([...Object.keys(before), ...Object.keys(now)])) {
      const [a, b] = [before[kernel], now[kernel]].map((entry) => (entry ? JSON.stringify(entry) : 'absent'));
      if (a !== b) problems.push(`${arch} ${kernel}: ${a} in the table, now ${b} (--update when that is meant)`);
    }
  }
}

if (!findNvcc()) {
  console.log('ptxas gate: skipped, no nvcc');
  process.exit(0);
}
const built = spawnSync(process.execPath, [join(root, 'scripts/prebuild/cmake-js-as-node-gyp.mjs')], {
  stdio: 'inherit',
});
if (built.status !== 0) process.exit(1);
const compiled = new Map();
for (const { file, command } of JSON.parse(readFileSync(join(build, 'compile_commands.json'), 'utf8'))) {
  if (file.endsWith('.cu')) compiled.set(relative(root, file), join(build, / -o (\S+)/.exec(command)[1]));
}
const listed = execFileSync('git', ['ls-files', '-co', '--exclude-standard', 'native/*.cu'], {
  cwd: root,
  encoding: 'utf8',
});
const measured = Object.fromEntries(architectures.map((arch) => [arch, {}]));
for (const source of listed.trim().split('\n')) {
  if (!compiled.has(source)) {
    problems.push(`${source} belongs to no target of CMakeLists.txt`);
    continue;
  }
  for (const [arch, kernels] of Object.entries(kernelsOf(source, compiled.get(source)))) {
    const sorted = Object.entries(kernels).sort(([a], [b]) => (a < b ? -1 : 1));
    if (sorted.length > 0) measured[arch][source] = Object.fromEntries(sorted);
  }
}
for (const arch of architectures) {
  const count = Object.values(measured[arch]).reduce((n, kernels) => n + Object.keys(kernels).length, 0);
  console.log(`${arch}: ${count} kernels`);
}
if (!hasCuobjdump) console.log('machine code not inspected: no cuobjdump');
if (values.update) {
  const numbers = /\{\s*("registers": \d+),\s*("shared": \d+),\s*("tensor": \d+)\s*\}/g; // a kernel to a line
  writeFileSync(tablePath, `${JSON.stringify(measured, null, 2).replaceAll(numbers, '{ $1, $2, $3 }')}\n`);
} else {
  const table = JSON.parse(readFileSync(tablePath, 'utf8'));
  for (const arch of architectures) compare(table[arch], measured[arch], arch);
}
for (const problem of problems) console.error(problem);
console.log(problems.length ? `ptxas gate: ${problems.length} problems` : 'ptxas gate: passed');
process.exit(problems.length ? 1 : 0);
