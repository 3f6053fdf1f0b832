// Checkpoints that were written, compared with what they were made from: by the logits of one sequence of ids.
import { type CallOptions, type ElasticModel, loadModel } from '../model.js';
import type { LoadOptions } from '../types.js';

/** Ids that models are compared on. */
export const probeIds = (tokens: number, vocab: number): number[] =>
  Array.from({ length: tokens }, (_, i) => (i * 7919 + 1) % vocab);

/** Logits of the same ids by any model with that vocabulary, on the CPU. */
export async function probeLogits(
  dir: string,
  { budget, signal, ...options }: LoadOptions & CallOptions,
): Promise<Float32Array> {
  await using model = await loadModel(dir, { ...options, device: 'cpu', signal });
  return await logitsOf(model, { budget, signal });
}

/** The same of a model that is loaded. */
export async function logitsOf(model: ElasticModel, { budget, signal }: CallOptions): Promise<Float32Array> {
  const { vocab, maxContext } = model.info;
  return await model.logits(probeIds(Math.min(32, maxContext), vocab), {
    ...(budget !== undefined && { budget }),
    signal,
  });
}

export const largestDifference = (a: Float32Array, b: Float32Array): number =>
  a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i])), 0);
