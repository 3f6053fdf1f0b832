// Encoder-decoder models through the API: what they write, greedily, by sampling and by beam search, in company and alone, and what is refused.
import { cpSync, existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { type ElasticModel, loadModel } from '../../lib/infer/model.js';
import type { GenerateOptions, GenerateStream } from '../../lib/infer/types.js';
import { readSeq2SeqCases, seq2seqDirectory, seq2seqNames } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';

const collected = async (stream: GenerateStream) => {
  const logprobs: number[] = [];
  for await (const { logprob } of stream) logprobs.push(logprob);
  const [ids, reason, usage] = await Promise.all([stream.ids, stream.finishReason, stream.usage]);
  return { ids, reason, usage, logprobs };
};
const written = async (model: ElasticModel, source: readonly number[] | string, options: GenerateOptions = {}) =>
  collected(model.generate(source, options));

/** A copy of a model's directory whose generation_config.json says this. */
function configured(name: string, settings: Record<string, unknown>): string {
  const directory = temporaryDirectory();
  cpSync(seq2seqDirectory(name), directory, { recursive: true });
  writeFileSync(join(directory, 'generation_config.json'), JSON.stringify(settings));
  return directory;
}

describe.each(seq2seqNames)('%s', (name) => {
  const { sources, special, generations } = readSeq2SeqCases(name);
  const keyOf = ({ settings }: (typeof generations)[number]) => JSON.stringify(settings);

  it.each([...new Set(generations.map(keyOf))])('writes what generate of transformers does with %s', async (key) => {
    const settings = JSON.parse(key) as { num_beams?: number; length_penalty?: number };
    const cases = generations.filter((one) => keyOf(one) === key);
    await using model = await loadModel(configured(name, { ...special, ...settings }));
    // All at once: they share runs.
    const results = await Promise.all(cases.map(({ source }) => written(model, sources[source])));
    for (const [i, { ids, logprobs, reason, usage }] of results.entries()) {
      expect(ids).toEqual(cases[i].ids);
      expect(reason).toBe(ids.at(-1) === special.eos_token_id ? 'stop' : 'length');
      expect(usage).toMatchObject({ inputTokens: sources[cases[i].source].length, outputTokens: ids.length });
      expect(usage.compute.ratio).toBe(1);
      const alone = await written(model, sources[cases[i].source]);
      expect(alone.ids).toEqual(ids);
      expect(alone.logprobs).toEqual(logprobs);
      expect(alone.usage.compute.flops).toBe(alone.usage.compute.flopsFull);
      expect([...alone.usage.compute.layersRun.attn]).toEqual(new Array(model.info.layers).fill(1));
      // Nothing that changes scores is on: their sum is that of the log-probabilities.
      if (cases[i].score !== null && !('min_length' in settings)) {
        const sum = logprobs.reduce((a, b) => a + b, 0);
        expect(sum / ids.length ** (settings.length_penalty ?? 1)).toBeCloseTo(cases[i].score, 3);
      }
    }
  });

  it('takes the settings of beam search as options', async () => {
    const asked = generations.filter(({ settings }) => 'num_beams' in settings && !('min_length' in settings));
    await using model = await loadModel(configured(name, special));
    for (const { source, settings, ids } of asked) {
      const { num_beams, length_penalty, early_stopping, max_length } = settings as Record<string, never>;
      const options = {
        beams: num_beams,
        maxTokens: max_length - 1,
        ...(length_penalty !== undefined && { lengthPenalty: length_penalty }),
        ...(early_stopping !== undefined && { earlyStopping: early_stopping }),
      };
      expect((await written(model, sources[source], options)).ids).toEqual(ids);
    }
  });
});

it('a head of its own counts', async () => {
  await using tied = await loadModel(seq2seqDirectory('t5'));
  await using own = await loadModel(seq2seqDirectory('t5-gated'));
  // A gate in each of four layers, and the head.
  expect(own.info.parameters - tied.info.parameters).toBe(4 * 24 * 40 + 26 * 24);
  expect(own.info.maxContext).toBe(20);
});

describe('sampling', () => {
  const { sources, special } = readSeq2SeqCases('bart');

  it('is seeded, follows the model, and keeps to what is allowed', async () => {
    await using model = await loadModel(configured('bart', { ...special, max_length: 12 }));
    const draw = (seed: number) => written(model, sources[2], { temperature: 1.5, seed, topK: 6 });
    const texts = await Promise.all(Array.from({ length: 8 }, (_, seed) => draw(seed)));
    expect(new Set(texts.map(({ ids }) => ids.join())).size).toBeGreaterThan(2);
    expect((await draw(3)).ids).toEqual(texts[3].ids);
    await using strict = await loadModel(configured('bart', { ...special, max_length: 12, bad_words_ids: [[3], [5]] }));
    for (const [seed, { ids }] of texts.entries()) {
      const kept = await written(strict, sources[2], { temperature: 1.5, seed, topK: 6 });
      expect(kept.ids.some((id) => id === 3 || id === 5)).toBe(false);
      if (!ids.some((id) => id === 3 || id === 5)) expect(kept.logprobs[0]).toBeCloseTo(texts[seed].logprobs[0], 5);
    }
  });
});

describe('many at a time', () => {
  const { sources, special } = readSeq2SeqCases('marian');

  it('wait for places, and end when they are told to', async () => {
    const directory = configured('marian', { ...special, max_length: 12 });
    await using model = await loadModel(directory, { maxSequences: 4 });
    const options = [{}, { beams: 3 }, { beams: 4 }, { temperature: 1, seed: 7 }];
    const alone = [];
    for (const [i, option] of options.entries()) alone.push((await written(model, sources[i % 3], option)).ids);
    const many = Array.from({ length: 24 }, (_, i) => written(model, sources[(i % 4) % 3], options[i % 4]));
    for (const [i, { ids }] of (await Promise.all(many)).entries()) expect(ids).toEqual(alone[i % 4]);

    const stop = new AbortController();
    const stopped = written(model, sources[2], { signal: stop.signal });
    const other = written(model, sources[0]);
    stop.abort();
    expect(await stopped).toMatchObject({ reason: 'abort' });
    expect((await other).ids).toEqual(alone[0]);
    const stream = model.generate(sources[2]);
    for await (const _ of stream) break;
    expect(await stream.finishReason).toMatch(/abort|stop/);
    // The last of many has no turn before its time is over.
    const ahead = Array.from({ length: 12 }, () => written(model, sources[2], { beams: 4 }));
    expect((await written(model, sources[0], { beams: 4, deadlineMs: 1e-3 })).reason).toBe('deadline');
    await Promise.all(ahead);
    // Nothing was lost of the places and pages of those that ended early.
    expect((await written(model, sources[2], { beams: 4 })).ids).toEqual(alone[2]);
  });

  it('end when the model is disposed of', async () => {
    const model = await loadModel(configured('marian', { ...special, max_length: 12 }));
    const running = [written(model, sources[0]), written(model, sources[1], { beams: 2 })];
    await model.dispose();
    for (const { reason } of await Promise.all(running)) expect(reason).toBe('abort');
    expect(() => model.generate(sources[0])).toThrow(/disposed/);
  });
});

describe('bad input', () => {
  const { sources, special } = readSeq2SeqCases('bart');

  it('is refused at once, with what to do', async () => {
    await using model = await loadModel(configured('bart', special), { maxContext: 12, maxSequences: 8 });
    expect(model.info).toMatchObject({ task: 'seq2seq-lm', architecture: 'bart', layers: 3, maxContext: 12 });
    const refused: [readonly number[] | string, GenerateOptions, RegExp][] = [
      [new Array(13).fill(5), {}, /has 13 tokens and the context holds 12/],
      [[], {}, /source is empty/],
      [[5, 26], {}, /token 1 must be an id from 0 to 25/],
      ['a text', {}, /needs a tokenizer/],
      [sources[0], { beams: 0 }, /beams must be an integer from 1 to 64/],
      [sources[0], { beams: 9 }, /maxSequences 8/],
      [sources[0], { beams: 2, temperature: 1 }, /beams are searched without a temperature/],
      [sources[0], { lengthPenalty: Number.NaN }, /lengthPenalty/],
      [sources[0], { earlyStopping: 'soon' as never }, /earlyStopping/],
      [sources[0], { budget: 0.5 }, /needs modules, and this model has none/],
      [sources[0], { speculative: { draft: 0.5 } }, /speculative/],
    ];
    for (const [source, options, message] of refused) expect(() => model.generate(source, options)).toThrow(message);
    await expect(model.embed(['a'])).rejects.toThrow(/embed.*encoder-decoder model.*runs generate alone/);
    await expect(model.score([[1, 2]])).rejects.toThrow(/score.*encoder-decoder model/);
    await expect(loadModel(seq2seqDirectory('bart'), { adapter: 'x' })).rejects.toThrow(/adapter is for decoders/);
    await expect(loadModel(seq2seqDirectory('bart'), { maxContext: 21 })).rejects.toThrow(/at most 20/);
    await using small = await loadModel(configured('bart', special), { kvCacheBytes: 2 * 2 * 3 * 24 * 4 * 16 });
    expect(() => small.generate(sources[0], { beams: 2, maxTokens: 9 })).toThrow(/larger kvCacheBytes/);
    expect((await written(small, sources[0], { beams: 2, maxTokens: 8 })).ids.length).toBeGreaterThan(0);
  });

  it.each<[Record<string, unknown>, RegExp]>([
    [{ repetition_penalty: 1.3 }, /generation_config.json: repetition_penalty must be 1/],
    [{ suppress_tokens: [4] }, /suppress_tokens must be absent/],
    [{ forced_bos_token_id: 26 }, /forced_bos_token_id must be token ids below 26/],
    [{ bad_words_ids: [3] }, /bad_words_ids must be lists/],
    [{ num_beams: 0 }, /num_beams must be an integer/],
    [{ early_stopping: 'maybe' }, /early_stopping must be/],
    [{ length_penalty: 'long' }, /length_penalty must be a number/],
  ])('settings %o are refused', async (settings, message) => {
    await expect(loadModel(configured('bart', { ...special, ...settings }))).rejects.toThrow(message);
  });

  it('needs to know what a target starts from', async () => {
    const directory = configured('bart', {});
    const path = join(directory, 'config.json');
    const { decoder_start_token_id: _, bos_token_id: __, ...config } = JSON.parse(readFileSync(path, 'utf8'));
    writeFileSync(path, JSON.stringify(config));
    await expect(loadModel(directory)).rejects.toThrow(/decoder_start_token_id must be the token/);
    // Without a generation_config.json it is config.json that says.
    rmSync(join(directory, 'generation_config.json'));
    writeFileSync(path, JSON.stringify({ ...config, decoder_start_token_id: 2, num_beams: 2 }));
    await using model = await loadModel(directory);
    expect((await written(model, sources[0], { maxTokens: 3 })).ids.length).toBeGreaterThan(0);
  });
});

const g2p = join(process.env.ELASTIFORM_DATA ?? '', 'bart-g2p-us');

describe.skipIf(!process.env.ELASTIFORM_DATA || !existsSync(g2p))('letters to phonemes', () => {
  it('is what its reference says, texts in and texts out', async () => {
    const { words } = JSON.parse(readFileSync(join(g2p, 'reference.json'), 'utf8')) as {
      words: Record<string, Record<'input_ids' | 'greedy_ids' | 'beam4_ids', number[]> & { greedy: string }>;
    };
    await using model = await loadModel(g2p);
    for (const [word, { input_ids, greedy_ids, greedy, beam4_ids }] of Object.entries(words)) {
      const stream = model.generate(word);
      expect((await stream.usage).inputTokens).toBe(input_ids.length);
      expect(await stream.ids).toEqual(greedy_ids.slice(1));
      expect(await stream.text).toBe(greedy);
      expect((await written(model, word, { beams: 4 })).ids).toEqual(beam4_ids.slice(1));
    }
  });
});
