// How a directory in the layout of sentence-transformers makes one vector of a text.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { readJson } from '../io/files.js';
import { InvalidFileError } from '../native/errors.js';
import { Config } from './config.js';
import type { Pooling } from './encoder.js';

export interface SentenceSettings {
  readonly pooling: Pooling;
  /** Vectors have the length 1. */
  readonly normalize: boolean;
  /** Of a text, special tokens included; null: the model's positions. */
  readonly maxTokens: number | null;
}

const FLAGS: Readonly<Record<string, Pooling>> = {
  pooling_mode_mean_tokens: 'mean',
  pooling_mode_cls_token: 'cls',
  pooling_mode_lasttoken: 'last',
};
const MODES: Readonly<Record<string, Pooling>> = { mean: 'mean', cls: 'cls', lasttoken: 'last' };

/**
 * Reads modules.json and what it names; null without it. Prompts are the caller's.
 *
 * @throws InvalidFileError naming the file, and what is supported: a transformer in the directory itself, pooling, normalisation.
 */
export async function readSentenceSettings(dir: string): Promise<SentenceSettings | null> {
  const path = join(dir, 'modules.json');
  if (!existsSync(path)) return null;
  const list = await readJson(path);
  if (!Array.isArray(list)) throw new InvalidFileError(`[config] ${path} is not a list of modules`);
  let pooling: Pooling | null = null;
  let normalize = false;
  for (const [i, entry] of list.entries()) {
    const config = Config.of(entry, `${path} [${i}]`);
    const type = config.value('type');
    const kind = typeof type === 'string' ? type.split('.').at(-1) : '';
    const at = config.has('path') ? config.value('path') : '';
    if (kind === 'Transformer' && i === 0) config.mustBe('path', '');
    else if (kind === 'Pooling' && i === 1) pooling = await readPooling(dir, at, config);
    else if (kind === 'Normalize' && i === 2) normalize = true;
    else throw config.error('type', 'must be Transformer, Pooling and Normalize, in this order', type);
  }
  if (!pooling) throw new InvalidFileError(`[config] ${path} has no Pooling`);
  const settings = join(dir, 'sentence_bert_config.json');
  if (!existsSync(settings)) return { pooling, normalize, maxTokens: null };
  const sentence = Config.of(await readJson(settings), settings);
  sentence.mustBe('do_lower_case', false);
  return { pooling, normalize, maxTokens: sentence.has('max_seq_length') ? sentence.int('max_seq_length') : null };
}

async function readPooling(dir: string, at: unknown, module: Config): Promise<Pooling> {
  if (typeof at !== 'string' || !/^\w+$/.test(at))
    throw module.error('path', 'must name a folder in the directory', at);
  const path = join(dir, at, 'config.json');
  const config = Config.of(await readJson(path), path);
  if (config.has('pooling_mode')) return MODES[config.choice('pooling_mode', Object.keys(MODES))];
  const on = config.names().filter((name) => name.startsWith('pooling_mode_') && config.boolean(name, false));
  if (on.length === 1 && Object.hasOwn(FLAGS, on[0])) return FLAGS[on[0]];
  throw new InvalidFileError(
    `[config] ${path} must pool in one way of ${Object.keys(FLAGS).join(', ')}, got ${on.join(', ').slice(0, 100) || 'none'}`,
  );
}
