// Documents into training batches: reading, tokenising, splitting, packing end to end, shuffling with a resumable cursor.
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { fileLines } from '../io/lines.js';
import type { Tokenizer } from '../io/tokenizer.js';
import { InvalidArgumentError, InvalidDataError, InvalidFileError } from '../native/errors.js';
import { Random } from './random.js';

/** Documents to train on: text files, one document each; lines of JSON with a text in `field` (default `text`); or strings. */
export type DataSource =
  | { kind: 'text'; files: string | readonly string[] }
  | { kind: 'jsonl'; files: string | readonly string[]; field?: string }
  | { kind: 'documents'; documents: readonly string[] };

/**
 * Reads every document of a source; empty ones are left out.
 * Errors: InvalidFileError for a file that cannot be read or a line that is not JSON with the field, InvalidDataError
 * when nothing is left, InvalidArgumentError for an unknown kind or key.
 */
export async function readDocuments(source: DataSource): Promise<string[]> {
  const documents: string[] = [];
  checkSource(source);
  if (source.kind === 'documents') {
    documents.push(...source.documents);
  } else {
    const files = typeof source.files === 'string' ? [source.files] : source.files;
    for (const file of files) {
      if (source.kind === 'text') documents.push(await readText(file));
      else for await (const text of jsonLines(file, source.field ?? 'text')) documents.push(text);
    }
  }
  const kept = documents.filter((text) => text.length > 0);
  if (kept.length === 0) {
    const where = source.kind === 'documents' ? 'the list of documents' : [source.files].flat().join(', ');
    throw new InvalidDataError(`[data] the data set is empty: ${where || 'no files'} holds no text`);
  }
  return kept;
}

function checkSource(source: DataSource): void {
  const keys = { text: ['files'], jsonl: ['files', 'field'], documents: ['documents'] }[source?.kind];
  if (!keys) {
    throw new InvalidArgumentError(
      `[data] kind must be 'text', 'jsonl' or 'documents', got ${JSON.stringify(source?.kind)}`,
    );
  }
  for (const key of Object.keys(source)) {
    if (key !== 'kind' && !keys.includes(key)) {
      throw new InvalidArgumentError(
        `[data] unknown key '${key}' for kind '${source.kind}'; it takes ${keys.join(', ')}`,
      );
    }
  }
  const list = source.kind === 'documents' ? source.documents : [source.files].flat();
  if (!Array.isArray(list) || list.some((entry) => typeof entry !== 'string')) {
    throw new InvalidArgumentError(`[data] ${source.kind === 'documents' ? 'documents' : 'files'} must be strings`);
  }
}

async function readText(file: string): Promise<string> {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(await readFile(file));
  } catch (cause) {
    throw new InvalidFileError(`[data] cannot read ${file} as UTF-8 text: ${(cause as Error).message}`, { cause });
  }
}

async function* jsonLines(file: string, field: string): AsyncGenerator<string> {
  for await (const { number, text: line } of fileLines(file)) {
    if (line.trim() === '') continue;
    let text: unknown;
    try {
      text = (JSON.parse(line) as Record<string, unknown> | null)?.[field];
    } catch (cause) {
      throw new InvalidFileError(`[data] ${file}:${number} is not JSON: ${(cause as Error).message}`, { cause });
    }
    if (typeof text !== 'string') {
      throw new InvalidFileError(`[data] ${file}:${number} has no text in field '${field}'`);
    }
    yield text;
  }
}

/**
 * Sets a share of the documents aside, chosen by seed; both parts keep their order and neither is empty. A single
 * document is cut at a line break, its end being held out.
 */
export function splitHeldOut(
  documents: readonly string[],
  share: number,
  seed: number,
): { train: string[]; heldOut: string[] } {
  if (!(share > 0 && share < 1))
    throw new InvalidArgumentError(`[data] held-out share must be in (0, 1), got ${share}`);
  if (documents.length === 1) {
    const text = documents[0];
    const middle = Math.round(text.length * (1 - share));
    const cut = text.lastIndexOf('\n', middle) + 1 || middle;
    if (cut === 0 || cut === text.length) throw new InvalidDataError('[data] one short document cannot be split');
    return { train: [text.slice(0, cut)], heldOut: [text.slice(cut)] };
  }
  return splitRows(documents, share, seed);
}

/** The same of at least two rows of any kind. */
export function splitRows<T>(rows: readonly T[], share: number, seed: number): { train: T[]; heldOut: T[] } {
  if (!(share > 0 && share < 1))
    throw new InvalidArgumentError(`[data] held-out share must be in (0, 1), got ${share}`);
  if (rows.length < 2) throw new InvalidDataError('[data] one row cannot be split: give more, or evalData');
  const count = Math.min(Math.max(Math.round(rows.length * share), 1), rows.length - 1);
  const held = new Set(new Random(seed, 'held-out').permutation(rows.length).subarray(0, count));
  return { train: rows.filter((_, i) => !held.has(i)), heldOut: rows.filter((_, i) => held.has(i)) };
}

/** Sequences packed end to end, ready to feed. */
export interface Sequences {
  /** Token ids, i32 [rows]. */
  ids: Int32Array;
  /** Position in the segment, i32 [rows]. */
  positions: Int32Array;
  /** Next token, -1 where there is none, i32 [rows]. */
  targets: Int32Array;
  /** Segment starts and the end, i32 [segments + 1]. */
  offsets: Int32Array;
}

/** Sequences of a data set. */
export interface Batch extends Sequences {
  /** Where each segment starts among all tokens of the data, i32 [segments]. */
  starts: Int32Array;
}

/** Where the next batch starts. */
export interface Cursor {
  epoch: number;
  /** Segments of the epoch already used. */
  segment: number;
}

/** What the training loop draws batches from. */
export interface TrainingData<B> {
  /** Rows that a batch must be able to hold. */
  readonly sequenceLength: number;
  /** Identifies the data for a resumed run. */
  sha256(): string;
  /** The next batch of at most `rows` rows, in the epoch's shuffled order; a null seed keeps the order of the data. */
  next(cursor: Cursor, rows: number, seed: number | null): { batch: B; cursor: Cursor };
  batchesPerEpoch(epoch: number, rows: number, seed: number | null): number;
}

/** Tokenised documents, cut into segments of at most `sequenceLength` tokens. */
export class TokenData implements TrainingData<Batch> {
  private order: { epoch: number; seed: number; order: Uint32Array } | null = null;

  private constructor(
    /** All documents end to end. */
    private readonly tokens: Int32Array,
    /** Start of every document, and the end. */
    private readonly documents: Int32Array,
    /** Start of every segment, and the end; a segment never spans documents. */
    private readonly segments: Int32Array,
    /** UTF-8 bytes of the text. */
    readonly bytes: number,
    readonly sequenceLength: number,
  ) {}

  get tokenCount(): number {
    return this.tokens.length;
  }
  get segmentCount(): number {
    return this.segments.length - 1;
  }

  /** Identifies the data for a resumed run: SHA-256 of the tokens and the segment length. */
  sha256(): string {
    return createHash('sha256')
      .update(this.tokens)
      .update(this.documents)
      .update(`${this.sequenceLength}`)
      .digest('hex');
  }

  /**
   * Tokenises documents: special tokens as the tokenizer puts them, then its end token where it has one.
   * Errors: InvalidArgumentError for a bad sequence length, InvalidDataError when no token comes out.
   */
  static tokenise(documents: readonly string[], tokenizer: Tokenizer, sequenceLength: number): TokenData {
    const encoded = documents.map((text) => {
      const ids = tokenizer.encode(text, { addSpecialTokens: true });
      const { eosId } = tokenizer;
      if (eosId !== null && eosId !== undefined && ids.at(-1) !== eosId) ids.push(eosId);
      return ids;
    });
    return TokenData.fromIds(
      encoded,
      sequenceLength,
      documents.reduce((sum, text) => sum + Buffer.byteLength(text), 0),
    );
  }

  /** The same from token ids; `bytes` is the size of the text they stand for. */
  static fromIds(documents: readonly (readonly number[])[], sequenceLength: number, bytes: number): TokenData {
    if (!Number.isInteger(sequenceLength) || sequenceLength < 2) {
      throw new InvalidArgumentError(`[data] sequenceLength must be an integer of at least 2, got ${sequenceLength}`);
    }
    const total = documents.reduce((sum, ids) => sum + ids.length, 0);
    if (total === 0) throw new InvalidDataError('[data] the data set is empty: no document has a token');
    const tokens = new Int32Array(total);
    const starts = [0];
    const segments = [0];
    let at = 0;
    for (const ids of documents) {
      if (ids.length === 0) continue;
      tokens.set(ids, at);
      for (let start = sequenceLength; start < ids.length; start += sequenceLength) segments.push(at + start);
      at += ids.length;
      starts.push(at);
      segments.push(at);
    }
    return new TokenData(tokens, Int32Array.from(starts), Int32Array.from(segments), bytes, sequenceLength);
  }

  /**
   * The next batch of at most `rows` rows: whole segments in the epoch's shuffled order, as many as fit. An epoch ends
   * with whatever is left, and the next batch starts the following one. A null seed keeps the order of the documents.
   */
  next(cursor: Cursor, rows: number, seed: number | null): { batch: Batch; cursor: Cursor } {
    if (rows < this.sequenceLength) {
      throw new InvalidArgumentError(
        `[data] a batch of ${rows} rows cannot hold a sequence of ${this.sequenceLength} tokens; raise batchTokens or lower sequenceLength`,
      );
    }
    const chosen: number[] = [];
    let count = 0;
    let at = cursor.segment;
    for (; at < this.segmentCount; at++) {
      const segment = this.segmentAt(cursor.epoch, at, seed);
      const length = this.segments[segment + 1] - this.segments[segment];
      if (count + length > rows) break;
      chosen.push(segment);
      count += length;
    }
    const batch = this.pack(chosen, count);
    const finished = at >= this.segmentCount;
    return { batch, cursor: finished ? { epoch: cursor.epoch + 1, segment: 0 } : { epoch: cursor.epoch, segment: at } };
  }

  /** Batches in one epoch. */
  batchesPerEpoch(epoch: number, rows: number, seed: number | null): number {
    let batches = 0;
    for (let cursor: Cursor = { epoch, segment: 0 }; cursor.epoch === epoch; batches++) {
      cursor = this.next(cursor, rows, seed).cursor;
    }
    return batches;
  }

  private segmentAt(epoch: number, index: number, seed: number | null): number {
    if (seed === null) return index;
    if (this.order?.epoch !== epoch || this.order.seed !== seed) {
      this.order = { epoch, seed, order: new Random(seed, 'shuffle', epoch).permutation(this.segmentCount) };
    }
    return this.order.order[index];
  }

  private pack(segments: readonly number[], rows: number): Batch {
    const batch: Batch = {
      ids: new Int32Array(rows),
      positions: new Int32Array(rows),
      targets: new Int32Array(rows),
      offsets: new Int32Array(segments.length + 1),
      starts: Int32Array.from(segments, (segment) => this.segments[segment]),
    };
    let at = 0;
    segments.forEach((segment, s) => {
      const start = this.segments[segment];
      const end = this.segments[segment + 1];
      batch.ids.set(this.tokens.subarray(start, end), at);
      for (let i = start; i < end; i++, at++) {
        batch.positions[at] = i - start;
        batch.targets[at] = i + 1 < this.tokens.length ? this.tokens[i + 1] : -1;
      }
      // The token after a document's last one belongs to another document.
      if (this.endsDocument(end)) batch.targets[at - 1] = -1;
      batch.offsets[s + 1] = at;
    });
    return batch;
  }

  private endsDocument(end: number): boolean {
    let low = 0;
    let high = this.documents.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.documents[middle] < end) low = middle + 1;
      else high = middle;
    }
    return this.documents[low] === end;
  }
}
