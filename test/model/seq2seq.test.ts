// Encoder-decoder models against transformers: features of sources and logits of targets, packed and alone, and what is refused.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Graph, Program } from '../../lib/graph/index.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { decodeTarget, encodeSource, targetLogits } from '../../lib/model/seq2seq.js';
import { type Seq2SeqSpec, seq2seqSpecFromConfig } from '../../lib/model/seq2seq_spec.js';
import {
  bindSeq2Seq,
  distanceBucket,
  loadSeq2SeqWeights,
  type Seq2SeqTensors,
  seq2seqParameters,
} from '../../lib/model/seq2seq_weights.js';
import { specFromConfig } from '../../lib/model/spec.js';
import { InvalidFileError } from '../../lib/native/errors.js';
import { Engine } from '../../lib/native/index.js';
import {
  largestDifference,
  positionsOf,
  readSeq2SeqCases,
  readVectors,
  seq2seqDirectory,
  seq2seqNames,
} from './golden.js';

let engine: Engine;
beforeAll(() => {
  engine = new Engine();
});
afterAll(() => engine.dispose());

const readJson = (name: string) => JSON.parse(readFileSync(join(seq2seqDirectory(name), 'config.json'), 'utf8'));

/** Sources and targets packed end to end, through the whole model. */
async function forward(spec: Seq2SeqSpec, weights: Seq2SeqTensors, sources: number[][], targets: number[][]) {
  const graph = new Graph();
  const nodes = bindSeq2Seq(graph, weights);
  const segments = sources.length;
  const packed = (name: string, sequences: number[][]) => {
    const offsets = [0];
    for (const ids of sequences) offsets.push(offsets.at(-1)! + ids.length);
    const rows = graph.dim(`${name}Rows`, offsets.at(-1)!);
    const feed = (kind: string, size: typeof rows | number) => graph.feed(`${name}.${kind}`, 'i32', [size]);
    return {
      inputs: { ids: feed('ids', rows), positions: feed('positions', rows), offsets: feed('offsets', segments + 1) },
      dims: { [`${name}Rows`]: offsets.at(-1)! },
      feeds: {
        [`${name}.ids`]: Int32Array.from(sequences.flat()),
        [`${name}.positions`]: positionsOf(offsets),
        [`${name}.offsets`]: Int32Array.from(offsets),
      },
    };
  };
  const source = packed('source', sources);
  const target = packed('target', targets);
  const features = encodeSource(graph, spec, nodes, source.inputs);
  const x = decodeTarget(graph, spec, nodes, target.inputs, { features, offsets: source.inputs.offsets });
  graph.output('features', features);
  graph.output('logits', targetLogits(graph, spec, nodes, x));
  using program = Program.compile(graph, engine);
  const { outputs } = await program.run({
    dims: { ...source.dims, ...target.dims },
    feeds: { ...source.feeds, ...target.feeds },
  });
  return outputs;
}

describe.each(seq2seqNames)('%s', (name) => {
  const config = readJson(name);
  const spec = seq2seqSpecFromConfig(config, `${name}/config.json`);
  const { sources, targets } = readSeq2SeqCases(name);
  const golden = readVectors(join(seq2seqDirectory(name), 'seq2seq.safetensors'));

  it('computes what transformers does, in company the bits that a pair gets alone', async () => {
    using checkpoint = Checkpoint.open(seq2seqDirectory(name));
    using loaded = loadSeq2SeqWeights(spec, checkpoint);
    expect(loaded.unused).toEqual([]);
    const all = await forward(spec, loaded.weights, sources, targets);
    let [sourceRow, targetRow] = [0, 0];
    for (const [i, source] of sources.entries()) {
      const alone = await forward(spec, loaded.weights, [source], [targets[i]]);
      const part = (values: unknown, at: number, width: number, rows: number) =>
        (values as Float32Array).slice(at * width, (at + rows) * width);
      const { hidden, vocab } = spec.decoder;
      expect(part(all.features, sourceRow, hidden, source.length)).toEqual(alone.features);
      expect(part(all.logits, targetRow, vocab, targets[i].length)).toEqual(alone.logits);
      expect(largestDifference(alone.features as Float32Array, golden[`features.${i}`])).toBeLessThan(5e-5);
      expect(largestDifference(alone.logits as Float32Array, golden[`logits.${i}`])).toBeLessThan(5e-5);
      sourceRow += source.length;
      targetRow += targets[i].length;
    }
  });

  it('counts the numbers that it has', () => {
    using checkpoint = Checkpoint.open(seq2seqDirectory(name));
    const aside = /final_logits_bias|embed_positions|lm_head|(en|de)coder\.embed_tokens/;
    const stored = checkpoint.names().reduce((sum, tensor) => {
      const size = checkpoint.info(tensor).shape.reduce((product, n) => product * n, 1);
      return sum + (aside.test(tensor) ? 0 : size);
    }, 0);
    const { positions, decoder, firstPosition } = spec;
    const tables = positions === 'learned' ? 2 * decoder.maxPositions * decoder.hidden : 0;
    expect(firstPosition).toBe(positions === 'learned' ? 2 : 0);
    expect(seq2seqParameters(spec)).toBe(stored + tables);
    expect(seq2seqParameters(spec, true)).toBe(stored + tables + decoder.vocab * decoder.hidden);
  });

  it('is no decoder', () => {
    expect(() => specFromConfig(config, 'config.json')).toThrow(/must be that of a decoder: encoder-decoder models/);
  });
});

it('tells distances apart as T5 does', () => {
  const golden = readVectors(join(seq2seqDirectory('t5'), 'seq2seq.safetensors'));
  for (const [name, both] of [
    ['kinds.both', true],
    ['kinds.before', false],
  ] as const) {
    const kinds = Array.from({ length: 401 }, (_, i) => distanceBucket(i - 200, { buckets: 32, most: 128 }, both));
    expect(kinds).toEqual([...golden[name]]);
  }
});

describe('a configuration that is refused', () => {
  it.each<[string, Record<string, unknown>, RegExp]>([
    ['bart', { is_encoder_decoder: false }, /is_encoder_decoder must be true, got false/],
    ['bart', { architectures: ['BartForSequenceClassification'] }, /architectures must name a class that writes texts/],
    ['bart', { decoder_attention_heads: 5 }, /decoder_attention_heads must divide d_model 24, got 5/],
    ['bart', { tie_word_embeddings: false }, /tie_word_embeddings must be true/],
    ['mbart', { activation_function: 'mish' }, /activation_function must be one of .*, got "mish"/],
    ['marian', { share_encoder_decoder_embeddings: false }, /share_encoder_decoder_embeddings must be true/],
    ['t5', { feed_forward_proj: 'gated-mish' }, /feed_forward_proj must be one of relu, .*, got "gated-mish"/],
    ['t5', { relative_attention_num_buckets: 6 }, /relative_attention_num_buckets must be a multiple of 4, got 6/],
    ['t5', { relative_attention_max_distance: 7 }, /relative_attention_max_distance must be an integer from 8/],
    ['marian', { decoder_vocab_size: 9 }, /decoder_vocab_size must be vocab_size 26, got 9/],
  ])('%s with %o', (name, changed, message) => {
    const read = () => seq2seqSpecFromConfig({ ...readJson(name), ...changed }, 'dir/config.json');
    expect(read).toThrow(message);
    expect(read).toThrow(InvalidFileError);
    expect(read).toThrow('dir/config.json');
  });
});
