// `elastiform generate`: text after a prompt, at a budget.
import { loadModel } from '../infer/model.js';
import type { GenerateOptions } from '../infer/types.js';
import { type Command, exitCodes, type FlagReader, UsageError } from './command.js';
import { budgetForms, loadFlags, loadOptions, parseBudget, parseIds, percent } from './shared.js';

export const generateCommand: Command = {
  name: 'generate',
  summary: 'Generate text after a prompt, at a budget. The text goes to stdout as it comes.',
  positionals: '<model>',
  flags: {
    prompt: { type: 'string', short: 'p', value: 'TEXT', help: 'text to continue (default: empty, a new text)' },
    ids: { type: 'string', value: '1,2,...', help: 'token ids to continue instead of a text' },
    budget: {
      type: 'string',
      short: 'b',
      value: budgetForms,
      help: 'share of the FLOPs, a level, a latency or a quality (default: full)',
    },
    'max-tokens': { type: 'string', value: 'N', help: 'tokens to generate at most (default: 256)' },
    temperature: { type: 'string', value: 'T', help: '0 is greedy (default: 0)' },
    'top-k': { type: 'string', value: 'K', help: 'sample among the K most likely tokens (default: off)' },
    'top-p': { type: 'string', value: 'P', help: 'sample among the tokens that hold probability P (default: off)' },
    stop: { type: 'string', value: 'TEXT', help: 'end before this text' },
    seed: { type: 'string', value: 'N', help: 'the same seed gives the same text' },
    ...loadFlags,
  },
  example: 'elastiform generate runs/tiny --prompt "Call me" --budget 0.6 --max-tokens 100',
  async run(context) {
    const { flags, positionals, json, print, printJson } = context;
    const options = { ...generateOptions(flags), signal: context.signal };
    const ids = flags.string('ids');
    if (ids !== undefined && flags.has('prompt')) throw new UsageError('[cli] give --prompt or --ids, not both');
    const prompt = ids === undefined ? (flags.string('prompt') ?? '') : parseIds(ids);
    await using model = await loadModel(positionals[0], loadOptions(context));
    const stream = model.generate(prompt, options);
    const hasText = model.network.tokenizer !== null;
    if (!json) {
      for await (const chunk of stream) print(hasText ? chunk.text : `${chunk.token} `);
      print('\n');
    }
    const [text, tokens, finishReason, usage] = await Promise.all([
      stream.text,
      stream.ids,
      stream.finishReason,
      stream.usage,
    ]);
    if (json) printJson({ text: hasText ? text : null, ids: tokens, finishReason, usage });
    else {
      const { ratio, tokensPerSecond } = usage.compute;
      const speed = tokensPerSecond === null ? '' : `, ${tokensPerSecond.toFixed(0)} tokens/s`;
      process.stderr.write(
        `${usage.outputTokens} tokens (${finishReason}), ${percent(ratio)} of the full FLOPs${speed}\n`,
      );
    }
    return finishReason === 'abort' ? exitCodes.interrupted : exitCodes.ok;
  },
};

function generateOptions(flags: FlagReader): GenerateOptions {
  const budget = flags.string('budget');
  const stop = flags.string('stop');
  const options: GenerateOptions = {
    budget: budget === undefined ? undefined : parseBudget(budget),
    maxTokens: flags.integer('max-tokens', { min: 1 }),
    temperature: flags.number('temperature', { min: 0 }),
    topK: flags.integer('top-k', { min: 0 }),
    topP: flags.number('top-p', { min: 0, max: 1 }),
    seed: flags.integer('seed', { min: 0, max: 2 ** 32 - 1 }),
    stop: stop === undefined ? undefined : [stop],
  };
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
}
