// What a decoder is made of, read from the config.json of a Hugging Face directory.
import type { Act } from '../graph/index.js';
import { InvalidFileError } from '../native/errors.js';

/** Names and layouts of the weights. */
export type Family = 'llama' | 'gpt2';

export interface ModelSpec {
  readonly family: Family;
  readonly layers: number;
  /** Features of the residual stream. */
  readonly hidden: number;
  /** Units of the feed-forward part. */
  readonly ffn: number;
  readonly heads: number;
  /** Heads of keys and values; query head h reads `h / (heads / kvHeads)`. */
  readonly kvHeads: number;
  readonly headDim: number;
  readonly vocab: number;
  readonly maxPositions: number;
  readonly norm: 'rms' | 'layer';
  readonly eps: number;
  /** Rotary positions: radians per position of each pair of features, scaling included. Else learned positions. */
  readonly rope: { readonly invFreq: Float32Array } | null;
  readonly act: Act;
  /** `down(act(gate(x)) * up(x))`, or `down(act(up(x)))`. */
  readonly gated: boolean;
  /** Biases of the query, key, value and output projections. */
  readonly attnBias: boolean;
  readonly mlpBias: boolean;
  /** The head is the embedding table. */
  readonly tied: boolean;
}

const ACTS: Readonly<Record<string, Act>> = {
  silu: 'silu',
  gelu: 'gelu',
  gelu_new: 'gelu_tanh',
  gelu_pytorch_tanh: 'gelu_tanh',
  relu: 'relu',
};

const READERS: Readonly<Record<string, (config: Config) => ModelSpec>> = {
  llama: (config) => {
    const longest = config.int('max_position_embeddings', 2048);
    return llamaSpec(config, longest, config.int('num_key_value_heads', config.int('num_attention_heads')));
  },
  mistral: (config) => {
    const longest = config.int('max_position_embeddings', 131072);
    // A window as wide as the longest sequence hides nothing.
    const window = config.optionalInt('sliding_window', 4096);
    if (window !== null && window < longest) {
      throw config.error('sliding_window', `must be null or at least max_position_embeddings ${longest}`, window);
    }
    return llamaSpec(config, longest, config.int('num_key_value_heads', 8));
  },
  gpt2: gpt2Spec,
};

/**
 * Reads a parsed config.json. Fields that are absent have the defaults of transformers.
 *
 * @param file named in errors
 * @throws InvalidFileError naming the file and the field, and what is supported.
 */
export function specFromConfig(json: unknown, file: string): ModelSpec {
  if (typeof json !== 'object' || json === null || Array.isArray(json)) {
    throw new InvalidFileError(`[config] ${file} is not a JSON object`);
  }
  const config = new Config(json as Record<string, unknown>, file);
  return READERS[config.choice('model_type', Object.keys(READERS))](config);
}

function llamaSpec(config: Config, maxPositions: number, kvHeads: number): ModelSpec {
  const hidden = config.int('hidden_size');
  const heads = config.int('num_attention_heads');
  if (heads % kvHeads !== 0) {
    throw config.error('num_key_value_heads', `must divide num_attention_heads ${heads}`, kvHeads);
  }
  if (!config.has('head_dim') && hidden % heads !== 0) {
    throw config.error('num_attention_heads', `must divide hidden_size ${hidden} when there is no head_dim`, heads);
  }
  const headDim = config.int('head_dim', hidden / heads);
  if (headDim % 2 !== 0) throw config.error('head_dim', 'must be even for rotary positions', headDim);
  return {
    family: 'llama',
    layers: config.int('num_hidden_layers'),
    hidden,
    ffn: config.int('intermediate_size'),
    heads,
    kvHeads,
    headDim,
    vocab: config.int('vocab_size'),
    maxPositions,
    norm: 'rms',
    eps: config.positive('rms_norm_eps', 1e-6),
    rope: { invFreq: rotaryFrequencies(config, headDim) },
    act: ACTS[config.choice('hidden_act', Object.keys(ACTS), 'silu')],
    gated: true,
    attnBias: config.boolean('attention_bias', false),
    mlpBias: config.boolean('mlp_bias', false),
    tied: config.boolean('tie_word_embeddings', false),
  };
}

function gpt2Spec(config: Config): ModelSpec {
  const hidden = config.int('n_embd');
  const heads = config.int('n_head');
  if (hidden % heads !== 0) throw config.error('n_head', `must divide n_embd ${hidden}`, heads);
  // Variants of the architecture that compute something else.
  config.mustBe('scale_attn_weights', true);
  config.mustBe('scale_attn_by_inverse_layer_idx', false);
  config.mustBe('add_cross_attention', false);
  return {
    family: 'gpt2',
    layers: config.int('n_layer'),
    hidden,
    ffn: config.int('n_inner', 4 * hidden),
    heads,
    kvHeads: heads,
    headDim: hidden / heads,
    vocab: config.int('vocab_size'),
    maxPositions: config.int('n_positions', 1024),
    norm: 'layer',
    eps: config.positive('layer_norm_epsilon', 1e-5),
    rope: null,
    act: ACTS[config.choice('activation_function', Object.keys(ACTS), 'gelu_new')],
    gated: false,
    attnBias: true,
    mlpBias: true,
    tied: config.boolean('tie_word_embeddings', true),
  };
}

const ROPE_TYPES = ['default', 'linear', 'llama3'] as const;

// Radians per position of the pairs of features, [headDim / 2], as transformers/modeling_rope_utils.py defines them.
// transformers 5 writes all settings as rope_parameters; older files have rope_theta and rope_scaling.
function rotaryFrequencies(config: Config, headDim: number): Float32Array {
  const field = config.has('rope_parameters') ? 'rope_parameters' : 'rope_scaling';
  const rope = config.section(field);
  const theta = rope.has('rope_theta') ? rope.positive('rope_theta') : config.positive('rope_theta', 10000);
  const type = rope.choice(rope.has('rope_type') ? 'rope_type' : 'type', ROPE_TYPES, 'default');
  for (const section of [rope, config]) {
    if (section.has('partial_rotary_factor')) section.mustBe('partial_rotary_factor', 1);
  }
  const scaled = frequencyScaling(rope, type);
  return Float32Array.from({ length: headDim / 2 }, (_, i) => scaled(theta ** ((-2 * i) / headDim)));
}

function frequencyScaling(rope: Config, type: (typeof ROPE_TYPES)[number]): (frequency: number) => number {
  if (type === 'default') return (frequency) => frequency;
  const factor = rope.positive('factor');
  if (type === 'linear') return (frequency) => frequency / factor;
  const [low, high] = [rope.positive('low_freq_factor'), rope.positive('high_freq_factor')];
  if (low >= high) throw rope.error('low_freq_factor', `must be below high_freq_factor ${high}`, low);
  const original = rope.int('original_max_position_embeddings');
  return (frequency) => {
    // Turns within the original context: many stay, few are slowed by `factor`, between them interpolated.
    const turns = (original * frequency) / (2 * Math.PI);
    if (turns < low) return frequency / factor;
    if (turns > high) return frequency;
    const smooth = (turns - low) / (high - low);
    return ((1 - smooth) * frequency) / factor + smooth * frequency;
  };
}

const MAX_INT = 1 << 24;

// Reads fields of a JSON object of a file; null counts as absent.
class Config {
  constructor(
    private readonly fields: Readonly<Record<string, unknown>>,
    private readonly file: string,
    private readonly path = '',
  ) {}

  error(field: string, expected: string, actual: unknown): InvalidFileError {
    const shown = JSON.stringify(actual)?.slice(0, 100);
    return new InvalidFileError(`[config] ${this.file}: ${this.path}${field} ${expected}, got ${shown}`);
  }

  has(field: string): boolean {
    return Object.hasOwn(this.fields, field) && this.fields[field] !== null;
  }

  int(field: string, otherwise?: number): number {
    const value = this.#value(field, otherwise);
    if (!Number.isInteger(value) || (value as number) < 1 || (value as number) > MAX_INT) {
      throw this.error(field, `must be an integer from 1 to ${MAX_INT}`, value);
    }
    return value as number;
  }

  /** Here null is a value of its own. */
  optionalInt(field: string, otherwise: number): number | null {
    return Object.hasOwn(this.fields, field) && this.fields[field] === null ? null : this.int(field, otherwise);
  }

  positive(field: string, otherwise?: number): number {
    const value = this.#value(field, otherwise);
    if (typeof value !== 'number' || !Number.isFinite(value) || value <= 0) {
      throw this.error(field, 'must be a positive number', value);
    }
    return value;
  }

  boolean(field: string, otherwise: boolean): boolean {
    const value = this.#value(field, otherwise);
    if (typeof value !== 'boolean') throw this.error(field, 'must be true or false', value);
    return value;
  }

  choice<T extends string>(field: string, choices: readonly T[], otherwise?: T): T {
    const value = this.#value(field, otherwise);
    if (!choices.includes(value as T)) throw this.error(field, `must be one of ${choices.join(', ')}`, value);
    return value as T;
  }

  mustBe(field: string, supported: unknown): void {
    const value = this.#value(field, supported);
    if (value !== supported) throw this.error(field, `must be ${supported}`, value);
  }

  /** An object inside this one; empty when absent. */
  section(field: string): Config {
    const value = this.#value(field, {});
    if (typeof value !== 'object' || Array.isArray(value)) throw this.error(field, 'must be an object', value);
    return new Config(value as Record<string, unknown>, this.file, `${this.path}${field}.`);
  }

  #value(field: string, otherwise: unknown): unknown {
    if (this.has(field)) return this.fields[field];
    if (otherwise === undefined) throw new InvalidFileError(`[config] ${this.file}: ${this.path}${field} is missing`);
    return otherwise;
  }
}
