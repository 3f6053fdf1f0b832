// Types of layers and the frequencies of their rotary positions, read from a config.json.
import type { Config } from './config.js';

/** Layers that see everything before them, and those that see a window. */
const layerTypes = ['full_attention', 'sliding_attention'] as const;
export type LayerType = (typeof layerTypes)[number];

/** The types of so many layers: as the file lists them, else by `slides`. */
export function typesOfLayers(config: Config, layers: number, slides: (layer: number) => boolean): LayerType[] {
  if (config.has('layer_types')) return config.choices('layer_types', layerTypes, layers);
  return Array.from({ length: layers }, (_, layer) => (slides(layer) ? 'sliding_attention' : 'full_attention'));
}

const ROPE_TYPES = ['default', 'linear', 'llama3'] as const;

/**
 * Radians per position of the pairs of features, [headDim / 2], as transformers/modeling_rope_utils.py defines them.
 * transformers 5 writes all settings as rope_parameters; older files have rope_theta and rope_scaling.
 */
export function rotaryFrequencies(config: Config, headDim: number): Float32Array {
  const rope = config.section(config.has('rope_parameters') ? 'rope_parameters' : 'rope_scaling');
  const theta = rope.has('rope_theta') ? rope.positive('rope_theta') : config.positive('rope_theta', 10000);
  if (config.has('partial_rotary_factor')) config.mustBe('partial_rotary_factor', 1);
  return frequencies(rope, theta, headDim);
}

/**
 * The same for models whose layers with a window turn at another rate: rope_parameters has a section for each type of
 * layer; older files have rope_local_base_freq, and rope_scaling concerns only the layers without a window.
 */
export function rotaryFrequenciesByType(config: Config, headDim: number): Record<LayerType, Float32Array> {
  const [globally, locally] = [1e6, 1e4];
  if (config.has('rope_parameters')) {
    const of = (type: LayerType, base: number): Float32Array => {
      const rope = config.section('rope_parameters').section(type);
      return frequencies(rope, rope.positive('rope_theta', base), headDim);
    };
    return { full_attention: of('full_attention', globally), sliding_attention: of('sliding_attention', locally) };
  }
  return {
    full_attention: frequencies(config.section('rope_scaling'), config.positive('rope_theta', globally), headDim),
    sliding_attention: Float32Array.from(unscaled(config.positive('rope_local_base_freq', locally), headDim)),
  };
}

const unscaled = (theta: number, headDim: number): number[] =>
  Array.from({ length: headDim / 2 }, (_, i) => theta ** ((-2 * i) / headDim));

function frequencies(rope: Config, theta: number, headDim: number): Float32Array {
  const type = rope.choice(rope.has('rope_type') ? 'rope_type' : 'type', ROPE_TYPES, 'default');
  if (rope.has('partial_rotary_factor')) rope.mustBe('partial_rotary_factor', 1);
  return Float32Array.from(unscaled(theta, headDim), frequencyScaling(rope, type));
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
