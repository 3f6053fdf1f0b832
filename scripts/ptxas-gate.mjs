// Compiles every CUDA source and holds what ptxas says about its kernels against native/device/ptxas.json: registers,
// static shared memory, tensor-core instructions. Fails on spills, stack frames, serialised wgmma (C75xx), warnings, and
// on any change of the table. node scripts/ptxas-gate.mjs [--arch 80,90a] [--update]
// With cuobjdump (on PATH or named by CUOBJDUMP) the machine code is searched for local memory and tensor instructions.
import { execFile, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { basename, dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs, promisify } from 'node:util';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..');
const tablePath = join(root, 'native/device/ptxas.json');
const { values } = parseArgs({
  options: { arch: { type: 'string', default: '80,90a' }, update: { type: 'boolean', default: false } },
});
const architectures = values.arch.split(',');

async function run(command, args) {
  try {
    const { stdout, stderr } = await promisify(execFile)(command, args, { cwd: root, maxBuffer: 1 << 28 });
    return { ok: true, text: stdout + stderr };
  } catch (error) {
    return { ok: false, text: `${error.stdout ?? ''}${error.stderr ?? error.message}` };
  }
}

async function nvcc() {
  const homes = [process.env.CUDA_HOME, process.env.CUDA_PATH, '/usr/local/cuda'].filter(Boolean);
  const candidates = [process.env.CUDACXX, 'nvcc', ...homes.map((home) => join(home, 'bin/nvcc'))].filter(Boolean);
  for (const candidate of candidates) {
    if ((await run(candidate, ['--version'])).ok) return candidate;
  }
  return null;
}

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

/** Tensor-core instructions of every kernel in PTX. */
function tensorInstructions(ptx) {
  const counts = {};
  for (const part of ptx.split(/^\.visible \.entry |^\.entry |^\t\.entry /m).slice(1)) {
    counts[part.slice(0, part.indexOf('(')).trim()] = part.match(/\b(mma\.sync|wgmma\.mma_async)\./g)?.length ?? 0;
  }
  return counts;
}

const problems = [];

/** Compiles one source for one architecture; returns { kernel: { registers, shared, tensor } }. */
async function measure(compiler, source, arch) {
  const where = `${source} for sm_${arch}`;
  const folder = join(root, 'build/ptxas', arch);
  mkdirSync(folder, { recursive: true });
  const object = join(folder, `${basename(source)}.o`);
  const keep = join(folder, basename(source));
  rmSync(keep, { recursive: true, force: true });
  mkdirSync(keep);
  const compiled = await run(compiler, [
    ...['-std=c++20', '-O3', '-fmad=false', '-Xcompiler', '-Wall,-Wextra', '-Xptxas', '-v', '-I', 'native'],
    ...['-gencode', `arch=compute_${arch},code=sm_${arch}`, '--keep', '--keep-dir', keep],
    ...[arch === architectures[0] ? '-c' : '-cubin', source, '-o', object], // host code is compiled once
  ]);
  if (!compiled.ok) {
    problems.push(`${where} does not compile:\n${compiled.text}`);
    return {};
  }
  for (const line of compiled.text.split('\n')) {
    if (/\(C75\d\d\)|\bwarning\b/i.test(line)) problems.push(`${where}: ${line.trim()}`);
  }
  const tensor = tensorInstructions(readFileSync(join(keep, `${basename(source, '.cu')}.ptx`), 'utf8'));
  const kernels = {};
  const blocks = compiled.text.split(/Compiling entry function '/).slice(1);
  const symbols = blocks.map((block) => block.slice(0, block.indexOf("'")));
  const names = readable(symbols);
  blocks.forEach((block, i) => {
    const [, stack, stores, loads] = /(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads/.exec(
      block,
    );
    if (Number(stack) || Number(stores) || Number(loads)) {
      problems.push(`${where}: ${names[i]} has a stack of ${stack} bytes and spills ${stores} + ${loads}`);
    }
    kernels[names[i]] = {
      registers: Number(/Used (\d+) registers/.exec(block)[1]),
      shared: Number(/(\d+) bytes smem/.exec(block)?.[1] ?? 0),
      tensor: tensor[symbols[i]] ?? 0,
    };
  });
  await inspect(
    object,
    where,
    Object.values(kernels).some((kernel) => kernel.tensor > 0),
  );
  return Object.fromEntries(Object.entries(kernels).sort(([a], [b]) => (a < b ? -1 : 1)));
}

const cuobjdump = process.env.CUOBJDUMP ?? 'cuobjdump';
const hasCuobjdump = (await run(cuobjdump, ['--version'])).ok;

/** Machine code: no local memory, and tensor instructions where PTX has them. */
async function inspect(object, where, hasTensor) {
  if (!hasCuobjdump) return;
  const code = (await run(cuobjdump, ['--dump-sass', object])).text;
  const count = (pattern) => code.match(pattern)?.length ?? 0;
  const local = count(/\b(LDL|STL)\b/g);
  const tensor = count(/\bH(G)?MMA\b/g);
  if (local) problems.push(`${where}: ${local} accesses to local memory`);
  if (hasTensor && !tensor) problems.push(`${where}: no tensor-core instruction in the machine code`);
  console.log(`${where}: ${tensor} tensor-core instructions in machine code`);
}

const compiler = await nvcc();
if (!compiler) {
  console.log('ptxas gate: skipped, no nvcc');
  process.exit(0);
}
const listed = await run('git', ['ls-files', '-co', '--exclude-standard', 'native/*.cu']);
const sources = listed.text.trim().split('\n');
const table = existsSync(tablePath) ? JSON.parse(readFileSync(tablePath, 'utf8')) : {};
const jobs = architectures.flatMap((arch) => sources.map((source) => ({ arch, source, kernels: {} })));
const waiting = [...jobs];
await Promise.all(
  Array.from({ length: availableParallelism() }, async () => {
    for (let job = waiting.shift(); job; job = waiting.shift()) {
      job.kernels = await measure(compiler, job.source, job.arch);
    }
  }),
);
for (const arch of architectures) {
  const own = jobs.filter((job) => job.arch === arch && Object.keys(job.kernels).length > 0);
  const measured = Object.fromEntries(own.map(({ source, kernels }) => [source, kernels]));
  if (!values.update) compare(table[`sm_${arch}`] ?? {}, measured, `sm_${arch}`);
  table[`sm_${arch}`] = measured;
  console.log(
    `sm_${arch}: ${Object.values(measured).reduce((n, kernels) => n + Object.keys(kernels).length, 0)} kernels`,
  );
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

if (!hasCuobjdump) console.log('machine code not inspected: no cuobjdump');
if (values.update) {
  const numbers = /\{\s*("registers": \d+),\s*("shared": \d+),\s*("tensor": \d+)\s*\}/g; // a kernel to a line
  writeFileSync(tablePath, `${JSON.stringify(table, null, 2).replaceAll(numbers, '{ $1, $2, $3 }')}\n`);
}
for (const problem of problems) console.error(problem);
console.log(problems.length ? `ptxas gate: ${problems.length} problems` : 'ptxas gate: passed');
process.exit(problems.length ? 1 : 0);
