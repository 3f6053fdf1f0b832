// Letters to phonemes: the CMU Pronouncing Dictionary as pairs, split by a hash of the word, and a tokenizer of both sides.
import { createHash } from 'node:crypto';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { dictionary } from 'cmu-pronouncing-dictionary';

const wordPattern = /^[a-z']{2,16}$/;

/** A number in [0, 1) that the seed and a word decide. */
const draw = (seed, word) => createHash('sha256').update(`${seed}/${word}`).digest().readUInt32LE(0) / 2 ** 32;

/**
 * Pairs of letters and phonemes. Other pronunciations of a word, `word(1)`, are on its side of the split: they are trained on, and
 * held-out words are right where they are written as any of them.
 *
 * @returns {{ train: { text: string, label: string }[], heldOut: { text: string, labels: string[] }[] }} `chosen`: held-out words to choose
 *   weights by, apart from `heldOut`, which are measured
 */
export function readWords({ seed, chosen, measured }) {
  const words = new Map();
  for (const [key, phonemes] of Object.entries(dictionary)) {
    const word = key.replace(/\(\d+\)$/, '');
    if (!wordPattern.test(word)) continue;
    // Stress of vowels is left out, as is usual in this task's measures without it.
    const plain = phonemes.replaceAll(/[^A-Z ]/g, '').trim();
    if (!words.has(word)) words.set(word, new Set());
    words.get(word).add(plain);
  }
  const ordered = [...words].map(([word, labels]) => ({ word, labels: [...labels], at: draw(seed, word) }));
  ordered.sort((a, b) => a.at - b.at || (a.word < b.word ? -1 : 1));
  const text = (word) => [...word].join(' ');
  const pairs = (rows) => rows.flatMap(({ word, labels }) => labels.map((label) => ({ text: text(word), label })));
  return {
    heldOut: ordered.slice(0, measured).map(({ word, labels }) => ({ text: text(word), labels })),
    chosen: pairs(ordered.slice(measured, measured + chosen)),
    train: pairs(ordered.slice(measured + chosen)),
  };
}

/** Writes a tokenizer of letters and phonemes between spaces, whose texts end with `</s>`. */
export function writeTokenizer(dir, pairs) {
  const seen = new Set(pairs.flatMap(({ text, label }) => [...text.split(' '), ...label.split(' ')]));
  const special = ['<s>', '<pad>', '</s>', '<unk>'];
  const vocabulary = [...special, ...[...seen].sort()];
  const added_tokens = special.map((content, id) => ({
    ...{ id, content, special: true, single_word: false, lstrip: false, rstrip: false, normalized: false },
  }));
  const [a, end] = [{ Sequence: { id: 'A', type_id: 0 } }, { SpecialToken: { id: '</s>', type_id: 0 } }];
  const tokenizer = {
    ...{ version: '1.0', added_tokens, pre_tokenizer: { type: 'WhitespaceSplit' } },
    post_processor: {
      ...{ type: 'TemplateProcessing', single: [a, end], pair: [a, end] },
      special_tokens: { '</s>': { id: '</s>', ids: [2], tokens: ['</s>'] } },
    },
    model: {
      type: 'WordLevel',
      vocab: Object.fromEntries(vocabulary.map((token, id) => [token, id])),
      unk_token: '<unk>',
    },
  };
  mkdirSync(dir, { recursive: true });
  writeFileSync(join(dir, 'tokenizer.json'), JSON.stringify(tokenizer));
  const names = { tokenizer_class: 'PreTrainedTokenizerFast', bos_token: '<s>', eos_token: '</s>', pad_token: '<pad>' };
  writeFileSync(join(dir, 'tokenizer_config.json'), JSON.stringify(names));
  return dir;
}
