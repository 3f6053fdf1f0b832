// What a model is made of, and decoders as the config.json of a Hugging Face directory describes them.
import type { Act } from '../graph/index.js';
import { Config } from './config.js';
import { gemma3nSettings, normalQuantile } from './gemma3n.js';
import { type LayerType, rotaryFrequencies, rotaryFrequenciesByType, typesOfLayers } from './rope.js';

/** Names and layouts of the weights. */
export type Family = 'llama' | 'gpt2' | 'bert' | 'roberta' | 'distilbert' | 'bart' | 't5';

/** What layers of one model may have different. */
export interface LayerSpec {
  /** Units of the feed-forward part. */
  readonly ffn: number;
  /** Where layers have different numbers of heads (slim encoders): theirs in place of the model's. */
  readonly heads?: number;
  readonly kvHeads?: number;
  /** Keys that a query sees at most: its own and those right before it; 0: all before it. */
  readonly window: number;
  /** Rotary positions: radians per position of each pair of features, scaling included; null: none. */
  readonly rope: { readonly invFreq: Float32Array } | null;
  /** The layer whose keys and values its queries see; null: its own. */
  readonly keysOf: number | null;
  /** Of the gate's values of a row only what lies above their mean by so many deviations acts; null: all. */
  readonly gateCutoff: number | null;
}

/** Several residual streams (AltUp), of which the first goes through the sub-layers, and what comes with them in Gemma 3n. */
export interface StreamSpec {
  readonly count: number;
  /** Whether there are factors of the first stream's features where a layer's own embedding meets it. */
  readonly scaled: boolean;
  /** Of the low-rank product beside attention (LAuReL). */
  readonly laurelRank: number;
  /** Features of the embedding that a token has for each layer, and tokens that have one. */
  readonly perLayerWidth: number;
  readonly perLayerVocab: number;
}

/** What an encoder computes from its last rows. */
export type EncoderTask = 'masked-lm' | 'sequence-classification' | 'feature-extraction';

/** What an encoder has that decoders have not; its rows see all rows of their sequence. */
export interface EncoderTraits {
  readonly task: EncoderTask;
  /** Features of the stored embeddings of tokens, which a product makes the model's; null: they are the model's. */
  readonly embeddingRank: number | null;
  /** Kinds that a token can be of (of the first text, of the second), each with an embedding; 0: none. */
  readonly tokenTypes: number;
  /** Rows of the table of positions before that of the first one. */
  readonly firstPosition: number;
  /** Of the product before the last one of a head. */
  readonly headAct: Act | 'tanh';
  /** Names of the classes; empty without a classifier. */
  readonly labels: readonly string[];
  /** What makes scores of the classifier's outputs; none: they are the scores, as in regression. */
  readonly scores: 'softmax' | 'sigmoid' | 'none';
}

export interface ModelSpec {
  readonly family: Family;
  /** `model_type` of the configuration. */
  readonly type: string;
  readonly layers: number;
  /** One for every layer. */
  readonly perLayer: readonly LayerSpec[];
  /** Features of the residual stream. */
  readonly hidden: number;
  /** Units of the feed-forward part, of the widest layer. */
  readonly ffn: number;
  readonly heads: number;
  /** Heads of keys and values; query head h reads `h / (heads / kvHeads)`. */
  readonly kvHeads: number;
  readonly headDim: number;
  readonly vocab: number;
  readonly maxPositions: number;
  /** Positions turn queries and keys, or a table of them is added to the embeddings. */
  readonly positions: 'rotary' | 'learned';
  /** Factor of the embeddings of tokens where they enter the residual stream. */
  readonly embedScale: number;
  readonly norm: 'rms' | 'layer';
  /** Norms are of what a sub-layer reads, or of the residual stream after it (so of the embeddings, too, and not at the end). */
  readonly normPlace: 'pre' | 'post';
  readonly eps: number;
  /** Added to the weights of norms that are stored. */
  readonly normOffset: number;
  /** What a sub-layer adds to the residual stream is normalised, too. */
  readonly postNorms: boolean;
  /** Every head of queries and keys is normalised before it is turned. */
  readonly qkNorm: boolean;
  /** So is every head of values, without weights. */
  readonly vNorm: boolean;
  /** Factor of the scores of attention. */
  readonly scoreScale: number;
  /** c > 0: scores of attention, or logits, x become c tanh(x / c). */
  readonly scoreSoftcap: number;
  readonly logitSoftcap: number;
  readonly act: Act;
  /** `down(act(gate(x)) * up(x))`, or `down(act(up(x)))`. */
  readonly gated: boolean;
  /** Biases of the query, key and value projections, and of attention's output projection. */
  readonly qkvBias: boolean;
  readonly outBias: boolean;
  readonly mlpBias: boolean;
  /** The head is the embedding table. */
  readonly tied: boolean;
  /** Null: one residual stream. */
  readonly streams: StreamSpec | null;
  /** Null: a decoder. */
  readonly encoder: EncoderTraits | null;
}

/** A model whose rows see all rows of their sequence. */
export type EncoderSpec = ModelSpec & { readonly encoder: EncoderTraits };

// FLOPs are computed for every text: a spec is spread once a layer.
const layersOf = new WeakMap<ModelSpec, (ModelSpec & LayerSpec)[]>();

/** A model as one layer of it is. */
export function layerOf(spec: ModelSpec, layer: number): ModelSpec & LayerSpec {
  let layers = layersOf.get(spec);
  if (!layers) {
    layers = spec.perLayer.map((own) => ({ ...spec, ...own }));
    layersOf.set(spec, layers);
  }
  return layers[layer];
}

/**
 * The content of a config.json for the same model with other widths of feed-forwards, [layers]: one width in the architecture's own
 * field, and where layers differ, `per_layer_config` besides; a list of all in Gemma 3n, and where there was one.
 */
export function configWithWidths(
  { family, type }: Pick<ModelSpec, 'family' | 'type'>,
  json: Readonly<Record<string, unknown>>,
  widths: readonly number[],
): Record<string, unknown> {
  const field = family === 'gpt2' ? 'n_inner' : 'intermediate_size';
  const { per_layer_config: _, ...config } = json;
  const widest = Math.max(...widths);
  const listed = type === 'gemma3n_text' && widths.some((ffn) => ffn !== widest);
  if (listed || Array.isArray(config[field])) return { ...config, [field]: [...widths] };
  const own = widths.flatMap((ffn, layer) => (ffn === widest ? [] : [[layer, { intermediate_size: ffn }] as const]));
  return { ...config, [field]: widest, ...(own.length > 0 && { per_layer_config: Object.fromEntries(own) }) };
}

const ACTS: Readonly<Record<string, Act>> = {
  silu: 'silu',
  swish: 'silu',
  gelu: 'gelu',
  gelu_new: 'gelu_tanh',
  gelu_pytorch_tanh: 'gelu_tanh',
  relu: 'relu',
};
export const actOf = (config: Config, field: string, otherwise: string): Act =>
  ACTS[config.choice(field, Object.keys(ACTS), otherwise)];

/** Types of layers of the architectures that have several. */
const TYPES: Readonly<Record<string, (config: Config) => LayerType[]>> = {
  qwen2: (config) => qwenTypes(config),
  qwen3: (config) => qwenTypes(config),
  gemma2: (config) => typesOfLayers(config, config.layers('num_hidden_layers'), (layer) => layer % 2 === 0),
  gemma3_text(config) {
    const every = config.int('sliding_window_pattern', 6);
    return typesOfLayers(config, config.layers('num_hidden_layers'), (layer) => (layer + 1) % every !== 0);
  },
  gemma3n_text: (config) => gemma3nSettings(config).layers.map(({ type }) => type),
};

/** The types of a decoder's layers, as its config.json lists them or else is read; null: the architecture has one type. */
export const layerTypesOf = (config: Config, { type }: Pick<ModelSpec, 'type'>): LayerType[] | null =>
  TYPES[type]?.(config) ?? null;

const READERS: Readonly<Record<string, (config: Config) => ModelSpec>> = {
  llama: (config) => llamaSpec(config),
  mistral(config) {
    const window = config.optionalInt('sliding_window', 4096) ?? 0;
    return llamaSpec(config, { longest: 131072, kvHeads: 8, window: () => window });
  },
  qwen2: (config) => ({ ...llamaSpec(config, qwenDefaults(config)), qkvBias: true, outBias: false }),
  qwen3: (config) => ({ ...llamaSpec(config, { ...qwenDefaults(config), headDim: 128 }), qkNorm: true }),
  // Its files say gelu and mean the tanh form.
  gemma(config) {
    config.choice('hidden_act', ['gelu', 'gelu_pytorch_tanh'], 'gelu');
    return gemmaSpec(config, { act: 'gelu_tanh', kvHeads: 16 });
  },
  gemma2(config) {
    const spec = gemmaSpec(config, { kvHeads: 4, ...gemmaWindows(config, TYPES.gemma2(config)) });
    return { ...spec, ...gemmaScores(config, { score: 50, logit: 30 }), postNorms: true };
  },
  gemma3_text(config) {
    const types = TYPES.gemma3_text(config);
    const spec = gemmaSpec(config, {
      ...{ longest: 131072, kvHeads: 4, ...gemmaWindows(config, types) },
      rope(headDim) {
        const byType = rotaryFrequenciesByType(config, headDim);
        return (layer) => byType[types[layer]];
      },
    });
    return { ...spec, ...gemmaScores(config, { score: 0, logit: 0 }), postNorms: true, qkNorm: true };
  },
  gemma3n_text: gemma3nSpec,
  gpt2: gpt2Spec,
};

/** `model_type` of encoders (encoder_spec.ts). */
export const encoderTypes = ['bert', 'roberta', 'xlm-roberta', 'distilbert'] as const;

/** Whether a parsed config.json is an encoder's. */
export const isEncoderConfig = (json: unknown): boolean =>
  encoderTypes.some((type) => type === (json as { model_type?: unknown } | null)?.model_type);

/** `model_type` of encoder-decoder models (seq2seq_spec.ts). */
export const seq2seqTypes = ['bart', 'mbart', 'marian', 't5', 'mt5'] as const;

/** Whether a parsed config.json is an encoder-decoder model's. */
export const isSeq2SeqConfig = (json: unknown): boolean =>
  seq2seqTypes.some((type) => type === (json as { model_type?: unknown } | null)?.model_type);

/**
 * Reads a decoder's parsed config.json. Fields that are absent have the defaults of transformers.
 *
 * @param file named in errors
 * @throws InvalidFileError naming the file and the field, and what is supported.
 */
export function specFromConfig(json: unknown, file: string): ModelSpec {
  const config = Config.of(json, file);
  if (isEncoderConfig(json)) {
    throw config.error(
      'model_type',
      'must be that of a decoder: encoders classify and embed texts',
      config.value('model_type'),
    );
  }
  if (isSeq2SeqConfig(json)) {
    throw config.error(
      'model_type',
      'must be that of a decoder: encoder-decoder models write texts for a source, with generate',
      config.value('model_type'),
    );
  }
  return withLayerConfig(READERS[config.choice('model_type', Object.keys(READERS))](config), config);
}

// Layers that differ from what the rest of the file says: `per_layer_config: {"5": {"intermediate_size": 8192}}`, as
// transformers writes it.
function withLayerConfig(spec: ModelSpec, config: Config): ModelSpec {
  if (!config.has('per_layer_config')) return spec;
  const own = config.section('per_layer_config');
  for (const layer of own.names()) {
    if (!(Number(layer) < spec.layers && /^(0|[1-9]\d*)$/.test(layer))) {
      throw own.error(layer, `must be a layer from 0 to ${spec.layers - 1}`, layer);
    }
    const unknown = own
      .section(layer)
      .names()
      .find((name) => name !== 'intermediate_size');
    if (unknown !== undefined)
      throw own.error(`${layer}.${unknown}`, 'must be absent', own.section(layer).value(unknown));
  }
  const perLayer = spec.perLayer.map((layer, i) => ({
    ...layer,
    ffn: own.section(String(i)).int('intermediate_size', layer.ffn),
  }));
  return { ...spec, perLayer, ffn: Math.max(...perLayer.map(({ ffn }) => ffn)) };
}

/** What is not in the file, or is read in another way, in architectures that are like Llama. */
interface LlamaDefaults {
  longest?: number;
  /** Default: as many as heads. */
  kvHeads?: number;
  /** Default: hidden size over heads. */
  headDim?: number;
  act?: Act;
  /** By layer; default: none. */
  window?: (layer: number) => number;
  /** Units of feed-forwards by layer; default: one number for all. */
  ffn?: readonly number[];
  /** Frequencies by layer; default: of all layers alike. */
  rope?: (headDim: number) => (layer: number) => Float32Array;
}

function llamaSpec(config: Config, defaults: LlamaDefaults = {}): ModelSpec {
  const hidden = config.int('hidden_size');
  const heads = config.int('num_attention_heads');
  const kvHeads = config.int('num_key_value_heads', defaults.kvHeads ?? heads);
  if (heads % kvHeads !== 0) {
    throw config.error('num_key_value_heads', `must divide num_attention_heads ${heads}`, kvHeads);
  }
  if (!config.has('head_dim') && !defaults.headDim && hidden % heads !== 0) {
    throw config.error('num_attention_heads', `must divide hidden_size ${hidden} when there is no head_dim`, heads);
  }
  const headDim = config.int('head_dim', defaults.headDim ?? hidden / heads);
  if (headDim % 2 !== 0) throw config.error('head_dim', 'must be even for rotary positions', headDim);
  const layers = config.layers('num_hidden_layers');
  const ffn = defaults.ffn ?? new Array<number>(layers).fill(config.int('intermediate_size'));
  const alike = { invFreq: defaults.rope ? new Float32Array() : rotaryFrequencies(config, headDim) };
  const frequencies = defaults.rope?.(headDim);
  const attnBias = config.boolean('attention_bias', false);
  return {
    family: 'llama',
    type: config.choice('model_type', Object.keys(READERS)),
    layers,
    perLayer: Array.from({ length: layers }, (_, layer) => ({
      ffn: ffn[layer],
      window: defaults.window?.(layer) ?? 0,
      rope: frequencies ? { invFreq: frequencies(layer) } : alike,
      keysOf: null,
      gateCutoff: null,
    })),
    hidden,
    ffn: ffn.reduce((a, b) => Math.max(a, b)),
    heads,
    kvHeads,
    headDim,
    vocab: config.int('vocab_size'),
    maxPositions: config.int('max_position_embeddings', defaults.longest ?? 2048),
    positions: 'rotary',
    embedScale: 1,
    norm: 'rms',
    normPlace: 'pre',
    eps: config.positive('rms_norm_eps', 1e-6),
    normOffset: 0,
    postNorms: false,
    qkNorm: false,
    vNorm: false,
    scoreScale: 1 / Math.sqrt(headDim),
    scoreSoftcap: 0,
    logitSoftcap: 0,
    act: defaults.act ?? actOf(config, 'hidden_act', 'silu'),
    gated: true,
    qkvBias: attnBias,
    outBias: attnBias,
    mlpBias: config.boolean('mlp_bias', false),
    tied: config.boolean('tie_word_embeddings', false),
    streams: null,
    encoder: null,
  };
}

function qwenDefaults(config: Config): LlamaDefaults {
  const window = qwenWindow(config);
  const types = qwenTypes(config);
  return { longest: 32768, kvHeads: 32, window: (layer) => (types[layer] === 'full_attention' ? 0 : (window ?? 0)) };
}

const qwenWindow = (config: Config): number | null =>
  config.boolean('use_sliding_window', false) ? config.optionalInt('sliding_window', 4096) : null;

function qwenTypes(config: Config): LayerType[] {
  const slides = qwenWindow(config) !== null;
  const from = config.int('max_window_layers', 28, 0);
  return typesOfLayers(config, config.layers('num_hidden_layers'), (layer) => slides && layer >= from);
}

/** Llama with scaled embeddings and norms of 1 + weight. */
function gemmaSpec(config: Config, defaults: LlamaDefaults): ModelSpec {
  config.mustBe('use_bidirectional_attention', false);
  const act = defaults.act ?? actOf(config, 'hidden_activation', 'gelu_pytorch_tanh');
  const spec = llamaSpec(config, { longest: 8192, headDim: 256, ...defaults, act });
  const tied = config.boolean('tie_word_embeddings', true);
  return { ...spec, embedScale: Math.sqrt(spec.hidden), normOffset: 1, tied };
}

function gemma3nSpec(config: Config): ModelSpec {
  const { layers, sparsity, ...n } = gemma3nSettings(config);
  config.mustBe('altup_active_idx', 0);
  const types = layers.map(({ type }) => type);
  const spec = gemmaSpec(config, {
    ...{ longest: 32768, kvHeads: 2, ffn: layers.map(({ ffn }) => ffn), ...gemmaWindows(config, types, 512) },
    rope(headDim) {
      const byType = rotaryFrequenciesByType(config, headDim);
      return (layer) => byType[types[layer]];
    },
  });
  return {
    ...spec,
    perLayer: spec.perLayer.map((layer, i) => ({
      ...layer,
      keysOf: layers[i].keysOf,
      gateCutoff: sparsity[i] > 0 ? normalQuantile(sparsity[i]) : null,
    })),
    ...{ normOffset: 0, postNorms: true, qkNorm: true, vNorm: true, scoreScale: 1 },
    logitSoftcap: config.optionalPositive('final_logit_softcapping', 30) ?? 0,
    streams: {
      count: n.streams,
      scaled: config.boolean('altup_correct_scale', true),
      ...{ laurelRank: n.laurelRank, perLayerWidth: n.perLayerWidth, perLayerVocab: n.perLayerVocab },
    },
  };
}

function gemmaWindows(config: Config, types: readonly LayerType[], otherwise = 4096): Pick<LlamaDefaults, 'window'> {
  const window = config.optionalInt('sliding_window', otherwise) ?? 0;
  return { window: (layer) => (types[layer] === 'sliding_attention' ? window : 0) };
}

function gemmaScores(
  config: Config,
  softcap: { score: number; logit: number },
): Pick<ModelSpec, 'scoreScale' | 'scoreSoftcap' | 'logitSoftcap'> {
  return {
    scoreScale: 1 / Math.sqrt(config.positive('query_pre_attn_scalar', 256)),
    scoreSoftcap: config.optionalPositive('attn_logit_softcapping', softcap.score) ?? 0,
    logitSoftcap: config.optionalPositive('final_logit_softcapping', softcap.logit) ?? 0,
  };
}

/** What decoders and encoders after the first Transformer have alike: layer norms, biases, learned positions, plain units. */
export function transformerTraits(hidden: number, heads: number, layers: number, ffn: number) {
  return {
    layers,
    perLayer: Array.from({ length: layers }, () => ({ ffn, window: 0, rope: null, keysOf: null, gateCutoff: null })),
    hidden,
    ffn,
    heads,
    kvHeads: heads,
    headDim: hidden / heads,
    positions: 'learned',
    embedScale: 1,
    norm: 'layer',
    normOffset: 0,
    postNorms: false,
    qkNorm: false,
    vNorm: false,
    scoreScale: 1 / Math.sqrt(hidden / heads),
    scoreSoftcap: 0,
    logitSoftcap: 0,
    gated: false,
    qkvBias: true,
    outBias: true,
    mlpBias: true,
    streams: null,
  } as const;
}

function gpt2Spec(config: Config): ModelSpec {
  const hidden = config.int('n_embd');
  const heads = config.int('n_head');
  if (hidden % heads !== 0) throw config.error('n_head', `must divide n_embd ${hidden}`, heads);
  // Variants of the architecture that compute something else.
  config.mustBe('scale_attn_weights', true);
  config.mustBe('scale_attn_by_inverse_layer_idx', false);
  config.mustBe('add_cross_attention', false);
  const layers = config.layers('n_layer');
  const ffn = config.int('n_inner', 4 * hidden);
  return {
    ...transformerTraits(hidden, heads, layers, ffn),
    family: 'gpt2',
    type: 'gpt2',
    vocab: config.int('vocab_size'),
    maxPositions: config.int('n_positions', 1024),
    normPlace: 'pre',
    eps: config.positive('layer_norm_epsilon', 1e-5),
    act: actOf(config, 'activation_function', 'gelu_new'),
    tied: config.boolean('tie_word_embeddings', true),
    encoder: null,
  };
}
