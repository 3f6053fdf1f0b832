// Merging: an adapter's corrections are added to the weights, giving an ordinary checkpoint that runs anywhere.
import { join } from 'node:path';
import { loraModules, loraOfModules, mergedLora } from '../../elastic/lora.js';
import { adapterDirectory, copyCompanions, readElastic } from '../../elastic/store.js';
import { newDirectory, readJson } from '../../io/files.js';
import { readPeft } from '../../io/peft.js';
import { Checkpoint } from '../../io/safetensors.js';
import { copyCheckpoint } from '../../io/slices.js';
import { specFromConfig } from '../../model/spec.js';
import { loadWeights } from '../../model/weights.js';
import { InvalidArgumentError } from '../../native/errors.js';
import { largestDifference, probeLogits } from './compared.js';

/** Options of `mergeAdapter`. */
export interface MergeOptions {
  /** A PEFT directory; default: the corrections that the elastic directory was trained with. */
  adapter?: string;
  /** New or empty directory for the checkpoint. */
  out: string;
  signal?: AbortSignal;
}

/** What `mergeAdapter` wrote. */
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
 *
 * @throws InvalidArgumentError when there is no adapter or `out` is in use; InvalidDataError when the adapter does not
 * fit the model.
 */
export async function mergeAdapter(model: string, { adapter, out, signal }: MergeOptions): Promise<MergeResult> {
  const configPath = join(model, 'config.json');
  const spec = specFromConfig(await readJson(configPath), configPath);
  const lora =
    adapter === undefined ? (await readElastic(model))?.lora : loraOfModules(spec, await readPeft(adapter), adapter);
  if (!lora) {
    throw new InvalidArgumentError(`[merge] ${model} has no adapter of its own; name one to merge`);
  }
  using checkpoint = Checkpoint.open(model);
  // Every weight is there with its shape.
  loadWeights(spec, checkpoint).dispose();
  return await newDirectory('merge', out, async (dir) => {
    const edit = mergedLora(spec, lora);
    await copyCheckpoint(model, dir, (name) => ({ edit: edit(name) }), { signal });
    await copyCompanions(model, dir);
    const options = { dtype: 'f32', signal } as const;
    const apart = await probeLogits(model, { ...options, adapter: adapter ?? join(model, adapterDirectory) });
    const one = await probeLogits(dir, options);
    return { dir: out, modules: loraModules(spec, lora).size, largestDifference: largestDifference(apart, one) };
  });
}
