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
    const { rope, ...spec } = read(llama);
    expect(spec).toEqual({
      family: 'llama',
      layers: 5,
      hidden: 64,
      ffn: 172,
      heads: 8,
      kvHeads: 8,
      headDim: 8,
      vocab: 512,
      maxPositions: 2048,
      norm: 'rms',
      eps: 1e-6,
      act: 'silu',
      gated: true,
      attnBias: false,
      mlpBias: false,
      tied: false,
    });
    expect([...rope!.invFreq]).toEqual([1, 0.1, 0.01, 0.001].map(Math.fround));
    expect(read(gpt2)).toEqual({
      family: 'gpt2',
      layers: 3,
      hidden: 48,
      ffn: 192,
      heads: 3,
      kvHeads: 3,
      headDim: 16,
      vocab: 100,
      maxPositions: 1024,
      norm: 'layer',
      eps: 1e-5,
      rope: null,
      act: 'gelu_tanh',
      gated: false,
      attnBias: true,
      mlpBias: true,
      tied: true,
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
      attnBias: true,
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
    expect(linear.rope!.invFreq[0]).toBe(0.25);
  });

  it('scales as Llama 3 does: high frequencies kept, low ones divided, between them interpolated', () => {
    const rope_scaling = {
      rope_type: 'llama3',
      factor: 8,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: 64,
    };
    const plain = read({ ...llama, head_dim: 16 }).rope!.invFreq;
    const scaled = read({ ...llama, head_dim: 16, rope_scaling }).rope!.invFreq;
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

  it('takes Mistral when its window hides nothing', () => {
    const mistral = { ...llama, model_type: 'mistral', max_position_embeddings: 4096 };
    expect(read({ ...mistral, sliding_window: null })).toMatchObject({ family: 'llama', kvHeads: 8 });
    expect(read({ ...mistral, sliding_window: 4096 }).maxPositions).toBe(4096);
    expect(read(mistral).maxPositions).toBe(4096);
    expect(() => read({ ...mistral, sliding_window: 1024 })).toThrow(
      'sliding_window must be null or at least max_position_embeddings 4096, got 1024',
    );
  });

  it.each<[object, string]>([
    [[], 'is not a JSON object'],
    [{}, 'model_type is missing'],
    [{ ...llama, model_type: 'mamba' }, 'model_type must be one of llama, mistral, gpt2, got "mamba"'],
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
    [{ ...llama, hidden_act: 'quick_gelu' }, 'hidden_act must be one of silu, gelu, gelu_new, gelu_pytorch_tanh, relu'],
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
