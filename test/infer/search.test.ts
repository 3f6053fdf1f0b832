// Search for widths: what is found is checked against every assignment there is; scores and times of other weights are refused.
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { pretrain } from '../../lib/distill/pretrain.js';
import { elastify } from '../../lib/elastic/elastify.js';
import { writeProfile } from '../../lib/elastic/profile.js';
import { readElastic, writeElastic } from '../../lib/elastic/store.js';
import { extract } from '../../lib/infer/export/extract.js';
import { loadModel } from '../../lib/infer/model.js';
import { profile } from '../../lib/infer/profile.js';
import { evaluate } from '../../lib/infer/quality/evaluate.js';
import { recordSearch, type SearchOptions, search } from '../../lib/infer/quality/search.js';
import { InfeasibleError } from '../../lib/infer/quality/searched.js';
import { stories, temporaryDirectory, tinyPretraining } from '../distill/tiny.js';

const granularities = [0.25, 0.5, 1];
const data = stories(40);
let trained: string;
beforeAll(async () => {
  trained = temporaryDirectory();
  await pretrain(tinyPretraining(trained, { nested: { granularities }, steps: 40 }));
});

/** A copy that may be written to. */
function copy(): string {
  const dir = join(temporaryDirectory(), 'model');
  cpSync(trained, dir, { recursive: true });
  return dir;
}
const scoresFile = () => join(temporaryDirectory(), 'scores.json');
const widths = [16, 32, 64];

describe('search', () => {
  // KL of every assignment of widths, measured by `evaluate`.
  const all = new Map<string, number>();
  beforeAll(async () => {
    await using model = await loadModel(trained);
    const assignments = widths.flatMap((a) => widths.flatMap((b) => widths.map((c) => [a, b, c])));
    const budgets = assignments.slice(0, -1).map((units) => ({ spec: { ffnWidth: units.map((n) => n / 64) } }));
    const report = await evaluate(model, { data, budgets, speed: false });
    report.levels.forEach(({ kl }, i) => {
      all.set(assignments[i].join(), kl.value);
    });
    all.set('64,64,64', 0);
  });
  const params = (units: readonly number[]) => units.reduce((sum, n) => sum + n * 3 * 32, 0);
  const whole = async () => {
    await using model = await loadModel(trained);
    return model.info.parameters;
  };

  test('every score is what evaluate measures; the front has nothing better beside it; greedy reaches the best', async () => {
    await using model = await loadModel(trained);
    const most = (await whole()) - 3 * 64 * 96 + params([32, 32, 32]);
    const limit = 1e6;
    const options: SearchOptions = { data, limit, constraint: { params: most }, scores: scoresFile() };
    const found = await search(model, options);
    for (const { widths, kl, parameters } of found.pareto) {
      expect(kl).toBeCloseTo(all.get(widths.join())!, 5);
      expect(parameters).toBe((await whole()) - 3 * 64 * 96 + params(widths));
    }
    for (const [i, point] of found.pareto.entries()) {
      if (i > 0) expect(point.kl).toBeLessThan(found.pareto[i - 1].kl);
    }
    const feasible = [...all].filter(([key]) => params(key.split(',').map(Number)) <= params([32, 32, 32]));
    const least = Math.min(...feasible.map(([, kl]) => kl));
    expect(found.best!.parameters).toBeLessThanOrEqual(most);
    expect(found.best!.kl).toBeGreaterThanOrEqual(least - 1e-9);
    expect(found.best!.kl).toBeLessThan(1.3 * least);
    expect(found.best!.kl).toBeLessThanOrEqual(all.get('32,32,32')! + 1e-9);
    // Evolution with as many trials as there are assignments finds the best.
    const evolved = await search(model, { ...options, method: 'evolution', trials: 40 });
    expect(evolved.best!.kl).toBeCloseTo(least, 6);
    expect(evolved.reused).toBe(found.measured);
  });

  test('scores are reused: another constraint measures next to nothing, the same one nothing', async () => {
    await using model = await loadModel(trained);
    const scores = scoresFile();
    const first = await search(model, { data, constraint: { flops: 0.7 }, scores, method: 'greedy' });
    expect(first.measured).toBeGreaterThan(5);
    expect(await search(model, { data, constraint: { flops: 0.7 }, scores, method: 'greedy' })).toMatchObject({
      ...{ measured: 0, reused: first.measured, best: first.best },
    });
    const other = await search(model, { data, constraint: { flops: 0.85 }, scores, method: 'mix-n-match' });
    expect(other.measured).toBe(0);
    expect(other.best!.flopsRatio).toBeLessThanOrEqual(0.85);
    await expect(search(model, { data: stories(20), scores })).rejects.toThrow(/scores of other text than these/);
    writeFileSync(
      scores,
      readFileSync(scores, 'utf8').replace(/"weights_sha256": ".{8}/, '"weights_sha256": "00000000'),
    );
    await expect(search(model, { data, scores })).rejects.toThrow(/scores of other weights than these/);
    writeFileSync(scores, '{"version": 2}');
    await expect(search(model, { data, scores })).rejects.toThrow(/version must be 1, got 2/);
  });

  test('the same seed evolves the same, and bytes are those of the extracted model', async () => {
    await using model = await loadModel(trained);
    const [first, second] = [scoresFile(), scoresFile()];
    const evolve = (scores: string) =>
      search(model, { data, constraint: { bytes: 120_000 }, method: 'evolution', trials: 6, scores });
    const found = await evolve(first);
    expect(await evolve(second)).toEqual(found);
    expect(readFileSync(second, 'utf8')).toBe(readFileSync(first, 'utf8'));
    // Besides the ladder, whose seven rungs come first, only what keeps the constraint is measured.
    const measured = Object.keys(JSON.parse(readFileSync(first, 'utf8')).scores).slice(6);
    expect(measured.length).toBeGreaterThan(3);
    const whole = model.info.weightBytes;
    for (const key of measured) {
      const units = key.split(',').reduce((sum, n) => sum + Number(n), 0);
      expect(whole - (3 * 64 - units) * 3 * 32 * 4).toBeLessThanOrEqual(120_000);
    }
    const out = join(temporaryDirectory(), 'out');
    const { best } = found;
    const extracted = await extract(trained, {
      budget: { spec: { ffnWidth: best!.ffnWidth } },
      layout: 'per-layer',
      out,
    });
    expect(extracted).toMatchObject({ bytes: best!.bytes, parameters: best!.parameters });
    expect(best!.bytes).toBeLessThanOrEqual(120_000);
  });

  test('a constraint that nothing keeps names the nearest', async () => {
    await using model = await loadModel(trained);
    const error = await search(model, { data, constraint: { flops: 0.1 }, scores: scoresFile() }).catch((e) => e);
    expect(error).toBeInstanceOf(InfeasibleError);
    expect(error.message).toMatch(
      /no slice has 0.100 of the FLOPs: the nearest, all layers at 0.25 of their units, has 0\.\d+/,
    );
    expect(error.nearest).toMatchObject({ widths: [16, 16, 16] });
    expect(error.nearest.kl).toBeCloseTo(all.get('16,16,16')!, 5);
  });

  test.each<[object, RegExp]>([
    [{ constraint: { params: 0 } }, /constraint must be one of params, flops, bytes, latencyMs/],
    [{ constraint: { params: 9, flops: 1 } }, /constraint must be one of/],
    [{ constraint: { size: 9 } }, /constraint must be one of/],
    [{ constraint: { flops: 0.7, metric: 'ttft' } }, /constraint must be one of/],
    [{ method: 'greedy' }, /method must be mix-n-match without a constraint/],
    [{ method: 'luck', constraint: { flops: 0.7 } }, /method must be one of mix-n-match, greedy, evolution, got luck/],
    [{ sequenceLength: 1 }, /sequenceLength must be from 2 to 64/],
    [{ constraint: { latencyMs: 5 } }, /needs times measured on this device/],
    [{ size: 1 }, /unknown option 'size'/],
  ])('refuses %j', async (more, message) => {
    await using model = await loadModel(trained);
    await expect(search(model, { data, scores: scoresFile(), ...more } as SearchOptions)).rejects.toThrow(message);
  });

  test('what is not nested has nothing to search', async () => {
    const plan = join(temporaryDirectory(), 'plan');
    await elastify(trained, { kind: 'elastiformer' }, { out: plan });
    await using model = await loadModel(plan);
    await expect(search(model, { data, scores: scoresFile() })).rejects.toThrow(/has no nested feed-forwards/);
  });

  test('recorded, budgets choose among what was found, and the best is a level', async () => {
    const dir = copy();
    let found: Awaited<ReturnType<typeof search>>;
    {
      await using model = await loadModel(dir);
      found = await search(model, { data, constraint: { flops: 0.75 }, method: 'evolution', trials: 20 });
      await expect(recordSearch(model, found, 'ffn50')).rejects.toThrow(/cannot be named 'ffn50'/);
      await recordSearch(model, found, 'mine');
    }
    await using model = await loadModel(dir);
    const { nested } = model.network.policy!;
    expect(nested!.searched).toEqual(found.pareto.map(({ widths }) => widths.map((units) => units / 64)));
    expect(model.resolve('mine').widths).toEqual(found.best!.widths);
    for (const { widths, flopsRatio } of found.pareto.slice(0, -1)) {
      expect(model.resolve(flopsRatio + 1e-6, { length: 64 }).widths).toEqual(widths);
    }
    // A file with widths in no order is damaged.
    const elastic = (await readElastic(dir))!;
    const policy = {
      ...elastic.policy,
      nested: {
        ...nested!,
        searched: [
          [0.5, 0.5, 0.5],
          [0.25, 0.25, 0.25],
        ],
      },
    };
    await writeElastic(dir, dir, policy, elastic.routers, elastic.lora);
    await expect(readElastic(dir)).rejects.toThrow(/ffn.searched\[1\] must be wider than the one before/);
  });
});

describe('times', () => {
  test('of prompts together are measured and kept; times of other weights are refused', async () => {
    const dir = copy();
    await using model = await loadModel(dir);
    const times = await profile(model, { ids: [1, 2, 3], lengths: [4, 16], batches: [3] });
    expect(times.batches).toHaveLength(times.levels.length);
    for (const { batch, prefillMs } of times.batches!) {
      expect(batch).toBe(3);
      expect(prefillMs.every((ms) => ms > 0)).toBe(true);
    }
    await expect(profile(model, { ids: [1], batches: [0] })).rejects.toThrow(/batches must be numbers of prompts/);
    await writeProfile(dir, times);
    await using timed = await loadModel(dir);
    expect(timed.resolve({ latencyMs: 1e6 }).level).toBe('full');
    await writeProfile(dir, { ...times, weightsSha256: '0'.repeat(64) });
    await using changed = await loadModel(dir);
    expect(() => changed.resolve({ latencyMs: 1e6 })).toThrow(
      /of other weights than it has: the checkpoint was changed/,
    );
  });

  test('of one width in all layers give those of any widths', async () => {
    const dir = copy();
    let times: Awaited<ReturnType<typeof profile>>;
    {
      await using model = await loadModel(dir);
      times = await profile(model, { ids: [1], lengths: [8] });
    }
    // 10 ms whole, 7 at a half, 4 at a quarter; levels of mixed widths do not count.
    const ms = (ffnWidth: unknown) => ({ 0.25: 4, 0.5: 7 })[String(ffnWidth)] ?? (ffnWidth === undefined ? 10 : 1);
    const levels = times.levels.map((level) => ({ ...level, prefillMs: [ms(level.spec.ffnWidth)], decodeMs: [1] }));
    await writeProfile(dir, { ...times, levels });
    await using model = await loadModel(dir);
    const options = { data, sequenceLength: 8, scores: scoresFile() };
    const { best } = await search(model, { ...options, constraint: { latencyMs: 8, metric: 'ttft' } });
    const expected = ({ widths }: { widths: readonly number[] }) =>
      widths.reduce((sum, units) => sum + { 16: 4, 32: 7, 64: 10 }[units]! / 3, 0);
    expect(best!.latencyMs).toBeCloseTo(expected(best!), 9);
    expect(best!.latencyMs).toBeLessThanOrEqual(8);
    expect(best!.widths).not.toEqual([32, 32, 32]);
    const error = await search(model, { ...options, constraint: { latencyMs: 3, metric: 'ttft' } }).catch((e) => e);
    expect(error.message).toMatch(/no slice has 3.000 ms: the nearest, .* has 4.000 ms/);
  });
});
