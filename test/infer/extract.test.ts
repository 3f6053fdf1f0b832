// Extraction of slices, and models loaded up to a level: the bits of the sliced run, streamed, in what loads them elsewhere.
import { execFileSync } from 'node:child_process';
import { cpSync, existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { beforeAll, describe, expect, test } from 'vitest';
import { distill } from '../../lib/distill/distill.js';
import { pretrain } from '../../lib/distill/pretrain.js';
import { elastify } from '../../lib/elastic/elastify.js';
import type { FfnWidth } from '../../lib/elastic/nested.js';
import { readElastic } from '../../lib/elastic/store.js';
import { extract, type Layout } from '../../lib/infer/export/extract.js';
import { loadModel } from '../../lib/infer/model.js';
import { evaluate } from '../../lib/infer/quality/evaluate.js';
import { Checkpoint, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { specFromConfig } from '../../lib/model/spec.js';
import { exportWeights, parameterPlan } from '../../lib/model/weights.js';
import { loadAddon } from '../../lib/native/index.js';
import { stories, temporaryDirectory, tinyModel, tinyPretraining } from '../distill/tiny.js';
import { goldenDirectory, largestDifference } from '../model/golden.js';

const ids = [5, 1, 28, 17, 3, 3, 22, 9, 30, 11, 2];
const granularities = [0.25, 0.5, 1];

async function nest(model: string, more: object = {}): Promise<string> {
  const out = join(temporaryDirectory(), 'nested');
  await elastify(model, { kind: 'matformer', granularities, ...more }, { out });
  return out;
}

/** The same checkpoint in two files with an index. */
async function sharded(model: string): Promise<string> {
  const out = temporaryDirectory();
  using checkpoint = Checkpoint.open(model);
  const names = checkpoint.names();
  const map: Record<string, string> = {};
  for (const [i, file] of ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'].entries()) {
    const some = names.filter((_, n) => n % 2 === i);
    const tensors = some.map((name): [string, TensorData] => {
      const { dtype, shape } = checkpoint.tensor(name);
      return [name, { dtype, shape, data: checkpoint.tensor(name).read() }];
    });
    await writeSafetensors(join(out, file), Object.fromEntries(tensors), { format: 'pt' });
    for (const name of some) map[name] = file;
  }
  writeFileSync(
    join(out, 'model.safetensors.index.json'),
    JSON.stringify({ metadata: { total_size: 1 }, weight_map: map }),
  );
  cpSync(join(model, 'config.json'), join(out, 'config.json'));
  return out;
}

describe.each([
  ['llama-biased', goldenDirectory],
  ['llama-bf16', goldenDirectory],
  ['gpt2', goldenDirectory],
  ['gpt2-f16', goldenDirectory],
  ['gemma2', goldenDirectory],
])('%s', (name, root) => {
  const model = join(root, name);
  const layers = specFromConfig(JSON.parse(readFileSync(join(model, 'config.json'), 'utf8')), 'config.json').layers;
  let dir: string;
  beforeAll(async () => {
    dir = await nest(model);
  });

  test.each<[string, FfnWidth, Layout]>([
    ['one width', 0.5, 'uniform'],
    ['widths by layer', [0.25, ...new Array(layers - 1).fill(0.5)], 'per-layer'],
  ])('%s: the bits of the slice', async (_, ffnWidth, layout) => {
    const out = join(temporaryDirectory(), 'out');
    const result = await extract(dir, { budget: { spec: { ffnWidth } }, layout, out });
    expect(result).toMatchObject({ dir: out, layout, largestDifference: 0 });
    await using sliced = await loadModel(dir);
    await using own = await loadModel(out);
    const { spec } = own.network;
    expect(spec.perLayer.map(({ ffn }) => ffn)).toEqual(result.widths);
    expect(await own.logits(ids)).toEqual(await sliced.logits(ids, { budget: { spec: { ffnWidth } } }));
    expect(own.info.parameters).toBe(result.parameters);
    expect(own.info.elastic).toBe(false);
    const [scored] = await own.score([ids]);
    expect(scored.usage.compute.ratio).toBe(1);
    const text = { maxTokens: 6, budget: { spec: { ffnWidth } } };
    const [a, b] = [await sliced.generate(ids, text).usage, await own.generate(ids, { maxTokens: 6 }).usage];
    expect(b.compute.flops).toBe(a.compute.flops);
    expect(b.compute.ratio).toBe(1);
    expect(result.loadsIn.includes('transformers')).toBe(layout === 'uniform');
    const bytes = result.parameters * (name.includes('16') ? 2 : 4);
    expect(Math.abs(result.bytes / bytes - 1)).toBeLessThan(0.05);
  });

  test('loaded up to a level: the same bits, fewer bytes, nothing above it', async () => {
    await using whole = await loadModel(dir);
    await using part = await loadModel(dir, { maxLevel: 'ffn50' });
    expect(await part.logits(ids)).toEqual(await whole.logits(ids, { budget: 'ffn50' }));
    expect(await part.logits(ids, { budget: 'ffn25' })).toEqual(await whole.logits(ids, { budget: 'ffn25' }));
    const { compute } = await part.generate(ids, { maxTokens: 3 }).usage;
    expect(compute).toMatchObject({ level: 'ffn50', requested: 'ffn50' });
    expect(compute.ratio).toBeLessThan(1);
    const { spec } = whole.network;
    const units =
      spec.layers * (spec.ffn / 2) * ((spec.gated ? 3 : 2) * spec.hidden + (spec.mlpBias ? (spec.gated ? 2 : 1) : 0));
    const width = name.includes('16') ? 2 : 4;
    expect(whole.info.weightBytes - part.info.weightBytes).toBe(units * width);
    expect(() => part.generate(ids, { budget: 'full' })).toThrow(
      new RegExp(
        `full runs ${spec.ffn} units of layer 0, and the model was loaded with ${spec.ffn / 2}, up to maxLevel 'ffn50'`,
      ),
    );
    await expect(part.logits(ids, { budget: { spec: { ffnWidth: 0.75 } } })).rejects.toThrow(/up to maxLevel/);
    await expect(evaluate(part, { data: [{ ids }], budgets: ['ffn50'] })).rejects.toThrow(/the full model is needed/);
  });
});

test('the packed copy of a slice is as large as the slice', async () => {
  const dir = await nest(await tinyModel(temporaryDirectory()));
  const packed = async (maxLevel: string) => {
    const before = loadAddon().memory().packedBytes;
    await using model = await loadModel(dir, { maxLevel, device: 'cpu' });
    await model.logits([1, 2, 3]);
    return loadAddon().memory().packedBytes - before;
  };
  const [full, half, quarter] = [await packed('full'), await packed('ffn50'), await packed('ffn25')];
  // Panels are filled up to their width.
  expect(half).toBeLessThan(0.8 * full);
  expect(quarter).toBeLessThan(half);
});

test('shards and their index stay, and widths become one', async () => {
  const model = await sharded(join(goldenDirectory, 'llama-biased'));
  const dir = await nest(model);
  const out = join(temporaryDirectory(), 'out');
  const { alignment } = (await readElastic(dir))!.policy.nested!;
  const { ffn } = specFromConfig(JSON.parse(readFileSync(join(model, 'config.json'), 'utf8')), 'config.json');
  const result = await extract(dir, { budget: { spec: { ffnWidth: [0.25, 1] } }, layout: 'uniform', out });
  const units = Math.round((0.625 * ffn) / alignment) * alignment;
  expect(result.widths).toEqual([units, units]);
  const index = JSON.parse(readFileSync(join(out, 'model.safetensors.index.json'), 'utf8'));
  expect(index.metadata.total_size).toBe(result.bytes);
  expect(readdirSync(out).filter((name) => name.endsWith('.safetensors'))).toHaveLength(2);
  expect(result.largestDifference).toBe(0);
  expect(readFileSync(join(out, 'README.md'), 'utf8')).toContain(`Feed-forwards of ${units} units`);
});

describe('fewer layers', () => {
  test.each<[string, number]>([
    ['llama-biased', 0],
    ['llama-bf16', 1],
    ['gpt2', 0],
    ['qwen3', 1],
    ['gemma2', 0],
    ['gemma3', 1],
  ])('%s without layer %i', async (name, skipped) => {
    const model = join(goldenDirectory, name);
    const dir = await nest(model);
    const out = join(temporaryDirectory(), 'out');
    const result = await extract(dir, { budget: 'ffn50', skipLayers: [skipped], out });
    expect(result.largestDifference).toBe(0);
    const mixed = name.startsWith('gemma');
    expect(result.loadsIn.slice(0, 2)).toEqual(['elastiform', 'transformers']);
    expect(result.loadsIn).toHaveLength(mixed ? 2 : 3);
    await using own = await loadModel(out, { device: 'cpu' });
    await using sliced = await loadModel(dir, { device: 'cpu' });
    const [left, whole] = [own.network, sliced.network];
    expect(left.spec.layers).toBe(whole.spec.layers - 1);
    // Every weight of a layer that stays is that of the model, cut to its first units.
    for (const [i, layer] of result.layers.entries()) {
      const [weights, all] = [left.weights.layers[i], whole.weights.layers[layer]];
      expect(weights.q.weight.readFloat()).toEqual(all.q.weight.readFloat());
      const up = weights.up.weight.readFloat();
      expect(up).toEqual(all.up.weight.readFloat().slice(0, up.length));
      const { window, rope } = left.spec.perLayer[i];
      expect({ window, rope }).toEqual({
        window: whole.spec.perLayer[layer].window,
        rope: whole.spec.perLayer[layer].rope,
      });
    }
    const budget = { spec: { ffnWidth: 0.5 } };
    expect(await own.logits(ids)).not.toEqual(await sliced.logits(ids, { budget }));
    const python = process.env.ELASTIFORM_PYTHON;
    if (!python) return;
    expect(largestDifference(await own.logits(ids), theirLogits(python, out))).toBeLessThan(1e-4);
  });

  test('widths of layers left out do not count, and those that stay may not be nested', async () => {
    const base = await tinyModel(temporaryDirectory());
    const dir = await nest(base);
    const widths = { spec: { ffnWidth: [0.5, 1, 0.5] } };
    const some = { budget: widths, skipLayers: [1] };
    const result = await extract(dir, { ...some, out: join(temporaryDirectory(), 'out') });
    expect(result).toMatchObject({ layers: [0, 2], widths: [32, 32], layout: 'uniform', largestDifference: 0 });
    const mean = { budget: { spec: { ffnWidth: [0.25, 0.25, 0.75] } }, skipLayers: [0], layout: 'uniform' } as const;
    const alike = await extract(dir, { ...mean, out: join(temporaryDirectory(), 'out') });
    expect(alike).toMatchObject({ widths: [32, 32], largestDifference: 0 });
    const first = await nest(base, { layers: [0] });
    const without = { budget: 'ffn50', skipLayers: [0] } as const;
    const whole = await extract(first, { ...without, out: join(temporaryDirectory(), 'out') });
    expect(whole).toMatchObject({ layers: [1, 2], widths: [64, 64], largestDifference: 0 });
  });

  test('of shards, whose index names what is left', async () => {
    const dir = await nest(await sharded(join(goldenDirectory, 'llama-biased')));
    const out = join(temporaryDirectory(), 'out');
    const result = await extract(dir, { budget: 'ffn50', skipLayers: [0], out });
    expect(result.largestDifference).toBe(0);
    const { weight_map, metadata } = JSON.parse(readFileSync(join(out, 'model.safetensors.index.json'), 'utf8'));
    expect(metadata.total_size).toBe(result.bytes);
    using checkpoint = Checkpoint.open(out);
    expect(Object.keys(weight_map).filter((name) => /layers\.[^0]/.test(name))).toEqual([]);
    for (const [name, file] of Object.entries(weight_map))
      expect(checkpoint.info(name).file).toBe(join(out, file as string));
  });
});

describe('corrections', () => {
  test.each(['llama', 'gpt2'])('are merged into the slice: %s', async (family) => {
    const base = family === 'llama' ? await tinyModel(temporaryDirectory()) : await gpt2Model();
    const plan = await nest(base, {
      lora: { rank: 2, targets: family === 'llama' ? ['q', 'gate', 'up', 'down'] : ['v', 'up', 'down'] },
    });
    const dir = join(temporaryDirectory(), 'trained');
    const data = { kind: 'documents' as const, documents: stories(60) };
    await distill({
      plan,
      out: dir,
      data,
      device: 'cpu',
      steps: 8,
      batchTokens: 256,
      sequenceLength: 48,
      loraLr: 2e-2,
    });
    const out = join(temporaryDirectory(), 'out');
    const result = await extract(dir, { budget: 'ffn50', out });
    await using sliced = await loadModel(dir);
    await using own = await loadModel(out);
    const wanted = await sliced.logits(ids, { budget: 'ffn50' });
    expect(largestDifference(await own.logits(ids), wanted)).toBeLessThan(1e-3);
    expect(result.largestDifference).toBeGreaterThan(0);
    await using part = await loadModel(dir, { maxLevel: 'ffn50' });
    expect(await part.logits(ids)).toEqual(wanted);
    // Without a layer, those of the others stay with them.
    const less = join(temporaryDirectory(), 'less');
    const { layers, largestDifference: off } = await extract(dir, { budget: 'ffn50', skipLayers: [0], out: less });
    expect(layers[0]).toBe(1);
    expect(off).toBeGreaterThan(0);
    expect(off).toBeLessThan(1e-3);
    // Whole, the model has no corrections.
    const whole = join(temporaryDirectory(), 'whole');
    expect(await extract(dir, { budget: 'full', out: whole })).toMatchObject({ largestDifference: 0 });
  });
});

async function gpt2Model(): Promise<string> {
  const out = temporaryDirectory();
  const model = { model_type: 'gpt2', n_embd: 32, n_head: 4, n_layer: 2, n_inner: 64, n_positions: 64 };
  await pretrain(tinyPretraining(out, { model, steps: 20 }));
  return out;
}

test('what cannot be extracted or loaded is refused, and nothing is left behind', async () => {
  const base = await tinyModel(temporaryDirectory());
  const dir = await nest(base);
  const out = join(temporaryDirectory(), 'out');
  const refuse = (options: object, message: RegExp, from = dir) =>
    expect(extract(from, { budget: 'ffn50', out, ...options })).rejects.toThrow(message);
  await refuse({}, /has no nested feed-forwards/, base);
  await refuse({ budget: 'huge' }, /no level is named 'huge'/);
  await refuse({ budget: { spec: { ffnWidth: 3 } } }, /multiple of the alignment/);
  await refuse({ layout: 'flat' }, /layout must be one of uniform, per-layer, got flat/);
  await refuse(
    { budget: { spec: { ffnWidth: [0.5, 1, 1] } } },
    /widths of layers differ \(32, 64, 64\): choose the layout/,
  );
  await refuse({ out: base }, /out must be a new or empty directory/);
  const some = await nest(base, { layers: [0, 1] });
  await refuse({ layout: 'uniform' }, /needs all layers nested/, some);
  const mixed = join(temporaryDirectory(), 'mixed');
  await extract(dir, { budget: { spec: { ffnWidth: [0.5, 1, 1] } }, layout: 'per-layer', out: mixed });
  await expect(nest(mixed)).rejects.toThrow(/have different widths, and only equal ones can be nested/);
  expect(existsSync(out)).toBe(false);
  expect(readdirSync(dirname(out))).toEqual([]);
  await expect(loadModel(dir, { maxLevel: 'huge' })).rejects.toThrow(/no level is named 'huge'/);
  await expect(loadModel(base, { maxLevel: 'ffn50' })).rejects.toThrow(/no level is named 'ffn50'/);
});

test('layers of their own width in a configuration are checked', () => {
  const config = JSON.parse(readFileSync(join(goldenDirectory, 'llama-gqa', 'config.json'), 'utf8'));
  const read = (own: unknown) => specFromConfig({ ...config, per_layer_config: own }, 'config.json');
  expect(read({ 0: { intermediate_size: 8 } }).perLayer[0].ffn).toBe(8);
  expect(read({ 0: { intermediate_size: 1000 } }).ffn).toBe(1000);
  expect(() => read([])).toThrow(/per_layer_config must be an object/);
  expect(() => read({ 99: { intermediate_size: 8 } })).toThrow(/per_layer_config.99 must be a layer from 0 to/);
  expect(() => read({ '01': { intermediate_size: 8 } })).toThrow(/must be a layer/);
  expect(() => read({ 0: { intermediate_size: 0 } })).toThrow(
    /per_layer_config.0.intermediate_size must be an integer/,
  );
  expect(() => read({ 0: { skip: ['attention'] } })).toThrow(/per_layer_config.0.skip must be absent/);
  expect(() => read({ 0: 8 })).toThrow(/per_layer_config.0 must be an object/);
});

test('extraction streams: memory does not grow with the checkpoint', async () => {
  // 96 MiB, of which nothing is computed.
  const { bytes, grown } = await measured(await largeLlama(), await nest(join(goldenDirectory, 'llama-gqa')), {});
  expect(bytes).toBeGreaterThan(60 * 2 ** 20);
  expect(grown).toBeLessThan(56 * 2 ** 20);
});

test('so does leaving out layers, of tables with a part of every layer, too', async () => {
  // 128 MiB, most of it the layers' own embeddings.
  const model = temporaryDirectory();
  const config = {
    ...{ model_type: 'gemma3n_text', hidden_size: 16, intermediate_size: 16, num_hidden_layers: 4, head_dim: 4 },
    ...{ num_attention_heads: 2, num_key_value_heads: 1, laurel_rank: 2, altup_num_inputs: 2, num_kv_shared_layers: 0 },
    ...{ vocab_size: 32, vocab_size_per_layer_input: 32 << 10, hidden_size_per_layer_input: 256 },
  };
  writeFileSync(join(model, 'config.json'), JSON.stringify(config));
  const spec = specFromConfig(config, 'config.json');
  await writeSafetensors(
    join(model, 'model.safetensors'),
    exportWeights(spec, new Float32Array(parameterPlan(spec).size)),
  );
  const small = await nest(join(goldenDirectory, 'gemma3n-one'));
  const { bytes, grown } = await measured(await nest(model), small, { skipLayers: [1] });
  expect(bytes).toBeGreaterThan(96 * 2 ** 20);
  expect(grown).toBeLessThan(56 * 2 ** 20);
});

async function largeLlama(): Promise<string> {
  const model = temporaryDirectory();
  const [hidden, ffn, layers, vocab] = [512, 4096, 2, 22_000];
  const sizes = { hidden_size: hidden, intermediate_size: ffn, num_hidden_layers: layers, vocab_size: vocab };
  const heads = { num_attention_heads: 8, num_key_value_heads: 8, tie_word_embeddings: true };
  const config = { model_type: 'llama', ...sizes, ...heads, max_position_embeddings: 64 };
  writeFileSync(join(model, 'config.json'), JSON.stringify(config));
  const zeros = (...shape: number[]): TensorData => ({
    dtype: 'f32',
    shape,
    data: new Float32Array(shape.reduce((a, b) => a * b, 1)),
  });
  const tensors: Record<string, TensorData> = {
    'model.embed_tokens.weight': zeros(vocab, hidden),
    'model.norm.weight': zeros(hidden),
  };
  for (let l = 0; l < layers; l++) {
    const at = `model.layers.${l}`;
    for (const name of ['q', 'k', 'v', 'o']) tensors[`${at}.self_attn.${name}_proj.weight`] = zeros(hidden, hidden);
    for (const name of ['gate', 'up']) tensors[`${at}.mlp.${name}_proj.weight`] = zeros(ffn, hidden);
    tensors[`${at}.mlp.down_proj.weight`] = zeros(hidden, ffn);
    for (const name of ['input', 'post_attention']) tensors[`${at}.${name}_layernorm.weight`] = zeros(hidden);
  }
  await writeSafetensors(join(model, 'model.safetensors'), tensors);
  return await nest(model);
}

/** Bytes that extraction at half the width writes, and those by which the memory of its process grows, after the same of a small model. */
async function measured(dir: string, small: string, options: object): Promise<{ bytes: number; grown: number }> {
  const out = join(temporaryDirectory(), 'out');
  const lib = pathToFileURL(fileURLToPath(new URL('../../dist/index.js', import.meta.url)));
  const program = `
    const { extract } = await import(${JSON.stringify(lib.href)});
    const options = { budget: 'ffn50', verify: false, ...${JSON.stringify(options)} };
    const slice = (from, to) => extract(from, { ...options, out: ${JSON.stringify(out)} + to });
    await slice(${JSON.stringify(small)}, '-small'); // all code is loaded
    const before = process.resourceUsage().maxRSS;
    const { bytes } = await slice(${JSON.stringify(dir)}, '');
    console.log(JSON.stringify({ bytes, grown: (process.resourceUsage().maxRSS - before) * 1024 }));`;
  const text = execFileSync(process.execPath, ['--input-type=module', '-e', program], { encoding: 'utf8' });
  return JSON.parse(text) as { bytes: number; grown: number };
}

// A Python with transformers, when one is at hand: `ELASTIFORM_PYTHON=/path/to/python npm test`.
function theirLogits(python: string, dir: string): Float32Array {
  const script = fileURLToPath(new URL('../../scripts/golden/logits.py', import.meta.url));
  const logits = execFileSync(python, [script, dir, ids.join()], { encoding: 'utf8' });
  return Float32Array.from(JSON.parse(logits) as number[]);
}

const python = process.env.ELASTIFORM_PYTHON;
if (python) {
  test.each(['llama-biased', 'gpt2', 'llama-bf16', 'gemma2'])(
    'transformers loads a uniform slice: %s',
    async (name) => {
      const dir = await nest(join(goldenDirectory, name));
      const out = join(temporaryDirectory(), 'out');
      await extract(dir, { budget: 'ffn50', layout: 'uniform', out });
      await using model = await loadModel(out, { device: 'cpu' });
      expect(largestDifference(await model.logits(ids), theirLogits(python, out))).toBeLessThan(1e-4);
    },
  );
}
