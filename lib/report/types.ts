// What a report is made of: plain data, the content of report.json.

/** A measured value with its 95 % interval. */
export interface Measured {
  readonly value: number;
  readonly low: number;
  readonly high: number;
}

/** The model itself, by its routers or as a slice without them, and the baselines. */
export type Method = 'routed' | 'nested' | 'random' | 'drop';

/** One method at one budget. */
export interface LevelResult {
  readonly method: Method;
  /** Share of FLOPs asked for, or the name of a level. */
  readonly budget: number | string;
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
  /** Time of prefill over that of the full model; null when not timed. */
  readonly timeRatio: number | null;
  /** Mean share of tokens processed, per layer. */
  readonly layers: PerLayer<number>;
}

/** The loss at a step of training. */
export interface TrainingPoint {
  readonly step: number;
  readonly loss: number;
}

/** Quality on held-out text while training: metrics by the name of what was evaluated. */
export interface TrainingEvaluation {
  readonly step: number;
  readonly levels: Readonly<Record<string, Readonly<Record<string, number>>>>;
}

/** A number for every layer's attention and FFN. */
export interface PerLayer<T> {
  readonly attn: readonly T[];
  readonly mlp: readonly T[];
}

/** What the routers did at a budget. */
export interface RouterMap {
  readonly budget: number | string;
  /** Share of tokens that entered, times the share of its heads or blocks they used where they choose. */
  readonly measured: PerLayer<number>;
  /** The same as it was meant to be; null where there is no router. */
  readonly target: PerLayer<number | null>;
}

/** A generated text with what it cost. */
export interface Sample {
  readonly label: string;
  readonly prompt: string;
  readonly text: string;
  readonly ratio: number;
  readonly tokensPerSecond: number;
  readonly trace: SampleTrace;
}

/** Which sub-layers the tokens of prompt and text entered. */
export interface SampleTrace {
  readonly tokens: readonly string[];
  readonly promptTokens: number;
  readonly layers: number;
  /** Base64 of one byte for every token and layer, [tokens, layers]: 1 where the token entered. */
  readonly attn: string;
  readonly mlp: string;
  /** Share of its heads, and of its FFN, that a token which enters uses, for every layer. */
  readonly headShare: readonly number[];
  readonly blockShare: readonly number[];
}

/** Everything a report shows. */
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
    /** Null when not known. */
    readonly seconds: number | null;
    readonly tokensPerSecond: number;
    readonly points: readonly TrainingPoint[];
    readonly evaluations: readonly TrainingEvaluation[];
  };
  /** Null when there was no text to evaluate on. */
  readonly evaluation: {
    readonly data: string;
    readonly tokens: number;
    readonly sequences: number;
    readonly levels: readonly LevelResult[];
  } | null;
  readonly routing: {
    /** What the shares were counted on. */
    readonly on: string;
    readonly maps: readonly RouterMap[];
  };
  readonly samples: readonly Sample[];
  /** What a reader should know before quoting a number. */
  readonly notes: readonly string[];
  readonly seconds: number;
}
