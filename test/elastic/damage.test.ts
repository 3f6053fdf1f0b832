// Elastic directories that were damaged, forged or interrupted: refused with a typed error that says why, or sound.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';
import { pretrain } from '../../lib/distill/pretrain.js';
import { resolveBudget } from '../../lib/elastic/budget.js';
import { policyFromJson, policyToJson } from '../../lib/elastic/config.js';
import { elastify } from '../../lib/elastic/elastify.js';
import { type ElasticPolicy, type Level, routerPlaces } from '../../lib/elastic/policy.js';
import { provenanceOf } from '../../lib/elastic/provenance.js';
import { cardFile, manifestFile, readElastic, routerFile, writeElastic, writeLevels } from '../../lib/elastic/store.js';
import { sha256File } from '../../lib/io/files.js';
import { openSafetensors, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { specFromConfig } from '../../lib/model/spec.js';
import { ElastiformError } from '../../lib/native/errors.js';
import { temporaryDirectory, tinyConfig, tinyModel, tinyPretraining } from '../distill/tiny.js';

const root = temporaryDirectory();
const model = join(root, 'model');
const whole = join(root, 'whole');
const quality = { top1_agreement: { value: 0.8, lo: 0.7, hi: 0.9, n: 500 } };
const levels: Level[] = [
  { name: 'full', spec: {} },
  { name: 'half', spec: { tokenCapacity: { mlp: 0.5 } }, flopsRatio: 0.8, quality },
];
let policy: ElasticPolicy;
let config: Record<string, unknown>;

beforeAll(async () => {
  await tinyModel(model);
  const plan = join(root, 'plan');
  const blocks = { count: 2 };
  await elastify(
    model,
    { kind: 'elastiformer', layers: [0, 2], tokens: { attn: 0.5, mlp: 0.5 }, blocks },
    { out: plan },
  );
  const elastic = (await readElastic(plan))!;
  const ids = routerPlaces(elastic.policy).map(({ id }) => id);
  policy = {
    ...elastic.policy,
    calibration: {
      ...{ path: [ids.map(() => 1), ids.map(() => 0.25)], capacities: [0.5, 1], points: 3, tokens: 10 },
      sequenceLength: 8,
      quantiles: new Map(ids.filter((id) => id.endsWith('token')).map((id) => [id, Float32Array.of(0, 1, 2, 3, 4, 5)])),
    },
    levels,
  };
  await writeElastic(whole, plan, policy, elastic.routers, null);
  config = JSON.parse(readFileSync(join(whole, 'config.json'), 'utf8'));
});

function copy(): string {
  const path = join(root, `copy-${readdirSync(root).length}`);
  cpSync(whole, path, { recursive: true });
  return path;
}
/** Files are links to those of the model: they are replaced, never written through. */
function replace(path: string, bytes: Uint8Array | string): void {
  rmSync(path);
  writeFileSync(path, bytes);
}
async function forge(dir: string, name: string, bytes: Uint8Array | string): Promise<void> {
  replace(join(dir, name), bytes);
  const manifest = JSON.parse(readFileSync(join(dir, manifestFile), 'utf8'));
  manifest.files[name] = await sha256File(join(dir, name));
  writeFileSync(join(dir, manifestFile), JSON.stringify(manifest));
}
/** The typed error, null when all is well; anything untyped fails the test. */
async function refusal(read: () => unknown): Promise<ElastiformError | null> {
  try {
    await read();
    return null;
  } catch (error) {
    if (error instanceof ElastiformError && /^Invalid(File|Data|Argument)$/.test(error.code)) return error;
    throw error;
  }
}
/** So many positions in a file, the first and the last among them, always the same. */
function positions(length: number, count: number): number[] {
  let state = length;
  const drawn = Array.from({ length: count }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state % length;
  });
  return [...new Set([0, length - 1, ...drawn])];
}

/** Every way to put something else in one place of a JSON value, or to leave it out. */
function* variants(value: unknown, others: readonly unknown[]): Generator<{ at: string; json: unknown }> {
  for (const other of others) if (JSON.stringify(other) !== JSON.stringify(value)) yield { at: '', json: other };
  if (typeof value !== 'object' || value === null) return;
  for (const key of Object.keys(value)) {
    const put = (json: unknown) => (Array.isArray(value) ? value.with(Number(key), json) : { ...value, [key]: json });
    const { [key]: _, ...rest } = value as Record<string, unknown>;
    yield { at: `${key} left out`, json: Array.isArray(value) ? value.toSpliced(Number(key), 1) : rest };
    for (const { at, json } of variants((value as Record<string, unknown>)[key], others))
      yield { at: `${key}.${at}`, json: put(json) };
  }
}
const wrong = [null, -1, 0, 0.5, 1e300, '', 'x', [], [null], {}, true];

it('any changed byte and any shorter file is refused', async () => {
  const dir = copy();
  for (const name of readdirSync(dir)) {
    const path = join(dir, name);
    const bytes = readFileSync(path);
    const damaged = [
      ...positions(bytes.length, 24).map((at) => bytes.map((byte, i) => (i === at ? byte ^ (1 << (at % 8)) : byte))),
      ...positions(bytes.length, 6).map((length) => bytes.subarray(0, length)),
    ];
    for (const [i, content] of damaged.entries()) {
      replace(path, content);
      const error = await refusal(() => readElastic(dir));
      // Of the manifest some bytes say nothing that is checked: names in `base` and `tool`.
      if (name !== manifestFile) expect(error?.message, `${name}, damage ${i}`).toContain(name);
    }
    replace(path, bytes);
  }
  expect(await refusal(() => readElastic(dir))).toBeNull();
});

describe('elastic_config.json', () => {
  it('with anything else in any place is refused, or is a policy that works', () => {
    const spec = specFromConfig(config, 'config.json');
    const good = JSON.parse(JSON.stringify(policyToJson(policy)));
    let [refused, accepted] = [0, 0];
    for (const { at, json } of variants(good, wrong)) {
      let read: ElasticPolicy;
      try {
        read = policyFromJson(json, 'f.json', spec, []);
      } catch (error) {
        expect(error, at).toMatchObject({ code: 'InvalidData', message: expect.stringContaining('f.json') });
        refused++;
        continue;
      }
      accepted++;
      expect(JSON.parse(JSON.stringify(policyToJson(read))), at).toBeTypeOf('object');
      const quantiles = policy.calibration!.quantiles;
      const usable = { ...read, calibration: read.calibration && { ...read.calibration, quantiles } };
      for (const budget of ['full', 0.9, 'half', { minQuality: 0.5 }]) {
        try {
          resolveBudget(budget, spec, usable);
        } catch (error) {
          expect(error, at).toMatchObject({ code: 'InvalidArgument' });
        }
      }
    }
    expect(refused).toBeGreaterThan(1000);
    // Other numbers where any number will do, other names, keys nobody needs.
    expect(accepted).toBeLessThan(refused / 5);
  });

  const quantity = (change: object) => [
    { ...levels[1], quality: { top1_agreement: { ...quality.top1_agreement, ...change } } },
  ];
  it.each<[unknown, RegExp]>([
    [[{ name: '', spec: {} }], /levels\[0\].name must be a name/],
    [[{ name: 'full', spec: { tokenCapacity: { mlp: 0.5 } } }], /levels\[0\].spec must be {}: 'full' has no settings/],
    [[{ name: 'a', spec: {}, quality: 1 }], /levels\[0\].quality must be an object, got 1/],
    [[{ name: 'a', spec: {}, quality: { kl: 1 } }], /levels\[0\].quality.kl must be an object, got 1/],
    [quantity({ value: null }), /levels\[0\].quality.top1_agreement.value must be a number, got null/],
    [quantity({ lo: '0' }), /top1_agreement.lo must be a number, got "0"/],
    [quantity({ lo: 0.95 }), /top1_agreement.lo must be at most hi, got 0.95/],
    [quantity({ hi: 1.1 }), /top1_agreement must be a share, in \[0, 1\]/],
    [quantity({ n: 0 }), /top1_agreement.n must be a positive integer, got 0/],
    [quantity({ n: 1.5 }), /top1_agreement.n must be a positive integer, got 1.5/],
  ])('levels %j are refused', (bad, message) => {
    const json = { ...policyToJson(policy), levels: bad };
    expect(() => policyFromJson(json, 'f.json', specFromConfig(config, 'config.json'), [])).toThrow(message);
  });

  it.each([
    [[[1, 1, 1, 1, 1, 0.5]], /path\[0\] must be all 1, where the path starts/],
    [
      [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0.4, 1],
        [0.5, 1, 1, 1, 0.5, 1],
      ],
      /path\[2\] must be nowhere above the capacities before/,
    ],
  ])('a path %j is refused', (path, message) => {
    const json = policyToJson(policy);
    const bad = { ...json, calibration: { ...(json.calibration as object), path } };
    expect(() => policyFromJson(bad, 'f.json', specFromConfig(config, 'config.json'), [])).toThrow(message);
  });

  it('levels that could not be read again are not written', async () => {
    const dir = copy();
    const before = await sha256File(join(dir, manifestFile));
    const bad = [{ ...levels[1], quality: { kl: { value: Number.NaN, lo: 0, hi: 1, n: 1 } } }];
    await expect(writeLevels(dir, bad)).rejects.toThrow(/quality.kl.value must be a number, got null/);
    expect(await sha256File(join(dir, manifestFile))).toBe(before);
    expect(await refusal(() => readElastic(dir))).toBeNull();
  });
});

it('a manifest with anything else in any place is refused, or all is well', async () => {
  const dir = copy();
  const good = JSON.parse(readFileSync(join(dir, manifestFile), 'utf8'));
  for (const { at, json } of variants(good, [null, 1, 'x', [], {}, 'a'.repeat(64)])) {
    writeFileSync(join(dir, manifestFile), JSON.stringify(json));
    const error = await refusal(() => readElastic(dir));
    if (error === null) expect(at).toMatch(/^(base|tool)\b|^files\.README\.md left out$/);
  }
});

describe('routers, with a manifest that agrees', () => {
  type Tensors = Record<string, TensorData>;
  async function changed(change: (tensors: Tensors) => void): Promise<string> {
    const dir = copy();
    const tensors: Tensors = {};
    {
      using opened = openSafetensors(join(dir, routerFile));
      for (const name of opened.names()) {
        const { shape } = opened.info(name);
        tensors[name] = { dtype: 'f32', shape: [...shape], data: opened.tensor(name).readFloat() };
      }
    }
    change(tensors);
    const path = join(root, 'changed.safetensors');
    await writeSafetensors(path, tensors);
    await forge(dir, routerFile, readFileSync(path));
    return dir;
  }
  const id = 'layers.0.attn.token';
  const filled = (shape: number[], value: number) => ({
    ...{ dtype: 'f32' as const, shape },
    data: new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(value),
  });

  it.each<[string, (tensors: Tensors) => void, RegExp]>([
    [
      'a renamed tensor',
      (t) => {
        t[`${id}.w`] = t[`${id}.weight`];
        delete t[`${id}.weight`];
      },
      /tensor layers\.0\.attn\.token\.weight is missing/,
    ],
    [
      'one too many',
      (t) => {
        t['layers.1.attn.token.bias'] = filled([1], 0);
      },
      /tensor layers\.1\.attn\.token\.bias belongs to no router/,
    ],
    [
      'another shape',
      (t) => {
        t[`${id}.weight`] = filled([32, 1], 0);
      },
      /attn\.token\.weight must be F32\[1,32\], got F32\[32,1\]/,
    ],
    [
      'another type',
      (t) => {
        t[`${id}.bias`] = { dtype: 'bf16', shape: [1], data: new Uint16Array(1) };
      },
      /attn\.token\.bias must be F32\[1\], got BF16\[1\]/,
    ],
    [
      'a threshold that is not a number',
      (t) => {
        (t[`${id}.quantiles`].data as Float32Array)[4] = Number.NaN;
      },
      /attn\.token\.quantiles holds values that are not finite/,
    ],
    [
      'an infinite weight',
      (t) => {
        (t['layers.2.mlp.blocks.weight'].data as Float32Array)[7] = Number.POSITIVE_INFINITY;
      },
      /mlp\.blocks\.weight holds values that are not finite/,
    ],
    [
      'fewer thresholds',
      (t) => {
        t[`${id}.quantiles`] = filled([1, 3], 0);
      },
      /quantiles must be F32\[2,3\], got F32\[1,3\]/,
    ],
  ])('%s is refused', async (_, change, message) => {
    const error = await refusal(async () => readElastic(await changed(change)));
    expect(error?.code).toBe('InvalidData');
    expect(error?.message).toMatch(message);
    expect(error?.message).toContain(routerFile);
  });

  it('any changed byte of the header, and any shorter file, is refused or is still sound', async () => {
    const dir = copy();
    const bytes = readFileSync(join(dir, routerFile));
    const header = 8 + Number(bytes.readBigUInt64LE(0));
    let refused = 0;
    const flips = positions(header, 60).map((at) => bytes.map((byte, i) => (i === at ? byte ^ 4 : byte)));
    for (const content of [...flips, ...positions(bytes.length, 12).map((length) => bytes.subarray(0, length))]) {
      await forge(dir, routerFile, content);
      const error = await refusal(() => readElastic(dir));
      if (!error) continue;
      expect(error.message).toContain(routerFile);
      refused++;
    }
    expect(refused).toBeGreaterThan(60);
  });

  it('of another base are refused', async () => {
    const other = join(root, 'other');
    await pretrain(tinyPretraining(other, { model: { ...tinyConfig, hidden_size: 64 }, steps: 2 }));
    const dir = copy();
    for (const name of ['model.safetensors', 'config.json']) {
      await forge(dir, name, readFileSync(join(other, name)));
      const error = await refusal(() => readElastic(dir));
      expect(error?.message).toMatch(
        name === 'config.json' ? /in must be 64, the model's hidden size/ : /weights_sha256/,
      );
    }
  });
});

describe('model card and origin', () => {
  it('the card has the levels, the licence and how to load it, and follows the levels', async () => {
    const dir = copy();
    const card = () => readFileSync(join(dir, cardFile), 'utf8');
    expect(card()).toContain('| half | 80.0 % | 80.0 % (70.0 % to 90.0 %) | not measured |');
    expect(card()).toMatch(/^---\nlicense: other\nbase_model: "model"\n/);
    expect(card()).toContain("loadModel('.')");
    expect(readFileSync(join(root, 'plan', cardFile), 'utf8')).toContain('not trained yet');
    await writeLevels(dir, [{ ...levels[1], name: 'other' }]);
    expect(card()).toContain('| other | 80.0 %');
    expect(JSON.parse(readFileSync(join(dir, manifestFile), 'utf8')).files[cardFile]).toBe(
      await sha256File(join(dir, cardFile)),
    );
  });

  it('revision and licence of the base stay with what is made of it', async () => {
    const revision = 'abcdef0123456789abcdef0123456789abcdef01';
    const base = join(root, 'hub', 'snapshots', revision);
    cpSync(model, base, { recursive: true });
    writeFileSync(join(base, 'README.md'), '---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\nlicense: mit\n');
    const origin = { revision, license: 'apache-2.0' };
    expect(await provenanceOf(base)).toEqual(origin);
    const [plan, out] = [join(root, 'origin-plan'), join(root, 'origin')];
    await elastify(base, { kind: 'elastiformer' }, { out: plan });
    const { policy, routers } = (await readElastic(plan))!;
    await writeElastic(out, plan, policy, routers, null);
    const read = (await readElastic(out))!;
    expect(read.policy.base).toMatchObject({ name: revision, ...origin });
    expect(read.warnings).toEqual([]);
    expect(JSON.parse(readFileSync(join(out, manifestFile), 'utf8')).base).toEqual({ name: revision, ...origin });
    expect(readFileSync(join(out, cardFile), 'utf8')).toContain(`revision ${revision}`);
    // A card of ours names it, too.
    expect(await provenanceOf(out)).toEqual({ license: 'apache-2.0' });
  });

  it('is found where downloads keep it, or is not known', async () => {
    const dir = join(root, 'download');
    const kept = join(dir, '.cache', 'huggingface', 'download');
    mkdirSync(kept, { recursive: true });
    expect(await provenanceOf(dir)).toEqual({});
    writeFileSync(join(kept, 'config.json.metadata'), `${'1'.repeat(40)}\netag\n1.0\n`);
    writeFileSync(join(dir, 'LICENSE'), 'text');
    expect(await provenanceOf(dir)).toEqual({ revision: '1'.repeat(40), license: 'see LICENSE' });
    writeFileSync(join(kept, 'config.json.metadata'), 'main\n');
    expect(await provenanceOf(dir)).toEqual({ license: 'see LICENSE' });
  });
});

describe('a process killed while it writes', () => {
  const dist = (file: string) => JSON.stringify(pathToFileURL(resolve(import.meta.dirname, '../../dist', file)).href);
  async function killed(script: string, delay: number): Promise<void> {
    const child = spawn(process.execPath, ['--input-type=module', '-e', script], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    await once(child.stdout, 'data');
    await sleep(delay);
    child.kill('SIGKILL');
    await once(child, 'exit');
  }

  it('leaves the old levels, the new ones, or a directory that is refused', async () => {
    let readable = 0;
    for (let i = 0; i < 10; i++) {
      const dir = copy();
      const script = `
        const { writeLevels } = await import(${dist('elastic/store.js')});
        console.log('ready');
        for (let i = 0; ; i++) await writeLevels(${JSON.stringify(dir)}, [{ name: 'l' + i, spec: {} }]);`;
      await killed(script, 3 + 7 * i);
      const error = await refusal(async () => {
        const { policy } = (await readElastic(dir))!;
        expect(policy.levels.map(({ name }) => name).join()).toMatch(/^full,half$|^l\d+$/);
        readable++;
      });
      if (error) expect(error.message).toMatch(/never completed; write it again/);
    }
    expect(readable).toBeGreaterThan(0);
  });

  it('leaves no plan or a whole one', async () => {
    for (let i = 0; i < 6; i++) {
      const out = join(root, `killed-${i}`);
      const script = `
        const { elastify } = await import(${dist('elastic/elastify.js')});
        console.log('ready');
        await elastify(${JSON.stringify(model)}, { kind: 'elastiformer' }, { out: ${JSON.stringify(out)} });
        setInterval(() => {}, 1000);`;
      await killed(script, 4 + 8 * i);
      if (existsSync(out)) expect((await readElastic(out))!.policy.levels).toHaveLength(1);
    }
  });
});
