// Fine-tuning: trains an encoder to tell classes of texts, or a number of each, or an encoder-decoder model to write targets, and writes
// a directory that transformers reads.
import { join } from 'node:path';
import { readJson } from '../../io/files.js';
import type { Tokenizer } from '../../io/tokenizer.js';
import { loadTokenizer } from '../../io/tokenizer.js';
import { encoderSlots } from '../../model/encoder_weights.js';
import { isSeq2SeqConfig } from '../../model/spec.js';
import { planOf } from '../../model/weights.js';
import { InvalidArgumentError } from '../../native/errors.js';
import { Engine } from '../../native/index.js';
import { splitRows } from '../data.js';
import type { TrainConfig } from '../events.js';
import { finetunePairs, type PairResult } from '../seq2seq/finetune.js';
import { pairSource } from '../seq2seq/pairs.js';
import { Trainable } from '../trainable.js';
import { checkConfig, resolveConfig, type Task, train, withLock } from '../trainer.js';
import {
  type ClassifierConfig,
  classifierProgram,
  classMetrics,
  type Metric,
  numberMetrics,
  openClassifier,
  qualityOf,
  readClassifierConfig,
  scoreExamples,
  targetRun,
  textRun,
  writeClassifier,
} from './classifier.js';
import {
  BadRows,
  type Example,
  ExampleData,
  type ExampleSource,
  labelsOf,
  readExamples,
  type Target,
} from './examples.js';

/** What is trained on labelled texts, and how: settings of `finetune` that other training on such texts shares. */
export interface ExampleConfig {
  /** Labelled texts to train on. */
  data: ExampleSource;
  /** Measured every `evalEvery` steps; the best weights are kept. */
  evalData?: ExampleSource;
  /** Without evalData: share of the rows to hold out. */
  heldOut?: number;
  /** 'stop' (the default): a bad row ends the run with an error; 'skip': bad rows are left out, counted and named. */
  badRows?: 'stop' | 'skip';
  /** Of the held-out data, larger being better; default accuracy, and pearson of numbers. */
  metric?: Metric;
}

/** Settings of `finetune`. */
export interface FinetuneConfig extends TrainConfig, ExampleConfig {
  /** Directory of an encoder or an encoder-decoder model, whose weights and tokenizers are the start. A head it lacks is initialised. */
  from?: string;
  /** From scratch: the content of a config.json of a supported encoder, or of BART, mBART or Marian; `vocab_size` is filled in when absent. */
  model?: Record<string, unknown>;
  /** From scratch: a directory with a tokenizer to take over. */
  tokenizer?: string;
  /** From scratch, of an encoder-decoder model: a directory with the tokenizer of targets, where it is another. */
  targetTokenizer?: string;
  /** What is told of texts; default what the head of `from` tells, else 'classification'. */
  task?: 'classification' | 'regression';
  /** Names of the classes, by number, where `from` has no classifier; default: those of the data. */
  labels?: readonly string[];
  /** Becomes the model's directory; metrics.jsonl and checkpoints/ lie there too. */
  out: string;
  /** How weights are stored in the end; default f32. */
  saveAs?: 'f32' | 'bf16';
}

/** How a fine-tuning ended. */
export interface FinetuneResult extends PairResult {
  /** The metric of `best`; `loss`, of encoder-decoder models, is smaller where it is better. */
  metric: Metric | 'loss';
  /** Classes, by number; one without a name for numbers, none of encoder-decoder models. */
  labels: readonly string[];
  /** Rows left out. */
  badRows: number;
}

const ownKeys = [
  ...['from', 'model', 'tokenizer', 'targetTokenizer', 'task', 'labels', 'out', 'saveAs'],
  ...['data', 'evalData', 'heldOut', 'badRows', 'metric'],
];

/**
 * Trains an encoder and its head on labelled texts, by cross-entropy of classes or squared error of numbers, each text weighing the
 * same; or an encoder-decoder model on texts whose labels are their targets, by cross-entropy of each token of a target after the right
 * ones before it, each token weighing the same. Without dropout. Tables of distances (T5) stay as they are. The same config gives the same bits whatever the thread count, and a killed run, started again, continues to
 * the same bits.
 *
 * @throws InvalidArgumentError for a bad config, InvalidDataError for bad rows unless they are left out, and for a label that the head
 * has not, InvalidFileError for bad files, FileSystemError when another process writes to `out`, DivergedError when training does not
 * recover from NaN.
 */
export async function finetune(config: FinetuneConfig): Promise<FinetuneResult> {
  checkConfig('finetune', config, ownKeys);
  checkStart(config);
  return withLock(config.out, async () => {
    const { from, model } = config;
    if (isSeq2SeqConfig(model ?? (await readJson(join(from!, 'config.json'))))) return finetuneTargets(config);
    if (config.targetTokenizer !== undefined)
      throw new InvalidArgumentError('[finetune] targetTokenizer is for encoder-decoder models');
    const tokenizerDir = from ?? config.tokenizer!;
    const tokenizer = await loadTokenizer(tokenizerDir);
    const start = await readClassifierConfig(
      'finetune',
      from === undefined ? { model: { vocab_size: tokenizer.vocabSize, ...model } } : { from },
    );
    const bad = new BadRows('finetune', config.badRows === 'skip');
    const examples = await readSplit(config, bad);
    const target = targetFor(config, start, examples.train);
    const seed = config.seed ?? 0;
    const classifier = await openClassifier(start, target, seed);
    const { spec } = classifier;
    if (spec.vocab < tokenizer.vocabSize) {
      throw new InvalidArgumentError(
        `[finetune] model.vocab_size must be at least the tokenizer's ${tokenizer.vocabSize}, got ${spec.vocab}`,
      );
    }
    const { data, evalData } = await encodeSplit(
      'finetune',
      config,
      examples,
      tokenizer,
      spec.maxPositions,
      target,
      bad,
    );
    const lr = from === undefined ? 5e-4 : 5e-5;
    const resolved = resolveConfig(config, data, { batchTokens: 4096, lr, weightDecay: 0.01 });
    const metric = metricOf('finetune', config.metric, target);

    using engine = new Engine(config.device);
    using trainable = new Trainable(planOf(encoderSlots(spec)));
    trainable.params.write(classifier.weights);
    const { batchTokens } = resolved;
    const recompute = config.gradCheckpointing ?? false;
    using step = classifierProgram(spec, trainable, engine, { batchTokens, train: true, recompute });
    using measure = classifierProgram(spec, trainable, engine, { batchTokens, train: false });
    const task: Task<Parameters<typeof textRun>[0]> = {
      api: 'finetune',
      engine,
      trainable,
      data,
      identity: {
        ...{ method: 'finetuning', model: JSON.parse(classifier.config), from: classifier.sha256 },
        ...{ evalData: evalData?.sha256() ?? null, metric, sequenceLength: data.sequenceLength },
      },
      lossRows: ({ examples }) => examples.length,
      async micro(batch, { total, signal }) {
        const { dims, feeds } = textRun(batch, spec);
        const { outputs } = await step.run({
          dims,
          feeds: { ...feeds, ...targetRun(data, batch, spec, 1 / total) },
          signal,
        });
        return { loss: outputs.loss[0] };
      },
      ...(evalData && {
        async evaluate(signal?: AbortSignal) {
          const told = await scoreExamples(measure, spec, evalData, { batchTokens, outputs: ['scores'], signal });
          const quality = qualityOf(spec, evalData, told.scores.scores);
          const { [metric]: first, ...others } = quality;
          return { levels: { 'held-out': { [metric]: first, ...others, loss: told.loss } }, metric: -first };
        },
      }),
    };
    const result = await train(task, resolved, config.out, config);
    if (result.stopped !== 'signal')
      await writeClassifier(config.out, classifier, trainable.params.readFloat(), tokenizerDir, config.saveAs);
    return {
      ...{ dir: config.out, step: result.step, stopped: result.stopped, metric },
      ...(result.best && { best: { step: result.best.step, metric: -result.best.metric } }),
      ...{ labels: spec.encoder.labels, examples: { train: data.count, heldOut: evalData?.count ?? 0 } },
      ...{ badRows: bad.count, truncated: data.truncated + (evalData?.truncated ?? 0) },
    };
  });
}

/** The same of an encoder-decoder model. */
async function finetuneTargets(config: FinetuneConfig): Promise<FinetuneResult> {
  for (const key of ['task', 'labels', 'metric'] as const) {
    if (config[key] !== undefined)
      throw new InvalidArgumentError(
        `[finetune] ${key} is for encoders: an encoder-decoder model learns the targets alone`,
      );
  }
  const { from, model, tokenizer, targetTokenizer } = config;
  const start = from === undefined ? { model: model!, tokenizer: tokenizer!, targetTokenizer } : { from };
  const bad = new BadRows('finetune', config.badRows === 'skip');
  const rows = await readPairs('finetune', config, bad);
  const result = await finetunePairs(config, start, rows, bad);
  return { ...result, metric: 'loss', labels: [], badRows: bad.count };
}

/** Reads the pairs to train on, and those held out. */
export const readPairs = (api: string, config: ExampleConfig & { seed?: number }, bad: BadRows): Promise<Split> =>
  readSplit(
    {
      ...config,
      data: pairSource(api, config.data),
      ...(config.evalData && { evalData: pairSource(api, config.evalData) }),
    },
    bad,
  );

function checkStart({ from, model, tokenizer, targetTokenizer, labels, task, saveAs, ...rest }: FinetuneConfig): void {
  const fail = (what: string): never => {
    throw new InvalidArgumentError(`[finetune] ${what}`);
  };
  if (from === undefined) {
    if (typeof model !== 'object' || model === null)
      fail("give 'from', the directory of a model, or model, the content of a config.json");
    if (typeof tokenizer !== 'string' || tokenizer === '') fail('tokenizer must be the path of a directory');
  } else {
    if (typeof from !== 'string' || from === '')
      fail(`from must be the path of a directory, got ${JSON.stringify(from)}`);
    if (model !== undefined || tokenizer !== undefined || targetTokenizer !== undefined)
      fail("model and tokenizers are those of 'from': leave them out");
  }
  if (!['classification', 'regression', undefined].includes(task))
    fail(`task must be 'classification' or 'regression', got ${JSON.stringify(task)}`);
  const named = (list: readonly unknown[]) =>
    list.length >= 2 &&
    list.every((label) => typeof label === 'string' && label !== '') &&
    new Set(list).size === list.length;
  if (labels !== undefined && !(Array.isArray(labels) && named(labels)))
    fail(`labels must be at least two different names, got ${JSON.stringify(labels)}`);
  if (labels !== undefined && task === 'regression') fail('labels are for classification');
  if (!['f32', 'bf16', undefined].includes(saveAs)) fail(`saveAs must be 'f32' or 'bf16', got ${String(saveAs)}`);
  checkExampleConfig('finetune', rest);
}

/** Checks what training on labelled texts shares; throws InvalidArgumentError. */
export function checkExampleConfig(api: string, { badRows, metric, evalData, heldOut }: ExampleConfig): void {
  const fail = (what: string): never => {
    throw new InvalidArgumentError(`[${api}] ${what}`);
  };
  const metrics: readonly unknown[] = [undefined, ...classMetrics, ...numberMetrics];
  if (!['stop', 'skip', undefined].includes(badRows))
    fail(`badRows must be 'stop' or 'skip', got ${JSON.stringify(badRows)}`);
  if (!metrics.includes(metric)) fail(`metric must be one of ${metrics.slice(1).join(', ')}, got ${String(metric)}`);
  if (evalData && heldOut !== undefined) fail('give evalData or heldOut, not both');
}

interface Split {
  readonly train: readonly Example[];
  readonly heldOut: readonly Example[] | null;
}

/** Reads the rows to train on, and those held out. */
export async function readSplit(config: ExampleConfig & { seed?: number }, bad: BadRows): Promise<Split> {
  const rows = await readExamples(config.data, bad);
  if (config.heldOut !== undefined) return splitRows(rows, config.heldOut, config.seed ?? 0);
  return { train: rows, heldOut: config.evalData ? await readExamples(config.evalData, bad) : null };
}

/** Tokenises them, at most `longest` tokens each; what was left out or cut is said once. */
export async function encodeSplit(
  api: string,
  config: Pick<TrainConfig, 'sequenceLength' | 'onEvent'>,
  { train: rows, heldOut }: Split,
  tokenizer: Tokenizer,
  longest: number,
  target: Target,
  bad: BadRows,
): Promise<{ data: ExampleData; evalData: ExampleData | null }> {
  const { sequenceLength = Math.min(128, longest) } = config;
  if (sequenceLength > longest) {
    throw new InvalidArgumentError(
      `[${api}] sequenceLength must be at most the model's ${longest} positions, got ${sequenceLength}`,
    );
  }
  const data = ExampleData.encode(rows, tokenizer, sequenceLength, target, bad);
  const evalData = heldOut && ExampleData.encode(heldOut, tokenizer, sequenceLength, target, bad);
  await bad.report(config.onEvent);
  const truncated = data.truncated + (evalData?.truncated ?? 0);
  if (truncated > 0) {
    const message = `${truncated} of ${data.count + (evalData?.count ?? 0)} texts are longer than ${sequenceLength} tokens and were cut`;
    await config.onEvent?.({ type: 'warn', code: 'truncated', message });
  }
  return { data, evalData };
}

function targetFor({ task, labels, from }: FinetuneConfig, start: ClassifierConfig, rows: readonly Example[]): Target {
  const known = start.target;
  if (known) {
    const kind = known.kind === 'classes' ? 'classification' : 'regression';
    if (task !== undefined && task !== kind)
      throw new InvalidArgumentError(
        `[finetune] task must be absent or '${kind}', which the head of ${from} is for, got '${task}'`,
      );
    if (labels) throw new InvalidArgumentError(`[finetune] labels are those of the head of ${from}: leave them out`);
    return known;
  }
  if (task === 'regression') return { kind: 'number' };
  const found = labels ?? labelsOf(rows);
  if (found.length < 2) {
    throw new InvalidArgumentError(
      `[finetune] the rows have one label alone, ${found[0]}: give labels, or rows of others`,
    );
  }
  return { kind: 'classes', labels: found };
}

/** The metric that decides which weights are kept. */
export function metricOf(api: string, metric: Metric | undefined, { kind }: Target): Metric {
  const fitting: readonly Metric[] = kind === 'classes' ? classMetrics : numberMetrics;
  if (metric === undefined || fitting.includes(metric)) return metric ?? fitting[0];
  throw new InvalidArgumentError(`[${api}] metric must be one of ${fitting.join(', ')} of this task, got ${metric}`);
}
