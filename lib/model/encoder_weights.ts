// The weights of an encoder, and where they lie in a checkpoint.
import type { Graph, Node } from '../graph/graph.js';
import type { Checkpoint } from '../io/safetensors.js';
import type { Tensor } from '../native/index.js';
import { type EncoderSpec, layerOf } from './spec.js';
import {
  type Affine,
  bindTensor,
  type Get,
  type LayerWeights,
  type LoadedWeights,
  loadSlots,
  mapGroup,
  planOf,
  type Slot,
} from './weights.js';

/** Two products, the second one's outputs being the scores of tokens or classes. */
export interface EncoderHead<T> {
  /** `[hidden, hidden]` */
  readonly dense: Affine<T>;
  /** Of what the first gives, after its activation. */
  readonly norm?: Affine<T>;
  /** `[vocab or classes, hidden]`; of tied tokens the object that `embed` is. */
  readonly out: Affine<T>;
}

/** Everything an encoder computes with. `norm1` and `norm2` of a layer come after its sub-layers. */
export interface EncoderWeights<T> {
  /** `[vocab, hidden]`, or `[vocab, rank]` */
  readonly embed: T;
  /** `[hidden, rank]` where embeddings have one. */
  readonly embedUp?: Affine<T>;
  /** `[maxPositions, hidden]` */
  readonly positions: T;
  /** `[tokenTypes, hidden]` */
  readonly tokenTypes?: T;
  readonly embedNorm: Affine<T>;
  readonly layers: readonly LayerWeights<T>[];
  readonly head?: EncoderHead<T>;
}

export type EncoderTensors = EncoderWeights<Tensor>;
export type EncoderNodes = EncoderWeights<Node>;

// Modules of a layer, and of heads; what follows `encoder.layer.{i}` or `transformer.layer.{i}`.
const BERT_LAYER = {
  ...{ q: 'attention.self.query', k: 'attention.self.key', v: 'attention.self.value', o: 'attention.output.dense' },
  ...{ norm1: 'attention.output.LayerNorm', up: 'intermediate.dense', down: 'output.dense', norm2: 'output.LayerNorm' },
} as const;
const DISTILBERT_LAYER = {
  ...{ q: 'attention.q_lin', k: 'attention.k_lin', v: 'attention.v_lin', o: 'attention.out_lin' },
  ...{ norm1: 'sa_layer_norm', up: 'ffn.lin1', down: 'ffn.lin2', norm2: 'output_layer_norm' },
} as const;
const TOKEN_HEADS = {
  bert: {
    dense: 'cls.predictions.transform.dense',
    norm: 'cls.predictions.transform.LayerNorm',
    out: 'cls.predictions',
  },
  roberta: { dense: 'lm_head.dense', norm: 'lm_head.layer_norm', out: 'lm_head' },
  distilbert: { dense: 'vocab_transform', norm: 'vocab_layer_norm', out: 'vocab_projector' },
} as const;
const CLASSIFIERS = {
  bert: { dense: 'pooler.dense', out: 'classifier' },
  roberta: { dense: 'classifier.dense', out: 'classifier.out_proj' },
  distilbert: { dense: 'pre_classifier', out: 'classifier' },
} as const;

type EncoderFamily = keyof typeof TOKEN_HEADS;

/** Builds the structure of an encoder's weights from its slots. */
function assemble<T>(spec: EncoderSpec, get: Get<T>): EncoderWeights<T> {
  const { hidden, vocab, maxPositions, encoder } = spec;
  const width = encoder.embeddingRank ?? hidden;
  const family = spec.family as EncoderFamily;
  const slot = (name: string, shape: number[], init: Slot['init'], file: string, storage: Partial<Slot['file']> = {}) =>
    get({ name, shape, init, file: { name: file, shape, transposed: false, start: 0, column: 0, ...storage } });
  const matrix = (name: string, file: string, out: number, input: number, head = false): Affine<T> => ({
    weight: slot(`${name}.weight`, [out, input], 'normal', `${file}.weight`, { head }),
    bias: slot(`${name}.bias`, [out], 'zero', `${file}.bias`, { head }),
  });
  // Files that were made from TensorFlow's have its names.
  const norm = (name: string, file: string, head = false): Affine<T> => ({
    weight: slot(`${name}.weight`, [hidden], 'one', `${file}.weight`, { head, aliases: [`${file}.gamma`] }),
    bias: slot(`${name}.bias`, [hidden], 'zero', `${file}.bias`, { head, aliases: [`${file}.beta`] }),
  });
  const table = (name: string, file: string, rows: number, first = 0, features = hidden): T =>
    slot(name, [rows, features], 'normal', `embeddings.${file}.weight`, {
      shape: [first + rows, features],
      start: first,
    });

  const [stem, modules] =
    family === 'distilbert' ? ['transformer.layer', DISTILBERT_LAYER] : ['encoder.layer', BERT_LAYER];
  const layer = (i: number): LayerWeights<T> => {
    const at = (part: keyof typeof modules) => [`layers.${i}.${part}`, `${stem}.${i}.${modules[part]}`] as const;
    const { heads, headDim, ffn } = layerOf(spec, i);
    const inner = heads * headDim;
    return {
      q: matrix(...at('q'), inner, hidden),
      k: matrix(...at('k'), inner, hidden),
      v: matrix(...at('v'), inner, hidden),
      o: matrix(...at('o'), hidden, inner),
      norm1: norm(...at('norm1')),
      up: matrix(...at('up'), ffn, hidden),
      down: matrix(...at('down'), hidden, ffn),
      norm2: norm(...at('norm2')),
    };
  };

  const embed = table('embed', 'word_embeddings', vocab, 0, width);
  const tokenHead = ({ dense, norm: normFile, out }: (typeof TOKEN_HEADS)[EncoderFamily]): EncoderHead<T> => {
    // Where there is a matrix of the head's own, its bias is the one beside it.
    const [tied, own] = [`${out}.bias`, `${out}.decoder.bias`];
    const matrixFile = family === 'distilbert' ? `${out}.weight` : `${out}.decoder.weight`;
    const [bias, alias] = spec.tied || family === 'distilbert' ? [tied, own] : [own, tied];
    return {
      dense: matrix('head.dense', dense, hidden, hidden, true),
      norm: norm('head.norm', normFile, true),
      out: {
        weight: spec.tied ? embed : slot('head.out.weight', [vocab, hidden], 'normal', matrixFile, { head: true }),
        bias: slot('head.out.bias', [vocab], 'zero', bias, { head: true, aliases: [alias] }),
      },
    };
  };
  const classifier = ({ dense, out }: (typeof CLASSIFIERS)[EncoderFamily]): EncoderHead<T> => ({
    // BERT's pooler is a part of the model without a head.
    dense: matrix('head.dense', dense, hidden, hidden, family !== 'bert'),
    out: matrix('head.out', out, encoder.labels.length, hidden, true),
  });
  return {
    embed,
    ...(encoder.embeddingRank !== null && {
      embedUp: {
        weight: slot('embedUp.weight', [hidden, width], 'normal', 'embeddings.word_embeddings_up.weight'),
      },
    }),
    positions: table('positions', 'position_embeddings', maxPositions, encoder.firstPosition),
    ...(encoder.tokenTypes > 0 && { tokenTypes: table('tokenTypes', 'token_type_embeddings', encoder.tokenTypes) }),
    embedNorm: norm('embedNorm', 'embeddings.LayerNorm'),
    layers: Array.from({ length: spec.layers }, (_, i) => layer(i)),
    ...(encoder.task === 'masked-lm' && { head: tokenHead(TOKEN_HEADS[family]) }),
    ...(encoder.task === 'sequence-classification' && { head: classifier(CLASSIFIERS[family]) }),
  };
}

/**
 * Finds every weight of an encoder in a checkpoint, as `loadWeights` does those of a decoder; without a prefix, and with the
 * names of norms that files from TensorFlow have, too.
 *
 * @param options.dtype element type in which matrices are packed for the kernels; default as stored
 * @throws InvalidFileError naming the file and the tensor that is missing or has the wrong shape or element type.
 */
export function loadEncoderWeights(
  spec: EncoderSpec,
  checkpoint: Checkpoint,
  options: { dtype?: 'f32' | 'bf16' | 'f16' } = {},
): LoadedWeights<EncoderTensors> {
  return loadSlots(spec, checkpoint, (get) => assemble(spec, get), options);
}

/** Every weight of an encoder. */
export function encoderSlots(spec: EncoderSpec): Slot[] {
  const all: Slot[] = [];
  assemble(spec, (slot) => {
    all.push(slot);
    return slot;
  });
  return all;
}

/** Numbers that an encoder has. */
export const encoderParameters = (spec: EncoderSpec): number => planOf(encoderSlots(spec)).size;

/** The structure of an encoder's weights, each one given by `get` for its name in `planOf(encoderSlots(spec))`. */
export const encoderByName = <T>(spec: EncoderSpec, get: (name: string) => T): EncoderWeights<T> =>
  assemble(spec, ({ name }) => get(name));

/** Binds weights to a graph: read-only tensors as weights, writable ones as state. Tied weights stay tied. */
export function bindEncoder(graph: Graph, weights: EncoderTensors): EncoderNodes {
  const bind = bindTensor(graph);
  const { embed, positions, tokenTypes, layers, ...groups } = weights;
  return {
    embed: bind(embed),
    positions: bind(positions),
    ...(tokenTypes && { tokenTypes: bind(tokenTypes) }),
    layers: layers.map((layer) => mapGroup(layer, bind) as LayerWeights<Node>),
    ...(mapGroup(groups, bind) as Pick<EncoderNodes, 'embedUp' | 'embedNorm' | 'head'>),
  };
}
