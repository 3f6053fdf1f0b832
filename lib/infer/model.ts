// A model to call: generation, scoring and logits, each at a budget.
import type { Budget, BudgetContext, OperatingPoint } from '../elastic/budget.js';
import { partId } from '../elastic/modules.js';
import { routerParameters } from '../elastic/policy.js';
import { thresholdFeeds } from '../elastic/rows.js';
import type { Program, RunResult } from '../graph/index.js';
import { encoderParameters } from '../model/encoder_weights.js';
import { forwardFlops } from '../model/flops.js';
import { seq2seqParameters } from '../model/seq2seq_weights.js';
import { isEncoderConfig, isSeq2SeqConfig, type ModelSpec } from '../model/spec.js';
import { parameterPlan } from '../model/weights.js';
import { DisposedError, InvalidArgumentError } from '../native/errors.js';
import type { TypedArray } from '../native/index.js';
import { ComputeMeter, requireNumbers } from './compute.js';
import { Encoder } from './encoder/encoder.js';
import { type EncoderNetwork, loadEncoder } from './encoder/network.js';
import { type Engine, generate, prefill, promptIds } from './engine/generate.js';
import { Scheduler } from './engine/scheduler.js';
import { SequenceState } from './engine/state.js';
import {
  decisionFeeds,
  jointDecisions,
  jointDims,
  packedBatch,
  packRuns,
  type Sequence,
  sequenceCounters,
} from './mixed.js';
import { adapterNumber, defaultBudget, loadNetwork, type Network, readModelConfig, resolveFor } from './network.js';
import { checkNumber, checkOptions, positiveInteger } from './options.js';
import {
  adapterFeeds,
  budgetDims,
  budgetSelector,
  compileCountedScore,
  compileLogits,
  compileTrace,
  type PackedLimits,
  ProgramCache,
  packedDims,
} from './programs.js';
import { loadSeq2Seq, type Seq2SeqNetwork } from './seq2seq/network.js';
import { Seq2Seq } from './seq2seq/seq2seq.js';
import { choosesTokens, type ElasticTrace, traceOf } from './trace.js';
import type {
  ClassifyOptions,
  ClassifyResult,
  ComputeReport,
  EmbedOptions,
  EmbedResult,
  GenerateOptions,
  GenerateStream,
  LoadOptions,
  ModelInfo,
  ModelLoad,
  PrefillOptions,
  ScoreResult,
  TextInput,
} from './types.js';

const compilers = { logits: compileLogits, trace: compileTrace };
type Api = keyof typeof compilers;
/** Most texts of one run of `score`. */
const scoredSegments = 64;

/** Options of `logits` and `trace`. */
export interface CallOptions {
  /** Default 'full'. */
  budget?: Budget;
  /** Name of one of the `adapters` that the model was loaded with. Default none. */
  adapter?: string;
  signal?: AbortSignal;
}

/** Options of `score`. */
export interface ScoreOptions extends Omit<CallOptions, 'budget' | 'adapter'> {
  /** One for all texts, or one for each. Default 'full'. */
  budget?: Budget | readonly Budget[];
  /** The same: names, or undefined for none. */
  adapter?: string | readonly (string | undefined)[];
}

/**
 * Loads a Hugging Face directory (Llama, Qwen or Gemma family, GPT-2, an encoder: BERT, RoBERTa, DistilBERT, or an encoder-decoder model: T5, BART, mBART, Marian) or one that `elastify` or `distill` wrote. Weights are mapped
 * and shared by all budgets. Dispose of the model when done, or declare it with `await using`.
 *
 * @throws InvalidFileError, InvalidDataError: a file is missing, corrupt or of an unknown kind; the message names it.
 * @throws InvalidArgumentError: unknown option or value out of range.
 */
export async function loadModel(dir: string, options: LoadOptions = {}): Promise<ElasticModel> {
  const start = await readModelConfig(dir, options);
  const load = isEncoderConfig(start.config) ? loadEncoder : isSeq2SeqConfig(start.config) ? loadSeq2Seq : loadNetwork;
  return new ElasticModel(await load(dir, options, start));
}

/** A decoder, and what its calls keep. */
interface Decoder {
  readonly network: Network;
  readonly generation: Engine;
  readonly programs: ProgramCache;
}

/** A loaded model, made by `loadModel`. Its calls may overlap: generations run together, others take turns. */
export class ElasticModel implements AsyncDisposable {
  /** What the model is. */
  readonly info: ModelInfo;
  readonly #model: Decoder | Encoder | Seq2Seq;
  readonly #closed = new AbortController();

  /** @internal Made by `loadModel`. */
  constructor(network: AnyNetwork) {
    if (isSeq2Seq(network)) this.#model = new Seq2Seq(network, this.#closed.signal);
    else if (isEncoder(network)) this.#model = new Encoder(network);
    else {
      this.#model = {
        network,
        generation: { network, scheduler: new Scheduler(network), closed: this.#closed.signal },
        programs: new ProgramCache(network),
      };
    }
    this.info = infoOf(network);
  }

  /** @internal What a decoder is loaded as: specification, weights, engine, tokenizer. */
  get network(): Network {
    return this.#decoder('model').network;
  }

  /** @internal What a model is loaded as. */
  get loaded(): AnyNetwork {
    return this.#model.network;
  }

  /**
   * What a budget means for this model on its device. `length`: tokens of the sequences it is meant for; `maxTokens`: of
   * these, tokens generated, by decoders.
   * @throws InvalidArgumentError when the model cannot run at that budget.
   */
  resolve(budget: Budget, options: Omit<BudgetContext, 'profile'> = {}): OperatingPoint {
    const encoder = this.#model instanceof Encoder ? this.#model : null;
    checkOptions('resolve', options, encoder ? ['length'] : ['length', 'maxTokens']);
    for (const name of ['length', 'maxTokens'] as const)
      checkNumber('resolve', name, options[name], positiveInteger, 'a positive integer');
    this.#alive('resolve');
    if (this.#model instanceof Seq2Seq) return this.#model.resolve(budget, options);
    if (encoder) return encoder.resolve('resolve', budget, options.length);
    return resolveFor(this.#decoder('resolve').network, budget, options);
  }

  /**
   * Generates text after `prompt`, a text or token ids; an empty one starts a new text. An encoder-decoder model writes a text of
   * its own for `prompt`, its source, by beam search where its directory says so; its chunks come then at the end. Begins at once, or when others have
   * made room; generations at once share runs, each with the result that it has alone.
   * @throws InvalidArgumentError: unknown option, value out of range, token id past the vocabulary, prompt longer than
   * the context, more tokens than `kvCacheBytes` holds keys of.
   */
  generate(prompt: string | readonly number[], options: GenerateOptions = {}): GenerateStream {
    this.#alive('generate');
    if (this.#model instanceof Seq2Seq) return this.#model.generate(prompt, options);
    return generate(this.#decoder('generate').generation, prompt, options);
  }

  /**
   * Reads a text and keeps it, to be continued once or, forked, in several ways. Dispose of it when done.
   * @throws InvalidArgumentError: as `generate`.
   * @throws OutOfMemoryError: states that are kept leave too little room.
   */
  async prefill(prompt: string | readonly number[], options: PrefillOptions = {}): Promise<SequenceState> {
    this.#alive('prefill');
    const { generation } = this.#decoder('prefill');
    const { usage, ...held } = await prefill(generation, prompt, options);
    return new SequenceState(generation, held, usage);
  }

  /** @internal What an encoder's calls are made of. */
  get encoder(): Encoder {
    return this.#encoder('calibrate');
  }

  /** @internal What an encoder-decoder model's calls are made of. */
  get seq2seq(): Seq2Seq {
    this.#alive('assemble');
    if (this.#model instanceof Seq2Seq) return this.#model;
    const { dir, spec } = this.#model.network;
    throw new InvalidArgumentError(
      `[assemble] ${dir} is a ${spec.type} model, and modules are of encoder-decoder models`,
    );
  }

  /** What the model is generating now, and the memory that takes. */
  load(): ModelLoad {
    return this.#decoder('load').generation.scheduler.load;
  }

  /**
   * Log-probability of every token of each text given those before it. Texts run together, as many as fit the context,
   * each at its own budget and with the results that it has alone.
   */
  async score(inputs: readonly (string | readonly number[])[], options: ScoreOptions = {}): Promise<ScoreResult[]> {
    this.#alive('score');
    const { network, programs } = this.#decoder('score');
    checkOptions('score', options, ['budget', 'adapter', 'signal']);
    const { budget = defaultBudget(network), adapter, signal } = options;
    const ofEach = <T>(name: string, value: T | readonly T[]): readonly T[] => {
      const all = Array.isArray(value) ? (value as readonly T[]) : inputs.map(() => value as T);
      if (all.length === inputs.length) return all;
      throw new InvalidArgumentError(
        `[score] ${name} must be one ${name} or one for each of the ${inputs.length} texts, got ${all.length}`,
      );
    };
    const requested = ofEach<Budget>('budget', budget);
    const adapters = ofEach('adapter', adapter).map((name) => adapterNumber('score', network, name));
    const sequences = inputs.map((input, i) => this.#sequence('score', input, requested[i]));
    const limits = { rows: network.maxContext, segments: scoredSegments };
    const results = new Array<ScoreResult>(inputs.length);
    for (const run of packRuns(network, sequences, limits)) {
      const members = run.map((i) => sequences[i]);
      const batch = packedBatch(members);
      const joint = jointDecisions(network, members);
      const program = programs.get('score', joint, () =>
        compileCountedScore(network, limits, (graph, rows, segments) =>
          budgetSelector(graph, network, joint, segments, { rows }),
        ),
      );
      const rows = batch.ids.length;
      // What the last token of a text gives the first of the next one is not read.
      const targets = Int32Array.from(batch.ids, (_, i) => batch.ids[i + 1] ?? -1);
      const decided = {
        ...decisionFeeds(network, joint, members),
        ...adapterFeeds(
          network,
          run.map((i) => adapters[i]),
        ),
      };
      const feeds = { ...batch, ...decided, targets, weight: new Float32Array(rows) };
      const started = performance.now();
      const dims = { ...packedDims(batch), ...jointDims(network, joint) };
      const result = await program.run({ dims, feeds, signal });
      const ms = performance.now() - started;
      const ce = result.outputs.ce as Float32Array;
      requireNumbers('score', ce);
      const counters = sequenceCounters(network, batch, joint, result, members);
      for (const [s, i] of run.entries()) {
        const { ids, point } = members[s];
        const at = batch.offsets[s];
        const logprobs = Float32Array.from(ids, (_, t) => (t === 0 ? Number.NaN : -ce[at + t - 1]));
        const counted = { counters: counters[s], dims: budgetDims(network, point) };
        const compute = this.#report(requested[i], point, counted, ids.length, { ms, rows });
        results[i] = {
          tokens: [...ids],
          logprobs,
          usage: { inputTokens: ids.length, cachedTokens: 0, outputTokens: 0, compute },
        };
      }
    }
    return results;
  }

  /**
   * The class of every text, or pair of texts, by a model with a classifier. Texts run together; each gets the bits that it
   * gets alone. What is longer than the context is cut, of a pair the longer text first, or read in windows if asked.
   *
   * @throws InvalidArgumentError: the model has no classifier, a text is empty, unknown option or value out of range.
   */
  async classify(inputs: string | readonly TextInput[], options: ClassifyOptions = {}): Promise<ClassifyResult[]> {
    return this.#encoder('classify').classify(textsOf(inputs), options);
  }

  /**
   * One vector for every text, by an encoder. Texts run together; each gets the bits that it gets alone. What is longer than
   * the context is cut, or read in windows if asked.
   *
   * @throws InvalidArgumentError: the model is no encoder, a text is empty, unknown option or value out of range.
   */
  async embed(inputs: string | readonly TextInput[], options: EmbedOptions = {}): Promise<EmbedResult> {
    return this.#encoder('embed').embed(textsOf(inputs), options);
  }

  /** Features that an encoder computes of every token, special ones included: f32 [tokens, hidden], row by row. */
  async features(input: TextInput, options: Pick<CallOptions, 'signal'> = {}): Promise<Float32Array> {
    const encoder = this.#encoder('features');
    checkOptions('features', options, ['signal']);
    return encoder.features(input, options.signal);
  }

  /**
   * Logits of every position: f32 [tokens, vocab], row by row. Of a classifier: f32 [classes]. Encoders read pairs, too, and
   * no budget.
   */
  async logits(input: TextInput, options: CallOptions = {}): Promise<Float32Array> {
    if (this.#model instanceof Encoder) {
      const encoder = this.#encoder('logits');
      checkOptions('logits', options, ['signal']);
      return encoder.logits(input, options.signal);
    }
    const { run } = this.#forward('logits', input, options);
    const logits = (await run({})).outputs.logits as Float32Array;
    requireNumbers('logits', logits);
    return logits;
  }

  /**
   * Which sub-layers each token of a finished text enters at a budget: routing is causal, so these are the choices that
   * generating the text made.
   */
  async trace(input: string | readonly number[], options: CallOptions = {}): Promise<ElasticTrace> {
    const { ids, point, run } = this.#forward('trace', input, options);
    const { network } = this.#decoder('trace');
    const outputs = choosesTokens(network, point) ? (await run({})).outputs : {};
    return traceOf(network, ids, point, outputs);
  }

  /** Ends what runs and frees the model. Generations under way finish with reason 'abort'. */
  async dispose(): Promise<void> {
    if (this.#closed.signal.aborted) return;
    this.#closed.abort(new DisposedError('[model] it was disposed'));
    if (this.#model instanceof Encoder || this.#model instanceof Seq2Seq) this.#model.dispose();
    else {
      this.#model.generation.scheduler.dispose();
      this.#model.programs.dispose();
      this.#model.network.dispose();
    }
  }

  /** The same as `dispose()`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }

  #alive(api: string): void {
    if (this.#closed.signal.aborted) throw new DisposedError(`[${api}] the model was disposed`);
  }

  #decoder(api: string): Decoder {
    if (this.#model instanceof Seq2Seq) throw this.#notForSeq2Seq(api, this.#model);
    if (!(this.#model instanceof Encoder)) return this.#model;
    const { dir, spec } = this.#model.network;
    throw new InvalidArgumentError(
      `[${api}] ${dir} is an encoder (${spec.type}, ${spec.encoder.task}), and this needs a decoder; encoders run classify and embed`,
    );
  }

  #encoder(api: string): Encoder {
    this.#alive(api);
    if (this.#model instanceof Seq2Seq) throw this.#notForSeq2Seq(api, this.#model);
    if (this.#model instanceof Encoder) return this.#model;
    const { dir, spec } = this.#model.network;
    throw new InvalidArgumentError(
      `[${api}] ${dir} is a decoder (${spec.type}, causal-lm), and this needs an encoder; decoders run generate and score`,
    );
  }

  #notForSeq2Seq(api: string, { network: { dir, spec } }: Seq2Seq): InvalidArgumentError {
    return new InvalidArgumentError(
      `[${api}] ${dir} is an encoder-decoder model (${spec.type}, seq2seq-lm), which runs generate alone`,
    );
  }

  /** The ids of a text that fits the context, and what its budget means for it. */
  #sequence(api: string, input: TextInput, budget: Budget): Sequence {
    const { network } = this.#decoder(api);
    const ids = promptIds(network, input as string | readonly number[]);
    if (ids.length > network.maxContext) {
      throw new InvalidArgumentError(`[${api}] ${ids.length} tokens do not fit the context of ${network.maxContext}`);
    }
    return { ids, point: resolveFor(network, budget, { length: ids.length }) };
  }

  #forward(api: Api, input: TextInput, options: CallOptions) {
    this.#alive(api);
    const { network } = this.#decoder(api);
    checkOptions(api, options, ['budget', 'adapter', 'signal']);
    const adapter = adapterNumber(api, network, options.adapter);
    const { ids, point } = this.#sequence(api, input, options.budget ?? defaultBudget(network));
    const batch = packedBatch([{ ids, point }]);
    const dims = { ...packedDims(batch), ...budgetDims(network, point) };
    const feeds = { ...batch, ...thresholdFeeds(point.thresholds, 1), ...adapterFeeds(network, [adapter]) };
    const run = (more: Record<string, TypedArray>): Promise<RunResult> =>
      this.#program(api, point).run({ dims, feeds: { ...feeds, ...more }, signal: options.signal });
    return { ids, point, run };
  }

  #program(api: Api, point: OperatingPoint): Program {
    const { network, programs } = this.#decoder(api);
    const limits: PackedLimits = { rows: network.maxContext, segments: 1 };
    return programs.get(api, point, () =>
      compilers[api](network, limits, (graph, rows, segments) =>
        budgetSelector(graph, network, point, segments, { rows }),
      ),
    );
  }

  // `run`: what the text ran in, together with others.
  #report(
    requested: Budget,
    point: OperatingPoint,
    result: Pick<RunResult, 'counters' | 'dims'>,
    rows: number,
    run: { ms: number; rows: number },
  ): ComputeReport {
    const meter = new ComputeMeter(this.network.spec);
    meter.add(result, rows);
    const flopsFull = forwardFlops(this.network.spec, [rows]).total;
    return {
      requested,
      level: point.level,
      effective: point.spec,
      flops: meter.flops,
      flopsFull,
      ratio: meter.flops / flopsFull,
      layersRun: meter.layersRun(),
      ms: { queue: 0, prefill: run.ms, decode: 0, total: run.ms },
      tokensPerSecond: run.ms > 0 ? (run.rows / run.ms) * 1000 : null,
    };
  }
}

type AnyNetwork = Network | EncoderNetwork | Seq2SeqNetwork;

const isSeq2Seq = (network: AnyNetwork): network is Seq2SeqNetwork => 'decoder' in network.spec;
const isEncoder = (network: Network | EncoderNetwork): network is EncoderNetwork => network.spec.encoder !== null;

/** A text alone is a list of one. */
const textsOf = (inputs: string | readonly TextInput[]): readonly TextInput[] =>
  typeof inputs === 'string' ? [inputs] : inputs;

function infoOf(network: AnyNetwork): ModelInfo {
  const { maxContext, weightBytes } = network;
  if (isSeq2Seq(network)) {
    const {
      spec,
      weights: { embed, head },
    } = network;
    const { policy } = network;
    const { modules } = policy ?? {};
    return {
      ...sizesOf(spec.decoder),
      ...{
        task: 'seq2seq-lm',
        maxContext,
        weightBytes,
        parameters: seq2seqParameters(spec, head.weight !== embed),
        ...{ labels: [], elastic: policy !== null, calibrated: policy !== null, adapters: [] },
        routerParameters: policy ? routerParameters(policy) : 0,
        levels: policy?.levels ?? [],
        ...(modules && {
          modules: { encoder: modules.encoder.map(partId), decoder: modules.decoder.map(partId) },
        }),
      },
    };
  }
  const { spec } = network;
  const { policy } = network;
  return {
    ...sizesOf(spec),
    ...{ task: spec.encoder?.task ?? 'causal-lm', maxContext, weightBytes },
    labels: spec.encoder?.labels ?? [],
    parameters: isEncoder(network) ? encoderParameters(network.spec) : parameterPlan(spec).size,
    elastic: policy !== null,
    calibrated: policy?.calibration != null || policy?.nested !== undefined || policy?.exits !== undefined,
    routerParameters: policy ? routerParameters(policy) : 0,
    adapters: isEncoder(network) ? [] : (network.adapters?.names ?? []),
    levels: policy?.levels ?? [],
  };
}

const sizesOf = ({ type, layers, hidden, ffn, heads, kvHeads, vocab, maxPositions }: ModelSpec) => ({
  ...{ architecture: type, layers, hidden, ffn, heads, kvHeads, vocab, maxPositions },
});
