// Self-distillation end to end on a tiny model: learning, resuming to the same bits, thread counts, failures.
import { cpSync, existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type DistillConfig, distill } from '../../lib/distill/distill.js';
import type { TrainEvent } from '../../lib/distill/events.js';
import { resolveBudget } from '../../lib/elastic/budget.js';
import { elastify } from '../../lib/elastic/elastify.js';
import { readElastic, routerFile } from '../../lib/elastic/store.js';
import { LOCK_FILE, lockDirectory, sha256File } from '../../lib/io/files.js';
import { openSafetensors } from '../../lib/io/safetensors.js';
import { loadAddon } from '../../lib/native/index.js';
import { readSpec } from '../model/golden.js';
import { stories, temporaryDirectory, tinyModel } from './tiny.js';

const root = temporaryDirectory();
const model = join(root, 'model');
const plan = join(root, 'plan');
const threads = loadAddon().info().threads;

beforeAll(async () => {
  await tinyModel(model);
  await elastify(model, { kind: 'elastiformer' }, { out: plan });
});
afterAll(() => loadAddon().setThreads(threads));

let runs = 0;
const fresh = (): string => join(root, `run-${runs++}`);
const config = (out: string, more: Partial<DistillConfig> = {}): DistillConfig => ({
  plan,
  out,
  data: { kind: 'documents', documents: stories(120) },
  steps: 10,
  batchTokens: 128,
  sequenceLength: 32,
  saveEvery: 5,
  seed: 7,
  calibrationTokens: 512,
  ...more,
});

/** Everything that decides what a trained directory computes, and its optimizer. */
async function bits(out: string, step = 10): Promise<Record<string, string>> {
  const files = [
    routerFile,
    ...['trainable', 'optimizer'].map((n) => `checkpoints/step-${String(step).padStart(6, '0')}/${n}.safetensors`),
  ];
  return Object.fromEntries(await Promise.all(files.map(async (f) => [f, await sha256File(join(out, f))])));
}

const losses = (out: string): number[] =>
  readFileSync(join(out, 'metrics.jsonl'), 'utf8')
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line))
    .filter((event) => event.type === 'step')
    .map((event) => event.loss);

describe('distill', () => {
  it('lowers the divergence and writes a calibrated elastic directory', async () => {
    const out = fresh();
    const events: TrainEvent[] = [];
    const result = await distill(
      config(out, {
        steps: 80,
        optimizer: { lr: 2e-2 },
        evalData: { kind: 'documents', documents: stories(140).slice(120) },
        evalEvery: 40,
        onEvent: (event) => void events.push(event),
      }),
    );
    expect(result).toMatchObject({ dir: out, step: 80, stopped: 'done' });
    const evals = events.filter((e) => e.type === 'eval');
    expect(evals.map((e) => e.step)).toEqual([0, 40, 80]);
    const mean = (e: (typeof evals)[0]) => Object.values(e.levels).reduce((sum, level) => sum + level.kl, 0);
    expect(mean(evals[2])).toBeLessThan(0.8 * mean(evals[0]));
    expect(result.best?.metric).toBeCloseTo(Math.min(...evals.map((e) => mean(e) / Object.keys(e.levels).length)), 9);

    const elastic = (await readElastic(out))!;
    expect(elastic.warnings).toEqual([]);
    expect(elastic.policy.calibration?.capacities).toHaveLength(8);
    expect(elastic.policy.levels.map((l) => l.name)).toContain('p70');
    expect(resolveBudget(0.7, readSpec(out), elastic.policy).thresholds.size).toBe(6);
    expect(await sha256File(join(out, 'model.safetensors'))).toBe(await sha256File(join(plan, 'model.safetensors')));
    const steps = events.filter((e) => e.type === 'step');
    expect(steps).toHaveLength(80);
    expect(steps[0]).toMatchObject({ of: 80, terms: { kl: expect.any(Number), 'topk-bce': expect.any(Number) } });
    expect(steps[0].memoryBytes).toBeGreaterThan(0);
    expect(readdirSync(join(out, 'checkpoints')).length).toBeLessThanOrEqual(3);
    expect(existsSync(join(out, LOCK_FILE))).toBe(false);
  });

  it('resumes to the same bits after being killed, repeating no metric', async () => {
    const straight = fresh();
    const killed = fresh();
    await distill(
      config(straight, {
        onEvent: (event) => {
          // The directory as it was when the process died in step 8, its last checkpoint at 5.
          if (event.type === 'step' && event.step === 7) cpSync(straight, killed, { recursive: true });
        },
      }),
    );
    rmSync(join(killed, LOCK_FILE));
    expect(losses(killed)).toHaveLength(7);
    writeFileSync(join(killed, 'metrics.jsonl'), `${readFileSync(join(killed, 'metrics.jsonl'), 'utf8')}{"type":"st`);
    const seen: number[] = [];
    await distill(config(killed, { onEvent: (event) => void (event.type === 'step' && seen.push(event.step)) }));
    expect(seen).toEqual([6, 7, 8, 9, 10]);
    expect(await bits(killed)).toEqual(await bits(straight));
    expect(losses(killed)).toEqual(losses(straight));
  });

  it('saves when aborted, and continues to the same bits', async () => {
    const straight = fresh();
    await distill(config(straight));
    const out = fresh();
    const abort = new AbortController();
    const first = await distill(
      config(out, {
        signal: abort.signal,
        onEvent: (event) => void (event.type === 'step' && event.step === 3 && abort.abort()),
      }),
    );
    expect(first).toMatchObject({ step: 3, stopped: 'signal' });
    expect(readdirSync(join(out, 'checkpoints'))).toEqual(['step-000003']);
    expect(existsSync(join(out, routerFile))).toBe(false);
    expect(await distill(config(out))).toMatchObject({ step: 10, stopped: 'done' });
    expect(await bits(out)).toEqual(await bits(straight));
  });

  it('has the same bits with any number of threads, and with blocks recomputed', async () => {
    const outs: string[] = [];
    for (const [count, gradCheckpointing] of [
      [1, false],
      [2, false],
      [3, true],
    ] as const) {
      loadAddon().setThreads(count);
      outs.push(fresh());
      await distill(config(outs.at(-1)!, { gradCheckpointing, gradAccumulation: 2 }));
    }
    loadAddon().setThreads(threads);
    const all = await Promise.all(outs.map((out) => bits(out)));
    expect(all[1]).toEqual(all[0]);
    expect(all[2]).toEqual(all[0]);
  });

  it('starts from an exact teacher: at capacity 1 the divergence is exactly 0', async () => {
    const full = join(root, 'full');
    await elastify(model, { kind: 'elastiformer', tokens: { attn: 1, mlp: 1 } }, { out: full });
    const out = fresh();
    await distill(config(out, { plan: full, steps: 2, loss: [{ kind: 'kl', weight: 1 }] }));
    expect(losses(out)).toEqual([0, 0]);
  });

  it('trains one place alone, raw gates, and a trained directory further', async () => {
    const raw = join(root, 'raw');
    await elastify(model, { kind: 'elastiformer', tokens: { mlp: 0.5 }, gate: 'raw', layers: [1] }, { out: raw });
    const out = fresh();
    await distill(config(out, { plan: raw }));
    const elastic = (await readElastic(out))!;
    expect(elastic.policy.calibration?.path[0]).toEqual([1]);
    expect(elastic.policy.calibration?.path.length).toBeGreaterThan(1);
    expect([...elastic.routers.values()][0].weight.some((v) => v !== 0)).toBe(true);
    const further = fresh();
    await distill(config(further, { plan: out, steps: 3 }));
    expect(await readElastic(further)).not.toBeNull();
  });

  it('stops early when asked to by an event, or when the held-out data stops getting better', async () => {
    const asked = await distill(
      config(fresh(), { onEvent: (e) => (e.type === 'step' && e.step === 4 ? 'stop' : undefined) }),
    );
    expect(asked).toMatchObject({ step: 4, stopped: 'early' });
    const stale = await distill(
      config(fresh(), { heldOut: 0.2, evalEvery: 1, earlyStop: { patience: 2, minDelta: 1e9 } }),
    );
    expect(stale).toMatchObject({ step: 2, stopped: 'early', best: { step: 0 } });
  });
});

describe('refusals', () => {
  const refused = async (change: Partial<Record<keyof DistillConfig, unknown>>, out = fresh()) => {
    const error = await distill(config(out, change as Partial<DistillConfig>)).catch((e) => e);
    expect(error).toBeInstanceOf(Error);
    return `${error.code}: ${error.message}`;
  };

  it.each([
    [{ colour: 1 }, /InvalidArgument: \[distill\] unknown option 'colour'/],
    [{ steps: 0 }, /steps must be a positive integer, got 0/],
    [{ steps: undefined }, /exactly one of steps and epochs/],
    [{ epochs: 1 }, /exactly one of steps and epochs/],
    [{ batchTokens: 8 }, /a batch of 8 rows cannot hold a sequence of 32 tokens/],
    [{ sequenceLength: 100 }, /at most the model's 64 positions, got 100/],
    [{ optimizer: { lr: -1 } }, /optimizer.lr must be a positive number, got -1/],
    [{ optimizer: { rate: 1 } }, /unknown optimizer option 'rate'/],
    [{ optimizer: { schedule: 'step' } }, /schedule must be cosine, linear or constant/],
    [{ loss: [{ kind: 'mse', weight: 1 }] }, /a loss must be one of kl, .*capacity, got "mse"/],
    [{ loss: [{ kind: 'topk-bce', weight: 1 }] }, /loss must have a term of the student's output/],
    [{ loss: [{ kind: 'kl', weight: 0 }] }, /weight of kl must be positive/],
    [{ resume: 'yes' }, /resume must be 'auto' or false/],
    [{ plan: model }, /has no routers to train/],
    [{ plan: join(root, 'none') }, /none/],
    [{ data: { kind: 'documents', documents: [] } }, /InvalidData: \[data\] the data set is empty/],
    [{ evalData: { kind: 'documents', documents: ['a'] }, heldOut: 0.1 }, /evalData or heldOut, not both/],
  ])('of %j', async (change, message) => {
    expect(await refused(change as Record<string, unknown>)).toMatch(message);
  });

  it('of an output directory that another run holds', async () => {
    const out = fresh();
    cpSync(plan, out, { recursive: true });
    const lock = await lockDirectory(out);
    expect(await refused({}, out)).toMatch(/FileSystem: .*is being written by process/);
    await lock.release();
  });

  it('of a checkpoint made with other settings, or damaged', async () => {
    const out = fresh();
    await distill(config(out, { steps: 4, saveEvery: 2 }));
    expect(await refused({ steps: 4, seed: 8 }, out)).toMatch(
      /InvalidData: \[resume\].*made with seed = 7, this run has 8/,
    );
    expect(await refused({ steps: 4, data: { kind: 'documents', documents: ['other text'] } }, out)).toMatch(
      /made with data/,
    );
    const file = join(out, 'checkpoints/step-000004/trainable.safetensors');
    const content = readFileSync(file);
    content[content.length - 1] ^= 1;
    writeFileSync(file, content);
    expect(await refused({ steps: 4, saveEvery: 2 }, out)).toMatch(/InvalidData: \[resume\].*does not match the hash/);
    // Starting anew is always possible.
    await distill(config(out, { steps: 4, resume: false }));
  });

  it('of weights that give no finite output', async () => {
    const broken = join(root, 'broken');
    await tinyModel(broken);
    const path = join(broken, 'model.safetensors');
    const bytes = readFileSync(path);
    using file = openSafetensors(path);
    const header = JSON.parse(bytes.subarray(8, 8 + Number(bytes.readBigUInt64LE(0))).toString());
    const [begin] = header['model.norm.weight'].data_offsets;
    expect(file.has('model.norm.weight')).toBe(true);
    bytes.writeFloatLE(Number.NaN, 8 + Number(bytes.readBigUInt64LE(0)) + begin);
    rmSync(path);
    writeFileSync(path, bytes);
    const out = join(root, 'broken-plan');
    await elastify(broken, { kind: 'elastiformer' }, { out });
    const run = fresh();
    expect(await refused({ plan: out }, run)).toMatch(/InvalidData: \[distill\] without layers.0.attn.token .* is NaN/);
    expect(existsSync(run), 'no empty directory is left').toBe(false);
  });
});
