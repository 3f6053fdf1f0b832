// Teachers: another model of the same tokenizer, and a cache of largest probabilities, written, resumed and refused.
import { cpSync, existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { type CacheTeacherOptions, cacheTeacher } from '../../lib/distill/cache.js';
import type { DataSource } from '../../lib/distill/data.js';
import { type DistillConfig, distill } from '../../lib/distill/distill.js';
import { pretrain } from '../../lib/distill/pretrain.js';
import { elastify } from '../../lib/elastic/elastify.js';
import { routerFile } from '../../lib/elastic/store.js';
import { sha256File } from '../../lib/io/files.js';
import { openSafetensors } from '../../lib/io/safetensors.js';
import { stories, temporaryDirectory, tinyConfig, tinyModel, tinyPretraining } from './tiny.js';

const root = temporaryDirectory();
const [model, plan, other] = [join(root, 'model'), join(root, 'plan'), join(root, 'other')];
const vocab = 300;
const documents = (count: number): DataSource => ({ kind: 'documents', documents: stories(count) });

beforeAll(async () => {
  await tinyModel(model);
  await elastify(model, { kind: 'elastiformer' }, { out: plan });
  // Wider, of fewer layers, and by the same tokenizer: it is trained on the same text.
  const wider = {
    ...tinyConfig,
    hidden_size: 40,
    num_hidden_layers: 2,
    num_attention_heads: 5,
    num_key_value_heads: 5,
  };
  await pretrain(tinyPretraining(other, { model: wider, steps: 20 }));
});

let runs = 0;
const fresh = (): string => join(root, `run-${runs++}`);
const config = (out: string, more: Partial<DistillConfig> = {}): DistillConfig => ({
  plan,
  out,
  data: documents(60),
  steps: 6,
  batchTokens: 128,
  sequenceLength: 32,
  calibrationTokens: 256,
  seed: 3,
  ...more,
});
const steps = (out: string): { loss: number; terms: Record<string, number>; tokensPerSecond: number }[] =>
  readFileSync(join(out, 'metrics.jsonl'), 'utf8')
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line))
    .filter((event) => event.type === 'step');
const losses = (out: string): number[] => steps(out).map(({ loss }) => loss);
async function refused(more: Record<string, unknown>): Promise<string> {
  const error = await distill(config(fresh(), more as Partial<DistillConfig>)).catch((e) => e);
  expect(error).toBeInstanceOf(Error);
  return `${error.code}: ${error.message}`;
}

describe('another model', () => {
  it('that is the same one gives the same bits as the full model itself', async () => {
    const copy = join(root, 'copy');
    cpSync(model, copy, { recursive: true });
    const [own, copied] = [fresh(), fresh()];
    await distill(config(own));
    await distill(config(copied, { teacher: { kind: 'model', model: copy } }));
    expect(losses(copied)).toEqual(losses(own));
    expect(await sha256File(join(copied, routerFile))).toBe(await sha256File(join(own, routerFile)));
  });

  it('of another width and depth is imitated', async () => {
    const full = join(root, 'full');
    await elastify(model, { kind: 'elastiformer', tokens: { attn: 1, mlp: 1 }, gate: 'two-sigma' }, { out: full });
    const out = fresh();
    const loss = [{ kind: 'kl', weight: 1 }] as const;
    const teacher = { kind: 'model', model: other } as const;
    await distill(config(out, { plan: full, teacher, loss, steps: 40, optimizer: { lr: 2e-2, schedule: 'constant' } }));
    const all = losses(out);
    const mean = (part: readonly number[]) => part.reduce((a, b) => a + b) / part.length;
    // At full capacity gates scale what sub-layers add, which is enough to come nearer to a model that knows less.
    expect(all[0]).toBeGreaterThan(0.01);
    expect(mean(all.slice(-5))).toBeLessThan(0.9 * mean(all.slice(0, 5)));
  });

  it('is refused when it does not fit, and so is a resumed run with another teacher', async () => {
    expect(await refused({ teacher: { kind: 'oracle' } })).toMatch(/teacher.kind must be one of self, model, cache/);
    expect(await refused({ teacher: { kind: 'self', model } })).toMatch(/unknown key of teacher 'model'/);
    expect(await refused({ teacher: { kind: 'model', model: join(root, 'none') } })).toMatch(/InvalidFile: /);
    const alone = [{ kind: 'cross-entropy', weight: 1 }];
    expect(await refused({ teacher: { kind: 'model', model: other }, loss: alone })).toMatch(
      /no term of the loss compares/,
    );
    const hidden = [{ kind: 'hidden-mse', weight: 1 }];
    expect(await refused({ teacher: { kind: 'model', model: other }, loss: hidden })).toMatch(
      /must have the plan's hidden size for hidden terms, 32, got 40/,
    );
    const tokenizer = join(root, 'tokenizer');
    cpSync(other, tokenizer, { recursive: true });
    const file = join(tokenizer, 'tokenizer.json');
    writeFileSync(file, `${readFileSync(file, 'utf8')}\n`);
    expect(await refused({ teacher: { kind: 'model', model: tokenizer } })).toMatch(
      /the plan's tokenizer.json, SHA-256/,
    );
    const short = join(root, 'short');
    cpSync(other, short, { recursive: true });
    const settings = JSON.parse(readFileSync(join(short, 'config.json'), 'utf8'));
    writeFileSync(join(short, 'config.json'), JSON.stringify({ ...settings, max_position_embeddings: 16 }));
    expect(await refused({ teacher: { kind: 'model', model: short } })).toMatch(
      /positions for sequenceLength, 32, got 16/,
    );

    const out = fresh();
    await distill(config(out, { steps: 2 }));
    await expect(distill(config(out, { steps: 2, teacher: { kind: 'model', model: other } }))).rejects.toThrow(
      /made with teacher = .*"self"/,
    );
  });
});

describe('a cache', () => {
  const options = (out: string, more: Partial<CacheTeacherOptions> = {}): CacheTeacherOptions => ({
    model,
    data: documents(60),
    topK: 24,
    sequenceLength: 32,
    batchTokens: 128,
    out,
    ...more,
  });
  const cache = join(root, 'cache');
  const teacher = { kind: 'cache', dir: cache } as const;
  const kl = [{ kind: 'kl', weight: 1 }] as const;
  beforeAll(async () => {
    const { tokens, shards } = await cacheTeacher(options(cache));
    expect([tokens > 1000, shards]).toEqual([true, 1]);
  });

  it('holds distributions: ids ascending, and probabilities that add up to 1', () => {
    using file = openSafetensors(join(cache, 'shard-00000.safetensors'));
    const [logp, rest] = ['topk_logp', 'rest_logp'].map((name) => file.tensor(name).readFloat());
    const ids = file.tensor('topk_ids').read() as Int32Array;
    for (let r = 0; r < rest.length; r++) {
      const row = ids.subarray(24 * r, 24 * (r + 1));
      expect(row.every((id, k) => id < vocab && (k === 0 || id > row[k - 1]))).toBe(true);
      const sum = logp.subarray(24 * r, 24 * (r + 1)).reduce((total, l) => total + Math.exp(l), Math.exp(rest[r]));
      expect(Math.abs(sum - 1)).toBeLessThan(2e-3);
    }
  });

  it.each(['kl', 'reverse-kl'] as const)('teaches %s as the same model in the same program does', async (kind) => {
    const [live, cached] = [fresh(), fresh()];
    await distill(config(live, { loss: [{ kind, weight: 1, topK: 24 }] }));
    await distill(config(cached, { loss: [{ kind, weight: 1 }], teacher }));
    // Rounding of the cache to half precision.
    losses(live).forEach((loss, i) => {
      expect(losses(cached)[i]).toBeGreaterThan(0);
      expect(Math.abs(losses(cached)[i] - loss)).toBeLessThan(2e-3);
    });
  });

  it('goes on to the same bits in a run that was aborted', async () => {
    const [straight, killed] = [fresh(), fresh()];
    await distill(config(straight, { loss: kl, teacher }));
    const abort = new AbortController();
    const onEvent = (event: { type: string }) => void (event.type === 'step' && abort.abort());
    expect(await distill(config(killed, { loss: kl, teacher, signal: abort.signal, onEvent }))).toMatchObject({
      step: 1,
    });
    await distill(config(killed, { loss: kl, teacher }));
    expect(await sha256File(join(killed, routerFile))).toBe(await sha256File(join(straight, routerFile)));
  });

  it('serves gates that are multipliers without any run of the full model', async () => {
    const raw = join(root, 'raw');
    await elastify(model, { kind: 'elastiformer', gate: 'raw' }, { out: raw });
    const out = fresh();
    await distill(config(out, { plan: raw, loss: kl, teacher }));
    expect(losses(out).at(-1)).toBeGreaterThan(0);
  });

  it('is continued behind its last file when it was interrupted, and left alone when it is complete', async () => {
    // More tokens than a file holds.
    const data = documents(5000);
    const [straight, killed] = [fresh(), fresh()];
    const more = { data, topK: 2, batchTokens: 2048 };
    const { tokens, shards } = await cacheTeacher(options(straight, more));
    expect(shards).toBeGreaterThan(1);
    const abort = new AbortController();
    const progress: number[] = [];
    const onProgress = (done: number) => void (done > 70000 && abort.abort());
    await expect(cacheTeacher(options(killed, { ...more, onProgress, signal: abort.signal }))).rejects.toThrow(
      /abort/i,
    );
    expect(readdirSync(killed).sort()).toEqual(['meta.json', 'shard-00000.safetensors']);
    expect(await refused({ data, loss: kl, teacher: { kind: 'cache', dir: killed } })).toMatch(
      /InvalidData: .*is incomplete, \d+ of \d+ tokens: run cache-teacher again/,
    );
    const resumed = options(killed, { ...more, onProgress: (done) => void progress.push(done) });
    expect(await cacheTeacher(resumed)).toEqual({ dir: killed, tokens, shards });
    expect(progress[0]).toBeGreaterThan(65536);
    expect(progress.at(-1)).toBe(tokens);
    for (const file of readdirSync(straight)) {
      expect(await sha256File(join(killed, file)), file).toBe(await sha256File(join(straight, file)));
    }
    progress.length = 0;
    await cacheTeacher(resumed);
    expect(progress).toEqual([]);
    // Sequences of any file reach the training, in any order.
    await distill(
      config(fresh(), { data, loss: kl, teacher: { kind: 'cache', dir: killed }, batchTokens: 2048, steps: 3 }),
    );
  }, 120_000);

  it('is refused for other data and settings, and for terms it cannot serve', async () => {
    const wrong = async (more: Record<string, unknown>) => refused({ loss: kl, teacher, ...more });
    expect(await wrong({ data: documents(61) })).toMatch(/InvalidData: .*was made with dataSha256 = /);
    expect(await wrong({ heldOut: 0.1 })).toMatch(/was made with dataSha256/);
    expect(await wrong({ sequenceLength: 16 })).toMatch(/was made with sequenceLength = 32, here it is 16/);
    expect(await wrong({ loss: [{ kind: 'jsd', weight: 1 }] })).toMatch(/InvalidArgument: .*the loss cannot have jsd/);
    expect(await wrong({ loss: [{ kind: 'hidden-mse', weight: 1 }] })).toMatch(/cannot have hidden-mse/);
    expect(await wrong({ loss: [{ kind: 'kl', weight: 1, temperature: 2 }] })).toMatch(
      /the temperature of kl must be 1, got 2/,
    );
    expect(await wrong({ loss: [{ kind: 'kl', weight: 1, topK: 8 }] })).toMatch(
      /topK of kl must be the cache's 24, got 8/,
    );
    expect(await wrong({ teacher: { kind: 'cache', dir: join(root, 'none') } })).toMatch(/InvalidFile: .*meta.json/);
    const again = (more: Partial<CacheTeacherOptions>) => cacheTeacher(options(cache, more)).catch((e) => e.message);
    expect(await again({ topK: 12 })).toMatch(/was made with topK = 24, here it is 12/);
    expect(await again({ model: other })).toMatch(/was made with modelSha256/);
    expect(await again({ dtype: 'bf16' })).toMatch(/was made with dtype = null, here it is "bf16"/);
    expect(await again({ topK: 301 })).toMatch(/topK must be an integer from 1 to 300, got 301/);
    expect(await again({ colour: 1 } as Partial<CacheTeacherOptions>)).toMatch(/unknown option 'colour'/);
  });

  it.each<[string, (dir: string) => void, RegExp]>([
    [
      'a changed byte',
      (dir) =>
        change(join(dir, 'shard-00000.safetensors'), (b) => {
          b[b.length - 1] ^= 1;
        }),
      /does not match its hash/,
    ],
    ['a missing file', (dir) => rmSync(join(dir, 'shard-00000.safetensors')), /is missing or does not match/],
    ['a truncated meta.json', (dir) => writeFileSync(join(dir, 'meta.json'), '{"version":'), /InvalidFile: .*not JSON/],
    [
      'a meta.json of something else',
      (dir) => writeFileSync(join(dir, 'meta.json'), '[]'),
      /does not describe a cache of version 1/,
    ],
    [
      'a file elsewhere',
      (dir) =>
        edit(dir, (meta) => {
          meta.shards[0].file = '../secret';
        }),
      /does not describe a cache/,
    ],
    [
      'another topK',
      (dir) =>
        edit(dir, (meta) => {
          meta.topK = 12;
        }),
      /tensor topk_ids must have the shape/,
    ],
  ])('is refused with %s', async (_, damage, message) => {
    const dir = fresh();
    cpSync(cache, dir, { recursive: true });
    damage(dir);
    expect(await refused({ loss: kl, teacher: { kind: 'cache', dir } })).toMatch(message);
  });

  it('is not written from weights that give no probabilities', async () => {
    const broken = join(root, 'broken');
    cpSync(model, broken, { recursive: true });
    const path = join(broken, 'model.safetensors');
    change(path, (bytes) => {
      const length = Number(bytes.readBigUInt64LE(0));
      const header = JSON.parse(bytes.subarray(8, 8 + length).toString());
      bytes.writeFloatLE(Number.NaN, 8 + length + header['model.norm.weight'].data_offsets[0]);
    });
    const out = fresh();
    await expect(cacheTeacher(options(out, { model: broken }))).rejects.toThrow(/no finite probabilities/);
    expect(existsSync(join(out, 'meta.json'))).toBe(false);
  });
});

function change(path: string, by: (bytes: Buffer) => void): void {
  const bytes = readFileSync(path);
  by(bytes);
  rmSync(path);
  writeFileSync(path, bytes);
}
// biome-ignore lint/suspicious/noExplicitAny: any JSON
function edit(dir: string, by: (meta: any) => void): void {
  const path = join(dir, 'meta.json');
  const meta = JSON.parse(readFileSync(path, 'utf8'));
  by(meta);
  writeFileSync(path, JSON.stringify(meta));
}
