// Encoder-decoder models in training: where they start from, the loss of a batch of pairs, and the directory they become.
import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { elasticConfigFile } from '../../elastic/store.js';
import { crossEntropy, dot, Graph, type Node, Program, scale } from '../../graph/index.js';
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
import { exportSlots, initialise, type ParameterPlan, planOf, storedValues } from '../../model/weights.js';
import { InvalidArgumentError, InvalidFileError } from '../../native/errors.js';
import type { Engine } from '../../native/index.js';
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
 *   from scratch one with distances (T5), one with modules, one whose head has a bias.
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
  if (
    checkpoint?.has('final_logits_bias') &&
    checkpoint
      .tensor('final_logits_bias')
      .readFloat()
      .some((x) => x !== 0)
  ) {
    throw new InvalidArgumentError(
      `[${api}] ${sourceDir}: final_logits_bias must be 0 where a model is trained, and it is not`,
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
    ...{ spec, ownHead, weights, config: read?.text ?? jsonWithFloats(json, floatFields) },
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
  { spec, ownHead, config }: Pick<TrainedSeq2Seq, 'spec' | 'ownHead' | 'config'>,
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
  await writeCheckpoint(out, config, exportSlots(spec.decoder, seq2seqSlots(spec, ownHead), weights), saveAs);
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

/** What the head multiplies: states x [N, D] of the decoder, times a factor of some models. */
export const headInput = ({ headScale }: Seq2SeqSpec, x: Node): Node => scale(x, headScale);

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
  { batchTokens, train, recompute = false }: { batchTokens: number; train: boolean; recompute?: boolean },
): Program {
  const { spec } = model;
  const graph = new Graph();
  const node = (name: string) => graph.state(trainable.view(name), name);
  const weights = trainedNodes(graph, model, node);
  const { source, target, targets, weight } = pairInputs(graph, batchTokens);
  const features = encodeSource(graph, spec, weights, source, { recompute });
  const x = decodeTarget(graph, spec, weights, target, { features, offsets: source.offsets }, { recompute });
  const { loss, correct } = graph.tag('head', () =>
    crossEntropy(headInput(spec, x), weights.head.weight, targets, weight),
  );
  graph.output('loss', loss);
  graph.output('accuracy', dot(correct, weight));
  if (train) trainable.accumulateGradients(graph, loss, node);
  return Program.compile(graph, engine);
}
