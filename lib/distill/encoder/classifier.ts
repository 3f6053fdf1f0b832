// Encoders with a head for texts in training: where they start from, the loss of a batch, quality, and the directory they become.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { elasticConfigFile } from '../../elastic/store.js';
import { Graph, type Node, Program } from '../../graph/index.js';
import { accuracy, confusion, f1, matthews, pearson } from '../../infer/quality/metrics.js';
import { copyTokenizer, writeCheckpoint } from '../../io/directory.js';
import { jsonWithFloats, readJsonText } from '../../io/files.js';
import { Checkpoint } from '../../io/safetensors.js';
import { floatFields } from '../../model/config.js';
import { type EncoderInputs, encoder, headLogits } from '../../model/encoder.js';
import { encoderSpecFromConfig } from '../../model/encoder_spec.js';
import { encoderByName, encoderSlots } from '../../model/encoder_weights.js';
import { type EncoderSpec, encoderTypes } from '../../model/spec.js';
import { exportSlots, initialise, planOf, storedValues } from '../../model/weights.js';
import { InvalidArgumentError, InvalidFileError } from '../../native/errors.js';
import type { Engine } from '../../native/index.js';
import { batchInputs, batchRun, wholeEpoch } from '../batches.js';
import { Random } from '../random.js';
import type { Trainable } from '../trainable.js';
import type { ExampleBatch, ExampleData, Target } from './examples.js';
import { classLoss, type ScoreLoss, squaredLoss } from './score_losses.js';

/** An encoder to train: its configuration as a classifier and its weights, `[planOf(encoderSlots(spec)).size]`. */
export interface Classifier {
  readonly spec: EncoderSpec;
  /** Text of its config.json. */
  readonly config: string;
  readonly weights: Float32Array;
  /** Of the checkpoint that it starts from; null: of none. */
  readonly sha256: string | null;
}

const classOf = { bert: 'Bert', roberta: 'Roberta', 'xlm-roberta': 'XLMRoberta', distilbert: 'DistilBert' } as const;

/** Where a classifier starts: a directory, or the content of a config.json. */
export type ClassifierStart = { readonly from: string } | { readonly model: Record<string, unknown> };

/** What a configuration says before the labels of the data are known. */
export interface ClassifierConfig {
  readonly file: string;
  readonly json: Record<string, unknown>;
  /** Null: from scratch. */
  readonly dir: string | null;
  /** Of the head there is; null: there is none. */
  readonly target: Target | null;
}

/** Reads the configuration of an encoder. Errors: InvalidFileError, InvalidArgumentError when it has something elastic. */
export async function readClassifierConfig(api: string, start: ClassifierStart): Promise<ClassifierConfig> {
  const dir = 'from' in start ? start.from : null;
  const file = dir === null ? `the model of the ${api} config` : join(dir, 'config.json');
  if (dir !== null && existsSync(join(dir, elasticConfigFile))) {
    throw new InvalidArgumentError(`[${api}] ${dir} has exits or widths made for its weights; start from its base`);
  }
  const json = (dir === null ? (start as { model: object }).model : (await readJsonText(file)).json) as Record<
    string,
    unknown
  >;
  const { encoder } = encoderSpecFromConfig(json, file);
  if (encoder.task !== 'sequence-classification' || dir === null) return { file, json, dir, target: null };
  if (encoder.scores === 'sigmoid' && encoder.labels.length > 1) {
    throw new InvalidFileError(
      `[${api}] ${file}: problem_type must be single_label_classification or regression, got multi_label_classification`,
    );
  }
  return {
    file,
    json,
    dir,
    target: encoder.scores === 'softmax' ? { kind: 'classes', labels: encoder.labels } : { kind: 'number' },
  };
}

/**
 * The encoder with a head for a target. Weights come from the directory where it has them, those of a head otherwise are random, as
 * all are from scratch.
 *
 * @throws InvalidFileError for weights that are missing or do not fit.
 */
export async function openClassifier(
  { file, json, dir }: ClassifierConfig,
  target: Target,
  seed: number,
): Promise<Classifier> {
  const labels = target.kind === 'classes' ? target.labels : ['LABEL_0'];
  const type = encoderTypes.find((type) => type === json.model_type)!;
  const changes = {
    architectures: [`${classOf[type]}ForSequenceClassification`],
    id2label: Object.fromEntries(labels.map((label, i) => [i, label])),
    label2id: Object.fromEntries(labels.map((label, i) => [label, i])),
    problem_type: target.kind === 'classes' ? 'single_label_classification' : 'regression',
  };
  const config = jsonWithFloats({ ...json, ...changes }, floatFields);
  const spec = encoderSpecFromConfig(JSON.parse(config), file);
  const slots = encoderSlots(spec);
  const plan = planOf(slots);
  const weights = new Float32Array(plan.size);
  const random = new Random(seed, 'initial weights');
  using checkpoint = dir === null ? null : Checkpoint.open(dir);
  for (const slot of slots) {
    const { offset, size } = plan.parameters.find(({ name }) => name === slot.name)!;
    const stored = checkpoint && storedValues(checkpoint, spec, slot);
    if (stored) weights.set(stored, offset);
    else if (!checkpoint || slot.name.startsWith('head.')) {
      initialise(weights.subarray(offset, offset + size), slot.init, spec.layers, () => random.normal());
    } else {
      throw new InvalidFileError(
        `[weights] ${dir} has no tensor ${slot.file.name}, expected with shape [${slot.file.shape}]`,
      );
    }
  }
  return { spec, config, weights, sha256: (await checkpoint?.sha256()) ?? null };
}

/** Writes a directory that transformers reads. @param tokenizer directory to take it from */
export async function writeClassifier(
  out: string,
  { spec, config }: Pick<Classifier, 'spec' | 'config'>,
  weights: Float32Array,
  tokenizer: string,
  saveAs?: 'f32' | 'bf16',
): Promise<void> {
  await copyTokenizer(tokenizer, out);
  await writeCheckpoint(out, config, exportSlots(spec, encoderSlots(spec), weights), saveAs);
}

/** Dims and feeds of a batch of texts. */
export interface TextInputs extends EncoderInputs {
  /** The first row of each text, i32 [S]. */
  readonly first: Node;
}

/** Declares them; `segments` is S. */
export function textInputs(graph: Graph, spec: EncoderSpec, batchTokens: number) {
  const { rows, segments, ...inputs } = batchInputs(graph, batchTokens);
  const first = graph.feed('first', 'i32', [segments]);
  const types = spec.encoder.tokenTypes > 0 ? { types: graph.feed('types', 'i32', [rows]) } : {};
  return { rows, segments, inputs: { ...inputs, ...types, first } satisfies TextInputs };
}

/** Values of those dims and feeds; models of one kind of tokens read pairs as that. */
export function textRun(batch: ExampleBatch, spec: EncoderSpec) {
  const { dims, feeds } = batchRun(batch);
  const { tokenTypes } = spec.encoder;
  return {
    dims,
    feeds: {
      ...feeds,
      ...(tokenTypes > 0 && { types: tokenTypes > 1 ? batch.types : new Int32Array(batch.types.length) }),
      first: batch.offsets.slice(0, -1),
    },
  };
}

/** Feeds of what texts are trained towards, and of the weight of each, f32 [S]. */
export function targetRun({ targets }: ExampleData, { examples }: ExampleBatch, spec: EncoderSpec, weight: number) {
  const values = Float32Array.from(examples, (example) => targets[example]);
  return {
    targets: spec.encoder.scores === 'softmax' ? Int32Array.from(values) : values,
    weight: new Float32Array(examples.length).fill(weight),
  };
}

/** The loss of scores [S, C] towards the feeds of `targetRun`. */
export function targetLoss(graph: Graph, spec: EncoderSpec, scores: Node, weight: Node): ScoreLoss {
  const segments = scores.shape[0];
  return spec.encoder.scores === 'softmax'
    ? classLoss(graph, scores, graph.feed('targets', 'i32', [segments]), weight)
    : squaredLoss(scores, graph.feed('targets', 'f32', [segments, 1]), weight);
}

/** Weights of a classifier in a graph, those of a trainable. */
export const trainedNode =
  (graph: Graph, trainable: Trainable) =>
  (name: string): Node =>
    graph.state(trainable.view(name), name);

/** The loss of a batch: outputs `loss` and `scores` f32 [S, C]. With `train` it adds the gradient to `trainable.grads`. */
export function classifierProgram(
  spec: EncoderSpec,
  trainable: Trainable,
  engine: Engine,
  { batchTokens, train, recompute = false }: { batchTokens: number; train: boolean; recompute?: boolean },
): Program {
  const graph = new Graph();
  const node = trainedNode(graph, trainable);
  const weights = encoderByName(spec, node);
  const { segments, inputs } = textInputs(graph, spec, batchTokens);
  const x = encoder(graph, spec, weights, inputs, undefined, { recompute });
  const scores = headLogits(graph, spec, weights, x, inputs.first);
  const { loss } = graph.tag('head', () => targetLoss(graph, spec, scores, graph.feed('weight', 'f32', [segments])));
  graph.output('loss', loss);
  graph.output('scores', scores);
  if (train) trainable.accumulateGradients(graph, loss, node);
  return Program.compile(graph, engine);
}

/** What held-out quality is measured by, larger being better; `pearson` of numbers, the others of classes. */
export type Metric = 'accuracy' | 'f1' | 'matthews' | 'pearson';
export const classMetrics: readonly Metric[] = ['accuracy', 'f1', 'matthews'];
export const numberMetrics: readonly Metric[] = ['pearson'];

/** Metrics of scores [examples, C] that were told of examples. */
export function qualityOf(spec: EncoderSpec, { targets }: ExampleData, scores: Float32Array): Record<string, number> {
  if (spec.encoder.scores !== 'softmax') {
    const errors = scores.map((score, i) => (score - targets[i]) ** 2);
    return { pearson: pearson(scores, targets), mse: errors.reduce((a, b) => a + b, 0) / errors.length };
  }
  const { length } = spec.encoder.labels;
  const counts = confusion(targets, toldClasses(scores, length), length);
  return { accuracy: accuracy(counts), f1: f1(counts), matthews: matthews(counts) };
}

/** The class of the largest of C scores of each example; of equal ones the first. */
export function toldClasses(scores: Float32Array, classes: number): Int32Array {
  return Int32Array.from({ length: scores.length / classes }, (_, i) => {
    const own = scores.subarray(i * classes, (i + 1) * classes);
    return own.indexOf(own.reduce((a, b) => Math.max(a, b)));
  });
}

/** Outputs of a program, f32 [S, C] each, for every example: [examples, C]; and the mean loss. */
export async function scoreExamples(
  program: Program,
  spec: EncoderSpec,
  data: ExampleData,
  { batchTokens, outputs, signal }: { batchTokens: number; outputs: readonly string[]; signal?: AbortSignal },
): Promise<{ scores: Record<string, Float32Array>; loss: number }> {
  const { length } = spec.encoder.labels;
  const scores = Object.fromEntries(outputs.map((name) => [name, new Float32Array(data.count * length)]));
  let loss = 0;
  for (const batch of wholeEpoch(data, batchTokens)) {
    const { dims, feeds } = textRun(batch, spec);
    const result = await program.run({ dims, feeds: { ...feeds, ...targetRun(data, batch, spec, 1) }, signal });
    loss += result.outputs.loss[0];
    for (const name of outputs) {
      const values = result.outputs[name] as Float32Array;
      for (const [s, example] of batch.examples.entries())
        scores[name].set(values.subarray(s * length, (s + 1) * length), example * length);
    }
  }
  return { scores, loss: loss / data.count };
}
