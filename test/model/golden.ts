// Golden vectors and their models, as test/golden/README.md describes them.
import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { openSafetensors } from '../../lib/io/safetensors.js';
import { type ModelSpec, specFromConfig } from '../../lib/model/spec.js';
import type { TypedArray } from '../../lib/native/addon.js';

export const goldenDirectory = join(dirname(fileURLToPath(import.meta.url)), '..', 'golden');

/** Directories that hold a file. */
export const goldenNames = (file: string): string[] =>
  readdirSync(goldenDirectory, { withFileTypes: true })
    .filter((entry) => entry.isDirectory() && readdirSync(join(goldenDirectory, entry.name)).includes(file))
    .map((entry) => entry.name);

/** A directory of an encoder. */
export const encoderDirectory = (name: string): string => join(goldenDirectory, 'encoders', name);

/** What the tokenizers library makes of texts and pairs for an encoder. */
export const readCases = (name: string): { texts: string[]; ids: number[]; types: number[]; truncated: number }[] =>
  JSON.parse(readFileSync(join(encoderDirectory(name), 'cases.json'), 'utf8'));

/** Encoder-decoder models, and the directory of one. */
export const seq2seqNames: readonly string[] = readdirSync(join(goldenDirectory, 'seq2seq'));
export const seq2seqDirectory = (name: string): string => join(goldenDirectory, 'seq2seq', name);

/** Sources and targets, and what `generate` of transformers writes for them. */
export interface Seq2SeqCases {
  sources: number[][];
  targets: number[][];
  special: Record<string, number | null>;
  generations: { source: number; settings: Record<string, unknown>; ids: number[]; score: number | null }[];
}
export const readSeq2SeqCases = (name: string): Seq2SeqCases =>
  JSON.parse(readFileSync(join(seq2seqDirectory(name), 'cases.json'), 'utf8'));

export const readSpec = (directory: string): ModelSpec => {
  const path = join(directory, 'config.json');
  return specFromConfig(JSON.parse(readFileSync(path, 'utf8')), path);
};

/** All tensors of a safetensors file. */
export function readVectors(path: string): Record<string, TypedArray> {
  using file = openSafetensors(path);
  return Object.fromEntries(file.names().map((name) => [name, file.tensor(name).read()]));
}

export function positionsOf(offsets: ArrayLike<number>): Int32Array {
  const positions = new Int32Array(offsets[offsets.length - 1]);
  for (let s = 0; s + 1 < offsets.length; s++) {
    for (let row = offsets[s]; row < offsets[s + 1]; row++) positions[row] = row - offsets[s];
  }
  return positions;
}

export function largestDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return Number.POSITIVE_INFINITY;
  let largest = 0;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs(a[i] - b[i]);
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}
