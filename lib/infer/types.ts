// What calls that run a model take and return.

import type { ElasticSpec } from '../elastic/axes.js';
import type { Budget } from '../elastic/budget.js';
import type { Level } from '../elastic/policy.js';
import type { Activations, DeviceChoice } from '../native/index.js';

export type { Budget, ElasticSpec, Level };

/** How weights are stored; arithmetic is f32. */
export type Dtype = 'f32' | 'bf16' | 'f16';

/** Returned with every result. Numbers come from what the kernels ran, not from the request. */
export interface ComputeReport {
  requested: Budget;
  /** Name of the level asked for, if any. */
  level: string | null;
  effective: ElasticSpec;
  /** Floating-point operations run, a multiplication and an addition counting as two. */
  flops: number;
  /** What the full model would have run for the same tokens. */
  flopsFull: number;
  ratio: number;
  /** Mean share of tokens that entered each sub-layer, per layer. */
  layersRun: { attn: Float32Array; mlp: Float32Array };
  /** Of a text scored together with others: of the whole run. */
  ms: { prefill: number; decode: number; total: number };
  /** Tokens generated per second of decoding; when scoring, tokens of the run per second. Null when nothing was timed. */
  tokensPerSecond: number | null;
}

export interface Usage {
  inputTokens: number;
  outputTokens: number;
  compute: ComputeReport;
}

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

export interface GenerateOptions extends Sampling {
  /** Default 'full'. */
  budget?: Budget;
  signal?: AbortSignal;
}

export interface GenerateChunk {
  /** May be empty: a character or a possible stop string is not complete yet. */
  text: string;
  token: number;
  /** Under the model's distribution before temperature, top-k and top-p. */
  logprob: number;
}

export type FinishReason = 'stop' | 'length' | 'abort';

/**
 * Generated text as it comes. Generation runs whether or not anything reads; leaving a `for await` loop early ends it.
 * The promises reject with the error that ended generation; one that nobody awaits stays silent.
 */
export interface GenerateStream extends AsyncIterable<GenerateChunk> {
  readonly text: Promise<string>;
  readonly ids: Promise<readonly number[]>;
  readonly usage: Promise<Usage>;
  /** 'stop': an end token or a stop string; 'length': maxTokens or the context limit. */
  readonly finishReason: Promise<FinishReason>;
}

export interface LoadOptions {
  /** Storage of the weights while computing; default: as in the checkpoint. */
  dtype?: Dtype;
  /**
   * A PEFT directory with LoRA matrices that every budget has, the full one included. A model with corrections of its own
   * takes none.
   */
  adapter?: string;
  /** Tokens a generation may hold, prompt included. Default: the model's limit, at most 4096. */
  maxContext?: number;
  /** Where the model runs; default: `ELASTIFORM_DEVICE`, else the CPU. `auto`: CUDA where it can be used. */
  device?: DeviceChoice;
  /** How activations are stored; default: bf16 on CUDA with bf16 weights, else f32, the only one on the CPU. */
  activations?: Activations;
  /** Threads of this process' kernels; default: all cores. */
  threads?: number;
  onProgress?: (event: { phase: string; done: number; total: number }) => void;
  signal?: AbortSignal;
}

export interface ModelInfo {
  task: 'causal-lm';
  architecture: string;
  layers: number;
  hidden: number;
  ffn: number;
  heads: number;
  kvHeads: number;
  vocab: number;
  /** Positions the model was trained for. */
  maxPositions: number;
  maxContext: number;
  parameters: number;
  /** Routers are attached. */
  elastic: boolean;
  /** Routers are trained and calibrated: budgets below 1 run. */
  calibrated: boolean;
  routerParameters: number;
  levels: readonly Level[];
}

export interface ScoreResult {
  tokens: readonly number[];
  /** Log-probability of each token given those before it; the first token has none and is NaN. */
  logprobs: Float32Array;
  usage: Usage;
}
