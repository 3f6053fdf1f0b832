// Encoders as the config.json of a Hugging Face directory describes them.
import { Config } from './config.js';
import {
  actOf,
  type EncoderSpec,
  type EncoderTask,
  type EncoderTraits,
  encoderTypes,
  type Family,
  transformerTraits,
} from './spec.js';

/** The ends of names in `architectures`, and what such a model computes. */
const TASKS: Readonly<Record<string, EncoderTask>> = {
  Model: 'feature-extraction',
  ForMaskedLM: 'masked-lm',
  // The prediction of next sentences beside is left out.
  ForPreTraining: 'masked-lm',
  ForSequenceClassification: 'sequence-classification',
};

const SCORES: Readonly<Record<string, EncoderTraits['scores']>> = {
  regression: 'none',
  single_label_classification: 'softmax',
  multi_label_classification: 'sigmoid',
};

/**
 * Reads an encoder's parsed config.json. Fields that are absent have the defaults of transformers; without `architectures`
 * the model has no head.
 *
 * @param file named in errors
 * @param options.task in place of what `architectures` says
 * @throws InvalidFileError naming the file and the field, and what is supported.
 */
export function encoderSpecFromConfig(json: unknown, file: string, options: { task?: EncoderTask } = {}): EncoderSpec {
  const config = Config.of(json, file);
  const type = config.choice('model_type', encoderTypes);
  config.mustBe('is_decoder', false);
  config.mustBe('add_cross_attention', false);
  config.mustBe('position_embedding_type', 'absolute');
  const family: Family = type === 'xlm-roberta' ? 'roberta' : type;
  const distil = family === 'distilbert';
  const field = distil
    ? { hidden: 'dim', heads: 'n_heads', layers: 'n_layers', ffn: 'hidden_dim', act: 'activation' }
    : {
        ...{ hidden: 'hidden_size', heads: 'num_attention_heads', layers: 'num_hidden_layers' },
        ...{ ffn: 'intermediate_size', act: 'hidden_act' },
      };
  const hidden = config.int(field.hidden, 768);
  const heads = config.int(field.heads, 12);
  if (hidden % heads !== 0) throw config.error(field.heads, `must divide ${field.hidden} ${hidden}`, heads);
  const layers = config.layers(field.layers, distil ? 6 : 12);
  const ffn = config.int(field.ffn, 3072);
  const act = actOf(config, field.act, 'gelu');
  // RoBERTa counts positions from the one after that of padding.
  const firstPosition = family === 'roberta' ? config.int('pad_token_id', 1, 0) + 1 : 0;
  const table = config.int('max_position_embeddings', 512);
  if (table <= firstPosition) {
    throw config.error('max_position_embeddings', `must be above ${firstPosition}, where positions begin`, table);
  }
  const task = options.task ?? taskOf(config);
  const slim = config.has(slimKey) ? slimOf(config.section(slimKey), { layers, heads, ffn, hidden }) : null;
  if (slim?.rank && task === 'masked-lm') {
    throw config.error(slimKey, 'must have no embedding_rank: scores of tokens need whole embeddings', slim.rank);
  }
  const classifies = task === 'sequence-classification';
  const classifierAct = distil ? 'relu' : 'tanh';
  const traits = transformerTraits(hidden, heads, layers, ffn);
  return {
    ...traits,
    ...(slim && {
      ffn: Math.max(...slim.ffn),
      perLayer: traits.perLayer.map((layer, i) => ({
        ...layer,
        ...{ ffn: slim.ffn[i], heads: slim.heads[i], kvHeads: slim.heads[i] },
      })),
    }),
    family,
    type,
    vocab: config.int('vocab_size', family === 'roberta' ? 50265 : 30522),
    maxPositions: table - firstPosition,
    normPlace: 'post',
    eps: distil ? 1e-12 : config.positive('layer_norm_eps', 1e-12),
    act,
    tied: config.boolean('tie_word_embeddings', true),
    encoder: {
      task,
      embeddingRank: slim?.rank ?? null,
      tokenTypes: distil ? 0 : config.int('type_vocab_size', 2),
      firstPosition,
      headAct: classifies ? classifierAct : family === 'roberta' ? 'gelu' : act,
      ...(classifies ? classesOf(config) : { labels: [], scores: 'none' }),
    },
  };
}

/**
 * The key of config.json for encoders whose layers have been slimmed, which other readers refuse: `attention_heads` and
 * `intermediate_sizes` of every layer, `embedding_rank` where embeddings are a product. `num_attention_heads` stays: a head has
 * `hidden_size / num_attention_heads` features.
 */
export const slimKey = 'slim';

/** What is left of every layer, [layers], and the rank of the embeddings; null: they are whole. */
export interface Slim {
  readonly heads: readonly number[];
  readonly ffn: readonly number[];
  readonly rank: number | null;
}

export const slimToJson = ({ heads, ffn, rank }: Slim): object => ({
  ...{ attention_heads: heads, intermediate_sizes: ffn },
  ...(rank !== null && { embedding_rank: rank }),
});

function slimOf(config: Config, most: { layers: number; heads: number; ffn: number; hidden: number }): Slim {
  const counts = (name: string, limit: number): number[] => {
    const list = config.value(name);
    const fits = (n: unknown) => Number.isInteger(n) && (n as number) >= 1 && (n as number) <= limit;
    if (Array.isArray(list) && list.length === most.layers && list.every(fits)) return list;
    throw config.error(name, `must be a list of ${most.layers} integers from 1 to ${limit}`, list);
  };
  const rank = config.has('embedding_rank') ? config.int('embedding_rank', 1, 1, most.hidden) : null;
  return { heads: counts('attention_heads', most.heads), ffn: counts('intermediate_sizes', most.ffn), rank };
}

function taskOf(config: Config): EncoderTask {
  const names = config.has('architectures') ? config.value('architectures') : ['Model'];
  const name = Array.isArray(names) && typeof names[0] === 'string' ? names[0] : '';
  const end = Object.keys(TASKS).find((end) => new RegExp(`^[A-Za-z]*?${end}$`).test(name));
  if (end) return TASKS[end];
  throw config.error(
    'architectures',
    `must name a class that ends with one of ${Object.keys(TASKS).join(', ')}`,
    names,
  );
}

/** The classes, and how the pipelines of transformers score them. */
function classesOf(config: Config): Pick<EncoderTraits, 'labels' | 'scores'> {
  const names = config.section('id2label');
  const ids = names.names();
  const count = ids.length > 0 ? ids.length : config.int('num_labels', 2, 1, 1 << 16);
  const labels = Array.from({ length: count }, (_, id) => {
    const label = ids.length > 0 ? names.value(String(id)) : `LABEL_${id}`;
    if (typeof label !== 'string') throw names.error(String(id), `must name one of ${count} classes`, label);
    return label;
  });
  const twice = labels.find((label, id) => labels.indexOf(label) !== id);
  if (twice !== undefined) throw config.error('id2label', 'must name every class differently', twice);
  const kind = config.choice(
    'problem_type',
    Object.keys(SCORES),
    count === 1 ? 'multi_label_classification' : 'single_label_classification',
  );
  return { labels, scores: SCORES[kind] };
}
