// What a directory says about how its encoder-decoder model writes texts, and what that allows as the next token.
import { Config } from '../../model/config.js';
import type { InvalidFileError } from '../../native/errors.js';

/** Whether beam search ends with as many texts as beams, or when no better one is to be hoped for by one of two rules. */
export type EarlyStopping = boolean | 'never';

/** Settings of generation as transformers names them in generation_config.json, or in a config.json without that beside it. */
export interface WritingSettings {
  /** What a target starts from. */
  readonly startId: number;
  /** Tokens that end a text. */
  readonly endIds: ReadonlySet<number>;
  /** The first token written, and the one that may come last of so many as are allowed; none where empty. */
  readonly firstIds: readonly number[];
  readonly lastIds: readonly number[];
  /** Tokens written at most; null: not said. */
  readonly maxTokens: number | null;
  /** Tokens of a target, its start included, before which it does not end. */
  readonly minLength: number;
  /** Sequences of so many tokens do not come twice; 0: they may. */
  readonly noRepeat: number;
  /** Sequences of tokens that are not written. */
  readonly banned: readonly (readonly number[])[];
  /** Log-probabilities are normalised again over the tokens that are allowed. */
  readonly renormalize: boolean;
  readonly beams: number;
  readonly lengthPenalty: number;
  readonly earlyStopping: EarlyStopping;
}

/** Settings that change what is written and are not supported, with the values that change nothing. */
const NEUTRAL: Readonly<Record<string, readonly unknown[]>> = {
  repetition_penalty: [1],
  encoder_repetition_penalty: [1],
  encoder_no_repeat_ngram_size: [0],
  diversity_penalty: [0],
  num_beam_groups: [1],
  guidance_scale: [1],
};
const ABSENT = ['sequence_bias', 'suppress_tokens', 'begin_suppress_tokens', 'exponential_decay_length_penalty'];

/**
 * @param json generation_config.json, or where there is none the model's own
 * @param model config.json, for the ids of tokens that the other has not
 * @throws InvalidFileError naming the file and the field, and what is supported.
 */
export function writingSettings(json: unknown, file: string, model: Config, vocab: number): WritingSettings {
  const config = Config.of(json, file);
  for (const [field, allowed] of Object.entries(NEUTRAL)) {
    if (config.has(field) && !allowed.includes(config.value(field))) {
      throw config.error(field, `must be ${allowed[0]}: others are not supported`, config.value(field));
    }
  }
  for (const field of ABSENT) {
    if (config.has(field)) throw config.error(field, 'must be absent: it is not supported', config.value(field));
  }
  const isId = (id: unknown) => Number.isInteger(id) && (id as number) >= 0 && (id as number) < vocab;
  const wrong = (from: Config, field: string): InvalidFileError =>
    from.error(field, `must be token ids below ${vocab}`, from.value(field));
  const ids = (from: Config, field: string): number[] => {
    const list = from.has(field) ? [from.value(field)].flat() : [];
    if (!list.every(isId)) throw wrong(from, field);
    return list as number[];
  };
  const either = (field: string): number[] => {
    const own = ids(config, field);
    return own.length > 0 ? own : ids(model, field);
  };
  const start = either('decoder_start_token_id')[0] ?? either('bos_token_id')[0];
  if (start === undefined) {
    throw config.error('decoder_start_token_id', 'must be the token that a target starts from', undefined);
  }
  const banned = config.has('bad_words_ids') ? config.value('bad_words_ids') : [];
  if (!Array.isArray(banned) || !banned.every((word) => Array.isArray(word) && word.length > 0 && word.every(isId))) {
    throw config.error('bad_words_ids', `must be lists of token ids below ${vocab}`, banned);
  }
  const endIds = new Set(either('eos_token_id'));
  const early = config.has('early_stopping') ? config.value('early_stopping') : false;
  if (typeof early !== 'boolean' && early !== 'never') {
    throw config.error('early_stopping', 'must be true, false or "never"', early);
  }
  const penalty = config.has('length_penalty') ? config.value('length_penalty') : 1;
  if (typeof penalty !== 'number' || !Number.isFinite(penalty)) {
    throw config.error('length_penalty', 'must be a number', penalty);
  }
  const longest = config.has('max_length') ? config.int('max_length', undefined, 2) - 1 : null;
  return {
    startId: start,
    endIds,
    firstIds: ids(config, 'forced_bos_token_id'),
    lastIds: ids(config, 'forced_eos_token_id'),
    maxTokens: config.has('max_new_tokens') ? config.int('max_new_tokens') : longest,
    minLength: config.int('min_length', 0, 0),
    noRepeat: config.int('no_repeat_ngram_size', 0, 0),
    banned: (banned as number[][]).filter((word) => !(word.length === 1 && endIds.has(word[0]))),
    renormalize: config.boolean('renormalize_logits', false),
    beams: config.int('num_beams', 1, 1, maxBeams),
    lengthPenalty: penalty,
    earlyStopping: early,
  };
}

export const maxBeams = 64;

/** Whether any token may come next in a target of so many tokens, its start included, of which `most` are written at most. */
export function isFree(settings: WritingSettings, length: number, most: number): boolean {
  const { firstIds, lastIds, minLength, noRepeat, banned } = settings;
  const forced = (length === 1 && firstIds.length > 0) || (length === most && lastIds.length > 0);
  return !forced && length >= minLength && noRepeat === 0 && banned.length === 0;
}

/**
 * Makes scores of tokens minus infinity that may not come next after `target`, its start included, as the processors of
 * transformers do in their order: repeated sequences, banned ones, ends before their time, and what is not forced.
 *
 * @param scores logits or log-probabilities, f32 [vocab]; changed
 */
export function restrict(
  { noRepeat, banned, minLength, endIds, firstIds, lastIds }: WritingSettings,
  scores: Float32Array,
  target: readonly number[],
  most: number,
): void {
  const forbid = (id: number) => {
    scores[id] = Number.NEGATIVE_INFINITY;
  };
  const endsWith = (begin: readonly number[]) =>
    begin.every((id, i) => target[target.length - begin.length + i] === id);
  for (let at = 0; noRepeat > 0 && at + noRepeat <= target.length; at++) {
    if (endsWith(target.slice(at, at + noRepeat - 1))) forbid(target[at + noRepeat - 1]);
  }
  for (const word of banned) {
    if (word.length <= target.length + 1 && endsWith(word.slice(0, -1))) forbid(word.at(-1)!);
  }
  if (target.length < minLength) for (const id of endIds) forbid(id);
  for (const [ids, place] of [
    [firstIds, 1],
    [lastIds, most],
  ] as const) {
    if (ids.length === 0 || target.length !== place) continue;
    scores.fill(Number.NEGATIVE_INFINITY);
    for (const id of ids) scores[id] = 0;
  }
}

/** Logits less the logarithm of the sum of their exponentials, f32. */
export function logSoftmax(logits: Float32Array): Float32Array {
  let largest = Number.NEGATIVE_INFINITY;
  for (const x of logits) if (x > largest) largest = x;
  let sum = 0;
  for (const x of logits) sum += Math.exp(x - largest);
  const shift = largest + Math.log(sum);
  return logits.map((x) => x - shift);
}
