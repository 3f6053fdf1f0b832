// The machine's multiply-add peak, measured by the project's native bench program.
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const root = path.join(path.dirname(fileURLToPath(import.meta.url)), '..', '..');

function run(program, args, options = {}) {
  const { status, stdout, stderr, error } = spawnSync(program, args, { encoding: 'utf8', ...options });
  if (status !== 0) throw new Error(`${program} ${args.join(' ')}: ${error?.message ?? stderr.slice(-2000)}`);
  return stdout;
}

/** Builds elastiform_gemm_bench in the cache folder (once; cmake sees what changed) and returns its path. */
export function buildPeak(cache) {
  const dir = path.join(cache, 'native');
  fs.mkdirSync(dir, { recursive: true });
  run('cmake', ['-S', root, '-B', dir, '-DCMAKE_BUILD_TYPE=Release', '-DELASTIFORM_BENCH=ON']);
  run('cmake', ['--build', dir, '--config', 'Release', '--target', 'elastiform_gemm_bench', '--parallel', '2']);
  const names = ['elastiform_gemm_bench', 'Release/elastiform_gemm_bench.exe', 'elastiform_gemm_bench.exe'];
  return names.map((name) => path.join(dir, name)).find((file) => fs.existsSync(file));
}

/** GFLOP/s of all threads in register-only multiply-adds, the best of its batches. */
export function measurePeak(program) {
  const lines = [...run(program, ['peak']).matchAll(/(\d+) thread\(s\): FMA peak ([\d.]+) GFLOP/g)];
  if (lines.length === 0) throw new Error('elastiform_gemm_bench printed no FMA peak');
  const [, threads, rate] = lines.at(-1);
  return { threads: Number(threads), gflops: Number(rate) };
}
