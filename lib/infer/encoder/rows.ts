// Texts of an encoder's calls as rows of token ids, packed end to end.
import type { EncodedInput } from '../../io/tokenizer.js';
import { InvalidArgumentError } from '../../native/errors.js';
import type { TextInput } from '../types.js';
import type { EncoderNetwork } from './network.js';

/** A text of a call or a window of one, and where it stands in it. */
export interface Row extends EncodedInput {
  readonly index: number;
  /** Windows of the text. */
  readonly windows: number;
  /** Its share of the tokens of all of them. */
  readonly weight: number;
}

/** The tokens of one input, cut to the context. Errors: those of `encodeRows`. */
export const encodeRow = (network: EncoderNetwork, api: string, input: TextInput, index: number): Row =>
  encodeRows(network, api, input, index)[0];

/**
 * The tokens of one input, in windows of the context that overlap by so many, or cut to one.
 *
 * @throws InvalidArgumentError naming the text: it is empty, no text or pair, or has ids that the model has not.
 */
export function encodeRows(
  { tokenizer, maxContext, spec, dir }: EncoderNetwork,
  api: string,
  input: TextInput,
  index: number,
  overlap?: number,
): Row[] {
  const fail = (message: string) => new InvalidArgumentError(`[${api}] text ${index} ${message}`);
  const isText = (value: unknown): value is string => typeof value === 'string';
  if (Array.isArray(input) && input.length > 0 && !input.some(isText)) {
    const ids = input as readonly number[];
    const bad = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= spec.vocab);
    if (bad !== undefined) throw fail(`has token id ${bad}; the model's vocabulary ends at ${spec.vocab - 1}`);
    if (ids.length > maxContext) throw fail(`has ${ids.length} tokens, more than the context of ${maxContext}`);
    return [{ ids, types: ids.map(() => 0), truncated: 0, index, windows: 1, weight: 1 }];
  }
  const parts: readonly unknown[] = isText(input) ? [input] : input;
  if (!Array.isArray(parts) || parts.length < 1 || parts.length > 2 || !parts.every(isText)) {
    throw fail('must be a text or a pair of texts');
  }
  if (parts.includes('')) throw fail('is empty');
  if (!tokenizer) throw new InvalidArgumentError(`[${api}] texts need a tokenizer, and ${dir} has no tokenizer.json`);
  const [text, pair] = parts as string[];
  const options = { ...(pair !== undefined && { pair }), maxTokens: maxContext };
  const encoded =
    overlap === undefined
      ? [tokenizer.encodeInput(text, options)]
      : tokenizer.encodeWindows(text, { ...options, overlap });
  const tokens = encoded.reduce((sum, { ids }) => sum + ids.length, 0);
  if (tokens === 0) throw fail('has no tokens');
  return encoded.map((window) => {
    const beyond = window.ids.find((id) => id >= spec.vocab);
    if (beyond !== undefined) {
      throw fail(`has token id ${beyond} of the tokenizer; the model's vocabulary ends at ${spec.vocab - 1}`);
    }
    return { ...window, index, windows: encoded.length, weight: window.ids.length / tokens };
  });
}

/** Where every row begins, i32 [S + 1]. */
export function rowOffsets(rows: readonly Row[]): Int32Array {
  const offsets = Int32Array.from({ length: rows.length + 1 });
  for (const [s, { ids }] of rows.entries()) offsets[s + 1] = offsets[s] + ids.length;
  return offsets;
}

/** Feeds of the embeddings, i32 [tokens] each; models of one kind of tokens read pairs as that. */
export function embeddingFeeds(rows: readonly Row[], tokenTypes: number): Record<string, Int32Array> {
  const offsets = rowOffsets(rows);
  const [ids, positions, types] = Array.from({ length: 3 }, () => new Int32Array(offsets[rows.length]));
  for (const [s, row] of rows.entries()) {
    ids.set(row.ids, offsets[s]);
    for (let i = offsets[s]; i < offsets[s + 1]; i++) positions[i] = i - offsets[s];
    if (tokenTypes > 1) types.set(row.types, offsets[s]);
  }
  return { ids, positions, ...(tokenTypes > 0 && { types }) };
}

/** Of a residual stream f32 [tokens, hidden] of rows the parts of those `kept`, end to end. */
export function compacted(
  residual: Float32Array,
  rows: readonly Row[],
  kept: ReadonlySet<Row>,
  hidden: number,
): Float32Array {
  if (kept.size === rows.length) return residual;
  const out = new Float32Array(hidden * [...kept].reduce((sum, { ids }) => sum + ids.length, 0));
  const offsets = rowOffsets(rows);
  let at = 0;
  for (const [s, row] of rows.entries()) {
    if (!kept.has(row)) continue;
    out.set(residual.subarray(offsets[s] * hidden, offsets[s + 1] * hidden), at);
    at += row.ids.length * hidden;
  }
  return out;
}
