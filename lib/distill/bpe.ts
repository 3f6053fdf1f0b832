// Trains a byte-level BPE tokenizer and writes it in the Hugging Face format.
import { join } from 'node:path';
import { writeFileAtomic } from '../io/files.js';
import { InvalidArgumentError, InvalidDataError } from '../native/errors.js';

/** The one special token: starts and ends every document. */
export const endOfText = '<|endoftext|>';

// GPT-2's pre-tokenisation (Radford et al. 2019), also what `ByteLevel` with `use_regex` does in tokenizer.json.
const pieces = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

/**
 * The printable character that stands for each byte in GPT-2 vocabularies: printable Latin-1 stands for itself, the
 * other bytes take the characters from U+0100 on.
 */
const byteCharacters: readonly string[] = (() => {
  const characters: string[] = [];
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    characters.push(String.fromCharCode(printable ? byte : next++));
  }
  return characters;
})();

export interface BpeVocabulary {
  /** Token by id: the end-of-text token, 256 bytes, then merged tokens; in byte characters. */
  tokens: string[];
  /** Merges in order of priority. */
  merges: [string, string][];
}

/**
 * Learns merges until the vocabulary has `vocabSize` tokens or no pair occurs twice. The most frequent pair is merged
 * first; ties go to the pair with the lowest ids, so the same text gives the same vocabulary everywhere.
 * Errors: InvalidArgumentError for a vocabulary below 257, InvalidDataError without text.
 */
export function trainBpe(documents: Iterable<string>, vocabSize: number): BpeVocabulary {
  if (!Number.isInteger(vocabSize) || vocabSize < 257) {
    throw new InvalidArgumentError(`[bpe] vocabSize must be an integer of at least 257, got ${vocabSize}`);
  }
  const counts = new Map<string, number>();
  for (const text of documents) {
    for (const [piece] of text.matchAll(pieces)) counts.set(piece, (counts.get(piece) ?? 0) + 1);
  }
  if (counts.size === 0) throw new InvalidDataError('[bpe] there is no text to train on');

  // As Hugging Face orders the alphabet: by character.
  const alphabet = byteCharacters.map((character, byte) => ({ character, byte }));
  alphabet.sort((a, b) => (a.character < b.character ? -1 : 1));
  const tokens = [endOfText, ...alphabet.map((entry) => entry.character)];
  const idOfByte = new Int32Array(256);
  alphabet.forEach((entry, i) => {
    idOfByte[entry.byte] = i + 1;
  });

  const words = [...counts].map(([piece, count]) => ({
    ids: Array.from(Buffer.from(piece), (byte) => idOfByte[byte]),
    count,
  }));
  const ids = new Map(tokens.map((token, id) => [token, id]));
  const pairs = new Pairs();
  words.forEach((word, w) => {
    for (let i = 1; i < word.ids.length; i++) pairs.change(word.ids[i - 1], word.ids[i], word.count, w);
  });

  const merges: [string, string][] = [];
  while (tokens.length < vocabSize) {
    const best = pairs.pop();
    if (!best || best.count < 2) break;
    const { left, right } = best;
    const token = tokens[left] + tokens[right];
    let merged = ids.get(token);
    if (merged === undefined) {
      merged = tokens.length;
      tokens.push(token);
      ids.set(token, merged);
    }
    merges.push([tokens[left], tokens[right]]);
    for (const w of best.words) {
      const word = words[w];
      const before = word.ids;
      const after: number[] = [];
      for (let i = 0; i < before.length; i++) {
        if (before[i] === left && i + 1 < before.length && before[i + 1] === right) {
          after.push(merged);
          i++;
        } else {
          after.push(before[i]);
        }
      }
      if (after.length === before.length) continue;
      for (let i = 1; i < before.length; i++) pairs.change(before[i - 1], before[i], -word.count, w);
      for (let i = 1; i < after.length; i++) pairs.change(after[i - 1], after[i], word.count, w);
      word.ids = after;
    }
  }
  return { tokens, merges };
}

interface Pair {
  left: number;
  right: number;
  count: number;
  /** Words that hold, or held, the pair. */
  words: Set<number>;
}

/** Pair counts with the largest on top: a binary heap whose entries may be stale, checked when they reach the top. */
class Pairs {
  private readonly all = new Map<number, Pair>();
  private readonly heap: { pair: Pair; count: number }[] = [];
  private readonly touched = new Set<Pair>();

  change(left: number, right: number, by: number, word: number): void {
    const key = left * 2 ** 26 + right;
    let pair = this.all.get(key);
    if (!pair) {
      pair = { left, right, count: 0, words: new Set() };
      this.all.set(key, pair);
    }
    pair.count += by;
    if (by > 0) pair.words.add(word);
    this.touched.add(pair);
  }

  /** The most frequent pair; the caller is to merge it everywhere, which brings its count to zero. */
  pop(): Pair | null {
    for (const pair of this.touched) if (pair.count > 0) this.push({ pair, count: pair.count });
    this.touched.clear();
    while (this.heap.length > 0) {
      const top = this.take();
      if (top.count === top.pair.count) return top.pair;
    }
    return null;
  }

  private before(a: number, b: number): boolean {
    const x = this.heap[a];
    const y = this.heap[b];
    if (x.count !== y.count) return x.count > y.count;
    return x.pair.left !== y.pair.left ? x.pair.left < y.pair.left : x.pair.right < y.pair.right;
  }

  private push(entry: { pair: Pair; count: number }): void {
    const { heap } = this;
    heap.push(entry);
    for (let i = heap.length - 1; i > 0; ) {
      const parent = (i - 1) >> 1;
      if (!this.before(i, parent)) break;
      [heap[i], heap[parent]] = [heap[parent], heap[i]];
      i = parent;
    }
  }

  private take(): { pair: Pair; count: number } {
    const { heap } = this;
    const top = heap[0];
    const last = heap.pop()!;
    if (heap.length > 0) {
      heap[0] = last;
      for (let i = 0; ; ) {
        let child = 2 * i + 1;
        if (child >= heap.length) break;
        if (child + 1 < heap.length && this.before(child + 1, child)) child++;
        if (!this.before(child, i)) break;
        [heap[i], heap[child]] = [heap[child], heap[i]];
        i = child;
      }
    }
    return top;
  }
}

/** Writes tokenizer.json and tokenizer_config.json. Encoding with special tokens puts `<|endoftext|>` in front. */
export async function writeBpe(dir: string, vocabulary: BpeVocabulary, maxPositions: number): Promise<void> {
  const special = {
    id: 0,
    content: endOfText,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  };
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
  const tokenizer = {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: [special],
    normalizer: null,
    pre_tokenizer: byteLevel,
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: endOfText, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
      pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
      special_tokens: { [endOfText]: { id: endOfText, ids: [0], tokens: [endOfText] } },
    },
    decoder: byteLevel,
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries(vocabulary.tokens.map((token, id) => [token, id])),
      merges: vocabulary.merges.map(([left, right]) => `${left} ${right}`),
    },
  };
  const config = {
    tokenizer_class: 'PreTrainedTokenizerFast',
    bos_token: endOfText,
    eos_token: endOfText,
    unk_token: null,
    clean_up_tokenization_spaces: false,
    model_max_length: maxPositions,
  };
  await writeFileAtomic(join(dir, 'tokenizer.json'), `${JSON.stringify(tokenizer, null, 1)}\n`);
  await writeFileAtomic(join(dir, 'tokenizer_config.json'), `${JSON.stringify(config, null, 2)}\n`);
}
