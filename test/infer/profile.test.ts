// Measuring a model for budgets by latency and quality, and calls that use what was measured.
import { cpSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { profileDirectory, writeProfile } from '../../lib/elastic/profile.js';
import { readElastic, writeLevels } from '../../lib/elastic/store.js';
import { type ElasticModel, loadModel } from '../../lib/infer/model.js';
import { profile } from '../../lib/infer/profile.js';
import { evaluate } from '../../lib/infer/quality/evaluate.js';
import { recordQuality } from '../../lib/infer/quality/quality.js';
import { InvalidArgumentError } from '../../lib/native/errors.js';
import { loadAddon } from '../../lib/native/index.js';
import { stories, temporaryDirectory } from '../distill/tiny.js';
import { exitClassifier } from './exits.js';
import { elasticDirectories } from './fixture.js';

let dir: string;
let model: ElasticModel;
const ids = [5, 9, 11, 7, 12];
beforeAll(async () => {
  dir = (await elasticDirectories()).elastic;
  model = await loadModel(dir);
});
afterAll(() => model.dispose());

describe('profile', () => {
  it('times full and every level of the model, on this machine', async () => {
    const phases: string[] = [];
    const times = await profile(model, { ids, lengths: [4, 20], onProgress: ({ phase }) => phases.push(phase) });
    const names = ['full', ...model.info.levels.map(({ name }) => name).filter((name) => name !== 'full')];
    expect(times.levels.map(({ level }) => level)).toEqual(names);
    expect(phases).toEqual(names.map((name) => `times of ${name}`));
    const { isa, threads } = loadAddon().info();
    expect(times.on).toMatchObject({ device: model.network.engine.device, isa, threads, dtype: 'f32' });
    for (const { prefillMs, decodeMs } of times.levels) {
      for (const ms of [prefillMs, decodeMs!]) {
        expect(ms).toHaveLength(2);
        expect(ms.every((t) => t > 0 && t < 60_000)).toBe(true);
      }
    }
    const full = times.levels[0];
    // Five times the rows in one run, against one row.
    expect(full.prefillMs[1]).toBeGreaterThan(full.decodeMs![1] / 2);
  });

  it('lengths and ids are checked, and a signal ends it', async () => {
    const { maxContext } = model.info;
    for (const lengths of [[], [0], [2, 2], [1.5], [maxContext]])
      await expect(profile(model, { ids, lengths })).rejects.toThrow(
        /lengths must be ascending numbers of tokens up to/,
      );
    await expect(profile(model, { ids: [] })).rejects.toThrow(/ids must hold a token/);
    await expect(profile(model, { ids, signal: AbortSignal.abort() })).rejects.toThrow();
  });
});

describe('a model with times', () => {
  let timed: ElasticModel;
  beforeAll(async () => {
    const copy = join(temporaryDirectory(), 'timed');
    cpSync(dir, copy, { recursive: true });
    const { levels, measuredOn } = { levels: model.info.levels, measuredOn: model.network.measuredOn() };
    // Levels in order take 100, 90, 80, ... ms for any prompt and 10, 9, 8, ... ms for a token.
    const times = levels.map(({ name, spec }, i) => ({
      ...{ level: name, spec },
      ...{ prefillMs: [100 - 10 * i, 100 - 10 * i], decodeMs: [10 - i, 10 - i] },
    }));
    await writeProfile(copy, { version: 1, on: measuredOn, lengths: [1, 64], levels: times });
    timed = await loadModel(copy);
  });
  afterAll(() => timed.dispose());

  it('generates, scores and traces at the level that keeps the time', async () => {
    const [first, second, third] = timed.info.levels.map(({ name }) => name);
    expect(first).toBe('full');
    // 100 ms and five more tokens of 10 ms.
    const level = async (latencyMs: number, more: object = {}) => {
      const budget = { latencyMs, ...more };
      const { compute } = await timed.generate(ids, { budget, maxTokens: 6 }).usage;
      expect(compute.requested).toEqual(budget);
      return compute;
    };
    expect(await level(150)).toMatchObject({ level: first, ratio: 1 });
    const less = await level(149);
    expect(less.level).toBe(second);
    expect(less.ratio).toBeLessThan(1);
    expect((await level(9, { metric: 'tpot' })).level).toBe(second);
    expect((await level(85, { metric: 'ttft' })).level).toBe(third);
    expect(() => timed.generate(ids, { budget: { latencyMs: 20 }, maxTokens: 6 })).toThrow(/no level keeps 20 ms/);

    // Nothing is generated: the whole text is the prompt.
    const [a, b] = await timed.score([ids, ids], { budget: [{ latencyMs: 100 }, { latencyMs: 99 }] });
    expect([a.usage.compute.level, b.usage.compute.level]).toEqual([first, second]);
    expect(timed.resolve({ latencyMs: 99 }, { length: 5 })).toMatchObject({ level: second });
    expect(timed.resolve({ latencyMs: 130 }, { length: 10, maxTokens: 4 })).toMatchObject({ level: first });
    expect(timed.resolve({ latencyMs: 130 }, { length: 10, maxTokens: 5 })).toMatchObject({ level: second });
    expect((await timed.trace(ids, { budget: { latencyMs: 99 } })).layers).toBe(timed.info.layers);
  });

  it('does not take the times for another number of threads', () => {
    const { threads } = loadAddon().info();
    try {
      loadAddon().setThreads(threads + 1);
      expect(() => timed.resolve({ latencyMs: 1000 })).toThrow(/needs times measured on this device/);
    } finally {
      loadAddon().setThreads(threads);
    }
    expect(timed.resolve({ latencyMs: 1000 }).level).toBe('full');
  });
});

describe('recordQuality', () => {
  const data = stories(60);

  it('keeps agreement and KL of named levels; a loaded model then serves quality budgets', async () => {
    const copy = join(temporaryDirectory(), 'measured');
    cpSync(dir, copy, { recursive: true });
    const names = model.info.levels.map(({ name }) => name).slice(0, 3);
    const report = await evaluate(model, { data, budgets: [...names, 0.8], sequenceLength: 48, speed: false });
    expect(await recordQuality(copy, report)).toEqual(names.slice(1));
    const { policy } = (await readElastic(copy))!;
    const routed = report.levels.find(({ budget }) => budget === names[1])!;
    expect(policy.levels[1].quality).toEqual({
      top1_agreement: {
        ...{ value: routed.agreement.value, n: report.tokens },
        ...{ lo: routed.agreement.low, hi: routed.agreement.high },
      },
      kl: { value: routed.kl.value, lo: routed.kl.low, hi: routed.kl.high, n: report.tokens },
    });
    expect(policy.levels[0].quality).toBeUndefined();

    await using measured = await loadModel(copy);
    const below = routed.agreement.low;
    expect(measured.resolve({ minQuality: below }).level).not.toBe('full');
    const { compute } = await measured.generate(ids, { budget: { minQuality: 1 }, maxTokens: 2 }).usage;
    expect(compute).toMatchObject({ level: 'full', ratio: 1 });
  });

  it('refuses what has no interval or names no level, and leaves the directory alone', async () => {
    const before = readFileSync(join(dir, 'elastic_config.json'), 'utf8');
    const options = { data, sequenceLength: 48, speed: false, limit: 2000 };
    const few = await evaluate(model, { ...options, budgets: [model.info.levels[1].name], limit: 96 });
    await expect(recordQuality(dir, few)).rejects.toThrow(/quality needs at least 8 sequences for its interval, got/);
    const shares = await evaluate(model, { ...options, budgets: ['full', 0.8] });
    await expect(recordQuality(dir, shares)).rejects.toThrow(/no level of .* by name/);
    await expect(recordQuality(temporaryDirectory(), shares)).rejects.toThrow(InvalidArgumentError);
    expect(readFileSync(join(dir, 'elastic_config.json'), 'utf8')).toBe(before);
    expect(readdirSync(dir)).not.toContain(profileDirectory);
  });
});

describe('an encoder with exits', () => {
  let own: string;
  const text = [2, ...Array.from({ length: 50 }, (_, i) => 5 + ((i * i) % 80)), 3];
  beforeAll(async () => {
    own = await exitClassifier();
    await writeLevels(own, [
      { name: 'full', spec: {} },
      { name: 'deep', spec: { exit: { rule: 'maxprob', threshold: 0.8 } }, flopsRatio: 0.85 },
      { name: 'fast', spec: { exit: { rule: 'margin', threshold: 0.3 } }, flopsRatio: 0.5 },
    ]);
  });

  it('is timed at every level by texts of the lengths asked for', async () => {
    await using encoder = await loadModel(own);
    const classify = vi.spyOn(encoder, 'classify');
    const times = await profile(encoder, { ids: text, lengths: [3, 12] });
    expect(times.levels.map(({ level }) => level)).toEqual(['full', 'deep', 'fast']);
    for (const { prefillMs, decodeMs } of times.levels) {
      expect(prefillMs).toHaveLength(2);
      expect(prefillMs.every((t) => t > 0 && t < 60_000)).toBe(true);
      expect(decodeMs).toBeUndefined();
    }
    const timed = classify.mock.calls.map(([[ids]]) => ids as number[]);
    expect(new Set(timed.map(({ length }) => length))).toEqual(new Set([3, 12]));
    for (const ids of timed) expect([ids[0], ids.at(-1)]).toEqual([2, 3]);
    // Where texts leave differs, so levels with exits are timed on several.
    expect(new Set(timed.map(String)).size).toBeGreaterThan(8);
    await expect(profile(encoder, { ids: text, batches: [2] })).rejects.toThrow(/batches are for decoders/);
    await expect(profile(encoder, { ids: text, lengths: [25] })).rejects.toThrow(
      /ascending numbers of tokens up to 24/,
    );
  });

  it('takes budgets by time, for texts of a length', async () => {
    await using bare = await loadModel(own);
    await expect(bare.classify('The cat', { budget: { latencyMs: 5 } })).rejects.toThrow(
      /needs times measured on this device .* measure here: elastiform profile/,
    );
    const { levels } = bare.info;
    // 100, 80 and 60 ms of two tokens, ten times that of 22.
    const times = levels.map(({ name, spec }, i) => ({ level: name, spec, prefillMs: [100 - 20 * i, 1000 - 200 * i] }));
    const on = bare.encoder.network.measuredOn();
    await writeProfile(own, { version: 1, on, lengths: [2, 22], levels: times });
    await using timed = await loadModel(own);
    for (const [length, latencyMs, level] of [
      [2, 100, 'full'],
      [2, 99, 'deep'],
      [12, 500, 'deep'],
      [12, 400, 'fast'],
    ] as const) {
      expect(timed.resolve({ latencyMs }, { length }).level).toBe(level);
    }
    // Calls mean texts as long as the context, which holds fewer than 128 tokens: 1090, 872 and 654 ms.
    for (const [latencyMs, level] of [
      [1100, 'full'],
      [900, 'deep'],
      [700, 'fast'],
    ] as const) {
      const [{ compute }] = await timed.classify('The cat', { budget: { latencyMs } });
      expect(compute.level).toBe(level);
      expect(compute.requested).toEqual({ latencyMs });
    }
    await expect(timed.classify('The cat', { budget: { latencyMs: 600 } })).rejects.toThrow(
      /the fastest, fast, takes 654/,
    );
    await expect(timed.classify('a', { budget: { latencyMs: 600, metric: 'tpot' } })).rejects.toThrow(
      /metric must be total or ttft: .* is an encoder/,
    );
    expect(() => timed.resolve('full', { maxTokens: 3 })).toThrow(/unknown option 'maxTokens'/);
  });
});
