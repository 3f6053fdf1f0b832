// Texts of arguments or of a file of any size, through a model in order, to lines of JSON.
import { once } from 'node:events';
import { statSync } from 'node:fs';
import { type ElasticModel, loadModel } from '../infer/model.js';
import type { ClassifyOptions, TextInput } from '../infer/types.js';
import { replaceFile } from '../io/files.js';
import { fileLines } from '../io/lines.js';
import { InvalidFileError } from '../native/errors.js';
import { type CommandContext, exitCodes, UsageError } from './command.js';
import { Progress } from './progress.js';
import { loadFlags, loadOptions } from './shared.js';

const { adapter: _, ...encoderFlags } = loadFlags;

/** Flags of commands that read rows. */
export const rowFlags = {
  data: { type: 'string', value: 'FILE', help: 'texts to read: a .jsonl file, or one text a line' },
  field: { type: 'string', value: 'NAME', help: 'field of the .jsonl lines that holds the text (default: text)' },
  'pair-field': {
    type: 'string',
    value: 'NAME',
    help: 'field that holds a second text, where there is one (default: pair)',
  },
  'bad-rows': {
    type: 'string',
    value: 'stop|skip',
    help: 'at a line without a text: stop, or leave it out and count it (default: stop)',
  },
  out: { type: 'string', short: 'o', value: 'FILE', help: 'write the lines there instead of to stdout' },
  windows: {
    type: 'string',
    value: 'OVERLAP',
    help: 'read longer texts whole, in windows that overlap by so many tokens, and take the mean (default: they are cut)',
  },
  batch: { type: 'string', value: 'N', help: 'texts that run together at most (default: 64)' },
  'max-context': { type: 'string', value: 'N', help: 'tokens of a text at most (default: as many as the model takes)' },
  ...encoderFlags,
} as const;

/** What a command makes of one row. */
export interface RowResult {
  /** Fields of the row's line of JSON. */
  readonly line: object;
  readonly truncated: number;
  readonly windows: number;
  /** What it cost, and what it would cost at the full budget. */
  readonly flops: number;
  readonly flopsFull: number;
}

/** Rows that are read before they are run. */
const chunkRows = 512;
/** Bad lines that are named. */
const namedLines = 20;

interface InputRow {
  readonly number: number;
  readonly input: TextInput;
}

/**
 * Runs a command over its texts. Lines come out in the order of the rows; with --json there is one object, which has them too
 * unless they go to a file.
 *
 * @param label of the progress line
 * @param run makes the results of rows, in their order
 */
export async function runRows(
  context: CommandContext,
  label: string,
  run: (
    model: ElasticModel,
    inputs: readonly TextInput[],
    packing: Pick<ClassifyOptions, 'batch' | 'windows'>,
  ) => Promise<RowResult[]>,
): Promise<number> {
  const { flags, positionals, json, printJson, signal } = context;
  const [directory, ...texts] = positionals;
  const data = flags.string('data');
  if ((data === undefined) === (texts.length === 0)) {
    throw new UsageError(`[cli] ${label} takes texts as arguments, or --data FILE`);
  }
  const skip = flags.choice('bad-rows', ['stop', 'skip']) === 'skip';
  const batch = flags.integer('batch', { min: 1, max: 256 });
  const overlap = flags.integer('windows', { min: 0 });
  const packing = { ...(batch && { batch }), ...(overlap !== undefined && { windows: { overlap } }) };
  const maxContext = flags.integer('max-context', { min: 1 });
  const out = flags.string('out');
  await using model = await loadModel(directory, { ...loadOptions(context), ...(maxContext && { maxContext }) });

  const bad: { line: number; reason: string }[] = [];
  const summary = { rows: 0, bad: 0, truncated: 0, windowed: 0, flops: 0, flopsFull: 0 };
  const collected: object[] = [];
  const progress = new Progress(label);
  const size = data === undefined ? 0 : sizeOf(data);
  const refuse = (line: number, reason: string): void => {
    if (!skip)
      throw new InvalidFileError(`[${label}] ${data ?? 'argument'}:${line} ${reason}; --bad-rows skip goes on`);
    summary.bad++;
    if (bad.length < namedLines) bad.push({ line, reason });
  };
  const work = async (write: (line: string) => Promise<void>): Promise<void> => {
    const flush = async (rows: readonly InputRow[]): Promise<void> => {
      if (rows.length === 0) return;
      const inputs = rows.map(({ input }) => input);
      const results = await run(model, inputs, packing);
      for (const [i, { line, truncated, windows, flops, flopsFull }] of results.entries()) {
        const row = { line: rows[i].number, ...line, truncated, ...(packing.windows && { windows }) };
        if (json && out === undefined) collected.push(row);
        else await write(`${JSON.stringify(row)}\n`);
        summary.truncated += truncated > 0 ? 1 : 0;
        summary.windowed += windows > 1 ? 1 : 0;
        summary.flops += flops;
        summary.flopsFull += flopsFull;
      }
      summary.rows += rows.length;
    };
    let rows: InputRow[] = [];
    for await (const { number, text, bytesRead } of data === undefined ? argumentsOf(texts) : fileLines(data)) {
      signal.throwIfAborted();
      const input = inputOf(text, data?.endsWith('.jsonl') ?? false, flags);
      if (typeof input === 'object' && 'reason' in input) refuse(number, input.reason);
      else rows.push({ number, input });
      if (rows.length < chunkRows) continue;
      await flush(rows);
      rows = [];
      progress.update({ done: kib(bytesRead), total: kib(size), facts: ['KiB', `${summary.rows} rows`] });
    }
    await flush(rows);
  };
  try {
    if (out === undefined) await work(toStdout);
    else await replaceFile(out, (handle) => work(async (line) => void (await handle.write(line))));
  } finally {
    progress.finish();
  }

  if (json) {
    printJson({
      model: directory,
      ...summary,
      ratio: summary.flopsFull > 0 ? summary.flops / summary.flopsFull : 1,
      badRows: bad,
      ...(out === undefined ? { results: collected } : { out }),
    });
    return exitCodes.ok;
  }
  const longer = (count: number, what: string): void => {
    if (count === 0) return;
    const { maxContext } = model.info;
    process.stderr.write(`${count} of ${summary.rows} texts are longer than ${maxContext} tokens and were ${what}\n`);
  };
  longer(summary.truncated, 'cut');
  longer(summary.windowed, 'read in windows');
  if (summary.bad > 0) {
    const lines = bad.map(({ line, reason }) => `${line} ${reason}`).join(', ');
    process.stderr.write(`${summary.bad} bad rows left out: line ${lines}${summary.bad > bad.length ? ', ...' : ''}\n`);
  }
  return exitCodes.ok;
}

const kib = (bytes: number): number => Math.ceil(bytes / 1024);

function sizeOf(file: string): number {
  try {
    return statSync(file).size;
  } catch (cause) {
    throw new InvalidFileError(`[cli] cannot read ${file}: ${(cause as Error).message}`, { cause });
  }
}

/** A slow reader of the pipe is waited for. */
async function toStdout(line: string): Promise<void> {
  if (!process.stdout.write(line)) await once(process.stdout, 'drain');
}

async function* argumentsOf(texts: readonly string[]) {
  for (const [i, text] of texts.entries()) yield { number: i + 1, text, bytesRead: 0 };
}

/** The text or pair of a line, or why it has none. */
function inputOf(line: string, isJson: boolean, flags: CommandContext['flags']): TextInput | { reason: string } {
  if (line === '') return { reason: 'is empty' };
  if (!isJson) return line;
  const [field, pairField] = [flags.string('field') ?? 'text', flags.string('pair-field') ?? 'pair'];
  let row: Record<string, unknown> | null;
  try {
    row = JSON.parse(line);
  } catch {
    return { reason: 'is not JSON' };
  }
  const own = (name: string): unknown =>
    typeof row === 'object' && row !== null && Object.hasOwn(row, name) ? row[name] : undefined;
  const [text, pair] = [own(field), own(pairField)];
  if (typeof text !== 'string') return { reason: `has no text in field '${field}'` };
  if (text === '') return { reason: `has an empty text in field '${field}'` };
  if (pair === undefined) return text;
  if (typeof pair !== 'string' || pair === '') return { reason: `has no text in field '${pairField}'` };
  return [text, pair];
}
