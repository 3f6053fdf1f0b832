// Makes the benchmark model once, in every format, in the cache folder.
import crypto from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { writeGguf } from './gguf.mjs';
import { writeOnnx } from './onnx.mjs';
import { writeCheckpoint } from './safetensors.mjs';

const here = path.dirname(fileURLToPath(import.meta.url));
export const CACHE = path.join(here, '..', '.cache');

/** Returns the model's directory, generating what is missing or was made by other generator code. */
export function prepareModel(log = () => {}) {
  const dir = path.join(CACHE, 'gpt2-small-random');
  const sources = ['shape.mjs', 'random.mjs', 'safetensors.mjs', 'protobuf.mjs', 'onnx.mjs', 'gguf.mjs'];
  const code = crypto.createHash('sha256');
  for (const name of sources) code.update(fs.readFileSync(path.join(here, name)));
  const stamp = code.digest('hex');
  const marker = path.join(dir, 'generated-by');
  if (fs.existsSync(marker) && fs.readFileSync(marker, 'utf8') === stamp) return dir;
  log('generating the benchmark model (1 GB in benchmarks/.cache)');
  fs.rmSync(dir, { recursive: true, force: true });
  writeCheckpoint(dir);
  writeOnnx(dir);
  writeGguf(dir);
  fs.writeFileSync(marker, stamp);
  return dir;
}
