// What the training commands share: flags over a configuration file, progress, the outcome.
import type { TrainConfig, TrainEvent, TrainResult } from '../distill/events.js';
import { type WidthSampling, widthStrategies } from '../distill/widths.js';
import { deviceChoices } from '../native/index.js';
import { type CommandContext, exitCodes, type FlagReader, UsageError } from './command.js';
import { ConfigFile, isMapping } from './config.js';
import { dataFlags } from './data.js';
import { Progress } from './progress.js';
import { loadFlags } from './shared.js';

/** Flags of both kinds of training; each overrides its counterpart in the configuration file. */
export const trainingFlags = {
  config: {
    type: 'string',
    short: 'c',
    value: 'FILE',
    help: 'YAML or JSON file with the options of the API; flags override it',
  },
  out: { type: 'string', short: 'o', value: 'DIR', help: 'directory to write' },
  ...dataFlags,
  'eval-data': {
    type: 'string',
    value: 'FILE,...',
    help: 'held-out files: evaluated while training, the best is kept',
  },
  'held-out': { type: 'string', value: 'SHARE', help: 'share of --data to hold out instead' },
  steps: { type: 'string', value: 'N', help: 'optimizer steps' },
  lr: { type: 'string', value: 'RATE', help: 'peak learning rate' },
  'batch-tokens': { type: 'string', value: 'N', help: 'tokens of one batch' },
  'sequence-length': { type: 'string', value: 'N', help: 'longest sequence in tokens' },
  device: loadFlags.device,
  seed: { type: 'string', value: 'N', help: 'seed of the data order and of every random choice' },
  resume: { type: 'string', value: 'auto|never', help: 'continue from the newest checkpoint in --out (default: auto)' },
} as const;

/** Which widths of nested feed-forwards a step trains. */
export const widthFlags = {
  sample: { type: 'string', value: widthStrategies.join('|'), help: 'widths that a step trains (default: joint, all)' },
  'sample-weights': { type: 'string', value: 'W,...', help: 'of the widths, ascending: factors, or how often' },
} as const;

export function sampleOption(flags: FlagReader): WidthSampling | undefined {
  const strategy = flags.choice('sample', widthStrategies);
  const weights = flags.list('sample-weights')?.map(Number);
  if (weights?.some(Number.isNaN)) {
    throw new UsageError(`[cli] --sample-weights must be numbers, got '${flags.string('sample-weights')}'`);
  }
  return strategy || weights ? { ...(strategy && { strategy }), ...(weights && { weights }) } : undefined;
}

/** The --config file, if any. */
export async function readConfig(flags: FlagReader): Promise<ConfigFile | null> {
  const path = flags.string('config');
  if (path === undefined) return null;
  const config = await ConfigFile.read(path, 'config');
  const key = ['onEvent', 'signal'].find((name) => name in config.content);
  if (key !== undefined) throw new UsageError(`[cli] ${path}: '${key}' is for programs, a file cannot give it`);
  return config;
}

/** Options of the API: those of the file, and over them those of flags and `more`. */
export function trainingOptions(
  flags: FlagReader,
  config: ConfigFile | null,
  more: Readonly<Record<string, unknown>>,
): { merged: Record<string, unknown>; overridden: readonly string[] } {
  const content = config?.content ?? {};
  const lr = flags.number('lr');
  const resume = flags.choice('resume', ['auto', 'never']);
  const steps = flags.integer('steps', { min: 1 });
  const options: Record<string, unknown> = {
    out: flags.string('out'),
    steps,
    heldOut: flags.number('held-out'),
    batchTokens: flags.integer('batch-tokens', { min: 1 }),
    sequenceLength: flags.integer('sequence-length', { min: 2 }),
    seed: flags.integer('seed'),
    device: flags.choice('device', deviceChoices),
    optimizer: lr === undefined || !isMapping(content.optimizer ?? {}) ? undefined : { ...content.optimizer!, lr },
    resume: resume === undefined ? undefined : resume === 'auto' ? 'auto' : false,
    ...more,
  };
  const overridden = Object.keys(options).filter((key) => options[key] !== undefined);
  const merged: Record<string, unknown> = { ...content };
  for (const key of overridden) merged[key] = options[key];
  // --steps replaces the file's epochs, and --held-out its held-out files.
  if (steps !== undefined) delete merged.epochs;
  if (options.heldOut !== undefined) delete merged.evalData;
  if (merged.out === undefined) throw new UsageError('[cli] the directory to write is missing: give --out');
  return { merged, overridden: overridden.map((key) => (key === 'optimizer' ? 'optimizer.lr' : key)) };
}

/** Refuses a run that lacks settings, each named with the flag that gives it. */
export function requireSettings(
  merged: Readonly<Record<string, unknown>>,
  flags: Readonly<Record<string, string>>,
): void {
  for (const [key, flag] of Object.entries(flags)) {
    if (merged[key] === undefined)
      throw new UsageError(`[cli] '${key}' is missing: give ${flag}, or a --config file that has it`);
  }
}

/** How a training ended, in a line. */
export function trainingOutcome({ dir, step, best, stopped }: TrainResult): string {
  const bestText = best ? `, best ${best.metric.toFixed(4)} at step ${best.step}` : '';
  const how = { done: 'done', early: 'stopped early', signal: 'interrupted and saved; run it again to continue' }[
    stopped
  ];
  return `${dir}: ${step} steps${bestText} (${how})\n`;
}

/** Runs a training with progress on stderr and reports how it ended, to people as `text` says it. */
export async function runTraining<R extends Pick<TrainResult, 'stopped'>>(
  context: CommandContext,
  label: string,
  text: (result: R) => string,
  start: (hooks: Pick<TrainConfig, 'onEvent' | 'signal'>) => Promise<R>,
): Promise<number> {
  const reporter = trainingReporter(label);
  let result: R;
  try {
    result = await start({ onEvent: reporter.event, signal: context.signal });
  } finally {
    reporter.finish();
  }
  if (context.json) context.printJson({ ...result, last: reporter.last() });
  else context.print(text(result));
  return result.stopped === 'signal' ? exitCodes.interrupted : exitCodes.ok;
}

export interface TrainingReporter {
  event(event: TrainEvent): undefined;
  finish(): void;
  /** The last step reported. */
  last(): Extract<TrainEvent, { type: 'step' }> | null;
}

export function trainingReporter(label: string): TrainingReporter {
  const progress = new Progress(label);
  let last: Extract<TrainEvent, { type: 'step' }> | null = null;
  let quality = '';
  return {
    event(event) {
      if (event.type === 'step') {
        last = event;
        const facts = [`loss ${event.loss.toFixed(4)}`, ...(quality ? [quality] : [])];
        facts.push(`${Math.round(event.tokensPerSecond).toLocaleString('en-US')} tokens/s`);
        progress.update({ done: event.step, total: event.of, facts });
      } else if (event.type === 'eval') {
        const [name, values] = Object.entries(event.levels).at(-1) ?? ['', {}];
        const [metric, value] = Object.entries(values)[0] ?? ['', 0];
        quality = `${name} ${metric} ${value.toFixed(4)}`;
      } else if (event.type === 'stage') {
        progress.finish();
        process.stderr.write(`stage ${event.index} of ${event.of}: ${event.name}\n`);
      } else if (event.type === 'measure') {
        progress.update({ done: event.done, total: event.total, facts: [`measuring ${event.what}`] });
      } else if (event.type === 'warn') {
        progress.finish();
        process.stderr.write(`warning: ${event.message}\n`);
      }
      return undefined;
    },
    finish: () => progress.finish(),
    last: () => last,
  };
}
