// Pairs of a source and a target as an encoder-decoder model learns them: tokenised, and packed into batches of both sides.
import { createHash } from 'node:crypto';
import type { Tokenizer } from '../../io/tokenizer.js';
import { InvalidArgumentError } from '../../native/errors.js';
import { type Cursor, type Sequences, TokenData, type TrainingData } from '../data.js';
import type { BadRows, Example, ExampleSource } from '../encoder/examples.js';

/** Sources packed end to end, and their targets, in the same order. */
export interface PairBatch {
  readonly source: Omit<Sequences, 'targets'>;
  /** Its ids are what the decoder reads: the start token, then the target but its last token, which `targets` has. */
  readonly target: Sequences;
  /** Token ids of both sides, i32 [rows of sources + rows of targets]: what a step counts as its tokens. */
  readonly ids: Int32Array;
}

/** Tokens of one pair; the target ends with the token that ends texts. */
export interface Pair {
  readonly source: readonly number[];
  readonly target: readonly number[];
}

/** How texts become tokens of both sides. */
export interface PairTokens {
  readonly source: Tokenizer;
  readonly target: Tokenizer;
  /** What a target starts from. */
  readonly startId: number;
  /** What ends a target that its tokenizer does not end. */
  readonly endIds: ReadonlySet<number>;
}

/** Tokenised pairs. */
export class PairData implements TrainingData<PairBatch> {
  readonly #tokens: TokenData;
  readonly #at: ReadonlyMap<number, number>;
  readonly #startId: number;

  private constructor(
    tokens: TokenData,
    at: ReadonlyMap<number, number>,
    readonly pairs: readonly Pair[],
    startId: number,
    /** Tokens of a side at most. */
    readonly sideLength: number,
    /** Pairs of which a side was cut. */
    readonly truncated: number,
  ) {
    this.#tokens = tokens;
    this.#at = at;
    this.#startId = startId;
  }

  /**
   * Tokenises pairs, each side at most `sideLength` tokens with special ones.
   *
   * @param examples texts with their targets as labels
   * @param bad takes pairs of which a side has no tokens
   * @throws InvalidDataError when no pair is left, InvalidArgumentError for a bad length.
   */
  static encode(examples: readonly Example[], tokens: PairTokens, sideLength: number, bad: BadRows): PairData {
    const pairs: Pair[] = [];
    const both: (readonly number[])[] = [];
    const at = new Map<number, number>();
    let [start, truncated, bytes] = [0, 0, 0];
    const [endId] = tokens.endIds;
    for (const { text, label, at: place } of examples) {
      const source = tokens.source.encodeInput(text, { maxTokens: sideLength });
      const target = tokens.target.encodeInput(label, { maxTokens: sideLength });
      const ids = [...target.ids];
      if (endId !== undefined && !tokens.endIds.has(ids.at(-1)!)) {
        if (ids.length === sideLength) ids.pop();
        ids.push(endId);
      }
      if (source.ids.length === 0 || ids.length === 0) {
        bad.refuse(place, source.ids.length === 0 ? 'has a source without tokens' : 'has a target without tokens');
        continue;
      }
      at.set(start, pairs.length);
      start += source.ids.length + ids.length;
      pairs.push({ source: source.ids, target: ids });
      both.push([...source.ids, ...ids]);
      if (source.truncated + target.truncated > 0) truncated++;
      bytes += Buffer.byteLength(text) + Buffer.byteLength(label);
    }
    return new PairData(
      TokenData.fromIds(both, 2 * sideLength, bytes),
      at,
      pairs,
      tokens.startId,
      sideLength,
      truncated,
    );
  }

  get sequenceLength(): number {
    return this.#tokens.sequenceLength;
  }
  get count(): number {
    return this.pairs.length;
  }

  sha256(): string {
    const sides = Int32Array.from(this.pairs, ({ source }) => source.length);
    return createHash('sha256').update(this.#tokens.sha256()).update(sides).update(`${this.#startId}`).digest('hex');
  }

  /** At most `rows` rows of both sides together. */
  next(cursor: Cursor, rows: number, seed: number | null): { batch: PairBatch; cursor: Cursor } {
    const { batch, cursor: after } = this.#tokens.next(cursor, rows, seed);
    const pairs = Array.from(batch.starts, (start) => this.pairs[this.#at.get(start)!]);
    return { batch: pairBatch(pairs, this.#startId), cursor: after };
  }

  batchesPerEpoch(epoch: number, rows: number, seed: number | null): number {
    return this.#tokens.batchesPerEpoch(epoch, rows, seed);
  }
}

/** Packs pairs, of which the decoder reads targets shifted behind the start token. */
export function pairBatch(pairs: readonly Pair[], startId: number): PairBatch {
  const source = packed(pairs.map((pair) => pair.source));
  const target = packed(pairs.map((pair) => [startId, ...pair.target.slice(0, -1)]));
  const ids = Int32Array.from(pairs.flatMap((pair) => [...pair.source, ...pair.target]));
  return { ids, source, target: { ...target, targets: Int32Array.from(pairs.flatMap((pair) => pair.target)) } };
}

function packed(sequences: readonly (readonly number[])[]): Omit<Sequences, 'targets'> {
  const offsets = new Int32Array(sequences.length + 1);
  for (const [s, ids] of sequences.entries()) offsets[s + 1] = offsets[s] + ids.length;
  return {
    ids: Int32Array.from(sequences.flat()),
    positions: Int32Array.from(sequences.flatMap((ids) => [...ids.keys()])),
    offsets,
  };
}

/** A source of rows whose columns or fields are `source` and `target` unless it names others. Errors: InvalidArgumentError. */
export function pairSource(api: string, source: ExampleSource): ExampleSource {
  if (source?.kind === 'examples') {
    if (Array.isArray(source.examples) && source.examples.some((example) => example?.pair !== undefined))
      throw new InvalidArgumentError(
        `[${api}] an encoder-decoder model reads one text: leave out pair, label is its target`,
      );
    return source;
  }
  if (source?.pairField !== undefined)
    throw new InvalidArgumentError(
      `[${api}] an encoder-decoder model reads one text: leave out pairField, labelField names its target`,
    );
  return { ...source, field: source.field ?? 'source', labelField: source.labelField ?? 'target' };
}
