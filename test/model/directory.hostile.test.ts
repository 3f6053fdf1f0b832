// Model directories from a hostile or careless source: loading gives a model or a typed error that names the file, and a
// refused one leaves nothing alive in native memory.
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import * as fc from 'fast-check';
import { beforeEach, describe, expect, it } from 'vitest';
import { loadModel } from '../../lib/infer/model.js';
import { loadTokenizer } from '../../lib/io/tokenizer.js';
import { ElastiformError, InvalidDataError, InvalidFileError } from '../../lib/native/errors.js';
import { loadAddon } from '../../lib/native/index.js';
import { temporaryDirectory } from '../temporary.js';

const shipped = resolve(import.meta.dirname, '../../models/tiny');
const files = ['config.json', 'tokenizer.json', 'tokenizer_config.json', 'model.safetensors'] as const;
type Json = Record<string, unknown>;
const read = (name: string): Json => JSON.parse(readFileSync(join(shipped, name), 'utf8'));
const config = read('config.json');
const tokenizer = read('tokenizer.json') as { model: { vocab: Json; merges: unknown[] } };
const nested = (open: string, core: string, close: string, depth: number) =>
  open.repeat(depth) + core + close.repeat(depth);

let directory: string;
beforeEach(() => {
  directory = temporaryDirectory();
  for (const name of files) cpSync(join(shipped, name), join(directory, name));
});
const put = (name: (typeof files)[number], content: unknown) =>
  writeFileSync(join(directory, name), typeof content === 'string' ? content : JSON.stringify(content));

describe('loadModel refuses', () => {
  it.each<[string, (typeof files)[number], unknown]>([
    ['more layers than there are', 'config.json', { ...config, num_hidden_layers: 2 ** 24 }],
    ['layers past any bound', 'config.json', { ...config, num_hidden_layers: 2 ** 31 - 1 }],
    ['a hidden size past any bound', 'config.json', { ...config, hidden_size: 2 ** 31 - 1 }],
    ['a head size past any bound', 'config.json', { ...config, head_dim: 2 ** 30 }],
    ['a context past any bound', 'config.json', { ...config, max_position_embeddings: 2 ** 31 - 1 }],
    ['an end token past the vocabulary', 'config.json', { ...config, eos_token_id: 99999 }],
    ['end tokens of two kinds', 'config.json', { ...config, eos_token_id: [1, 'x'] }],
    ['a negative start token', 'config.json', { ...config, bos_token_id: -1 }],
    ['a config hidden in its prototype', 'config.json', `{"__proto__":${JSON.stringify(config)}}`],
    ['a config nested deeply', 'config.json', `{"model_type":"llama","a":${nested('[', '', ']', 100_000)}}`],
    ['a config cut short', 'config.json', JSON.stringify(config).slice(0, 100)],
    ['an empty config', 'config.json', ''],
    [
      'a normalizer nested deeply',
      'tokenizer.json',
      JSON.stringify({ ...tokenizer, normalizer: null }).replace(
        '"normalizer":null',
        `"normalizer":${nested('{"type":"Sequence","normalizers":[', '{"type":"NFC"}', ']}', 20_000)}`,
      ),
    ],
    [
      'a token with an id past any bound',
      'tokenizer.json',
      { ...tokenizer, model: { ...tokenizer.model, vocab: { ...tokenizer.model.vocab, zzz: 2 ** 24 } } },
    ],
    ['merges that are a text', 'tokenizer.json', { ...tokenizer, model: { ...tokenizer.model, merges: 'a b' } }],
    ['a merge of nothing', 'tokenizer.json', { ...tokenizer, model: { ...tokenizer.model, merges: [null] } }],
    [
      'special tokens that are not in the vocabulary',
      'tokenizer_config.json',
      { ...read('tokenizer_config.json'), eos_token: '</s>' },
    ],
    ['a tokenizer_config.json that is a list', 'tokenizer_config.json', []],
  ])('%s', async (_, name, content) => {
    const before = loadAddon().memory();
    put(name, content);
    const error = await loadModel(directory).catch((e) => e);
    expect(error).toBeInstanceOf(InvalidFileError);
    expect(error.message).toContain(directory);
    if (!/^\[weights\]/.test(error.message)) expect(error.message).toContain(name);
    expect(loadAddon().memory()).toEqual(before);
  });
});

it('a context of millions of positions costs nothing until it is used', async () => {
  put('config.json', { ...config, max_position_embeddings: 2 ** 24 });
  const rss = process.memoryUsage().rss;
  await using model = await loadModel(directory);
  expect(await model.generate('Call me', { maxTokens: 3 }).ids).toHaveLength(3);
  expect(process.memoryUsage().rss - rss).toBeLessThan(2 ** 28);
});

it('weights that are not numbers give a typed error at the first token', async () => {
  const path = join(directory, 'model.safetensors');
  const bytes = readFileSync(path);
  bytes.fill(0xff, bytes.length - 4096); // bf16 0xffff is NaN
  writeFileSync(path, bytes);
  await using model = await loadModel(directory);
  await expect(model.generate('Call me', { maxTokens: 3 }).ids).rejects.toThrow(InvalidDataError);
  await expect(model.score(['Call me'])).rejects.toThrow(InvalidDataError);
  await expect(model.logits('Call me')).rejects.toThrow(InvalidDataError);
});

/** The text of `json` with up to three values, anywhere in it, replaced by odd ones, sometimes cut short. */
function damaged(json: object) {
  const odd: unknown[] = [
    null,
    true,
    '',
    'x',
    -1,
    0.5,
    1e308,
    2 ** 31,
    [],
    {},
    [null],
    { type: 'BPE' },
    { toString: 1 },
  ];
  const change = fc.tuple(fc.array(fc.nat(1000), { minLength: 1, maxLength: 4 }), fc.constantFrom(...odd));
  return fc
    .tuple(fc.array(change, { minLength: 1, maxLength: 3 }), fc.option(fc.double({ min: 0, max: 1, noNaN: true })))
    .map(([changes, cut]) => {
      const copy = structuredClone(json) as Json;
      for (const [path, value] of changes) {
        let at = copy;
        for (const [depth, index] of path.entries()) {
          const keys = Object.keys(at);
          if (keys.length === 0) break;
          const key = keys[index % keys.length];
          const next = at[key];
          if (depth < path.length - 1 && typeof next === 'object' && next !== null) at = next as Json;
          else {
            at[key] = structuredClone(value);
            break;
          }
        }
      }
      const text = JSON.stringify(copy);
      return cut === null || cut > 0.2 ? text : text.slice(0, cut * 5 * text.length);
    });
}
const typed = (error: unknown): undefined => {
  expect(error).toBeInstanceOf(ElastiformError);
};

it('a damaged config loads or gives a typed error', async () => {
  const before = loadAddon().memory();
  let loaded = 0;
  await fc.assert(
    fc.asyncProperty(damaged({ ...config, rope_scaling: { rope_type: 'linear', factor: 2 } }), async (text) => {
      put('config.json', text);
      const model = await loadModel(directory).catch(typed);
      if (model) loaded++;
      await model?.dispose();
    }),
    { numRuns: 300, seed: 1 },
  );
  expect(loaded).toBeGreaterThan(0);
  expect(loaded).toBeLessThan(300);
  expect(loadAddon().memory()).toEqual(before);
});

it('a damaged tokenizer loads and works, or gives a typed error', async () => {
  // Few tokens, so that damage hits the structure and not only the vocabulary.
  const vocab = Object.fromEntries(Object.entries(tokenizer.model.vocab).filter(([, id]) => (id as number) < 40));
  const small = { ...tokenizer, model: { ...tokenizer.model, vocab, merges: [] } };
  let loaded = 0;
  await fc.assert(
    fc.asyncProperty(damaged(small), async (text) => {
      put('tokenizer.json', text);
      const tokenizer = await loadTokenizer(directory).catch(typed);
      if (!tokenizer) return;
      loaded++;
      try {
        tokenizer.decode(tokenizer.encode('Call me Ishmael. \u{1f40b}\0'));
      } catch (error) {
        typed(error);
      }
    }),
    { numRuns: 500, seed: 1 },
  );
  expect(loaded).toBeGreaterThan(0);
  expect(loaded).toBeLessThan(500);
});
