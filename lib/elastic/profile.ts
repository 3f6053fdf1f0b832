// Times of a model's levels on one device, kept beside the model in `profiles/`, and what a call would take by them.
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { inFileSystem, readJson, writeFileAtomic } from '../io/files.js';
import { ElastiformError, InvalidArgumentError } from '../native/errors.js';
import type { ElasticSpec } from './axes.js';
import { type Json, Reader } from './reader.js';

export const profileDirectory = 'profiles';

/** What times depend on besides the model: those of one machine say nothing about another. */
export interface MeasuredOn {
  /** `cpu`, `cuda` or `simt` */
  device: string;
  /** Of the processor or GPU. */
  name: string;
  /** Instruction set in use. */
  isa: string;
  /** Of the kernels. */
  threads: number;
  /** Storage of weights and of activations. */
  dtype: string;
  activations: string;
}

/** Medians, in milliseconds, at the lengths of the profile. */
export interface LevelTimes {
  level: string;
  spec: ElasticSpec;
  /** From a prompt of so many tokens to the token after it; of an encoder, reading a text of so many. */
  prefillMs: readonly number[];
  /** One further token after so many; absent of an encoder. */
  decodeMs?: readonly number[];
}

/** Medians, in milliseconds, of several prompts of equal length in one run, until the token after each. */
export interface BatchTimes {
  level: string;
  spec: ElasticSpec;
  /** Prompts. */
  batch: number;
  /** At the lengths of the profile. */
  prefillMs: readonly number[];
}

/** Times of a model's levels on one machine. */
export interface DeviceProfile {
  version: 1;
  /** The machine. */
  on: MeasuredOn;
  /** SHA-256 of the weights that were timed. */
  weightsSha256?: string;
  /** Tokens, ascending. */
  lengths: readonly number[];
  levels: readonly LevelTimes[];
  batches?: readonly BatchTimes[];
}

/** `cpu, AMD EPYC, avx512, 2 threads, weights f32, activations f32` */
export const describeMachine = ({ device, name, isa, threads, dtype, activations }: MeasuredOn): string =>
  `${device}, ${name}, ${isa}, ${threads} threads, weights ${dtype}, activations ${activations}`;

// Readable, and one for each machine.
function fileName(on: MeasuredOn): string {
  const text = describeMachine(on);
  const words = text.toLowerCase().replaceAll(/[^a-z0-9]+/g, '-');
  return `${words.slice(0, 80)}-${createHash('sha256').update(text).digest('hex').slice(0, 8)}.json`;
}

/** The profiles of a directory; a file that is damaged is an error only for who asks for its machine's times. */
export class Profiles {
  private constructor(
    private readonly dir: string,
    private readonly profiles: readonly DeviceProfile[],
    private readonly broken: ElastiformError | null,
    private readonly weightsSha256: string | null,
    private readonly how: string,
  ) {}

  /**
   * @param weightsSha256 of the model's weights; null: not known
   * @param how times are measured, for a person
   */
  static async read(
    dir: string,
    weightsSha256: string | null = null,
    how = `elastiform eval ${dir} --data FILE --record`,
  ): Promise<Profiles> {
    const folder = join(dir, profileDirectory);
    const names = existsSync(folder) ? await inFileSystem('read', folder, () => readdir(folder)) : [];
    const profiles: DeviceProfile[] = [];
    let broken: ElastiformError | null = null;
    for (const name of names.filter((file) => file.endsWith('.json')).sort()) {
      const path = join(folder, name);
      try {
        profiles.push(profileFromJson(await readJson(path), path));
      } catch (error) {
        if (!(error instanceof ElastiformError)) throw error;
        broken = error;
      }
    }
    return new Profiles(dir, profiles, broken, weightsSha256, how);
  }

  /**
   * The times of this machine.
   * @throws InvalidArgumentError when only others were measured, or none, or the weights have changed since; InvalidDataError
   *   when a file is damaged.
   */
  of(on: MeasuredOn): DeviceProfile {
    const wanted = describeMachine(on);
    const found = this.profiles.find((profile) => describeMachine(profile.on) === wanted);
    if (found && this.weightsSha256 && found.weightsSha256 && found.weightsSha256 !== this.weightsSha256) {
      throw new InvalidArgumentError(
        `[budget] the times of this device in ${this.dir} are of other weights than it has: the checkpoint was changed since; measure again: ${this.how}`,
      );
    }
    if (found) return found;
    if (this.broken) throw this.broken;
    const others = this.profiles.map((profile) => ` ${describeMachine(profile.on)};`);
    throw new InvalidArgumentError(
      `[budget] a latency budget needs times measured on this device (${wanted}); ${others.length > 0 ? `${this.dir} has those of${others.join('')}` : 'there are none yet;'} measure here: ${this.how}`,
    );
  }
}

/** Writes a profile into an elastic directory, over an earlier one of the same machine. Returns its path. */
export async function writeProfile(dir: string, profile: DeviceProfile): Promise<string> {
  const folder = join(dir, profileDirectory);
  await inFileSystem('create', folder, () => mkdir(folder, { recursive: true }));
  const path = join(folder, fileName(profile.on));
  await writeFileAtomic(path, `${JSON.stringify(profile, null, 2)}\n`);
  return path;
}

function profileFromJson(json: unknown, file: string): DeviceProfile {
  const read = new Reader(file, []);
  const root = read.object(json, '');
  if (root.version !== 1) read.fail('version', '1', root.version);
  const on = read.object(root.on, 'on');
  const text = (key: string) => read.string(on[key], `on.${key}`);
  if (!Number.isInteger(on.threads)) read.fail('on.threads', 'an integer', on.threads);
  const lengths = read.numbers(root.lengths, 'lengths');
  const ascend = lengths.every((n, i) => Number.isInteger(n) && n > (i === 0 ? 0 : lengths[i - 1]));
  if (lengths.length === 0 || !ascend) read.fail('lengths', 'ascending numbers of tokens', lengths);
  if (!Array.isArray(root.levels)) read.fail('levels', 'a list', root.levels);
  const timesOf = (level: Json, key: string, name: string): number[] => {
    const ms = read.numbers(level[name], `${key}.${name}`);
    if (ms.length !== lengths.length || ms.some((t) => !(t > 0 && Number.isFinite(t))))
      read.fail(`${key}.${name}`, `${lengths.length} positive numbers`, ms);
    return ms;
  };
  const levelOf = (entry: unknown, key: string) => {
    const level = read.object(entry, key);
    const spec = read.object(level.spec, `${key}.spec`) as ElasticSpec;
    const prefillMs = timesOf(level, key, 'prefillMs');
    return { json: level, level: read.string(level.level, `${key}.level`), spec, prefillMs };
  };
  const levels = (root.levels as unknown[]).map((entry, i): LevelTimes => {
    const { json, ...level } = levelOf(entry, `levels[${i}]`);
    return { ...level, ...(json.decodeMs !== undefined && { decodeMs: timesOf(json, `levels[${i}]`, 'decodeMs') }) };
  });
  const list = root.batches ?? [];
  if (!Array.isArray(list)) read.fail('batches', 'a list', list);
  const batches = (list as unknown[]).map((entry, i): BatchTimes => {
    const { json, ...level } = levelOf(entry, `batches[${i}]`);
    const batch = json.batch as number;
    if (!Number.isInteger(batch) || batch < 1) read.fail(`batches[${i}].batch`, 'a positive integer', batch);
    return { ...level, batch };
  });
  const [device, name, isa, dtype, activations] = ['device', 'name', 'isa', 'dtype', 'activations'].map(text);
  return {
    version: 1,
    on: { device, name, isa, threads: on.threads as number, dtype, activations },
    ...(root.weightsSha256 !== undefined && { weightsSha256: read.string(root.weightsSha256, 'weightsSha256') }),
    lengths,
    levels,
    ...(batches.length > 0 && { batches }),
  };
}

/** What of a call's time is meant: until the first token, from token to token, or all of it. */
export type LatencyMetric = 'ttft' | 'tpot' | 'total';
export const latencyMetrics: readonly LatencyMetric[] = ['total', 'ttft', 'tpot'];

/** Milliseconds a call takes at a level: a prompt, and then `generated` tokens, of which the first comes with the prompt. */
export function expectedMs(
  { lengths }: DeviceProfile,
  { prefillMs, decodeMs }: LevelTimes,
  metric: LatencyMetric,
  { prompt, generated }: { prompt: number; generated: number },
): number {
  const first = timeAt(lengths, prefillMs, prompt);
  if (metric === 'ttft' || !decodeMs) return first;
  // Every token has one more before it than the last; halfway stands for all.
  const next = timeAt(lengths, decodeMs, prompt + generated / 2);
  return metric === 'tpot' ? next : first + Math.max(generated - 1, 0) * next;
}

// On straight lines through what was measured: shorter calls take the shortest's time, longer ones go on as the last two.
function timeAt(lengths: readonly number[], ms: readonly number[], tokens: number): number {
  if (tokens <= lengths[0]) return ms[0];
  if (lengths.length === 1) return (ms[0] * tokens) / lengths[0];
  const found = lengths.findIndex((length) => tokens <= length);
  const to = found < 0 ? lengths.length - 1 : found;
  const slope = (ms[to] - ms[to - 1]) / (lengths[to] - lengths[to - 1]);
  // Longer contexts are not faster, whatever the last two times say.
  return ms[to] + (found < 0 ? Math.max(slope, 0) : slope) * (tokens - lengths[to]);
}
