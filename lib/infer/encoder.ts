// Encoders at work: classes and vectors of texts packed end to end, features and scores of one text.
import { createHash } from 'node:crypto';
import { type Dim, Graph, type Node, Program, type RunResult } from '../graph/index.js';
import type { EncodedInput } from '../io/tokenizer.js';
import { encoder, headLogits, type Pooling, pool, poolings } from '../model/encoder.js';
import { bindEncoder, type EncoderNodes } from '../model/encoder_weights.js';
import { encoderFlops } from '../model/flops.js';
import { InvalidArgumentError } from '../native/errors.js';
import { ComputeMeter, requireNumbers } from './compute.js';
import type { EncoderNetwork } from './encoder_network.js';
import { checkNumber, checkOptions, positiveInteger } from './options.js';
import type { ClassifyOptions, ClassifyResult, ComputeReport, EmbedOptions, EmbedResult, TextInput } from './types.js';

/** Rows of a run of several texts, or of one text that is longer: memory is planned for as many. */
const packedRows = 4096;
/** Texts of a run. */
const packedTexts = 256;
const defaultBatch = 64;

/** What comes after the layers of a program. */
type End = 'classes' | 'tokens' | 'features' | Pooling;
const ofTexts = (end: End): boolean => end !== 'tokens' && end !== 'features';

/** A text of a call, and where it stands in it. */
interface Row extends EncodedInput {
  readonly index: number;
}

interface Run {
  readonly end: End;
  readonly rows: readonly Row[];
  readonly tokens: number;
  readonly result: RunResult;
  readonly ms: number;
}

/** Calls of one loaded encoder; made by `ElasticModel`. */
export class Encoder implements Disposable {
  readonly network: EncoderNetwork;
  readonly #programs = new Map<End, Program>();

  constructor(network: EncoderNetwork) {
    this.network = network;
  }

  async classify(inputs: readonly TextInput[], options: ClassifyOptions): Promise<ClassifyResult[]> {
    checkOptions('classify', options, ['batch', 'signal']);
    const { labels, scores, task } = this.network.spec.encoder;
    if (task !== 'sequence-classification') {
      const { dir, spec } = this.network;
      throw new InvalidArgumentError(
        `[classify] ${dir} has no classifier: it is a ${spec.type} model for ${task}; embed makes vectors of texts`,
      );
    }
    const results = new Array<ClassifyResult>(inputs.length);
    for await (const run of this.#runs('classify', 'classes', inputs, options)) {
      const { rows, result } = run;
      const logits = result.outputs.classes as Float32Array;
      requireNumbers('classify', logits);
      const reports = this.#reports(run);
      for (const [s, { index, truncated }] of rows.entries()) {
        const own = logits.subarray(s * labels.length, (s + 1) * labels.length);
        const values = scoring[scores](own);
        const ranked = labels.map((label, i) => ({ label, score: values[i] })).sort((a, b) => b.score - a.score);
        results[index] = { ...ranked[0], scores: ranked, truncated, compute: reports[s] };
      }
    }
    return results;
  }

  async embed(inputs: readonly TextInput[], options: EmbedOptions): Promise<EmbedResult> {
    checkOptions('embed', options, ['pooling', 'normalize', 'dims', 'batch', 'signal']);
    const { spec } = this.network;
    const { pooling = this.network.pooling, normalize = this.network.normalize, dims = spec.hidden } = options;
    if (!poolings.includes(pooling)) {
      throw new InvalidArgumentError(`[embed] pooling must be one of ${poolings.join(', ')}, got ${String(pooling)}`);
    }
    if (typeof normalize !== 'boolean') {
      throw new InvalidArgumentError(`[embed] normalize must be true or false, got ${String(normalize)}`);
    }
    const within = (n: number) => positiveInteger(n) && n <= spec.hidden;
    checkNumber('embed', 'dims', dims, within, `an integer from 1 to ${spec.hidden}`);
    const vectors = new Array<Float32Array>(inputs.length);
    const truncated = new Array<number>(inputs.length);
    const meter = new ComputeMeter(spec);
    const total = { flopsFull: 0, ms: 0 };
    for await (const { rows, result, tokens, ms } of this.#runs('embed', pooling, inputs, options)) {
      const pooled = result.outputs[pooling] as Float32Array;
      requireNumbers('embed', pooled);
      for (const [s, row] of rows.entries()) {
        const vector = pooled.slice(s * spec.hidden, s * spec.hidden + dims);
        vectors[row.index] = normalize ? normalized(vector) : vector;
        truncated[row.index] = row.truncated;
      }
      meter.add(result, tokens);
      total.flopsFull += this.#flops(pooling, rows);
      total.ms += ms;
    }
    const compute = report(meter.flops, total.flopsFull, meter.layersRun(), total.ms, meter.rows);
    const space = [await this.network.fingerprint(), pooling, normalize, dims];
    const spaceId = createHash('sha256').update(space.join(' ')).digest('hex').slice(0, 16);
    return {
      vectors,
      dims,
      spaceId,
      truncated,
      usage: { inputTokens: meter.rows, cachedTokens: 0, outputTokens: 0, compute },
    };
  }

  /** Features of every token of a text after the last layer: f32 [tokens, hidden]. */
  async features(input: TextInput, signal?: AbortSignal): Promise<Float32Array> {
    return this.#single('features', 'features', input, signal);
  }

  /** f32 [tokens, vocab] of a model for masked tokens, [classes] of a classifier. */
  async logits(input: TextInput, signal?: AbortSignal): Promise<Float32Array> {
    const { dir, spec } = this.network;
    if (spec.encoder.task === 'feature-extraction') {
      throw new InvalidArgumentError(`[logits] ${dir} has no head: it is a ${spec.type} model for features`);
    }
    const classifies = spec.encoder.task === 'sequence-classification';
    return this.#single('logits', classifies ? 'classes' : 'tokens', input, signal);
  }

  dispose(): void {
    for (const program of this.#programs.values()) program.dispose();
    this.#programs.clear();
    this.network.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  async #single(api: string, end: End, input: TextInput, signal?: AbortSignal): Promise<Float32Array> {
    const row = this.#encode(api, input, 0);
    const { result } = await this.#run(end, [row], signal);
    const values = result.outputs[end] as Float32Array;
    requireNumbers(api, values);
    return values;
  }

  /** Runs of as many texts as fit, in their order. */
  async *#runs(
    api: string,
    end: End,
    inputs: readonly TextInput[],
    { batch = defaultBatch, signal }: ClassifyOptions,
  ): AsyncGenerator<Run> {
    if (!Array.isArray(inputs)) throw new InvalidArgumentError(`[${api}] texts must be a list, got ${typeof inputs}`);
    const within = (n: number) => positiveInteger(n) && n <= packedTexts;
    checkNumber(api, 'batch', batch, within, `an integer from 1 to ${packedTexts}`);
    const limit = this.#limits(end).rows;
    let open: Row[] = [];
    let count = 0;
    for (let i = 0; i <= inputs.length; i++) {
      const row = i < inputs.length ? this.#encode(api, inputs[i], i) : null;
      if (open.length > 0 && (!row || open.length === batch || count + row.ids.length > limit)) {
        yield await this.#run(end, open, signal);
        open = [];
        count = 0;
      }
      if (row) {
        open.push(row);
        count += row.ids.length;
      }
    }
  }

  #encode(api: string, input: TextInput, index: number): Row {
    const { tokenizer, maxContext, spec, dir } = this.network;
    const fail = (message: string) => new InvalidArgumentError(`[${api}] text ${index} ${message}`);
    const isText = (value: unknown): value is string => typeof value === 'string';
    if (Array.isArray(input) && input.length > 0 && !input.some(isText)) {
      const ids = input as readonly number[];
      const bad = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= spec.vocab);
      if (bad !== undefined) throw fail(`has token id ${bad}; the model's vocabulary ends at ${spec.vocab - 1}`);
      if (ids.length > maxContext) throw fail(`has ${ids.length} tokens, more than the context of ${maxContext}`);
      return { ids, types: ids.map(() => 0), truncated: 0, index };
    }
    const parts: readonly unknown[] = isText(input) ? [input] : input;
    if (!Array.isArray(parts) || parts.length < 1 || parts.length > 2 || !parts.every(isText)) {
      throw fail('must be a text or a pair of texts');
    }
    if (parts.includes('')) throw fail('is empty');
    if (!tokenizer) throw new InvalidArgumentError(`[${api}] texts need a tokenizer, and ${dir} has no tokenizer.json`);
    const [text, pair] = parts as string[];
    const encoded = tokenizer.encodeInput(text, { ...(pair !== undefined && { pair }), maxTokens: maxContext });
    const beyond = encoded.ids.find((id) => id >= spec.vocab);
    if (beyond !== undefined) {
      throw fail(`has token id ${beyond} of the tokenizer; the model's vocabulary ends at ${spec.vocab - 1}`);
    }
    if (encoded.ids.length === 0) throw fail('has no tokens');
    return { ...encoded, index };
  }

  async #run(end: End, rows: readonly Row[], signal?: AbortSignal): Promise<Run> {
    const { spec } = this.network;
    const { tokenTypes } = spec.encoder;
    const offsets = Int32Array.from({ length: rows.length + 1 });
    for (const [s, { ids }] of rows.entries()) offsets[s + 1] = offsets[s] + ids.length;
    const types = Int32Array.from(rows.flatMap(({ types }) => types));
    const feeds = {
      ids: Int32Array.from(rows.flatMap(({ ids }) => ids)),
      positions: Int32Array.from(rows.flatMap(({ ids }) => [...ids.keys()])),
      offsets,
      // Models of one kind of tokens read pairs as that.
      ...(tokenTypes > 0 && { types: tokenTypes > 1 ? types : types.fill(0) }),
      ...(ofTexts(end) && {
        token: offsets.slice(0, -1).map((first, s) => (end === 'last' ? offsets[s + 1] - 1 : first)),
      }),
    };
    const tokens = feeds.ids.length;
    const dims = { rows: tokens, segments: rows.length, offsets: rows.length + 1 };
    const started = performance.now();
    const result = await this.#program(end).run({ dims, feeds, signal });
    return { end, rows, tokens, result, ms: performance.now() - started };
  }

  #limits(end: End): { rows: number; segments: number } {
    const { maxContext } = this.network;
    return ofTexts(end)
      ? { rows: Math.max(maxContext, packedRows), segments: packedTexts }
      : { rows: maxContext, segments: 1 };
  }

  #program(end: End): Program {
    const known = this.#programs.get(end);
    if (known) return known;
    const { spec, weights, engine } = this.network;
    const limits = this.#limits(end);
    const graph = new Graph();
    const [rows, segments] = [graph.dim('rows', limits.rows), graph.dim('segments', limits.segments)];
    const boundaries = graph.dim('offsets', limits.segments + 1);
    const feed = (name: string, size: Dim) => graph.feed(name, 'i32', [size]);
    const nodes = bindEncoder(graph, weights);
    const offsets = feed('offsets', boundaries);
    const x = encoder(graph, spec, nodes, {
      ids: feed('ids', rows),
      positions: feed('positions', rows),
      offsets,
      ...(spec.encoder.tokenTypes > 0 && { types: feed('types', rows) }),
    });
    const token = ofTexts(end) ? feed('token', segments) : null;
    graph.output(end, this.#end(graph, end, nodes, x, offsets, token));
    const program = Program.compile(graph, engine);
    this.#programs.set(end, program);
    return program;
  }

  #end(graph: Graph, end: End, nodes: EncoderNodes, x: Node, offsets: Node, token: Node | null): Node {
    const { spec } = this.network;
    if (end === 'features') return x;
    if (end === 'classes' || end === 'tokens') return headLogits(graph, spec, nodes, x, token);
    return pool(graph, x, offsets, token!, end);
  }

  #flops(end: End, rows: readonly Row[]): number {
    const last = end === 'classes' || end === 'tokens' ? 'head' : 'none';
    return encoderFlops(
      this.network.spec,
      rows.map(({ ids }) => ids.length),
      last,
    );
  }

  /** What each text of a run cost: every row enters every sub-layer, so the formula divides what was counted. */
  #reports({ end, rows, tokens, result, ms }: Run): ComputeReport[] {
    const meter = new ComputeMeter(this.network.spec);
    meter.add(result, tokens);
    const costs = rows.map((row) => this.#flops(end, [row]));
    const total = costs.reduce((sum, cost) => sum + cost, 0);
    return costs.map((cost) => report(Math.round((meter.flops * cost) / total), cost, meter.layersRun(), ms, tokens));
  }
}

/** @param tokens that the run of `ms` milliseconds read */
const report = (
  flops: number,
  flopsFull: number,
  layersRun: ComputeReport['layersRun'],
  ms: number,
  tokens: number,
): ComputeReport => ({
  ...{ requested: 'full', level: 'full', effective: {}, layersRun },
  ...{ flops, flopsFull, ratio: flopsFull > 0 ? flops / flopsFull : 1 },
  ...{ ms: { queue: 0, prefill: ms, decode: 0, total: ms }, tokensPerSecond: ms > 0 ? (tokens / ms) * 1000 : null },
});

const scoring = {
  softmax(logits: Float32Array): number[] {
    const largest = Math.max(...logits);
    const exp = Array.from(logits, (x) => Math.exp(x - largest));
    const sum = exp.reduce((a, b) => a + b, 0);
    return exp.map((e) => e / sum);
  },
  sigmoid: (logits: Float32Array): number[] => Array.from(logits, (x) => 1 / (1 + Math.exp(-x))),
  none: (logits: Float32Array): number[] => [...logits],
} as const;

/** The vector with length 1; of zeros, itself. */
function normalized(vector: Float32Array): Float32Array {
  const length = Math.hypot(...vector);
  return length > 0 ? vector.map((x) => x / length) : vector;
}
