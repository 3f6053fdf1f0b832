// Gemma 3n beyond its golden vectors: slices of feed-forwards at run time are the sliced checkpoint, slices of fewer layers are
// what is left of the model, and what is refused.
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { cp, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, test } from 'vitest';
import { elastify, type Recipe } from '../../lib/elastic/elastify.js';
import { Graph, Program, scale } from '../../lib/graph/index.js';
import { extract } from '../../lib/infer/export/extract.js';
import { loadModel } from '../../lib/infer/model.js';
import { Checkpoint, openSafetensors, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { type Change, decoder } from '../../lib/model/decoder.js';
import { normalQuantile } from '../../lib/model/gemma3n.js';
import { type Selector, type SubLayer, selectEverything } from '../../lib/model/select.js';
import { sliceConfig } from '../../lib/model/slices.js';
import { specFromConfig } from '../../lib/model/spec.js';
import { bindWeights, exportWeights, loadWeights, parameterPlan } from '../../lib/model/weights.js';
import { InvalidArgumentError } from '../../lib/native/errors.js';
import { Engine } from '../../lib/native/index.js';
import { temporaryDirectory } from '../distill/tiny.js';
import { goldenDirectory, largestDifference, readSpec, readVectors } from '../model/golden.js';

const one = join(goldenDirectory, 'gemma3n-one');
const ids = [3, 30, 7, 1, 19, 12];

test('the quantile of the normal distribution', () => {
  expect(normalQuantile(0.5)).toBeCloseTo(0, 12);
  expect(normalQuantile(0.95)).toBeCloseTo(1.6448536269514722, 10);
  expect(normalQuantile(0.0013498980316301)).toBeCloseTo(-3, 8);
});

/** The checkpoint with feed-forwards of so many units. */
async function sliced(units: number): Promise<string> {
  const out = join(temporaryDirectory(), 'slice');
  await cp(one, out, { recursive: true });
  const config = JSON.parse(await readFile(join(one, 'config.json'), 'utf8'));
  await writeFile(join(out, 'config.json'), JSON.stringify(sliceConfig(config, { ffn: units })));
  using file = openSafetensors(join(one, 'model.safetensors'));
  const tensors: Record<string, TensorData> = {};
  for (const name of file.names()) {
    const { shape } = file.info(name);
    const [rows, columns] = shape;
    const data = file.tensor(name).readFloat();
    if (/mlp\.(gate|up)_proj/.test(name)) {
      tensors[name] = { dtype: 'f32', shape: [units, columns], data: data.slice(0, units * columns) };
    } else if (/mlp\.down_proj/.test(name)) {
      const kept = data.filter((_, i) => i % columns < units);
      tensors[name] = { dtype: 'f32', shape: [rows, units], data: kept };
    } else tensors[name] = { dtype: 'f32', shape, data };
  }
  await writeSafetensors(join(out, 'model.safetensors'), tensors, { format: 'pt' });
  return out;
}

test('a slice of the feed-forwards is the sliced checkpoint, and full the backbone, bit for bit', async () => {
  const dir = join(temporaryDirectory(), 'nested');
  await elastify(one, { kind: 'matformer', granularities: [0.5, 1] }, { out: dir });
  await using whole = await loadModel(one);
  await using nested = await loadModel(dir);
  await using small = await loadModel(await sliced(8));
  expect(nested.info.architecture).toBe('gemma3n_text');
  expect(await nested.logits(ids)).toEqual(await whole.logits(ids));
  const budget = { spec: { ffnWidth: 8 } };
  expect(await nested.logits(ids, { budget })).toEqual(await small.logits(ids));
  const [a, b] = [nested.generate(ids, { maxTokens: 6, budget }), small.generate(ids, { maxTokens: 6 })];
  expect(await a.ids).toEqual(await b.ids);
  expect((await a.usage).compute.flops).toBe((await b.usage).compute.flops);
});

/** The checkpoint with its number of units written so, [layers] or one for all. */
async function written(units: number | number[]): Promise<string> {
  const out = join(temporaryDirectory(), 'model');
  await cp(one, out, { recursive: true });
  const config = JSON.parse(await readFile(join(one, 'config.json'), 'utf8'));
  await writeFile(join(out, 'config.json'), JSON.stringify({ ...config, intermediate_size: units }));
  return out;
}

describe.each<[string, number | number[]]>([
  ['a list', [16, 16]],
  ['a number', 16],
])('units as %s', (_, units) => {
  test('a slice of every layer its own width has the logits of transformers, as a stock checkpoint', async () => {
    const golden = readVectors(join(one, 'slice.safetensors'));
    const widths = [...golden.widths];
    const [dir, out] = [join(temporaryDirectory(), 'nested'), join(temporaryDirectory(), 'out')];
    await elastify(
      await written(units),
      { kind: 'matformer', granularities: [0.25, 0.75, 1], alignment: 4 },
      { out: dir },
    );
    const options = { budget: { spec: { ffnWidth: widths } }, layout: 'per-layer', out } as const;
    const { loadsIn, largestDifference: off, widths: kept } = await extract(dir, options);
    expect({ off, kept }).toEqual({ off: 0, kept: widths });
    expect(loadsIn).toContain('transformers');
    const config = JSON.parse(await readFile(join(out, 'config.json'), 'utf8'));
    expect(config.intermediate_size).toEqual(widths);
    expect(config.per_layer_config).toBeUndefined();
    await using model = await loadModel(out, { device: 'cpu' });
    const { ids, offsets, logits } = golden;
    const own: number[] = [];
    for (let s = 0; s + 1 < offsets.length; s++)
      own.push(...(await model.logits([...ids.slice(offsets[s], offsets[s + 1])])));
    expect(largestDifference(own, logits)).toBeLessThan(1e-4);
    // Alike, they are what they were written as.
    const uniform = join(temporaryDirectory(), 'out');
    await extract(dir, { budget: { spec: { ffnWidth: 8 } }, out: uniform });
    const { intermediate_size } = JSON.parse(await readFile(join(uniform, 'config.json'), 'utf8'));
    expect(intermediate_size).toEqual(Array.isArray(units) ? [8, 8] : 8);
  });
});

describe('slices of fewer layers', () => {
  // Layers 4 and 6 use keys of 2, and 5 those of 3.
  const config = {
    ...{ model_type: 'gemma3n_text', architectures: ['Gemma3nForCausalLM'], hidden_size: 12, num_hidden_layers: 7 },
    ...{
      num_attention_heads: 4,
      num_key_value_heads: 2,
      head_dim: 4,
      intermediate_size: 16,
      hidden_activation: 'gelu_pytorch_tanh',
    },
    ...{
      vocab_size: 32,
      vocab_size_per_layer_input: 32,
      hidden_size_per_layer_input: 3,
      laurel_rank: 2,
      altup_num_inputs: 3,
    },
    ...{ num_kv_shared_layers: 3, sliding_window: 4, max_position_embeddings: 64, tie_word_embeddings: true },
    layer_types: [0, 1, 1, 0, 1, 0, 1].map((slides) => (slides ? 'sliding_attention' : 'full_attention')),
    activation_sparsity_pattern: [0.8, 0.5, 0, 0.6, 0, 0, 0],
  };
  const spec = specFromConfig(config, 'config.json');
  const plan = parameterPlan(spec);
  // Numbers without a pattern that a mistaken place could share, around 1 for norms.
  const flat = new Float32Array(plan.size);
  for (const { offset, size, decay } of plan.parameters) {
    for (let i = offset; i < offset + size; i++) flat[i] = 0.8 * Math.sin(i * i * 0.37 + i) + (decay ? 0 : 1);
  }
  // As published checkpoints have them: keys where none are used.
  const unused = (layer: number) => `model.layers.${layer}.self_attn.k_proj.weight`;
  const keys: TensorData = { dtype: 'f32', shape: [8, 12], data: new Float32Array(96).fill(2) };
  let dir: string;
  beforeAll(async () => {
    const model = temporaryDirectory();
    const text = JSON.stringify(config).replace('[0.8,0.5,0,0.6,0,0,0]', '[0.8,0.5,0.0,0.6,0.0,0.0,0.0]');
    await writeFile(join(model, 'config.json'), text);
    const tensors = { ...exportWeights(spec, flat), [unused(5)]: keys, [unused(6)]: keys };
    await writeSafetensors(join(model, 'model.safetensors'), tensors, { format: 'pt' });
    dir = join(temporaryDirectory(), 'nested');
    await elastify(model, { kind: 'matformer', granularities: [0.5, 1], alignment: 4 }, { out: dir });
  });

  /** What must be in the file, from the weights of the whole model by their names. */
  function expected(kept: readonly number[], widths: readonly number[], skip: readonly number[]) {
    const sliced = specFromConfig(sliceConfig(config, { skip, ffn: widths }), 'config.json');
    const own = parameterPlan(sliced);
    const values = new Float32Array(own.size);
    for (const { name, shape, offset, size } of own.parameters) {
      const whole = name.replace(/^layers\.(\d+)/, (_, layer) => `layers.${kept[Number(layer)]}`);
      const from = plan.parameters.find((other) => other.name === whole)!;
      const [columns, of] = [shape[1] ?? size, from.shape[1] ?? from.size];
      for (let i = 0; i < size; i++)
        values[offset + i] = flat[from.offset + Math.floor(i / columns) * of + (i % columns)];
    }
    return exportWeights(sliced, values);
  }

  test.each<[number[], number[], number | number[], number[]]>([
    [[5], [0, 1, 2, 3, 4, 6], 8, new Array(6).fill(8)],
    [
      [1, 0, 4],
      [2, 3, 5, 6],
      [4, 4, 8, 16, 4, 12, 8],
      [8, 16, 12, 8],
    ],
    [[2, 4, 6], [0, 1, 3, 5], 1, new Array(4).fill(16)],
    [[3, 2, 6, 5, 4], [0, 1], 8, [8, 8]],
  ])('without %j', async (skipLayers, layers, ffnWidth, widths) => {
    const out = join(temporaryDirectory(), 'out');
    const options = { budget: { spec: { ffnWidth } }, layout: 'per-layer', skipLayers, out } as const;
    const result = await extract(dir, options);
    expect(result).toMatchObject({ layers, widths, largestDifference: 0, loadsIn: ['elastiform', 'transformers'] });
    const written = JSON.parse(await readFile(join(out, 'config.json'), 'utf8'));
    const { intermediate_size, ...fields } = sliceConfig(config, { skip: skipLayers, ffn: widths });
    expect(written).toEqual({ ...fields, intermediate_size: new Set(widths).size > 1 ? widths : widths[0] });
    const skipped = skipLayers.toSorted((a, b) => a - b).join(', ');
    expect(await readFile(join(out, 'README.md'), 'utf8')).toMatch(new RegExp(`Layers left out, .*: ${skipped}\\.`));
    using file = openSafetensors(join(out, 'model.safetensors'));
    const tensors: Record<string, TensorData> = expected(layers, widths, skipLayers);
    for (const layer of [5, 6]) if (layers.includes(layer)) tensors[unused(layers.indexOf(layer))] = keys;
    expect(file.names().sort()).toEqual(Object.keys(tensors).sort());
    for (const [name, { shape, data }] of Object.entries(tensors)) {
      expect(file.info(name).shape, name).toEqual(shape);
      expect(file.tensor(name).readFloat(), name).toEqual(data);
    }
    const python = process.env.ELASTIFORM_PYTHON;
    if (!python) return;
    const script = fileURLToPath(new URL('../../scripts/golden/logits.py', import.meta.url));
    const theirs = JSON.parse(execFileSync(python, [script, out, ids.join()], { encoding: 'utf8' })) as number[];
    await using model = await loadModel(out, { device: 'cpu' });
    expect(largestDifference(await model.logits(ids), theirs)).toBeLessThan(1e-4);
  });

  test.each<[number[], RegExp]>([
    [[2], /layer 2 owns the keys and values that layer 4 uses: skip both or neither/],
    [[2, 4], /layer 2 owns the keys and values that layer 6 uses/],
    [[3], /layer 3 owns the keys and values that layer 5 uses/],
    [[7], /layers to skip must be different ids from 0 to 6, got \[7\]/],
    [[1, 1], /layers to skip must be different ids/],
    [[0, 1, 2, 3, 4, 5, 6], /a layer at least must be kept/],
  ])('without %j is refused', async (skipLayers, message) => {
    const out = join(temporaryDirectory(), 'out');
    const run = extract(dir, { budget: 'full', skipLayers, out });
    await expect(run).rejects.toThrow(message);
    await expect(run).rejects.toThrow(InvalidArgumentError);
    expect(existsSync(out)).toBe(false);
  });

  test('sparsity that the file leaves to the defaults is written as numbers with a point', async () => {
    const { activation_sparsity_pattern: _, ...rest } = config;
    const model = temporaryDirectory();
    await writeFile(join(model, 'config.json'), JSON.stringify(rest));
    await writeSafetensors(join(model, 'model.safetensors'), exportWeights(spec, flat), { format: 'pt' });
    const [nested, out] = [join(temporaryDirectory(), 'nested'), join(temporaryDirectory(), 'out')];
    await elastify(model, { kind: 'matformer', granularities: [0.5, 1] }, { out: nested });
    await extract(nested, { budget: 'full', skipLayers: [0], out });
    const text = (await readFile(join(out, 'config.json'), 'utf8')).replaceAll(/\s/g, '');
    expect(text).toContain('"activation_sparsity_pattern":[0.0,0.0,0.0,0.0,0.0,0.0]');
  });
});

test('rows that do not enter a feed-forward keep what came before it, whatever mixes the streams', async () => {
  using checkpoint = Checkpoint.open(join(goldenDirectory, 'gemma3n'));
  const spec = readSpec(join(goldenDirectory, 'gemma3n'));
  using loaded = loadWeights(spec, checkpoint);
  using engine = new Engine();
  const g = new Graph();
  const inputs = {
    ids: g.feed('ids', 'i32', [ids.length]),
    positions: g.feed('positions', 'i32', [ids.length]),
    offsets: g.feed('offsets', 'i32', [2]),
  };
  const weights = bindWeights(g, loaded.weights);
  const entered = { rows: g.feed('rows', 'i32', [2]), offsets: g.feed('starts', 'i32', [2]) };
  for (let layer = 0; layer < spec.layers; layer++) {
    const record = (name: string, selector: Selector) => {
      const changes: Change[] = [];
      decoder(g, spec, weights, inputs, selector, { changes });
      const { before, after } = changes[2 * layer + 1];
      g.output(`${name} ${layer} before`, scale(before, 1));
      g.output(`${name} ${layer} after`, scale(after, 1));
    };
    record('full', selectEverything);
    const here = (s: SubLayer) => s.layer === layer && s.place === 'mlp';
    record('routed', { runs: () => true, rows: (s) => (here(s) ? entered : null) });
  }
  using program = Program.compile(g, engine);
  const { outputs } = await program.run({
    feeds: {
      ids: Int32Array.from(ids),
      positions: Int32Array.from(ids, (_, i) => i),
      offsets: Int32Array.of(0, ids.length),
      ...{ rows: Int32Array.of(1, 4), starts: Int32Array.of(0, 2) },
    },
  });
  for (let layer = 0; layer < spec.layers; layer++) {
    const of = (name: string, row: number) =>
      (outputs[name] as Float32Array).slice(row * spec.hidden, (row + 1) * spec.hidden);
    for (const row of ids.keys()) {
      const what = row === 1 || row === 4 ? 'after' : 'before';
      expect(of(`routed ${layer} after`, row), `layer ${layer}`).toEqual(of(`full ${layer} ${what}`, row));
      expect(of(`full ${layer} before`, row)).not.toEqual(of(`full ${layer} after`, row));
    }
  }
});

test('layers that use keys and values of others have no cache', async () => {
  await using model = await loadModel(join(goldenDirectory, 'gemma3n'));
  const counters = model.network.spec.perLayer.map(({ keysOf }) => keysOf);
  expect(counters).toEqual([null, null, 0, 1, 0, 1]);
  const made = await model.generate(ids, { maxTokens: 12 }).ids;
  expect(made.length).toBeGreaterThan(0);
});

describe('refused', () => {
  test.each<[string, Recipe | Recipe[], string]>([
    ['gemma3n-one', { kind: 'elastiformer' }, 'has keys that other layers use, and is not routed'],
    ['gemma3n-one', { kind: 'elastiformer', tokens: {}, heads: {} }, 'has keys that other layers use'],
    ['gemma3n', { kind: 'elastiformer', tokens: { mlp: 0.5 }, blocks: { count: 2 } }, 'are sparse, and cannot be cut'],
    ['gemma3n', { kind: 'matformer', granularities: [0.5, 1] }, 'that of layer 0 has 16 units and the widest 24'],
  ])('%s: %j', async (name, recipe, message) => {
    const run = elastify(join(goldenDirectory, name), recipe, { out: join(temporaryDirectory(), 'plan') });
    await expect(run).rejects.toThrow(message);
    await expect(run).rejects.toThrow(InvalidArgumentError);
  });
});
