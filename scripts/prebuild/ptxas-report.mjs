// Runs nvcc for CMake (CMAKE_CUDA_COMPILER_LAUNCHER) and writes beside the object, as OBJECT.ptxas.json, what only the
// compilation shows of its kernels: { output, tensor: { sm_80: { symbol: tensor instructions in its PTX } } }.
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

/** Tensor-core instructions of every kernel in PTX. */
function tensorInstructions(ptx) {
  const counts = {};
  for (const part of ptx.split(/^\.visible \.entry |^\.entry |^\t\.entry /m).slice(1)) {
    counts[part.slice(0, part.indexOf('(')).trim()] = part.match(/\b(mma\.sync|wgmma\.mma_async)\./g)?.length ?? 0;
  }
  return counts;
}

if (status === 0) {
  const tensor = {};
  for (const file of readdirSync(keep)) {
    const arch = /\.compute_(\w+)\.ptx$/.exec(file)?.[1];
    if (arch) tensor[`sm_${arch}`] = tensorInstructions(readFileSync(join(keep, file), 'utf8'));
  }
  writeFileSync(`${object}.ptxas.json`, JSON.stringify({ output: stderr, tensor }));
}
rmSync(keep, { recursive: true });
process.exit(status ?? 1);
