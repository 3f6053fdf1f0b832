// Flags and conversions that several commands share.
import type { Capacity, ElasticSpec } from '../elastic/axes.js';
import type { Budget } from '../elastic/budget.js';
import type { LatencyMetric } from '../elastic/profile.js';
import type { TrainCapacity } from '../elastic/recipes.js';
import type { LoadOptions } from '../infer/types.js';
import { activationTypes, deviceChoices } from '../native/index.js';
import { type CommandContext, type FlagReader, UsageError } from './command.js';

export const dtypes = ['f32', 'bf16', 'f16'] as const;

/** Flags of commands that load a model. */
export const loadFlags = {
  dtype: { type: 'string', value: 'f32|bf16|f16', help: 'storage of the weights (default: as in the checkpoint)' },
  adapter: { type: 'string', value: 'DIR', help: 'LoRA adapter in PEFT format to run with' },
  device: { type: 'string', value: 'cpu|cuda|simt|auto', help: 'where to run (default: ELASTIFORM_DEVICE, else cpu)' },
  activations: { type: 'string', value: 'f32|bf16', help: 'storage of activations (bf16: on CUDA only)' },
  threads: { type: 'string', value: 'N', help: 'threads of the kernels (default: all cores)' },
} as const;

export function loadOptions({ flags, signal }: CommandContext): LoadOptions {
  const dtype = flags.choice('dtype', dtypes);
  const threads = flags.integer('threads', { min: 1 });
  const adapter = flags.string('adapter');
  const device = flags.choice('device', deviceChoices);
  const activations = flags.choice('activations', activationTypes);
  return {
    ...(dtype ? { dtype } : {}),
    ...(adapter ? { adapter } : {}),
    ...(device ? { device } : {}),
    ...(activations ? { activations } : {}),
    ...(threads ? { threads } : {}),
    signal,
  };
}

/** `0.7`, `full` or the name of a level. */
export function parseLevel(text: string): number | string {
  const value = Number(text);
  if (text.trim() === '' || Number.isNaN(value)) return text;
  if (!(value > 0 && value <= 1))
    throw new UsageError(`[cli] a budget must be in (0, 1], full or a level, got '${text}'`);
  return value;
}

/** The same, or `200ms`, `ttft:200ms`, `tpot:20ms`, `quality:0.95`, `encoder=0,1,2-3;decoder=0-3;ffn=0.5;attn=0.7;mlp=0.5`. */
export function parseBudget(text: string): Budget {
  if (/^((en|de)coder|ffn|attn|mlp)=/.test(text)) return { spec: parseSettings(text) };
  const [, metric = 'total', ms] = /^(?:(ttft|tpot|total):)?([\d.]+)ms$/.exec(text) ?? [];
  if (ms !== undefined) return { latencyMs: Number(ms), metric: metric as LatencyMetric };
  const [, quality] = /^quality:([\d.]+)$/.exec(text) ?? [];
  return quality === undefined ? parseLevel(text) : { minQuality: Number(quality) };
}

/** Parts of both stacks, a width and shares of tokens, as `settingsText` writes them; whether they fit is the model's to say. */
function parseSettings(text: string): ElasticSpec {
  const settings = text.split(';').map((one) => /^(encoder|decoder|ffn|attn|mlp)=(.+)$/.exec(one.trim()) ?? []);
  const { encoder, decoder, ffn, ...others } = Object.fromEntries(settings.map(([, name, value]) => [name, value]));
  const known = settings.every(([, name], i) => name && settings.findIndex(([, other]) => other === name) === i);
  const shareOf = (value: string): Capacity => (value.includes(',') ? value.split(',').map(Number) : Number(value));
  const ffnWidth = ffn === undefined ? undefined : Number(ffn);
  const shares = known ? Object.entries(others).map(([place, value]) => [place, shareOf(value)] as const) : [];
  const numbers = [ffnWidth ?? 1, ...shares.flatMap(([, share]) => share)];
  if (!known || (encoder === undefined) !== (decoder === undefined) || numbers.some(Number.isNaN)) {
    throw new UsageError(
      `[cli] settings must be some of encoder=PARTS;decoder=PARTS, ffn=WIDTH, attn=SHARE and mlp=SHARE, got '${text}'`,
    );
  }
  return {
    ...(encoder && { assembly: { encoder: encoder.split(','), decoder: decoder.split(',') } }),
    ...(ffnWidth !== undefined && { ffnWidth }),
    ...(shares.length > 0 && { tokenCapacity: Object.fromEntries(shares) }),
  };
}

/** What parseBudget takes, for --help. */
export const budgetForms =
  'SHARE|LEVEL|200ms|ttft:200ms|tpot:20ms|quality:0.95|encoder=0,1-2;decoder=0-2;ffn=0.5;mlp=0.5';

/** A flag's share, or range `LOW:HIGH` of shares, to train for. */
export function parseCapacity(flags: FlagReader, name: string): TrainCapacity | undefined {
  const text = flags.string(name);
  if (text === undefined) return undefined;
  const parts = text.split(':').map((part) => (part.trim() === '' ? Number.NaN : Number(part)));
  if (parts.length > 2 || parts.some(Number.isNaN)) {
    throw new UsageError(`[cli] --${name} must be a share or LOW:HIGH, got '${text}'`);
  }
  return parts.length === 1 ? parts[0] : [parts[0], parts[1]];
}

/** Token ids, separated by commas. */
export function parseIds(text: string): number[] {
  if (text.trim() === '') return [];
  return text.split(',').map((part) => {
    if (!/^\s*\d+\s*$/.test(part))
      throw new UsageError(`[cli] --ids must be token ids separated by commas, got '${text}'`);
    return Number(part);
  });
}

export const percent = (share: number, digits = 1): string => `${(share * 100).toFixed(digits)} %`;
