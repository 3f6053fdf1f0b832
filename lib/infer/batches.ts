// Documents to predict, cut into sequences and packed into batches.
import { InvalidArgumentError, InvalidDataError } from '../native/errors.js';
import type { Network } from './network.js';
import type { PackedBatch, PackedLimits } from './programs.js';

/** A text, or token ids with the size of the text they stand for when it is known. */
export type EvalDocument = string | { ids: readonly number[]; bytes?: number };

/** A stretch of a document: row i predicts targets[i]. */
export interface Sequence {
  readonly ids: readonly number[];
  readonly targets: readonly number[];
  readonly bytes: number;
}

export interface Batch extends PackedBatch {
  readonly sequences: readonly Sequence[];
  readonly targets: Int32Array;
}

/**
 * Cuts documents into sequences of at most `length` rows; every token but the first of a document is predicted exactly
 * once. Where the tokenizer begins texts with a BOS, every sequence begins with it and a document's first token counts.
 */
export function cut(
  api: string,
  network: Network,
  documents: readonly EvalDocument[],
  length: number,
  name: string,
): Sequence[] {
  const { tokenizer, spec } = network;
  const sequences: Sequence[] = [];
  if (!Array.isArray(documents))
    throw new InvalidArgumentError(`[${api}] ${name} must be a list of texts or token ids`);
  for (const document of documents) {
    let ids: readonly number[];
    let bytes = 0;
    if (typeof document === 'string') {
      if (!tokenizer)
        throw new InvalidArgumentError(`[${api}] texts need a tokenizer, and this model has no tokenizer.json`);
      ids = tokenizer.encode(document);
      bytes = Buffer.byteLength(document);
    } else {
      ids = document.ids;
      bytes = document.bytes ?? 0;
    }
    const bad = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= spec.vocab);
    if (bad !== undefined) {
      throw new InvalidDataError(
        `[${api}] ${name} has token id ${bad}; the model's vocabulary ends at ${spec.vocab - 1}`,
      );
    }
    const bos = tokenizer?.bosId ?? null;
    const begins = bos !== null && ids[0] === bos;
    const predicted = ids.length - 1;
    for (let at = 0; at < predicted; at += length) {
      const end = Math.min(at + length, predicted);
      const rows = ids.slice(at, end);
      // Later sequences of a document start over from BOS instead of the token before.
      const first = begins && at > 0 ? [bos, ...rows.slice(1)] : rows;
      sequences.push({ ids: first, targets: ids.slice(at + 1, end + 1), bytes: (bytes * (end - at)) / predicted });
    }
  }
  if (sequences.length === 0) throw new InvalidDataError(`[${api}] ${name} holds no text to predict`);
  return sequences;
}

export const count = (s: Sequence): number => s.targets.length;

/** The first sequences with at most `tokens` tokens; at least one. */
export function take(sequences: readonly Sequence[], tokens: number): Sequence[] {
  let total = 0;
  return sequences.filter((s, i) => {
    total += count(s);
    return i === 0 || total <= tokens;
  });
}

export function pack(sequences: readonly Sequence[], rows: number): Batch[] {
  const batches: Batch[] = [];
  for (let at = 0; at < sequences.length; ) {
    let end = at;
    for (let total = 0; end < sequences.length && (end === at || total + sequences[end].ids.length <= rows); end++) {
      total += sequences[end].ids.length;
    }
    const chosen = sequences.slice(at, end);
    const offsets = [0];
    for (const s of chosen) offsets.push(offsets.at(-1)! + s.ids.length);
    batches.push({
      sequences: chosen,
      ids: Int32Array.from(chosen.flatMap((s) => s.ids)),
      positions: Int32Array.from(chosen.flatMap((s) => s.ids.map((_, i) => i))),
      targets: Int32Array.from(chosen.flatMap((s) => s.targets)),
      offsets: Int32Array.from(offsets),
    });
    at = end;
  }
  return batches;
}

/** What holds each of some batches. */
export const limitsOf = (batches: readonly Batch[]): PackedLimits => ({
  rows: Math.max(...batches.map(({ ids }) => ids.length)),
  segments: Math.max(...batches.map(({ sequences }) => sequences.length)),
});

/** Feeds of a batch's own. */
export const base = ({ ids, positions, offsets }: Batch) => ({ ids, positions, offsets });

/** The same with what programs that score predict: no row weighs anything in the mean, which is not read. */
export const scoreFeeds = (batch: Batch) => ({
  ...base(batch),
  ...{ targets: batch.targets, weight: new Float32Array(batch.ids.length) },
});
