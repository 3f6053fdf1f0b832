// What the config.json of a directory describes: a decoder or an encoder.
import { join } from 'node:path';
import { readJson } from '../io/files.js';
import { encoderSpecFromConfig } from './encoder_spec.js';
import { readSentenceSettings } from './sentence_transformers.js';
import { isEncoderConfig, type ModelSpec, specFromConfig } from './spec.js';

/**
 * Reads a directory's config.json and, of encoders, modules.json.
 *
 * @throws InvalidFileError naming the file and the field.
 */
export async function readSpec(dir: string): Promise<ModelSpec> {
  const path = join(dir, 'config.json');
  const json = await readJson(path);
  if (!isEncoderConfig(json)) return specFromConfig(json, path);
  return encoderSpecFromConfig(json, path, (await readSentenceSettings(dir)) ? { task: 'feature-extraction' } : {});
}
