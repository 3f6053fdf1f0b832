// `elastiform generate --batch`: prompts of a file, each with options of its own, run together.
import { readDocuments } from '../distill/data.js';
import type { Budget } from '../elastic/budget.js';
import type { ElasticModel } from '../infer/model.js';
import type { GenerateOptions, GenerateStream } from '../infer/types.js';
import { InvalidFileError } from '../native/errors.js';
import { type CommandContext, exitCodes } from './command.js';
import { Progress } from './progress.js';
import { parseBudget } from './shared.js';

const optionKeys: readonly string[] = [
  ...['budget', 'adapter', 'maxTokens', 'temperature', 'topK', 'topP', 'stop', 'seed', 'speculative', 'deadlineMs'],
  ...['beams', 'lengthPenalty', 'earlyStopping'],
];

/** A line with a prompt: a text or ids, and options that come before those of the command line. */
interface Line {
  readonly number: number;
  readonly prompt: string | readonly number[];
  readonly options: GenerateOptions;
}

/**
 * Generates after every line of a file and prints one line for each, in their order.
 *
 * @param defaults options of a line with such a budget, unless it names them
 * @throws InvalidFileError, before anything runs, for a line that cannot be served; the message has its number.
 */
export async function generateBatch(
  { json, printJson, signal }: CommandContext,
  model: ElasticModel,
  file: string,
  defaults: (budget?: Budget) => GenerateOptions,
): Promise<number> {
  const lines = await readLines(file);
  const failed = new AbortController();
  const signals = { signal: AbortSignal.any([signal, failed.signal]) };
  const progress = new Progress('generate');
  const state = { done: 0, total: lines.length, facts: [''] };
  let tokens = 0;
  try {
    const streams = lines.map(({ number, prompt, options }) =>
      atLine(file, number, () => model.generate(prompt, { ...defaults(options.budget), ...options, ...signals })),
    );
    const results = streams.map(async (stream) => {
      const result = await generated(model, stream);
      tokens += result.usage.outputTokens;
      state.done++;
      state.facts = [`${tokens} tokens`];
      progress.update(state);
      return result;
    });
    const all = Promise.all(results);
    // Whoever awaits one of them sees its error.
    all.catch(() => {});
    if (json) printJson({ results: await all });
    else for (const result of results) printJson(await result);
    progress.finish(state);
  } finally {
    failed.abort();
  }
  return signal.aborted ? exitCodes.interrupted : exitCodes.ok;
}

/** All that a generation gave, as --json prints it. */
export async function generated({ loaded }: ElasticModel, stream: GenerateStream) {
  const [text, ids, finishReason, usage] = await Promise.all([
    stream.text,
    stream.ids,
    stream.finishReason,
    stream.usage,
  ]);
  return { text: loaded.tokenizer ? text : null, ids, finishReason, usage };
}

async function readLines(file: string): Promise<Line[]> {
  const [text] = await readDocuments({ kind: 'text', files: [file] });
  const lines = text
    .split('\n')
    .map((line, i) => ({ line, number: i + 1 }))
    .filter(({ line }) => line.trim() !== '');
  return lines.map(({ line, number }) => atLine(file, number, () => ({ number, ...parseLine(line) })));
}

function parseLine(line: string): Omit<Line, 'number'> {
  const value: unknown = JSON.parse(line);
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw new Error('it is no object');
  const { prompt, ids, ...options } = value as Record<string, unknown>;
  if ((prompt === undefined) === (ids === undefined)) throw new Error("it must have 'prompt' or 'ids', not both");
  const given = prompt === undefined ? Array.isArray(ids) : typeof prompt === 'string';
  if (!given) throw new Error("'prompt' must be a text, 'ids' a list of token ids");
  for (const key of Object.keys(options)) {
    if (!optionKeys.includes(key))
      throw new Error(`unknown key '${key}'; it takes prompt, ids, ${optionKeys.join(', ')}`);
  }
  const { budget } = options;
  return {
    prompt: (prompt ?? ids) as Line['prompt'],
    options: { ...options, ...(typeof budget === 'string' && { budget: parseBudget(budget) }) },
  };
}

/** Errors of one line name it. */
function atLine<T>(file: string, number: number, run: () => T): T {
  try {
    return run();
  } catch (cause) {
    throw new InvalidFileError(`[cli] ${file}:${number}: ${(cause as Error).message}`, { cause });
  }
}
