// Merging: an adapter's corrections are added to the weights, giving an ordinary checkpoint that runs anywhere.
import { randomBytes } from 'node:crypto';
import { existsSync, readdirSync } from 'node:fs';
import { copyFile, mkdir, rename, rm, rmdir } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { loraModules, loraOfModules } from '../elastic/lora.js';
import { adapterDirectory, baseFiles, readElastic } from '../elastic/store.js';
import { FileSystemError, inFileSystem, readJson } from '../io/files.js';
import { type LoraMatrices, readPeft } from '../io/peft.js';
import { toBf16, toF16 } from '../io/rounding.js';
import { Checkpoint, type TensorData, writeSafetensors } from '../io/safetensors.js';
import { type ModelSpec, specFromConfig } from '../model/spec.js';
import { isBuffer, loadWeights, moduleOf } from '../model/weights.js';
import type { TypedArray } from '../native/addon.js';
import { InvalidArgumentError, InvalidDataError } from '../native/errors.js';
import type { DType } from '../native/index.js';
import { loadModel } from './model.js';

export interface MergeOptions {
  /** A PEFT directory; default: the corrections that the elastic directory was trained with. */
  adapter?: string;
  /** New or empty directory for the checkpoint. */
  out: string;
  signal?: AbortSignal;
}

export interface MergeResult {
  dir: string;
  /** Modules whose weights changed. */
  modules: number;
  /** Largest difference between the logits of the merged checkpoint and those of weights and corrections apart. */
  largestDifference: number;
}

/**
 * Writes a stock Hugging Face checkpoint of a model with an adapter merged in, in the element types of the model, and
 * loads it again to compare logits. `out` appears complete or not at all.
 * Errors: InvalidArgumentError when there is no adapter or `out` is in use; InvalidDataError when the adapter does not
 * fit the model.
 */
export async function mergeAdapter(model: string, { adapter, out, signal }: MergeOptions): Promise<MergeResult> {
  if (existsSync(out) && readdirSync(out).length > 0) {
    throw new InvalidArgumentError(`[merge] out must be a new or empty directory, got ${out}`);
  }
  const configPath = join(model, 'config.json');
  const spec = specFromConfig(await readJson(configPath), configPath);
  const lora =
    adapter === undefined ? (await readElastic(model))?.lora : loraOfModules(spec, await readPeft(adapter), adapter);
  if (!lora) {
    throw new InvalidArgumentError(`[merge] ${model} has no adapter of its own; name one to merge`);
  }
  await inFileSystem('create', dirname(resolve(out)), () => mkdir(dirname(resolve(out)), { recursive: true }));
  const temporary = `${resolve(out)}.partial-${randomBytes(4).toString('hex')}`;
  try {
    await inFileSystem('create', temporary, () => mkdir(temporary));
    const modules = loraModules(spec, lora);
    await writeMerged(model, temporary, spec, modules, signal);
    const largestDifference = await compare(model, adapter ?? join(model, adapterDirectory), temporary, signal);
    if (existsSync(out)) await rmdir(out);
    await rename(temporary, out);
    return { dir: out, modules: modules.size, largestDifference };
  } catch (error) {
    if ((error as NodeJS.ErrnoException).syscall === 'rename') {
      throw new FileSystemError(`[merge] cannot write ${out}: ${(error as Error).message}`, error);
    }
    throw error;
  } finally {
    await rm(temporary, { recursive: true, force: true });
  }
}

async function writeMerged(
  model: string,
  out: string,
  spec: ModelSpec,
  modules: ReadonlyMap<string, LoraMatrices>,
  signal?: AbortSignal,
): Promise<void> {
  using checkpoint = Checkpoint.open(model);
  // Every weight is there with its shape.
  loadWeights(spec, checkpoint).dispose();
  const left = new Set(modules.keys());
  const shards = new Map<string, string[]>();
  for (const name of checkpoint.names()) {
    if (isBuffer(name)) continue;
    const file = basename(checkpoint.info(name).file);
    shards.set(file, [...(shards.get(file) ?? []), name]);
  }
  for (const [file, names] of shards) {
    const tensors: Record<string, TensorData> = {};
    for (const name of names) {
      signal?.throwIfAborted();
      const tensor = checkpoint.tensor(name);
      const { dtype, shape } = tensor;
      const module = moduleOf(spec, name);
      const correction = modules.get(module);
      if (!correction) {
        tensors[name] = { dtype, shape, data: tensor.read() };
        continue;
      }
      left.delete(module);
      const merged = added(tensor.readFloat(), correction, spec.family === 'gpt2');
      if (!merged.every(Number.isFinite)) {
        throw new InvalidDataError(`[merge] ${name} with its correction is not finite`);
      }
      tensors[name] = { dtype, shape, data: rounded(merged, dtype) };
      // Other work may run between matrices.
      await new Promise((resolve) => setImmediate(resolve));
    }
    await writeSafetensors(join(out, file), tensors, { format: 'pt' });
  }
  if (left.size > 0) throw new InvalidDataError(`[merge] ${model} has no weights for ${[...left].join(', ')}`);
  for (const name of baseFiles(model)) {
    if (name.endsWith('.safetensors')) continue;
    await inFileSystem('copy', join(model, name), () => copyFile(join(model, name), join(out, name)));
  }
}

/** w + b a, as stored: [outputs, inputs], or transposed. */
function added(w: Float32Array, { rank, a, b }: LoraMatrices, transposed: boolean): Float32Array {
  const [inputs, outputs] = [a.length / rank, b.length / rank];
  for (let o = 0; o < outputs; o++) {
    for (let i = 0; i < inputs; i++) {
      const at = transposed ? i * outputs + o : o * inputs + i;
      let sum = w[at];
      for (let r = 0; r < rank; r++) sum += b[o * rank + r] * a[r * inputs + i];
      w[at] = sum;
    }
  }
  return w;
}

function rounded(values: Float32Array, dtype: DType): TypedArray {
  if (dtype === 'f32') return values;
  return dtype === 'bf16' ? toBf16(values) : toF16(values);
}

// Logits of one sequence of ids by both, in f32.
async function compare(model: string, adapter: string, merged: string, signal?: AbortSignal): Promise<number> {
  const logits = async (dir: string, adapter?: string): Promise<Float32Array> => {
    await using loaded = await loadModel(dir, { adapter, dtype: 'f32', device: 'cpu', signal });
    const { vocab, maxContext } = loaded.info;
    const ids = Array.from({ length: Math.min(32, maxContext) }, (_, i) => (i * 7919 + 1) % vocab);
    return await loaded.logits(ids, { signal });
  };
  const [apart, one] = [await logits(model, adapter), await logits(merged)];
  return apart.reduce((most, value, i) => Math.max(most, Math.abs(value - one[i])), 0);
}
