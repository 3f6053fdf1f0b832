// Budgets that say what to reach: the level for a latency by measured times, and for a quality by its lower end.
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { budgetText, resolveBudget } from '../../lib/elastic/budget.js';
import { policyOf } from '../../lib/elastic/elastify.js';
import { type ElasticPolicy, type Level, routerPlaces } from '../../lib/elastic/policy.js';
import {
  type DeviceProfile,
  expectedMs,
  type MeasuredOn,
  Profiles,
  profileDirectory,
  writeProfile,
} from '../../lib/elastic/profile.js';
import { specFromConfig } from '../../lib/model/spec.js';
import { InvalidArgumentError } from '../../lib/native/errors.js';
import { temporaryDirectory } from '../distill/tiny.js';

const spec = specFromConfig(
  {
    ...{ model_type: 'llama', vocab_size: 100, hidden_size: 32, intermediate_size: 64 },
    ...{ num_hidden_layers: 4, num_attention_heads: 4, num_key_value_heads: 2 },
  },
  'config.json',
);
const quality = (value: number, lo: number) => ({ top1_agreement: { value, lo, hi: 1, n: 100 } });
const levels: Level[] = [
  { name: 'full', spec: {} },
  { name: 'low', spec: { tokenCapacity: { mlp: 0.25 } }, quality: quality(0.7, 0.6) },
  { name: 'high', spec: { tokenCapacity: { mlp: 0.75 } }, quality: quality(0.95, 0.9) },
  { name: 'middle', spec: { tokenCapacity: { mlp: 0.5 } }, quality: quality(0.93, 0.85) },
];
const bare = policyOf({ kind: 'elastiformer', tokens: { mlp: [0.3, 1] } }, spec);
const policy: ElasticPolicy = {
  ...bare,
  base: { name: 'tiny', weightsSha256: 'a'.repeat(64), tokenizerSha256: null },
  calibration: {
    ...{ path: [[1, 1, 1, 1]], capacities: [1], points: 2, tokens: 1, sequenceLength: 64 },
    quantiles: new Map(routerPlaces(bare).map(({ id }) => [id, Float32Array.of(0, 1)])),
  },
  levels,
};
const on: MeasuredOn = {
  ...{ device: 'cpu', name: 'A CPU', isa: 'avx2', threads: 2 },
  ...{ dtype: 'f32', activations: 'f32' },
};
const times = (level: string, factor: number) => ({
  ...{ level, spec: levels.find(({ name }) => name === level)!.spec },
  prefillMs: [10, 40, 200].map((t) => t * factor),
  decodeMs: [1, 2, 4].map((t) => t * factor),
});
const profile: DeviceProfile = {
  ...{ version: 1, on, lengths: [10, 50, 100] },
  levels: [times('middle', 0.6), times('low', 0.5), times('full', 1), times('high', 0.8)],
};
const resolve = (budget: unknown, length: number, maxTokens?: number) =>
  resolveBudget(budget as never, spec, policy, { length, maxTokens, profile: () => profile });

describe('expected times', () => {
  const [full] = profile.levels.filter(({ level }) => level === 'full');
  const at = (metric: 'ttft' | 'tpot' | 'total', prompt: number, generated: number) =>
    expectedMs(profile, full, metric, { prompt, generated });

  it.each([
    [1, 10],
    [10, 10],
    [30, 25],
    [50, 40],
    [75, 120],
    [100, 200],
    // On from the last two.
    [150, 360],
  ])('a prompt of %j tokens takes %j ms', (prompt, ms) => {
    expect(at('ttft', prompt, 0)).toBeCloseTo(ms, 9);
    expect(at('total', prompt, 0)).toBeCloseTo(ms, 9);
    expect(at('total', prompt, 1)).toBeCloseTo(ms, 9);
  });

  it('tokens are timed halfway through what is generated', () => {
    expect(at('tpot', 10, 40)).toBeCloseTo(1.5, 9);
    expect(at('total', 10, 41)).toBeCloseTo(10 + 40 * (1 + 20.5 / 40), 9);
  });

  it('a single length is scaled; times that fall are not taken further', () => {
    const one = { ...profile, lengths: [10] };
    expect(expectedMs(one, { ...full, prefillMs: [7] }, 'ttft', { prompt: 30, generated: 0 })).toBeCloseTo(21, 9);
    const falling = { ...full, prefillMs: [10, 40, 30] };
    expect(expectedMs(profile, falling, 'ttft', { prompt: 500, generated: 0 })).toBe(30);
  });
});

describe('a latency budget', () => {
  it.each([
    [{ latencyMs: 10 }, 'full'],
    [{ latencyMs: 9 }, 'high'],
    [{ latencyMs: 6.5 }, 'middle'],
    [{ latencyMs: 5, metric: 'ttft' }, 'low'],
    [{ latencyMs: 1, metric: 'tpot' }, 'full'],
    [{ latencyMs: 0.7, metric: 'tpot' }, 'middle'],
  ])('%j for a short text takes %j', (budget, level) => {
    const point = resolve(budget, 8);
    expect(point.level).toBe(level);
    expect(point.full).toBe(level === 'full');
    expect(point.why).toContain(`${level} is the costliest level within`);
    expect(point.spec).toEqual(levels.find(({ name }) => name === level)!.spec);
  });

  it('counts the tokens of the call: the same target, the longer, the cheaper', () => {
    // 10 tokens of prompt in 10 ms, then one token in 1 to 1.5 ms.
    expect(resolve({ latencyMs: 22 }, 10 + 9, 10).level).toBe('full');
    expect(resolve({ latencyMs: 22 }, 10 + 14, 15).level).toBe('high');
    expect(() => resolve({ latencyMs: 22 }, 10 + 39, 40)).toThrow(
      /no level keeps 22 ms \(total of 10 tokens and 40 generated\): the fastest, low, takes \d+\.\d ms/,
    );
    expect(resolve({ latencyMs: 10, metric: 'ttft' }, 10 + 39, 40).level).toBe('full');
  });

  it('needs times of these levels on this device', () => {
    const other = { ...profile, levels: [{ ...profile.levels[0], spec: { tokenCapacity: { mlp: 0.4 } } }] };
    const ask = (context: object, of: ElasticPolicy | null = policy) =>
      resolveBudget({ latencyMs: 5 }, spec, of, { length: 8, ...context });
    expect(() => ask({ profile: () => other })).toThrow(/are of other levels than the model has; measure again/);
    expect(() => ask({})).toThrow(/needs a loaded model/);
    expect(() => ask({ profile: () => profile }, null)).toThrow(/budget {"latencyMs":5} needs routers/);
  });

  it.each([
    [{ latencyMs: 0 }, /latencyMs must be a positive number, got 0/],
    [{ latencyMs: Number.NaN }, /latencyMs must be a positive number/],
    [{ latencyMs: '5' }, /latencyMs must be a positive number, got "5"/],
    [{ latencyMs: 5, metric: 'p99' }, /metric must be one of total, ttft, tpot, got "p99"/],
    [{ latencyMs: 5, percentile: 99 }, /a budget must be a number in/],
    [{ latencyMs: 5, spec: {} }, /a budget must be a number in/],
    [{ minQuality: 0.5, spec: {} }, /a budget must be a number in/],
  ])('%j is refused', (budget, message) => {
    expect(() => resolve(budget, 8)).toThrow(InvalidArgumentError);
    expect(() => resolve(budget, 8)).toThrow(message);
  });
});

describe('a quality budget', () => {
  it.each([
    [0.5, 'low'],
    [0.6, 'low'],
    [0.61, 'middle'],
    // Measured at 0.93, but not surely.
    [0.9, 'high'],
    [0.91, 'full'],
    [1, 'full'],
  ])('%j takes %j', (minQuality, level) => {
    const point = resolve({ minQuality }, 64);
    expect(point.level).toBe(level);
    expect(point.why).toContain(`${level} is the cheapest level that agrees`);
  });

  it('needs measured levels, and a share', () => {
    const unmeasured = { ...policy, levels: levels.map(({ name, spec }) => ({ name, spec })) };
    expect(() => resolveBudget({ minQuality: 0.5 }, spec, unmeasured)).toThrow(
      /quality of no level was measured yet; measure it: elastiform eval DIR --data FILE --record/,
    );
    for (const minQuality of [0, 1.1, Number.NaN, 'a', null])
      expect(() => resolve({ minQuality }, 8)).toThrow(/minQuality must be in \(0, 1\]/);
  });
});

it('budgets have a text', () => {
  const texts = [0.7, 'p70', { latencyMs: 5 }, { latencyMs: 5, metric: 'ttft' } as const, { minQuality: 0.9 }];
  expect(texts.map(budgetText)).toEqual(['0.7', 'p70', 'total:5ms', 'ttft:5ms', 'quality:0.9']);
});

describe('profiles of a directory', () => {
  it('are of one machine each', async () => {
    const dir = temporaryDirectory();
    await expect(async () => (await Profiles.read(dir)).of(on)).rejects.toThrow(
      /needs times measured on this device \(cpu, A CPU, avx2, 2 threads, .*there are none yet; measure here: elastiform eval .* --record/,
    );
    await writeProfile(dir, profile);
    await writeProfile(dir, { ...profile, on: { ...on, threads: 4 }, lengths: [10, 50, 101] });
    await writeProfile(dir, profile);
    expect(readdirSync(join(dir, profileDirectory))).toHaveLength(2);
    const profiles = await Profiles.read(dir);
    expect(profiles.of(on)).toEqual(profile);
    expect(profiles.of({ ...on, threads: 4 }).lengths).toEqual([10, 50, 101]);
    for (const other of [{ isa: 'neon' }, { threads: 1 }, { name: 'B' }, { dtype: 'bf16' }, { device: 'cuda' }])
      expect(() => profiles.of({ ...on, ...other })).toThrow(/has those of cpu, A CPU, avx2, 2 threads/);
  });

  it.each<[string, (json: Record<string, never>) => unknown, RegExp]>([
    ['another version', (json) => ({ ...json, version: 2 }), /version must be 1, got 2/],
    ['lengths that do not ascend', (json) => ({ ...json, lengths: [1, 1, 2] }), /lengths must be ascending/],
    [
      'a machine without threads',
      (json) => ({ ...json, on: { ...on, threads: '2' } }),
      /on.threads must be an integer/,
    ],
    [
      'times that are no times',
      (json) => ({ ...json, levels: [{ ...profile.levels[0], prefillMs: [1, 0, 2] }] }),
      /levels\[0\].prefillMs must be 3 positive numbers/,
    ],
    ['no levels', (json) => ({ ...json, levels: {} }), /levels must be a list/],
    ['a list', () => [], /the file must be an object/],
  ])('%s is refused when its times are needed, not before', async (_, change, message) => {
    const dir = temporaryDirectory();
    const path = await writeProfile(dir, profile);
    writeFileSync(path, JSON.stringify(change(JSON.parse(readFileSync(path, 'utf8')))));
    const profiles = await Profiles.read(dir);
    expect(() => profiles.of(on)).toThrow(message);
    await writeProfile(dir, { ...profile, on: { ...on, threads: 9 } });
    expect((await Profiles.read(dir)).of({ ...on, threads: 9 }).lengths).toEqual(profile.lengths);
  });
});
