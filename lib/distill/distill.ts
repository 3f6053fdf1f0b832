// Self-distillation: trains the routers and corrections of a plan so that the model at a budget imitates its own full self.
import { createHash } from 'node:crypto';
import { resolve } from 'node:path';
import { type Axis, ofSequences, perAxis } from '../elastic/axes.js';
import { policyToJson } from '../elastic/config.js';
import { planLength, standardLevels } from '../elastic/levels.js';
import type { Nested } from '../elastic/nested.js';
import { type ElasticPolicy, routerPlaces } from '../elastic/policy.js';
import { readElastic, writeElastic } from '../elastic/store.js';
import { Checkpoint } from '../io/safetensors.js';
import { loadTokenizer } from '../io/tokenizer.js';
import { readSpec } from '../model/directory.js';
import type { EncoderSpec } from '../model/spec.js';
import { loadWeights } from '../model/weights.js';
import { InvalidArgumentError } from '../native/errors.js';
import { type Activations, Engine } from '../native/index.js';
import { sensitivities, shapedCapacities } from './allocate.js';
import { batchRun, firstBatches, trainingTexts, wholeEpoch } from './batches.js';
import { calibrate } from './calibrate.js';
import { type DataSource, TokenData } from './data.js';
import { distillEncoder } from './encoder/widths.js';
import type { TrainConfig, TrainResult } from './events.js';
import { type LossTerm, lossFeeds, resolveLosses } from './objectives.js';
import { startVector, trainablePlan, trainedLora, trainedRouters } from './plan.js';
import { DivergenceProbe } from './probe.js';
import { Random } from './random.js';
import {
  capacityFeeds,
  type DistillModel,
  drawn,
  fedTeacher,
  noiseFeeds,
  teacherProgram,
  trainProgram,
} from './steps.js';
import { openTeacher, type TeacherConfig } from './teacher.js';
import { Trainable } from './trainable.js';
import { checkConfig, resolveConfig, type Task, train, withLock } from './trainer.js';
import { type WidthSampling, Widths } from './widths.js';

/** Settings of `distill`. */
export interface DistillConfig extends TrainConfig {
  /** A directory written by elastify, or an elastic model to train further. */
  plan: string;
  /** Becomes the trained elastic directory; metrics.jsonl and checkpoints/ lie there too. */
  out: string;
  /** What to train on. */
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
  /** Tokens measured for the thresholds, at each of 8 capacities; default 8192, and 64 sequences where whole ones are routed. */
  calibrationTokens?: number;
  /** Which widths of nested feed-forwards each step trains. */
  sample?: WidthSampling;
  /**
   * Learning rate of corrections (LoRA), where the plan has some; default 2e-3. `optimizer.lr` is that of routers, and of
   * corrections alone where there are no routers.
   */
  loraLr?: number;
}

const defaultLoraLr = 2e-3;
/** Tokens on which divergence is measured to divide capacities among layers, and on which thresholds are calibrated. */
const measuredTokens = { probe: 2048, thresholds: 8192 };
/** The same in sequences, at least, where whole ones are routed. */
const measuredSequences = { probe: 16, thresholds: 64 };
/** Sequences of a batch by default where whole ones are routed: a router learns from comparing them. */
const batchSequences = 8;
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
  'sample',
];

/**
 * Trains the routers of a plan and its corrections, calibrates thresholds and writes the elastic directory. Everything else
 * stays frozen; the loss of a step is the sum over the widths of nested feed-forwards that it trains; teacher and student
 * share the mapped weights. The same config gives the same bits whatever the thread count, and a killed run, started again,
 * continues to the same bits.
 *
 * A mean capacity is drawn anew for every sequence of every step, uniformly over the plan's range, one draw for both
 * places, and divided among layers by how much the model suffers without them, which is measured first. After training the
 * same is measured again with the routers, at finer steps: this is the path that budgets lie on.
 *
 * Of a nested encoder all weights are trained instead, so that the vectors of every granularity are those that the model had.
 *
 * @throws InvalidArgumentError for a bad config, InvalidDataError and InvalidFileError for bad inputs, FileSystemError
 * when another process writes to `out`, DivergedError when training does not recover from NaN.
 */
export async function distill(config: DistillConfig): Promise<TrainResult> {
  checkConfig('distill', config, ownKeys);
  const { calibrationTokens } = config;
  if (calibrationTokens !== undefined && !(Number.isInteger(calibrationTokens) && calibrationTokens >= 1)) {
    throw new InvalidArgumentError(`[distill] calibrationTokens must be a positive integer, got ${calibrationTokens}`);
  }
  if (config.loraLr !== undefined && !(Number.isFinite(config.loraLr) && config.loraLr > 0)) {
    throw new InvalidArgumentError(`[distill] loraLr must be a positive number, got ${config.loraLr}`);
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
  const spec = await readSpec(config.plan);
  if (spec.encoder) return distillEncoder(config, elastic, spec as EncoderSpec);
  const routed = routerPlaces(policy).length > 0;
  if (!routed && !policy.lora) {
    throw new InvalidArgumentError(
      `[distill] ${config.plan} has neither routers nor corrections to train: nest it with corrections, elastify --lora RANK, or train its feed-forwards, pretrain --from ${config.plan} --train ffn`,
    );
  }
  const losses = resolveLosses(config.loss, spec);
  // Corrections are not of the whole model; routers are.
  const widths = Widths.of('distill', config.sample, policy.nested, spec, !routed);
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
  const wholeSequences = routerPlaces(policy).some(({ axis }) => ofSequences(axis));
  const resolved = resolveConfig(config, data, {
    batchTokens: wholeSequences ? Math.max(2048, batchSequences * sequenceLength) : 2048,
    lr: routed ? 2e-2 : defaultLoraLr,
    weightDecay: 0,
  });
  const loraLr = config.loraLr ?? (routed ? defaultLoraLr : resolved.optimizer.lr);

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
    const measured = (what: keyof typeof measuredTokens) =>
      Math.max(measuredTokens[what], wholeSequences ? measuredSequences[what] * sequenceLength : 0);
    const probed = firstBatches(data, resolved.batchTokens, measured('probe'), resolved.seed);
    using probe = new DivergenceProbe(model, probed);
    const sensitivity = await sensitivities(probe, policy, {
      signal: config.signal,
      onProgress: (done, total) => config.onEvent?.({ type: 'measure', what: 'sensitivity', done, total }),
    });
    using held = evalData && new DivergenceProbe(model, [...wholeEpoch(evalData, resolved.batchTokens)]);
    const once = widths.several ? fedTeacher(model, losses) : null;
    using lessons = once && teacherProgram(model, once);
    using step = trainProgram({ ...model, ...(once && { teacher: once }) }, losses, {
      ...{ recompute: config.gradCheckpointing ?? false, explore: true },
    });
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
        widths: policy.nested ? widths.identity : null,
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
        const routers = routerPlaces(policy);
        // Sequences of a batch compete for one capacity.
        const capacity = (router: number, segment: number) =>
          capacities[ofSequences(routers[router].axis) ? 0 : segment][router];
        const common = {
          ...feeds,
          ...capacityFeeds(policy, dims.segments, capacity, drawn(random)),
          ...noiseFeeds(policy, dims, random),
          ...teacher.feeds(batch),
          ...(lessons && { teacher: (await lessons.run({ dims, feeds, signal })).outputs.hidden }),
        };
        const terms: Record<string, number> = { loss: 0 };
        const draw = new Random(resolved.seed, 'width', number * resolved.gradAccumulation + index);
        for (const { name: width, dims: units, weight: factor } of widths.draw(draw)) {
          const at = { step: number, steps: resolved.steps, total, capacity, factor };
          const { outputs } = await step.run({
            dims: { ...dims, ...units },
            feeds: { ...common, ...lossFeeds(losses, policy, batch, at) },
            signal,
          });
          for (const [name, [value]] of Object.entries(outputs)) {
            if (name === 'loss') terms.loss += value;
            else terms[policy.nested ? `${name} ${width}` : name] = value;
          }
        }
        return terms;
      },
      ...(held && { evaluate: evaluator(held, policy, sensitivity, widths) }),
    };
    const result = await train(task, resolved, config.out, config);
    if (result.stopped !== 'signal') {
      const { calibration, warnings } = routed
        ? await calibrate(model, probe, data, {
            tokens: calibrationTokens ?? measured('thresholds'),
            seed: resolved.seed,
            signal: config.signal,
            onProgress: (done, total) => config.onEvent?.({ type: 'measure', what: 'allocation', done, total }),
          })
        : { calibration: null, warnings: [] };
      for (const warning of warnings) await config.onEvent?.(warning);
      const nested: Nested | undefined = policy.nested && { ...policy.nested, ...(policy.lora && { trained: 'lora' }) };
      const levels = standardLevels(spec, policy, calibration, calibration?.sequenceLength ?? planLength);
      await writeElastic(
        config.out,
        config.plan,
        { ...policy, ...(nested && { nested }), calibration, levels },
        trainedRouters(trainable.values(), routerPlaces(policy)),
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

/**
 * KL and agreement with the full model by top-k at three capacities of the trained range, and at every width that is trained;
 * the metric is the mean KL.
 */
function evaluator(probe: DivergenceProbe, policy: ElasticPolicy, sensitivity: readonly number[], widths: Widths) {
  const fixed = Object.values(policy.capacity).every(([low, high]) => low === high);
  return async (signal?: AbortSignal) => {
    const levels: Record<string, { kl: number; top1_agreement: number }> = {};
    const measure = async (name: string, capacities: readonly number[], dims?: Readonly<Record<string, number>>) => {
      const { kl, agree } = await probe.measure(capacities, signal, dims);
      levels[name] = { kl, top1_agreement: agree };
    };
    const draws = sensitivity.length === 0 ? [] : fixed ? [0.5] : [0.25, 0.5, 0.75];
    for (const draw of draws) {
      const mean = meanCapacities(policy, draw);
      const name = `capacity ${Math.min(...Object.values(mean)).toFixed(2)}`;
      await measure(name, shapedCapacities(sensitivity, policy, mean));
    }
    const whole = sensitivity.map(() => 1);
    const narrower = policy.nested ? widths.all.filter(({ name }) => name !== 'full') : [];
    for (const { name, dims } of narrower) await measure(name, whole, dims);
    const all = Object.values(levels);
    return { levels, metric: all.reduce((sum, { kl }) => sum + kl, 0) / all.length };
  };
}
