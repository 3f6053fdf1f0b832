// A slim encoder as a stock checkpoint of the same function, compared with what it was made of.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { copyCompanions } from '../../elastic/store.js';
import { writeCheckpoint } from '../../io/directory.js';
import { newDirectory, readJsonText } from '../../io/files.js';
import { Checkpoint } from '../../io/safetensors.js';
import { encoderSpecFromConfig, slimKey } from '../../model/encoder_spec.js';
import { encoderSlots, loadEncoderWeights } from '../../model/encoder_weights.js';
import { type FlatEncoder, slimOf, stockEncoder } from '../../model/slim.js';
import { exportSlots, flattened, planOf } from '../../model/weights.js';
import { InvalidArgumentError, InvalidDataError } from '../../native/errors.js';
import { largestDifference, probeLogits } from './compared.js';

/** Options of `exportSlim`. */
export interface ExportSlimOptions {
  /** New or empty directory for the checkpoint. */
  out: string;
  /** Load the result and compare its logits with the slim model's; default true. */
  verify?: boolean;
  /** Stops the work; nothing is left behind. */
  signal?: AbortSignal;
}

/** What `exportSlim` wrote. */
export interface ExportSlimResult {
  dir: string;
  /** Numbers of the stock checkpoint, and of the slim one. */
  parameters: number;
  slimParameters: number;
  /** Units of its feed-forwards: of the widest slim layer. */
  ffn: number;
  /** What the format cannot leave out and is there as zeros, over all layers. */
  padded: { heads: number; units: number };
  /** Largest difference between logits of the two; null when not compared. */
  largestDifference: number | null;
}

/** Embeddings that are multiplied out are rounded once; the largest logit may be off by so much of itself. */
const tolerance = 1e-3;

/** Whether a directory has a slim encoder. Errors: InvalidFileError when its config.json is no JSON. */
export async function isSlim(dir: string): Promise<boolean> {
  if (!existsSync(join(dir, 'config.json'))) return false;
  const { json } = await readJsonText(join(dir, 'config.json'));
  return typeof json === 'object' && json !== null && slimKey in json;
}

/**
 * Writes a slim encoder as a checkpoint that any runtime of its architecture loads, with the same function: feed-forwards keep as few
 * units as the widest layer has; heads of attention, whose number stock configurations tie to the width, and embeddings are whole
 * again, heads that are gone being zeros. Exits stay behind. `out` appears complete or not at all.
 *
 * @throws InvalidArgumentError when the model is not slim or `out` is in use, InvalidDataError when the result does not compute the same,
 * InvalidFileError for a bad checkpoint, FileSystemError from the disk.
 */
export async function exportSlim(
  model: string,
  { out, verify = true, signal }: ExportSlimOptions,
): Promise<ExportSlimResult> {
  if (!(await isSlim(model)))
    throw new InvalidArgumentError(`[exportSlim] ${model} has no slim encoder: its config.json has no '${slimKey}'`);
  const slim = await openFlat(model);
  const stock = stockEncoder(slim);
  const { spec } = slim;
  return await newDirectory('exportSlim', out, async (dir) => {
    await copyCompanions(model, dir);
    await writeCheckpoint(dir, stock.config, exportSlots(stock.spec, encoderSlots(stock.spec), stock.weights));
    const { heads, ffn } = slimOf(spec);
    const gone = (most: number, counts: readonly number[]) => counts.reduce((sum, count) => sum + most - count, 0);
    return {
      ...{ dir: out, parameters: stock.weights.length, slimParameters: slim.weights.length, ffn: stock.spec.ffn },
      padded: { heads: gone(spec.heads, heads), units: gone(stock.spec.ffn, ffn) },
      largestDifference: verify ? await compare(model, dir, signal) : null,
    };
  });
}

async function openFlat(dir: string): Promise<FlatEncoder> {
  const path = join(dir, 'config.json');
  const { text: config, json } = await readJsonText(path);
  const spec = encoderSpecFromConfig(json, path);
  using checkpoint = Checkpoint.open(dir);
  using loaded = loadEncoderWeights(spec, checkpoint);
  return { spec, config, weights: flattened(planOf(encoderSlots(spec)), loaded.byName) };
}

async function compare(model: string, written: string, signal?: AbortSignal): Promise<number> {
  const before = await probeLogits(model, { signal });
  const largest = largestDifference(before, await probeLogits(written, { signal }));
  const most = tolerance * before.reduce((size, value) => Math.max(size, Math.abs(value)), 0);
  if (largest <= most) return largest;
  throw new InvalidDataError(
    `[exportSlim] logits of the stock checkpoint differ from the slim model's by ${largest}, more than ${most}: nothing was written`,
  );
}
