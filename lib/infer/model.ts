// A model to call: generation, scoring and logits, each at a budget.
import type { Budget, BudgetContext, OperatingPoint } from '../elastic/budget.js';
import { routerParameters } from '../elastic/policy.js';
import { thresholdFeeds } from '../elastic/rows.js';
import type { Program, RunResult } from '../graph/index.js';
import { forwardFlops } from '../model/flops.js';
import { parameterPlan } from '../model/weights.js';
import { DisposedError, InvalidArgumentError, InvalidDataError } from '../native/errors.js';
import type { TypedArray } from '../native/index.js';
import { SessionPool } from './cache.js';
import { ComputeMeter } from './compute.js';
import { generate, promptIds } from './generate.js';
import { decisionFeeds, jointDecisions, packedBatch, packRuns, type Sequence, sequenceCounters } from './mixed.js';
import { loadNetwork, type Network, resolveFor } from './network.js';
import { checkNumber, checkOptions, positiveInteger } from './options.js';
import {
  budgetSelector,
  compileCountedScore,
  compileLogits,
  compileTrace,
  type PackedLimits,
  ProgramCache,
  packedDims,
} from './programs.js';
import { choosesTokens, type ElasticTrace, traceOf } from './trace.js';
import type { ComputeReport, GenerateOptions, GenerateStream, LoadOptions, ModelInfo, ScoreResult } from './types.js';

const compilers = { logits: compileLogits, trace: compileTrace };
type Api = keyof typeof compilers;
/** Most texts of one run of `score`. */
const scoredSegments = 64;

interface CallOptions {
  /** Default 'full'. */
  budget?: Budget;
  signal?: AbortSignal;
}

interface ScoreOptions extends Omit<CallOptions, 'budget'> {
  /** One for all texts, or one for each. Default 'full'. */
  budget?: Budget | readonly Budget[];
}

/**
 * Loads a Hugging Face directory (Llama family or GPT-2) or one that `elastify` or `distill` wrote. Weights are mapped
 * and shared by all budgets. Dispose of the model when done, or declare it with `await using`.
 *
 * @throws InvalidFileError, InvalidDataError: a file is missing, corrupt or of an unknown kind; the message names it.
 * @throws InvalidArgumentError: unknown option or value out of range.
 */
export async function loadModel(dir: string, options: LoadOptions = {}): Promise<ElasticModel> {
  return new ElasticModel(await loadNetwork(dir, options));
}

export class ElasticModel implements AsyncDisposable {
  readonly info: ModelInfo;
  /** What the model is loaded as: specification, weights, engine, tokenizer. */
  readonly network: Network;
  readonly #sessions: SessionPool;
  readonly #programs = new ProgramCache();
  readonly #closed = new AbortController();

  constructor(network: Network) {
    this.network = network;
    this.#sessions = new SessionPool(network);
    const { spec, policy } = network;
    this.info = {
      task: 'causal-lm',
      architecture: spec.family,
      layers: spec.layers,
      hidden: spec.hidden,
      ffn: spec.ffn,
      heads: spec.heads,
      kvHeads: spec.kvHeads,
      vocab: spec.vocab,
      maxPositions: spec.maxPositions,
      maxContext: network.maxContext,
      parameters: parameterPlan(spec).size,
      elastic: policy !== null,
      calibrated: policy?.calibration != null,
      routerParameters: policy ? routerParameters(policy) : 0,
      levels: policy?.levels ?? [],
    };
  }

  /**
   * What a budget means for this model on its device. `length`: tokens of the sequences it is meant for; `maxTokens`: of
   * these, tokens generated.
   * @throws InvalidArgumentError when the model cannot run at that budget.
   */
  resolve(budget: Budget, options: Omit<BudgetContext, 'profile'> = {}): OperatingPoint {
    checkOptions('resolve', options, ['length', 'maxTokens']);
    for (const name of ['length', 'maxTokens'] as const)
      checkNumber('resolve', name, options[name], positiveInteger, 'a positive integer');
    return resolveFor(this.network, budget, options);
  }

  /**
   * Generates text after `prompt`, a text or token ids; an empty one starts a new text. Begins at once.
   * @throws InvalidArgumentError: unknown option, value out of range, token id past the vocabulary, prompt longer than
   * the context.
   */
  generate(prompt: string | readonly number[], options: GenerateOptions = {}): GenerateStream {
    this.#alive('generate');
    return generate(this.network, this.#sessions, prompt, options, this.#closed.signal);
  }

  /**
   * Log-probability of every token of each text given those before it. Texts run together, as many as fit the context,
   * each at its own budget and with the results that it has alone.
   */
  async score(inputs: readonly (string | readonly number[])[], options: ScoreOptions = {}): Promise<ScoreResult[]> {
    this.#alive('score');
    checkOptions('score', options, ['budget', 'signal']);
    const { budget = 'full', signal } = options;
    const requested = Array.isArray(budget) ? (budget as readonly Budget[]) : inputs.map(() => budget as Budget);
    if (requested.length !== inputs.length) {
      throw new InvalidArgumentError(
        `[score] budget must be one budget or one for each of the ${inputs.length} texts, got ${requested.length}`,
      );
    }
    const sequences = inputs.map((input, i) => this.#sequence('score', input, requested[i]));
    const { network } = this;
    const limits = { rows: network.maxContext, segments: scoredSegments };
    const results = new Array<ScoreResult>(inputs.length);
    for (const run of packRuns(network, sequences, limits)) {
      const members = run.map((i) => sequences[i]);
      const batch = packedBatch(members);
      const joint = jointDecisions(network, members);
      const program = this.#programs.get('score', joint, () =>
        compileCountedScore(network, limits, (graph, _, segments) => budgetSelector(graph, network, joint, segments)),
      );
      const rows = batch.ids.length;
      // What the last token of a text gives the first of the next one is not read.
      const targets = Int32Array.from(batch.ids, (_, i) => batch.ids[i + 1] ?? -1);
      const feeds = { ...batch, ...decisionFeeds(network, joint, members), targets, weight: new Float32Array(rows) };
      const started = performance.now();
      const result = await program.run({ dims: packedDims(batch), feeds, signal });
      const ms = performance.now() - started;
      const ce = result.outputs.ce as Float32Array;
      requireNumbers('score', ce);
      const counters = sequenceCounters(network, batch, joint, result);
      for (const [s, i] of run.entries()) {
        const { ids, point } = members[s];
        const at = batch.offsets[s];
        const logprobs = Float32Array.from(ids, (_, t) => (t === 0 ? Number.NaN : -ce[at + t - 1]));
        const compute = this.#report(requested[i], point, counters[s], ids.length, { ms, rows });
        results[i] = { tokens: [...ids], logprobs, usage: { inputTokens: ids.length, outputTokens: 0, compute } };
      }
    }
    return results;
  }

  /** Logits of every position: f32 [tokens, vocab], row by row. */
  async logits(input: string | readonly number[], options: CallOptions = {}): Promise<Float32Array> {
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
    const outputs = choosesTokens(this.network, point) ? (await run({})).outputs : {};
    return traceOf(this.network, ids, point, outputs);
  }

  /** Ends what runs and frees the model. Generations under way finish with reason 'abort'. */
  async dispose(): Promise<void> {
    if (this.#closed.signal.aborted) return;
    this.#closed.abort();
    this.#sessions.dispose();
    this.#programs.dispose();
    this.network.dispose();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }

  #alive(api: string): void {
    if (this.#closed.signal.aborted) throw new DisposedError(`[${api}] the model was disposed`);
  }

  /** The ids of a text that fits the context, and what its budget means for it. */
  #sequence(api: string, input: string | readonly number[], budget: Budget): Sequence {
    const { network } = this;
    const ids = promptIds(network, input);
    if (ids.length > network.maxContext) {
      throw new InvalidArgumentError(`[${api}] ${ids.length} tokens do not fit the context of ${network.maxContext}`);
    }
    return { ids, point: resolveFor(network, budget, { length: ids.length }) };
  }

  #forward(api: Api, input: string | readonly number[], options: CallOptions) {
    this.#alive(api);
    checkOptions(api, options, ['budget', 'signal']);
    const { ids, point } = this.#sequence(api, input, options.budget ?? 'full');
    const batch = packedBatch([{ ids, point }]);
    const feeds = { ...batch, ...thresholdFeeds(point.thresholds, 1) };
    const run = (more: Record<string, TypedArray>): Promise<RunResult> =>
      this.#program(api, point).run({ dims: packedDims(batch), feeds: { ...feeds, ...more }, signal: options.signal });
    return { ids, point, run };
  }

  #program(api: Api, point: OperatingPoint): Program {
    const { network } = this;
    const limits: PackedLimits = { rows: network.maxContext, segments: 1 };
    return this.#programs.get(api, point, () =>
      compilers[api](network, limits, (graph, _rows, segments) => budgetSelector(graph, network, point, segments)),
    );
  }

  // `run`: what the text ran in, together with others.
  #report(
    requested: Budget,
    point: OperatingPoint,
    counters: RunResult['counters'],
    rows: number,
    run: { ms: number; rows: number },
  ): ComputeReport {
    const meter = new ComputeMeter(this.network.spec.layers);
    meter.add({ counters }, rows);
    const flopsFull = forwardFlops(this.network.spec, [rows]).total;
    return {
      requested,
      level: point.level,
      effective: point.spec,
      flops: meter.flops,
      flopsFull,
      ratio: meter.flops / flopsFull,
      layersRun: meter.layersRun(),
      ms: { prefill: run.ms, decode: 0, total: run.ms },
      tokensPerSecond: run.ms > 0 ? (run.rows / run.ms) * 1000 : null,
    };
  }
}

/** NaN comes from the weights: no other input of these calls is a float. */
function requireNumbers(api: string, values: Float32Array): void {
  if (values.includes(Number.NaN))
    throw new InvalidDataError(`[${api}] the model computes NaN: its weights are damaged`);
}
