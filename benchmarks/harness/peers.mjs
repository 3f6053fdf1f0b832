// Which peers are here, and how to get those that are not.
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const root = path.join(path.dirname(fileURLToPath(import.meta.url)), '..');

const npmPeer = (name) => fs.existsSync(path.join(root, 'node_modules', name, 'package.json'));

function findPython() {
  const program = process.env.ELASTIFORM_BENCH_PYTHON || 'python3';
  return spawnSync(program, ['-c', 'import torch'], { stdio: 'ignore' }).status === 0 ? program : null;
}

/** Peers by name: how to start one (`file`, `options` of Child), or null and the way to install it. */
export function findPeers() {
  const python = findPython();
  // Keeping freed memory spares torch's eager mode page faults on every large temporary.
  const keep = { MALLOC_MMAP_THRESHOLD_: '1073741824', MALLOC_TRIM_THRESHOLD_: '8589934592' };
  const npmInstall = 'npm install --prefix benchmarks';
  return {
    'onnxruntime-node': npmPeer('onnxruntime-node')
      ? { file: 'onnxruntime.mjs', options: {} }
      : { missing: npmInstall },
    'node-llama-cpp': npmPeer('node-llama-cpp') ? { file: 'llama.mjs', options: {} } : { missing: npmInstall },
    torch: python
      ? { file: 'torch_worker.py', options: { program: python, env: keep }, plainOptions: { program: python } }
      : { missing: 'install PyTorch in a Python and name it: ELASTIFORM_BENCH_PYTHON=/path/to/python' },
  };
}
