// Text to token ids and back, for the tokenizer of a Hugging Face directory.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { Tokenizer as HuggingFaceTokenizer } from '@huggingface/tokenizers';
import { InvalidArgumentError, InvalidFileError } from '../native/errors.js';
import { readJson, sha256File } from './files.js';

/** Decodes ids one at a time; the pieces joined are what decoding all ids at once gives. */
export interface TokenStream {
  /** The text that is certain after this id: empty while a character is incomplete. */
  push(id: number): string;
  /** What was held back. */
  end(): string;
}

/** A text, or a pair of texts, as an encoder reads it. */
export interface EncodedInput {
  readonly ids: readonly number[];
  /** Kind of every token: 0 of the first text, 1 of the second; what special tokens are is the tokenizer's to say. */
  readonly types: readonly number[];
  /** Tokens that were left out. */
  readonly truncated: number;
}

export interface Tokenizer {
  /** Largest id + 1. */
  readonly vocabSize: number;
  readonly bosId: number | null;
  readonly eosId: number | null;
  /** SHA-256 of tokenizer.json in hexadecimal. */
  readonly sha256: string;
  /** @param options.addSpecialTokens what the tokenizer puts around a text (such as BOS); default true */
  encode(text: string, options?: { addSpecialTokens?: boolean }): number[];
  /**
   * A text, or a pair of texts, with the special tokens that are put around it. What does not fit is left out at the end of the
   * longer text, of both alike when they are as long.
   *
   * @param options.maxTokens special tokens included
   * @throws InvalidArgumentError when no text fits beside the special tokens.
   */
  encodeInput(text: string, options: { pair?: string; maxTokens: number }): EncodedInput;
  /**
   * The same in windows where a text does not fit: each goes on `overlap` tokens before the end of the one before. Of a pair the longer
   * text is so divided, and the other, cut to half the room where it is longer, is in all windows.
   *
   * @param options.overlap less than half of `maxTokens`
   * @throws InvalidArgumentError when no text fits beside the special tokens.
   */
  encodeWindows(text: string, options: { pair?: string; maxTokens: number; overlap: number }): EncodedInput[];
  /**
   * Ids without a token decode to nothing. Spaces are never cleaned up: the text is what was encoded.
   *
   * @param options.skipSpecialTokens leave BOS, EOS and the like out of the text; default true
   */
  decode(ids: readonly number[], options?: { skipSpecialTokens?: boolean }): string;
  /**
   * Decoding of ids as they are generated, without special tokens.
   *
   * @param context ids that come before: a word that follows text keeps its leading space
   */
  stream(context?: readonly number[]): TokenStream;
}

// What is used of the library. Its own declarations import files without extensions and so resolve to any.
interface Backend {
  encode(text: string, options: { add_special_tokens: boolean }): { ids: (number | undefined)[]; tokens: string[] };
  tokenize(text: string, options: { add_special_tokens: boolean }): string[];
  post_processor:
    | ((a: string[], b: string[] | null, special: boolean) => { tokens: string[]; token_type_ids?: number[] })
    | null;
  decode(ids: number[], options: { skip_special_tokens: boolean; clean_up_tokenization_spaces: boolean }): string;
  token_to_id(token: string): number | undefined;
  id_to_token(id: number): string | undefined;
  model: { unk_token_id?: number };
  get_vocab(withAddedTokens: boolean): Map<string, number>;
  get_added_tokens_decoder(): Map<number, { special: boolean }>;
}

const MODEL_TYPES = ['BPE', 'Unigram', 'WordPiece', 'WordLevel'];
const MAX_ID = 1 << 24;
// Tokens of context that decide how the next one decodes.
const CONTEXT = 8;

/**
 * Loads `tokenizer.json`, and `tokenizer_config.json` when it is there.
 *
 * @param name of another file in place of tokenizer.json
 * @throws InvalidFileError naming the file that is missing or corrupt.
 */
export async function loadTokenizer(directory: string, name = 'tokenizer.json'): Promise<Tokenizer> {
  const path = join(directory, name);
  const configPath = join(directory, 'tokenizer_config.json');
  const json = await readJson(path);
  const config = existsSync(configPath) ? await readJson(configPath) : {};
  if (!isObject(config)) throw new InvalidFileError(`[tokenizer] ${configPath} is not a JSON object`);
  const tokenizer = build(path, json, config);
  const special = (key: string) => specialId(tokenizer, configPath, key, config[key]);
  return new DirectoryTokenizer(path, tokenizer, special('bos_token'), special('eos_token'), await sha256File(path));
}

class DirectoryTokenizer implements Tokenizer {
  readonly vocabSize: number;
  readonly #ids: ReadonlyMap<string, number>;
  readonly #special: ReadonlySet<number>;

  constructor(
    private readonly path: string,
    private readonly tokenizer: Backend,
    readonly bosId: number | null,
    readonly eosId: number | null,
    readonly sha256: string,
  ) {
    this.#ids = tokenizer.get_vocab(true);
    let largest = -1;
    for (const id of this.#ids.values()) largest = Math.max(largest, id);
    this.vocabSize = largest + 1;
    this.#special = new Set([...tokenizer.get_added_tokens_decoder()].filter(([, t]) => t.special).map(([id]) => id));
  }

  encode(text: string, { addSpecialTokens = true }: { addSpecialTokens?: boolean } = {}): number[] {
    const { ids, tokens } = this.#attempt('encode', () =>
      this.tokenizer.encode(text, { add_special_tokens: addSpecialTokens }),
    );
    return known(ids, tokens);
  }

  encodeInput(text: string, { pair, maxTokens }: { pair?: string; maxTokens: number }): EncodedInput {
    return this.#attempt('encode', () => {
      const { a, b, room, input } = this.#parts(text, pair, maxTokens);
      const [keptA, keptB] = longestFirst(a.length, b?.length ?? 0, room);
      return input(a.slice(0, keptA), b?.slice(0, keptB) ?? null, a.length + (b?.length ?? 0) - keptA - keptB);
    });
  }

  encodeWindows(text: string, options: { pair?: string; maxTokens: number; overlap: number }): EncodedInput[] {
    const { pair, maxTokens, overlap } = options;
    return this.#attempt('encode', () => {
      const { a, b, room, input } = this.#parts(text, pair, maxTokens);
      if (a.length + (b?.length ?? 0) <= room) return [input(a, b, 0)];
      const second = b !== null && b.length > a.length;
      const [long, other] = second ? [b, a] : [a, b ?? []];
      const kept = other.slice(0, Math.floor(room / 2));
      const most = room - kept.length;
      const step = Math.max(1, most - overlap);
      return Array.from({ length: Math.max(1, Math.ceil((long.length - most) / step) + 1) }, (_, i) => {
        const part = long.slice(i * step, i * step + most);
        return input(second ? kept : part, second ? part : b && kept, other.length - kept.length);
      });
    });
  }

  // The tokens of both texts, how many have room beside the special tokens, and what puts those around some of them.
  #parts(text: string, pair: string | undefined, maxTokens: number) {
    const { tokenizer } = this;
    const around = (a: string[], b: string[] | null) =>
      tokenizer.post_processor?.(a, b, true) ?? { tokens: [...a, ...(b ?? [])] };
    const plain = (part: string) => tokenizer.tokenize(part, { add_special_tokens: false });
    const [a, b] = [plain(text), pair === undefined ? null : plain(pair)];
    const room = maxTokens - around([], b && []).tokens.length;
    if (room < 1) {
      throw new InvalidArgumentError(`[tokenizer] no text fits ${maxTokens} tokens beside the special tokens`);
    }
    const input = (ofA: string[], ofB: string[] | null, truncated: number): EncodedInput => {
      const { tokens, token_type_ids: types } = around(ofA, ofB);
      const ids = tokens.map((token) => this.#ids.get(token) ?? tokenizer.model.unk_token_id);
      return { ids: known(ids, tokens), types: types ?? tokens.map(() => 0), truncated };
    };
    return { a, b, room, input };
  }

  decode(ids: readonly number[], { skipSpecialTokens = true }: { skipSpecialTokens?: boolean } = {}): string {
    for (const id of ids) {
      if (!Number.isInteger(id) || id < 0) {
        throw new InvalidArgumentError(`[tokenizer] token ids must be non-negative integers, got ${id}`);
      }
    }
    const known = ids.filter(
      (id) => this.tokenizer.id_to_token(id) !== undefined && !(skipSpecialTokens && this.#special.has(id)),
    );
    if (known.length === 0) return '';
    return this.#attempt('decode', () =>
      this.tokenizer.decode(known, { skip_special_tokens: skipSpecialTokens, clean_up_tokenization_spaces: false }),
    );
  }

  // What a damaged file breaks may show only when it is used.
  #attempt<T>(action: string, call: () => T): T {
    try {
      return call();
    } catch (error) {
      if (error instanceof InvalidArgumentError) throw error;
      throw new InvalidFileError(`[tokenizer] ${this.path}: cannot ${action}: ${(error as Error).message}`, {
        cause: error,
      });
    }
  }

  stream(context: readonly number[] = []): TokenStream {
    // Ids whose text is out already (they give the new ones their context), and then all ids since.
    let before = context.filter((id) => !this.#special.has(id)).slice(-CONTEXT);
    let pending: number[] = [];
    // Text the pending ids add. A replacement character at the end of what came before is a character cut in two.
    const known = () => this.decode(before).replace(/\uFFFD+$/, '');
    const added = () => this.decode([...before, ...pending]).slice(known().length);
    return {
      push: (id) => {
        pending.push(id);
        const text = added();
        if (text === '' || text.endsWith('\uFFFD')) return '';
        // The next window begins with a whole character.
        before = known() === this.decode(before) ? pending : [...before, ...pending];
        pending = [];
        return text;
      },
      end: () => {
        const text = added();
        pending = [];
        return text;
      },
    };
  }
}

function known(ids: (number | undefined)[], tokens: string[]): number[] {
  const unknown = ids.indexOf(undefined);
  if (unknown < 0) return ids as number[];
  const token = JSON.stringify(tokens[unknown]);
  throw new InvalidArgumentError(`[tokenizer] ${token} is not in the vocabulary, which has no unknown token`);
}

/** How much of two texts of a and b tokens fits `room`: the longer one gives way, both when that is not enough. */
function longestFirst(a: number, b: number, room: number): [number, number] {
  if (a + b <= room) return [a, b];
  const half = Math.floor(room / 2);
  if (Math.min(a, b) <= half) return a <= b ? [a, room - a] : [room - b, b];
  // The odd token goes to the longer one.
  return a > b ? [room - half, half] : [half, room - half];
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function isId(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) >= 0 && (value as number) < MAX_ID;
}

function build(path: string, json: unknown, config: Record<string, unknown>): Backend {
  const fail = (message: string, cause?: unknown) => new InvalidFileError(`[tokenizer] ${path}: ${message}`, { cause });
  if (!isObject(json) || !isObject(json.model)) throw fail('has no model');
  const { added_tokens: added = [], model } = json;
  if (!Array.isArray(added) || !added.every((t) => isObject(t) && isId(t.id) && typeof t.content === 'string')) {
    throw fail('added_tokens is not a list of tokens with id and content');
  }
  if (model.type !== undefined && !MODEL_TYPES.includes(model.type as string)) {
    throw fail(`model.type must be one of ${MODEL_TYPES.join(', ')}, got ${JSON.stringify(model.type)}`);
  }
  // Unigram models list [token, score] pairs, whose ids are their places.
  const vocab = model.vocab;
  const valid = Array.isArray(vocab) ? vocab.length < MAX_ID : isObject(vocab) && Object.values(vocab).every(isId);
  if (!valid) throw fail(`model.vocab does not map tokens to ids below ${MAX_ID}`);
  // A word that is no token and a word of pieces that no token continues with are both unknown.
  const known =
    model.type === 'WordLevel'
      ? { ...model, type: 'WordPiece', continuing_subword_prefix: '\0', max_input_chars_per_word: MAX_ID }
      : model;
  const parts = { normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null };
  try {
    return new HuggingFaceTokenizer({ ...parts, ...json, model: known, added_tokens: added }, config);
  } catch (error) {
    throw fail(`cannot be loaded: ${(error as Error).message}`, error);
  }
}

// A special token is a string, or an object with its content.
function specialId(tokenizer: Backend, path: string, key: string, value: unknown): number | null {
  const content = isObject(value) ? value.content : value;
  if (content === undefined || content === null) return null;
  const id = typeof content === 'string' ? tokenizer.token_to_id(content) : undefined;
  if (id === undefined) {
    throw new InvalidFileError(
      `[tokenizer] ${path}: ${key} ${JSON.stringify(content)} is not a token of the vocabulary`,
    );
  }
  return id;
}
