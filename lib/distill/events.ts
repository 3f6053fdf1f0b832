// What a training run reports while it goes, and the settings every run shares.

import type { DeviceChoice } from '../native/index.js';

export type WarningCode = 'nan-grad' | 'router-collapse' | 'capacity-off-target' | 'data-repeat';

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
  /** Before and after training: how much of a measurement is done. */
  | { type: 'measure'; what: 'sensitivity' | 'allocation'; done: number; total: number }
  | { type: 'save'; step: number; dir: string }
  | { type: 'warn'; code: WarningCode; message: string };

export interface OptimizerConfig {
  lr?: number;
  betas?: readonly [number, number];
  eps?: number;
  weightDecay?: number;
  /** Largest global norm of the gradient; 0 turns clipping off. */
  gradClip?: number;
  schedule?: 'cosine' | 'linear' | 'constant';
  /** Steps of linear warm-up. */
  warmup?: number;
}

/** Settings that distillation and pretraining share. */
export interface TrainConfig {
  /** Optimizer steps in all. Exactly one of `steps` and `epochs`. */
  steps?: number;
  epochs?: number;
  /** Longest segment, in tokens; longer documents are split. */
  sequenceLength?: number;
  /** Rows of one micro-batch at most. */
  batchTokens?: number;
  /** Micro-batches whose gradients are added before one optimizer step. */
  gradAccumulation?: number;
  optimizer?: OptimizerConfig;
  /** Recompute each block in the backward pass instead of keeping its activations. */
  gradCheckpointing?: boolean;
  seed?: number;
  /** Where training runs; default: `ELASTIFORM_DEVICE`, else the CPU. `auto`: CUDA where it can be used. */
  device?: DeviceChoice;
  /** Steps between evaluations of the held-out data; needs held-out data. */
  evalEvery?: number;
  /** Steps between checkpoints; one is written at the end in any case. */
  saveEvery?: number;
  /** Checkpoints kept, the newest; the best one stays besides. */
  keep?: number;
  earlyStop?: { patience: number; minDelta?: number };
  log?: { everySteps?: number };
  /** 'auto' continues from the newest checkpoint in `out`; false starts anew and deletes them. */
  resume?: 'auto' | false;
  /** Awaited; returning (a promise of) 'stop' ends the run as an early stop does. */
  onEvent?: (event: TrainEvent) => unknown;
  /** Stops after saving; the result says `stopped: 'signal'`. */
  signal?: AbortSignal;
}

export interface TrainResult {
  /** Directory of what was trained. */
  dir: string;
  step: number;
  best?: { step: number; metric: number };
  stopped: 'done' | 'early' | 'signal';
}
