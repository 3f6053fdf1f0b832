// A tiny model trained on the spot, and directories that go away with the test file.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll } from 'vitest';
import { type PretrainConfig, pretrain } from '../../lib/distill/pretrain.js';

/** A fresh directory, removed after the tests of the file. */
export function temporaryDirectory(): string {
  const path = mkdtempSync(join(tmpdir(), 'elastiform-'));
  afterAll(() => rmSync(path, { recursive: true, force: true }));
  return path;
}

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
