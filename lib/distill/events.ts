// What a training run reports while it goes, and the settings every run shares.

import { ElastiformError } from '../native/errors.js';
import type { DeviceChoice } from '../native/index.js';

/** What a warning of a training run is about. */
export type WarningCode =
  | 'nan-grad'
  | 'router-collapse'
  | 'capacity-off-target'
  | 'data-repeat'
  | 'bad-rows'
  | 'truncated';

/** What a training run reports through `onEvent`; rates are per second, memory in bytes of the process. */
export type TrainEvent =
  | {
      type: 'step';
      step: number;
      of: number;
      loss: number;
      terms: Record<string, number>;
      lr: number;
      gradNorm: number;
      tokensPerSecond: number;
      memoryBytes: number;
      etaSeconds: number;
    }
  | { type: 'eval'; step: number; levels: Record<string, Record<string, number>>; best: boolean }
  /** Before and after training, or between stages: how much of a measurement is done. */
  | { type: 'measure'; what: 'sensitivity' | 'allocation' | 'importance'; done: number; total: number }
  /** A stage of several begins, the first being 1; one that is done already ends at once. */
  | { type: 'stage'; name: string; index: number; of: number }
  | { type: 'save'; step: number; dir: string }
  | { type: 'warn'; code: WarningCode; message: string };

/** AdamW (arXiv 1711.05101) and its learning rate over the steps. */
export interface OptimizerConfig {
  /** Largest learning rate; default 0.02 for routers, 0.001 in pretraining, 5e-5 in fine-tuning (from scratch 5e-4). */
  lr?: number;
  /** Default [0.9, 0.95]. */
  betas?: readonly [number, number];
  /** Default 1e-8. */
  eps?: number;
  /** Default 0 in distillation, 0.1 in pretraining, 0.01 in fine-tuning. */
  weightDecay?: number;
  /** Largest global norm of the gradient; 0 turns clipping off. Default 1. */
  gradClip?: number;
  /** How the learning rate falls to 0 after warm-up; default 'cosine'. */
  schedule?: 'cosine' | 'linear' | 'constant';
  /** Steps of linear warm-up; default 3 % of all. */
  warmup?: number;
}

/** Settings that distillation and pretraining share. */
export interface TrainConfig {
  /** Optimizer steps in all. Exactly one of `steps` and `epochs`. */
  steps?: number;
  /** Passes over the data, whole or not. */
  epochs?: number;
  /** Longest segment, in tokens; longer documents are split. */
  sequenceLength?: number;
  /** Rows of one micro-batch at most. */
  batchTokens?: number;
  /** Micro-batches whose gradients are added before one optimizer step. */
  gradAccumulation?: number;
  /** Default: AdamW as {@link OptimizerConfig} says. */
  optimizer?: OptimizerConfig;
  /** Recompute each block in the backward pass instead of keeping its activations. */
  gradCheckpointing?: boolean;
  /** Of everything drawn: order of the data, initial values, capacities, noise. Default 0. */
  seed?: number;
  /** Where training runs; default: `ELASTIFORM_DEVICE`, else the CPU. `auto`: CUDA where it can be used. */
  device?: DeviceChoice;
  /** Steps between evaluations of the held-out data; needs held-out data. */
  evalEvery?: number;
  /** Steps between checkpoints; one is written at the end in any case. */
  saveEvery?: number;
  /** Checkpoints kept, the newest; the best one stays besides. */
  keep?: number;
  /** Ends the run when `patience` evaluations in a row are not better than the best by more than `minDelta` (default 0). */
  earlyStop?: { patience: number; minDelta?: number };
  /** How often a step is an event and a line of metrics.jsonl; default every one. */
  log?: { everySteps?: number };
  /** 'auto' continues from the newest checkpoint in `out`; false starts anew and deletes them. */
  resume?: 'auto' | false;
  /** Awaited; returning (a promise of) 'stop' ends the run as an early stop does. */
  onEvent?: (event: TrainEvent) => unknown;
  /** Stops after saving; the result says `stopped: 'signal'`. */
  signal?: AbortSignal;
}

/** How a training run ended. */
export interface TrainResult {
  /** Directory of what was trained. */
  dir: string;
  /** Optimizer steps done, those before a resume included. */
  step: number;
  /** Of runs with held-out data: the step whose parameters were kept, and its metric. */
  best?: { step: number; metric: number };
  /** 'early': by `earlyStop` or `onEvent`; 'signal': by `signal`, not finished, to be resumed. */
  stopped: 'done' | 'early' | 'signal';
}

/** Training has diverged: the loss or its gradient is not finite, step after step. */
export class DivergedError extends ElastiformError {
  readonly code = 'Diverged';
}
