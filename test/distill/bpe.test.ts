// The BPE trainer: deterministic merges, and files the tokenizer library reads back to the same text.
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { trainBpe, writeBpe } from '../../lib/distill/bpe.js';
import { loadTokenizer } from '../../lib/io/tokenizer.js';
import { stories, temporaryDirectory } from './tiny.js';

/** Counts every pair of every word anew for each merge. */
function slowMerges(text: string, count: number): string[] {
  const words = (text.match(/ ?[a-z]+/g) ?? []).map((word) => [...word.replace(' ', 'Ġ')]);
  const merges: string[] = [];
  while (merges.length < count) {
    const counts = new Map<string, number>();
    for (const word of words) {
      for (let i = 1; i < word.length; i++) {
        const pair = `${word[i - 1]} ${word[i]}`;
        counts.set(pair, (counts.get(pair) ?? 0) + 1);
      }
    }
    const best = Math.max(...counts.values(), 0);
    if (best < 2) break;
    const candidates = [...counts].filter(([, n]) => n === best).map(([pair]) => pair);
    // Only unambiguous merges are compared.
    if (candidates.length > 1) break;
    merges.push(candidates[0]);
    const [left, right] = candidates[0].split(' ');
    for (const word of words) {
      for (let i = 0; i + 1 < word.length; i++)
        if (word[i] === left && word[i + 1] === right) word.splice(i, 2, left + right);
    }
  }
  return merges;
}

describe('trainBpe', () => {
  it('makes the merges that counting from scratch makes', () => {
    const word = fc.stringMatching(/^[a-d]{1,6}$/);
    fc.assert(
      fc.property(fc.array(word, { minLength: 1, maxLength: 60 }), (list) => {
        const text = list.join(' ');
        const expected = slowMerges(text, 20);
        const { merges } = trainBpe([text], 257 + expected.length);
        expect(merges.map((pair) => pair.join(' '))).toEqual(expected);
      }),
    );
  });

  it('is deterministic, stops when no pair repeats, and refuses nonsense', () => {
    const text = stories(100);
    expect(trainBpe(text, 320)).toEqual(trainBpe(text, 320));
    expect(trainBpe(['abc'], 1000).tokens).toHaveLength(257);
    expect(() => trainBpe([], 300)).toThrow(/no text/);
    expect(() => trainBpe(text, 256)).toThrow(/vocabSize must be an integer of at least 257/);
  });
});

describe('writeBpe', () => {
  it('round-trips any text through the tokenizer it writes', async () => {
    const dir = temporaryDirectory();
    await writeBpe(dir, trainBpe(stories(200), 400), 128);
    const tokenizer = await loadTokenizer(dir);
    expect(tokenizer).toMatchObject({ bosId: 0, eosId: 0 });
    expect(tokenizer.encode('')).toEqual([0]);
    fc.assert(
      fc.property(fc.string({ unit: 'binary', maxLength: 60 }), (text) => {
        const ids = tokenizer.encode(text);
        expect(ids[0]).toBe(0);
        expect(tokenizer.decode(ids)).toBe(text);
      }),
    );
    // Learnt words are few tokens.
    expect(tokenizer.encode('The cat saw the dog by the barn.', { addSpecialTokens: false }).length).toBeLessThan(14);
  });
});
