// `elastiform search`: the best widths of a nested model within a constraint.
import { loadModel } from '../infer/model.js';
import { recordSearch, type SearchConstraint, search, searchMethods } from '../infer/quality/search.js';
import { InfeasibleError, type SearchPoint } from '../infer/quality/searched.js';
import { type Command, exitCodes, type FlagReader, reportError, UsageError } from './command.js';
import { dataFlags, documentsOf } from './data.js';
import { columns, Progress } from './progress.js';
import { loadFlags, loadOptions, parseBudget, percent } from './shared.js';

export const searchCommand: Command = {
  name: 'search',
  summary: 'Search widths of a nested model: the best slice within a constraint, by measured KL to the full model.',
  positionals: '<model>',
  flags: {
    ...dataFlags,
    'max-params': { type: 'string', value: 'N', help: 'parameters at most' },
    'max-flops': { type: 'string', value: 'SHARE', help: 'share of the full FLOPs at most' },
    'max-bytes': { type: 'string', value: 'N[KiB|MiB|GiB]', help: 'bytes of the weights at most' },
    'max-latency': {
      type: 'string',
      value: '20ms|tpot:20ms',
      help: 'time at most, by `elastiform profile` on this device',
    },
    method: { type: 'string', value: searchMethods.join('|'), help: 'how to search (default: greedy)' },
    trials: { type: 'string', value: 'N', help: 'slices that evolution measures (default: 64)' },
    limit: { type: 'string', value: 'N', help: 'tokens to measure each slice on at most (default: 4096)' },
    'sequence-length': { type: 'string', value: 'N', help: 'longest sequence (default: the context, at most 512)' },
    scores: {
      type: 'string',
      value: 'FILE',
      help: 'scores to reuse and keep (default: search/scores.json in <model>)',
    },
    record: { type: 'boolean', help: 'let budgets choose among what was found, and name the best slice as a level' },
    name: { type: 'string', value: 'NAME', help: 'with --record: name of that level (default: searched)' },
    seed: { type: 'string', value: 'N', help: 'of evolution (default: 0)' },
    ...loadFlags,
  },
  example: 'elastiform search runs/nested --data heldout.txt --max-params 1.5e6 --record --name small',
  async run(context) {
    const { flags, positionals, json, print, printJson, signal } = context;
    const constraint = constraintOf(flags);
    const name = flags.string('name');
    if (name !== undefined && !flags.boolean('record')) throw new UsageError('[cli] --name needs --record');
    const given = {
      method: flags.choice('method', searchMethods),
      trials: flags.integer('trials', { min: 0 }),
      limit: flags.integer('limit', { min: 1 }),
      sequenceLength: flags.integer('sequence-length', { min: 2 }),
      scores: flags.string('scores'),
      seed: flags.integer('seed', { min: 0, max: 2 ** 32 - 1 }),
    };
    const data = await documentsOf(context, 'data');
    if (!data) throw new UsageError('[cli] the text to compare slices on is missing: give --data');
    await using model = await loadModel(positionals[0], loadOptions(context));
    const progress = new Progress('search');
    try {
      const result = await search(model, {
        ...{ data, signal, ...(constraint && { constraint }) },
        ...Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)),
        onProgress: progress.phase,
      }).finally(() => progress.finish());
      if (flags.boolean('record')) await recordSearch(model, result, name);
      if (json) printJson(result);
      else {
        const { best, pareto, measured, reused, tokens } = result;
        print(`${measured} slices measured on ${tokens} tokens, ${reused} scores reused\n\n`);
        print(pointTable(pareto, best));
        if (best) print(`\nBest within the constraint: ffnWidth ${JSON.stringify(best.ffnWidth)}\n`);
      }
      return exitCodes.ok;
    } catch (error) {
      if (!(error instanceof InfeasibleError)) throw error;
      if (json) printJson({ nearest: error.nearest });
      reportError(error);
      return exitCodes.constraint;
    }
  },
};

function constraintOf(flags: FlagReader): SearchConstraint | undefined {
  const latency = flags.string('max-latency');
  const budget = latency === undefined ? undefined : parseBudget(latency);
  if (budget !== undefined && !(typeof budget === 'object' && 'latencyMs' in budget)) {
    throw new UsageError(`[cli] --max-latency must be a time such as 20ms or tpot:20ms, got '${latency}'`);
  }
  const all = [
    { params: flags.number('max-params', { min: 1 }) },
    { flops: flags.number('max-flops', { min: 0, max: 1 }) },
    { bytes: bytesOf(flags) },
    ...(budget ? [budget as SearchConstraint] : []),
  ].filter((constraint) => Object.values(constraint)[0] !== undefined);
  if (all.length > 1) throw new UsageError('[cli] give one constraint: the others are reported for what is found');
  return all[0] as SearchConstraint | undefined;
}

function bytesOf(flags: FlagReader): number | undefined {
  const text = flags.string('max-bytes');
  if (text === undefined) return undefined;
  const [, number, unit = ''] = /^([\d.]+)\s*(KiB|MiB|GiB)?$/.exec(text) ?? [];
  const bytes = Number(number) * 1024 ** ['', 'KiB', 'MiB', 'GiB'].indexOf(unit);
  if (!(bytes > 0)) throw new UsageError(`[cli] --max-bytes must be a number of bytes, KiB, MiB or GiB, got '${text}'`);
  return bytes;
}

function pointTable(points: readonly SearchPoint[], best: SearchPoint | null): string {
  return columns([
    ['', 'FLOPs', 'parameters', 'KL', 'agreement', 'units of every layer'],
    ...points.map((point) => [
      point.widths === best?.widths ? 'best' : '',
      percent(point.flopsRatio),
      point.parameters.toLocaleString('en-US'),
      point.kl.toFixed(4),
      percent(point.agreement),
      point.widths.join(' '),
    ]),
  ]);
}
