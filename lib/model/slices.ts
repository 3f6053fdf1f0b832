// Slices of decoders: what is left of a model without some of its layers; of Gemma 3n also the configuration with narrower
// feed-forwards, and how large it is.
import { InvalidArgumentError } from '../native/errors.js';
import { Config } from './config.js';
import { type Gemma3n, gemma3nSettings } from './gemma3n.js';
import { type LayerSpec, layerTypesOf, type ModelSpec } from './spec.js';

/** What is left of a Gemma 3n model. */
export interface Gemma3nSlice {
  /** Layers that are left out. Default: none. */
  readonly skip?: readonly number[];
  /** Units of the feed-forward of every layer that is kept, or one number for all: a prefix of its units. */
  readonly ffn: number | readonly number[];
}

/**
 * The ids of the layers that stay, ascending.
 *
 * @param layers of the whole model
 * @throws InvalidArgumentError when a layer to skip owns keys and values that one that stays uses, is none of the model's or is
 * named twice, or none stays.
 */
export function keptLayers(layers: readonly Pick<LayerSpec, 'keysOf'>[], skip: readonly number[]): number[] {
  if (
    !Array.isArray(skip) ||
    new Set(skip).size < skip.length ||
    skip.some((layer) => !Number.isInteger(layer) || layer < 0 || layer >= layers.length)
  ) {
    fail(`layers to skip must be different ids from 0 to ${layers.length - 1}`, skip);
  }
  const left = new Set(skip);
  const kept = layers.flatMap((_, layer) => (left.has(layer) ? [] : [layer]));
  if (kept.length === 0) fail('a layer at least must be kept', skip);
  // Owners are the last of their type that have keys of their own: with them, what stays finds the same ones by that rule.
  for (const layer of kept) {
    const { keysOf } = layers[layer];
    if (keysOf !== null && left.has(keysOf)) {
      fail(`layer ${keysOf} owns the keys and values that layer ${layer} uses: skip both or neither`, skip);
    }
  }
  return kept;
}

/** A model of which the layers `kept` stay, ascending, renumbered. */
export function specOfLayers(spec: ModelSpec, kept: readonly number[]): ModelSpec {
  const perLayer = kept.map((layer) => {
    const { keysOf, ...own } = spec.perLayer[layer];
    return { ...own, keysOf: keysOf === null ? null : kept.indexOf(keysOf) };
  });
  return { ...spec, layers: kept.length, perLayer, ffn: Math.max(...perLayer.map(({ ffn }) => ffn)) };
}

/**
 * The fields of a decoder's config.json that are others when the layers `kept` stay, but for the widths of feed-forwards.
 *
 * @param file named in errors
 */
export function fieldsOfLayers(
  spec: Pick<ModelSpec, 'family' | 'type'>,
  json: Readonly<Record<string, unknown>>,
  kept: readonly number[],
  file: string,
): Record<string, unknown> {
  if (spec.type === 'gemma3n_text') return gemma3nFields(settingsOf(json, file), kept);
  const listed = Array.isArray(json.layer_types);
  const types: readonly unknown[] | null = listed
    ? (json.layer_types as unknown[])
    : layerTypesOf(new Config(json, file), spec);
  return {
    [spec.family === 'gpt2' ? 'n_layer' : 'num_hidden_layers']: kept.length,
    // Those that are not listed follow from a layer's number, which is another now.
    ...(types && (listed || new Set(types).size > 1) && { layer_types: kept.map((layer) => types[layer]) }),
  };
}

const gemma3nFields = ({ layers, sharedFrom, sparsity }: Gemma3n, kept: readonly number[]) => ({
  num_hidden_layers: kept.length,
  layer_types: kept.map((layer) => layers[layer].type),
  num_kv_shared_layers: kept.filter((layer) => layer >= sharedFrom).length,
  activation_sparsity_pattern: kept.map((layer) => sparsity[layer]),
});

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
  const settings = settingsOf(json, file);
  const { layers } = settings;
  const kept = keptLayers(layers, skip);
  const widths = Array.isArray(ffn) ? (ffn as readonly number[]) : kept.map(() => ffn as number);
  if (widths.length !== kept.length) fail(`ffn must be one width or ${kept.length}, one for every layer kept`, ffn);
  for (const [i, layer] of kept.entries()) {
    const most = layers[layer].ffn;
    if (!Number.isInteger(widths[i]) || widths[i] < 1 || widths[i] > most) {
      fail(`ffn of layer ${layer} must be a whole number of units from 1 to its ${most}`, widths[i]);
    }
  }
  return { ...json, ...gemma3nFields(settings, kept), intermediate_size: widths };
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
