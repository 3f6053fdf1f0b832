// Encoders against transformers: features and scores of texts and pairs by every architecture and head, and their counters.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Graph, type Node, Program } from '../../lib/graph/index.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { loadTokenizer } from '../../lib/io/tokenizer.js';
import { encoder, headLogits, type Pooling, pool } from '../../lib/model/encoder.js';
import { encoderSpecFromConfig } from '../../lib/model/encoder_spec.js';
import {
  bindEncoder,
  type EncoderTensors,
  encoderParameters,
  loadEncoderWeights,
} from '../../lib/model/encoder_weights.js';
import { encoderFlops } from '../../lib/model/flops.js';
import { type Selector, selectEverything } from '../../lib/model/select.js';
import { type EncoderSpec, specFromConfig } from '../../lib/model/spec.js';
import { InvalidFileError } from '../../lib/native/errors.js';
import { Engine } from '../../lib/native/index.js';
import { encoderDirectory, largestDifference, positionsOf, readCases, readVectors } from './golden.js';

let engine: Engine;
beforeAll(() => {
  engine = new Engine();
});
afterAll(() => engine.dispose());

const readJson = (name: string) => JSON.parse(readFileSync(join(encoderDirectory(name), 'config.json'), 'utf8'));
const specOf = (name: string) => encoderSpecFromConfig(readJson(name), `${name}/config.json`);

interface Text {
  readonly ids: readonly number[];
  readonly types: readonly number[];
}

/** Texts packed end to end, through the whole model. */
async function forward(
  spec: EncoderSpec,
  weights: EncoderTensors,
  texts: readonly Text[],
  end: 'head' | Pooling | 'none' = 'none',
  select: (graph: Graph) => Selector = () => selectEverything,
) {
  const offsets = [0];
  for (const { ids } of texts) offsets.push(offsets.at(-1)! + ids.length);
  const graph = new Graph();
  const rows = graph.dim('rows', offsets.at(-1)!);
  const feed = (name: string, shape: Parameters<Graph['feed']>[2] = [rows]) => graph.feed(name, 'i32', shape);
  const nodes = bindEncoder(graph, weights);
  const inputs = { ids: feed('ids'), positions: feed('positions'), offsets: feed('offsets', [offsets.length]) };
  const types = spec.encoder.tokenTypes > 0 ? { types: feed('types') } : {};
  const residuals: Node[] = [];
  const x = encoder(graph, spec, nodes, { ...inputs, ...types }, select(graph), { residuals });
  graph.output('hidden', x);
  const first = feed('first', [texts.length]);
  const classifies = spec.encoder.task === 'sequence-classification';
  if (end === 'head') graph.output('logits', headLogits(graph, spec, nodes, x, classifies ? first : null));
  else if (end !== 'none') {
    graph.output('pooled', pool(graph, x, inputs.offsets, first, end));
  }
  using program = Program.compile(graph, engine);
  const result = await program.run({
    dims: { rows: offsets.at(-1)! },
    feeds: {
      ids: Int32Array.from(texts.flatMap(({ ids }) => ids)),
      ...(types.types && {
        types: Int32Array.from(
          texts.flatMap(({ types }) => types),
          (type) => Math.min(type, spec.encoder.tokenTypes - 1),
        ),
      }),
      positions: positionsOf(offsets),
      offsets: Int32Array.from(offsets),
      first: Int32Array.from(texts, (_, s) => (end === 'last' ? offsets[s + 1] - 1 : offsets[s])),
    },
  });
  return { ...result, offsets, residuals };
}

describe.each(readdirSync(encoderDirectory('')))('%s', (name) => {
  const directory = encoderDirectory(name);
  const golden = readVectors(join(directory, 'encoder.safetensors'));
  const cases = readCases(name);
  const spec = specOf(name);
  using checkpoint = Checkpoint.open(directory);
  const { weights, unused } = loadEncoderWeights(spec, checkpoint);
  const end = spec.encoder.task === 'feature-extraction' ? 'none' : 'head';
  const lengths = cases.map(({ ids }) => ids.length);

  it('has the features and scores of transformers', async () => {
    const { outputs, offsets } = await forward(spec, weights, cases, end);
    for (const [i] of cases.entries()) {
      const of = (all: ArrayLike<number>, width: number) =>
        Array.prototype.slice.call(all, offsets[i] * width, offsets[i + 1] * width);
      expect(largestDifference(of(outputs.hidden, spec.hidden), golden[`hidden.${i}`])).toBeLessThan(1e-4);
      if (spec.encoder.task === 'masked-lm')
        expect(largestDifference(of(outputs.logits, spec.vocab), golden[`logits.${i}`])).toBeLessThan(1e-4);
      if (spec.encoder.task === 'sequence-classification') {
        const { length } = spec.encoder.labels;
        const scores = outputs.logits.slice(i * length, (i + 1) * length);
        expect(largestDifference(scores, golden[`logits.${i}`])).toBeLessThan(1e-4);
      }
    }
  });

  it('gives a text in company the bits that it gets alone', async () => {
    const together = await forward(spec, weights, cases, end);
    for (const [i, text] of cases.entries()) {
      const alone = await forward(spec, weights, [text], end);
      const { hidden } = spec;
      const [from, to] = together.offsets.slice(i);
      expect(alone.outputs.hidden).toEqual(together.outputs.hidden.slice(from * hidden, to * hidden));
      if (end === 'none') continue;
      const width = alone.outputs.logits.length / (spec.encoder.task === 'masked-lm' ? to - from : 1);
      const rows = spec.encoder.task === 'masked-lm' ? [from, to] : [i, i + 1];
      expect(alone.outputs.logits).toEqual(together.outputs.logits.slice(rows[0] * width, rows[1] * width));
    }
  });

  it('counts what the formula says', async () => {
    for (const last of [end, 'mean', 'cls'] as const) {
      const { counters } = await forward(spec, weights, cases, last);
      const total = Object.values(counters).reduce((sum, { flops }) => sum + flops, 0);
      expect(total).toBe(encoderFlops(spec, lengths, last === 'head' ? last : 'none'));
      expect(counters['L1.attn'].rows).toBe(lengths.reduce((a, b) => a + b));
    }
  });

  it('has the tokens of the tokenizers library, cut to what fits', async () => {
    const tokenizer = await loadTokenizer(directory);
    const maxTokens = name === 'minilm' ? 16 : 24;
    for (const { texts, ids, types, truncated } of cases) {
      const encoded = tokenizer.encodeInput(texts[0], { pair: texts[1], maxTokens });
      expect({ ...encoded, types: spec.encoder.tokenTypes > 1 ? encoded.types : types }).toEqual({
        ids,
        types,
        truncated,
      });
    }
  });

  it('uses all of the file but what other heads need', () => {
    const pooler = ['pooler.dense.bias', 'pooler.dense.weight'];
    const others = spec.encoder.task === 'feature-extraction' ? pooler : spec.tied ? [] : ['cls.predictions.bias'];
    expect(unused).toEqual(others);
    const sizes = new Map(checkpoint.names().map((name) => [name, elements(checkpoint.info(name).shape)]));
    const stored = [...sizes.values()].reduce((sum, size) => sum + size, 0);
    const skipped = spec.encoder.firstPosition * spec.hidden;
    const left = others.reduce((sum, name) => sum + sizes.get(name)!, skipped);
    expect(encoderParameters(spec) + left).toBe(stored);
  });
});

const elements = (shape: readonly number[]) => shape.reduce((a, b) => a * b, 1);

it.each<[{ pair?: string }, number]>([
  [{}, 3],
  [{ pair: 'saw' }, 4],
  [{ pair: 'saw saw saw' }, 6],
])(
  'texts are cut to what they are allowed, which must be more than special tokens: %j, %i',
  async (options, maxTokens) => {
    const tokenizer = await loadTokenizer(encoderDirectory('bert'));
    const specials = 'pair' in options ? 3 : 2;
    expect(tokenizer.encodeInput('saw saw', { ...options, maxTokens }).ids).toHaveLength(maxTokens);
    expect(() => tokenizer.encodeInput('saw', { ...options, maxTokens: specials })).toThrow(
      `[tokenizer] no text fits ${specials} tokens beside the special tokens`,
    );
  },
);

describe('pooling', () => {
  const spec = specOf('minilm');
  using checkpoint = Checkpoint.open(encoderDirectory('minilm'));
  const { weights } = loadEncoderWeights(spec, checkpoint);
  const texts = readCases('minilm').slice(0, 3);

  it.each(['mean', 'cls', 'last'] as const)('%s is what it says, in company and alone', async (pooling) => {
    const { outputs, offsets } = await forward(spec, weights, texts, pooling);
    for (const [s, text] of texts.entries()) {
      const rows = Array.from({ length: offsets[s + 1] - offsets[s] }, (_, r) =>
        outputs.hidden.subarray((offsets[s] + r) * spec.hidden, (offsets[s] + r + 1) * spec.hidden),
      );
      const expected = Array.from({ length: spec.hidden }, (_, d) =>
        pooling === 'mean'
          ? rows.reduce((sum, row) => sum + row[d], 0) / rows.length
          : rows.at(pooling === 'cls' ? 0 : -1)![d],
      );
      const pooled = outputs.pooled.subarray(s * spec.hidden, (s + 1) * spec.hidden);
      expect(largestDifference(pooled, expected)).toBeLessThan(pooling === 'mean' ? 1e-6 : 1e-30);
      const alone = await forward(spec, weights, [text], pooling);
      expect(alone.outputs.pooled).toEqual(pooled);
    }
  });
});

describe('selection', () => {
  const spec = specOf('bert');
  using checkpoint = Checkpoint.open(encoderDirectory('bert'));
  const { weights } = loadEncoderWeights(spec, checkpoint);
  const texts = readCases('bert').slice(0, 3);

  it('of all units gives the bits of none, of some other ones', async () => {
    const full = await forward(spec, weights, texts);
    const widthOf = (units: number) =>
      forward(spec, weights, texts, 'none', () => ({ ...selectEverything, width: () => units }));
    expect((await widthOf(spec.ffn)).outputs.hidden).toEqual(full.outputs.hidden);
    expect(largestDifference((await widthOf(spec.ffn / 2)).outputs.hidden, full.outputs.hidden)).toBeGreaterThan(1e-3);
  });

  it('of no sub-layer leaves the embeddings', async () => {
    const none = await forward(spec, weights, texts, 'none', () => ({ runs: () => false, rows: () => null }));
    expect(Object.keys(none.counters)).toEqual(['embed']);
  });
});

describe('encoderSpecFromConfig', () => {
  const bert = readJson('bert-classes');
  const read = (config: object) => encoderSpecFromConfig(JSON.parse(JSON.stringify(config)), 'dir/config.json');

  it('has the defaults of transformers', () => {
    expect(read({ model_type: 'bert' })).toMatchObject({
      ...{
        family: 'bert',
        layers: 12,
        hidden: 768,
        ffn: 3072,
        heads: 12,
        headDim: 64,
        vocab: 30522,
        maxPositions: 512,
      },
      ...{ eps: 1e-12, act: 'gelu', tied: true, normPlace: 'post' },
      encoder: { task: 'feature-extraction', tokenTypes: 2, firstPosition: 0, labels: [] },
    });
    expect(read({ model_type: 'distilbert', architectures: ['DistilBertForSequenceClassification'] })).toMatchObject({
      ...{ family: 'distilbert', layers: 6, hidden: 768, ffn: 3072, heads: 12, vocab: 30522 },
      encoder: { tokenTypes: 0, headAct: 'relu', labels: ['LABEL_0', 'LABEL_1'], scores: 'softmax' },
    });
    expect(read({ model_type: 'xlm-roberta', max_position_embeddings: 514 })).toMatchObject({
      ...{ family: 'roberta', type: 'xlm-roberta', vocab: 50265, maxPositions: 512 },
      encoder: { firstPosition: 2 },
    });
  });

  it.each<[object, string]>([
    [{ ...bert, hidden_size: 25 }, 'num_attention_heads must divide hidden_size 25, got 3'],
    [{ ...bert, is_decoder: true }, 'is_decoder must be false, got true'],
    [{ ...bert, position_embedding_type: 'relative_key' }, 'position_embedding_type must be absolute'],
    [
      { ...bert, architectures: ['BertForTokenClassification'] },
      'architectures must name a class that ends with one of',
    ],
    [{ ...bert, id2label: { 0: 'a', 2: 'b' } }, 'id2label.1 must name one of 2 classes'],
    [{ ...bert, id2label: { 0: 'a', 1: 'a' } }, 'id2label must name every class differently, got "a"'],
    [{ ...bert, problem_type: 'ranking' }, 'problem_type must be one of regression'],
    [{ ...readJson('roberta-mlm'), max_position_embeddings: 2 }, 'max_position_embeddings must be above 2'],
    [{ model_type: 'electra' }, 'model_type must be one of bert, roberta, xlm-roberta, distilbert, got "electra"'],
  ])('refuses %#', (config, message) => {
    expect(() => read(config)).toThrow(InvalidFileError);
    expect(() => read(config)).toThrow(`[config] dir/config.json: ${message}`);
  });

  it('is not for decoders, nor is theirs for encoders', () => {
    expect(() => specFromConfig(bert, 'dir/config.json')).toThrow(
      '[config] dir/config.json: model_type must be that of a decoder: encoders classify and embed texts, got "bert"',
    );
  });
});

describe('loadEncoderWeights', () => {
  it.each<[string, (config: Record<string, unknown>) => void, string]>([
    [
      'more classes than the head has',
      (c) => Object.assign(c, { id2label: { 0: 'a', 1: 'b', 2: 'c', 3: 'd' } }),
      'tensor classifier.weight must have the shape [4,24], got [3,24]',
    ],
    [
      'another vocabulary',
      (c) => Object.assign(c, { vocab_size: 91 }),
      'tensor bert.embeddings.word_embeddings.weight must have the shape [91,24], got [90,24]',
    ],
    [
      'another head',
      (c) => Object.assign(c, { architectures: ['BertForMaskedLM'] }),
      'has no tensor cls.predictions.transform.dense.weight, expected with shape [24,24]',
    ],
    [
      'more layers',
      (c) => Object.assign(c, { num_hidden_layers: 3 }),
      'has no tensor bert.encoder.layer.2.attention.self.query.weight',
    ],
  ])('refuses %s', (_, edit, message) => {
    const config = readJson('bert-classes');
    edit(config);
    using checkpoint = Checkpoint.open(encoderDirectory('bert-classes'));
    const load = () => loadEncoderWeights(encoderSpecFromConfig(config, 'config.json'), checkpoint);
    expect(load).toThrow(InvalidFileError);
    expect(load).toThrow(message);
  });
});
