// The weights of an encoder-decoder model, and where they lie in a checkpoint.
import type { Graph, Node } from '../graph/graph.js';
import type { Checkpoint } from '../io/safetensors.js';
import { Tensor } from '../native/index.js';
import { type Assembly, isModule, type Modules, partId, type Stack } from './parts.js';
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
  planOf,
  type Slot,
  type StoredModule,
  storedModules,
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
  readonly positions?: T;
  /** Of relative positions, f32 `[heads, 2 m + 1]`: added to scores of attention by distance, made of the stored table. */
  readonly bias?: T;
  readonly embedNorm?: Affine<T>;
  readonly layers: readonly L[];
  /** What each of the layers is: one of the model's, or a module. Default their numbers. */
  readonly parts?: readonly string[];
  readonly finalNorm?: Affine<T>;
}

/** The name of a layer of a stack. */
export const partOf = ({ parts }: Pick<StackWeights<unknown, unknown>, 'parts'>, i: number): string =>
  parts?.[i] ?? String(i);

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

/** What is not stored as it is used. */
interface Made<T> {
  /** The head has a bias, and a matrix of its own. */
  readonly headBias: boolean;
  readonly ownHead: boolean;
  /** Table of sines. */
  sines(): T;
  /** The table `[buckets, heads]` by distance; `both`: keys may come after their query. */
  byDistance(table: T, both: boolean): T;
}

/** One weight by its name, its shape, and what is particular of the tensor that holds it. */
const getter =
  <T>(get: Get<T>) =>
  (name: string, shape: number[], init: Slot['init'], file: string, storage: Partial<Slot['file']> = {}): T =>
    get({ name, shape, init, file: { name: file, shape, transposed: false, start: 0, column: 0, ...storage } });

/** Norms and layers of a stack, by the names of their weights and of the tensors that hold them. */
function layersOf<T>(spec: Seq2SeqSpec, get: Get<T>) {
  const { hidden, family, gated } = spec.decoder;
  const t5 = family === 't5';
  const slot = getter(get);
  const matrix = (name: string, file: string, out: number, input: number): Affine<T> => ({
    weight: slot(`${name}.weight`, [out, input], 'normal', `${file}.weight`),
    ...(!t5 && { bias: slot(`${name}.bias`, [out], 'zero', `${file}.bias`) }),
  });
  const norm = (name: string, file: string): Affine<T> => ({
    weight: slot(`${name}.weight`, [hidden], 'one', `${file}.weight`),
    ...(!t5 && { bias: slot(`${name}.bias`, [hidden], 'zero', `${file}.bias`) }),
  });
  const attention = (name: string, file: string, { heads, headDim }: ModelSpec) => {
    const inner = heads * headDim;
    const names = t5 ? ['q', 'k', 'v', 'o'] : ['q_proj', 'k_proj', 'v_proj', 'out_proj'];
    return {
      q: matrix(`${name}.q`, `${file}.${names[0]}`, inner, hidden),
      k: matrix(`${name}.k`, `${file}.${names[1]}`, inner, hidden),
      v: matrix(`${name}.v`, `${file}.${names[2]}`, inner, hidden),
      o: matrix(`${name}.o`, `${file}.${names[3]}`, hidden, inner),
    };
  };
  const layer = (stack: Stack, name: string, file: string): LayerWeights<T> => {
    const of = spec[stack];
    const { ffn } = of;
    if (t5) {
      const at = (part: number) => `${file}.layer.${part}`;
      const last = at(stack === 'decoder' ? 2 : 1);
      const wide = (name: string, file: string) => matrix(name, `${last}.DenseReluDense.${file}`, ffn, hidden);
      return {
        norm1: norm(`${name}.norm1`, `${at(0)}.layer_norm`),
        ...attention(name, `${at(0)}.SelfAttention`, of),
        norm2: norm(`${name}.norm2`, `${last}.layer_norm`),
        ...(gated && { gate: wide(`${name}.gate`, 'wi_0') }),
        up: wide(`${name}.up`, gated ? 'wi_1' : 'wi'),
        down: matrix(`${name}.down`, `${last}.DenseReluDense.wo`, hidden, ffn),
      };
    }
    return {
      norm1: norm(`${name}.norm1`, `${file}.self_attn_layer_norm`),
      ...attention(name, `${file}.self_attn`, of),
      norm2: norm(`${name}.norm2`, `${file}.final_layer_norm`),
      up: matrix(`${name}.up`, `${file}.fc1`, ffn, hidden),
      down: matrix(`${name}.down`, `${file}.fc2`, hidden, ffn),
    };
  };
  const cross = (name: string, file: string): CrossWeights<T> => {
    const attn = t5 ? `${file}.layer.1.EncDecAttention` : `${file}.encoder_attn`;
    return {
      norm: norm(`${name}.norm`, t5 ? `${file}.layer.1.layer_norm` : `${attn}_layer_norm`),
      ...attention(name, attn, spec.decoder),
    };
  };
  return {
    norm,
    encoder: (name: string, file: string): LayerWeights<T> => layer('encoder', name, file),
    decoder: (name: string, file: string): TargetLayerWeights<T> => ({
      ...layer('decoder', name, file),
      cross: cross(`${name}.cross`, file),
    }),
  };
}

/** What the names of a layer's tensors begin with. */
export const storedLayer = ({ decoder: { family } }: Seq2SeqSpec, stack: Stack, layer: number): string =>
  `${stack}.${family === 't5' ? 'block' : 'layers'}.${layer}`;

function assemble<T>(spec: Seq2SeqSpec, get: Get<T>, made: Made<T>): Seq2SeqWeights<T> {
  const { hidden, vocab, maxPositions, heads } = spec.decoder;
  const t5 = spec.decoder.family === 't5';
  const slot = getter(get);
  const { norm, ...layerOf } = layersOf(spec, get);
  const positions = (stack: Stack): Pick<StackWeights<T>, 'positions' | 'bias'> => {
    if (spec.positions === 'sinusoidal') return { positions: made.sines() };
    if (spec.positions === 'learned') {
      const file = `${stack}.embed_positions.weight`;
      const storage = { shape: [spec.firstPosition + maxPositions, hidden], start: spec.firstPosition };
      return { positions: slot(`${stack}.positions`, [maxPositions, hidden], 'normal', file, storage) };
    }
    const file = `${stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight`;
    const table = slot(`${stack}.relative`, [spec.distances.buckets, heads], 'normal', file);
    return { bias: made.byDistance(table, stack === 'encoder') };
  };
  const stack = <L>(name: Stack, layer: (name: string, file: string) => L): StackWeights<T, L> => ({
    ...positions(name),
    ...(spec.embedNorm && { embedNorm: norm(`${name}.embedNorm`, `${name}.layernorm_embedding`) }),
    layers: Array.from({ length: spec[name].layers }, (_, i) =>
      layer(`${name}.layers.${i}`, storedLayer(spec, name, i)),
    ),
    ...(spec.finalNorm && {
      finalNorm: norm(`${name}.finalNorm`, `${name}.${t5 ? 'final_layer_norm' : 'layer_norm'}`),
    }),
  });
  const embed = slot('embed', [vocab, hidden], 'normal', 'shared.weight', {
    aliases: ['encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'],
  });
  return {
    embed,
    encoder: stack('encoder', layerOf.encoder),
    decoder: stack('decoder', layerOf.decoder),
    head: {
      weight: made.ownHead ? slot('head.weight', [vocab, hidden], 'normal', 'lm_head.weight', { head: true }) : embed,
      ...(made.headBias && {
        bias: slot('head.bias', [vocab], 'zero', 'final_logits_bias', { head: true, shape: [1, vocab] }),
      }),
    },
  };
}

/** The weights of modules by the names of their spans. */
export interface ModuleWeights<T> {
  readonly encoder: ReadonlyMap<string, LayerWeights<T>>;
  readonly decoder: ReadonlyMap<string, TargetLayerWeights<T>>;
}

/** The structure of the weights of modules, each one given by `get` for its slot in `seq2seqModuleSlots`. */
export function moduleWeights<T>(spec: Seq2SeqSpec, modules: Modules, get: Get<T>): ModuleWeights<T> {
  const layer = layersOf(spec, get);
  const stack = <L>(name: Stack, layerOf: (name: string, file: string) => L): ReadonlyMap<string, L> =>
    new Map(
      modules[name].map((span) => {
        const id = partId(span);
        return [id, layerOf(`${name}.modules.${id}`, storedLayer(spec, name, span.last))];
      }),
    );
  return { encoder: stack('encoder', layer.encoder), decoder: stack('decoder', layer.decoder) };
}

/** The same model with these parts instead of all layers. */
export function assembled<T>(
  weights: Seq2SeqWeights<T>,
  modules: ModuleWeights<T>,
  assembly: Assembly,
): Seq2SeqWeights<T> {
  const stack = <L>(of: StackWeights<T, L>, own: ReadonlyMap<string, L>, parts: readonly string[]) => ({
    ...of,
    ...{ parts, layers: parts.map((part) => own.get(part) ?? of.layers[Number(part)]) },
  });
  return {
    ...weights,
    encoder: stack(weights.encoder, modules.encoder, assembly.encoder),
    decoder: stack(weights.decoder, modules.decoder, assembly.decoder),
  };
}

/**
 * The same with corrections of the model's own layers among those that run.
 *
 * @param patch of a matrix by its name, `decoder.layers.3.cross.q`; null: it has none
 */
export function corrected<T>(
  weights: Seq2SeqWeights<T>,
  patch: (name: string) => Affine<T>['patch'] | null,
): Seq2SeqWeights<T> {
  const group = <G extends object>(name: string, of: G): G =>
    Object.fromEntries(
      Object.entries(of).map(([key, value]: [string, object]) => {
        const own = `${name}.${key}`;
        if (!('weight' in value)) return [key, group(own, value)];
        const found = patch(own);
        return [key, found ? { ...value, patch: found } : value];
      }),
    ) as G;
  const stack = <L extends object>(name: Stack, of: StackWeights<T, L>) => ({
    ...of,
    layers: of.layers.map((layer, i) => {
      const part = partOf(of, i);
      return isModule(part) ? layer : group(`${name}.layers.${part}`, layer);
    }),
  });
  return { ...weights, encoder: stack('encoder', weights.encoder), decoder: stack('decoder', weights.decoder) };
}

/**
 * Every weight of modules, named as a layer's are with `decoder.modules.2-3` for `decoder.layers.3`. `file` is where a checkpoint
 * has the weights of the span's last layer.
 */
export function seq2seqModuleSlots(spec: Seq2SeqSpec, modules: Modules): Slot[] {
  const all: Slot[] = [];
  moduleWeights(spec, modules, (slot) => {
    all.push(slot);
    return slot;
  });
  return all;
}

/** Numbers that one layer of a stack has, or a module. */
export const layerParameters = (spec: Seq2SeqSpec, stack: Stack): number =>
  planOf(seq2seqModuleSlots(spec, { encoder: [], decoder: [], [stack]: [{ first: 0, last: 0 }] })).size;

/** Tied and computed tables that checkpoints may store all the same. */
const REPEATED = /(^|\.)((encoder|decoder)\.embed_tokens|lm_head)\.weight$/;
const UNREAD = /EncDecAttention\.relative_attention_bias\.weight$/;
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
  const { maxPositions, hidden, family } = spec.decoder;
  const tables: Tensor[] = [];
  const table = (shape: number[], data: Float32Array): Tensor => {
    tables.push(Tensor.fromData('f32', shape, data));
    return tables.at(-1)!;
  };
  // A head of its own may be stored whatever the configuration says of T5; that of others is the embedding's copy.
  const ownHead = family === 't5' && checkpoint.has('lm_head.weight');
  const made: Made<Tensor> = {
    headBias: checkpoint.has('final_logits_bias'),
    ownHead,
    sines: () => tables[0] ?? table([maxPositions, hidden], sinusoidalPositions(maxPositions, hidden)),
    byDistance: (stored, both) =>
      table([stored.shape[1], 2 * spec.distances.most + 1], tableByDistance(spec, stored.readFloat(), both)),
  };
  const dispose = () => {
    for (const made of tables) made.dispose();
  };
  try {
    const loaded = loadSlots(spec.decoder, checkpoint, (get) => assemble(spec, get, made), options);
    const known = (name: string) =>
      (!ownHead && REPEATED.test(name)) || UNREAD.test(name) || (spec.positions === 'sinusoidal' && SINES.test(name));
    const disposeAll = () => {
      loaded.dispose();
      dispose();
    };
    const unused = loaded.unused.filter((name) => !known(name));
    return { ...loaded, unused, dispose: disposeAll, [Symbol.dispose]: disposeAll };
  } catch (error) {
    dispose();
    throw error;
  }
}

/**
 * The kind of a distance from a query to a key: half of the kinds are single distances, the others grow as powers up to `most`, and all
 * behind are of the last one. `both`: half of all are for keys that come after. In f32, as transformers computes it.
 */
export function distanceBucket(distance: number, { buckets, most }: Seq2SeqSpec['distances'], both: boolean): number {
  const count = both ? buckets / 2 : buckets;
  const begin = both && distance > 0 ? count : 0;
  const far = both ? Math.abs(distance) : Math.max(0, -distance);
  const exact = Math.floor(count / 2);
  if (far < exact) return begin + far;
  const { fround } = Math;
  const power = fround(fround(Math.log(fround(far / exact))) / fround(Math.log(most / exact)));
  return begin + Math.min(count - 1, exact + Math.trunc(fround(power * (count - exact))));
}

/** The stored values [buckets, heads] of distances spread over every distance, f32 `[heads, 2 most + 1]`. */
function tableByDistance({ distances, decoder }: Seq2SeqSpec, values: Float32Array, both: boolean): Float32Array {
  const [heads, columns] = [decoder.heads, 2 * distances.most + 1];
  return Float32Array.from({ length: heads * columns }, (_, i) => {
    const distance = (i % columns) - distances.most;
    return values[distanceBucket(distance, distances, both) * heads + Math.floor(i / columns)];
  });
}

/** What is stored of an encoder-decoder model but the bias of its head, in order. `ownHead`: its matrix is not the embedding. */
export function seq2seqSlots(spec: Seq2SeqSpec, ownHead: boolean): Slot[] {
  const all: Slot[] = [];
  assemble<void>(spec, (slot) => void all.push(slot), { headBias: false, ownHead, sines() {}, byDistance() {} });
  return all;
}

/** The modules of all projections of both stacks, by `encoder.layers.{layer}.{projection}`, of attention to the source `.cross.` before it. */
export const seq2seqModules = (spec: Seq2SeqSpec): Map<string, StoredModule> =>
  storedModules(spec.decoder, seq2seqSlots(spec, false));

/**
 * The structure in a graph of weights that `node` gives by name. Tables that are made of others are constants of the graph.
 *
 * @param relative stored values of `encoder.relative` or `decoder.relative`, [buckets, heads]
 */
export function seq2seqByName(
  graph: Graph,
  spec: Seq2SeqSpec,
  ownHead: boolean,
  node: (name: string) => Node,
  relative: (name: string) => Float32Array,
): Seq2SeqNodes {
  const { hidden, maxPositions, heads } = spec.decoder;
  const constant = (values: Float32Array, shape: number[]) => graph.constant([...values], shape);
  return assemble<Node>(
    spec,
    ({ name }) => (name.endsWith('.relative') ? constant(relative(name), [spec.distances.buckets, heads]) : node(name)),
    {
      headBias: false,
      ownHead,
      sines: () => constant(sinusoidalPositions(maxPositions, hidden), [maxPositions, hidden]),
      byDistance(_, both) {
        const values = tableByDistance(spec, relative(`${both ? 'encoder' : 'decoder'}.relative`), both);
        return constant(values, [heads, 2 * spec.distances.most + 1]);
      },
    },
  );
}

/** Numbers that an encoder-decoder model has, those that are computed aside. `ownHead`: the head's matrix is not the embedding. */
export function seq2seqParameters(spec: Seq2SeqSpec, ownHead = false): number {
  let count = 0;
  const get = ({ shape }: { shape: readonly number[] }) => {
    count += shape.reduce((product, n) => product * n, 1);
  };
  assemble<void>(spec, get, { headBias: false, ownHead, sines() {}, byDistance() {} });
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
  const stack = <L extends LayerWeights<Tensor>>({
    positions,
    bias,
    layers,
    parts,
    ...norms
  }: StackWeights<Tensor, L>) => ({
    ...(positions && { positions: bind(positions) }),
    ...(bias && { bias: bind(bias) }),
    layers: layers.map((layer) => mapGroup(layer, bind)),
    ...(parts && { parts }),
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
