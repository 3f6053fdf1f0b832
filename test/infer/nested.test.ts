// Nested feed-forwards while a model runs: slices are the extracted model bit for bit, all widths share one program.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, test, vi } from 'vitest';
import type { Budget } from '../../lib/elastic/budget.js';
import { elastify, type Recipe } from '../../lib/elastic/elastify.js';
import { LoraTensors } from '../../lib/elastic/lora.js';
import { mixAndMatch, mostWidths } from '../../lib/elastic/nested.js';
import { readElastic } from '../../lib/elastic/store.js';
import { Program } from '../../lib/graph/index.js';
import { extract } from '../../lib/infer/export/extract.js';
import { packRuns, RunWidths } from '../../lib/infer/mixed.js';
import { ElasticModel, loadModel } from '../../lib/infer/model.js';
import { profile } from '../../lib/infer/profile.js';
import { evaluate } from '../../lib/infer/quality/evaluate.js';
import { Checkpoint, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { feedForwardFlops, forwardFlops } from '../../lib/model/flops.js';
import { loadAddon, Tensor } from '../../lib/native/index.js';
import { temporaryDirectory, tinyModel } from '../distill/tiny.js';
import { goldenDirectory } from '../model/golden.js';
import { elasticDirectories } from './fixture.js';

/** The same checkpoint with `units` units of every feed-forward, cut by plain loops. */
async function cut(model: string, units: number): Promise<string> {
  const out = temporaryDirectory();
  const config = JSON.parse(readFileSync(join(model, 'config.json'), 'utf8'));
  const gpt2 = config.model_type === 'gpt2';
  using checkpoint = Checkpoint.open(model);
  const tensors: Record<string, TensorData> = {};
  for (const name of checkpoint.names()) {
    const tensor = checkpoint.tensor(name);
    let { shape } = tensor;
    let data = tensor.readFloat();
    const [, part] = /mlp\.(gate_proj|up_proj|down_proj|c_fc|c_proj)/.exec(name) ?? [];
    const bias = name.endsWith('.bias');
    const output = part === 'down_proj' || part === 'c_proj';
    if (part && !(bias && output)) {
      // Along which axis of what is stored the units lie.
      const axis = bias ? 0 : output === gpt2 ? 0 : 1;
      const [rows, columns] = shape.length === 1 ? [shape[0], 1] : shape;
      const kept = axis === 0 ? [units, columns] : [rows, units];
      data = Float32Array.from(
        { length: kept[0] * kept[1] },
        (_, i) => data[Math.floor(i / kept[1]) * columns + (i % kept[1])],
      );
      shape = shape.length === 1 ? [units] : kept;
    }
    tensors[name] = { dtype: 'f32', shape, data };
  }
  await writeSafetensors(join(out, 'model.safetensors'), tensors, { format: 'pt' });
  writeFileSync(
    join(out, 'config.json'),
    JSON.stringify({ ...config, [gpt2 ? 'n_inner' : 'intermediate_size']: units }),
  );
  return out;
}

async function nested(model: string, ...more: Recipe[]): Promise<string> {
  const out = join(temporaryDirectory(), 'nested');
  await elastify(model, [...more, { kind: 'matformer', granularities: [0.25, 0.5, 1] }], { out });
  return out;
}

const ids = [5, 1, 28, 17, 3, 3, 22, 9, 30, 11, 2];

describe.each(['llama-biased', 'gpt2', 'llama-gqa', 'gemma3', 'qwen2'])('%s', (name) => {
  const model = join(goldenDirectory, name);
  let dir: string;
  beforeAll(async () => {
    dir = await nested(model);
  });

  test('a slice is the extracted model and full the backbone, bit for bit; FLOPs are counted', async () => {
    await using whole = await loadModel(model, { dtype: 'f32' });
    await using elastic = await loadModel(dir, { dtype: 'f32' });
    const { spec, policy } = elastic.network;
    expect(await elastic.logits(ids)).toEqual(await whole.logits(ids));
    for (const units of [policy!.nested!.alignment, spec.ffn / 2]) {
      await using small = await loadModel(await cut(model, units), { dtype: 'f32' });
      const budget = { spec: { ffnWidth: units } };
      expect(await elastic.logits(ids, { budget })).toEqual(await small.logits(ids));
      const text = { maxTokens: 8, seed: 1, temperature: 1 };
      const [a, b] = [elastic.generate(ids, { ...text, budget }), small.generate(ids, text)];
      expect(await a.ids).toEqual(await b.ids);
      const [{ compute }, other] = [await a.usage, await b.usage];
      expect(compute.flops).toBe(other.compute.flops);
      expect([...compute.layersRun.mlp]).toEqual(new Array(spec.layers).fill(Math.fround(units / spec.ffn)));
      const [scored] = await elastic.score([ids], { budget });
      expect(scored.usage.compute.ratio).toBe(
        forwardFlops(small.network.spec, [ids.length]).total / forwardFlops(spec, [ids.length]).total,
      );
    }
    expect(await elastic.logits(ids, { budget: 'full' })).toEqual(await whole.logits(ids));
  });
});

describe('a tiny model', () => {
  let model: string;
  let dir: string;
  beforeAll(async () => {
    model = await tinyModel(join(temporaryDirectory(), 'model'));
    dir = await nested(model);
  });
  const text = 'The cat saw the dog by the lake. The dog ran.';

  test('no width needs a program of its own, full included', async () => {
    await using elastic = await loadModel(dir);
    await elastic.logits(text);
    await elastic.generate(text, { maxTokens: 2 }).ids;
    const compile = Program.compile;
    let compiled = 0;
    const memory = () => {
      const { arenaBytes, packedBytes } = loadAddon().memory();
      return { arenaBytes, packedBytes };
    };
    const before = memory();
    Program.compile = (...args) => {
      compiled++;
      return compile.apply(Program, args);
    };
    try {
      for (const ffnWidth of [0.5, 0.25, 1, [0.25, 0.5, 1]]) {
        await elastic.logits(text, { budget: { spec: { ffnWidth } } });
        await elastic.generate(text, { maxTokens: 2, budget: { spec: { ffnWidth } } }).ids;
      }
    } finally {
      Program.compile = compile;
    }
    expect(compiled).toBe(0);
    expect(memory()).toEqual(before);
  });

  test('texts at several widths get the bits and the report they get alone', async () => {
    await using elastic = await loadModel(dir);
    const texts = ['The cat saw the dog.', 'The fox hid.', 'The pig ran.', 'The owl met the hen.', 'The dog ran.'];
    const budgets = ['full', 0.8, { spec: { ffnWidth: 0.25 } }, 0.8, { spec: { ffnWidth: [1, 0.5, 0.25] } }];
    const run = vi.spyOn(Program.prototype, 'run');
    const together = await elastic.score(texts, { budget: budgets });
    expect(run.mock.calls.length).toBe(1);
    run.mockRestore();
    for (const [i, result] of together.entries()) {
      const [alone] = await elastic.score([texts[i]], { budget: budgets[i] });
      expect(result.logprobs).toEqual(alone.logprobs);
      expect(result.usage.compute.flops).toBe(alone.usage.compute.flops);
      expect(result.usage.compute.layersRun).toEqual(alone.usage.compute.layersRun);
    }
    expect(together[4].usage.compute.layersRun.mlp).toEqual(Float32Array.of(1, 0.5, 0.25));
    expect(together[1].usage.compute.ratio).toBeLessThanOrEqual(0.8);
    const { spec } = elastic.network;
    const saved = 2 * together[2].tokens.length * 3 * spec.hidden * spec.ffn * 0.75 * spec.layers;
    const { flops, flopsFull } = together[2].usage.compute;
    expect(flopsFull - flops).toBe(saved);
    expect(feedForwardFlops(spec, together[2].tokens.length) * spec.layers * 0.75).toBe(saved);
  });

  test('a run has four widths of a layer at most; how many it has decides about its program', async () => {
    const out = join(temporaryDirectory(), 'aligned');
    await elastify(model, { kind: 'matformer', granularities: [0.25, 0.5, 1], alignment: 8 }, { out });
    await using elastic = await loadModel(out);
    const { ffn } = elastic.network.spec;
    const widths = [1, 2, 3, 4, 5, 6].map((n): Budget => ({ spec: { ffnWidth: n * 8 } }));
    const sequences = [0, 0, 1, 2, 3, 4, 3, 5, 0, 4].map((n) => ({
      ids: Int32Array.of(1, 2),
      point: elastic.resolve(widths[n], { length: 2 }),
    }));
    const runs = packRuns(elastic.network, sequences, { rows: 100, segments: 64 });
    expect(runs).toEqual([
      [0, 1, 2, 3, 4],
      [5, 6, 7, 8, 9],
    ]);
    // The levels between two granularities differ in a layer each, and have no width that is not one of theirs.
    const levels = mixAndMatch(elastic.network.policy!.nested!, elastic.network.spec.layers, ffn);
    expect(levels.length).toBeGreaterThan(mostWidths);
    const joint = new RunWidths(elastic.network);
    for (const widths of levels) expect(joint.join({ ...sequences[0].point, widths })).toBe(true);

    const compile = vi.spyOn(Program, 'compile');
    const compiled = async (numbers: readonly number[]) => {
      const before = compile.mock.calls.length;
      const streams = numbers.map((n) => elastic.generate([5, n], { maxTokens: 2, budget: widths[n] }));
      await Promise.all(streams.map(({ ids }) => ids));
      return compile.mock.calls.length - before;
    };
    try {
      expect(await compiled([0, 0])).toBe(1);
      expect(await compiled([0, 1])).toBe(1);
      expect(await compiled([2, 3, 2])).toBe(0);
      expect(await compiled([0, 1, 2])).toBe(1);
      expect(await compiled([5, 3, 1, 2])).toBe(0);
      expect(await compiled([0, 1, 2, 3, 4])).toBe(0);
    } finally {
      compile.mockRestore();
    }
  });

  test('eval, levels, trace and times', async () => {
    await using elastic = await loadModel(dir);
    const levels = elastic.info.levels.map(({ name }) => name);
    expect(levels).toEqual(expect.arrayContaining(['full', 'p90', 'ffn50', 'ffn25']));
    // Sequences of 32 rows.
    const data = [0, 1, 2].map((d) => ({ ids: Array.from({ length: 33 }, (_, i) => 1 + ((7 * i + 13 * d) % 90)) }));
    const report = await evaluate(elastic, { data, budgets: levels, baselines: ['drop'], speed: false });
    for (const level of report.levels) {
      if (level.method === 'drop') continue;
      expect(level.method).toBe(level.budget === 'full' ? 'full' : 'nested');
      expect(level.ratio).toBeCloseTo(elastic.resolve(level.budget, { length: 32 }).flopsRatio, 9);
    }
    const narrow = report.levels.find(({ budget }) => budget === 'ffn25')!;
    expect(narrow.share).toBeCloseTo((1 + 0.25) / 2, 6);
    await expect(evaluate(elastic, { data, budgets: [0.8], baselines: ['random'] })).rejects.toThrow(
      /'random' chooses what routers would/,
    );
    const trace = await elastic.trace(text, { budget: { spec: { ffnWidth: [0.25, 0.5, 1] } } });
    expect([...trace.blockShare]).toEqual([0.25, 0.5, 1]);
    expect(trace.depth.every((depth) => depth === 3)).toBe(true);
    const times = await profile(elastic, { ids: [1, 2, 3], lengths: [4] });
    expect(times.levels.map(({ level }) => level)).toEqual(levels);
  });
});

test('widths compose with routing of tokens and with corrections', async () => {
  const recipe = { tokens: { mlp: [0.4, 1] }, lora: { rank: 2, targets: ['q', 'gate', 'up', 'down'] } } as const;
  const { elastic: dir } = await elasticDirectories(recipe, { kind: 'matformer', granularities: [0.25, 0.5, 1] });
  await using elastic = await loadModel(dir);
  const { network } = elastic;
  const { spec } = network;
  // Units whose up is 0 add zeros, which change no bit: the oracle of a slice.
  const units = spec.ffn / 4;
  const masked = (rows: Float32Array, width: number) => rows.map((value, i) => (i < units * width ? value : 0));
  const up = (tensor: Tensor) =>
    Tensor.fromData('f32', [...tensor.shape] as [number, number], masked(tensor.readFloat(), spec.hidden));
  const weights = {
    ...network.weights,
    layers: network.weights.layers.map((layer) => ({ ...layer, up: { weight: up(layer.up.weight) } })),
  };
  const lora = new Map((await readElastic(dir))!.lora!);
  for (const [id, matrices] of lora) {
    if (id.endsWith('.up')) lora.set(id, { ...matrices, b: masked(matrices.b, matrices.rank) });
  }
  const oracle = new ElasticModel({ ...network, weights, lora: new LoraTensors(lora) });
  const tokens = network.tokenizer!.encode('The cat saw the dog by the lake. The dog ran to the barn.');
  for (const tokenCapacity of [{ mlp: 0.6 }, { mlp: [1, 0.5, 0] }]) {
    const wanted = await oracle.logits(tokens, { budget: { spec: { tokenCapacity } } });
    const budget = { spec: { tokenCapacity, ffnWidth: 0.25 } };
    expect(await elastic.logits(tokens, { budget })).toEqual(wanted);
    expect(await elastic.logits(tokens, { budget: { spec: { tokenCapacity } } })).not.toEqual(wanted);
    // Texts of which other shares are let in: what each costs is what it costs alone, but for rounding where it is divided.
    const texts = [tokens, tokens.slice(3, 9), [...tokens].reverse()];
    const together = await elastic.score(texts, { budget: [budget, budget, 'full'] });
    for (const [i, text] of texts.entries()) {
      const [alone] = await elastic.score([text], { budget: i < 2 ? budget : 'full' });
      expect(together[i].logprobs).toEqual(alone.logprobs);
      const [a, b] = [together[i], alone].map(({ usage }) => usage.compute.flops);
      expect(Math.abs(a / b - 1)).toBeLessThan(1e-6);
    }
    const { flops } = (await elastic.generate(tokens, { maxTokens: 1, budget }).usage).compute;
    const at = { length: tokens.length, maxTokens: 1 };
    expect(flops).toBeLessThan(
      (await oracle.generate(tokens, { maxTokens: 1, budget: { spec: { tokenCapacity } } }).usage).compute.flops,
    );
    expect(elastic.resolve(budget, at).flopsRatio).toBeLessThan(
      elastic.resolve({ spec: { tokenCapacity } }, at).flopsRatio,
    );
  }
  const out = join(temporaryDirectory(), 'out');
  await expect(extract(dir, { budget: { spec: { tokenCapacity: { mlp: 0.6 } } }, out })).rejects.toThrow(
    /routes \(tokenCapacity\), which no other runtime does/,
  );
  const { levels } = network.policy!;
  const routed = levels.find(({ spec }) => spec.tokenCapacity)!;
  await expect(loadModel(dir, { maxLevel: routed.name })).rejects.toThrow(/must be a level of widths alone/);
});
