// `elastiform eval`: quality, counted compute and measured speed at budgets.
import { type Budget, budgetText } from '../elastic/budget.js';
import { writeProfile } from '../elastic/profile.js';
import { type ElasticModel, loadModel } from '../infer/model.js';
import { profile } from '../infer/profile.js';
import { type Baseline, type EvalLevel, type EvalReport, evaluate, isElastic } from '../infer/quality/evaluate.js';
import { recordQuality } from '../infer/quality/quality.js';
import type { Measured } from '../infer/quality/statistics.js';
import { type Command, type CommandContext, exitCodes, UsageError } from './command.js';
import { dataFlags, documentsOf } from './data.js';
import { columns, Progress } from './progress.js';
import { loadFlags, loadOptions, parseBudget, percent } from './shared.js';

const baselineNames: readonly Baseline[] = ['random', 'drop'];

export const evalCommand: Command = {
  name: 'eval',
  summary: 'Measure perplexity, KL and agreement with the full model, counted compute and speed at budgets.',
  positionals: '<model>',
  flags: {
    ...dataFlags,
    budgets: {
      type: 'string',
      short: 'b',
      value: 'B,...',
      help: 'shares, levels, latencies, qualities, as generate takes them (default: every level of the model)',
    },
    baselines: { type: 'string', value: 'random,drop', help: 'baselines at equal compute' },
    limit: { type: 'string', value: 'N', help: 'tokens to evaluate at most' },
    'sequence-length': { type: 'string', value: 'N', help: 'longest sequence (default: the context, at most 512)' },
    'batch-tokens': { type: 'string', value: 'N', help: 'tokens of one batch (default: 2048)' },
    'min-agreement': {
      type: 'string',
      value: 'SHARE',
      help: 'exit with 3 when a budget agrees less with the full model',
    },
    record: {
      type: 'boolean',
      help: 'keep agreement of levels, and times on this device, in <model>, for budgets by quality and latency',
    },
    seed: { type: 'string', value: 'N', help: 'seed of the random baseline and the intervals (default: 0)' },
    ...loadFlags,
  },
  example: 'elastiform eval runs/tiny --data heldout.txt --baselines random,drop --record',
  async run(context) {
    const { flags, positionals, json, print, printJson, signal } = context;
    const baselines = (flags.list('baselines') ?? []) as Baseline[];
    const unknown = baselines.find((b) => !baselineNames.includes(b));
    if (unknown) throw new UsageError(`[cli] --baselines must be of ${baselineNames.join(', ')}, got '${unknown}'`);
    const asked = flags.list('budgets')?.map(parseBudget);
    const least = flags.number('min-agreement', { min: 0, max: 1 });
    const numbers = {
      limit: flags.integer('limit', { min: 1 }),
      sequenceLength: flags.integer('sequence-length', { min: 2 }),
      batchTokens: flags.integer('batch-tokens', { min: 1 }),
      seed: flags.integer('seed', { min: 0, max: 2 ** 32 - 1 }),
    };
    const data = await documentsOf(context, 'data');
    if (!data) throw new UsageError('[cli] the text to evaluate on is missing: give --data');

    await using model = await loadModel(positionals[0], loadOptions(context));
    const names: Budget[] = model.info.levels.map((level) => level.name);
    const budgets = asked ?? (model.info.calibrated && names.length > 0 ? names : ['full']);
    const progress = new Progress('eval');
    const report = await evaluate(model, {
      data,
      budgets,
      baselines,
      ...Object.fromEntries(Object.entries(numbers).filter(([, value]) => value !== undefined)),
      onProgress: progress.phase,
      signal,
    }).finally(() => progress.finish());

    const recorded = flags.boolean('record') ? await record(context, model, data, report) : null;
    const below = report.levels.filter((l) => isElastic(l.method) && least !== undefined && l.agreement.value < least);
    if (json) printJson({ model: positionals[0], ...report, ...(recorded && { recorded }) });
    else {
      print(`${report.tokens} tokens in ${report.sequences} sequences of at most ${report.sequenceLength}\n\n`);
      print(levelTable(report.levels));
      if (recorded) print(`\nRecorded ${recorded.levels.join(', ')} and ${recorded.profile}\n`);
    }
    for (const level of below) {
      process.stderr.write(
        `elastiform: [eval] agreement ${percent(level.agreement.value)} at ${budgetText(level.budget)} is below ${percent(least!)}\n`,
      );
    }
    return below.length > 0 ? exitCodes.constraint : exitCodes.ok;
  },
};

/** Writes quality and times of the model's levels into its directory. */
async function record(
  { signal }: CommandContext,
  model: ElasticModel,
  data: readonly string[],
  report: EvalReport,
): Promise<{ levels: string[]; profile: string }> {
  const { dir, tokenizer } = model.network;
  const levels = await recordQuality(dir, report);
  const progress = new Progress('eval');
  const times = await profile(model, {
    ids: data.flatMap((text) => tokenizer!.encode(text)),
    onProgress: progress.phase,
    signal,
  }).finally(() => progress.finish());
  return { levels, profile: await writeProfile(dir, times) };
}

/** A table of levels with half-widths of the 95 % intervals. */
export function levelTable(levels: readonly EvalLevel[]): string {
  const show = (m: Measured, digits: number): string =>
    `${m.value.toFixed(digits)} ±${((m.high - m.low) / 2).toFixed(digits)}`;
  return columns([
    ['method', 'budget', 'FLOPs', 'tokens', 'perplexity', 'bits/byte', 'KL', 'agreement', 'tokens/s'],
    ...levels.map((l) => [
      l.method,
      budgetText(l.budget),
      percent(l.ratio),
      percent(l.share),
      show(l.perplexity, 3),
      l.bitsPerByte ? show(l.bitsPerByte, 3) : '-',
      show(l.kl, 4),
      `${(l.agreement.value * 100).toFixed(1)} ±${(((l.agreement.high - l.agreement.low) / 2) * 100).toFixed(1)} %`,
      l.tokensPerSecond === null ? '-' : Math.round(l.tokensPerSecond).toLocaleString('en-US'),
    ]),
  ]);
}
