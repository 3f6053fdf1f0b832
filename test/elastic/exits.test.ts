// Exits of encoders on disk: written and read back, refused with a reason when anything is wrong, and the rules that decide.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { policyFromJson, policyToJson } from '../../lib/elastic/config.js';
import { elastify, writeExits } from '../../lib/elastic/elastify.js';
import {
  decideExit,
  type Exit,
  type ExitRuleName,
  type ExitSetting,
  type ExitState,
  usableExits,
} from '../../lib/elastic/exits.js';
import { elasticConfigFile, manifestFile, readElastic, routerFile, writeLevels } from '../../lib/elastic/store.js';
import { sha256File } from '../../lib/io/files.js';
import { openSafetensors, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { readSpec } from '../../lib/model/directory.js';
import type { ModelSpec } from '../../lib/model/spec.js';
import { deepClassifier, editConfig, heads } from '../infer/exits.js';
import { temporaryDirectory } from '../temporary.js';

const rule = { rule: 'entropy', threshold: 0.4 } as const;
let base: string;
let spec: ModelSpec;

beforeAll(async () => {
  base = await deepClassifier();
  spec = await readSpec(base);
});

const refusal = (call: () => Promise<unknown>) =>
  call().then(
    () => null,
    (error: Error & { code: string }) => error,
  );

async function written(after: readonly number[] = [0, 2, 3]): Promise<string> {
  const out = temporaryDirectory();
  await writeExits(out, base, heads(after, rule));
  return out;
}

describe('an elastic directory with exits', () => {
  it('reads back what was written, over the same checkpoint', async () => {
    const dir = await written();
    const { policy, routers, warnings } = (await readElastic(dir))!;
    expect(policy.exits).toEqual([0, 2, 3].map((afterLayer) => ({ afterLayer, ...rule })));
    expect([...routers]).toEqual(
      heads([0, 2, 3], rule).map(({ afterLayer, weight, bias }) => [`exits.${afterLayer}`, { weight, bias }]),
    );
    expect(warnings).toEqual([]);
    const config = JSON.parse(readFileSync(join(dir, elasticConfigFile), 'utf8'));
    expect(config.exits[1]).toEqual({ after_layer: 2, head: 'exits.2', rule: 'entropy', threshold: 0.4 });
    using file = openSafetensors(join(dir, routerFile));
    expect(file.info('exits.2.weight')).toMatchObject({ dtype: 'F32', shape: [3, 24] });
    expect(file.info('exits.2.bias')).toMatchObject({ dtype: 'F32', shape: [3] });
    for (const name of ['model.safetensors', 'config.json', 'tokenizer.json'])
      expect(await sha256File(join(dir, name))).toBe(await sha256File(join(base, name)));
  });

  it('is written in place, and again over itself; levels of exits do not outlive them', async () => {
    const dir = await deepClassifier(temporaryDirectory());
    await writeExits(dir, dir, heads([1], rule));
    const setting: ExitSetting = { rule: 'patience', threshold: 2, minLayer: 1 };
    await writeLevels(dir, [
      { name: 'full', spec: {} },
      { name: 'fast', spec: { exit: setting }, flopsRatio: 0.6 },
    ]);
    expect((await readElastic(dir))!.policy.levels[1]).toEqual({
      name: 'fast',
      spec: { exit: setting },
      flopsRatio: 0.6,
    });
    await writeExits(dir, dir, heads([0, 3], rule));
    const { policy } = (await readElastic(dir))!;
    expect(policy.exits?.map(({ afterLayer }) => afterLayer)).toEqual([0, 3]);
    expect(policy.levels).toEqual([{ name: 'full', spec: {} }]);
  });

  it.each<[string, (json: { exits: Record<string, unknown>[] } & Record<string, unknown>) => void, string]>([
    ['no list', (json) => Object.assign(json, { exits: {} }), 'exits must be a list of heads, got {}'],
    ['none', (json) => Object.assign(json, { exits: [] }), 'exits must be a list of heads, got []'],
    [
      'after the last layer',
      (json) => Object.assign(json.exits[2], { after_layer: 4 }),
      'exits[2].after_layer must be ascending layer ids below 4, the last layer, got 4',
    ],
    ['twice', (json) => Object.assign(json.exits[1], { after_layer: 0 }), 'exits[1].after_layer must be ascending'],
    [
      'of half a layer',
      (json) => Object.assign(json.exits[0], { after_layer: 0.5 }),
      'exits[0].after_layer must be ascending',
    ],
    [
      'another head',
      (json) => Object.assign(json.exits[0], { head: 'exits.1' }),
      'exits[0].head must be "exits.0", got "exits.1"',
    ],
    [
      'another rule',
      (json) => Object.assign(json.exits[0], { rule: 'luck' }),
      'exits[0].rule must be one of entropy, margin, maxprob, patience, got "luck"',
    ],
    ['no threshold', (json) => delete json.exits[0].threshold, 'exits[0].threshold must be a finite number'],
    [
      'half a patience',
      (json) => Object.assign(json.exits[0], { rule: 'patience' }),
      'exits[0].threshold must be a positive integer, of exits, got 0.4',
    ],
    [
      'routers beside',
      (json) =>
        Object.assign(json, {
          tokens: { mlp: { layers: [0], train: 'top-k', decode: 'threshold', train_capacity: [0.5, 1] } },
        }),
      'bert is an encoder: it has exits and nested feed-forwards, and no routers',
    ],
    [
      'a level with a bad rule',
      (json) => Object.assign(json, { levels: [{ name: 'a', spec: { exit: { rule: 'entropy' } } }] }),
      'levels[0].spec.exit must be of a threshold of entropy that is a finite number',
    ],
    [
      'a level with a bad layer',
      (json) =>
        Object.assign(json, {
          levels: [{ name: 'a', spec: { exit: { rule: 'margin', threshold: 1, minLayer: -1 } } }],
        }),
      "levels[0].spec.exit must be of a minLayer that is a layer's id, got -1",
    ],
    [
      'a level of exits without any',
      (json) => {
        delete (json as Record<string, unknown>).exits;
        json.levels = [{ name: 'a', spec: { exit: true } }];
      },
      'levels[0].spec.exit must be absent: the model has no exits',
    ],
    [
      'full with an exit',
      (json) => Object.assign(json, { levels: [{ name: 'full', spec: { exit: true } }] }),
      "levels[0].spec must be {}: 'full' has no settings",
    ],
  ])('with %s is refused', async (_, change, message) => {
    const dir = await written();
    const json = JSON.parse(readFileSync(join(dir, elasticConfigFile), 'utf8'));
    change(json);
    expect(() => policyFromJson(json, 'f.json', spec, [])).toThrow(message);
  });

  it('of which a decoder, regression or one layer has none is refused', async () => {
    const { policy } = (await readElastic(await written()))!;
    const json = JSON.parse(JSON.stringify(policyToJson(policy)));
    for (const [change, what] of [
      [{ encoder: null, type: 'llama' }, 'this is a llama model for causal-lm'],
      [{ encoder: { ...spec.encoder!, scores: 'none' } }, 'this is a bert model for sequence-classification'],
      [
        { encoder: { ...spec.encoder!, scores: 'sigmoid' } },
        'exits are for encoders that choose one of several classes',
      ],
      [{ encoder: { ...spec.encoder!, labels: ['a'] } }, 'exits are for encoders'],
      [{ layers: 1 }, 'the model has one layer'],
    ] as const) {
      expect(() => policyFromJson(json, 'f.json', { ...spec, ...change } as ModelSpec, [])).toThrow(what);
    }
    const read = JSON.parse(JSON.stringify({ ...json, exits: undefined }));
    expect(policyFromJson(read, 'f.json', spec, []).exits).toBeUndefined();
  });

  it.each<[string, (tensors: Record<string, TensorData>) => void, string]>([
    ['a head missing', (t) => delete t['exits.2.weight'], 'tensor exits.2.weight is missing'],
    ['a bias missing', (t) => delete t['exits.0.bias'], 'tensor exits.0.bias is missing'],
    [
      'another shape',
      (t) => {
        t['exits.0.weight'] = { ...t['exits.0.weight'], shape: [24, 3] };
      },
      'exits.0.weight must be F32[3,24], got F32[24,3]',
    ],
    [
      'a class too few',
      (t) => {
        t['exits.3.bias'] = { dtype: 'f32', shape: [2], data: new Float32Array(2) };
      },
      'exits.3.bias must be F32[3]',
    ],
    [
      'infinity',
      (t) => {
        (t['exits.2.bias'].data as Float32Array)[1] = Number.POSITIVE_INFINITY;
      },
      'exits.2.bias holds values that are not finite',
    ],
    [
      'a head too many',
      (t) => {
        t['exits.1.bias'] = { dtype: 'f32', shape: [3], data: new Float32Array(3) };
      },
      'tensor exits.1.bias belongs to no router, exit or module',
    ],
  ])('whose heads have %s is refused', async (_, change, message) => {
    const dir = await written();
    const path = join(dir, routerFile);
    const tensors: Record<string, TensorData> = {};
    {
      using file = openSafetensors(path);
      for (const name of file.names())
        tensors[name] = { dtype: 'f32', shape: [...file.info(name).shape], data: file.tensor(name).readFloat() };
    }
    change(tensors);
    await writeSafetensors(path, tensors);
    const manifest = JSON.parse(readFileSync(join(dir, manifestFile), 'utf8'));
    manifest.files[routerFile] = await sha256File(path);
    writeFileSync(join(dir, manifestFile), JSON.stringify(manifest));
    expect(await refusal(() => readElastic(dir))).toMatchObject({
      code: 'InvalidData',
      message: expect.stringContaining(message),
    });
  });

  it('is not written with heads that could not be read', async () => {
    const out = temporaryDirectory();
    const [head] = heads([1], rule);
    const nan = Float32Array.from(head.bias).fill(Number.NaN, 1, 2);
    for (const [bad, message] of [
      [{ ...head, bias: new Float32Array(2) }, '[elastic] exits.1.bias must be 3 finite numbers, [3], got 2'],
      [{ ...head, bias: nan }, 'exits.1.bias must be 3 finite numbers'],
      [{ ...head, afterLayer: 4 }, 'exits[0].after_layer must be ascending layer ids below 4'],
      [{ ...head, threshold: Number.NaN }, 'exits[0].threshold must be a finite number, got null'],
    ] as const) {
      expect((await refusal(() => writeExits(out, base, [bad])))?.message).toContain(message);
    }
    expect((await refusal(() => writeExits(out, base, [])))?.message).toContain('exits must be a list of heads');
    expect(await readElastic(out)).toBeNull();
    const shallow = await deepClassifier(temporaryDirectory());
    editConfig(shallow, { num_hidden_layers: 2 });
    expect((await refusal(() => writeExits(out, shallow, [head])))?.message).toContain(
      'below 1, the last layer, got 1',
    );
    await expect(elastify(base, { kind: 'elastiformer' }, { out })).rejects.toThrow();
  });
});

describe('rules', () => {
  const logits = Float32Array.of(2, -1, 0.5);
  const exps = Array.from(logits, Math.exp);
  const p = exps.map((e) => e / exps.reduce((a, b) => a + b));
  const entropy = -p.reduce((sum, x) => sum + x * Math.log(x), 0);
  const exit = (rule: ExitRuleName, threshold: number): Exit => ({ afterLayer: 0, rule, threshold });

  it.each<[ExitRuleName, number, -1 | 1]>([
    ['entropy', entropy, 1],
    ['margin', p[0] - p[2], -1],
    ['maxprob', p[0], -1],
  ])('%s leaves on one side of its value alone', (rule, value, side) => {
    const leaves = (threshold: number) => decideExit(exit(rule, threshold), logits, null).leaves;
    expect(leaves(value + side * 1e-9)).toBe(true);
    expect(leaves(value - side * 1e-9)).toBe(false);
    expect(decideExit(exit(rule, value), logits, null).best).toBe(0);
  });

  it('are numbers where a softmax is 0 and 1', () => {
    const certain = Float32Array.of(0, 2000, -2000);
    expect(decideExit(exit('entropy', 1e-12), certain, null)).toEqual({ best: 1, agreed: 0, leaves: true });
    expect(decideExit(exit('entropy', 0), certain, null).leaves).toBe(false);
    expect(decideExit(exit('maxprob', 1), certain, null).leaves).toBe(false);
    expect(decideExit(exit('margin', 0.999999), certain, null).leaves).toBe(true);
    const even = Float32Array.of(1, 1, 1);
    expect(decideExit(exit('entropy', Math.log(3) + 1e-9), even, null).leaves).toBe(true);
    expect(decideExit(exit('entropy', Math.log(3) - 1e-9), even, null).leaves).toBe(false);
    expect(decideExit(exit('margin', 0), even, null).leaves).toBe(false);
  });

  it('patience counts exits that name the class of the one before', () => {
    const named = [1, 1, 0, 0, 0, 2].map((best) => Float32Array.from([0, 0, 0], (x, i) => (i === best ? 1 : x)));
    const walk = (patience: number) => {
      let before: ExitState | null = null;
      for (const [i, scores] of named.entries()) {
        const now = decideExit(exit('patience', patience), scores, before);
        if (now.leaves) return i;
        before = now;
      }
      return null;
    };
    expect([1, 2, 3].map(walk)).toEqual([1, 4, null]);
  });

  it('are used as far as a text can leave by them', () => {
    const exits = [0, 2, 3].map((afterLayer) => ({ ...exit('entropy', afterLayer === 3 ? 0 : 0.5), afterLayer }));
    const after = (setting: ExitSetting) => usableExits(setting, exits).map(({ afterLayer }) => afterLayer);
    expect(after(true)).toEqual([0, 2]);
    expect(after({ rule: 'maxprob', threshold: 0.9, minLayer: 1 })).toEqual([2, 3]);
    expect(after({ rule: 'patience', threshold: 2 })).toEqual([0, 2, 3]);
    for (const never of [
      { rule: 'entropy', threshold: 0 },
      { rule: 'entropy', threshold: -1 },
      { rule: 'maxprob', threshold: 1 },
      { rule: 'margin', threshold: 1 },
      { rule: 'patience', threshold: 3 },
      { rule: 'maxprob', threshold: 0.5, minLayer: 4 },
    ] as const)
      expect(after(never)).toEqual([]);
  });
});
