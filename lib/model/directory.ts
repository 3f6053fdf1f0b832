// What the config.json of a directory describes: a decoder, an encoder, or both in one.
import { join } from 'node:path';
import { readJson } from '../io/files.js';
import { encoderSpecFromConfig } from './encoder_spec.js';
import { readSentenceSettings } from './sentence_transformers.js';
import { type Seq2SeqSpec, seq2seqSpecFromConfig } from './seq2seq_spec.js';
import { seq2seqModules } from './seq2seq_weights.js';
import { isEncoderConfig, isSeq2SeqConfig, type ModelSpec, specFromConfig } from './spec.js';
import { type StoredModule, storedModules } from './weights.js';

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

/** A model that is one stack, or of an encoder-decoder model the decoder and the whole. */
export interface Architecture {
  readonly spec: ModelSpec;
  readonly seq2seq: Seq2SeqSpec | null;
}

/** The linear modules of all projections of a model, by their ids in an adapter. */
export const modulesOf = ({ spec, seq2seq }: Architecture): Map<string, StoredModule> =>
  seq2seq ? seq2seqModules(seq2seq) : storedModules(spec);

/**
 * The same of encoder-decoder models, too.
 *
 * @throws InvalidFileError naming the file and the field.
 */
export async function readArchitecture(dir: string): Promise<Architecture> {
  const path = join(dir, 'config.json');
  const json = await readJson(path);
  if (!isSeq2SeqConfig(json)) return { spec: await readSpec(dir), seq2seq: null };
  const seq2seq = seq2seqSpecFromConfig(json, path);
  return { spec: seq2seq.decoder, seq2seq };
}
