// Encoder-decoder models as the config.json of a Hugging Face directory describes them.
import { Config } from './config.js';
import { actOf, type EncoderSpec, type ModelSpec, seq2seqTypes, transformerTraits } from './spec.js';

/** An encoder that reads a source, and a decoder that writes a target and attends to what the encoder made of it. */
export interface Seq2SeqSpec {
  /** `model_type` of the configuration. */
  readonly type: (typeof seq2seqTypes)[number];
  readonly encoder: EncoderSpec;
  readonly decoder: ModelSpec;
  /** Positions: a learned table that is added to the embeddings, or one of sines. */
  readonly positions: 'learned' | 'sinusoidal';
  /** Rows of the learned tables of positions before that of the first one. */
  readonly firstPosition: number;
  /** Embeddings are normalised before the first layer; what the last layer gives is normalised. */
  readonly embedNorm: boolean;
  readonly finalNorm: boolean;
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
    firstPosition,
    embedNorm: !marian,
    finalNorm: type === 'mbart',
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
