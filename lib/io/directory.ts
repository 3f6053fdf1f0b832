// A Hugging Face directory as training writes it: configuration, weights, tokenizer.
import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { editJson, writeFileAtomic } from './files.js';
import { rounded } from './rounding.js';
import { type TensorData, writeSafetensors } from './safetensors.js';
import { loadTokenizer, type Tokenizer } from './tokenizer.js';

/**
 * Writes model.safetensors and config.json.
 *
 * @param config text of the configuration; only its element type is set
 * @param tensors as f32, by their names in the file
 */
export async function writeCheckpoint(
  out: string,
  config: string,
  tensors: Record<string, TensorData>,
  saveAs: 'f32' | 'bf16' = 'f32',
): Promise<void> {
  const stored = Object.fromEntries(
    Object.entries(tensors).map(([name, { shape, data }]): [string, TensorData] => [
      name,
      { dtype: saveAs, shape, data: rounded(data as Float32Array, saveAs) },
    ]),
  );
  await writeSafetensors(join(out, 'model.safetensors'), stored, { format: 'pt' });
  const dtype = saveAs === 'f32' ? 'float32' : 'bfloat16';
  // transformers 5 renamed the field.
  const text = editJson(config, (json) => ({ ...json, ['dtype' in json ? 'dtype' : 'torch_dtype']: dtype }));
  await writeFileAtomic(join(out, 'config.json'), `${text}\n`);
}

/** Copies a directory's tokenizer, which is loaded first: damaged files are not copied. */
export async function copyTokenizer(from: string, out: string): Promise<Tokenizer> {
  const tokenizer = await loadTokenizer(from);
  for (const name of ['tokenizer.json', 'tokenizer_config.json']) {
    if (existsSync(join(from, name))) await writeFileAtomic(join(out, name), await readFile(join(from, name)));
  }
  return tokenizer;
}
