// What calls of kernels take and return.
import type { Act, DivergenceKind } from '../graph/index.js';
import type { DeviceChoice } from '../native/index.js';
import type { Weight } from './weight.js';

/** Settings of a {@link Kernels} object. */
export interface KernelOptions {
  /** Where calls run; default: `ELASTIFORM_DEVICE`, else the CPU. `auto`: CUDA where it can be used. */
  device?: DeviceChoice;
}

/** What every call takes. */
export interface CallOptions {
  /** Stops the call between steps; it then rejects with the signal's reason. */
  signal?: AbortSignal;
}

/** What a call really cost, counted and timed where it ran. */
export interface Cost {
  /** Floating-point operations, a multiplication and an addition counting as two. */
  flops: number;
  /** Milliseconds on the engine's thread. */
  ms: number;
}

/** Options of `routeTopk` and `routeThreshold`. */
export interface RouteOptions extends CallOptions {
  /** i32 [S + 1]: where every segment (sequence) starts among the rows, and their number. Default: one segment. */
  offsets?: Int32Array;
}

/** The rows that a routing chose. */
export interface RouteResult extends Cost {
  /** i32 [R]: the rows chosen, ascending. */
  rows: Int32Array;
  /** i32 [S + 1]: where every segment starts among the rows chosen. */
  offsets: Int32Array;
}

/** A low-rank correction of a matrix w [N, K]: `x (w + b a)^T` (Hu et al., arXiv 2106.09685). */
export interface Lora {
  /** [rank, K]. */
  a: Weight;
  /** [N, rank], with the scale (alpha / rank) multiplied in. */
  b: Weight;
}

/** Options of `linear`. */
export interface LinearOptions extends CallOptions {
  /** [N]. */
  bias?: Weight;
  /** Applied to the sum; default `none`. */
  act?: Act;
  /** i32 [R]: rows of x to multiply, ascending and unique. Default: all. */
  rows?: Int32Array;
  /** Outputs to compute, the first of w's N; default N. */
  width?: number;
  /** Summed with the product. */
  lora?: Lora;
}

/** Rows that a product or a layer gave. */
export interface LinearResult extends Cost {
  /** f32 [rows, width], row by row. */
  y: Float32Array;
}

/** The matrices of a feed-forward layer of F units on rows of D features. */
export interface FeedForwardWeights {
  /** [F, D]; makes the units gated, `act(x gate^T) * (x up^T)`. Without it they are `act(x up^T)`. */
  gate?: Weight;
  /** [F, D]. */
  up: Weight;
  /** [D, F]. */
  down: Weight;
  /** [F]. */
  gateBias?: Weight;
  /** [F]. */
  upBias?: Weight;
  /** [D]. */
  downBias?: Weight;
}

/** Options of `feedForward`. */
export interface FeedForwardOptions extends CallOptions {
  /** Activation function of the units. */
  act: Act;
  /** Units to use, the first of F (a nested slice, MatFormer, arXiv 2310.07707); default F. */
  width?: number;
  /** i32 [R]: rows that enter, ascending and unique, as routing gives them. Default: all. */
  rows?: Int32Array;
  /** f32 [R]: factor of what every row that enters adds. Default 1. */
  gates?: Float32Array;
  /** f32 [N, D]: what the layer is added to. Default 0. */
  residual?: Float32Array;
}

/** Options of `divergence`. */
export interface DivergenceOptions extends CallOptions {
  /** Default `kl`: of the student from the teacher, KL(p || q). */
  kind?: DivergenceKind;
  /** The teacher's share of the mixture of `jsd`, between 0 and 1; default 0.5. */
  beta?: number;
  /** f32 [R]: factors of rows; default 1 / R each, which makes `loss` the mean. */
  weights?: Float32Array;
  /** [V, J], the teacher's own head; default: the student's. */
  teacherHead?: Weight;
  /** Whether to compute `gradient`; default true. */
  gradient?: boolean;
}

/** Divergences of rows, their weighted sum, and its gradient. */
export interface DivergenceResult extends Cost {
  /** `sum weights[r] row[r]`, nats. */
  loss: number;
  /** f32 [R]: the divergence of every row, nats. */
  row: Float32Array;
  /** f32 [R]: 1 where student and teacher prefer the same token. */
  agree: Float32Array;
  /** f32 [R, K]: gradient of `loss` with respect to the student's hidden states. */
  gradient: Float32Array | null;
}

/**
 * How sure a row must be to leave: `entropy` of its distribution below the threshold, in nats (BranchyNet, arXiv
 * 1709.01686); `margin` between its two largest probabilities, or its largest, `maxprob`, above it.
 */
export type ExitRule = 'entropy' | 'margin' | 'maxprob';

/** Options of `exit`. */
export interface ExitOptions extends CallOptions {
  rule: ExitRule;
  /** Nats for `entropy`, a probability for the others. Nobody leaves at 0 by entropy, and at 1 by the others. */
  threshold: number;
}

/** Rows that leave, and rows that go on. */
export interface ExitResult extends Cost {
  /** f32 [R]: entropy in nats, margin, or largest probability of every row. */
  confidence: Float32Array;
  /** i32: the rows that leave, ascending. */
  leave: Int32Array;
  /** i32: the rows that go on, ascending. */
  stay: Int32Array;
}
