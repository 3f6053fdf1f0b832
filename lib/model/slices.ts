// Slices of Gemma 3n: the configuration of a model with fewer layers or narrower feed-forwards, and how large it is.
import { InvalidArgumentError } from '../native/errors.js';
import { Config } from './config.js';
import { type Gemma3n, gemma3nSettings } from './gemma3n.js';

/** What is left of a Gemma 3n model. */
export interface Gemma3nSlice {
  /** Layers that are left out. Default: none. */
  readonly skip?: readonly number[];
  /** Units of the feed-forward of every layer that is kept, or one number for all: a prefix of its units. */
  readonly ffn: number | readonly number[];
}

const settingsOf = (json: Readonly<Record<string, unknown>>, file: string): Gemma3n =>
  gemma3nSettings(new Config(json, file));

/**
 * The config.json of a slice of a model (model_type gemma3n_text): lists have an entry for each layer kept, and of the layers
 * that use others' keys and values those kept are counted.
 *
 * @param json the model's config.json
 * @param file named in errors
 * @throws InvalidArgumentError when a layer to skip owns keys and values that a kept layer uses, is none of the model's or is
 * named twice, or a width is not of a prefix. InvalidFileError when the configuration is not one of Gemma 3n.
 */
export function sliceConfig(
  json: Readonly<Record<string, unknown>>,
  { skip = [], ffn }: Gemma3nSlice,
  file = 'config.json',
): Record<string, unknown> {
  const { layers, sharedFrom, sparsity } = settingsOf(json, file);
  const left = new Set(skip);
  if (
    left.size < skip.length ||
    skip.some((layer) => !Number.isInteger(layer) || layer < 0 || layer >= layers.length)
  ) {
    fail(`layers to skip must be different ids from 0 to ${layers.length - 1}`, skip);
  }
  const kept = layers.flatMap((_, layer) => (left.has(layer) ? [] : [layer]));
  if (kept.length === 0) fail('a layer at least must be kept', skip);
  for (const layer of kept) {
    const { keysOf } = layers[layer];
    if (keysOf !== null && left.has(keysOf)) {
      fail(`layer ${keysOf} owns the keys and values that layer ${layer} uses: skip both or neither`, skip);
    }
  }
  const widths = Array.isArray(ffn) ? (ffn as readonly number[]) : kept.map(() => ffn as number);
  if (widths.length !== kept.length) fail(`ffn must be one width or ${kept.length}, one for every layer kept`, ffn);
  for (const [i, layer] of kept.entries()) {
    const most = layers[layer].ffn;
    if (!Number.isInteger(widths[i]) || widths[i] < 1 || widths[i] > most) {
      fail(`ffn of layer ${layer} must be a whole number of units from 1 to its ${most}`, widths[i]);
    }
  }
  return {
    ...json,
    num_hidden_layers: kept.length,
    intermediate_size: widths,
    layer_types: kept.map((layer) => layers[layer].type),
    num_kv_shared_layers: kept.filter((layer) => layer >= sharedFrom).length,
    activation_sparsity_pattern: kept.map((layer) => sparsity[layer]),
  };
}

function fail(what: string, got: unknown): never {
  throw new InvalidArgumentError(`[slice] ${what}, got ${JSON.stringify(got)}`);
}

/**
 * Parameters of a model (model_type gemma3n_text) that take part in products, from its config.json alone: all stored ones but
 * the two tables of embeddings, which are only looked up in. It is what the published names of slices count.
 *
 * @throws InvalidFileError when the configuration is not one of Gemma 3n.
 */
export function effectiveParameters(json: Readonly<Record<string, unknown>>, file = 'config.json'): number {
  const { layers, hidden, heads, kvHeads, headDim, perLayerWidth, streams, laurelRank } = settingsOf(json, file);
  // Norms: before and behind both sub-layers, of what LAuReL, the embedding of the layer and the streams' router give; the
  // output's scale; of heads of queries and keys.
  const norms = 8 * hidden + 2 * headDim;
  const attention = 2 * hidden * headDim * (heads + kvHeads);
  const mixing = streams * hidden + streams * streams * (streams + 1);
  const perLayer = norms + attention + mixing + 2 * hidden * laurelRank + 3 * hidden * perLayerWidth;
  const ffn = layers.reduce((sum, layer) => sum + 3 * hidden * layer.ffn, 0);
  return layers.length * perLayer + ffn + hidden + perLayerWidth + 2 * (streams - 1) * hidden * hidden;
}
