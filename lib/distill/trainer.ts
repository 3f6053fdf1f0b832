// The training loop: schedule, accumulation, clipping, skipped steps, events, metrics, evaluation, checkpoints, resuming.
import { appendFile, mkdir, readFile, rmdir } from 'node:fs/promises';
import { join } from 'node:path';
import { adamw, Graph, Program } from '../graph/index.js';
import { inFileSystem, lockDirectory, writeFileAtomic } from '../io/files.js';
import { InvalidArgumentError } from '../native/errors.js';
import { type Engine, loadAddon } from '../native/index.js';
import {
  clearCheckpoints,
  loadCheckpoint,
  newestCheckpoint,
  saveCheckpoint,
  type TrainerState,
} from './checkpoints.js';
import type { Batch, TrainingData } from './data.js';
import { DivergedError, type TrainConfig, type TrainEvent, type WarningCode } from './events.js';
import type { Trainable } from './trainable.js';

/** Skipped steps in a row after which a run gives up. */
const mostSkipped = 10;

/** What one method of training brings to the loop. */
export interface Task<B extends Pick<Batch, 'ids'> = Batch> {
  api: 'distill' | 'pretrain' | 'finetune' | 'costEff' | 'modular';
  engine: Engine;
  trainable: Trainable;
  data: TrainingData<B>;
  /** Whatever else decides the bits of the run. */
  identity: Record<string, unknown>;
  /** Rows of a batch that carry loss, or texts. */
  lossRows(batch: B): number;
  /**
   * Adds the gradient of a micro-batch to `trainable.grads`. Every loss row weighs 1/total, so that the terms of a
   * step's micro-batches (`loss` among them) add up to the step's.
   */
  micro(
    batch: B,
    at: { step: number; index: number; total: number; signal?: AbortSignal },
  ): Promise<Record<string, number>>;
  /** Measures the held-out data; the metric is better when lower. */
  evaluate?(signal?: AbortSignal): Promise<{ levels: Record<string, Record<string, number>>; metric: number }>;
}

export interface ResolvedConfig {
  steps: number;
  batchTokens: number;
  gradAccumulation: number;
  seed: number;
  optimizer: Required<NonNullable<TrainConfig['optimizer']>>;
  evalEvery: number;
  saveEvery: number;
  keep: number;
  earlyStop: { patience: number; minDelta: number } | null;
  logEvery: number;
  resume: 'auto' | false;
}

const trainKeys = [
  ...['steps', 'epochs', 'sequenceLength', 'batchTokens', 'gradAccumulation', 'optimizer', 'gradCheckpointing', 'seed'],
  ...['evalEvery', 'saveEvery', 'keep', 'earlyStop', 'log', 'resume', 'device', 'onEvent', 'signal'],
];

/** Throws InvalidArgumentError for a key that is not known. */
export function checkKeys(api: string, name: string, object: object, known: readonly string[]): void {
  for (const key of Object.keys(object)) {
    if (!known.includes(key)) {
      throw new InvalidArgumentError(`[${api}] unknown ${name} '${key}'; it takes ${known.join(', ')}`);
    }
  }
}

/** Checks the settings that every kind of training shares, besides `own` ones; throws InvalidArgumentError. */
export function checkConfig(api: string, config: TrainConfig, own: readonly string[]): void {
  checkKeys(api, 'option', config, [...own, ...trainKeys]);
  const { optimizer = {}, earlyStop, log = {} } = config;
  const wrong = (name: string, expected: string, value: unknown): never => {
    throw new InvalidArgumentError(`[${api}] ${name} must be ${expected}, got ${JSON.stringify(value)}`);
  };
  for (const [name, group] of Object.entries({ optimizer, earlyStop: earlyStop ?? {}, log })) {
    if (typeof group !== 'object' || group === null || Array.isArray(group)) wrong(name, 'an object', group);
  }
  for (const name of ['plan', 'out'].filter((key) => own.includes(key))) {
    const value = (config as Record<string, unknown>)[name];
    if (typeof value !== 'string' || value === '') wrong(name, 'the path of a directory', value);
  }
  checkKeys(api, 'optimizer option', optimizer, [
    'lr',
    'betas',
    'eps',
    'weightDecay',
    'gradClip',
    'schedule',
    'warmup',
  ]);
  checkKeys(api, 'earlyStop option', earlyStop ?? {}, ['patience', 'minDelta']);
  checkKeys(api, 'log option', log, ['everySteps']);
  const check = (name: string, value: unknown, ok: (v: number) => boolean, expected: string) => {
    if (value !== undefined && !(typeof value === 'number' && ok(value))) {
      throw new InvalidArgumentError(`[${api}] ${name} must be ${expected}, got ${String(value)}`);
    }
  };
  const positive = (v: number) => Number.isInteger(v) && v >= 1;
  const some = (v: number) => Number.isFinite(v) && v > 0;
  const notNegative = (v: number) => Number.isFinite(v) && v >= 0;
  if ((config.steps === undefined) === (config.epochs === undefined)) {
    throw new InvalidArgumentError(`[${api}] exactly one of steps and epochs must be given`);
  }
  check('steps', config.steps, positive, 'a positive integer');
  check('epochs', config.epochs, some, 'a positive number');
  check('sequenceLength', config.sequenceLength, (v) => positive(v) && v >= 2, 'an integer of at least 2');
  check('batchTokens', config.batchTokens, positive, 'a positive integer');
  check('gradAccumulation', config.gradAccumulation, positive, 'a positive integer');
  check('seed', config.seed, Number.isInteger, 'an integer');
  check('evalEvery', config.evalEvery, positive, 'a positive integer');
  check('saveEvery', config.saveEvery, positive, 'a positive integer');
  check('keep', config.keep, positive, 'a positive integer');
  check('earlyStop.patience', earlyStop?.patience, positive, 'a positive integer');
  check('earlyStop.minDelta', earlyStop?.minDelta, notNegative, 'zero or more');
  check('log.everySteps', log.everySteps, positive, 'a positive integer');
  check('optimizer.lr', optimizer.lr, some, 'a positive number');
  const { betas } = optimizer;
  if (betas !== undefined && !(Array.isArray(betas) && betas.length === 2))
    wrong('optimizer.betas', 'two numbers', betas);
  check('optimizer.betas[0]', optimizer.betas?.[0], (v) => v >= 0 && v < 1, 'in [0, 1)');
  check('optimizer.betas[1]', optimizer.betas?.[1], (v) => v >= 0 && v < 1, 'in [0, 1)');
  check('optimizer.eps', optimizer.eps, some, 'a positive number');
  check('optimizer.weightDecay', optimizer.weightDecay, notNegative, 'zero or more');
  check('optimizer.gradClip', optimizer.gradClip, notNegative, 'zero or more');
  check('optimizer.warmup', optimizer.warmup, (v) => Number.isInteger(v) && v >= 0, 'an integer of zero or more');
  if (!['cosine', 'linear', 'constant', undefined].includes(optimizer.schedule)) {
    throw new InvalidArgumentError(
      `[${api}] optimizer.schedule must be cosine, linear or constant, got ${optimizer.schedule}`,
    );
  }
  if (!['boolean', 'undefined'].includes(typeof config.gradCheckpointing))
    wrong('gradCheckpointing', 'true or false', config.gradCheckpointing);
  if (config.resume !== undefined && config.resume !== 'auto' && config.resume !== false) {
    throw new InvalidArgumentError(`[${api}] resume must be 'auto' or false, got ${String(config.resume)}`);
  }
}

/** Fills in defaults; `defaults` are those of the kind of training. */
export function resolveConfig(
  config: TrainConfig,
  data: Omit<TrainingData<unknown>, 'sha256'>,
  defaults: { batchTokens: number; lr: number; weightDecay: number },
): ResolvedConfig {
  const seed = config.seed ?? 0;
  const batchTokens = config.batchTokens ?? Math.max(defaults.batchTokens, data.sequenceLength);
  const gradAccumulation = config.gradAccumulation ?? 1;
  let { steps } = config;
  if (steps === undefined) {
    const whole = Math.floor(config.epochs!);
    let batches = 0;
    for (let epoch = 0; epoch < whole; epoch++) batches += data.batchesPerEpoch(epoch, batchTokens, seed);
    if (config.epochs! > whole) batches += (config.epochs! - whole) * data.batchesPerEpoch(whole, batchTokens, seed);
    steps = Math.max(Math.ceil(batches / gradAccumulation), 1);
  }
  const every = Math.max(Math.ceil(steps / 10), 1);
  return {
    steps,
    batchTokens,
    gradAccumulation,
    seed,
    optimizer: {
      lr: defaults.lr,
      betas: [0.9, 0.95],
      eps: 1e-8,
      weightDecay: defaults.weightDecay,
      gradClip: 1,
      schedule: 'cosine',
      warmup: Math.ceil(steps * 0.03),
      ...config.optimizer,
    },
    evalEvery: config.evalEvery ?? every,
    saveEvery: config.saveEvery ?? every,
    keep: config.keep ?? 2,
    earlyStop: config.earlyStop ? { minDelta: 0, ...config.earlyStop } : null,
    logEvery: config.log?.everySteps ?? 1,
    resume: config.resume ?? 'auto',
  };
}

/** Learning rate of a step (0-based): linear warm-up, then from `lr` to 0 over the remaining steps. */
export function learningRate(step: number, steps: number, optimizer: ResolvedConfig['optimizer']): number {
  const { lr, warmup, schedule } = optimizer;
  if (step < warmup) return (lr * (step + 1)) / warmup;
  const progress = (step - warmup) / Math.max(steps - warmup, 1);
  if (schedule === 'constant') return lr;
  return schedule === 'linear' ? lr * (1 - progress) : lr * 0.5 * (1 + Math.cos(Math.PI * progress));
}

/**
 * Runs `use` while no other process may write to `out`, creating the directory.
 * Errors: whatever lockDirectory throws when another process holds it.
 */
export async function withLock<T>(out: string, use: () => Promise<T>): Promise<T> {
  const created = await inFileSystem('create', out, () => mkdir(out, { recursive: true }));
  const lock = await lockDirectory(out);
  let failed = true;
  try {
    const result = await use();
    failed = false;
    return result;
  } finally {
    await lock.release();
    // A run that was refused leaves no empty directory; one that wrote something stays.
    if (failed && created) await rmdir(out).catch(() => {});
  }
}

/**
 * Trains until `config.steps`, an early stop or the signal, from the newest checkpoint when there is one. On return the
 * parameters are the best ones when the task is evaluated and the run is over, else the last.
 *
 * The caller holds the lock of `out`. A step whose loss or gradient is not finite is skipped with a warning.
 * Errors: DivergedError after 10 skipped steps in a row; InvalidDataError from a checkpoint that does not fit.
 */
export async function train<B extends Pick<Batch, 'ids'>>(
  task: Task<B>,
  config: ResolvedConfig,
  out: string,
  hooks: Pick<TrainConfig, 'onEvent' | 'signal'>,
): Promise<{ step: number; stopped: 'done' | 'early' | 'signal'; best: { step: number; metric: number } | null }> {
  const { trainable, data, engine } = task;
  const { steps, optimizer, seed } = config;
  const { signal } = hooks;
  const identity = {
    ...task.identity,
    data: data.sha256(),
    steps,
    batchTokens: config.batchTokens,
    gradAccumulation: config.gradAccumulation,
    seed,
    optimizer,
  };

  let state: TrainerState = {
    version: 1,
    step: 0,
    updates: 0,
    cursor: { epoch: 0, segment: 0 },
    best: null,
    stale: 0,
    skipped: 0,
    config: identity,
  };
  const metrics = join(out, 'metrics.jsonl');
  const newest = config.resume === 'auto' ? await newestCheckpoint(out) : null;
  if (newest === null) await clearCheckpoints(out);
  else state = await loadCheckpoint(out, newest, trainable, identity);
  await keepMetrics(metrics, newest === null ? -1 : state.step);

  let wantStop = false;
  const emit = async (event: TrainEvent): Promise<void> => {
    if (event.type !== 'save') {
      await inFileSystem('append to', metrics, () => appendFile(metrics, `${JSON.stringify(event)}\n`));
    }
    if ((await hooks.onEvent?.(event)) === 'stop') wantStop = true;
  };
  const warn = (code: WarningCode, message: string) => emit({ type: 'warn', code, message });
  let savedAt = newest;
  const save = async (): Promise<void> => {
    if (savedAt === state.step) return;
    const dir = await saveCheckpoint(out, trainable, state, config.keep);
    savedAt = state.step;
    await emit({ type: 'save', step: state.step, dir });
  };
  let stopped: 'done' | 'early' | 'signal' = 'done';
  const evaluate = async (): Promise<void> => {
    if (!task.evaluate) return;
    const { levels, metric } = await task.evaluate(signal);
    const best =
      Number.isFinite(metric) && (!state.best || metric < state.best.metric - (config.earlyStop?.minDelta ?? 0));
    if (best) state.best = { step: state.step, metric };
    state.stale = best ? 0 : state.stale + 1;
    await emit({ type: 'eval', step: state.step, levels, best });
    if (best) await save();
    if (config.earlyStop && state.stale >= config.earlyStop.patience) stopped = 'early';
  };

  // A run that was stopped early stays stopped.
  if (config.earlyStop && state.stale >= config.earlyStop.patience) stopped = 'early';
  const update = optimizerProgram(trainable, engine);
  try {
    if (newest === null) await evaluate();
    const started = { time: performance.now(), step: state.step };
    let since = { time: performance.now(), tokens: 0 };
    while (state.step < steps && stopped === 'done' && !wantStop) {
      const batches: B[] = [];
      let { cursor } = state;
      for (let i = 0; i < config.gradAccumulation; i++) {
        const next = data.next(cursor, config.batchTokens, seed);
        if (next.cursor.epoch === 4 && cursor.epoch === 3) {
          await warn('data-repeat', 'the training data was used four times; more text would help more than more steps');
        }
        batches.push(next.batch);
        cursor = next.cursor;
      }
      const total = Math.max(
        batches.reduce((sum, batch) => sum + task.lossRows(batch), 0),
        1,
      );
      const terms: Record<string, number> = {};
      for (const [index, batch] of batches.entries()) {
        const part = await task.micro(batch, { step: state.step, index, total, signal });
        for (const [name, value] of Object.entries(part)) terms[name] = (terms[name] ?? 0) + value;
      }
      const { loss, ...others } = terms;

      // Not abortable: a half-applied update could not be resumed from.
      const lr = learningRate(state.step, steps, optimizer);
      const t = state.updates + 1;
      const [beta1, beta2] = optimizer.betas;
      const usable = Number.isFinite(loss);
      const gradNorm = await update.run(
        usable
          ? [lr, beta1, beta2, optimizer.eps, optimizer.weightDecay, optimizer.gradClip, 1 - beta1 ** t, 1 - beta2 ** t]
          : null,
      );
      if (usable && Number.isFinite(gradNorm)) {
        state.updates++;
        state.skipped = 0;
      } else {
        state.skipped++;
        const what = usable ? `the norm of the gradient is ${gradNorm}` : `the loss is ${loss}`;
        await warn('nan-grad', `step ${state.step + 1} was skipped: ${what}`);
        if (state.skipped >= mostSkipped) {
          throw new DivergedError(
            `[${task.api}] training diverged: ${mostSkipped} steps in a row had no finite loss and gradient (${what}); lower optimizer.lr (now ${optimizer.lr}), lengthen optimizer.warmup, or check the data and the weights for NaN`,
          );
        }
      }
      state = { ...state, step: state.step + 1, cursor };
      since.tokens += batches.reduce((sum, batch) => sum + batch.ids.length, 0);

      if (state.step % config.logEvery === 0 || state.step === steps) {
        const now = performance.now();
        const memory = loadAddon().memory();
        await emit({
          type: 'step',
          step: state.step,
          of: steps,
          loss,
          terms: others,
          lr,
          gradNorm,
          tokensPerSecond: since.tokens / ((now - since.time) / 1000),
          memoryBytes: memory.mappedBytes + memory.heapBytes + memory.packedBytes + memory.arenaBytes,
          etaSeconds: ((now - started.time) / 1000 / (state.step - started.step)) * (steps - state.step),
        });
        since = { time: now, tokens: 0 };
      }
      if (state.step % config.evalEvery === 0 || state.step === steps) await evaluate();
      if (state.step % config.saveEvery === 0) await save();
      if (signal?.aborted) throw signal.reason;
    }
    if (wantStop && state.step < steps) stopped = 'early';
  } catch (error) {
    if (!signal?.aborted) throw error;
    stopped = 'signal';
  } finally {
    update.dispose();
  }
  // Gradients of an interrupted step are in `grads` only: parameters and moments are those of state.step.
  await save();
  if (stopped !== 'signal' && state.best && state.best.step !== state.step) {
    await loadCheckpoint(out, state.best.step, trainable, identity);
  }
  return { step: state.step, stopped, best: state.best };
}

// One update of every group, each with its own hyperparameters.
function optimizerProgram({ plan, params, grads, m, v }: Trainable, engine: Engine) {
  const { size, decayCount } = plan;
  const groups = plan.groups ?? [{ offset: 0, size, decayCount, lrScale: 1 }];
  const graph = new Graph();
  const views = groups.map((group) => [params, grads, m, v].map((flat) => flat.slice(group.offset, [group.size])));
  graph.tag('optimizer', () => {
    for (const [i, group] of groups.entries()) {
      const [p, g, m, v] = views[i].map((view) => graph.state(view));
      graph.output(`gradNorm${i}`, adamw(p, g, m, v, graph.feed(`hyper${i}`, 'f32', [8]), group.decayCount));
    }
  });
  const program = Program.compile(graph, engine);
  for (const view of views.flat()) view.dispose();
  return {
    /** One update, returning the gradient's norm before clipping; null drops the gradient. Zeroes `grads`. */
    async run(hyper: readonly [lr: number, ...rest: number[]] | null): Promise<number> {
      if (!hyper) {
        grads.write(new Float32Array(size));
        return Number.NaN;
      }
      const [lr, ...rest] = hyper;
      const feeds = groups.map(({ lrScale }, i) => [`hyper${i}`, Float32Array.of(lr * lrScale, ...rest)] as const);
      const { outputs } = await program.run({ feeds: Object.fromEntries(feeds) });
      return Math.hypot(...groups.map((_, i) => outputs[`gradNorm${i}`][0]));
    },
    dispose: () => program.dispose(),
  };
}

/** Drops metrics of steps after `step`, which a resumed run is about to write again; -1 drops all. */
async function keepMetrics(file: string, step: number): Promise<void> {
  const text = await readFile(file, 'utf8').catch(() => '');
  const kept: string[] = [];
  for (const line of text.split('\n')) {
    let event: { step?: unknown } | null = null;
    try {
      event = JSON.parse(line);
    } catch {
      continue; // the end of a line that a killed process did not finish
    }
    // Lines without a step (warnings) belong to the step before them.
    if (typeof event?.step === 'number' && event.step > step) break;
    kept.push(`${line}\n`);
  }
  await writeFileAtomic(file, step < 0 ? '' : kept.join(''));
}
