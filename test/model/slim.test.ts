// Slim encoders: heads and units kept, embeddings of a lower rank, stock checkpoints of the same function, and bad configurations.
import { cpSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { exportSlim, loadModel, type TextInput } from '../../lib/index.js';
import { Checkpoint, writeSafetensors } from '../../lib/io/safetensors.js';
import { encoderSpecFromConfig, slimKey } from '../../lib/model/encoder_spec.js';
import { encoderParameters, encoderSlots, loadEncoderWeights } from '../../lib/model/encoder_weights.js';
import { encoderFlops } from '../../lib/model/flops.js';
import { type FlatEncoder, keepParts, stockEncoder, weightsOf, withEmbeddingRank } from '../../lib/model/slim.js';
import { exportSlots, flattened, planOf } from '../../lib/model/weights.js';
import { InvalidArgumentError, InvalidFileError } from '../../lib/native/errors.js';
import { temporaryDirectory } from '../temporary.js';
import { encoderDirectory, largestDifference, readCases } from './golden.js';

const root = temporaryDirectory();

function open(name: string): FlatEncoder {
  const path = join(encoderDirectory(name), 'config.json');
  const config = readFileSync(path, 'utf8');
  const spec = encoderSpecFromConfig(JSON.parse(config), path);
  using checkpoint = Checkpoint.open(encoderDirectory(name));
  using loaded = loadEncoderWeights(spec, checkpoint);
  return { spec, config, weights: flattened(planOf(encoderSlots(spec)), loaded.byName) };
}

async function write(name: string, { spec, config, weights }: FlatEncoder, tokenizer: string): Promise<string> {
  const dir = join(root, name);
  mkdirSync(dir, { recursive: true });
  writeFileSync(join(dir, 'config.json'), config);
  cpSync(join(encoderDirectory(tokenizer), 'tokenizer.json'), join(dir, 'tokenizer.json'));
  await writeSafetensors(join(dir, 'model.safetensors'), exportSlots(spec, encoderSlots(spec), weights));
  return dir;
}

const all = (count: number) => Array.from({ length: count }, (_, i) => i);

describe.each(['bert-classes', 'roberta-classes', 'distilbert-score'])('%s', (name) => {
  const model = open(name);
  const { hidden, headDim, ffn } = model.spec;
  const texts = readCases(name).map(({ texts }) => texts as unknown as TextInput);
  const logits = async (dir: string) => {
    await using loaded = await loadModel(dir);
    const results: Float32Array[] = [];
    for (const text of texts) results.push(await loaded.logits(text));
    return results;
  };

  it('with all of its parts is what it was, to the bit', async () => {
    const kept = keepParts(model, { heads: [all(3), all(3)], units: [all(ffn), all(ffn)] });
    expect(kept.weights).toEqual(model.weights);
    expect(await logits(await write(`${name}-all`, kept, name))).toEqual(await logits(encoderDirectory(name)));
  });

  it('runs with some heads and units, as the whole does whose others are zeros, and is as small as counted', async () => {
    const heads = [[0, 2], [1]];
    const units = [all(ffn).filter((u) => u % 3 === 0), all(ffn).filter((u) => u > 20)];
    const slim = keepParts(model, { heads, units });
    expect(slim.weights).toHaveLength(encoderParameters(slim.spec));
    const dir = await write(`${name}-slim`, slim, name);
    // The outputs of heads and units that are gone, made zeros in the whole.
    const whole = { ...model, weights: model.weights.slice() };
    const byName = weightsOf(whole);
    for (const layer of [0, 1]) {
      const o = byName.get(`layers.${layer}.o.weight`)!;
      for (let i = 0; i < o.length; i++) if (!heads[layer].includes(Math.floor((i % hidden) / headDim))) o[i] = 0;
      const down = byName.get(`layers.${layer}.down.weight`)!;
      for (let i = 0; i < down.length; i++) if (!units[layer].includes(i % ffn)) down[i] = 0;
    }
    const [got, wanted] = [await logits(dir), await logits(await write(`${name}-zeros`, whole, name))];
    for (const [i, values] of got.entries()) expect(largestDifference(values, wanted[i])).toBeLessThan(1e-5);
    expect(largestDifference(got[0], (await logits(encoderDirectory(name)))[0])).toBeGreaterThan(1e-3);
    await using loaded = await loadModel(dir);
    const [{ compute }] = await loaded.classify([texts[0]]);
    expect(compute.flops).toBe(compute.flopsFull);
    expect(compute.flopsFull).toBe(encoderFlops(slim.spec, [readCases(name)[0].ids.length], 'head'));
    expect(compute.flopsFull).toBeLessThan(encoderFlops(model.spec, [readCases(name)[0].ids.length], 'head'));
  });

  it('with embeddings of full rank computes the same; of a lower rank they are as near as can be', async () => {
    const full = withEmbeddingRank(model, hidden);
    const before = await logits(encoderDirectory(name));
    const after = await logits(await write(`${name}-rank`, full, name));
    for (const [i, values] of after.entries()) expect(largestDifference(values, before[i])).toBeLessThan(1e-4);
    const distance = (rank: number) => {
      const low = weightsOf(withEmbeddingRank(model, rank));
      const [e1, e2, whole] = [low.get('embed')!, low.get('embedUp.weight')!, weightsOf(model).get('embed')!];
      return whole.reduce((sum, value, i) => {
        const [t, d] = [Math.floor(i / hidden), i % hidden];
        let product = 0;
        for (let r = 0; r < rank; r++) product += e1[t * rank + r] * e2[d * rank + r];
        return sum + (value - product) ** 2;
      }, 0);
    };
    // What is lost of rank r and rank r + 1 differs by the square of a singular value, which falls with r (Eckart and Young).
    const lost = [20, 21, 22, 23, 24].map(distance);
    const steps = lost.slice(1).map((value, i) => lost[i] - value);
    expect(lost[4]).toBeLessThan(1e-8);
    for (const [i, step] of steps.entries()) {
      expect(step).toBeGreaterThan(0);
      if (i > 0) expect(step).toBeLessThanOrEqual(steps[i - 1] * (1 + 1e-4));
    }
  });

  it('is a stock checkpoint of the same function, whatever was taken away', async () => {
    const slim = withEmbeddingRank(keepParts(model, { heads: [[1], [0, 2]], units: [all(9), all(12)] }), 8);
    const stock = stockEncoder(slim);
    expect(JSON.parse(stock.config)).not.toHaveProperty(slimKey);
    expect(stock.spec.perLayer.map(({ ffn }) => ffn)).toEqual([12, 12]);
    const own = await write(`${name}-own`, slim, name);
    const out = join(root, `${name}-stock`);
    const { largestDifference: reported, ...result } = await exportSlim(own, { out });
    expect(result).toEqual({
      ...{ dir: out, parameters: encoderParameters(stock.spec), slimParameters: encoderParameters(slim.spec), ffn: 12 },
      padded: { heads: 3, units: 3 },
    });
    expect(reported).toBeLessThan(1e-4);
    const [wanted, got] = [await logits(own), await logits(out)];
    for (const [i, values] of got.entries()) expect(largestDifference(values, wanted[i])).toBeLessThan(1e-4);
    await expect(exportSlim(out, { out: join(root, 'twice') })).rejects.toThrow(
      "has no slim encoder: its config.json has no 'slim'",
    );
    await expect(exportSlim(own, { out })).rejects.toThrow(InvalidArgumentError);
  });
});

it.each<[object, string]>([
  [
    { attention_heads: [1], intermediate_sizes: [4, 4] },
    'slim.attention_heads must be a list of 2 integers from 1 to 3',
  ],
  [
    { attention_heads: [1, 4], intermediate_sizes: [4, 4] },
    'slim.attention_heads must be a list of 2 integers from 1 to 3',
  ],
  [{ attention_heads: [1, 1] }, 'slim.intermediate_sizes must be a list of 2 integers from 1 to 40'],
  [{ attention_heads: [1, 1], intermediate_sizes: [0, 4] }, 'slim.intermediate_sizes must be a list of 2 integers'],
  [{ attention_heads: [1, 1], intermediate_sizes: [4, 4], embedding_rank: 25 }, 'slim.embedding_rank must be'],
])('refuses %j', (slim, message) => {
  const config = { ...JSON.parse(open('bert-classes').config), [slimKey]: slim };
  const read = () => encoderSpecFromConfig(config, 'dir/config.json');
  expect(read).toThrow(InvalidFileError);
  expect(read).toThrow(message);
});
