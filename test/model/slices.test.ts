// Slices of Gemma 3n from configurations alone: published parameter counts, what is written, and what is refused.
import { describe, expect, it } from 'vitest';
import { effectiveParameters, fieldsOfLayers, keptLayers, sliceConfig, specOfLayers } from '../../lib/model/slices.js';
import { specFromConfig } from '../../lib/model/spec.js';
import { InvalidArgumentError, InvalidFileError } from '../../lib/native/errors.js';

// google/gemma-3n-E4B; all that is left out has the value of transformers' defaults.
const e4b = {
  model_type: 'gemma3n_text',
  hidden_size: 2048,
  intermediate_size: 16384,
  num_hidden_layers: 35,
  num_attention_heads: 8,
  num_key_value_heads: 2,
  head_dim: 256,
  num_kv_shared_layers: 15,
  vocab_size: 262400,
};

/** Layers from..to, both included. */
const to = (from: number, last: number) => Array.from({ length: last - from + 1 }, (_, i) => from + i);
const e2bSkips = to(20, 24);

// Published slices: effective parameters in billions, layers of full width (the others have half of it), layers skipped.
// The published numbers are rounded up by different amounts; E2B's exact one is known.
const published: [string, number, number[], number[]][] = [
  ['E4B', 3.98, to(0, 34), []],
  ['E2B', 1.91, [], e2bSkips],
  ['E1.96B, layers', 1.96, [4], e2bSkips],
  ['E2.54B, layers', 2.54, [4, ...to(20, 24)], []],
  ['E2.69B, layers', 2.69, [4, 9, 14, ...to(19, 24)], []],
  ['E2.98B, layers', 2.98, [...to(15, 24), ...to(30, 34)], []],
  ['E3.18B, layers', 3.18, [4, ...to(9, 24), 29, 34], []],
  ['E3.39B, layers', 3.39, [4, ...to(9, 29), 34], []],
  ['E3.59B, layers', 3.59, [...to(4, 29), 34], []],
  ['E3.79B, layers', 3.79, to(4, 34), []],
  ['E2.49B, blocks', 2.49, to(20, 24), []],
  ['E2.73B, blocks', 2.73, to(15, 24), []],
  ['E2.98B, blocks', 2.98, to(10, 24), []],
  ['E3.24B, blocks', 3.24, to(10, 29), []],
  ['E3.49B, blocks', 3.49, to(5, 29), []],
  // Labelled 3.79.
  ['E3.74B, blocks', 3.74, to(5, 34), []],
];

const slice = (wide: readonly number[], skip: readonly number[]) =>
  sliceConfig(e4b, {
    skip,
    ffn: to(0, 34)
      .filter((layer) => !skip.includes(layer))
      .map((layer) => (wide.includes(layer) ? 16384 : 8192)),
  });

describe('effective parameters', () => {
  it.each(published)('of %s', (_, billions, wide, skip) => {
    const count = effectiveParameters(slice(wide, skip)) / 1e9;
    expect(count).toBeLessThan(billions + 0.005);
    expect(count).toBeGreaterThan(billions - 0.02);
  });

  it('of E2B are the published number, and those of E4B come from its configuration alone', () => {
    expect(effectiveParameters(slice([], e2bSkips))).toBe(1_905_495_648);
    expect(effectiveParameters(e4b)).toBe(effectiveParameters(slice(to(0, 34), [])));
    expect(effectiveParameters({ model_type: 'gemma3n_text' })).toBe(effectiveParameters(e4b));
    // Narrower by half in one layer.
    expect(effectiveParameters(e4b) - effectiveParameters(slice(to(1, 34), []))).toBe(3 * 2048 * 8192);
  });
});

describe('fields of other architectures', () => {
  const llama = { model_type: 'llama', hidden_size: 8, intermediate_size: 8, num_attention_heads: 2, vocab_size: 8 };
  const windows = { max_position_embeddings: 64, sliding_window: 4, num_key_value_heads: 2, head_dim: 4 };
  const alternating = ['sliding_attention', 'full_attention', 'sliding_attention', 'full_attention'];
  it.each<[string, object, object]>([
    ['llama', { num_hidden_layers: 4 }, { num_hidden_layers: 2 }],
    ['llama', { num_hidden_layers: 4, layer_types: alternating }, { layer_types: [alternating[0], alternating[2]] }],
    ['mistral', { ...windows, num_hidden_layers: 4 }, { num_hidden_layers: 2 }],
    // Every other layer has a window, every third, and those from the second on; then as the file lists them.
    ['gemma2', { ...windows, num_hidden_layers: 4 }, { layer_types: [alternating[0], alternating[2]] }],
    [
      'gemma3_text',
      { ...windows, num_hidden_layers: 4, sliding_window_pattern: 3 },
      { layer_types: ['sliding_attention', 'full_attention'] },
    ],
    [
      'qwen2',
      { ...windows, num_hidden_layers: 4, use_sliding_window: true, max_window_layers: 1 },
      { layer_types: ['full_attention', 'sliding_attention'] },
    ],
    ['qwen3', { ...windows, num_hidden_layers: 4 }, { num_hidden_layers: 2 }],
    [
      'qwen3',
      { ...windows, num_hidden_layers: 4, use_sliding_window: true, layer_types: alternating },
      { layer_types: [alternating[0], alternating[2]] },
    ],
  ])('%s %j', (model_type, more, expected) => {
    const json = { ...llama, ...more, model_type };
    const spec = specFromConfig(json, 'config.json');
    const fields = fieldsOfLayers(spec, json, [0, 2], 'config.json');
    expect(fields).toEqual({ num_hidden_layers: 2, ...expected });
    expect(specFromConfig({ ...json, ...fields }, 'config.json')).toEqual(specOfLayers(spec, [0, 2]));
  });
});

describe('sliceConfig', () => {
  it('keeps what belongs to the layers kept', () => {
    const config = sliceConfig(e4b, { skip: [3, 20, 24, 30], ffn: 8192 });
    expect(config).toMatchObject({ num_hidden_layers: 31, num_kv_shared_layers: 12, hidden_size: 2048 });
    expect(config.intermediate_size).toEqual(new Array(31).fill(8192));
    expect(config.activation_sparsity_pattern).toEqual([...new Array(9).fill(0.95), ...new Array(22).fill(0)]);
    const types = config.layer_types as string[];
    // 4, 9, 14, 19, 29 and 34 of the whole model.
    expect(types.flatMap((type, i) => (type === 'full_attention' ? [i] : []))).toEqual([3, 8, 13, 18, 26, 30]);
    // A slice of a slice.
    const again = sliceConfig(config, { skip: [30], ffn: to(0, 29).map((i) => 4096 + i) });
    expect(again).toMatchObject({ num_hidden_layers: 30, num_kv_shared_layers: 11 });
    expect((again.intermediate_size as number[])[29]).toBe(4096 + 29);
  });

  it('of all sets of layers of a small model leaves the keys that were used, or refuses', () => {
    const types = ['full', 'sliding', 'sliding', 'full', 'sliding', 'full', 'sliding'].map(
      (type) => `${type}_attention`,
    );
    const sizes = { hidden_size: 8, num_attention_heads: 2, vocab_size: 8, head_dim: 4, max_position_embeddings: 8 };
    const config = { ...e4b, ...sizes, num_hidden_layers: 7, num_kv_shared_layers: 3, layer_types: types };
    const json = { ...config, intermediate_size: 8, activation_sparsity_pattern: to(0, 6).map((i) => i / 10) };
    const spec = specFromConfig(json, 'config.json');
    expect(spec.perLayer.map(({ keysOf }) => keysOf)).toEqual([null, null, null, null, 2, 3, 2]);
    let refused = 0;
    for (let set = 0; set < 2 ** 7 - 1; set++) {
      const skip = to(0, 6).filter((layer) => set & (1 << layer));
      const orphan = to(0, 6).find((layer) => {
        const { keysOf } = spec.perLayer[layer];
        return keysOf !== null && !skip.includes(layer) && skip.includes(keysOf);
      });
      if (orphan !== undefined) {
        refused++;
        const message = `layer ${spec.perLayer[orphan].keysOf} owns the keys and values that layer ${orphan} uses`;
        expect(() => keptLayers(spec.perLayer, skip)).toThrow(message);
        continue;
      }
      const kept = keptLayers(spec.perLayer, skip);
      const written = { ...json, ...fieldsOfLayers(spec, json, kept, 'config.json') };
      expect(specFromConfig(written, 'config.json'), `without ${skip}`).toEqual(specOfLayers(spec, kept));
    }
    // 4 or 6 without 2: three of eight sets; 5 without 3: one of four. Without all of them there is nothing to refuse, or keep.
    expect(refused).toBe(127 - 128 * (1 - 3 / 8) * (1 - 1 / 4) + 1);
  });

  it('skips the owners of keys with all that use them', () => {
    expect(sliceConfig(e4b, { skip: to(18, 34), ffn: 8192 })).toMatchObject({
      num_hidden_layers: 18,
      num_kv_shared_layers: 0,
    });
  });

  it.each<[object, string]>([
    [{ skip: [18], ffn: 8192 }, 'layer 18 owns the keys and values that layer 20 uses'],
    [{ skip: [19, 20], ffn: 8192 }, 'layer 19 owns the keys and values that layer 24 uses'],
    [{ skip: [35], ffn: 8192 }, 'layers to skip must be different ids from 0 to 34, got [35]'],
    [{ skip: 3, ffn: 8192 }, 'layers to skip must be different ids from 0 to 34, got 3'],
    [{ skip: [1.5], ffn: 8192 }, 'layers to skip must be different ids'],
    [{ skip: [2, 2], ffn: 8192 }, 'layers to skip must be different ids'],
    [{ skip: to(0, 34), ffn: 8192 }, 'a layer at least must be kept'],
    [{ ffn: 16385 }, 'ffn of layer 0 must be a whole number of units from 1 to its 16384, got 16385'],
    [{ ffn: 0 }, 'ffn of layer 0 must be a whole number of units'],
    [{ skip: [0], ffn: [8192] }, 'ffn must be one width or 34, one for every layer kept'],
  ])('refuses %j', (options, message) => {
    const run = () => sliceConfig(e4b, options as Parameters<typeof sliceConfig>[1]);
    expect(run).toThrow(InvalidArgumentError);
    expect(run).toThrow(`[slice] `);
    expect(run).toThrow(message);
  });

  it.each<[object, string]>([
    [{ model_type: 'gemma3_text' }, 'model_type must be one of gemma3n_text'],
    [{ ...e4b, intermediate_size: [1, 2] }, 'intermediate_size must be an integer from 1 to 16777216 or a list of 35'],
    [{ ...e4b, activation_sparsity_pattern: 1 }, 'activation_sparsity_pattern must be a number from 0 to below 1'],
    [{ ...e4b, activation_sparsity_pattern: [0.5] }, 'activation_sparsity_pattern must be'],
    [{ ...e4b, num_kv_shared_layers: 32 }, 'num_kv_shared_layers must leave a layer of type full_attention'],
    [{ ...e4b, altup_num_inputs: 1 }, 'altup_num_inputs must be an integer from 2'],
  ])('names what is wrong in %j', (config, message) => {
    const run = () => sliceConfig(config as Record<string, unknown>, { ffn: 8192 }, 'dir/config.json');
    expect(run).toThrow(InvalidFileError);
    expect(run).toThrow(message);
  });
});
