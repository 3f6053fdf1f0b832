// What a search finds, and that it may find nothing.
import type { FfnWidth } from '../../elastic/nested.js';
import { ElastiformError } from '../../native/errors.js';

/** A slice with its cost and its quality. */
export interface SearchPoint {
  /** Mean KL divergence of the next-token distribution from the whole model's, nats per token. */
  readonly kl: number;
  /** Share of positions whose most likely next token is the whole model's. */
  readonly agreement: number;
  /** Units of every layer's feed-forward. */
  readonly widths: readonly number[];
  /** The same as a setting of a budget. */
  readonly ffnWidth: FfnWidth;
  readonly parameters: number;
  /** Of its weights, extracted. */
  readonly bytes: number;
  readonly flopsRatio: number;
  /** Expected on this device; null without a constraint on it. */
  readonly latencyMs: number | null;
}

/** No slice keeps the constraint; `nearest` is the one that comes closest. */
export class InfeasibleError extends ElastiformError {
  readonly code = 'Infeasible';
  constructor(
    message: string,
    readonly nearest: SearchPoint,
  ) {
    super(message);
  }
}
