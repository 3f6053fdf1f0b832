// Fine-tuning of encoder-decoder models on pairs of a source and its target, by cross-entropy of the target's tokens.

import type { Program } from '../../graph/index.js';
import { loadModel } from '../../infer/model.js';
import type { GenerateOptions } from '../../infer/types.js';
import { seq2seqSlots } from '../../model/seq2seq_weights.js';
import { planOf } from '../../model/weights.js';
import { InvalidArgumentError } from '../../native/errors.js';
import { Engine } from '../../native/index.js';
import { wholeEpoch } from '../batches.js';
import type { BadRows, Example } from '../encoder/examples.js';
import type { TrainConfig, TrainResult } from '../events.js';
import { Trainable } from '../trainable.js';
import { type ResolvedConfig, resolveConfig, type Task, train } from '../trainer.js';
import {
  BiasedHead,
  openSeq2Seq,
  pairProgram,
  pairRun,
  type Seq2SeqStart,
  type TrainedSeq2Seq,
  trainedPlan,
  writeSeq2Seq,
} from './model.js';
import { type PairBatch, PairData } from './pairs.js';

/** Held-out pairs that texts are written for at the end, at most: the first ones. */
const mostWritten = 1000;

/** How a training on pairs ended. */
export interface PairResult extends TrainResult {
  /** Pairs trained on, and held out. */
  examples: { train: number; heldOut: number };
  /** Pairs of which a side was longer than `sequenceLength`, and was cut. */
  truncated: number;
  /** Share of the held-out pairs, the first 1000 of them, whose target the model writes greedily, token for token. */
  exactMatch?: number;
}

/** Rows of both parts. */
export interface PairRows {
  readonly train: readonly Example[];
  readonly heldOut: readonly Example[] | null;
}

/** Trains all weights of a model but tables of distances, and writes its directory; `bad` takes rows that have no tokens. */
export async function finetunePairs(
  config: TrainConfig & { out: string; saveAs?: 'f32' | 'bf16' },
  start: Seq2SeqStart,
  rows: PairRows,
  bad: BadRows,
): Promise<PairResult> {
  const model = await openSeq2Seq('finetune', start, config.seed ?? 0);
  const { data, evalData } = await encodePairs('finetune', config, rows, model, bad);
  const lr = 'from' in start ? 5e-5 : 5e-4;
  const resolved = resolveConfig(config, data, { batchTokens: 4096, lr, weightDecay: 0.01 });

  using engine = new Engine(config.device);
  const plan = trainedPlan(model);
  using trainable = new Trainable(plan);
  const whole = planOf(seq2seqSlots(model.spec, model.ownHead)).parameters;
  const offsets = new Map(whole.map(({ name, offset }) => [name, offset]));
  const initial = new Float32Array(plan.size);
  for (const { name, offset, size } of plan.parameters) {
    const at = offsets.get(name)!;
    initial.set(model.weights.subarray(at, at + size), offset);
  }
  trainable.params.write(initial);
  const { batchTokens } = resolved;
  const recompute = config.gradCheckpointing ?? false;
  using biased = model.headBias && new BiasedHead(model.headBias, model.spec.decoder.hidden);
  using step = pairProgram(model, trainable, engine, { batchTokens, train: true, recompute, biased });
  using measure = pairProgram(model, trainable, engine, { batchTokens, train: false, biased });
  const task: Task<PairBatch> = {
    api: 'finetune',
    engine,
    trainable,
    data,
    identity: {
      ...{ method: 'finetuning', model: JSON.parse(model.config), from: model.sha256 },
      ...{ evalData: evalData?.sha256() ?? null, sequenceLength: data.sequenceLength },
    },
    lossRows,
    async micro(batch, { total, signal }) {
      const { outputs } = await step.run({ ...pairRun(batch, 1 / total), signal });
      return { loss: outputs.loss[0], accuracy: outputs.accuracy[0] };
    },
    ...(evalData && {
      async evaluate(signal?: AbortSignal) {
        const level = await pairQuality(measure, evalData, resolved, signal);
        return { levels: { 'held-out': level }, metric: level.loss };
      },
    }),
  };
  const result = await train(task, resolved, config.out, config);
  if (result.stopped !== 'signal') {
    const trained = trainable.params.readFloat();
    const weights = model.weights.slice();
    for (const { name, offset, size } of plan.parameters)
      weights.set(trained.subarray(offset, offset + size), offsets.get(name)!);
    await writeSeq2Seq(config.out, model, weights, start, config.saveAs);
  }
  const written = evalData && result.stopped !== 'signal' ? await exactMatch(config.out, evalData, config) : null;
  return {
    ...{ dir: config.out, step: result.step, stopped: result.stopped },
    ...(result.best && { best: result.best }),
    ...{ examples: { train: data.count, heldOut: evalData?.count ?? 0 } },
    truncated: data.truncated + (evalData?.truncated ?? 0),
    ...(written !== null && { exactMatch: written }),
  };
}

/** Tokens of targets, which carry the loss. */
export const lossRows = ({ target }: PairBatch): number => target.targets.length;

/** Tokenises both parts; what was left out or cut is said once. */
export async function encodePairs(
  api: string,
  config: Pick<TrainConfig, 'sequenceLength' | 'onEvent'>,
  rows: PairRows,
  { spec, tokens }: Pick<TrainedSeq2Seq, 'spec' | 'tokens'>,
  bad: BadRows,
): Promise<{ data: PairData; evalData: PairData | null }> {
  const { sequenceLength = Math.min(128, spec.context) } = config;
  if (sequenceLength > spec.context) {
    throw new InvalidArgumentError(
      `[${api}] sequenceLength must be at most the model's ${spec.context} tokens of a side, got ${sequenceLength}`,
    );
  }
  const data = PairData.encode(rows.train, tokens, sequenceLength, bad);
  const evalData = rows.heldOut && PairData.encode(rows.heldOut, tokens, sequenceLength, bad);
  await bad.report(config.onEvent);
  const truncated = data.truncated + (evalData?.truncated ?? 0);
  if (truncated > 0) {
    const message = `${truncated} of ${data.count + (evalData?.count ?? 0)} pairs have a side longer than ${sequenceLength} tokens, which was cut`;
    await config.onEvent?.({ type: 'warn', code: 'truncated', message });
  }
  return { data, evalData };
}

/** Cross-entropy of a target's token, nats, and the share of tokens that are the likeliest, each after the right ones before it. */
export async function pairQuality(
  program: Program,
  data: PairData,
  { batchTokens }: Pick<ResolvedConfig, 'batchTokens'>,
  signal?: AbortSignal,
): Promise<{ loss: number; accuracy: number }> {
  let [loss, correct, tokens] = [0, 0, 0];
  for (const batch of wholeEpoch(data, batchTokens)) {
    const { outputs } = await program.run({ ...pairRun(batch, 1), signal });
    loss += outputs.loss[0];
    correct += outputs.accuracy[0];
    tokens += lossRows(batch);
  }
  return { loss: loss / tokens, accuracy: correct / tokens };
}

/** Share of pairs, of the first ones, whose target the model of a directory writes greedily, its end included; null when it was aborted. */
export async function exactMatch(
  dir: string,
  { pairs, sideLength }: PairData,
  { device, signal }: Pick<TrainConfig, 'device' | 'signal'>,
  options: Pick<GenerateOptions, 'budget'> = {},
): Promise<number | null> {
  await using model = await loadModel(dir, { device, maxContext: sideLength + 1 });
  const some = pairs.slice(0, mostWritten);
  const right = await Promise.all(
    some.map(async ({ source, target }) => {
      const written: number[] = [];
      const stream = model.generate(source, { beams: 1, maxTokens: sideLength, signal, ...options });
      for await (const { token } of stream) written.push(token);
      return written.join() === target.join();
    }),
  );
  if (signal?.aborted) return null;
  return right.filter(Boolean).length / some.length;
}
