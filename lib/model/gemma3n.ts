// What config.json says about a text model of Gemma 3n beyond what other models have.
import type { Config } from './config.js';
import { type LayerType, typesOfLayers } from './rope.js';

/** One layer of Gemma 3n. */
export interface Gemma3nLayer {
  readonly type: LayerType;
  /** Units of the feed-forward. */
  readonly ffn: number;
  /** The layer whose keys and values it uses; null: its own. */
  readonly keysOf: number | null;
}

export interface Gemma3n {
  readonly layers: readonly Gemma3nLayer[];
  /** The first layer that uses keys and values of another; as many as there are layers when none does. */
  readonly sharedFrom: number;
  /** Share of a layer's gate values that activation sparsity sets to 0, by layer; 0: none. */
  readonly sparsity: readonly number[];
  readonly hidden: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  /** Features of a token's embedding for every layer, and tokens that have one. */
  readonly perLayerWidth: number;
  readonly perLayerVocab: number;
  /** Residual streams of AltUp. */
  readonly streams: number;
  readonly laurelRank: number;
}

/**
 * Reads a config.json of model_type gemma3n_text, with the defaults of transformers.
 *
 * @throws InvalidFileError naming the file and the field.
 */
export function gemma3nSettings(config: Config): Gemma3n {
  config.choice('model_type', ['gemma3n_text']);
  const count = config.layers('num_hidden_layers', 35);
  const types = typesOfLayers(config, count, (layer) => (layer + 1) % 5 !== 0);
  const ffn = config.ints('intermediate_size', count, 16384);
  const sharing = config.int('num_kv_shared_layers', 15, 0);
  // As transformers has it: with no layer left to own them, nothing is shared.
  const sharedFrom = sharing < count ? count - sharing : count;
  const layers = types.map((type, layer): Gemma3nLayer => {
    const keysOf = layer < sharedFrom ? null : types.lastIndexOf(type, sharedFrom - 1);
    if (keysOf === -1) {
      throw config.error(
        'num_kv_shared_layers',
        `must leave a layer of type ${type} with keys for layer ${layer}`,
        sharing,
      );
    }
    return { type, ffn: ffn[layer], keysOf };
  });
  const sparse = count > 10 ? 10 : 0;
  const sparsity = config.has('activation_sparsity_pattern')
    ? config.shares('activation_sparsity_pattern', count)
    : layers.map((_, layer) => (layer < sparse ? 0.95 : 0));
  return {
    ...{ layers, sharedFrom, sparsity },
    hidden: config.int('hidden_size', 2048),
    heads: config.int('num_attention_heads', 8),
    kvHeads: config.int('num_key_value_heads', 2),
    headDim: config.int('head_dim', 256),
    perLayerWidth: config.int('hidden_size_per_layer_input', 256),
    perLayerVocab: config.int('vocab_size_per_layer_input', 262144),
    streams: config.int('altup_num_inputs', 4, 2),
    laurelRank: config.int('laurel_rank', 64),
  };
}

/** The number that the normal distribution of mean 0 and deviation 1 falls below with probability p in (0, 1). */
export function normalQuantile(p: number): number {
  // Marsaglia, "Evaluating the normal distribution": x + x^3 / 3 + x^5 / (3 5) + ..., times the density.
  const below = (x: number): number => {
    let [sum, term] = [x, x];
    for (let k = 3; Math.abs(term) > 1e-18 * Math.abs(sum) && k < 1000; k += 2) {
      term *= (x * x) / k;
      sum += term;
    }
    return 0.5 + (sum * Math.exp(-0.5 * x * x)) / Math.sqrt(2 * Math.PI);
  };
  let [low, high] = [-8, 8];
  for (let i = 0; i < 60; i++) {
    const middle = (low + high) / 2;
    if (below(middle) < p) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}
