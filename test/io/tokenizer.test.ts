// Tokenizers of both kinds that decoders use: byte-level BPE, and BPE with spaces as characters and byte fallback.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import { sha256File } from '../../lib/io/files.js';
import { loadTokenizer, type Tokenizer } from '../../lib/io/tokenizer.js';
import { InvalidArgumentError, InvalidFileError } from '../../lib/native/errors.js';
import { temporaryDirectory } from '../temporary.js';

const data = process.env.ELASTIFORM_DATA;

// GPT-2's printable stand-ins for bytes.
function byteCharacters(): string[] {
  const printable = (b: number) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : next++));
}

const special = (id: number, content: string) => ({
  id,
  content,
  special: true,
  normalized: false,
  single_word: false,
  lstrip: false,
  rstrip: false,
});

/** Every byte is a token; a few merges of ASCII. */
function byteLevel(): object {
  const characters = byteCharacters();
  const merges = [
    ['h', 'e'],
    ['l', 'l'],
    ['he', 'll'],
    ['hell', 'o'],
    ['Ġ', 'w'],
    ['Ġw', 'o'],
  ];
  const tokens = [...characters, ...merges.map((pair) => pair.join(''))];
  const vocab = Object.fromEntries(tokens.map((token, id) => [token, id]));
  const step = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
  return {
    added_tokens: [special(tokens.length, '<|endoftext|>')],
    pre_tokenizer: step,
    decoder: step,
    model: { type: 'BPE', vocab, merges, ignore_merges: false },
  };
}

/** As Llama 2: a space is `▁`, one goes before every text, unknown characters fall back to byte tokens. */
function sentencePiece(): object {
  const bytes = Array.from({ length: 256 }, (_, b) => `<0x${b.toString(16).toUpperCase().padStart(2, '0')}>`);
  const letters = [...'▁helowrd'];
  const merges = [
    ['h', 'e'],
    ['l', 'l'],
    ['▁', 'he'],
    ['▁he', 'll'],
    ['▁', 'w'],
  ];
  const tokens = ['<unk>', '<s>', '</s>', ...bytes, ...letters, ...merges.map((pair) => pair.join(''))];
  const vocab = Object.fromEntries([...new Set(tokens)].map((token, id) => [token, id]));
  return {
    added_tokens: [special(0, '<unk>'), special(1, '<s>'), special(2, '</s>')],
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'Prepend', prepend: '▁' },
        { type: 'Replace', pattern: { String: ' ' }, content: '▁' },
      ],
    },
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
      pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
      special_tokens: { '<s>': { id: '<s>', ids: [1], tokens: ['<s>'] } },
    },
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        { type: 'Strip', content: ' ', start: 1, stop: 0 },
      ],
    },
    model: {
      type: 'BPE',
      vocab,
      merges,
      unk_token: '<unk>',
      fuse_unk: true,
      byte_fallback: true,
      ignore_merges: false,
    },
  };
}

let directory: string;
beforeAll(() => {
  directory = temporaryDirectory();
});

async function load(json: unknown, config: unknown = {}): Promise<Tokenizer> {
  writeFileSync(join(directory, 'tokenizer.json'), JSON.stringify(json));
  writeFileSync(join(directory, 'tokenizer_config.json'), JSON.stringify(config));
  return loadTokenizer(directory);
}

/** Pieces of a stream, with what `end` gave as the last. */
function pieces(tokenizer: Tokenizer, ids: readonly number[], context?: readonly number[]): string[] {
  const stream = tokenizer.stream(context);
  return [...ids.map((id) => stream.push(id)), stream.end()];
}

describe.each([
  ['byte-level', byteLevel, { eos_token: '<|endoftext|>' }],
  ['with byte fallback', sentencePiece, { bos_token: '<s>', eos_token: { content: '</s>' } }],
] as const)('a tokenizer %s', (_, json, config) => {
  let tokenizer: Tokenizer;
  beforeAll(async () => {
    tokenizer = await load(json(), config);
  });

  it('decodes what it encoded', () => {
    fc.assert(
      fc.property(fc.oneof(fc.string({ unit: 'binary' }), fc.stringMatching(/^[helowrd ]*$/)), (text) => {
        expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
      }),
      { numRuns: 200 },
    );
  });

  it('streams exactly what it decodes, in whole characters', () => {
    const text = 'hello world, grüße 👩‍🚀 hello';
    const ids = tokenizer.encode(text);
    const parts = pieces(tokenizer, ids);
    expect(parts.join('')).toBe(text);
    for (const part of parts) expect(part).not.toContain('\uFFFD');
    fc.assert(
      fc.property(fc.array(fc.nat(tokenizer.vocabSize - 1), { maxLength: 30 }), (any) => {
        expect(pieces(tokenizer, any).join('')).toBe(tokenizer.decode(any));
      }),
      { numRuns: 300 },
    );
  });

  it('continues a context at any place', () => {
    const text = 'hello world 👋 hello world';
    const ids = tokenizer.encode(text);
    for (let cut = 0; cut <= ids.length; cut++) {
      const before = tokenizer.decode(ids.slice(0, cut)).replace(/\uFFFD+$/, '');
      expect(before + pieces(tokenizer, ids.slice(cut), ids.slice(0, cut)).join('')).toBe(text);
    }
  });

  it('leaves special tokens out of the text unless asked', () => {
    const ids = [...tokenizer.encode('hello', { addSpecialTokens: false }), tokenizer.eosId as number];
    expect(tokenizer.decode(ids)).toBe('hello');
    expect(tokenizer.decode(ids, { skipSpecialTokens: false })).toMatch(/^hello<.*>$/);
    expect(pieces(tokenizer, [tokenizer.eosId as number, ...ids]).join('')).toBe('hello');
  });

  it('gives nothing for ids without a token, and refuses what is no id', () => {
    expect(tokenizer.decode([])).toBe('');
    expect(tokenizer.decode([tokenizer.vocabSize + 5])).toBe('');
    expect(() => tokenizer.decode([-1])).toThrow(InvalidArgumentError);
    expect(() => tokenizer.decode([0.5])).toThrow(InvalidArgumentError);
  });
});

describe('a loaded tokenizer', () => {
  it('knows its special ids, size and hash', async () => {
    const tokenizer = await load(sentencePiece(), { bos_token: '<s>', eos_token: { content: '</s>' } });
    expect(tokenizer).toMatchObject({ bosId: 1, eosId: 2, vocabSize: 3 + 256 + 8 + 5 });
    expect(tokenizer.sha256).toBe(await sha256File(join(directory, 'tokenizer.json')));
    expect(tokenizer.encode('hello')[0]).toBe(1);
    expect(tokenizer.encode('hello', { addSpecialTokens: false })[0]).not.toBe(1);
    const plain = await load(byteLevel());
    expect(plain).toMatchObject({ bosId: null, eosId: null });
  });

  it('does without tokenizer_config.json', async () => {
    const alone = temporaryDirectory();
    writeFileSync(join(alone, 'tokenizer.json'), JSON.stringify(byteLevel()));
    expect((await loadTokenizer(alone)).encode('hello')).toHaveLength(1);
  });

  it('names characters that it cannot encode', async () => {
    const model = { type: 'WordPiece', vocab: { a: 0 }, continuing_subword_prefix: '##', max_input_chars_per_word: 9 };
    const tokenizer = await load({ model });
    expect(tokenizer.encode('a')).toEqual([0]);
    expect(() => tokenizer.encode('b')).toThrow(InvalidArgumentError);
  });
});

describe('a corrupt tokenizer', () => {
  const model = { type: 'BPE', vocab: { a: 0 }, merges: [] };
  it.each<[string, unknown, unknown]>([
    ['no object', [], {}],
    ['no model', {}, {}],
    ['no vocabulary', { model: { type: 'BPE' } }, {}],
    ['negative ids', { model: { ...model, vocab: { a: -1 } } }, {}],
    ['huge ids', { model: { ...model, vocab: { a: 2 ** 31 } } }, {}],
    ['ids that are no numbers', { model: { ...model, vocab: { a: 'x' } } }, {}],
    ['added tokens without id', { model, added_tokens: [{ content: 'x' }] }, {}],
    ['added tokens with a huge id', { model, added_tokens: [special(2 ** 40, 'x')] }, {}],
    ['an unknown model', { model: { ...model, type: 'Magic' } }, {}],
    ['an unknown decoder', { model, decoder: { type: 'Magic' } }, {}],
    [
      'a broken pattern',
      { model, pre_tokenizer: { type: 'Split', pattern: { Regex: '(' }, behavior: 'Isolated' } },
      {},
    ],
  ])('%s', async (_, json, config) => {
    const loading = load(json, config);
    await expect(loading).rejects.toThrow(InvalidFileError);
    await expect(loading).rejects.toThrow(join(directory, 'tokenizer.json'));
  });

  it('a config that does not fit', async () => {
    await expect(load({ model }, [])).rejects.toThrow('tokenizer_config.json is not a JSON object');
    await expect(load({ model }, { eos_token: '</s>' })).rejects.toThrow('eos_token "</s>" is not a token');
  });

  it('truncated or missing', async () => {
    writeFileSync(join(directory, 'tokenizer.json'), JSON.stringify({ model }).slice(0, 20));
    await expect(loadTokenizer(directory)).rejects.toThrow(InvalidFileError);
    await expect(loadTokenizer(join(directory, 'none'))).rejects.toThrow(InvalidFileError);
  });
});

describe.skipIf(!data)('real tokenizers', () => {
  it('GPT-2 encodes as transformers does', async () => {
    const from = join(data as string, 'tokenizers', 'gpt2');
    const vocab = JSON.parse(readFileSync(join(from, 'vocab.json'), 'utf8'));
    const lines = readFileSync(join(from, 'merges.txt'), 'utf8').split('\n');
    const merges = lines.filter((line) => line !== '' && !line.startsWith('#version')).map((line) => line.split(' '));
    const tokenizer = await load(
      { ...byteLevel(), added_tokens: [special(50256, '<|endoftext|>')], model: { type: 'BPE', vocab, merges } },
      { bos_token: '<|endoftext|>', eos_token: '<|endoftext|>' },
    );
    expect(tokenizer.encode('Hello world, transformers!')).toEqual([15496, 995, 11, 6121, 364, 0]);
    expect(tokenizer).toMatchObject({ vocabSize: 50257, bosId: 50256, eosId: 50256 });
    const text = 'Grüße , aus "München" !\n\n\tdef f(x):  return x\u00a0+ 1 🙂';
    expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
  });

  it('the stories model encodes and streams as transformers does', async () => {
    const tokenizer = await loadTokenizer(join(data as string, 'stories260K-llama'));
    const reference = JSON.parse(readFileSync(join(data as string, 'stories260K-llama', 'reference.json'), 'utf8'));
    expect(tokenizer.encode(reference.prompt)).toEqual(reference.input_ids);
    expect(tokenizer).toMatchObject({ bosId: 1, eosId: 2, vocabSize: 512 });
    expect(pieces(tokenizer, reference.greedy_ids).join('')).toBe(reference.greedy_from_bos_200);
  });
});
