// What calls that run a model take and return.

import type { ElasticSpec } from '../elastic/axes.js';
import type { Budget } from '../elastic/budget.js';
import type { ExitRule, ExitSetting } from '../elastic/exits.js';
import type { Level } from '../elastic/policy.js';
import type { Pooling } from '../model/encoder.js';
import type { EncoderTask } from '../model/spec.js';
import type { Activations, DeviceChoice } from '../native/index.js';

export type { Budget, ElasticSpec, EncoderTask, ExitRule, ExitSetting, Level, Pooling };

/** How weights are stored; arithmetic is f32. */
export type Dtype = 'f32' | 'bf16' | 'f16';

/** Returned with every result. Numbers come from what the kernels ran, not from the request. */
export interface ComputeReport {
  /** The budget that was asked for. */
  requested: Budget;
  /** Name of the level asked for, if any. */
  level: string | null;
  /** The settings it became; absent ones are full. */
  effective: ElasticSpec;
  /** Floating-point operations run, a multiplication and an addition counting as two. */
  flops: number;
  /** What the full model would have run for the same tokens. */
  flopsFull: number;
  /** `flops / flopsFull`. */
  ratio: number;
  /** Mean share of tokens that entered each sub-layer, times the share of its units that they used: [layers] each. */
  layersRun: { attn: Float32Array; mlp: Float32Array };
  /** Of `classify` with exits: the layer after which the class was decided, the last one where no exit was taken. */
  exitLayer?: number;
  /** Milliseconds; of a text scored together with others, those of the whole run. `queue`: waiting for a turn to begin. */
  ms: { queue: number; prefill: number; decode: number; total: number };
  /** Of speculative decoding only. */
  speculative?: SpeculativeReport;
  /** Tokens generated per second of decoding; when scoring, tokens of the run per second. Null when nothing was timed. */
  tokensPerSecond: number | null;
}

/** What speculative decoding did. FLOPs of drafts and of verified rows are in the report's `flops`. */
export interface SpeculativeReport {
  /** Tokens drafted, and how many of them the budget's own choice confirmed. */
  drafted: number;
  accepted: number;
  /** accepted / drafted; null when nothing was drafted. */
  acceptance: number | null;
  /** Name of the level that drafted, if any, and what it came to. */
  level: string | null;
  effective: ElasticSpec;
  /** FLOPs of the drafts. */
  flops: number;
}

/** What a call took in, gave, and cost. */
export interface Usage {
  inputTokens: number;
  /** Of these, tokens whose keys and values were there already. */
  cachedTokens: number;
  outputTokens: number;
  compute: ComputeReport;
}

/** How tokens are chosen, and when to stop. */
export interface Sampling {
  /** Most tokens to generate; default 256. The context limit ends earlier. */
  maxTokens?: number;
  /** 0, the default, is greedy. */
  temperature?: number;
  /** Sample among the k most likely tokens; 0, the default, is off. */
  topK?: number;
  /** Sample among the most likely tokens that together hold this probability; 1, the default, is off. */
  topP?: number;
  /** Generation ends before any of these texts. */
  stop?: readonly string[];
  /** Integer in [0, 2^32); drawn at random when absent. The same seed gives the same text. */
  seed?: number;
}

/** How encoder-decoder models search for the likeliest text. Defaults as the directory's generation_config.json says. */
export interface BeamSampling {
  /** Texts that are continued side by side; 1 is greedy. With a temperature it must be 1. */
  beams?: number;
  /** Log-probabilities of texts are divided by their number of tokens to this power: above 0 favours longer ones. */
  lengthPenalty?: number;
  /**
   * When to stop: as soon as as many texts have ended as there are beams (true), when none that goes on is better already (false),
   * or when none can become better ('never').
   */
  earlyStopping?: boolean | 'never';
}

/** Tokens are drafted at a cheaper budget and verified together at the call's own; see docs/speculative.md. */
export interface SpeculativeOptions {
  /** Must cost less than the call's budget. */
  draft: Budget;
  /** Tokens drafted before they are verified, 1 to 16; 'auto', the default: as many as save time, and none if none do. */
  tokens?: number | 'auto';
}

/** Options of `generate`. Those of beam search are for encoder-decoder models, those of budgets and drafts for decoders. */
export interface GenerateOptions extends Sampling, BeamSampling {
  /** Default 'full', or the `maxLevel` that the model was loaded up to. */
  budget?: Budget;
  /** Name of one of the `adapters` that the model was loaded with. Default none. */
  adapter?: string;
  /** The same tokens in less time where drafts are good. Default off. */
  speculative?: false | SpeculativeOptions;
  /** Ends generation; `finishReason` is then 'abort', and what was generated stays. */
  signal?: AbortSignal;
  /** The same so many milliseconds after the call, waiting included; `finishReason` is then 'deadline'. */
  deadlineMs?: number;
}

/** Options of `prefill`. */
export interface PrefillOptions {
  /** Of all that continues the text, too. Default as of `generate`. */
  budget?: Budget;
  /** The same. */
  adapter?: string;
  /** Ends reading; the promise then rejects with the signal's reason. */
  signal?: AbortSignal;
}

/** One generated token. */
export interface GenerateChunk {
  /** May be empty: a character or a possible stop string is not complete yet. */
  text: string;
  /** Its id. */
  token: number;
  /** Logarithm of its probability, nats, under the model's distribution before temperature, top-k and top-p. */
  logprob: number;
}

/** Why generation ended. */
export type FinishReason = 'stop' | 'length' | 'abort' | 'deadline';

/**
 * Generated text as it comes. Generation runs whether or not anything reads; leaving a `for await` loop early ends it.
 * The promises reject with the error that ended generation; one that nobody awaits stays silent.
 */
export interface GenerateStream extends AsyncIterable<GenerateChunk> {
  /** All of it, without the prompt. */
  readonly text: Promise<string>;
  /** Of the generated tokens. */
  readonly ids: Promise<readonly number[]>;
  /** What was read, generated and spent. */
  readonly usage: Promise<Usage>;
  /** 'stop': an end token or a stop string; 'length': maxTokens or the context limit. */
  readonly finishReason: Promise<FinishReason>;
}

/** Options of `loadModel`. */
export interface LoadOptions {
  /** Storage of the weights while computing; default: as in the checkpoint. */
  dtype?: Dtype;
  /**
   * A PEFT directory with LoRA matrices that every budget has, the full one included. A model with corrections of its own
   * takes none.
   */
  adapter?: string;
  /**
   * PEFT directories by names, of which each call may choose one (`adapter` of `generate`, `prefill`, `score`, `logits` and
   * `trace`); calls with different ones run together. Not with `adapter`, nor for a model with corrections of its own.
   */
  adapters?: Readonly<Record<string, string>>;
  /**
   * Name of a level of a nested model: only the units that it runs are read, and budgets above it are refused. It is then the
   * default budget. The narrowest level that will be asked for most saves most.
   */
  maxLevel?: string;
  /** Tokens a generation may hold, prompt included. Default: the model's limit, at most 4096. */
  maxContext?: number;
  /** Sequences that run at a time; others wait. Default 32, or less than `maxBatchTokens`. */
  maxSequences?: number;
  /**
   * Tokens of one run at most, more than `maxSequences`: the rest is for chunks of prompts, of 512 tokens at most. Default: a
   * chunk and a token of every sequence.
   */
  maxBatchTokens?: number;
  /**
   * Memory for keys and values of all sequences, bytes. Default: one whole context, or up to 1 GiB if several sequences can
   * use it; memory that was never used is not taken from the system on the CPU.
   */
  kvCacheBytes?: number;
  /** Where the model runs; default: `ELASTIFORM_DEVICE`, else the CPU. `auto`: CUDA where it can be used. */
  device?: DeviceChoice;
  /** How activations are stored; default: bf16 on CUDA with bf16 weights, else f32, the only one on the CPU. */
  activations?: Activations;
  /** Threads of this process' kernels; default: all cores. */
  threads?: number;
  /** Called as the work goes on: what is being done, and how many of its steps are. */
  onProgress?: (event: { phase: string; done: number; total: number }) => void;
  /** Stops the work; the promise rejects with the signal's reason. */
  signal?: AbortSignal;
}

/** What a model is: its sizes, and what is elastic about it. */
export interface ModelInfo {
  task: 'causal-lm' | 'seq2seq-lm' | EncoderTask;
  /** Family of the configuration, such as `llama`. */
  architecture: string;
  /** Of an encoder-decoder model, those of the decoder. */
  layers: number;
  /** Features of the residual stream. */
  hidden: number;
  /** Units of the feed-forward layers. */
  ffn: number;
  /** Query heads of a layer. */
  heads: number;
  /** Heads of keys and values of a layer. */
  kvHeads: number;
  /** Classes that `classify` tells apart; empty without a classifier. */
  labels: readonly string[];
  /** Token ids are below it. */
  vocab: number;
  /** Positions the model was trained for. */
  maxPositions: number;
  /** Tokens a call may hold, as it was loaded. */
  maxContext: number;
  /** Of the backbone. */
  parameters: number;
  /** Bytes of the weights that are loaded: of the slice with `maxLevel`. */
  weightBytes: number;
  /** Routers, nested feed-forwards, exits or modules are attached. */
  elastic: boolean;
  /** Routers are trained and calibrated, or there are nested feed-forwards, exits or modules: budgets below full run. */
  calibrated: boolean;
  routerParameters: number;
  /** Names of the adapters that calls may choose. */
  adapters: readonly string[];
  /** Of an encoder-decoder model that has some: modules of both stacks, `'2-3'` being the one that stands for layers 2 and 3. */
  modules?: { encoder: readonly string[]; decoder: readonly string[] };
  /** Named budgets, `full` first. */
  levels: readonly Level[];
}

/** What a model says of a text. */
export interface ScoreResult {
  /** Ids. */
  tokens: readonly number[];
  /** Log-probability, nats, of each token given those before it; the first token has none and is NaN. */
  logprobs: Float32Array;
  usage: Usage;
}

/** What a model is busy with. */
export interface ModelLoad {
  /** Sequences that run. */
  running: number;
  /** Sequences that wait for their turn to begin. */
  waiting: number;
  /** Bytes for keys and values. */
  kvCacheBytes: number;
  /** Those of them that sequences hold, running or kept. */
  kvCacheUsed: number;
}

/**
 * What an encoder reads: a text, a pair of texts such as a premise and a hypothesis, or the token ids of a text with its special
 * tokens, which are not cut.
 */
export type TextInput = string | readonly [string, string] | readonly number[];

/** Options of `classify`. */
export interface ClassifyOptions {
  /**
   * Default 'full'. A share of FLOPs: the costliest level within it where the model has exits, else widths of nested feed-forwards.
   */
  budget?: Budget;
  /**
   * When texts leave before the last layer, over what the budget says; default as that, at the full budget never. A setting by which none
   * can leave is warned of once.
   */
  exit?: ExitSetting;
  /** Texts, or windows of them, that run together at most; default 64. Results do not depend on it. */
  batch?: number;
  /**
   * A text longer than the context is read whole, in windows each of which begins `overlap` tokens before the end of the one before, at
   * most half the context; its scores or features are their mean, by how many tokens they have. Default: it is cut.
   */
  windows?: { overlap: number };
  signal?: AbortSignal;
}

/** The class of a text. */
export interface ClassifyResult {
  /** The class with the largest score. */
  label: string;
  score: number;
  /** Of all classes, the largest score first. They sum to 1, unless a text can be of several classes, or the model scores. */
  scores: readonly { label: string; score: number }[];
  /** Tokens that were left out of the text: it was longer than the context. */
  truncated: number;
  /** Windows that it was read in; 1 of a text that fits, or was cut. */
  windows: number;
  /** `exitLayer` is that of the window that left last. */
  compute: ComputeReport;
}

/** Options of `embed`. */
export interface EmbedOptions extends Omit<ClassifyOptions, 'exit'> {
  /** Default: as the directory says in the layout of sentence-transformers, else 'mean'. */
  pooling?: Pooling;
  /** Vectors have the length 1. Default: as the directory says, else false. */
  normalize?: boolean;
  /** Only so many features, the first ones, for models trained so (Matryoshka); default: all. */
  dims?: number;
}

/** Vectors of texts. */
export interface EmbedResult {
  /** f32 [dims], one for each text. */
  vectors: Float32Array[];
  dims: number;
  /**
   * Vectors with equal ids can be compared: they come from the same weights and tokenizer in the same way, at widths that were
   * trained together or at the same ones.
   */
  spaceId: string;
  /** Tokens that were left out of each text. */
  truncated: readonly number[];
  /** Windows that each text was read in; 1 of a text that fits, or was cut. */
  windows: readonly number[];
  /** Of each text. */
  compute: readonly ComputeReport[];
  /** Of all texts. */
  usage: Usage;
}
