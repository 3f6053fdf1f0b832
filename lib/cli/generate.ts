// `elastiform generate`: text after a prompt, at a budget.
import type { Budget } from '../elastic/budget.js';
import { type ElasticModel, loadModel } from '../infer/model.js';
import type { GenerateOptions, SpeculativeOptions } from '../infer/types.js';
import { generateBatch, generated } from './batch.js';
import { type Command, exitCodes, type FlagReader, UsageError } from './command.js';
import { budgetForms, loadFlags, loadOptions, parseBudget, parseIds, percent } from './shared.js';

export const generateCommand: Command = {
  name: 'generate',
  summary: 'Generate text after a prompt, at a budget. The text goes to stdout as it comes.',
  positionals: '<model>',
  flags: {
    prompt: {
      type: 'string',
      short: 'p',
      value: 'TEXT',
      help: 'text to continue, or source of an encoder-decoder model (default: empty, a new text)',
    },
    ids: { type: 'string', value: '1,2,...', help: 'token ids to continue instead of a text' },
    batch: {
      type: 'string',
      value: 'FILE.jsonl',
      help: 'lines {"prompt": TEXT or "ids": [...], "budget", "adapter", "maxTokens", "temperature", "seed", ...} to continue together; prints a line for each, in order',
    },
    adapters: {
      type: 'string',
      value: 'NAME=DIR,...',
      help: 'LoRA adapters in PEFT format, of which each line of --batch may name one',
    },
    budget: {
      type: 'string',
      short: 'b',
      value: budgetForms,
      help: 'share of the FLOPs, a level, a latency or a quality (default: full)',
    },
    speculative: {
      type: 'boolean',
      help: 'draft tokens at a cheaper budget and verify several at once: the same text, sooner where drafts are good',
    },
    draft: {
      type: 'string',
      value: 'BUDGET',
      help: 'what drafts with --speculative (default: the level nearest to half of the FLOPs)',
    },
    'draft-tokens': {
      type: 'string',
      value: 'N|auto',
      help: 'tokens drafted at a time; auto: as many as save time, none if none do (default: auto)',
    },
    'max-tokens': { type: 'string', value: 'N', help: 'tokens to generate at most (default: 256)' },
    beams: {
      type: 'string',
      value: 'N',
      help: 'of an encoder-decoder model, texts that are searched side by side (default: as its directory says)',
    },
    'length-penalty': {
      type: 'string',
      value: 'P',
      help: 'with beams, above 0 favours longer texts (default: likewise)',
    },
    temperature: { type: 'string', value: 'T', help: '0 is greedy (default: 0)' },
    'top-k': { type: 'string', value: 'K', help: 'sample among the K most likely tokens (default: off)' },
    'top-p': { type: 'string', value: 'P', help: 'sample among the tokens that hold probability P (default: off)' },
    stop: { type: 'string', value: 'TEXT', help: 'end before this text' },
    seed: { type: 'string', value: 'N', help: 'the same seed gives the same text' },
    ...loadFlags,
  },
  example:
    'elastiform generate runs/tiny --prompt "Call me" --budget 0.6 --max-tokens 100\n  elastiform generate runs/tiny --prompt "Call me" --speculative --draft p60 --draft-tokens 4\n  elastiform generate runs/tiny --batch prompts.jsonl --max-tokens 100 > texts.jsonl\n  elastiform generate models/opus-mt --prompt "How are you?" --beams 4',
  async run(context) {
    const { flags, positionals, json, print, printJson } = context;
    const options = { ...generateOptions(flags), signal: context.signal };
    const ids = flags.string('ids');
    const batch = flags.string('batch');
    if (['prompt', 'ids', 'batch'].filter((name) => flags.has(name)).length > 1)
      throw new UsageError('[cli] give one of --prompt, --ids and --batch');
    const prompt = ids === undefined ? (flags.string('prompt') ?? '') : parseIds(ids);
    const drafts = draftFlags(flags);
    await using model = await loadModel(positionals[0], { ...loadOptions(context), ...adaptersFlag(flags) });
    const optionsAt = (budget = options.budget): GenerateOptions => ({
      ...options,
      ...(drafts && { speculative: { ...drafts, draft: drafts.draft ?? defaultDraft(model, budget) } }),
    });
    if (batch !== undefined) return await generateBatch(context, model, batch, optionsAt);
    const stream = model.generate(prompt, optionsAt());
    if (!json) {
      const hasText = model.loaded.tokenizer !== null;
      for await (const chunk of stream) print(hasText ? chunk.text : `${chunk.token} `);
      print('\n');
    }
    const result = await generated(model, stream);
    const { finishReason, usage } = result;
    if (json) printJson(result);
    else {
      const { ratio, tokensPerSecond, speculative: report } = usage.compute;
      const speed = tokensPerSecond === null ? '' : `, ${tokensPerSecond.toFixed(0)} tokens/s`;
      process.stderr.write(
        `${usage.outputTokens} tokens (${finishReason}), ${percent(ratio)} of the full FLOPs${speed}\n`,
      );
      if (report) {
        const { drafted, accepted, acceptance } = report;
        const share = acceptance === null ? '' : ` (${percent(acceptance)})`;
        process.stderr.write(`${accepted} of ${drafted} drafted tokens accepted${share}\n`);
      }
    }
    return finishReason === 'abort' ? exitCodes.interrupted : exitCodes.ok;
  },
};

/** What --speculative and the flags that go with it say; null without. */
function draftFlags(flags: FlagReader): Partial<SpeculativeOptions> | null {
  const [draft, tokens] = [flags.string('draft'), flags.string('draft-tokens')];
  if (!flags.boolean('speculative')) {
    if (draft !== undefined || tokens !== undefined)
      throw new UsageError('[cli] --draft and --draft-tokens go with --speculative');
    return null;
  }
  return {
    ...(draft !== undefined && { draft: parseBudget(draft) }),
    ...(tokens !== undefined && { tokens: tokens === 'auto' ? tokens : flags.integer('draft-tokens', { min: 1 }) }),
  };
}

/** The level that costs nearest to half of what a budget does. */
function defaultDraft(model: ElasticModel, budget: Budget = 'full'): Budget {
  const { flopsRatio } = model.resolve(budget);
  const far = (name: string) => Math.abs(model.resolve(name).flopsRatio - flopsRatio / 2);
  const levels = model.info.levels
    .map(({ name }) => name)
    .filter((name) => model.resolve(name).flopsRatio < flopsRatio);
  if (levels.length === 0)
    throw new UsageError('[cli] --speculative needs --draft: this model has no level that costs less than the budget');
  return levels.reduce((best, name) => (far(name) < far(best) ? name : best));
}

function generateOptions(flags: FlagReader): GenerateOptions {
  const budget = flags.string('budget');
  const stop = flags.string('stop');
  const options: GenerateOptions = {
    budget: budget === undefined ? undefined : parseBudget(budget),
    maxTokens: flags.integer('max-tokens', { min: 1 }),
    beams: flags.integer('beams', { min: 1 }),
    lengthPenalty: flags.number('length-penalty'),
    temperature: flags.number('temperature', { min: 0 }),
    topK: flags.integer('top-k', { min: 0 }),
    topP: flags.number('top-p', { min: 0, max: 1 }),
    seed: flags.integer('seed', { min: 0, max: 2 ** 32 - 1 }),
    stop: stop === undefined ? undefined : [stop],
  };
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
}

function adaptersFlag(flags: FlagReader): { adapters?: Record<string, string> } {
  const text = flags.string('adapters');
  if (text === undefined) return {};
  const entries = text.split(',').map((entry) => {
    const [, name, dir] = /^([^=]+)=(.+)$/.exec(entry) ?? [];
    if (!name) throw new UsageError(`[cli] --adapters must be NAME=DIR, separated by commas, got '${text}'`);
    return [name, dir];
  });
  return { adapters: Object.fromEntries(entries) };
}
