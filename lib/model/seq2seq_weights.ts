// The weights of an encoder-decoder model, and where they lie in a checkpoint.
import type { Graph, Node } from '../graph/graph.js';
import type { Checkpoint } from '../io/safetensors.js';
import { Tensor } from '../native/index.js';
import type { Seq2SeqSpec } from './seq2seq_spec.js';
import type { ModelSpec } from './spec.js';
import {
  type Affine,
  bindTensor,
  type Get,
  type LayerWeights,
  type LoadedWeights,
  loadSlots,
  mapGroup,
  type Slot,
} from './weights.js';

/** Attention of a decoder to the features of its source. */
export interface CrossWeights<T> {
  readonly norm: Affine<T>;
  readonly q: Affine<T>;
  readonly k: Affine<T>;
  readonly v: Affine<T>;
  readonly o: Affine<T>;
}

/** A layer of a decoder that has a source. */
export interface TargetLayerWeights<T> extends LayerWeights<T> {
  readonly cross: CrossWeights<T>;
}

/** One stack of layers, and what is around it. */
export interface StackWeights<T, L = LayerWeights<T>> {
  /** `[maxPositions, hidden]` */
  readonly positions: T;
  readonly embedNorm?: Affine<T>;
  readonly layers: readonly L[];
  readonly finalNorm?: Affine<T>;
}

/** Everything an encoder-decoder model computes with. */
export interface Seq2SeqWeights<T> {
  /** Of both sides, `[vocab, hidden]`. */
  readonly embed: T;
  readonly encoder: StackWeights<T>;
  readonly decoder: StackWeights<T, TargetLayerWeights<T>>;
  /** `[vocab, hidden]`, the object that `embed` is when tied, and `[vocab]`. */
  readonly head: Affine<T>;
}

export type Seq2SeqTensors = Seq2SeqWeights<Tensor>;
export type Seq2SeqNodes = Seq2SeqWeights<Node>;

/** @param headBias whether the checkpoint has one */
function assemble<T>(spec: Seq2SeqSpec, get: Get<T>, headBias: boolean, sines: () => T): Seq2SeqWeights<T> {
  const { hidden, vocab, maxPositions, tied } = spec.decoder;
  const slot = (name: string, shape: number[], init: Slot['init'], file: string, storage: Partial<Slot['file']> = {}) =>
    get({ name, shape, init, file: { name: file, shape, transposed: false, start: 0, column: 0, ...storage } });
  const matrix = (name: string, file: string, out: number, input: number): Affine<T> => ({
    weight: slot(`${name}.weight`, [out, input], 'normal', `${file}.weight`),
    bias: slot(`${name}.bias`, [out], 'zero', `${file}.bias`),
  });
  const norm = (name: string, file: string): Affine<T> => ({
    weight: slot(`${name}.weight`, [hidden], 'one', `${file}.weight`),
    bias: slot(`${name}.bias`, [hidden], 'zero', `${file}.bias`),
  });
  const attention = (name: string, file: string) => ({
    q: matrix(`${name}.q`, `${file}.q_proj`, hidden, hidden),
    k: matrix(`${name}.k`, `${file}.k_proj`, hidden, hidden),
    v: matrix(`${name}.v`, `${file}.v_proj`, hidden, hidden),
    o: matrix(`${name}.o`, `${file}.out_proj`, hidden, hidden),
  });
  const layer = (stack: string, i: number, { ffn }: ModelSpec): LayerWeights<T> => {
    const [name, file] = [`${stack}.layers.${i}`, `${stack}.layers.${i}`];
    return {
      norm1: norm(`${name}.norm1`, `${file}.self_attn_layer_norm`),
      ...attention(name, `${file}.self_attn`),
      norm2: norm(`${name}.norm2`, `${file}.final_layer_norm`),
      up: matrix(`${name}.up`, `${file}.fc1`, ffn, hidden),
      down: matrix(`${name}.down`, `${file}.fc2`, hidden, ffn),
    };
  };
  const cross = (i: number): CrossWeights<T> => {
    const [name, file] = [`decoder.layers.${i}.cross`, `decoder.layers.${i}.encoder_attn`];
    return { norm: norm(`${name}.norm`, `${file}_layer_norm`), ...attention(name, file) };
  };
  const positions = (stack: string): T =>
    spec.positions === 'sinusoidal'
      ? sines()
      : slot(`${stack}.positions`, [maxPositions, hidden], 'normal', `${stack}.embed_positions.weight`, {
          shape: [spec.firstPosition + maxPositions, hidden],
          start: spec.firstPosition,
        });
  const stack = <L>(name: 'encoder' | 'decoder', layerOf: (i: number) => L): StackWeights<T, L> => ({
    positions: positions(name),
    ...(spec.embedNorm && { embedNorm: norm(`${name}.embedNorm`, `${name}.layernorm_embedding`) }),
    layers: Array.from({ length: spec[name].layers }, (_, i) => layerOf(i)),
    ...(spec.finalNorm && { finalNorm: norm(`${name}.finalNorm`, `${name}.layer_norm`) }),
  });
  const embed = slot('embed', [vocab, hidden], 'normal', 'shared.weight', {
    aliases: ['encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'],
  });
  return {
    embed,
    encoder: stack('encoder', (i) => layer('encoder', i, spec.encoder)),
    decoder: stack('decoder', (i) => ({ ...layer('decoder', i, spec.decoder), cross: cross(i) })),
    head: {
      weight: tied ? embed : slot('head.weight', [vocab, hidden], 'normal', 'lm_head.weight', { head: true }),
      ...(headBias && {
        bias: slot('head.bias', [vocab], 'zero', 'final_logits_bias', { head: true, shape: [1, vocab] }),
      }),
    },
  };
}

/** Tied and computed tables that checkpoints may store all the same. */
const REPEATED = /(^|\.)((encoder|decoder)\.embed_tokens|lm_head)\.weight$/;
const SINES = /(^|\.)(encoder|decoder)\.embed_positions\.weight$/;

/**
 * Finds every weight of an encoder-decoder model in a checkpoint, as `loadWeights` does those of a decoder.
 *
 * @param options.dtype element type in which matrices are packed for the kernels; default as stored
 * @throws InvalidFileError naming the file and the tensor that is missing or has the wrong shape or element type.
 */
export function loadSeq2SeqWeights(
  spec: Seq2SeqSpec,
  checkpoint: Checkpoint,
  options: { dtype?: 'f32' | 'bf16' | 'f16' } = {},
): LoadedWeights<Seq2SeqTensors> {
  const { maxPositions, hidden, tied } = spec.decoder;
  let table: Tensor | null = null;
  const sines = () => {
    table ??= Tensor.fromData('f32', [maxPositions, hidden], sinusoidalPositions(maxPositions, hidden));
    return table;
  };
  const headBias = checkpoint.has('final_logits_bias');
  const loaded = loadSlots(spec.decoder, checkpoint, (get) => assemble(spec, get, headBias, sines), options);
  const known = (name: string) =>
    (tied && REPEATED.test(name)) || (spec.positions === 'sinusoidal' && SINES.test(name));
  const dispose = () => {
    loaded.dispose();
    table?.dispose();
  };
  const unused = loaded.unused.filter((name) => !known(name));
  return { ...loaded, unused, dispose, [Symbol.dispose]: dispose };
}

/** Numbers that an encoder-decoder model has, those that are computed aside. */
export function seq2seqParameters(spec: Seq2SeqSpec): number {
  let count = 0;
  const get = ({ shape }: { shape: readonly number[] }) => {
    count += shape.reduce((product, n) => product * n, 1);
  };
  assemble<void>(spec, get, false, () => {});
  return count;
}

/**
 * Sines of positions in the first half of the features and cosines in the second, as Marian has them: feature i of either half
 * turns by `position / 10000^(2i / hidden)` (Vaswani et al., arXiv 1706.03762, section 3.5, in another order). f32 [positions, hidden].
 */
export function sinusoidalPositions(positions: number, hidden: number): Float32Array {
  const table = new Float32Array(positions * hidden);
  const sines = Math.ceil(hidden / 2);
  for (let position = 0; position < positions; position++) {
    for (let i = 0; i < hidden; i++) {
      const pair = i < sines ? i : i - sines;
      const angle = position / 10000 ** ((2 * pair) / hidden);
      table[position * hidden + i] = i < sines ? Math.sin(angle) : Math.cos(angle);
    }
  }
  return table;
}

/** Binds weights to a graph: read-only tensors as weights, writable ones as state. Tied weights stay tied. */
export function bindSeq2Seq(graph: Graph, weights: Seq2SeqTensors): Seq2SeqNodes {
  const bind = bindTensor(graph);
  const embed = bind(weights.embed);
  const stack = <L extends LayerWeights<Tensor>>({ positions, layers, ...norms }: StackWeights<Tensor, L>) => ({
    positions: bind(positions),
    layers: layers.map((layer) => mapGroup(layer, bind)),
    ...mapGroup(norms, bind),
  });
  const { weight, bias } = weights.head;
  return {
    embed,
    encoder: stack(weights.encoder) as Seq2SeqNodes['encoder'],
    decoder: stack(weights.decoder) as Seq2SeqNodes['decoder'],
    head: { weight: weight === weights.embed ? embed : bind(weight), ...(bias && { bias: bind(bias) }) },
  };
}
