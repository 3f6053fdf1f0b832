// Weights: found in checkpoints of every family, refused when they do not fit, and the flat vector that is trained.
import { join } from 'node:path';
import { beforeEach, describe, expect, it } from 'vitest';
import { Checkpoint, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { type ModelSpec, specFromConfig } from '../../lib/model/spec.js';
import {
  exportWeights,
  flattenWeights,
  initialWeights,
  loadWeights,
  mapWeights,
  parameterPlan,
  weightsByName,
} from '../../lib/model/weights.js';
import { InvalidArgumentError, InvalidFileError } from '../../lib/native/errors.js';
import { temporaryDirectory } from '../temporary.js';
import { goldenDirectory, goldenNames, readSpec } from './golden.js';

const llama = specFromConfig(
  {
    model_type: 'llama',
    hidden_size: 6,
    intermediate_size: 10,
    num_hidden_layers: 2,
    num_attention_heads: 3,
    num_key_value_heads: 1,
    head_dim: 4,
    vocab_size: 7,
    attention_bias: true,
  },
  'llama',
);
const gpt2 = specFromConfig(
  { model_type: 'gpt2', n_embd: 6, n_head: 3, n_layer: 2, vocab_size: 7, n_positions: 5 },
  'gpt2',
);

/** A vector whose element i is i: every place is told apart. */
const counted = (spec: ModelSpec) => Float32Array.from({ length: parameterPlan(spec).size }, (_, i) => i);

let directory: string;
beforeEach(() => {
  directory = temporaryDirectory();
});

async function stored(tensors: Record<string, TensorData>): Promise<Checkpoint> {
  await writeSafetensors(join(directory, 'model.safetensors'), tensors);
  return Checkpoint.open(directory);
}

const renamed = (tensors: Record<string, TensorData>, rename: (name: string) => string) =>
  Object.fromEntries(Object.entries(tensors).map(([name, tensor]) => [rename(name), tensor]));

describe('the parameter plan', () => {
  it.each([
    ['llama', llama],
    ['gpt2', gpt2],
  ])('of %s covers a vector without gap, matrices first', (_, spec) => {
    const plan = parameterPlan(spec);
    let end = 0;
    for (const { offset, size, shape, decay } of plan.parameters) {
      expect(offset).toBe(end);
      expect(size).toBe(shape.reduce((product, n) => product * n, 1));
      expect(decay).toBe(shape.length === 2);
      expect(decay).toBe(offset < plan.decayCount);
      end += size;
    }
    expect(end).toBe(plan.size);
  });

  it('has as many parameters as the model', () => {
    const perLayer = 6 * 12 * 2 + 2 * 4 * 6 + (12 + 4 + 4 + 6) + 3 * 6 * 10 + 2 * 6;
    expect(parameterPlan(llama).size).toBe(2 * 7 * 6 + 2 * perLayer + 6);
    expect(parameterPlan(gpt2).size).toBe((7 + 5) * 6 + 2 * (12 * 36 + 13 * 6) + 12);
  });
});

describe('loading', () => {
  it.each([
    ['llama', llama],
    ['gpt2', gpt2],
  ])('reverses exporting for %s, with and without the prefix', async (_, spec) => {
    const flat = counted(spec);
    const tensors = exportWeights(spec, flat);
    for (const prefix of [/^$/, /^(model|transformer)\./]) {
      using checkpoint = await stored(renamed(tensors, (name) => name.replace(prefix, '')));
      using loaded = loadWeights(spec, checkpoint);
      expect(flattenWeights(spec, loaded)).toEqual(flat);
      expect(loaded.unused).toEqual([]);
    }
  });

  it('splits and transposes what GPT-2 fuses', async () => {
    const weight = Float32Array.from({ length: 6 * 18 }, (_, i) => i);
    using checkpoint = await stored({
      ...exportWeights(gpt2, counted(gpt2)),
      'transformer.h.1.attn.c_attn.weight': { dtype: 'f32', shape: [6, 18], data: weight },
    });
    using loaded = loadWeights(gpt2, checkpoint);
    const { q, k, v } = loaded.weights.layers[1];
    [q, k!, v!].forEach(({ weight: part }, i) => {
      expect(part.shape).toEqual([6, 6]);
      // Output o of part i from input n is the stored [n, 6 i + o].
      expect([...part.readFloat()]).toEqual(
        Array.from({ length: 36 }, (_, at) => weight[(at % 6) * 18 + 6 * i + Math.floor(at / 6)]),
      );
    });
  });

  it('keeps tied weights one object, and ignores a head that is stored nevertheless', async () => {
    const tensors = exportWeights(gpt2, counted(gpt2));
    using checkpoint = await stored({ ...tensors, 'lm_head.weight': tensors['transformer.wte.weight'] });
    using loaded = loadWeights(gpt2, checkpoint);
    expect(loaded.weights.head).toBe(loaded.weights.embed);
    expect(loaded.unused).toEqual([]);
    const calls: unknown[] = [];
    mapWeights(loaded.weights, (tensor) => calls.push(tensor));
    expect(new Set(calls).size).toBe(calls.length);
  });

  it('lists what it does not use, without the buffers of old checkpoints', async () => {
    const one: TensorData = { dtype: 'f32', shape: [1], data: Float32Array.of(1) };
    using checkpoint = await stored({
      ...exportWeights(llama, counted(llama)),
      'model.layers.0.self_attn.rotary_emb.inv_freq': one,
      'model.h.0.attn.bias': one,
      'model.surprise': one,
    });
    using loaded = loadWeights(llama, checkpoint);
    expect(loaded.unused).toEqual(['model.surprise']);
  });

  it('names a missing tensor', async () => {
    const { 'model.layers.1.mlp.up_proj.weight': _, ...rest } = exportWeights(llama, counted(llama));
    using checkpoint = await stored(rest);
    expect(() => loadWeights(llama, checkpoint)).toThrow(InvalidFileError);
    expect(() => loadWeights(llama, checkpoint)).toThrow(
      `${directory} has no tensor model.layers.1.mlp.up_proj.weight, expected with shape [10,6]`,
    );
  });

  it('names a tensor of the wrong shape', async () => {
    const data = new Float32Array(60);
    using checkpoint = await stored({
      ...exportWeights(llama, counted(llama)),
      'model.layers.1.mlp.up_proj.weight': { dtype: 'f32', shape: [6, 10], data },
    });
    expect(() => loadWeights(llama, checkpoint)).toThrow(InvalidFileError);
    expect(() => loadWeights(llama, checkpoint)).toThrow(
      `${join(directory, 'model.safetensors')}: tensor model.layers.1.mlp.up_proj.weight ` +
        'must have the shape [10,6], got [6,10]',
    );
  });

  it('names a tensor of the wrong element type', async () => {
    using checkpoint = await stored({
      ...exportWeights(llama, counted(llama)),
      'model.norm.weight': { dtype: 'i32', shape: [6], data: new Int32Array(6) },
    });
    expect(() => loadWeights(llama, checkpoint)).toThrow('tensor model.norm.weight must be F32, BF16 or F16, got I32');
  });
});

describe('exporting', () => {
  it.each(goldenNames('golden.safetensors'))('gives the tensors of %s back', async (name) => {
    const from = join(goldenDirectory, name);
    const spec = readSpec(from);
    using checkpoint = Checkpoint.open(from);
    using loaded = loadWeights(spec, checkpoint);
    const exported = exportWeights(spec, flattenWeights(spec, loaded));
    expect(Object.keys(exported).sort()).toEqual(checkpoint.names().sort());
    for (const [tensor, { shape, data }] of Object.entries(exported)) {
      expect(shape).toEqual(checkpoint.info(tensor).shape);
      expect(data).toEqual(checkpoint.tensor(tensor).readFloat());
    }
  });

  it('refuses a vector of another size', () => {
    expect(() => exportWeights(llama, new Float32Array(3))).toThrow(InvalidArgumentError);
  });
});

describe('initial weights', () => {
  it('are what GPT-2 started from', () => {
    let draws = 0;
    // Alternating draws have mean 0 and deviation 1.
    const flat = initialWeights(gpt2, () => (draws++ % 2 === 0 ? 1 : -1));
    const part = Object.fromEntries(
      parameterPlan(gpt2).parameters.map(({ name, offset, size }) => [name, [...flat.subarray(offset, offset + size)]]),
    );
    expect(Math.abs(part['layers.0.q.weight'][0])).toBeCloseTo(0.02, 6);
    expect(Math.abs(part['layers.1.down.weight'][0])).toBeCloseTo(0.02 / Math.sqrt(4), 6);
    expect(Math.abs(part['layers.1.o.weight'][0])).toBeCloseTo(0.02 / Math.sqrt(4), 6);
    expect(new Set(part['layers.1.norm2.weight'])).toEqual(new Set([1]));
    expect(new Set(part['layers.1.up.bias'])).toEqual(new Set([0]));
    expect(draws).toBe(parameterPlan(gpt2).decayCount);
  });

  it('fill the structure by name', () => {
    const names = weightsByName(llama, (name) => name);
    expect(names.layers[1].gate).toEqual({ weight: 'layers.1.gate.weight' });
    expect(names.layers[0].q).toEqual({ weight: 'layers.0.q.weight', bias: 'layers.0.q.bias' });
    expect(names.head).toBe('head');
    expect(weightsByName(gpt2, (name) => name)).toMatchObject({ head: 'embed', positions: 'positions' });
  });
});
