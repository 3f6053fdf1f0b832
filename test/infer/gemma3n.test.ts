// Gemma 3n beyond its golden vectors: slices of feed-forwards at run time are the sliced checkpoint, and what is refused.
import { cp, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { elastify, type Recipe } from '../../lib/elastic/elastify.js';
import { Graph, Program, scale } from '../../lib/graph/index.js';
import { extract } from '../../lib/infer/export/extract.js';
import { loadModel } from '../../lib/infer/model.js';
import { Checkpoint, openSafetensors, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { type Change, decoder } from '../../lib/model/decoder.js';
import { normalQuantile } from '../../lib/model/gemma3n.js';
import { type Selector, type SubLayer, selectEverything } from '../../lib/model/select.js';
import { sliceConfig } from '../../lib/model/slices.js';
import { bindWeights, loadWeights } from '../../lib/model/weights.js';
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
