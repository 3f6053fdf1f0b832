// Encoders through the API: classes, vectors, features and scores against transformers, in company and alone, and what is refused.
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { describe, expect, it } from 'vitest';
import { type ElasticModel, loadModel } from '../../lib/infer/model.js';
import { evaluate } from '../../lib/infer/quality/evaluate.js';
import type { ComputeReport, TextInput } from '../../lib/infer/types.js';
import { loadAddon } from '../../lib/native/index.js';
import { encoderDirectory, largestDifference, readCases, readVectors } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';

const decoder = resolve(import.meta.dirname, '../../models/tiny');
const inputsOf = (name: string): TextInput[] =>
  readCases(name).map(({ texts: [a, b] }) => (b === undefined ? a : ([a, b] as const)));
const vectorsOf = (name: string) => readVectors(join(encoderDirectory(name), 'encoder.safetensors'));

/** A copy of an encoder's directory with one file edited. */
function edited(name: string, file: string, edit: (json: never) => unknown): string {
  const directory = temporaryDirectory();
  cpSync(encoderDirectory(name), directory, { recursive: true });
  const path = join(directory, file);
  writeFileSync(path, JSON.stringify(edit(JSON.parse(readFileSync(path, 'utf8')) as never)));
  return directory;
}

async function refused(call: () => Promise<unknown> | unknown, message: string): Promise<void> {
  const error = await (async () => call())().then(
    () => null,
    (error: Error) => error,
  );
  expect(error?.message).toContain(message);
}

describe('classify', () => {
  const exp = (logits: ArrayLike<number>) => Array.from(logits, Math.exp);
  it.each<[string, (logits: ArrayLike<number>) => number[], string[]]>([
    ['bert-classes', (l) => exp(l).map((e) => e / exp(l).reduce((a, b) => a + b)), ['bad', 'fair', 'good']],
    ['roberta-classes', (l) => exp(l).map((e) => e / (1 + e)), ['bad', 'fair', 'good']],
    ['distilbert-score', (l) => Array.from(l), ['LABEL_0']],
  ])('%s scores as the pipelines of transformers', async (name, scores, labels) => {
    await using model = await loadModel(encoderDirectory(name));
    expect(model.info).toMatchObject({ task: 'sequence-classification', labels });
    const golden = vectorsOf(name);
    const results = await model.classify(inputsOf(name));
    for (const [i, { truncated }] of readCases(name).entries()) {
      const expected = scores(golden[`logits.${i}`]);
      const best = Math.max(...expected);
      expect(results[i]).toMatchObject({ label: labels[expected.indexOf(best)], truncated, compute: { ratio: 1 } });
      expect(results[i].score).toBeCloseTo(best, 4);
      expect(results[i].scores.map(({ score }) => score)).toEqual(
        results[i].scores.map((s) => s.score).sort((a, b) => b - a),
      );
      for (const { label, score } of results[i].scores) expect(score).toBeCloseTo(expected[labels.indexOf(label)], 4);
      expect([...results[i].compute.layersRun.attn, ...results[i].compute.layersRun.mlp]).toEqual([1, 1, 1, 1]);
    }
  });

  it('gives every text the bits that it gets alone, whatever the batch', async () => {
    await using model = await loadModel(encoderDirectory('bert-classes'));
    const many = [...inputsOf('bert-classes'), ...inputsOf('bert-classes').reverse()];
    const plain = async (batch: number) =>
      (await model.classify(many, { batch })).map(({ compute: { flops }, ...result }) => ({ ...result, flops }));
    const alone = await plain(1);
    for (const batch of [2, 3, 64, 256]) expect(await plain(batch)).toEqual(alone);
    expect(alone.slice(0, many.length / 2)).toEqual(alone.slice(many.length / 2).reverse());
    expect((await model.classify('The cat walks.'))[0]).toMatchObject({ label: alone[0].label, score: alone[0].score });
    expect(await model.classify([])).toEqual([]);
    // More tokens than one run takes.
    const long = await model.classify(new Array(200).fill(many[6]), { batch: 256 });
    expect(long.map(({ score }) => score)).toEqual(new Array(200).fill(alone[6].score));
  });
});

describe('embed', () => {
  it('has the vectors of sentence-transformers', async () => {
    await using model = await loadModel(encoderDirectory('minilm'));
    expect(model.info).toMatchObject({ task: 'feature-extraction', labels: [], maxContext: 16, maxPositions: 24 });
    const golden = vectorsOf('minilm');
    const { vectors, dims, truncated, usage } = await model.embed(inputsOf('minilm'));
    const cases = readCases('minilm');
    expect(dims).toBe(24);
    expect(truncated).toEqual(cases.map((c) => c.truncated));
    expect(usage.inputTokens).toBe(cases.reduce((sum, { ids }) => sum + ids.length, 0));
    expect(usage.compute.ratio).toBe(1);
    for (const [i, vector] of vectors.entries())
      expect(largestDifference(vector, golden[`embedding.${i}`])).toBeLessThan(1e-5);
  });

  it('pools, cuts and normalises as asked, and says which vectors can be compared', async () => {
    await using model = await loadModel(encoderDirectory('minilm'));
    const inputs = inputsOf('minilm').slice(0, 3);
    const { hidden } = model.info;
    const spaces = new Set<string>();
    for (const options of [{}, { pooling: 'cls' }, { pooling: 'last' }, { normalize: false }, { dims: 5 }] as const) {
      const { vectors, spaceId } = await model.embed(inputs, options);
      spaces.add(spaceId);
      expect((await model.embed([inputs[1]], { ...options, batch: 1 })).vectors[0]).toEqual(vectors[1]);
      expect((await model.embed(inputs, options)).spaceId).toBe(spaceId);
      const features = await model.features(inputs[1]);
      const rows = Array.from({ length: features.length / hidden }, (_, r) =>
        features.slice(r * hidden, (r + 1) * hidden),
      );
      const pooling = 'pooling' in options ? options.pooling : 'mean';
      const mean = Array.from({ length: hidden }, (_, d) => rows.reduce((sum, row) => sum + row[d], 0) / rows.length);
      const pooled = [...(pooling === 'mean' ? mean : rows.at(pooling === 'cls' ? 0 : -1)!)].slice(
        0,
        'dims' in options ? 5 : hidden,
      );
      const length = 'normalize' in options ? 1 : Math.hypot(...pooled);
      expect(
        largestDifference(
          vectors[1],
          pooled.map((x) => x / length),
        ),
      ).toBeLessThan(1e-6);
    }
    expect(spaces.size).toBe(5);
    await using same = await loadModel(edited('minilm', 'cases.json', () => []));
    await using other = await loadModel(
      edited('minilm', 'config.json', (config: object) => ({ ...config, layer_norm_eps: 1e-3 })),
    );
    expect((await same.embed(inputs)).spaceId).toBe((await model.embed(inputs)).spaceId);
    expect((await other.embed(inputs)).spaceId).not.toBe((await model.embed(inputs)).spaceId);
  });

  it('of a directory that says nothing is the mean of features, of a cut text that of what is left', async () => {
    await using model = await loadModel(encoderDirectory('xlm-roberta'), { maxContext: 4 });
    const [{ vectors, truncated }, features] = [
      await model.embed('The cat walks.'),
      await model.features('The cat walks.'),
    ];
    expect(features).toHaveLength(4 * model.info.hidden);
    expect(truncated[0]).toBe(readCases('xlm-roberta')[0].ids.length - 4);
    const mean = vectors[0].map(
      (_, d) => [0, 1, 2, 3].reduce((sum, r) => sum + features[r * model.info.hidden + d], 0) / 4,
    );
    expect(largestDifference(vectors[0], mean)).toBeLessThan(1e-6);
  });
});

describe('windows', () => {
  const words = 'the cat saw the dog by the lake and the owl met a hen on the hill while the fox ran to the barn'.split(
    ' ',
  );
  const long = Array.from({ length: 60 }, (_, i) => words[(7 * i) % words.length]).join(' ');

  /** A text's windows as token ids, cut by plain loops: of the tokens between the special ones of both ends. */
  const windowsOf = (whole: readonly number[], room: number, overlap: number): number[][] => {
    const inner = whole.slice(1, -1);
    const cut: number[][] = [];
    for (let at = 0; ; at += room - overlap) {
      cut.push([whole[0], ...inner.slice(at, at + room), whole.at(-1)!]);
      if (at + room >= inner.length) return cut;
    }
  };

  it.each([0, 3, 7])('of an overlap of %i give the mean of what each gives alone', async (overlap) => {
    await using model = await loadModel(encoderDirectory('minilm'));
    const { tokenizer } = model.encoder.network;
    const whole = tokenizer!.encode(long);
    const cut = windowsOf(whole, 14, overlap);
    expect(cut.length).toBeGreaterThan(3);
    const options = { normalize: false, windows: { overlap } };
    const result = await model.embed([long, 'the cat', long], { ...options, batch: 3 });
    expect(result.windows).toEqual([cut.length, 1, cut.length]);
    expect(result.truncated).toEqual([0, 0, 0]);
    const each = await model.embed(cut, { normalize: false });
    const tokens = cut.reduce((sum, ids) => sum + ids.length, 0);
    const mean = result.vectors[0].map((_, d) =>
      cut.reduce((sum, ids, w) => sum + (ids.length / tokens) * each.vectors[w][d], 0),
    );
    expect(largestDifference(result.vectors[0], mean)).toBeLessThan(1e-6);
    expect(result.vectors[2]).toEqual(result.vectors[0]);
    expect(result.vectors[1]).toEqual((await model.embed('the cat', { normalize: false })).vectors[0]);
    // Each text's own report is of its windows, and all together that of the call.
    const sum = (flops: (compute: ComputeReport) => number, all: readonly ComputeReport[]) =>
      all.reduce((total, compute) => total + flops(compute), 0);
    expect(result.compute[0].flops).toBe(sum(({ flops }) => flops, each.compute));
    expect(result.usage.compute.flops).toBe(sum(({ flops }) => flops, result.compute));
    expect(result.usage.compute.flopsFull).toBe(sum(({ flopsFull }) => flopsFull, result.compute));
    expect(result.usage.inputTokens).toBe(2 * tokens + tokenizer!.encode('the cat').length);
    expect([...result.compute[0].layersRun.attn].map((share) => +share.toFixed(5))).toEqual([1, 1]);
    const vectors = (batch: number) =>
      model.embed([long, 'the cat', long], { ...options, batch }).then((r) => r.vectors);
    expect(await vectors(64)).toEqual(await vectors(1));
  });

  it('of a classifier give the mean of scores; of a pair the longer text is divided', async () => {
    await using model = await loadModel(encoderDirectory('bert-classes'));
    const { tokenizer } = model.encoder.network;
    const cut = windowsOf(tokenizer!.encode(long), 22, 5);
    const [result] = await model.classify([long], { windows: { overlap: 5 } });
    const each = await model.classify(cut);
    const tokens = cut.reduce((sum, ids) => sum + ids.length, 0);
    for (const { label, score } of result.scores) {
      const of = (w: number) => each[w].scores.find((own) => own.label === label)!.score;
      expect(score).toBeCloseTo(
        cut.reduce((sum, ids, w) => sum + (ids.length / tokens) * of(w), 0),
        12,
      );
    }
    expect(result).toMatchObject({ windows: cut.length, truncated: 0, compute: { ratio: 1 } });
    expect(result.compute.flops).toBe(each.reduce((sum, { compute }) => sum + compute.flops, 0));

    const short = tokenizer!.encode('the cat', { addSpecialTokens: false });
    const rest = tokenizer!.encode(long, { addSpecialTokens: false });
    const [first, second] = [tokenizer!, tokenizer!].map((own, i) =>
      own.encodeWindows(i === 0 ? 'the cat' : long, { pair: i === 0 ? long : 'the cat', maxTokens: 24, overlap: 4 }),
    );
    const most = 24 - 3 - short.length;
    const parts = Math.ceil((rest.length - most) / (most - 4)) + 1;
    for (const [w, { ids, types }] of first.entries()) {
      const part = rest.slice(w * (most - 4), w * (most - 4) + most);
      const [cls, sep] = [ids[0], ids.at(-1)!];
      expect(ids).toEqual([cls, ...short, sep, ...part, sep]);
      expect(types).toEqual([...new Array(short.length + 2).fill(0), ...new Array(part.length + 1).fill(1)]);
      expect(second[w].ids).toEqual([cls, ...part, sep, ...short, sep]);
    }
    expect([first.length, second.length]).toEqual([parts, parts]);
    // Two long ones: the second is as long, so it is cut to half the room and the first divided.
    const both = tokenizer!.encodeWindows(long, { pair: long, maxTokens: 24, overlap: 4 });
    expect(both[0].truncated).toBe(rest.length - 10);
    expect(both.every(({ ids }) => ids.length <= 24)).toBe(true);
    expect(both.length).toBe(Math.ceil((rest.length - 11) / 7) + 1);
  });
});

it('logits and features are those of transformers, of texts and of ids', async () => {
  for (const name of ['bert-mlm', 'roberta-classes']) {
    await using model = await loadModel(encoderDirectory(name));
    const golden = vectorsOf(name);
    const inputs = inputsOf(name);
    for (const i of [0, 2]) {
      expect(largestDifference(await model.logits(inputs[i]), golden[`logits.${i}`])).toBeLessThan(1e-4);
      expect(largestDifference(await model.features(inputs[i]), golden[`hidden.${i}`])).toBeLessThan(1e-4);
    }
    const { ids } = readCases(name)[0];
    expect(await model.logits(ids)).toEqual(await model.logits(inputs[0]));
    expect((await model.embed([inputs[2], ids])).vectors[1]).toEqual((await model.embed([inputs[0]])).vectors[0]);
  }
});

describe('refuses', () => {
  const using = async (name: string, call: (model: ElasticModel) => Promise<unknown> | unknown, message: string) => {
    await using model = await loadModel(name);
    await refused(() => call(model), message);
  };
  const bert = encoderDirectory('bert');
  const classes = encoderDirectory('bert-classes');

  it.each<[string, (model: ElasticModel) => Promise<unknown> | unknown]>([
    ['generate', (model) => model.generate('a')],
    ['score', (model) => model.score(['a'])],
    ['trace', (model) => model.trace('a')],
    ['model', (model) => evaluate(model, { data: ['a'] })],
  ])('%s of an encoder', (api, call) =>
    using(bert, call, `[${api}] ${bert} is an encoder (bert, feature-extraction), and this needs a decoder`),
  );

  it.each<[string, (model: ElasticModel) => Promise<unknown>]>([
    ['classify', (model) => model.classify('a')],
    ['embed', (model) => model.embed('a')],
    ['features', (model) => model.features('a')],
  ])('%s of a decoder', (api, call) =>
    using(decoder, call, `[${api}] ${decoder} is a decoder (llama, causal-lm), and this needs an encoder`),
  );

  it.each<[string, (model: ElasticModel) => Promise<unknown>, string]>([
    [bert, (model) => model.classify('a'), 'has no classifier: it is a bert model for feature-extraction'],
    [bert, (model) => model.logits('a'), 'has no head'],
    [classes, (model) => model.classify(['a', '']), '[classify] text 1 is empty'],
    [classes, (model) => model.classify([['a', '']]), '[classify] text 0 is empty'],
    [classes, (model) => model.classify([['a', 'b', 'c'] as never]), '[classify] text 0 must be a text or a pair'],
    [classes, (model) => model.classify([null as never]), '[classify] text 0 must be a text or a pair'],
    [classes, (model) => model.classify({} as never), '[classify] texts must be a list'],
    [classes, (model) => model.classify('a', { windows: { overlap: 13 } }), 'windows must be { overlap } of 0 to 12'],
    [bert, (model) => model.embed('a', { windows: true as never }), '[embed] windows must be { overlap }'],
    [classes, (model) => model.classify('a', { batch: 257 }), '[classify] batch must be an integer from 1 to 256'],
    [
      classes,
      (model) => model.classify('a', { budget: 0.5 }),
      'has the full budget alone: it has no exits and no nested',
    ],
    [
      classes,
      (model) => model.classify('a', { budget: { latencyMs: 5 } }),
      'has the full budget alone: it has no exits and no nested',
    ],
    [classes, (model) => model.classify('a', { exit: true }), '[classify] exit must be absent: the model has no exits'],
    [bert, (model) => model.embed('a', { exit: true } as never), "[embed] unknown option 'exit'"],
    [bert, (model) => model.embed('a', { dims: 25 }), '[embed] dims must be an integer from 1 to 24, got 25'],
    [bert, (model) => model.embed('a', { pooling: 'max' as never }), '[embed] pooling must be one of mean, cls, last'],
    [bert, (model) => model.embed('a', { normalize: 1 as never }), '[embed] normalize must be true or false, got 1'],
    [bert, (model) => model.features([1, 90]), "text 0 has token id 90; the model's vocabulary ends at 89"],
    [bert, (model) => model.features(new Array(25).fill(1)), 'has 25 tokens, more than the context of 24'],
    [bert, (model) => model.logits('a', { budget: 0.5 }), "[logits] unknown option 'budget'"],
  ])('%#', using);

  it.each<[string, string, (json: never) => unknown, string]>([
    [
      'bert-classes',
      'config.json',
      (c: object) => ({ ...c, id2label: { 0: 'a' } }),
      'classifier.weight must have the shape [1,24]',
    ],
    ['minilm', 'modules.json', () => ({}), 'modules.json is not a list of modules'],
    [
      'minilm',
      'modules.json',
      (m: object[]) => [...m, { type: 'x.Dense' }],
      'type must be Transformer, Pooling and Normalize',
    ],
    ['minilm', 'modules.json', (m: object[]) => m.slice(0, 1), 'modules.json has no Pooling'],
    [
      'minilm',
      'modules.json',
      (m: object[]) => [m[0], { ...m[1], path: '../x' }],
      'path must name a folder in the directory',
    ],
    ['minilm', '1_Pooling/config.json', () => ({ pooling_mode_max_tokens: true }), 'must pool in one way of'],
    [
      'minilm',
      '1_Pooling/config.json',
      () => ({ pooling_mode: 'max' }),
      'pooling_mode must be one of mean, cls, lasttoken',
    ],
    ['minilm', 'sentence_bert_config.json', () => ({ do_lower_case: true }), 'do_lower_case must be false'],
  ])('a directory of %s with a bad %s', async (name, file, edit, message) => {
    const before = loadAddon().memory();
    await refused(() => loadModel(edited(name, file, edit)), message);
    expect(loadAddon().memory()).toEqual(before);
  });

  it('options of decoders, and contexts beyond the positions', async () => {
    await refused(() => loadModel(bert, { adapter: bert }), '[loadModel] adapter is for decoders');
    await refused(() => loadModel(bert, { maxLevel: 'p50' }), '[loadModel] maxLevel is for decoders');
    await refused(() => loadModel(bert, { maxContext: 25 }), "maxContext must be at most 24, the model's positions");
  });

  it('calls after it was disposed, and what was aborted', async () => {
    const model = await loadModel(classes);
    await expect(model.classify('a', { signal: AbortSignal.abort() })).rejects.toThrow('abort');
    await model.dispose();
    await refused(() => model.classify('a'), '[classify] the model was disposed');
  });
});
