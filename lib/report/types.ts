// What a report is made of: plain data, the content of report.json.

/** A measured value with its 95 % interval. */
export interface Measured {
  readonly value: number;
  readonly low: number;
  readonly high: number;
}

export type Method = 'routed' | 'random' | 'drop';

/** One method at one budget. */
export interface LevelResult {
  readonly method: Method;
  /** Share of FLOPs asked for. */
  readonly budget: number;
  /** Share of the full model's FLOPs the kernels counted. */
  readonly ratio: number;
  /** Mean share of tokens that entered a sub-layer. */
  readonly share: number;
  readonly perplexity: Measured;
  /** Null when the length of the text in bytes is not known. */
  readonly bitsPerByte: Measured | null;
  /** Mean KL divergence from the full model, nats per token. */
  readonly kl: Measured;
  /** Share of positions whose most likely next token is the full model's. */
  readonly agreement: Measured;
  /** Prefill tokens per second, measured; null when not timed. */
  readonly tokensPerSecond: number | null;
  /** Mean share of tokens processed, per layer. */
  readonly layers: { readonly attn: readonly number[]; readonly mlp: readonly number[] };
}

export interface TrainingPoint {
  readonly step: number;
  readonly loss: number;
}

export interface Sample {
  readonly label: string;
  readonly prompt: string;
  readonly text: string;
  readonly ratio: number;
  readonly tokensPerSecond: number;
}

export interface ReportData {
  readonly title: string;
  readonly version: string;
  /** ISO date and time. */
  readonly created: string;
  readonly machine: string;
  readonly model: {
    readonly name: string;
    readonly architecture: string;
    readonly parameters: number;
    readonly layers: number;
    readonly hidden: number;
  };
  readonly elastic: { readonly trainable: number; readonly share: number; readonly places: string };
  readonly training: {
    readonly steps: number;
    readonly seconds: number;
    readonly tokensPerSecond: number;
    readonly points: readonly TrainingPoint[];
  };
  readonly evaluation: {
    readonly data: string;
    readonly tokens: number;
    readonly sequences: number;
    readonly levels: readonly LevelResult[];
  };
  readonly samples: readonly Sample[];
  /** What a reader should know before quoting a number. */
  readonly notes: readonly string[];
  readonly seconds: number;
}
