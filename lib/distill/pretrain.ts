// Pretraining: trains every weight of a small decoder from scratch on text and writes a Hugging Face directory.
import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { crossEntropy, dot, Graph, Program } from '../graph/index.js';
import { writeFileAtomic } from '../io/files.js';
import { toBf16 } from '../io/rounding.js';
import { type TensorData, writeSafetensors } from '../io/safetensors.js';
import { loadTokenizer, type Tokenizer } from '../io/tokenizer.js';
import { decoder, finalNorm } from '../model/decoder.js';
import { type ModelSpec, specFromConfig } from '../model/spec.js';
import { exportWeights, initialWeights, parameterPlan, weightsByName } from '../model/weights.js';
import { InvalidArgumentError } from '../native/errors.js';
import { Engine } from '../native/index.js';
import { batchInputs, batchRun, trainingTexts, wholeEpoch } from './batches.js';
import { trainBpe, writeBpe } from './bpe.js';
import { newestCheckpoint } from './checkpoints.js';
import { type Batch, type DataSource, TokenData } from './data.js';
import type { TrainConfig, TrainResult } from './events.js';
import { Random } from './random.js';
import { Trainable } from './trainable.js';
import { checkConfig, checkKeys, resolveConfig, type Task, train, withLock } from './trainer.js';

export interface PretrainConfig extends TrainConfig {
  /** Content of a config.json of a supported architecture; `vocab_size` and token ids are filled in when absent. */
  model: Record<string, unknown>;
  /** A directory with a tokenizer to take over, or the size of a byte-level BPE to train on the data. */
  tokenizer: string | { vocabSize: number };
  /** Becomes the model's directory; metrics.jsonl and checkpoints/ lie there too. */
  out: string;
  data: DataSource;
  /** Measured every `evalEvery` steps; the best weights are kept. */
  evalData?: DataSource;
  /** Without evalData: share of the documents to hold out. */
  heldOut?: number;
  /** How weights are stored in the end; default f32. */
  saveAs?: 'f32' | 'bf16';
}

const ownKeys = ['model', 'tokenizer', 'out', 'data', 'evalData', 'heldOut', 'saveAs'];
const tokenizerFiles = ['tokenizer.json', 'tokenizer_config.json'];

/**
 * Trains a decoder with cross-entropy on the next token and writes config.json, model.safetensors and the tokenizer.
 * The same config gives the same bits whatever the thread count, and a killed run, started again, continues to the same
 * bits. Held-out quality is reported in bits per byte of text, which does not depend on the tokenizer.
 *
 * Errors: InvalidArgumentError for a bad config, InvalidDataError and InvalidFileError for bad inputs, FileSystemError
 * when another process writes to `out`, DivergedError when training does not recover from NaN.
 */
export async function pretrain(config: PretrainConfig): Promise<TrainResult> {
  checkConfig('pretrain', config, ownKeys);
  if (!['f32', 'bf16', undefined].includes(config.saveAs)) {
    throw new InvalidArgumentError(`[pretrain] saveAs must be 'f32' or 'bf16', got ${String(config.saveAs)}`);
  }
  if (typeof config.model !== 'object' || config.model === null) {
    throw new InvalidArgumentError('[pretrain] model must be the content of a config.json');
  }
  return withLock(config.out, async () => {
    const texts = await trainingTexts('pretrain', config);
    const tokenizer = await prepareTokenizer(config, texts.train);
    const modelConfig = completeConfig(config.model, tokenizer);
    const spec = specFromConfig(modelConfig, 'the model of the pretraining config');
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
    using trainable = new Trainable(parameterPlan(spec));
    const random = new Random(resolved.seed, 'initial weights');
    trainable.params.write(initialWeights(spec, () => random.normal()));
    const { batchTokens } = resolved;
    const recompute = config.gradCheckpointing ?? false;
    using step = lossProgram(spec, trainable, engine, { batchTokens, train: true, recompute });
    using measure = lossProgram(spec, trainable, engine, { batchTokens, train: false });
    const task: Task = {
      api: 'pretrain',
      engine,
      trainable,
      data,
      identity: { method: 'pretraining', model: modelConfig, evalData: evalData?.sha256() ?? null },
      lossRows: (batch) => batch.targets.reduce((count, target) => count + (target >= 0 ? 1 : 0), 0),
      async micro(batch, { total, signal }) {
        const { outputs } = await step.run({ ...lossRun(batch, 1 / total), signal });
        return { loss: outputs.loss[0], accuracy: outputs.accuracy[0] };
      },
      ...(evalData && {
        async evaluate(signal?: AbortSignal) {
          let nats = 0;
          let correct = 0;
          let predicted = 0;
          for (const batch of wholeEpoch(evalData, resolved.batchTokens)) {
            const { outputs } = await measure.run({ ...lossRun(batch, 1), signal });
            nats += outputs.loss[0];
            correct += outputs.accuracy[0];
            predicted += task.lossRows(batch);
          }
          const bits = nats / Math.LN2 / evalData.bytes;
          return {
            levels: { 'held-out': { bits_per_byte: bits, loss: nats / predicted, accuracy: correct / predicted } },
            metric: bits,
          };
        },
      }),
    };
    const result = await train(task, resolved, config.out, config);
    if (result.stopped !== 'signal') {
      await writeModel(config.out, spec, modelConfig, trainable.params.readFloat(), config.saveAs ?? 'f32');
    }
    return { dir: config.out, step: result.step, stopped: result.stopped, ...(result.best && { best: result.best }) };
  });
}

/** Trains or copies the tokenizer into `out`; a run that is resumed keeps the one it has. */
async function prepareTokenizer(config: PretrainConfig, texts: readonly string[]): Promise<Tokenizer> {
  const { tokenizer, out } = config;
  const resumes = config.resume !== false && (await newestCheckpoint(out)) !== null;
  if (!resumes || !existsSync(join(out, tokenizerFiles[0]))) {
    if (typeof tokenizer === 'string') {
      // Loading checks the files before they are copied.
      await loadTokenizer(tokenizer);
      for (const name of tokenizerFiles) {
        if (existsSync(join(tokenizer, name)))
          await writeFileAtomic(join(out, name), await readFile(join(tokenizer, name)));
      }
    } else {
      if (typeof tokenizer !== 'object' || tokenizer === null) {
        throw new InvalidArgumentError('[pretrain] tokenizer must be a directory or {vocabSize}');
      }
      checkKeys('pretrain', 'tokenizer option', tokenizer, ['vocabSize']);
      const { max_position_embeddings: llama, n_positions: gpt2 } = config.model;
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

/**
 * Weighted cross-entropy of a batch: outputs `loss` and `accuracy`, sums over rows weighted by the feed `weight`. With
 * `train` it adds the gradient of the loss to `trainable.grads`; `recompute` then keeps block inputs only.
 *
 * @param trainable parameters of `parameterPlan(spec)`
 */
export function lossProgram(
  spec: ModelSpec,
  trainable: Trainable,
  engine: Engine,
  { batchTokens, train, recompute = false }: { batchTokens: number; train: boolean; recompute?: boolean },
): Program {
  const graph = new Graph();
  const node = (name: string) => graph.state(trainable.view(name), name);
  const weights = weightsByName(spec, node);
  const { rows, segments: _, ...inputs } = batchInputs(graph, batchTokens);
  const x = decoder(graph, spec, weights, inputs, undefined, { recompute });
  const weight = graph.feed('weight', 'f32', [rows]);
  const targets = graph.feed('targets', 'i32', [rows]);
  const { loss, correct } = graph.tag('head', () =>
    crossEntropy(finalNorm(spec, weights, x), weights.head, targets, weight),
  );
  graph.output('loss', loss);
  graph.output('accuracy', dot(correct, weight));
  if (train) trainable.accumulateGradients(graph, loss, node);
  return Program.compile(graph, engine);
}

/** Dims and feeds of a batch whose every row with a target weighs `weight`. */
export function lossRun(batch: Batch, weight: number) {
  const { dims, feeds } = batchRun(batch);
  return {
    dims,
    feeds: {
      ...feeds,
      targets: batch.targets,
      weight: Float32Array.from(batch.targets, (target) => (target >= 0 ? weight : 0)),
    },
  };
}

async function writeModel(
  out: string,
  spec: ModelSpec,
  config: Record<string, unknown>,
  flat: Float32Array,
  saveAs: 'f32' | 'bf16',
): Promise<void> {
  const tensors = exportWeights(spec, flat);
  const stored: Record<string, TensorData> =
    saveAs === 'f32'
      ? tensors
      : Object.fromEntries(
          Object.entries(tensors).map(([name, { shape, data }]) => [
            name,
            { dtype: 'bf16', shape, data: toBf16(data as Float32Array) },
          ]),
        );
  await writeSafetensors(join(out, 'model.safetensors'), stored, { format: 'pt' });
  const torchDtype = saveAs === 'f32' ? 'float32' : 'bfloat16';
  await writeFileAtomic(
    join(out, 'config.json'),
    `${JSON.stringify({ ...config, torch_dtype: torchDtype }, null, 2)}\n`,
  );
}
