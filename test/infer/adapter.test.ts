// LoRA adapters in PEFT's format: read with the logits that PEFT gives, merged, written so that PEFT reads them, refused.
import { execFileSync } from 'node:child_process';
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it, test } from 'vitest';
import { loraModules, loraOfModules } from '../../lib/elastic/lora.js';
import { mergeAdapter } from '../../lib/infer/export/merge.js';
import { loadModel } from '../../lib/infer/model.js';
import { type LoraMatrices, readPeft, writePeft } from '../../lib/io/peft.js';
import { toBf16, toF16 } from '../../lib/io/rounding.js';
import { openSafetensors, writeSafetensors } from '../../lib/io/safetensors.js';
import { projections } from '../../lib/model/select.js';
import { storedModules } from '../../lib/model/weights.js';
import { Tensor } from '../../lib/native/index.js';
import { goldenDirectory, largestDifference, readSpec, readVectors } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';

const root = temporaryDirectory();

const pairs = [
  { base: join(goldenDirectory, 'llama-gqa'), adapter: join(goldenDirectory, 'peft-llama') },
  { base: join(goldenDirectory, 'gpt2'), adapter: join(goldenDirectory, 'peft-gpt2') },
];

/** Logits of every sequence of golden ids, end to end. */
async function logitsOf(dir: string, vectors: ReturnType<typeof readVectors>, adapter?: string) {
  await using model = await loadModel(dir, { adapter, device: 'cpu' });
  const { ids, offsets } = vectors;
  const parts: number[] = [];
  for (let s = 0; s + 1 < offsets.length; s++) {
    parts.push(...(await model.logits([...ids.slice(offsets[s], offsets[s + 1])])));
  }
  return parts;
}

describe.each(pairs)('$adapter', ({ base, adapter }) => {
  const vectors = readVectors(join(adapter, 'logits.safetensors'));
  const spec = readSpec(base);

  it('gives the logits of PEFT, and others than without it', async () => {
    expect(largestDifference(await logitsOf(base, vectors, adapter), vectors.logits)).toBeLessThan(1e-4);
    expect(largestDifference(await logitsOf(base, vectors), vectors.logits)).toBeGreaterThan(1e-2);
  });

  it('may be one of several, of which each text has its own or none', async () => {
    const { modules, rank } = { modules: await readPeft(adapter), rank: 3 };
    const opposite = join(root, `opposite-${spec.family}`);
    const negated = new Map([...modules].map(([id, { b, ...m }]) => [id, { ...m, b: b.map((value) => -value) }]));
    await writePeft(opposite, negated, { base, rank, transposed: spec.family === 'gpt2' });
    const { ids, offsets, logits } = vectors;
    const text = [...ids.slice(offsets[0], offsets[1])];
    await using plain = await loadModel(base);
    await using model = await loadModel(base, { adapters: { peft: adapter, opposite } });
    expect(model.info.adapters).toEqual(['peft', 'opposite']);
    const own = await model.logits(text, { adapter: 'peft' });
    expect(largestDifference(own, logits.slice(0, own.length))).toBeLessThan(1e-4);
    expect(await model.logits(text)).toEqual(await plain.logits(text));

    const names = [undefined, 'peft', 'opposite', 'peft'];
    const together = await model.score([text, text, text, text.slice(2)], { adapter: names });
    expect(together[0].logprobs).toEqual((await plain.score([text]))[0].logprobs);
    expect(largestDifference(together[1].logprobs.slice(1), together[2].logprobs.slice(1))).toBeGreaterThan(1e-2);
    for (const [i, { tokens, logprobs }] of together.entries()) {
      const [alone] = await model.score([[...tokens]], { adapter: names[i] });
      expect(logprobs).toEqual(alone.logprobs);
    }
    await expect(model.score([text], { adapter: names })).rejects.toThrow(
      /adapter must be one adapter or one for each/,
    );
    expect(() => model.generate(text, { adapter: 'other' })).toThrow("no adapter 'other'; it has peft, opposite");
    expect(() => plain.generate(text, { adapter: 'peft' })).toThrow('it was loaded without adapters');
    await expect(loadModel(base, { adapter, adapters: { adapter } })).rejects.toThrow(/give adapter, .* not both/);
    await expect(loadModel(base, { adapters: [1] as never })).rejects.toThrow(/adapters must be an object/);
  });

  it('merges into a stock checkpoint', async () => {
    const out = join(root, `merged-${spec.family}`);
    const result = await mergeAdapter(base, { adapter, out });
    expect(result.largestDifference).toBeLessThan(1e-4);
    expect(result.modules).toBe((await readPeft(adapter)).size);
    expect(largestDifference(await logitsOf(out, vectors), vectors.logits)).toBeLessThan(1e-4);
    await expect(mergeAdapter(base, { adapter, out })).rejects.toThrow(/out must be a new or empty directory/);
    await expect(mergeAdapter(base, { out: join(root, 'none') })).rejects.toThrow(/has no adapter of its own/);
  });

  it('is the same when it is taken apart by projection and put together again', async () => {
    const modules = await readPeft(adapter);
    const again = loraOfModules(spec, loraModules(spec, loraOfModules(spec, modules, adapter)), adapter);
    const once = loraOfModules(spec, modules, adapter);
    expect([...again.keys()].sort()).toEqual([...once.keys()].sort());
    for (const [id, { rank, a, b }] of once) {
      expect(again.get(id)!.rank).toBe(rank);
      expect(largestDifference(again.get(id)!.a, a)).toBe(0);
      expect(largestDifference(again.get(id)!.b, b)).toBe(0);
    }
  });
});

describe('an adapter is refused', () => {
  const { base, adapter } = pairs[0];
  const edit = (name: string, change: (dir: string) => void): string => {
    const dir = join(root, name);
    cpSync(adapter, dir, { recursive: true });
    change(dir);
    return dir;
  };
  const config = (name: string, keys: object) =>
    edit(name, (dir) => {
      const path = join(dir, 'adapter_config.json');
      writeFileSync(path, JSON.stringify({ ...JSON.parse(readFileSync(path, 'utf8')), ...keys }));
    });
  const load = (dir: string, model = base) => loadModel(model, { adapter: dir });
  async function tensors(name: string, change: (all: Record<string, { shape: number[]; data: Float32Array }>) => void) {
    const dir = edit(name, () => {});
    const path = join(dir, 'adapter_model.safetensors');
    const all: Record<string, { dtype: 'f32'; shape: number[]; data: Float32Array }> = {};
    {
      using file = openSafetensors(path);
      for (const key of file.names()) {
        all[key] = { dtype: 'f32', shape: [...file.info(key).shape], data: file.tensor(key).readFloat() };
      }
    }
    change(all);
    for (const entry of Object.values(all)) Object.assign(entry, { dtype: 'f32' });
    await writeSafetensors(path, all);
    return dir;
  }
  const first = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight';

  test.each<[string, () => string, RegExp]>([
    ['of another method', () => config('method', { peft_type: 'IA3' }), /peft_type must be "LORA", got "IA3"/],
    ['with biases', () => config('bias', { bias: 'all' }), /bias must be "none"/],
    ['with magnitudes', () => config('dora', { use_dora: true }), /use_dora is set/],
    [
      'with further modules',
      () => config('extra', { modules_to_save: ['lm_head'] }),
      /modules_to_save has \["lm_head"\]/,
    ],
    ['without alpha', () => config('alpha', { lora_alpha: null }), /lora_alpha must be a number, got null/],
    ['with a bad pattern', () => config('pattern', { alpha_pattern: { '(': 1 } }), /no regular expression/],
    ['that is not there', () => join(root, 'nowhere'), /adapter_config.json/],
  ])('%s', async (_, make, message) => {
    await expect(load(make())).rejects.toThrow(message);
  });

  it('for another model', async () => {
    await expect(load(adapter, pairs[1].base)).rejects.toThrow(/this model has no module model.layers.0/);
    await expect(load(adapter, join(goldenDirectory, 'elastiformer-llama'))).rejects.toThrow(
      /must have \d+ inputs and \d+ outputs, got|this model has no module/,
    );
  });

  it('with an unknown tensor, half a module, another rank, or values that are not finite', async () => {
    const strange = await tensors('strange', (all) => {
      all['base_model.model.classifier.weight'] = { shape: [1], data: new Float32Array(1) };
    });
    await expect(load(strange)).rejects.toThrow(/tensor base_model.model.classifier.weight is no LoRA matrix/);
    const half = await tensors('half', (all) => {
      delete all[first];
    });
    await expect(load(half)).rejects.toThrow(/q_proj.lora_A.weight is missing/);
    const rank = await tensors('rank', (all) => {
      const { shape, data } = all[first];
      all[first] = { shape: [shape[0] - 1, shape[1]], data: data.slice(shape[1]) };
    });
    await expect(load(rank)).rejects.toThrow(/differ in rank/);
    const nan = await tensors('nan', (all) => {
      all[first].data[0] = Number.NaN;
    });
    await expect(load(nan)).rejects.toThrow(/not finite/);
  });
});

it('rounds to the nearest narrower value, as the kernels widen it', () => {
  const values = Float32Array.from({ length: 4000 }, (_, i) => Math.sin(i) * 2 ** ((i % 60) - 30));
  values.set([0, -0, 1, 65504, 65519, -65519, 2 ** -14, 2 ** -24, 2 ** -25, 1.5 * 2 ** -24, 2049, 2051, 0.99999]);
  for (const [dtype, bits, relative, least] of [
    ['bf16', toBf16(values), 2 ** -8, 0],
    ['f16', toF16(values), 2 ** -11, 2 ** -25],
  ] as const) {
    using tensor = Tensor.fromData(dtype, [values.length], bits);
    const back = tensor.readFloat();
    values.forEach((value, i) => {
      if (dtype === 'f16' && Math.abs(value) >= 65520) expect(Math.abs(back[i])).toBe(Number.POSITIVE_INFINITY);
      else
        expect(Math.abs(back[i] - value), `${value} ${back[i]}`).toBeLessThanOrEqual(
          relative * Math.abs(value) + least,
        );
    });
  }
  // ties to even
  expect([...toF16(Float32Array.of(2049, 2051))]).toEqual([0x6800, 0x6802]);
});

// A Python with peft, when one is at hand: `ELASTIFORM_PYTHON=/path/to/python npm test`.
const python = process.env.ELASTIFORM_PYTHON;
if (python) {
  test.each(pairs)(
    'peft loads what is written for $base',
    async ({ base }) => {
      const spec = readSpec(base);
      const targets = projections.filter((projection) => spec.gated || projection !== 'gate');
      const stored = storedModules(spec);
      // Ranks differ among projections of one fused module.
      const lora = new Map<string, LoraMatrices>();
      for (const [i, projection] of targets.entries()) {
        const id = `layers.1.${projection}`;
        const { inputs, outputs } = stored.get(id)!;
        const rank = 1 + (i % 3);
        const wave = (n: number, by: number) =>
          Float32Array.from({ length: n }, (_, j) => 0.2 * Math.sin(by * (j + 1)));
        lora.set(id, { rank, a: wave(rank * inputs, 1.3), b: wave(rank * outputs, 2.1) });
      }
      const dir = join(root, `written-${spec.family}`);
      await writePeft(dir, loraModules(spec, lora), { base, rank: 1, transposed: spec.family === 'gpt2' });
      const script = fileURLToPath(new URL('../../scripts/golden/peft_logits.py', import.meta.url));
      const ids = Array.from({ length: 12 }, (_, i) => (i * 5 + 2) % spec.vocab);
      const theirs = JSON.parse(
        execFileSync(python, [script, base, dir, ids.join()], { encoding: 'utf8' }),
      ) as number[];
      await using model = await loadModel(base, { adapter: dir, device: 'cpu' });
      expect(largestDifference(await model.logits(ids), theirs)).toBeLessThan(1e-4);
    },
    120_000,
  );
}
