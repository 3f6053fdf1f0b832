// Pretraining: trains a small decoder from scratch, or a model's weights further, on text and writes its directory.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { type MatformerRecipe, policyOf, writeNested } from '../elastic/elastify.js';
import { type Nested, nestedWidth } from '../elastic/nested.js';
import { provenanceOf } from '../elastic/provenance.js';
import { readElastic } from '../elastic/store.js';
import { crossEntropy, dot, Graph, Program } from '../graph/index.js';
import { copyTokenizer, writeCheckpoint } from '../io/directory.js';
import { jsonWithFloats, readJsonText } from '../io/files.js';
import { Checkpoint } from '../io/safetensors.js';
import { loadTokenizer, type Tokenizer } from '../io/tokenizer.js';
import { floatFields } from '../model/config.js';
import { decoder, finalNorm } from '../model/decoder.js';
import { selectEverything } from '../model/select.js';
import { type ModelSpec, specFromConfig } from '../model/spec.js';
import {
  exportWeights,
  flattenWeights,
  initialWeights,
  type LoadedWeights,
  loadWeights,
  type ParameterPlan,
  parameterPlan,
  weightsByName,
} from '../model/weights.js';
import { InvalidArgumentError } from '../native/errors.js';
import { Engine, type Tensor } from '../native/index.js';
import { batchInputs, batchRun, trainingTexts, wholeEpoch } from './batches.js';
import { trainBpe, writeBpe } from './bpe.js';
import { newestCheckpoint } from './checkpoints.js';
import { type Batch, type DataSource, TokenData } from './data.js';
import type { TrainConfig, TrainResult } from './events.js';
import { Random } from './random.js';
import { Trainable } from './trainable.js';
import { checkConfig, checkKeys, resolveConfig, type Task, train, withLock } from './trainer.js';
import { type WidthSampling, Widths } from './widths.js';

/** Settings of `pretrain`. */
export interface PretrainConfig extends TrainConfig {
  /**
   * From scratch: the content of a config.json of a supported architecture; `vocab_size` and token ids are filled in when
   * absent.
   */
  model?: Record<string, unknown>;
  /** From scratch: a directory with a tokenizer to take over, or the size of a byte-level BPE to train on the data. */
  tokenizer?: string | { vocabSize: number };
  /** Instead of both: the directory of a model, whose weights and tokenizer are the start. */
  from?: string;
  /** With `from`: which weights are trained, all (the default) or those of feed-forwards. */
  train?: 'all' | 'ffn';
  /** Trains feed-forwards at several widths (MatFormer), so that the model runs at any. A nested `from` has its own. */
  nested?: Pick<MatformerRecipe, 'granularities' | 'alignment' | 'layers'>;
  /** Which widths each step trains. */
  sample?: WidthSampling;
  /** Becomes the model's directory; metrics.jsonl and checkpoints/ lie there too. */
  out: string;
  /** What to train on. */
  data: DataSource;
  /** Measured every `evalEvery` steps; the best weights are kept. */
  evalData?: DataSource;
  /** Without evalData: share of the documents to hold out. */
  heldOut?: number;
  /** How weights are stored in the end; default f32. */
  saveAs?: 'f32' | 'bf16';
}

const ownKeys = [
  ...['model', 'tokenizer', 'from', 'train', 'nested', 'sample'],
  ...['out', 'data', 'evalData', 'heldOut', 'saveAs'],
];

/**
 * Trains a decoder with cross-entropy on the next token and writes config.json, model.safetensors and the tokenizer; of nested
 * feed-forwards also what makes an elastic directory. The loss of a step is the sum over the widths it trains.
 * The same config gives the same bits whatever the thread count, and a killed run, started again, continues to the same
 * bits. Held-out quality is reported in bits per byte of text, which does not depend on the tokenizer.
 *
 * @throws InvalidArgumentError for a bad config, InvalidDataError and InvalidFileError for bad inputs, FileSystemError
 * when another process writes to `out`, DivergedError when training does not recover from NaN.
 */
export async function pretrain(config: PretrainConfig): Promise<TrainResult> {
  checkConfig('pretrain', config, ownKeys);
  if (!['f32', 'bf16', undefined].includes(config.saveAs)) {
    throw new InvalidArgumentError(`[pretrain] saveAs must be 'f32' or 'bf16', got ${String(config.saveAs)}`);
  }
  checkStart(config);
  return withLock(config.out, async () => {
    const texts = await trainingTexts('pretrain', config);
    const tokenizer = await prepareTokenizer(config, texts.train);
    using start = config.from === undefined ? null : await openStart(config.from);
    const modelConfig = start?.config ?? completeConfig(config.model!, tokenizer);
    const spec = start?.spec ?? specFromConfig(modelConfig, 'the model of the pretraining config');
    const nested = nestedIn(config, start, spec);
    const widths = Widths.of('pretrain', config.sample, nested, spec);
    if (spec.vocab < tokenizer.vocabSize) {
      throw new InvalidArgumentError(
        `[pretrain] model.vocab_size must be at least the tokenizer's ${tokenizer.vocabSize}, got ${spec.vocab}`,
      );
    }
    const sequenceLength = config.sequenceLength ?? Math.min(256, spec.maxPositions);
    if (sequenceLength > spec.maxPositions) {
      throw new InvalidArgumentError(
        `[pretrain] sequenceLength must be at most the model's ${spec.maxPositions} positions, got ${sequenceLength}`,
      );
    }
    const data = TokenData.tokenise(texts.train, tokenizer, sequenceLength);
    const evalData = texts.heldOut && TokenData.tokenise(texts.heldOut, tokenizer, sequenceLength);
    const resolved = resolveConfig(config, data, { batchTokens: 4096, lr: 1e-3, weightDecay: 0.1 });

    using engine = new Engine(config.device);
    const { train: part = 'all' } = config;
    using trainable = new Trainable(parameterPlan(spec, (name) => part === 'all' || inFeedForward(name, nested)));
    const random = new Random(resolved.seed, 'initial weights');
    const whole = start ? flattenWeights(spec, start.loaded) : initialWeights(spec, () => random.normal());
    trainable.params.write(selected(spec, trainable.plan, whole));
    const { batchTokens } = resolved;
    const recompute = config.gradCheckpointing ?? false;
    const frozen = start?.loaded.byName;
    using step = lossProgram(spec, trainable, engine, { batchTokens, train: true, recompute, nested, frozen });
    using measure = lossProgram(spec, trainable, engine, { batchTokens, train: false, nested, frozen });
    const task: Task = {
      api: 'pretrain',
      engine,
      trainable,
      data,
      identity: {
        ...{ method: 'pretraining', model: modelConfig, evalData: evalData?.sha256() ?? null },
        ...{ from: start?.sha256 ?? null, train: part, widths: nested ? widths.identity : null },
      },
      lossRows: (batch) => batch.targets.reduce((count, target) => count + (target >= 0 ? 1 : 0), 0),
      async micro(batch, { step: number, index, total, signal }) {
        const terms: Record<string, number> = { loss: 0 };
        const draw = new Random(resolved.seed, 'width', number * resolved.gradAccumulation + index);
        for (const { name, dims, weight } of widths.draw(draw)) {
          const { outputs } = await step.run({ ...lossRun(batch, weight / total, dims), signal });
          const [loss, accuracy] = [outputs.loss[0], outputs.accuracy[0] / weight];
          terms.loss += loss;
          if (nested) terms[`loss ${name}`] = loss / weight;
          terms[nested ? `accuracy ${name}` : 'accuracy'] = accuracy;
        }
        return terms;
      },
      ...(evalData && {
        async evaluate(signal?: AbortSignal) {
          const levels: Record<string, Record<string, number>> = {};
          for (const { name, dims } of widths.all) {
            let nats = 0;
            let correct = 0;
            let predicted = 0;
            for (const batch of wholeEpoch(evalData, resolved.batchTokens)) {
              const { outputs } = await measure.run({ ...lossRun(batch, 1, dims), signal });
              nats += outputs.loss[0];
              correct += outputs.accuracy[0];
              predicted += task.lossRows(batch);
            }
            const bits = nats / Math.LN2 / evalData.bytes;
            const level = { bits_per_byte: bits, loss: nats / predicted, accuracy: correct / predicted };
            levels[nested ? name : 'held-out'] = level;
          }
          const all = Object.values(levels);
          return { levels, metric: all.reduce((sum, level) => sum + level.bits_per_byte, 0) / all.length };
        },
      }),
    };
    const result = await train(task, resolved, config.out, config);
    if (result.stopped !== 'signal') {
      const values = trainable.values();
      for (const { name, offset } of parameterPlan(spec).parameters) {
        const trained = values.get(name);
        if (trained) whole.set(trained, offset);
      }
      const text = start?.configText ?? jsonWithFloats(modelConfig, floatFields);
      await writeCheckpoint(config.out, text, exportWeights(spec, whole), config.saveAs ?? 'f32');
      if (nested) await writeNested(config.out, spec, { ...nested, trained: part }, start?.license);
    }
    return { dir: config.out, step: result.step, stopped: result.stopped, ...(result.best && { best: result.best }) };
  });
}

/** Trains or copies the tokenizer into `out`; a run that is resumed keeps the one it has. */
async function prepareTokenizer(config: PretrainConfig, texts: readonly string[]): Promise<Tokenizer> {
  const { out } = config;
  const tokenizer = config.from ?? config.tokenizer;
  const resumes = config.resume !== false && (await newestCheckpoint(out)) !== null;
  if (!resumes || !existsSync(join(out, 'tokenizer.json'))) {
    if (typeof tokenizer === 'string') {
      await copyTokenizer(tokenizer, out);
    } else {
      if (typeof tokenizer !== 'object' || tokenizer === null) {
        throw new InvalidArgumentError('[pretrain] tokenizer must be a directory or {vocabSize}');
      }
      checkKeys('pretrain', 'tokenizer option', tokenizer, ['vocabSize']);
      const { max_position_embeddings: llama, n_positions: gpt2 } = config.model!;
      await writeBpe(out, trainBpe(texts, tokenizer.vocabSize), Number(llama ?? gpt2 ?? 1024));
    }
  }
  return loadTokenizer(out);
}

function completeConfig(model: Record<string, unknown>, tokenizer: Tokenizer): Record<string, unknown> {
  return {
    ...(model.model_type === 'gpt2' ? { architectures: ['GPT2LMHeadModel'] } : {}),
    ...(model.model_type === 'llama' ? { architectures: ['LlamaForCausalLM'] } : {}),
    ...(model.model_type === 'mistral' ? { architectures: ['MistralForCausalLM'] } : {}),
    vocab_size: tokenizer.vocabSize,
    bos_token_id: tokenizer.bosId,
    eos_token_id: tokenizer.eosId,
    ...model,
  };
}

function checkStart({ model, tokenizer, from, train }: PretrainConfig): void {
  const fail = (what: string): never => {
    throw new InvalidArgumentError(`[pretrain] ${what}`);
  };
  if (from === undefined) {
    if (typeof model !== 'object' || model === null) fail('model must be the content of a config.json');
    if (train !== undefined) fail("train says which weights of a model are trained: it needs 'from'");
    return;
  }
  if (typeof from !== 'string' || from === '')
    fail(`from must be the path of a directory, got ${JSON.stringify(from)}`);
  if (model !== undefined || tokenizer !== undefined) fail("model and tokenizer are those of 'from': leave them out");
  if (!['all', 'ffn', undefined].includes(train)) fail(`train must be 'all' or 'ffn', got ${JSON.stringify(train)}`);
}

/** A model to go on from. */
interface Start extends Disposable {
  readonly config: Record<string, unknown>;
  /** As its file has it. */
  readonly configText: string;
  readonly spec: ModelSpec;
  readonly loaded: LoadedWeights;
  readonly nested: Nested | undefined;
  readonly sha256: string;
  readonly license: string | undefined;
}

async function openStart(dir: string): Promise<Start> {
  const configPath = join(dir, 'config.json');
  const { text: configText, json } = await readJsonText(configPath);
  const config = json as Record<string, unknown>;
  const spec = specFromConfig(config, configPath);
  const elastic = await readElastic(dir);
  if (elastic && (elastic.lora || elastic.routers.size > 0)) {
    throw new InvalidArgumentError(
      `[pretrain] ${dir} has routers or corrections that were made for its weights; start from its base`,
    );
  }
  const checkpoint = Checkpoint.open(dir);
  try {
    const loaded = loadWeights(spec, checkpoint);
    return {
      ...{ config, configText, spec, loaded, nested: elastic?.policy.nested, sha256: await checkpoint.sha256() },
      license: elastic ? elastic.policy.base.license : (await provenanceOf(dir)).license,
      [Symbol.dispose]() {
        loaded.dispose();
        checkpoint.dispose();
      },
    };
  } catch (error) {
    checkpoint.dispose();
    throw error;
  }
}

/** What is nested in the model that is trained, if anything. */
function nestedIn({ nested }: PretrainConfig, start: Start | null, spec: ModelSpec): Nested | undefined {
  if (!nested) return start?.nested;
  if (start?.nested) {
    throw new InvalidArgumentError("[pretrain] nested must be absent: the model of 'from' is nested already");
  }
  checkKeys('pretrain', 'key of nested', nested, ['granularities', 'alignment', 'layers']);
  return policyOf({ kind: 'matformer', ...nested }, spec).nested;
}

/** Whether a weight belongs to a feed-forward, of the nested ones if any are. */
function inFeedForward(name: string, nested: Nested | undefined): boolean {
  const layer = /^layers\.(\d+)\.(?:gate|up|down)\./.exec(name)?.[1];
  return layer !== undefined && (nested?.layers.includes(Number(layer)) ?? true);
}

/** The parameters of a plan out of those of the whole model. */
function selected(spec: ModelSpec, plan: ParameterPlan, whole: Float32Array): Float32Array {
  const values = new Float32Array(plan.size);
  const from = new Map(parameterPlan(spec).parameters.map(({ name, offset }) => [name, offset]));
  for (const { name, offset, size } of plan.parameters) {
    const at = from.get(name)!;
    values.set(whole.subarray(at, at + size), offset);
  }
  return values;
}

/**
 * Weighted cross-entropy of a batch: outputs `loss` and `accuracy`, sums over rows weighted by the feed `weight`. With
 * `train` it adds the gradient of the loss to `trainable.grads`; `recompute` then keeps block inputs only.
 *
 * @param trainable parameters of `parameterPlan(spec)`, or some of them
 * @param options.frozen the others, by name
 * @param options.nested makes widths of feed-forwards dims (`widthDims`)
 */
export function lossProgram(
  spec: ModelSpec,
  trainable: Trainable,
  engine: Engine,
  {
    batchTokens,
    train,
    recompute = false,
    nested,
    frozen,
  }: {
    batchTokens: number;
    train: boolean;
    recompute?: boolean;
    nested?: Nested;
    frozen?: ReadonlyMap<string, Tensor>;
  },
): Program {
  const graph = new Graph();
  const trained = new Set(trainable.plan.parameters.map(({ name }) => name));
  const node = (name: string) =>
    trained.has(name) ? graph.state(trainable.view(name), name) : graph.weight(frozen!.get(name)!, name);
  const weights = weightsByName(spec, node);
  const { rows, segments: _, ...inputs } = batchInputs(graph, batchTokens);
  const selector = nested && { ...selectEverything, width: nestedWidth(graph, nested, spec.ffn) };
  const x = decoder(graph, spec, weights, inputs, selector, { recompute });
  const weight = graph.feed('weight', 'f32', [rows]);
  const targets = graph.feed('targets', 'i32', [rows]);
  const { loss, correct } = graph.tag('head', () =>
    crossEntropy(finalNorm(spec, weights, x), weights.head, targets, weight, spec.logitSoftcap),
  );
  graph.output('loss', loss);
  graph.output('accuracy', dot(correct, weight));
  if (train) trainable.accumulateGradients(graph, loss, node);
  return Program.compile(graph, engine);
}

/** Dims and feeds of a batch whose every row with a target weighs `weight`, at widths of `widthDims`. */
export function lossRun(batch: Batch, weight: number, widths: Readonly<Record<string, number>> = {}) {
  const { dims, feeds } = batchRun(batch);
  return {
    dims: { ...dims, ...widths },
    feeds: {
      ...feeds,
      targets: batch.targets,
      weight: Float32Array.from(batch.targets, (target) => (target >= 0 ? weight : 0)),
    },
  };
}
