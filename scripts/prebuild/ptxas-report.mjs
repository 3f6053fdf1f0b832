// Runs nvcc for CMake (CMAKE_CUDA_COMPILER_LAUNCHER) and writes beside the object, as OBJECT.ptxas.json, what only the
// compilation shows of its kernels: { output, ptx: { sm_80: { symbol: { tensor: instructions in its PTX, shared: bytes of
// the struct of its SHARED_MEMORY } } } }.
import { spawnSync } from 'node:child_process';
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const [compiler, ...args] = process.argv.slice(2);
const object = args[args.indexOf('-o') + 1];
const keep = `${object}.keep`;
rmSync(keep, { recursive: true, force: true });
mkdirSync(keep);
const flags = ['-Xptxas', '-v', '--keep', '--keep-dir', keep];
const { status, stderr, error } = spawnSync(compiler, [...args, ...flags], {
  encoding: 'utf8',
  maxBuffer: 1 << 28,
  stdio: ['ignore', 'inherit', 'pipe'],
});
if (error) throw error;
// What -v adds: lines of ptxas, and below them those of a function.
const shown = stderr.split('\n').filter((line) => !/^ptxas info {4}: (?!\(C)|^ {4}\d+ bytes stack frame/.test(line));
process.stderr.write(shown.join('\n'));

/** What the PTX of every kernel says of it. */
function readPtx(ptx) {
  const kernels = {};
  for (const part of ptx.split(/^\.visible \.entry |^\.entry |^\t\.entry /m).slice(1)) {
    kernels[part.slice(0, part.indexOf('(')).trim()] = {
      tensor: part.match(/\b(mma\.sync|wgmma\.mma_async)\./g)?.length ?? 0,
      shared: Number(/\/\/ SHARED_MEMORY (\d+)/.exec(part)?.[1] ?? 0),
    };
  }
  return kernels;
}

if (status === 0) {
  const ptx = {};
  for (const file of readdirSync(keep)) {
    const arch = /\.compute_(\w+)\.ptx$/.exec(file)?.[1];
    if (arch) ptx[`sm_${arch}`] = readPtx(readFileSync(join(keep, file), 'utf8'));
  }
  writeFileSync(`${object}.ptxas.json`, JSON.stringify({ output: stderr, ptx }));
}
rmSync(keep, { recursive: true });
process.exit(status ?? 1);
