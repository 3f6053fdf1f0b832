// Self-distillation: trains the routers and corrections of a plan so that the routed model imitates its own full self.
import { createHash } from 'node:crypto';
import { join, resolve } from 'node:path';
import { type Axis, perAxis } from '../elastic/axes.js';
import { standardLevels } from '../elastic/budget.js';
import { policyToJson } from '../elastic/config.js';
import type { ElasticPolicy } from '../elastic/policy.js';
import { readElastic, writeElastic } from '../elastic/store.js';
import { readJson } from '../io/files.js';
import { Checkpoint } from '../io/safetensors.js';
import { loadTokenizer } from '../io/tokenizer.js';
import { specFromConfig } from '../model/spec.js';
import { loadWeights } from '../model/weights.js';
import { InvalidArgumentError } from '../native/errors.js';
import { type Activations, Engine } from '../native/index.js';
import { sensitivities, shapedCapacities } from './allocate.js';
import { batchRun, firstBatches, trainingTexts, wholeEpoch } from './batches.js';
import { calibrate } from './calibrate.js';
import { type DataSource, TokenData } from './data.js';
import type { TrainConfig, TrainResult } from './events.js';
import { type LossTerm, lossFeeds, resolveLosses } from './objectives.js';
import { startVector, trainablePlan, trainedLora, trainedRouters } from './plan.js';
import { DivergenceProbe } from './probe.js';
import { Random } from './random.js';
import { capacityFeeds, type DistillModel, noiseFeeds, trainProgram } from './steps.js';
import { openTeacher, type TeacherConfig } from './teacher.js';
import { Trainable } from './trainable.js';
import { checkConfig, resolveConfig, type Task, train, withLock } from './trainer.js';

export interface DistillConfig extends TrainConfig {
  /** A directory written by elastify, or an elastic model to train further. */
  plan: string;
  /** Becomes the trained elastic directory; metrics.jsonl and checkpoints/ lie there too. */
  out: string;
  data: DataSource;
  /** Held out: measured every `evalEvery` steps, and the best routers are kept. */
  evalData?: DataSource;
  /** Without evalData: share of the documents to hold out. */
  heldOut?: number;
  /** Default: kl at weight 1, topk-bce at 0.1 and, with experts, load-balance at 0.01. One must be of the output. */
  loss?: readonly LossTerm[];
  /** Default: the plan's own full model. Allocation, evaluation and calibration compare with that one in any case. */
  teacher?: TeacherConfig;
  /** How the backbone's matrices are stored while computing; default as in the checkpoint. */
  dtype?: 'f32' | 'bf16' | 'f16';
  /** How activations are stored; default: bf16 on CUDA with bf16 weights, else f32, the only one on the CPU. */
  activations?: Activations;
  /** Tokens measured for the thresholds, at each of 8 capacities; default 8192. */
  calibrationTokens?: number;
  /** Learning rate of corrections (LoRA), where the plan has some; `optimizer.lr` is that of routers. Default 2e-3. */
  loraLr?: number;
}

/** Tokens on which divergence is measured to divide capacities among layers. */
const probedTokens = 2048;
const ownKeys = [
  'plan',
  'out',
  'data',
  'evalData',
  'heldOut',
  'loss',
  'teacher',
  'dtype',
  'activations',
  'calibrationTokens',
  'loraLr',
];

/**
 * Trains the routers of a plan and its corrections, calibrates thresholds and writes the elastic directory. Everything else stays
 * frozen; teacher and student share the mapped weights. The same config gives the same bits whatever the thread count,
 * and a killed run, started again, continues to the same bits.
 *
 * A mean capacity is drawn anew for every sequence of every step, uniformly over the plan's range, one draw for both
 * places, and divided among layers by how much the model suffers without them, which is measured first. After training the
 * same is measured again with the routers, at finer steps: this is the path that budgets lie on.
 * Errors: InvalidArgumentError for a bad config, InvalidDataError and InvalidFileError for bad inputs, FileSystemError
 * when another process writes to `out`, DivergedError when training does not recover from NaN.
 */
export async function distill(config: DistillConfig): Promise<TrainResult> {
  checkConfig('distill', config, ownKeys);
  const calibrationTokens = config.calibrationTokens ?? 8192;
  if (!Number.isInteger(calibrationTokens) || calibrationTokens < 1) {
    throw new InvalidArgumentError(`[distill] calibrationTokens must be a positive integer, got ${calibrationTokens}`);
  }
  const loraLr = config.loraLr ?? 2e-3;
  if (!(Number.isFinite(loraLr) && loraLr > 0)) {
    throw new InvalidArgumentError(`[distill] loraLr must be a positive number, got ${loraLr}`);
  }
  if (!['f32', 'bf16', 'f16', undefined].includes(config.dtype)) {
    throw new InvalidArgumentError(`[distill] dtype must be f32, bf16 or f16, got ${JSON.stringify(config.dtype)}`);
  }
  if (resolve(config.plan) === resolve(config.out)) {
    throw new InvalidArgumentError(`[distill] out must be another directory than the plan, got ${config.out}`);
  }
  const elastic = await readElastic(config.plan);
  if (!elastic) {
    throw new InvalidArgumentError(
      `[distill] ${config.plan} has no routers to train; make a plan with \`elastiform elastify\``,
    );
  }
  const { policy } = elastic;
  const configPath = join(config.plan, 'config.json');
  const spec = specFromConfig(await readJson(configPath), configPath);
  const losses = resolveLosses(config.loss, spec);
  const tokenizer = await loadTokenizer(config.plan);
  const sequenceLength = config.sequenceLength ?? Math.min(512, spec.maxPositions);
  if (sequenceLength > spec.maxPositions) {
    throw new InvalidArgumentError(
      `[distill] sequenceLength must be at most the model's ${spec.maxPositions} positions, got ${sequenceLength}`,
    );
  }
  const texts = await trainingTexts('distill', config);
  const data = TokenData.tokenise(texts.train, tokenizer, sequenceLength);
  const evalData = texts.heldOut && TokenData.tokenise(texts.heldOut, tokenizer, sequenceLength);
  const resolved = resolveConfig(config, data, { batchTokens: 2048, lr: 2e-2, weightDecay: 0 });

  return withLock(config.out, async () => {
    using checkpoint = Checkpoint.open(config.plan);
    using loaded = loadWeights(spec, checkpoint, config.dtype ? { dtype: config.dtype } : {});
    using engine = new Engine(config.device, { activations: config.activations, weights: loaded.dtype });
    using trainable = new Trainable(trainablePlan(policy, spec, loraLr / resolved.optimizer.lr));
    const start = startVector(trainable.plan, policy, spec, elastic, new Random(resolved.seed, 'lora'));
    trainable.params.write(start);
    using teacher = await openTeacher(config.teacher, {
      plan: config.plan,
      spec,
      data,
      losses,
      dtype: config.dtype,
    });
    const model: DistillModel = {
      spec,
      weights: loaded.weights,
      policy,
      trainable,
      engine,
      batchTokens: resolved.batchTokens,
      ...(teacher.teacher && { teacher: teacher.teacher }),
    };
    const probed = firstBatches(data, resolved.batchTokens, probedTokens, resolved.seed);
    using probe = new DivergenceProbe(model, probed);
    const sensitivity = await sensitivities(probe, policy, {
      signal: config.signal,
      onProgress: (done, total) => config.onEvent?.({ type: 'measure', what: 'sensitivity', done, total }),
    });
    using held = evalData && new DivergenceProbe(model, [...wholeEpoch(evalData, resolved.batchTokens)]);
    using step = trainProgram(model, losses, { recompute: config.gradCheckpointing ?? false, explore: true });
    const task: Task = {
      api: 'distill',
      engine,
      trainable,
      data,
      identity: {
        method: 'self-distillation by top-k credit',
        policy: policyToJson({ ...policy, calibration: null, levels: [] }),
        start: createHash('sha256').update(start).digest('hex'),
        losses,
        teacher: teacher.identity,
        loraLr: policy.lora ? loraLr : null,
        dtype: config.dtype ?? null,
        activations: engine.activations,
        evalData: evalData?.sha256() ?? null,
      },
      lossRows: (batch) => batch.ids.length,
      async micro(batch, { step: number, index, total, signal }) {
        const { dims, feeds } = batchRun(batch);
        const random = new Random(resolved.seed, 'capacity', number * resolved.gradAccumulation + index);
        const capacities = Array.from({ length: dims.segments }, () => {
          const draw = random.uniform();
          return shapedCapacities(sensitivity, policy, meanCapacities(policy, draw));
        });
        const capacity = (router: number, segment: number) => capacities[segment][router];
        const { outputs } = await step.run({
          dims,
          feeds: {
            ...feeds,
            ...capacityFeeds(policy, dims.segments, capacity),
            ...noiseFeeds(policy, dims.rows, random),
            ...teacher.feeds(batch),
            ...lossFeeds(losses, policy, batch, { step: number, steps: resolved.steps, total, capacity }),
          },
          signal,
        });
        return Object.fromEntries(Object.entries(outputs).map(([name, value]) => [name, value[0]]));
      },
      ...(held && { evaluate: evaluator(held, policy, sensitivity) }),
    };
    const result = await train(task, resolved, config.out, config);
    if (result.stopped !== 'signal') {
      const { calibration, warnings } = await calibrate(model, probe, data, {
        tokens: calibrationTokens,
        seed: resolved.seed,
        signal: config.signal,
        onProgress: (done, total) => config.onEvent?.({ type: 'measure', what: 'allocation', done, total }),
      });
      for (const warning of warnings) await config.onEvent?.(warning);
      await writeElastic(
        config.out,
        config.plan,
        { ...policy, calibration, levels: standardLevels(spec, policy, calibration, calibration.sequenceLength) },
        trainedRouters(trainable, policy),
        trainedLora(trainable, policy, spec),
      );
    }
    return { dir: config.out, step: result.step, stopped: result.stopped, ...(result.best && { best: result.best }) };
  });
}

/** Mean capacity of each axis at a draw from 0, the low end of its range, to 1, the high end. */
function meanCapacities({ capacity }: ElasticPolicy, draw: number): Record<Axis, number> {
  return perAxis((axis) => {
    const [low, high] = capacity[axis] ?? [1, 1];
    return low + (high - low) * draw;
  });
}

/** KL and agreement with the full model by top-k at three capacities of the trained range; the metric is the mean KL. */
function evaluator(probe: DivergenceProbe, policy: ElasticPolicy, sensitivity: readonly number[]) {
  const fixed = Object.values(policy.capacity).every(([low, high]) => low === high);
  return async (signal?: AbortSignal) => {
    const levels: Record<string, Record<string, number>> = {};
    let sum = 0;
    const draws = fixed ? [0.5] : [0.25, 0.5, 0.75];
    for (const draw of draws) {
      const mean = meanCapacities(policy, draw);
      const { kl, agree } = await probe.measure(shapedCapacities(sensitivity, policy, mean), signal);
      levels[`capacity ${Math.min(...Object.values(mean)).toFixed(2)}`] = { kl, top1_agreement: agree };
      sum += kl;
    }
    return { levels, metric: sum / draws.length };
  };
}
