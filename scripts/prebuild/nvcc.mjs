// Finds nvcc as CMakeLists.txt does: named by CUDACXX, on PATH, in CUDA_HOME, CUDA_PATH or /usr/local/cuda.
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';

/** The command that starts nvcc, or null. */
export function findNvcc() {
  const { CUDACXX, CUDA_HOME, CUDA_PATH } = process.env;
  const homes = [CUDA_HOME, CUDA_PATH, '/usr/local/cuda'].filter(Boolean).map((home) => join(home, 'bin/nvcc'));
  const candidates = [CUDACXX, 'nvcc', ...homes].filter(Boolean);
  return candidates.find((command) => spawnSync(command, ['--version']).status === 0) ?? null;
}
