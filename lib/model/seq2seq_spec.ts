// Encoder-decoder models as the config.json of a Hugging Face directory describes them.
import { Config } from './config.js';
import { type Stack, stacks } from './parts.js';
import { actOf, type EncoderSpec, type ModelSpec, seq2seqTypes, transformerTraits } from './spec.js';

/** An encoder that reads a source, and a decoder that writes a target and attends to what the encoder made of it. */
export interface Seq2SeqSpec {
  /** `model_type` of the configuration. */
  readonly type: (typeof seq2seqTypes)[number];
  readonly encoder: EncoderSpec;
  readonly decoder: ModelSpec;
  /** Positions: a learned table that is added to the embeddings, or one of sines, or none, but distances in scores of attention. */
  readonly positions: 'learned' | 'sinusoidal' | 'relative';
  /** Of relative positions: how many kinds of distances there are, and from which on all are of one. */
  readonly distances: { readonly buckets: number; readonly most: number };
  /** Tokens that a side holds unless more is asked for. */
  readonly context: number;
  /** Rows of the learned tables of positions before that of the first one. */
  readonly firstPosition: number;
  /** Embeddings are normalised before the first layer; what the last layer gives is normalised. */
  readonly embedNorm: boolean;
  readonly finalNorm: boolean;
  /** Factor of what the head multiplies. */
  readonly headScale: number;
}

/**
 * Reads the parsed config.json of an encoder-decoder model. Fields that are absent have the defaults of transformers.
 *
 * @param file named in errors
 * @throws InvalidFileError naming the file and the field, and what is supported.
 */
export function seq2seqSpecFromConfig(json: unknown, file: string): Seq2SeqSpec {
  const config = Config.of(json, file);
  const type = config.choice('model_type', seq2seqTypes);
  config.mustBe('is_encoder_decoder', true);
  if (config.has('architectures')) {
    const [name] = [config.value('architectures')].flat();
    if (!/(ForConditionalGeneration|MTModel)$/.test(String(name))) {
      throw config.error(
        'architectures',
        'must name a class that writes texts, such as BartForConditionalGeneration',
        name,
      );
    }
  }
  if (type === 't5' || type === 'mt5') return t5Spec(config, type);
  // Transformers 5 has one table for both sides and the head only where they are tied.
  config.mustBe('tie_word_embeddings', true);
  const marian = type === 'marian';
  if (marian) config.mustBe('share_encoder_decoder_embeddings', true);
  const hidden = config.int('d_model', 1024);
  const act = actOf(config, 'activation_function', 'gelu');
  const vocab = config.int('vocab_size', marian ? 58101 : 50265);
  if (marian && config.int('decoder_vocab_size', vocab) !== vocab) {
    throw config.error('decoder_vocab_size', `must be vocab_size ${vocab}`, config.value('decoder_vocab_size'));
  }
  const traits = {
    family: 'bart',
    type,
    vocab,
    maxPositions: config.int('max_position_embeddings', 1024),
    embedScale: config.boolean('scale_embedding', false) ? Math.sqrt(hidden) : 1,
    normPlace: type === 'mbart' ? 'pre' : 'post',
    eps: 1e-5,
    act,
    tied: true,
  } as const;
  const stack = (name: 'encoder' | 'decoder') => {
    const heads = config.int(`${name}_attention_heads`, 16);
    if (hidden % heads !== 0) throw config.error(`${name}_attention_heads`, `must divide d_model ${hidden}`, heads);
    const layers = config.layers(`${name}_layers`, 12);
    return { ...transformerTraits(hidden, heads, layers, config.int(`${name}_ffn_dim`, 4096)), ...traits };
  };
  const firstPosition = marian ? 0 : 2;
  return {
    type,
    encoder: { ...stack('encoder'), encoder: { ...sourceTraits, firstPosition } },
    decoder: { ...stack('decoder'), encoder: null },
    positions: marian ? 'sinusoidal' : 'learned',
    distances: { buckets: 0, most: 0 },
    context: traits.maxPositions,
    headScale: 1,
    firstPosition,
    embedNorm: !marian,
    finalNorm: type === 'mbart',
  };
}

/** The same model with so many layers in each stack, at most as many as it has, and so many units in each feed-forward; default all. */
export function withLayers(spec: Seq2SeqSpec, layers: Readonly<Record<Stack, number>>, units?: number): Seq2SeqSpec {
  const [encoder, decoder] = stacks.map((stack) => {
    const ffn = units ?? spec[stack].ffn;
    const perLayer = spec[stack].perLayer.slice(0, layers[stack]).map((layer) => ({ ...layer, ffn }));
    return { layers: layers[stack], ffn, perLayer };
  });
  return { ...spec, encoder: { ...spec.encoder, ...encoder }, decoder: { ...spec.decoder, ...decoder } };
}

/** What `feed_forward_proj` names, and whether it is gated; gated-gelu means the tanh form. */
const FEED_FORWARDS = {
  relu: { act: 'relu', gated: false },
  gelu: { act: 'gelu', gated: false },
  silu: { act: 'silu', gated: false },
  'gated-relu': { act: 'relu', gated: true },
  'gated-gelu': { act: 'gelu_tanh', gated: true },
  'gated-silu': { act: 'silu', gated: true },
} as const;

const feedForwards = Object.keys(FEED_FORWARDS) as (keyof typeof FEED_FORWARDS)[];

/** Tokens of a side of a model that has distances alone: nothing in it ends there. */
const longestRelative = 32768;

/** T5 (arXiv 1910.10683) and T5 1.1, which FLAN-T5 is, and mT5 (arXiv 2010.11934), which is T5 1.1 of another size. */
function t5Spec(config: Config, type: 't5' | 'mt5'): Seq2SeqSpec {
  const mt5 = type === 'mt5';
  const hidden = config.int('d_model', 512);
  const heads = config.int('num_heads', mt5 ? 6 : 8);
  const headDim = config.int('d_kv', 64);
  const ffn = config.int('d_ff', mt5 ? 1024 : 2048);
  const feedForward = FEED_FORWARDS[config.choice('feed_forward_proj', feedForwards, mt5 ? 'gated-gelu' : 'relu')];
  const buckets = config.int('relative_attention_num_buckets', 32, 4);
  if (buckets % 4 !== 0) throw config.error('relative_attention_num_buckets', 'must be a multiple of 4', buckets);
  const most = config.int('relative_attention_max_distance', 128, buckets, 1 << 16);
  const layers = config.layers('num_layers', mt5 ? 8 : 6);
  const stack = (count: number) => ({
    ...transformerTraits(hidden, heads, count, ffn),
    ...feedForward,
    ...({
      family: 't5',
      type,
      vocab: config.int('vocab_size', mt5 ? 250112 : 32128),
      maxPositions: longestRelative,
    } as const),
    ...({
      headDim,
      scoreScale: 1,
      norm: 'rms',
      normPlace: 'pre',
      eps: config.positive('layer_norm_epsilon', 1e-6),
    } as const),
    ...{ qkvBias: false, outBias: false, mlpBias: false, tied: true },
  });
  return {
    type,
    encoder: { ...stack(layers), encoder: { ...sourceTraits, firstPosition: 0 } },
    decoder: { ...stack(config.layers('num_decoder_layers', layers)), encoder: null },
    positions: 'relative',
    distances: { buckets, most },
    context: config.int('n_positions', 512, 1, longestRelative),
    firstPosition: 0,
    embedNorm: false,
    finalNorm: true,
    // Of T5 1.1 the flag says false, whatever its head is.
    headScale: !mt5 && config.boolean('tie_word_embeddings', true) ? 1 / Math.sqrt(hidden) : 1,
  };
}

/** Of an encoder that has no head: the decoder reads its features. */
const sourceTraits = {
  task: 'feature-extraction',
  tokenTypes: 0,
  headAct: 'none',
  labels: [],
  scores: 'none',
  embeddingRank: null,
} as const;
