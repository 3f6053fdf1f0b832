// Encoder-decoder models in training: where they start from, the loss of a batch of pairs, and the directory they become.
import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { elasticConfigFile } from '../../elastic/store.js';
import { crossEntropy, dot, Graph, linear, linearAdd, type Node, Program, scale } from '../../graph/index.js';
import { targetTokenizer } from '../../infer/seq2seq/network.js';
import { writingSettings } from '../../infer/seq2seq/writing.js';
import { copyTokenizer, writeCheckpoint } from '../../io/directory.js';
import { jsonWithFloats, readJson, readJsonText, writeFileAtomic } from '../../io/files.js';
import { Checkpoint } from '../../io/safetensors.js';
import { loadTokenizer } from '../../io/tokenizer.js';
import { Config, floatFields } from '../../model/config.js';
import { decodeTarget, encodeSource } from '../../model/seq2seq.js';
import { type Seq2SeqSpec, seq2seqSpecFromConfig } from '../../model/seq2seq_spec.js';
import { type Seq2SeqNodes, seq2seqByName, seq2seqSlots } from '../../model/seq2seq_weights.js';
import { type Affine, exportSlots, initialise, type ParameterPlan, planOf, storedValues } from '../../model/weights.js';
import { InvalidArgumentError, InvalidFileError } from '../../native/errors.js';
import { type Engine, Tensor } from '../../native/index.js';
import { batchInputs, batchRun } from '../batches.js';
import { Random } from '../random.js';
import type { Trainable } from '../trainable.js';
import type { PairBatch, PairTokens } from './pairs.js';

/** Where training starts: the directory of an encoder-decoder model, or the content of a config.json and tokenizers. */
export type Seq2SeqStart =
  | { readonly from: string }
  | { readonly model: Record<string, unknown>; readonly tokenizer: string; readonly targetTokenizer?: string };

/** An encoder-decoder model to train. */
export interface TrainedSeq2Seq {
  readonly spec: Seq2SeqSpec;
  /** Text of its config.json. */
  readonly config: string;
  /** The head's matrix is not the embedding. */
  readonly ownHead: boolean;
  /** `[planOf(seq2seqSlots(spec, ownHead)).size]` */
  readonly weights: Float32Array;
  /** Added to logits, f32 [vocab]; it stays as it is, and is null where it is 0. */
  readonly headBias: Float32Array | null;
  readonly tokens: PairTokens;
  /** Of the checkpoint that it starts from; null: of none. */
  readonly sha256: string | null;
}

const classOf = {
  bart: 'BartForConditionalGeneration',
  mbart: 'MBartForConditionalGeneration',
  marian: 'MarianMTModel',
};

/** Tables of distances have no gradient: they stay as they are. */
const isTrained = (name: string): boolean => !name.endsWith('.relative');

/** Where every weight that is trained lies in one flat vector. */
export const trainedPlan = ({ spec, ownHead }: Pick<TrainedSeq2Seq, 'spec' | 'ownHead'>): ParameterPlan =>
  planOf(seq2seqSlots(spec, ownHead).filter(({ name }) => isTrained(name)));

/**
 * Opens what training starts from. Weights from scratch are random by the seed.
 *
 * @throws InvalidFileError for files that are missing or do not fit, InvalidArgumentError for a model that cannot be trained:
 *   from scratch one with distances (T5), one with modules.
 */
export async function openSeq2Seq(api: string, start: Seq2SeqStart, seed: number): Promise<TrainedSeq2Seq> {
  const scratch = 'model' in start;
  const [sourceDir, targetDir] = scratch
    ? [start.tokenizer, start.targetTokenizer ?? start.tokenizer]
    : [start.from, start.from];
  const ownTarget = scratch ? start.targetTokenizer !== undefined : existsSync(join(targetDir, targetTokenizer));
  const source = await loadTokenizer(sourceDir);
  const target = ownTarget ? await loadTokenizer(targetDir, scratch ? undefined : targetTokenizer) : source;
  const file = scratch ? `the model of the ${api} config` : join(start.from, 'config.json');
  if (!scratch && existsSync(join(start.from, elasticConfigFile))) {
    throw new InvalidArgumentError(`[${api}] ${start.from} has modules made for its weights; start from its base`);
  }
  const read = scratch ? null : await readJsonText(file);
  const vocabSize = Math.max(source.vocabSize, target.vocabSize);
  const json = scratch
    ? completeConfig(api, start.model, vocabSize, target.eosId)
    : (read!.json as Record<string, unknown>);
  const spec = seq2seqSpecFromConfig(json, file);
  const { vocab } = spec.decoder;
  if (vocab < vocabSize) {
    throw new InvalidArgumentError(`[${api}] vocab_size must be at least the tokenizers' ${vocabSize}, got ${vocab}`);
  }
  const generation = scratch ? null : join(start.from, 'generation_config.json');
  const own = generation !== null && existsSync(generation);
  const settings = own ? await readJson(generation) : json;
  const { startId, endIds } = writingSettings(settings, own ? generation : file, Config.of(json, file), vocab);

  using checkpoint = scratch ? null : Checkpoint.open(start.from);
  const ownHead = spec.decoder.family === 't5' && (checkpoint?.has('lm_head.weight') ?? false);
  const bias = checkpoint?.has('final_logits_bias') ? checkpoint.tensor('final_logits_bias').readFloat() : null;
  if (bias && (bias.length !== vocab || !bias.every(Number.isFinite))) {
    throw new InvalidFileError(
      `[weights] ${sourceDir}: final_logits_bias must be ${vocab} finite numbers where a model is trained, got ${bias.length}`,
    );
  }
  const slots = seq2seqSlots(spec, ownHead);
  const plan = planOf(slots);
  const weights = new Float32Array(plan.size);
  const random = new Random(seed, 'initial weights');
  for (const slot of slots) {
    const { offset, size } = plan.parameters.find(({ name }) => name === slot.name)!;
    const stored = checkpoint && storedValues(checkpoint, spec.decoder, slot);
    if (stored) weights.set(stored, offset);
    else if (scratch) {
      initialise(weights.subarray(offset, offset + size), slot.init, spec.decoder.layers, () => random.normal());
    } else {
      throw new InvalidFileError(
        `[weights] ${start.from} has no tensor ${slot.file.name}, expected with shape [${slot.file.shape}]`,
      );
    }
  }
  return {
    ...{ spec, ownHead, weights, headBias: bias?.some((x) => x !== 0) ? bias : null },
    ...{ config: read?.text ?? jsonWithFloats(json, floatFields) },
    tokens: { source, target, startId, endIds },
    sha256: (await checkpoint?.sha256()) ?? null,
  };
}

function completeConfig(
  api: string,
  model: Record<string, unknown>,
  vocabSize: number,
  eosId: number | null,
): Record<string, unknown> {
  const type = model.model_type as keyof typeof classOf;
  if (!Object.hasOwn(classOf, type)) {
    throw new InvalidArgumentError(
      `[${api}] from scratch model.model_type must be ${Object.keys(classOf).join(', ')}, got ${JSON.stringify(type)}: tables of distances are not trained`,
    );
  }
  const ends = eosId === null ? {} : { eos_token_id: eosId, decoder_start_token_id: eosId, forced_eos_token_id: eosId };
  return {
    ...{ architectures: [classOf[type]], is_encoder_decoder: true, tie_word_embeddings: true, vocab_size: vocabSize },
    ...ends,
    ...model,
  };
}

/** Writes a directory that transformers reads, with what `start` has beside weights. @param weights all, as `TrainedSeq2Seq` */
export async function writeSeq2Seq(
  out: string,
  { spec, ownHead, headBias, config }: Pick<TrainedSeq2Seq, 'spec' | 'ownHead' | 'headBias' | 'config'>,
  weights: Float32Array,
  start: Seq2SeqStart,
  saveAs?: 'f32' | 'bf16',
): Promise<void> {
  const from = 'from' in start ? start.from : start.tokenizer;
  await copyTokenizer(from, out);
  const copy = async (path: string, name: string) => {
    if (existsSync(path)) await writeFileAtomic(join(out, name), await readFile(path));
  };
  if ('from' in start) {
    for (const name of [targetTokenizer, 'generation_config.json']) await copy(join(from, name), name);
  } else if (start.targetTokenizer !== undefined) {
    await copy(join(start.targetTokenizer, 'tokenizer.json'), targetTokenizer);
  }
  const tensors = exportSlots(spec.decoder, seq2seqSlots(spec, ownHead), weights);
  if (headBias) tensors.final_logits_bias = { dtype: 'f32', shape: [1, headBias.length], data: headBias };
  await writeCheckpoint(out, config, tensors, saveAs);
}

/** Declares dims and feeds of a batch of pairs, of which both sides together have at most `batchTokens` rows. */
export function pairInputs(graph: Graph, batchTokens: number) {
  const target = batchInputs(graph, batchTokens);
  const sourceRows = graph.dim('sourceRows', batchTokens);
  const feed = (name: string, size: Node['shape'][number]) => graph.feed(name, 'i32', [size]);
  const source = {
    ids: feed('sourceIds', sourceRows),
    positions: feed('sourcePositions', sourceRows),
    offsets: feed('sourceOffsets', target.offsets.shape[0]),
  };
  return {
    ...{ source, target, sourceRows },
    targets: feed('targets', target.rows),
    weight: graph.feed('weight', 'f32', [target.rows]),
  };
}

/** Values of those dims and feeds; every token of a target weighs `weight`. */
export function pairRun({ source, target }: PairBatch, weight: number) {
  const { dims, feeds } = batchRun(target);
  return {
    dims: { ...dims, sourceRows: source.ids.length },
    feeds: {
      ...feeds,
      ...{ sourceIds: source.ids, sourcePositions: source.positions, sourceOffsets: source.offsets },
      ...{ targets: target.targets, weight: new Float32Array(target.targets.length).fill(weight) },
    },
  };
}

/** What the head multiplies: states x [N, D] of the decoder, times a factor of some models, and with a bias a 1 behind them. */
export const headInput = ({ headScale }: Seq2SeqSpec, x: Node, biased: BiasedHead | null): Node =>
  biased ? biased.input(scale(x, headScale)) : scale(x, headScale);

/**
 * A head with a bias, which losses have no operand for: the bias is one more column of its matrix, and what it meets is 1. Both are made by products
 * with the identity, which change no bit.
 */
export class BiasedHead implements Disposable {
  /** The identity and a row of zeros, f32 [hidden + 1, hidden]; what is 1 at its end, [hidden + 1]; the bias, [vocab, 1]. */
  readonly #identity: Tensor;
  readonly #last: Tensor;
  readonly #column: Tensor;

  constructor(bias: Float32Array, hidden: number) {
    const identity = new Float32Array((hidden + 1) * hidden);
    for (let i = 0; i < hidden; i++) identity[i * hidden + i] = 1;
    this.#identity = Tensor.fromData('f32', [hidden + 1, hidden], identity);
    this.#last = Tensor.fromData('f32', [hidden + 1], new Float32Array(hidden + 1).fill(1, hidden));
    this.#column = Tensor.fromData('f32', [bias.length, 1], bias);
  }

  /** f32 [N, hidden] to [N, hidden + 1] */
  input(x: Node): Node {
    const { graph } = x;
    return linear(x, graph.weight(this.#identity), { bias: graph.weight(this.#last) });
  }

  /** A head's matrix f32 [vocab, hidden] that is trained to [vocab, hidden + 1]. */
  matrix(weight: Node): Node {
    const { graph } = weight;
    const wide = linear(weight, graph.weight(this.#identity));
    const last = graph.weight(this.#last.slice(0, [this.#last.size, 1]));
    return linearAdd(wide, graph.weight(this.#column), last);
  }

  dispose(): void {
    for (const tensor of [this.#identity, this.#last, this.#column]) tensor.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}

/** A head that is not trained, as losses take it. */
export interface FrozenHead extends Disposable {
  /** What its bias makes of what it multiplies; null: it has none, or zeros. */
  readonly biased: BiasedHead | null;
  /** Of `BiasedHead`, made once for all programs; else that of the model. */
  matrix(graph: Graph, own: Node): Node;
}

export function frozenHead({ weight, bias }: Affine<Tensor>): FrozenHead {
  const values = bias?.readFloat();
  if (!values?.some((x) => x !== 0)) return { biased: null, matrix: (_, own) => own, [Symbol.dispose]() {} };
  const [vocab, hidden] = weight.shape;
  const [narrow, wide] = [weight.readFloat(), new Float32Array(vocab * (hidden + 1))];
  for (let id = 0; id < vocab; id++) {
    wide.set(narrow.subarray(id * hidden, (id + 1) * hidden), id * (hidden + 1));
    wide[id * (hidden + 1) + hidden] = values[id];
  }
  const matrix = Tensor.fromData('f32', [vocab, hidden + 1], wide);
  const biased = new BiasedHead(values, hidden);
  return {
    biased,
    matrix: (graph) => graph.weight(matrix),
    [Symbol.dispose]() {
      matrix.dispose();
      biased.dispose();
    },
  };
}

/** Weights in a graph: those of the trainable, and tables as the model has them. */
export function trainedNodes(graph: Graph, model: TrainedSeq2Seq, node: (name: string) => Node): Seq2SeqNodes {
  const { spec, ownHead, weights } = model;
  const { parameters } = planOf(seq2seqSlots(spec, ownHead));
  return seq2seqByName(graph, spec, ownHead, node, (name) => {
    const { offset, size } = parameters.find((parameter) => parameter.name === name)!;
    return weights.subarray(offset, offset + size);
  });
}

/**
 * Cross-entropy of targets, each row reading those before it: outputs `loss` and `accuracy`, sums over tokens weighted by the feed
 * `weight`. With `train` it adds the gradient of the loss to `trainable.grads`.
 */
export function pairProgram(
  model: TrainedSeq2Seq,
  trainable: Trainable,
  engine: Engine,
  {
    batchTokens,
    train,
    recompute = false,
    biased = null,
  }: { batchTokens: number; train: boolean; recompute?: boolean; biased?: BiasedHead | null },
): Program {
  const { spec } = model;
  const graph = new Graph();
  const node = (name: string) => graph.state(trainable.view(name), name);
  const weights = trainedNodes(graph, model, node);
  const { source, target, targets, weight } = pairInputs(graph, batchTokens);
  const features = encodeSource(graph, spec, weights, source, { recompute });
  const x = decodeTarget(graph, spec, weights, target, { features, offsets: source.offsets }, { recompute });
  const { loss, correct } = graph.tag('head', () => {
    const matrix = biased ? biased.matrix(weights.head.weight) : weights.head.weight;
    return crossEntropy(headInput(spec, x, biased), matrix, targets, weight);
  });
  graph.output('loss', loss);
  graph.output('accuracy', dot(correct, weight));
  if (train) trainable.accumulateGradients(graph, loss, node);
  return Program.compile(graph, engine);
}
