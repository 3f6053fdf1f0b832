// COST-EFF (arXiv 2210.15523): a classifier gets an exit after every layer and becomes slim, in stages that each can be resumed.
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { writeExits } from '../../elastic/elastify.js';
import { exitId, exitsProblem } from '../../elastic/exits.js';
import { inFileSystem, readJson, writeFileAtomic } from '../../io/files.js';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.js';
import { loadTokenizer } from '../../io/tokenizer.js';
import { encoderSpecFromConfig } from '../../model/encoder_spec.js';
import { encoderParameters } from '../../model/encoder_weights.js';
import { encoderFlops } from '../../model/flops.js';
import { type FlatEncoder, keepParts, slimOf, withEmbeddingRank } from '../../model/slim.js';
import { InvalidArgumentError, InvalidDataError } from '../../native/errors.js';
import { Engine } from '../../native/index.js';
import { firstShare } from '../batches.js';
import { clearCheckpoints } from '../checkpoints.js';
import type { TrainConfig } from '../events.js';
import { checkConfig, checkKeys, resolveConfig, type Task, train, withLock } from '../trainer.js';
import { type Metric, openClassifier, readClassifierConfig, writeClassifier } from './classifier.js';
import { BadRows, type ExampleBatch, type ExampleData, type Target } from './examples.js';
import {
  type ExitedEncoder,
  type ExitLosses,
  exitedSlots,
  exitProgram,
  exitQuality,
  exitsOn,
  withExits,
  withoutExits,
} from './exits.js';
import { checkExampleConfig, type ExampleConfig, encodeSplit, metricOf, readSplit } from './finetune.js';
import { type Allocation, importanceOf, isRanked, keptParts, sizesAfter } from './importance.js';

/** How long a stage trains, and how fast. */
export interface StageConfig {
  /** Passes over the data. */
  epochs?: number;
  /** Largest learning rate. */
  lr?: number;
}

/** Settings of `costEff`. What all training shares holds for every stage; `optimizer` is without `lr`. */
export interface CostEffConfig
  extends Omit<TrainConfig, 'steps' | 'epochs' | 'earlyStop' | 'evalEvery'>,
    ExampleConfig {
  /** Directory of a classifier that is fine-tuned (`finetune` makes one). */
  from: string;
  /** Becomes a directory with `assistant` (all of the width, with exits), `model` (slim, with exits), report.json and `stages`. */
  out: string;
  /** What is left of every layer: heads, units of feed-forwards; and the rank of the embeddings of tokens, default as they are. */
  target: { heads: number; ffn: number; rank?: number };
  /** As many parts in every layer (the default), or as many on average, the most important ones of all layers. */
  allocation?: Allocation;
  /** Importance by the losses of all exits (the default), or of the classifier alone. */
  calibration?: 'exits' | 'classifier';
  /** Entropy in nats below which a text leaves at an exit, as both models are saved; default 0.2. */
  exitThreshold?: number;
  /** The classifier with exits; default 5 epochs, 2e-5. */
  assistant?: StageConfig;
  /**
   * All events of slimming together; default 5 epochs, 1e-5. `restore`: each event's rate is so much larger than that before, 0.12;
   * `hiddenShare`: of each interval only the hidden states are learned at first, 0.7; `rankShare`: share of the data by which
   * importance is measured, 1.
   */
  slim?: StageConfig & { restore?: number; hiddenShare?: number; rankShare?: number };
  /** Recovery of hidden states; default 10 epochs, 3e-5. */
  hidden?: StageConfig;
  /** Recovery of predictions; default 6 epochs, 2e-5. */
  prediction?: StageConfig;
}

/** What a model of a `costEff` run costs and is worth. */
export interface CostEffModel {
  parameters: number;
  /** Of all layers, mean over held-out texts. */
  flops: number;
  /** The metric at every exit, [layers], the classifier's last. */
  quality: readonly number[];
}

/** What `costEff` made, and what it measured on held-out texts. */
export interface CostEffResult {
  /** `out`. */
  dir: string;
  /** 'signal': by `signal`, not finished, to be resumed. */
  stopped: 'done' | 'signal';
  metric: Metric;
  /** The classifier as it was: no exits. */
  full?: Omit<CostEffModel, 'quality'> & { quality: number };
  assistant?: CostEffModel;
  slim?: CostEffModel & { heads: readonly number[]; ffn: readonly number[]; rank: number | null };
  /** Rows left out. */
  badRows: number;
  /** Examples that were cut. */
  truncated: number;
}

const ownKeys = [
  ...[
    'from',
    'out',
    'target',
    'allocation',
    'calibration',
    'exitThreshold',
    'assistant',
    'slim',
    'hidden',
    'prediction',
  ],
  ...['data', 'evalData', 'heldOut', 'badRows', 'metric'],
];
const defaults = {
  assistant: { epochs: 5, lr: 2e-5 },
  slim: { epochs: 5, lr: 1e-5, restore: 0.12, hiddenShare: 0.7, rankShare: 1 },
  hidden: { epochs: 10, lr: 3e-5 },
  prediction: { epochs: 6, lr: 2e-5 },
};

/**
 * The pipeline of COST-EFF on a fine-tuned classifier of whole layers:
 *
 * 1. an exit after every layer learns from the classifier's predictions and the labels, all weights with it (the assistant);
 * 2. a copy becomes slim: at each event importance is measured, the least important heads, units and singular values go, and hidden
 *    states, then predictions, are learned from the assistant again; one head of each layer goes per event;
 * 3. hidden states, and 4. hidden states with the predictions of every exit, are recovered from the assistant.
 *
 * Gradients of exits are in equilibrium throughout. A stage that is done is not done again: a killed run, started again, goes on
 * inside the stage it was in, to the same bits.
 *
 * @throws InvalidArgumentError for a bad config, InvalidDataError for bad rows unless they are left out and for stages that other
 * settings made, InvalidFileError for bad files, FileSystemError when another process writes to `out`, DivergedError when training
 * does not recover from NaN.
 */
export async function costEff(config: CostEffConfig): Promise<CostEffResult> {
  check(config);
  return withLock(config.out, async () => {
    if (config.resume === false) await rm(join(config.out, 'stages'), { recursive: true, force: true });
    const tokenizer = await loadTokenizer(config.from);
    const start = await readClassifierConfig('costEff', { from: config.from });
    const base = encoderSpecFromConfig(start.json, start.file);
    checkBase(config, base);
    const target: Target = { kind: 'classes', labels: base.encoder.labels };
    const metric = metricOf('costEff', config.metric, target);
    const bad = new BadRows('costEff', config.badRows === 'skip');
    const rows = await readSplit(config, bad);
    const { data, evalData } = await encodeSplit('costEff', config, rows, tokenizer, base.maxPositions, target, bad);
    if (!evalData)
      throw new InvalidArgumentError('[costEff] give evalData or heldOut: exits are chosen by held-out quality');
    const full = await openClassifier(start, target, 0);

    using engine = new Engine(config.device);
    const stages = new Stages(config, engine, data, evalData, metric, full.sha256!);
    const counts = { badRows: bad.count, truncated: data.truncated + evalData.truncated };
    try {
      const models = await pipeline(config, stages, full);
      const report = await measured(config, stages, evalData, models);
      await writeFileAtomic(join(config.out, 'report.json'), `${JSON.stringify(report, null, 2)}\n`);
      return { dir: config.out, stopped: 'done', metric, ...report, ...counts };
    } catch (error) {
      if (error instanceof Interrupted || config.signal?.aborted)
        return { dir: config.out, stopped: 'signal', metric, ...counts };
      throw error;
    }
  });
}

function check(config: CostEffConfig): void {
  // Steps are each stage's own.
  checkConfig('costEff', { ...config, epochs: 1 }, ownKeys);
  for (const key of ['steps', 'epochs', 'earlyStop', 'evalEvery'])
    if (key in config) fail(`${key} is of every stage: give assistant, slim, hidden and prediction their epochs`);
  if (config.optimizer && 'lr' in config.optimizer)
    fail('optimizer.lr is of every stage: give assistant, slim, hidden and prediction their lr');
  if (typeof config.from !== 'string' || config.from === '')
    fail(`from must be the path of a directory, got ${JSON.stringify(config.from)}`);
  checkExampleConfig('costEff', config);
  const { target, allocation, calibration, exitThreshold } = config;
  if (typeof target !== 'object' || target === null) fail('target must be { heads, ffn, rank }');
  checkKeys('costEff', 'key of target', target, ['heads', 'ffn', 'rank']);
  if (!['uniform', 'importance', undefined].includes(allocation))
    fail(`allocation must be 'uniform' or 'importance', got ${JSON.stringify(allocation)}`);
  if (!['exits', 'classifier', undefined].includes(calibration))
    fail(`calibration must be 'exits' or 'classifier', got ${JSON.stringify(calibration)}`);
  if (exitThreshold !== undefined && !Number.isFinite(exitThreshold))
    fail(`exitThreshold must be a finite number, got ${String(exitThreshold)}`);
  const positive = (x: unknown): boolean => typeof x === 'number' && Number.isFinite(x) && x > 0;
  const share = (x: unknown): boolean => typeof x === 'number' && x >= 0 && x <= 1;
  for (const [name, known] of Object.entries(defaults)) {
    const stage: Record<string, unknown> = { ...config[name as keyof typeof defaults] };
    checkKeys('costEff', `key of ${name}`, stage, Object.keys(known));
    for (const [key, value] of Object.entries(stage)) {
      const ok =
        key === 'epochs' || key === 'lr'
          ? positive
          : key === 'restore'
            ? (x: unknown) => x === 0 || positive(x)
            : share;
      if (value !== undefined && !ok(value))
        fail(
          `${name}.${key} must be a ${ok === share ? 'number from 0 to 1' : 'positive number'}, got ${String(value)}`,
        );
    }
  }
}

function checkBase({ from, target }: CostEffConfig, spec: FlatEncoder['spec']): void {
  const problem = exitsProblem(spec);
  if (problem) fail(`${from} must be a classifier of several classes with at least two layers: ${problem}`);
  if (spec.encoder.embeddingRank !== null || spec.perLayer.some(({ heads }) => heads !== undefined))
    fail(`${from} is slim already: start from the encoder it was made of`);
  const limits = { heads: spec.heads, ffn: spec.ffn, rank: spec.hidden };
  for (const [name, most] of Object.entries(limits) as [keyof typeof limits, number][]) {
    const value = target[name];
    if (value === undefined && name === 'rank') continue;
    if (!Number.isInteger(value) || (value as number) < 1 || (value as number) > most)
      fail(`target.${name} must be an integer from 1 to ${most}, got ${String(value)}`);
  }
}

function fail(what: string): never {
  throw new InvalidArgumentError(`[costEff] ${what}`);
}

/** A run was stopped by its signal, and is saved. */
class Interrupted extends Error {}

interface Models {
  readonly full: FlatEncoder;
  readonly assistant: ExitedEncoder;
  readonly slim: ExitedEncoder;
}

async function pipeline(config: CostEffConfig, stages: Stages, full: FlatEncoder): Promise<Models> {
  const { spec } = full;
  const { target, allocation = 'uniform', calibration = 'exits' } = config;
  const slimming = { ...defaults.slim, ...config.slim };
  const events = Math.max(spec.heads - target.heads, 1);
  stages.count = 3 + events;
  const fresh = withExits(full, config.seed ?? 0);
  const assistant = await stages.train('assistant', { ...defaults.assistant, ...config.assistant }, fresh, fresh, {
    losses: { hidden: 0, soft: 0.5, hard: 0.5, teacher: 'classifier', exits: 'all' },
    measured: true,
  });
  const matching: ExitLosses = { hidden: 1, soft: 1, hard: 0, teacher: 'matching', exits: 'all' };
  const exits = calibration === 'exits' ? 'all' : 'classifier';
  let student = assistant;
  for (let event = 1; event <= events; event++) {
    const sizes = sizesAfter(spec, target, event, events);
    const settings = { epochs: slimming.epochs / events, lr: slimming.lr * (1 + slimming.restore) ** event };
    const before = student;
    student = await stages.train(`slim-${event}`, settings, student, assistant, {
      losses: matching,
      hiddenShare: slimming.hiddenShare,
      // What decides what is taken away.
      identity: { sizes, allocation, exits, rankShare: slimming.rankShare },
      async prepare() {
        const losses: ExitLosses = { hidden: 1, soft: 0.9, hard: 0.1, teacher: 'matching', exits };
        const sums = await stages.gradientSums(before, assistant, losses, slimming.rankShare);
        const kept = keptParts(importanceOf(before, sums), sizes, allocation);
        const slim = keepParts(withoutExits(before), kept);
        return exitsOn(
          sizes.rank === null || sizes.rank === spec.hidden ? slim : withEmbeddingRank(slim, sizes.rank),
          before,
        );
      },
    });
  }
  student = await stages.train('hidden', { ...defaults.hidden, ...config.hidden }, student, assistant, {
    losses: { ...matching, soft: 0 },
  });
  student = await stages.train('prediction', { ...defaults.prediction, ...config.prediction }, student, assistant, {
    losses: matching,
    measured: true,
  });
  return { full, assistant, slim: student };
}

interface Training {
  readonly losses: ExitLosses;
  /** The weights with the best mean metric over exits are kept; default: the last ones. */
  readonly measured?: boolean;
  /** Share of the steps in which scores are not learned. */
  readonly hiddenShare?: number;
  /** Whatever else decides the bits of the stage. */
  readonly identity?: object;
  /** Makes the student out of what the stage before left. */
  prepare?(): Promise<ExitedEncoder>;
}

/** The stages of a run: each has a directory with metrics.jsonl, checkpoints while it trains, and then its result. */
class Stages {
  count = 0;
  #index = 0;
  /** Hash of everything that decided the bits so far. */
  #key: string;

  constructor(
    readonly config: CostEffConfig,
    readonly engine: Engine,
    readonly data: ExampleData,
    readonly evalData: ExampleData,
    readonly metric: Metric,
    base: string,
  ) {
    this.#key = this.#next({ base, data: data.sha256(), evalData: evalData.sha256(), metric });
  }

  #next(what: object): string {
    return createHash('sha256')
      .update(`${this.#key ?? ''}${JSON.stringify(what)}`)
      .digest('hex');
  }

  get batchTokens(): number {
    return this.config.batchTokens ?? Math.max(4096, this.data.sequenceLength);
  }

  /** Trains a student, or reads what the stage left when it was done. */
  async train(
    name: string,
    settings: Required<StageConfig>,
    student: ExitedEncoder,
    teacher: ExitedEncoder,
    { losses, measured = false, hiddenShare = 0, identity, prepare }: Training,
  ): Promise<ExitedEncoder> {
    const { config, data, evalData, engine, batchTokens, metric } = this;
    this.#index++;
    await config.onEvent?.({ type: 'stage', name, index: this.#index, of: this.count });
    const { epochs, lr } = settings;
    const { seed, gradAccumulation, optimizer, gradCheckpointing, saveEvery, keep, log, onEvent, signal } = config;
    const shared = { seed, gradAccumulation, saveEvery, keep, log, onEvent, signal, gradCheckpointing };
    const resolved = resolveConfig({ ...shared, epochs, batchTokens, optimizer: { ...optimizer, lr } }, data, {
      ...{ batchTokens, lr, weightDecay: 0.01 },
    });
    this.#key = this.#next({ name, resolved, losses, hiddenShare, identity });
    const dir = join(config.out, 'stages', `${String(this.#index).padStart(2, '0')}-${name}`);
    const done = await readStage(dir, this.#key, student);
    if (done) return done;
    await inFileSystem('create', dir, () => mkdir(dir, { recursive: true }));
    // Of a stage in the middle of its training the weights of the checkpoint take the place of those that are prepared, whose shapes
    // are what counts; preparing them again gives the same.
    const start = (await prepare?.()) ?? student;
    const scored = losses.soft > 0 || losses.hard > 0;
    const trained = (weight: string): boolean => scored || !(weight.startsWith('head.') || weight.startsWith('exits.'));
    const options = { engine, batchTokens, recompute: gradCheckpointing };
    using program = exitProgram(start, teacher, data, losses, trained, options);
    const late = Math.floor(resolved.steps * hiddenShare);
    const task: Task<ExampleBatch> = {
      api: 'costEff',
      engine,
      trainable: program.trainable,
      data,
      identity: { stage: this.#key },
      lossRows: ({ examples }) => examples.length,
      async micro(batch, { step, total, signal }) {
        const scores = step < late ? 0 : 1;
        return { ...(await program.run(batch, { weight: 1 / total, rows: 'text', scores, signal })) };
      },
      ...(measured && {
        async evaluate(signal?: AbortSignal) {
          const quality = await program.quality(evalData, signal);
          const mean = quality.reduce((sum, { [metric]: value }) => sum + value, 0) / quality.length;
          const levels = Object.fromEntries(
            quality.map(({ [metric]: value, ...others }, i) => [`after layer ${i}`, { [metric]: value, ...others }]),
          );
          return { levels, metric: -mean };
        },
      }),
    };
    const { stopped } = await train(task, resolved, dir, config);
    if (stopped === 'signal') throw new Interrupted();
    const result = program.student();
    await writeStage(dir, this.#key, result);
    await clearCheckpoints(dir);
    return result;
  }

  /** The sum over batches of the magnitude of the gradient of every weight that is ranked, by name. */
  async gradientSums(
    student: ExitedEncoder,
    teacher: ExitedEncoder,
    losses: ExitLosses,
    share: number,
  ): Promise<Map<string, Float32Array>> {
    const { data, engine, batchTokens, config } = this;
    using program = exitProgram(student, teacher, data, losses, isRanked, { engine, batchTokens });
    const { plan, grads } = program.trainable;
    const sums = new Float32Array(plan.size);
    const zeros = new Float32Array(plan.size);
    const batches = Math.max(Math.round(data.batchesPerEpoch(0, batchTokens, 0) * share), 1);
    let number = 0;
    for (const batch of firstShare(data, batchTokens, batches)) {
      const { signal } = config;
      await program.run(batch, { weight: 1 / batch.examples.length, rows: 'batch', ...(signal && { signal }) });
      const gradient = grads.readFloat();
      for (let i = 0; i < sums.length; i++) sums[i] += Math.abs(gradient[i]);
      grads.write(zeros);
      number++;
      await config.onEvent?.({ type: 'measure', what: 'importance', done: number, total: batches });
    }
    return new Map(plan.parameters.map(({ name, offset, size }) => [name, sums.subarray(offset, offset + size)]));
  }
}

const resultFile = 'result.safetensors';
const doneFile = 'done.json';

/** What a stage left; null when it is not done. The exits and the residual stream are as those of `like`. */
async function readStage(dir: string, key: string, like: ExitedEncoder): Promise<ExitedEncoder | null> {
  const path = join(dir, doneFile);
  if (!existsSync(path)) return null;
  const done = (await readJson(path)) as { key?: unknown; config?: unknown };
  if (done.key !== key || typeof done.config !== 'string') {
    throw new InvalidDataError(
      `[costEff] ${dir} was made with other settings, data or another model; use the same, another output directory, or resume: false to start anew`,
    );
  }
  const spec = encoderSpecFromConfig(JSON.parse(done.config), path);
  using file = openSafetensors(join(dir, resultFile));
  const weights = new Map(
    exitedSlots({ ...spec, layers: like.spec.layers }).map(({ name, shape }) => {
      const size = shape.reduce((a, b) => a * b, 1);
      const values = file.has(name) ? file.tensor(name).readFloat() : new Float32Array();
      if (values.length === size) return [name, values] as const;
      throw new InvalidDataError(
        `[costEff] ${dir}/${resultFile}: tensor ${name} must have ${size} elements, got ${values.length}; delete ${dir}`,
      );
    }),
  );
  return { spec, config: done.config, weights };
}

async function writeStage(dir: string, key: string, { spec, config, weights }: ExitedEncoder): Promise<void> {
  const tensors = exitedSlots(spec).map(({ name, shape }) => {
    return [name, { dtype: 'f32' as const, shape: [...shape], data: weights.get(name)! }] as const;
  });
  await writeSafetensors(join(dir, resultFile), Object.fromEntries(tensors));
  await writeFileAtomic(join(dir, doneFile), `${JSON.stringify({ key, config })}\n`);
}

/** Writes the models and measures them. */
async function measured(
  config: CostEffConfig,
  stages: Stages,
  evalData: ExampleData,
  { full, assistant, slim }: Models,
) {
  const { engine, batchTokens, metric } = stages;
  const { exitThreshold: threshold = 0.2, from, out, signal } = config;
  const qualities = async (model: ExitedEncoder): Promise<number[]> => {
    const quality = await exitQuality(model, evalData, { engine, batchTokens, ...(signal && { signal }) });
    return quality.map(({ [metric]: value }) => value);
  };
  for (const [name, model] of Object.entries({ assistant, model: slim })) {
    const dir = join(out, name);
    const flat = withoutExits(model);
    // Without exits of an earlier run, whose hashes would not be those of the new weights.
    await rm(dir, { recursive: true, force: true });
    await inFileSystem('create', dir, () => mkdir(dir, { recursive: true }));
    await writeClassifier(dir, flat, flat.weights, from);
    const heads = Array.from({ length: model.spec.layers - 1 }, (_, afterLayer) => ({
      ...{ afterLayer, rule: 'entropy' as const, threshold },
      weight: model.weights.get(`${exitId(afterLayer)}.weight`)!,
      bias: model.weights.get(`${exitId(afterLayer)}.bias`)!,
    }));
    await writeExits(dir, dir, heads);
  }
  const costs = ({ spec }: Pick<FlatEncoder, 'spec'>, heads: number) => ({
    parameters: encoderParameters(spec) + heads * spec.encoder.labels.length * (spec.hidden + 1),
    flops: evalData.lengths.reduce((sum, length) => sum + encoderFlops(spec, [length], 'head'), 0) / evalData.count,
  });
  const inner = full.spec.layers - 1;
  const quality = (await qualities(withExits(full, 0))).at(-1)!;
  return {
    full: { ...costs(full, 0), quality },
    assistant: { ...costs(assistant, inner), quality: await qualities(assistant) },
    slim: { ...costs(slim, inner), ...slimOf(slim.spec), quality: await qualities(slim) },
  };
}
