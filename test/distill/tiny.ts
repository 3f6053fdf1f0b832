// A tiny model trained on the spot.
import { expect } from 'vitest';
import type { DistillConfig } from '../../lib/distill/distill.js';
import { type PretrainConfig, pretrain } from '../../lib/distill/pretrain.js';
import type { Budget } from '../../lib/elastic/budget.js';
import type { ElasticModel } from '../../lib/infer/model.js';
import type { ComputeReport } from '../../lib/infer/types.js';

export { temporaryDirectory } from '../temporary.js';

const animals = ['cat', 'dog', 'fox', 'owl', 'hen', 'pig'];
const verbs = ['saw', 'met', 'fed', 'hid', 'led'];
const places = ['barn', 'wood', 'lake', 'hill'];

/** Sentences with enough pattern to be learnt in a few steps; the same every time. */
export function stories(count: number): string[] {
  return Array.from({ length: count }, (_, i) => {
    const pick = (list: readonly string[], salt: number) => list[(i * 7 + salt * 5 + Math.floor(i / 3)) % list.length];
    const sentence = (s: number) =>
      `The ${pick(animals, s)} ${pick(verbs, s + 1)} the ${pick(animals, s + 2)} by the ${pick(places, s)}.`;
    return Array.from({ length: 1 + (i % 4) }, (_, s) => sentence(s)).join(' ');
  });
}

export const tinyConfig = {
  model_type: 'llama',
  hidden_size: 32,
  intermediate_size: 64,
  num_hidden_layers: 3,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  max_position_embeddings: 64,
  tie_word_embeddings: true,
};

/** A config for a model that pretrains in about a second. */
export const tinyPretraining = (out: string, more: Partial<PretrainConfig> = {}): PretrainConfig => ({
  model: tinyConfig,
  tokenizer: { vocabSize: 300 },
  out,
  data: { kind: 'documents', documents: stories(200) },
  device: 'cpu',
  steps: 60,
  batchTokens: 256,
  sequenceLength: 48,
  optimizer: { lr: 1e-2 },
  seed: 1,
  ...more,
});

/** Pretrains a tiny model into `out`. */
export async function tinyModel(out: string): Promise<string> {
  await pretrain(tinyPretraining(out));
  return out;
}

/** A config that trains a plan of the tiny model in about a second. */
export const tinyDistilling = (plan: string, out: string, more: Partial<DistillConfig> = {}): DistillConfig => ({
  plan,
  out,
  data: { kind: 'documents', documents: stories(120) },
  device: 'cpu',
  steps: 30,
  batchTokens: 128,
  sequenceLength: 32,
  optimizer: { lr: 1e-2 },
  calibrationTokens: 512,
  seed: 3,
  ...more,
});

const lastChoice = (logits: Float32Array, vocab: number): number => {
  const row = logits.subarray(logits.length - vocab);
  return row.indexOf(row.reduce((a, b) => Math.max(a, b)));
};

/** Generates greedy text at a budget, each token of which the full forward pass must choose, too. */
export async function checkGreedy(model: ElasticModel, ids: readonly number[], budget: Budget): Promise<ComputeReport> {
  const stream = model.generate(ids, { maxTokens: 5, budget });
  const made = await stream.ids;
  for (let i = 0; i < made.length; i++) {
    const logits = await model.logits([...ids, ...made.slice(0, i)], { budget });
    expect(made[i]).toBe(lastChoice(logits, model.info.vocab));
  }
  return (await stream.usage).compute;
}
