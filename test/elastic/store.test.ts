// Elastic directories: still the checkpoint they came from, and refused with a reason when anything in them is wrong.
import { cpSync, mkdirSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { elastify } from '../../lib/elastic/elastify.js';
import { type ElasticPolicy, routerPlaces } from '../../lib/elastic/policy.js';
import {
  elasticConfigFile,
  manifestFile,
  readElastic,
  routerFile,
  writeElastic,
  writeLevels,
} from '../../lib/elastic/store.js';
import { sha256File } from '../../lib/io/files.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { temporaryDirectory, tinyModel } from '../distill/tiny.js';

const root = temporaryDirectory();
const model = join(root, 'model');
const plan = join(root, 'plan');
const recipe = { kind: 'elastiformer', layers: [0, 2], tokens: { mlp: [0.3, 1], attn: 0.5 } } as const;
let policy: ElasticPolicy;

beforeAll(async () => {
  await tinyModel(model);
  const result = await elastify(model, recipe, { out: plan });
  expect(result).toMatchObject({ dir: plan, trainableParameters: 4 * 33, warnings: [] });
  policy = (await readElastic(plan))!.policy;
});

/** A copy of the plan that a test may damage. */
function copy(): string {
  const path = join(root, `copy-${readdirSync(root).length}`);
  cpSync(plan, path, { recursive: true });
  return path;
}
const calibrated = (): ElasticPolicy => ({
  ...policy,
  calibration: {
    path: [
      [1, 1, 1, 1],
      [0, 0, 0, 0],
    ],
    capacities: [0.5, 1],
    points: 3,
    tokens: 10,
    sequenceLength: 8,
    quantiles: new Map(routerPlaces(policy).map(({ id }) => [id, Float32Array.of(0, 1, 2, 3, 4, 5)])),
  },
});
const routers = (value = 0.25) =>
  new Map(
    routerPlaces(policy).map(({ id }) => [id, { weight: new Float32Array(32).fill(value), bias: Float32Array.of(-1) }]),
  );

describe('elastify', () => {
  it('leaves the checkpoint as it was, loadable by itself', async () => {
    for (const name of ['config.json', 'model.safetensors', 'tokenizer.json']) {
      expect(await sha256File(join(plan, name))).toBe(await sha256File(join(model, name)));
    }
    using checkpoint = Checkpoint.open(plan);
    expect(policy.base).toEqual({
      name: 'model',
      weightsSha256: await checkpoint.sha256(),
      tokenizerSha256: await sha256File(join(plan, 'tokenizer.json')),
    });
    expect(readdirSync(root).filter((name) => name.includes('partial'))).toEqual([]);
  });

  it('starts with routers of zeros', async () => {
    const elastic = (await readElastic(plan))!;
    expect([...elastic.routers.keys()]).toEqual(routerPlaces(policy).map((r) => r.id));
    for (const { weight, bias } of elastic.routers.values()) {
      expect([...weight, ...bias].every((v) => v === 0)).toBe(true);
    }
  });

  it('replaces an earlier plan, but nothing else', async () => {
    const again = copy();
    await elastify(model, { kind: 'elastiformer', tokens: { mlp: 0.5 } }, { out: again });
    expect((await readElastic(again))?.policy.tokens.attn).toBeUndefined();
    await expect(elastify(plan, recipe, { out: model })).rejects.toThrow(/exists and is not a plan/);
    await expect(elastify(model, recipe, { out: model })).rejects.toThrow(/another directory than the model/);
  });

  it('leaves nothing behind when it fails', async () => {
    const out = join(root, 'never');
    await expect(elastify(join(root, 'none'), recipe, { out })).rejects.toMatchObject({ code: 'InvalidFile' });
    await expect(elastify(model, { ...recipe, layers: [7] }, { out })).rejects.toMatchObject({
      code: 'InvalidArgument',
    });
    const broken = copy();
    truncateSync(join(broken, 'model.safetensors'), 1000);
    await expect(elastify(broken, recipe, { out })).rejects.toMatchObject({ code: 'InvalidFile' });
    expect(readdirSync(root).filter((name) => name.startsWith('never'))).toEqual([]);
  });
});

describe('readElastic', () => {
  it('gives null for a plain checkpoint', async () => {
    expect(await readElastic(model)).toBeNull();
  });

  it('gives back what was written', async () => {
    const dir = join(root, 'written');
    await writeElastic(dir, model, calibrated(), routers(), null);
    const read = (await readElastic(dir))!;
    expect(read.policy).toEqual(calibrated());
    expect(read.routers).toEqual(routers());
    expect(read.warnings).toEqual([]);
    await writeLevels(dir, [{ name: 'half', spec: { tokenCapacity: { mlp: 0.5 } }, flopsRatio: 0.7 }]);
    expect((await readElastic(dir))?.policy.levels.map((l) => l.name)).toEqual(['half']);
  });

  it('refuses a change in any file, naming it', async () => {
    for (const name of readdirSync(plan)) {
      const damaged = copy();
      const path = join(damaged, name);
      const bytes = readFileSync(path);
      bytes[bytes.length >> 1] ^= 1;
      rmSync(path);
      writeFileSync(path, bytes);
      const error = await readElastic(damaged).catch((e) => e);
      expect(error.code, name).toMatch(/InvalidFile|InvalidData/);
      // A changed manifest may blame the file whose hash it has wrong.
      if (name !== manifestFile) expect(error.message).toContain(name);
    }
  });

  it('refuses a missing file, naming it', async () => {
    for (const name of readdirSync(plan)) {
      if (name === elasticConfigFile) continue;
      const damaged = copy();
      rmSync(join(damaged, name));
      const error = await readElastic(damaged).catch((e) => e);
      expect(error, name).toMatchObject({ code: 'InvalidFile' });
      expect(error.message).toContain(name);
    }
    const damaged = copy();
    rmSync(join(damaged, elasticConfigFile));
    await expect(readElastic(damaged)).rejects.toThrow(elasticConfigFile);
  });

  /** Rewrites a JSON file of a copy and makes the manifest agree. */
  async function rewritten(name: string, change: (json: Record<string, unknown>) => void): Promise<string> {
    const dir = copy();
    const path = join(dir, name);
    const json = JSON.parse(readFileSync(path, 'utf8'));
    change(json);
    rmSync(path);
    writeFileSync(path, JSON.stringify(json));
    if (name !== manifestFile) {
      const manifest = JSON.parse(readFileSync(join(dir, manifestFile), 'utf8'));
      manifest.files[name] = await sha256File(path);
      writeFileSync(join(dir, manifestFile), JSON.stringify(manifest));
    }
    return dir;
  }

  it('warns of unknown keys and refuses unknown versions', async () => {
    const known = await rewritten(elasticConfigFile, (json) => {
      json.future = 1;
    });
    expect((await readElastic(known))?.warnings).toEqual([
      `${join(known, elasticConfigFile)}: unknown key future is ignored`,
    ]);
    const newer = await rewritten(elasticConfigFile, (json) => {
      json.elastic_version = 9;
    });
    await expect(readElastic(newer)).rejects.toThrow(/elastic_version must be 1, got 9/);
    const manifest = await rewritten(manifestFile, (json) => {
      json.manifest_version = 2;
    });
    await expect(readElastic(manifest)).rejects.toThrow(/manifest_version must be 1, got 2/);
  });

  it('refuses a manifest that reaches outside its directory, or leaves files out', async () => {
    const outside = await rewritten(manifestFile, (json) => {
      (json.files as Record<string, string>)['../model/config.json'] = 'a'.repeat(64);
    });
    await expect(readElastic(outside)).rejects.toThrow(/not a plain file name/);
    const silent = await rewritten(manifestFile, (json) => {
      delete (json.files as Record<string, string>)[routerFile];
    });
    await expect(readElastic(silent)).rejects.toThrow(/lists no hash of elastic_router.safetensors/);
  });

  it('refuses a policy of another base', async () => {
    const other = await rewritten(elasticConfigFile, (json) => {
      (json.base as Record<string, unknown>).weights_sha256 = 'b'.repeat(64);
    });
    await expect(readElastic(other)).rejects.toThrow(/weights_sha256 is not that of the weights/);
  });

  it.each([
    ['a router that is not finite', calibrated, () => routers(Number.NaN), /holds values that are not finite/],
    [
      'quantiles that do not ascend',
      () => {
        const broken = calibrated();
        for (const table of broken.calibration!.quantiles.values()) table[1] = -1;
        return broken;
      },
      routers,
      /quantiles must ascend/,
    ],
  ])('refuses %s', async (_, makePolicy, makeRouters, message) => {
    const dir = join(root, `bad-${readdirSync(root).length}`);
    mkdirSync(dir);
    await writeElastic(dir, model, makePolicy(), makeRouters(), null);
    await expect(readElastic(dir)).rejects.toThrow(message);
  });
});
