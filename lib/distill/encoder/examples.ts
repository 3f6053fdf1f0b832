// Labelled texts: rows of GLUE-style TSV and of JSONL, what their labels are, and batches of them.
import { createHash } from 'node:crypto';
import { fileLines } from '../../io/lines.js';
import type { Tokenizer } from '../../io/tokenizer.js';
import { InvalidArgumentError, InvalidDataError, InvalidFileError } from '../../native/errors.js';
import { type Cursor, type Sequences, TokenData, type TrainingData } from '../data.js';
import type { TrainConfig } from '../events.js';
import { checkKeys } from '../trainer.js';

/** Where the parts of a row are. */
export interface ExampleFields {
  /** Column or field of the text; default `sentence` in TSV, `text` in JSONL. */
  field?: string;
  /** Of the second text of pairs; default: there is none. */
  pairField?: string;
  /** Of the label; default `label`. */
  labelField?: string;
}

/**
 * Texts or pairs of texts with labels. TSV is as in GLUE: UTF-8, tabs between columns, no quoting, names of columns in the first line,
 * or in `columns` for files that have none (CoLA). JSONL has one object a line, its label a text or a number.
 */
export type ExampleSource =
  | ({ kind: 'tsv'; files: string | readonly string[]; columns?: readonly string[] } & ExampleFields)
  | ({ kind: 'jsonl'; files: string | readonly string[] } & ExampleFields)
  | { kind: 'examples'; examples: readonly { text: string; pair?: string; label: string | number }[] };

/** A row as it was read. */
export interface Example {
  readonly text: string;
  readonly pair: string | undefined;
  readonly label: string;
  /** `train.tsv:12` */
  readonly at: string;
}

/** Rows that are left out, or the first of them as an error. */
export class BadRows {
  count = 0;
  /** The first ones: place and reason. */
  readonly named: string[] = [];

  constructor(
    private readonly api: string,
    private readonly skip: boolean,
  ) {}

  /** @throws InvalidDataError unless bad rows are left out. */
  refuse(at: string, reason: string): void {
    if (!this.skip) throw new InvalidDataError(`[${this.api}] ${at} ${reason}; badRows: 'skip' leaves such rows out`);
    this.count++;
    if (this.named.length < 20) this.named.push(`${at} ${reason}`);
  }

  /** Says once what was left out, if anything. */
  async report(onEvent: TrainConfig['onEvent']): Promise<void> {
    if (this.count === 0) return;
    const more = this.count > this.named.length ? ', ...' : '';
    const message = `${this.count} bad rows left out: ${this.named.join(', ')}${more}`;
    await onEvent?.({ type: 'warn', code: 'bad-rows', message });
  }
}

/**
 * Reads the rows of a source.
 *
 * @param bad takes rows with too few or too many columns, that are not JSON, without a text or a label, or with an empty one
 * @throws InvalidFileError for a file that cannot be read or whose columns are not there, InvalidDataError when no row is left or a row
 *   is bad and not left out, InvalidArgumentError for an unknown kind or key.
 */
export async function readExamples(source: ExampleSource, bad: BadRows): Promise<Example[]> {
  checkSource(source);
  const examples: Example[] = [];
  const push = (at: string, row: { text: unknown; pair: unknown; label: unknown; paired: boolean }) => {
    const { text, pair, label, paired } = row;
    const isLabel = (typeof label === 'string' && label.trim() !== '') || typeof label === 'number';
    if (typeof text !== 'string') bad.refuse(at, 'has no text');
    else if (text.trim() === '') bad.refuse(at, 'has an empty text');
    else if (paired && (typeof pair !== 'string' || pair.trim() === '')) bad.refuse(at, 'has no second text');
    else if (!isLabel) bad.refuse(at, 'has no label');
    else examples.push({ text, pair: paired ? (pair as string) : undefined, label: String(label).trim(), at });
  };
  if (source.kind === 'examples') {
    for (const [i, { text, pair, label }] of source.examples.entries())
      push(`example ${i}`, { text, pair, label, paired: pair !== undefined });
  } else {
    const { pairField, labelField = 'label' } = source;
    const field = source.field ?? (source.kind === 'tsv' ? 'sentence' : 'text');
    const names = { text: field, pair: pairField, label: labelField };
    for (const file of [source.files].flat()) {
      const rows = source.kind === 'tsv' ? tsvRows(file, source.columns, names, bad) : jsonRows(file, names, bad);
      for await (const { at, ...row } of rows) push(at, { ...row, paired: pairField !== undefined });
    }
  }
  if (examples.length === 0) {
    const where = source.kind === 'examples' ? 'the list of examples' : [source.files].flat().join(', ');
    throw new InvalidDataError(`[data] the data set is empty: ${where || 'no files'} has no usable row`);
  }
  return examples;
}

function checkSource(source: ExampleSource): void {
  const fields = ['field', 'pairField', 'labelField'];
  const keys = { tsv: ['files', 'columns', ...fields], jsonl: ['files', ...fields], examples: ['examples'] };
  const kind = source?.kind;
  if (!Object.hasOwn(keys, kind ?? '')) {
    throw new InvalidArgumentError(`[data] kind must be 'tsv', 'jsonl' or 'examples', got ${JSON.stringify(kind)}`);
  }
  checkKeys('data', `key for kind '${kind}'`, source, ['kind', ...keys[kind]]);
  if (source.kind === 'examples') {
    if (!Array.isArray(source.examples)) throw new InvalidArgumentError('[data] examples must be a list');
    return;
  }
  const lists = { files: [source.files].flat(), columns: (source.kind === 'tsv' && source.columns) || [] };
  for (const [name, list] of Object.entries(lists)) {
    if (!Array.isArray(list) || list.some((entry) => typeof entry !== 'string'))
      throw new InvalidArgumentError(`[data] ${name} must be strings`);
  }
  for (const name of fields as (keyof ExampleFields)[]) {
    if (source[name] !== undefined && typeof source[name] !== 'string')
      throw new InvalidArgumentError(`[data] ${name} must be a string, got ${JSON.stringify(source[name])}`);
  }
}

interface FileRow {
  readonly at: string;
  readonly text: unknown;
  readonly pair: unknown;
  readonly label: unknown;
}
type Names = Readonly<Record<'text' | 'label', string>> & { readonly pair: string | undefined };

async function* tsvRows(
  file: string,
  given: readonly string[] | undefined,
  names: Names,
  bad: BadRows,
): AsyncGenerator<FileRow> {
  let columns = given;
  let place: Record<keyof Names, number> | null = null;
  for await (const { number, text: line } of fileLines(file)) {
    const values = line.split('\t');
    const header = columns === undefined;
    columns ??= values.map((name) => name.trim());
    place ??= placesOf(file, columns, names);
    if (header || line === '') continue;
    const at = `${file}:${number}`;
    if (values.length !== columns.length) bad.refuse(at, `has ${values.length} columns, not ${columns.length}`);
    else yield { at, text: values[place.text], pair: values[place.pair], label: values[place.label] };
  }
}

function placesOf(file: string, columns: readonly string[], names: Names): Record<keyof Names, number> {
  const of = (name: string | undefined): number => {
    const place = name === undefined ? -1 : columns.indexOf(name);
    if (name === undefined || place >= 0) return place;
    throw new InvalidFileError(
      `[data] ${file} has no column '${name}'; it has ${columns.join(', ')}. field, pairField and labelField name columns, columns those of a file without a first line for them`,
    );
  };
  return { text: of(names.text), pair: of(names.pair), label: of(names.label) };
}

async function* jsonRows(file: string, names: Names, bad: BadRows): AsyncGenerator<FileRow> {
  for await (const { number, text: line } of fileLines(file)) {
    if (line.trim() === '') continue;
    const at = `${file}:${number}`;
    let row: unknown;
    try {
      row = JSON.parse(line);
    } catch {
      bad.refuse(at, 'is not JSON');
      continue;
    }
    const own = (name: string | undefined): unknown =>
      name !== undefined && typeof row === 'object' && row !== null && Object.hasOwn(row, name)
        ? (row as Record<string, unknown>)[name]
        : undefined;
    yield { at, text: own(names.text), pair: own(names.pair), label: own(names.label) };
  }
}

/**
 * The classes of examples, in order: numbers from 0 on as `LABEL_0`, `LABEL_1`, ..., up to the largest; other labels as they are,
 * sorted.
 */
export function labelsOf(examples: readonly Example[]): string[] {
  const found = [...new Set(examples.map(({ label }) => label))];
  if (!found.every((label) => /^\d{1,4}$/.test(label))) return found.sort();
  return Array.from({ length: Math.max(...found.map(Number)) + 1 }, (_, i) => `LABEL_${i}`);
}

/** What an example is trained towards: the number of its class, which its label names or is, or its number. */
export type Target = { readonly kind: 'classes'; readonly labels: readonly string[] } | { readonly kind: 'number' };

/** The target of a label, or why it has none. */
export function targetOf(label: string, target: Target): number | string {
  if (target.kind === 'number') {
    const value = Number(label);
    return Number.isFinite(value) ? value : `has the label '${label}', which is no number`;
  }
  const { labels } = target;
  const named = labels.indexOf(label);
  const value = named < 0 && /^\d{1,6}$/.test(label) ? Number(label) : named;
  if (value >= 0 && value < labels.length) return value;
  return `has the label '${label}', which is none of the ${labels.length} that the head has: ${labels.join(', ')}`;
}

/** Labelled texts packed end to end. */
export interface ExampleBatch extends Omit<Sequences, 'targets'> {
  /** Kind of every token, i32 [rows]. */
  readonly types: Int32Array;
  /** Which examples these are, [segments]. */
  readonly examples: Int32Array;
}

/** Tokenised examples. */
export class ExampleData implements TrainingData<ExampleBatch> {
  readonly #tokens: TokenData;
  readonly #at: ReadonlyMap<number, number>;
  readonly #types: readonly (readonly number[])[];

  private constructor(
    tokens: TokenData,
    at: ReadonlyMap<number, number>,
    types: readonly (readonly number[])[],
    /** Of each example: the number of its class, or its number. */
    readonly targets: Float32Array,
    /** Examples that were cut. */
    readonly truncated: number,
  ) {
    this.#tokens = tokens;
    this.#at = at;
    this.#types = types;
  }

  /**
   * Tokenises examples, each at most `sequenceLength` tokens with special ones.
   *
   * @param bad takes examples whose label is none of the target's
   * @throws InvalidDataError when no example is left, InvalidArgumentError for a bad sequence length.
   */
  static encode(
    examples: readonly Example[],
    tokenizer: Tokenizer,
    sequenceLength: number,
    target: Target,
    bad: BadRows,
  ): ExampleData {
    const ids: (readonly number[])[] = [];
    const types: (readonly number[])[] = [];
    const targets: number[] = [];
    const at = new Map<number, number>();
    let [start, truncated, bytes] = [0, 0, 0];
    for (const { text, pair, label, at: place } of examples) {
      const value = targetOf(label, target);
      if (typeof value === 'string') {
        bad.refuse(place, value);
        continue;
      }
      const encoded = tokenizer.encodeInput(text, { ...(pair !== undefined && { pair }), maxTokens: sequenceLength });
      if (encoded.ids.length === 0) {
        bad.refuse(place, 'has no tokens');
        continue;
      }
      at.set(start, ids.length);
      start += encoded.ids.length;
      ids.push(encoded.ids);
      types.push(encoded.types);
      targets.push(value);
      if (encoded.truncated > 0) truncated++;
      bytes += Buffer.byteLength(text) + Buffer.byteLength(pair ?? '');
    }
    const tokens = TokenData.fromIds(ids, sequenceLength, bytes);
    return new ExampleData(tokens, at, types, Float32Array.from(targets), truncated);
  }

  get sequenceLength(): number {
    return this.#tokens.sequenceLength;
  }
  get count(): number {
    return this.targets.length;
  }
  /** Tokens of every example. */
  get lengths(): readonly number[] {
    return this.#types.map(({ length }) => length);
  }

  sha256(): string {
    return createHash('sha256').update(this.#tokens.sha256()).update(this.targets).digest('hex');
  }

  next(cursor: Cursor, rows: number, seed: number | null): { batch: ExampleBatch; cursor: Cursor } {
    const { batch, cursor: after } = this.#tokens.next(cursor, rows, seed);
    const { ids, positions, offsets } = batch;
    const examples = batch.starts.map((start) => this.#at.get(start)!);
    const types = new Int32Array(ids.length);
    for (const [s, example] of examples.entries()) types.set(this.#types[example], offsets[s]);
    return { batch: { ids, positions, offsets, types, examples }, cursor: after };
  }

  batchesPerEpoch(epoch: number, rows: number, seed: number | null): number {
    return this.#tokens.batchesPerEpoch(epoch, rows, seed);
  }
}
