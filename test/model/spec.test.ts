// Specs from config.json: every variant, defaults, both ways of writing rope settings, and what is refused.
import { describe, expect, it } from 'vitest';
import { specFromConfig } from '../../lib/model/spec.js';
import { InvalidFileError } from '../../lib/native/errors.js';

const llama = {
  model_type: 'llama',
  hidden_size: 64,
  intermediate_size: 172,
  num_hidden_layers: 5,
  num_attention_heads: 8,
  vocab_size: 512,
};
const gpt2 = { model_type: 'gpt2', n_embd: 48, n_head: 3, n_layer: 3, vocab_size: 100 };
const read = (config: object) => specFromConfig(JSON.parse(JSON.stringify(config)), 'dir/config.json');

describe('specFromConfig', () => {
  it('has the defaults of transformers', () => {
    const { perLayer, ...spec } = read(llama);
    expect(spec).toEqual({
      family: 'llama',
      type: 'llama',
      layers: 5,
      hidden: 64,
      ffn: 172,
      heads: 8,
      kvHeads: 8,
      headDim: 8,
      vocab: 512,
      maxPositions: 2048,
      positions: 'rotary',
      embedScale: 1,
      norm: 'rms',
      normPlace: 'pre',
      eps: 1e-6,
      normOffset: 0,
      postNorms: false,
      qkNorm: false,
      vNorm: false,
      scoreScale: 8 ** -0.5,
      scoreSoftcap: 0,
      logitSoftcap: 0,
      act: 'silu',
      gated: true,
      qkvBias: false,
      outBias: false,
      mlpBias: false,
      tied: false,
      streams: null,
      encoder: null,
    });
    const invFreq = Float32Array.of(1, 0.1, 0.01, 0.001);
    expect(perLayer).toEqual(
      new Array(5).fill({ ffn: 172, window: 0, rope: { invFreq }, keysOf: null, gateCutoff: null }),
    );
    expect(read(gpt2)).toEqual({
      family: 'gpt2',
      type: 'gpt2',
      layers: 3,
      perLayer: new Array(3).fill({ ffn: 192, window: 0, rope: null, keysOf: null, gateCutoff: null }),
      hidden: 48,
      ffn: 192,
      heads: 3,
      kvHeads: 3,
      headDim: 16,
      vocab: 100,
      maxPositions: 1024,
      positions: 'learned',
      embedScale: 1,
      norm: 'layer',
      normPlace: 'pre',
      eps: 1e-5,
      normOffset: 0,
      postNorms: false,
      qkNorm: false,
      vNorm: false,
      scoreScale: 0.25,
      scoreSoftcap: 0,
      logitSoftcap: 0,
      act: 'gelu_tanh',
      gated: false,
      qkvBias: true,
      outBias: true,
      mlpBias: true,
      tied: true,
      streams: null,
      encoder: null,
    });
    expect(read({ ...llama, head_dim: null, rope_scaling: null, num_key_value_heads: 2 })).toMatchObject({
      kvHeads: 2,
    });
  });

  it('reads every field', () => {
    const config = {
      ...llama,
      num_key_value_heads: 4,
      head_dim: 12,
      max_position_embeddings: 99,
      rms_norm_eps: 1e-5,
      hidden_act: 'gelu_pytorch_tanh',
      attention_bias: true,
      mlp_bias: true,
      tie_word_embeddings: true,
    };
    expect(read(config)).toMatchObject({
      kvHeads: 4,
      headDim: 12,
      maxPositions: 99,
      eps: 1e-5,
      act: 'gelu_tanh',
      qkvBias: true,
      outBias: true,
      mlpBias: true,
      tied: true,
    });
    const other = { ...gpt2, n_inner: 77, n_positions: 9, activation_function: 'relu', tie_word_embeddings: false };
    expect(read(other)).toMatchObject({ ffn: 77, maxPositions: 9, act: 'relu', tied: false });
  });

  it('reads rope settings in the older and the newer form', () => {
    const scaling = { factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 64 };
    const newer = read({ ...llama, rope_parameters: { rope_type: 'llama3', rope_theta: 500, ...scaling } });
    const older = read({ ...llama, rope_theta: 500, rope_scaling: { rope_type: 'llama3', ...scaling } });
    const oldest = read({ ...llama, rope_theta: 500, rope_scaling: { type: 'llama3', ...scaling } });
    expect(newer).toEqual(older);
    expect(oldest).toEqual(older);
    const linear = read({ ...llama, rope_scaling: { type: 'linear', factor: 4 } });
    expect(linear.perLayer[4].rope!.invFreq[0]).toBe(0.25);
  });

  it('scales as Llama 3 does: high frequencies kept, low ones divided, between them interpolated', () => {
    const rope_scaling = {
      rope_type: 'llama3',
      factor: 8,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: 64,
    };
    const plain = read({ ...llama, head_dim: 16 }).perLayer[0].rope!.invFreq;
    const scaled = read({ ...llama, head_dim: 16, rope_scaling }).perLayer[0].rope!.invFreq;
    const wavelengths = [...plain].map((f) => (2 * Math.PI) / f);
    wavelengths.forEach((wavelength, i) => {
      if (wavelength < 16) expect(scaled[i]).toBe(plain[i]);
      else if (wavelength > 64) expect(scaled[i]).toBeCloseTo(plain[i] / 8, 9);
      else {
        const smooth = (64 / wavelength - 1) / 3;
        expect(scaled[i]).toBeCloseTo(((1 - smooth) * plain[i]) / 8 + smooth * plain[i], 7);
      }
    });
    expect(wavelengths.filter((w) => w > 16 && w < 64)).toHaveLength(2);
  });

  const windows = (config: object) => read(config).perLayer.map(({ window }) => window);

  it('gives all layers of Mistral one window', () => {
    const mistral = { ...llama, model_type: 'mistral' };
    expect(read({ ...mistral, sliding_window: null })).toMatchObject({
      type: 'mistral',
      kvHeads: 8,
      maxPositions: 131072,
    });
    expect(windows({ ...mistral, sliding_window: null })).toEqual([0, 0, 0, 0, 0]);
    expect(windows({ ...mistral, sliding_window: 64 })).toEqual([64, 64, 64, 64, 64]);
    expect(windows(mistral)).toEqual(new Array(5).fill(4096));
  });

  it('gives the last layers of Qwen windows when it is asked to', () => {
    const qwen2 = { ...llama, model_type: 'qwen2', num_key_value_heads: 2 };
    expect(read(qwen2)).toMatchObject({ type: 'qwen2', headDim: 8, qkvBias: true, outBias: false, qkNorm: false });
    expect(windows({ ...qwen2, sliding_window: 64, max_window_layers: 3 })).toEqual([0, 0, 0, 0, 0]);
    const used = { ...qwen2, use_sliding_window: true, sliding_window: 64 };
    expect(windows({ ...used, max_window_layers: 3 })).toEqual([0, 0, 0, 64, 64]);
    expect(windows({ ...used, max_window_layers: 0 })).toEqual([64, 64, 64, 64, 64]);
    expect(windows(used)).toEqual([0, 0, 0, 0, 0]);
    expect(windows({ ...used, sliding_window: null, max_window_layers: 3 })).toEqual([0, 0, 0, 0, 0]);
    const qwen3 = { ...llama, model_type: 'qwen3', num_key_value_heads: 2 };
    expect(read(qwen3)).toMatchObject({
      headDim: 128,
      qkvBias: false,
      outBias: false,
      qkNorm: true,
      maxPositions: 32768,
    });
  });

  it('reads what Gemma 1, 2 and 3 have of their own', () => {
    const base = { ...llama, num_key_value_heads: 2 };
    expect(read({ ...base, model_type: 'gemma', hidden_act: 'gelu' })).toMatchObject({
      ...{ headDim: 256, act: 'gelu_tanh', embedScale: 8, normOffset: 1, postNorms: false, tied: true },
      ...{ maxPositions: 8192, scoreScale: 1 / 16, scoreSoftcap: 0, logitSoftcap: 0 },
    });
    const gemma2 = { ...base, model_type: 'gemma2', query_pre_attn_scalar: 100, sliding_window: 32 };
    expect(read(gemma2)).toMatchObject({
      ...{ headDim: 256, act: 'gelu_tanh', embedScale: 8, normOffset: 1, postNorms: true, qkNorm: false, tied: true },
      ...{ scoreScale: 0.1, scoreSoftcap: 50, logitSoftcap: 30, maxPositions: 8192 },
    });
    expect(windows(gemma2)).toEqual([32, 0, 32, 0, 32]);
    const uncapped = { ...gemma2, attn_logit_softcapping: null, final_logit_softcapping: 7, layer_types: [] };
    expect(() => read(uncapped)).toThrow('layer_types must be a list of 5');
    const listed = { ...uncapped, layer_types: ['full_attention', ...new Array(4).fill('sliding_attention')] };
    expect(read(listed)).toMatchObject({ scoreSoftcap: 0, logitSoftcap: 7 });
    expect(windows(listed)).toEqual([0, 32, 32, 32, 32]);

    const gemma3 = { ...base, model_type: 'gemma3_text', sliding_window: 16, sliding_window_pattern: 3, head_dim: 4 };
    expect(read(gemma3)).toMatchObject({ scoreSoftcap: 0, logitSoftcap: 0, qkNorm: true, maxPositions: 131072 });
    expect(windows(gemma3)).toEqual([16, 16, 0, 16, 16]);
    expect(windows({ ...gemma3, sliding_window: null })).toEqual([0, 0, 0, 0, 0]);
    const second = (config: object) => read(config).perLayer.map(({ rope }) => rope!.invFreq[1]);
    expect(second(gemma3)).toEqual([0.01, 0.01, 0.001, 0.01, 0.01].map(Math.fround));
    const settings = { rope_theta: 400, rope_scaling: { rope_type: 'linear', factor: 2 }, rope_local_base_freq: 16 };
    const wanted = [0.25, 0.25, 0.025, 0.25, 0.25].map(Math.fround);
    expect(second({ ...gemma3, ...settings })).toEqual(wanted);
    const rope_parameters = {
      sliding_attention: { rope_type: 'default', rope_theta: 16 },
      full_attention: { rope_type: 'linear', rope_theta: 400, factor: 2 },
    };
    expect(second({ ...gemma3, rope_parameters })).toEqual(wanted);
    const gemma3n = { ...base, model_type: 'gemma3n_text', sliding_window: 16, num_hidden_layers: 12, head_dim: 4 };
    const spec = read({
      ...gemma3n,
      intermediate_size: Array.from({ length: 12 }, (_, i) => 10 + i),
      num_kv_shared_layers: 5,
    });
    expect(spec).toMatchObject({ ffn: 21, normOffset: 0, postNorms: true, qkNorm: true, vNorm: true, scoreScale: 1 });
    expect(spec).toMatchObject({ logitSoftcap: 30, maxPositions: 32768, streams: { count: 4, scaled: true } });
    expect(spec.perLayer.map(({ window }) => window)).toEqual([16, 16, 16, 16, 0, 16, 16, 16, 16, 0, 16, 16]);
    expect(spec.perLayer.map(({ keysOf }) => keysOf)).toEqual([...new Array(7).fill(null), 6, 6, 4, 6, 6]);
    expect(spec.perLayer.map(({ gateCutoff }) => gateCutoff !== null)).toEqual([
      ...new Array(10).fill(true),
      false,
      false,
    ]);
    expect(spec.perLayer[3]).toMatchObject({ ffn: 13, gateCutoff: expect.closeTo(1.6448536, 6) });
    expect(() => read({ ...gemma3n, altup_active_idx: 1 })).toThrow('altup_active_idx must be 0, got 1');

    const reversed = { ...gemma3, layer_types: ['full_attention', ...new Array(4).fill('sliding_attention')] };
    expect(second({ ...reversed, ...settings })).toEqual([0.025, 0.25, 0.25, 0.25, 0.25].map(Math.fround));
  });

  it.each<[object, string]>([
    [[], 'is not a JSON object'],
    [{}, 'model_type is missing'],
    [
      { ...llama, model_type: 'mamba' },
      'model_type must be one of llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, gemma3n_text, gpt2, got "mamba"',
    ],
    [{ ...llama, model_type: 'constructor' }, 'model_type must be one of'],
    [{ ...llama, hidden_size: undefined }, 'hidden_size is missing'],
    [{ ...llama, hidden_size: '64' }, 'hidden_size must be an integer'],
    [{ ...llama, num_hidden_layers: 0 }, 'num_hidden_layers must be an integer from 1'],
    [{ ...llama, num_hidden_layers: 2.5 }, 'num_hidden_layers must be an integer'],
    [{ ...llama, vocab_size: 1e12 }, 'vocab_size must be an integer'],
    [{ ...llama, num_attention_heads: 7 }, 'num_attention_heads must divide hidden_size 64'],
    [{ ...llama, num_key_value_heads: 3 }, 'num_key_value_heads must divide num_attention_heads 8, got 3'],
    [{ ...llama, head_dim: 7 }, 'head_dim must be even'],
    [{ ...llama, rms_norm_eps: -1 }, 'rms_norm_eps must be a positive number, got -1'],
    [{ ...llama, rms_norm_eps: 'x' }, 'rms_norm_eps must be a positive number'],
    [
      { ...llama, hidden_act: 'quick_gelu' },
      'hidden_act must be one of silu, swish, gelu, gelu_new, gelu_pytorch_tanh, relu',
    ],
    [{ ...llama, hidden_act: 'toString' }, 'hidden_act must be one of'],
    [{ ...llama, attention_bias: 1 }, 'attention_bias must be true or false'],
    [{ ...llama, rope_theta: 0 }, 'rope_theta must be a positive number'],
    [{ ...llama, rope_scaling: 'x' }, 'rope_scaling must be an object'],
    [
      { ...llama, rope_scaling: { type: 'yarn' } },
      'rope_scaling.type must be one of default, linear, llama3, got "yarn"',
    ],
    [{ ...llama, rope_parameters: { rope_type: 'dynamic' } }, 'rope_parameters.rope_type must be one of'],
    [{ ...llama, rope_scaling: { type: 'linear' } }, 'rope_scaling.factor is missing'],
    [{ ...llama, rope_scaling: { type: 'llama3', factor: 8 } }, 'rope_scaling.low_freq_factor is missing'],
    [
      { ...llama, rope_scaling: { type: 'llama3', factor: 8, low_freq_factor: 4, high_freq_factor: 4 } },
      'low_freq_factor must be below high_freq_factor 4',
    ],
    [{ ...llama, partial_rotary_factor: 0.5 }, 'partial_rotary_factor must be 1, got 0.5'],
    [{ ...llama, model_type: 'gemma', use_bidirectional_attention: true }, 'use_bidirectional_attention must be false'],
    [{ ...llama, model_type: 'gemma', hidden_act: 'silu' }, 'hidden_act must be one of gelu, gelu_pytorch_tanh'],
    [{ ...llama, model_type: 'gemma2', hidden_activation: 'tanh' }, 'hidden_activation must be one of'],
    [{ ...llama, model_type: 'gemma2', query_pre_attn_scalar: 0 }, 'query_pre_attn_scalar must be a positive number'],
    [
      { ...llama, model_type: 'gemma2', attn_logit_softcapping: -3 },
      'attn_logit_softcapping must be a positive number',
    ],
    [
      { ...llama, model_type: 'gemma2', final_logit_softcapping: 0 },
      'final_logit_softcapping must be a positive number',
    ],
    [{ ...llama, model_type: 'gemma2', sliding_window: 0 }, 'sliding_window must be an integer from 1'],
    [{ ...llama, model_type: 'gemma2', layer_types: new Array(5).fill('chunked') }, 'layer_types must be a list of 5'],
    [{ ...llama, model_type: 'gemma2', layer_types: 'full_attention' }, 'layer_types must be a list of 5'],
    [{ ...llama, model_type: 'gemma3_text', sliding_window_pattern: 0 }, 'sliding_window_pattern must be an integer'],
    [
      { ...llama, model_type: 'gemma3_text', rope_local_base_freq: -1 },
      'rope_local_base_freq must be a positive number',
    ],
    [
      { ...llama, model_type: 'gemma3_text', rope_parameters: { full_attention: { rope_type: 'yarn' } } },
      'rope_parameters.full_attention.rope_type must be one of',
    ],
    [{ ...llama, model_type: 'qwen2', max_window_layers: -1 }, 'max_window_layers must be an integer from 0'],
    [{ ...gpt2, n_head: 5 }, 'n_head must divide n_embd 48, got 5'],
    [{ ...gpt2, scale_attn_by_inverse_layer_idx: true }, 'scale_attn_by_inverse_layer_idx must be false, got true'],
    [{ ...gpt2, scale_attn_weights: false }, 'scale_attn_weights must be true'],
    [{ ...gpt2, add_cross_attention: true }, 'add_cross_attention must be false'],
  ])('refuses %j', (config, message) => {
    expect(() => read(config)).toThrow(InvalidFileError);
    expect(() => read(config)).toThrow('dir/config.json');
    expect(() => read(config)).toThrow(message);
  });
});
