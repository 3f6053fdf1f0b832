// The weights of a model: where they lie in a checkpoint, as mapped views or as one flat vector that is trained.
import type { Graph, Node } from '../graph/graph.js';
import type { Checkpoint, TensorData } from '../io/safetensors.js';
import { InvalidArgumentError, InvalidFileError } from '../native/errors.js';
import type { DType, Tensor } from '../native/index.js';
import type { ModelSpec, StreamSpec } from './spec.js';

/** A matrix `[out, in]` or a norm's scale `[features]`, and its bias. */
export interface Affine<T> {
  readonly weight: T;
  readonly bias?: T;
  /** A low-rank correction b a of the matrix, a `[r, in]` and b `[out, r]`. */
  readonly patch?: { readonly a: T; readonly b: T };
}

export interface LayerWeights<T> {
  readonly norm1: Affine<T>;
  readonly q: Affine<T>;
  /** Absent where the layer uses keys and values of another. */
  readonly k?: Affine<T>;
  readonly v?: Affine<T>;
  readonly o: Affine<T>;
  /** Of every head of queries and keys. */
  readonly qNorm?: Affine<T>;
  readonly kNorm?: Affine<T>;
  /** Of what attention adds to the residual stream. */
  readonly postNorm1?: Affine<T>;
  readonly norm2: Affine<T>;
  /** Present when the spec is gated. */
  readonly gate?: Affine<T>;
  readonly up: Affine<T>;
  readonly down: Affine<T>;
  /** Of what the feed-forward adds to the residual stream. */
  readonly postNorm2?: Affine<T>;
  /** Of a model with several residual streams (AltUp). */
  readonly streams?: LayerStreamWeights<T>;
}

/** What a layer of a model with S residual streams has more. */
export interface LayerStreamWeights<T> {
  readonly routerNorm: Affine<T>;
  /** `[S, hidden]` */
  readonly router: Affine<T>;
  /** `[S S, S]` and `[S, S]`: what streams add to each other before a layer, and take of its output. */
  readonly prediction: Affine<T>;
  readonly correction: Affine<T>;
  /** `[hidden]`; stored even where the spec's streams are not `scaled`. */
  readonly scale: Affine<T>;
  /** `[rank, hidden]`, `[hidden, rank]`: LAuReL's product. */
  readonly laurelA: Affine<T>;
  readonly laurelB: Affine<T>;
  readonly laurelNorm: Affine<T>;
  /** `[perLayerVocab, P]`: embeddings for this layer, and `[P, hidden]`: what the token's own embedding adds to them. */
  readonly embed: Affine<T>;
  readonly projection: Affine<T>;
  /** `[P, hidden]`, `[hidden, P]`: where they meet the first stream, and how they get into the others. */
  readonly inputGate: Affine<T>;
  readonly inputUp: Affine<T>;
  readonly inputNorm: Affine<T>;
}

/** What a model with S residual streams has more. */
export interface StreamWeights<T> {
  /** `[hidden, hidden]`, one for each stream but the first: from the embedding, and to the output. */
  readonly expand: readonly Affine<T>[];
  readonly join: readonly Affine<T>[];
  /** Of what embeddings add to those of a layer. */
  readonly projectionNorm: Affine<T>;
}

/** Everything a decoder computes with, as tensors or as nodes of a graph. */
export interface DecoderWeights<T> {
  /** `[vocab, hidden]` */
  readonly embed: T;
  /** Learned positions `[maxPositions, hidden]`. */
  readonly positions?: T;
  readonly layers: readonly LayerWeights<T>[];
  readonly streams?: StreamWeights<T>;
  readonly finalNorm: Affine<T>;
  /** `[vocab, hidden]`; the same object as `embed` when tied. */
  readonly head: T;
}

export type DecoderTensors = DecoderWeights<Tensor>;
export type DecoderNodes = DecoderWeights<Node>;

/** One weight by its logical shape, and the part of a tensor of a Hugging Face checkpoint that holds it. */
export interface Slot {
  /** `layers.0.q.weight` */
  readonly name: string;
  /** `[out, in]` or `[features]` */
  readonly shape: readonly number[];
  readonly init: 'normal' | 'residual' | 'one' | 'zero';
  readonly file: {
    /** Without the prefix of a model with a head. */
    readonly name: string;
    /** Other names that checkpoints have for it. */
    readonly aliases?: readonly string[];
    /** It is the head's, which has no prefix. */
    readonly head?: boolean;
    readonly shape: readonly number[];
    /** Stored `[in, out]` (GPT-2's Conv1D). */
    readonly transposed: boolean;
    /** First of the tensor's outputs that belongs to this weight. */
    readonly start: number;
    /** The same of its inputs. */
    readonly column: number;
  };
}

type Init = Slot['init'];
export type Get<T> = (slot: Slot) => T;
type Storage = Partial<Slot['file']>;

// Prefix that the names of a model with a head have, and those of the model alone lack.
const PREFIX = {
  llama: 'model.',
  gpt2: 'transformer.',
  bert: 'bert.',
  roberta: 'roberta.',
  distilbert: 'distilbert.',
  bart: 'model.',
  t5: '',
} as const;

/** A tensor's name in the checkpoint of a model with a head. */
const storedName = (
  { family }: Pick<ModelSpec, 'family'>,
  { name, head }: Pick<Slot['file'], 'name' | 'head'>,
): string => (head ? name : PREFIX[family] + name);

// Buffers that old checkpoints store and that hold no weights.
const BUFFERS = /(^|\.)(rotary_emb\.inv_freq|attn\.(bias|masked_bias)|embeddings\.position_ids)$/;

/** Whether a tensor of a checkpoint holds no weights. */
const isBuffer = (name: string): boolean => BUFFERS.test(name);

/** The module that a tensor of a checkpoint belongs to; names without the prefix of a model with a head get it. */
export function moduleOf({ family }: Pick<ModelSpec, 'family'>, name: string): string {
  const module = name.replace(/\.weight$/, '');
  return module.startsWith(PREFIX[family]) ? module : PREFIX[family] + module;
}

/** Builds the structure of a decoder's weights from its slots. */
function assemble<T>(spec: ModelSpec, get: Get<T>): DecoderWeights<T> {
  const { hidden, vocab } = spec;
  const [q, kv] = [spec.heads * spec.headDim, spec.kvHeads * spec.headDim];
  const gpt2 = spec.family === 'gpt2';

  const slot = (name: string, shape: number[], init: Init, file: string, storage: Storage = {}) =>
    get({ name, shape, init, file: { name: file, shape, transposed: false, start: 0, column: 0, ...storage } });
  const norm = (name: string, file: string, features = hidden): Affine<T> => ({
    weight: slot(`${name}.weight`, [features], spec.normOffset === 0 ? 'one' : 'zero', `${file}.weight`),
    ...(spec.norm === 'layer' && { bias: slot(`${name}.bias`, [hidden], 'zero', `${file}.bias`) }),
  });
  // `of`: outputs of the stored tensor, of which this weight has `out` from `start` on.
  const matrix = (
    name: string,
    file: string,
    out: number,
    input: number,
    bias: boolean,
    init: Init,
    part = [0, out],
  ) => {
    const [start, of] = part;
    const weight: Storage = gpt2 ? { shape: [input, of], transposed: true, start } : { shape: [of, input], start };
    return {
      weight: slot(`${name}.weight`, [out, input], init, `${file}.weight`, weight),
      ...(bias && { bias: slot(`${name}.bias`, [out], 'zero', `${file}.bias`, { shape: [of], start }) }),
    };
  };

  const layer = (i: number): LayerWeights<T> => {
    const to = `layers.${i}`;
    const { qkvBias, outBias, mlpBias } = spec;
    const { ffn } = spec.perLayer[i];
    if (gpt2) {
      const from = `h.${i}`;
      const fused = (name: string, part: number) =>
        matrix(`${to}.${name}`, `${from}.attn.c_attn`, q, hidden, qkvBias, 'normal', [part * q, 3 * q]);
      return {
        norm1: norm(`${to}.norm1`, `${from}.ln_1`),
        q: fused('q', 0),
        k: fused('k', 1),
        v: fused('v', 2),
        o: matrix(`${to}.o`, `${from}.attn.c_proj`, hidden, q, outBias, 'residual'),
        norm2: norm(`${to}.norm2`, `${from}.ln_2`),
        up: matrix(`${to}.up`, `${from}.mlp.c_fc`, ffn, hidden, mlpBias, 'normal'),
        down: matrix(`${to}.down`, `${from}.mlp.c_proj`, hidden, ffn, mlpBias, 'residual'),
      };
    }
    const from = `layers.${i}`;
    const ownKeys = spec.perLayer[i].keysOf === null;
    return {
      norm1: norm(`${to}.norm1`, `${from}.input_layernorm`),
      q: matrix(`${to}.q`, `${from}.self_attn.q_proj`, q, hidden, qkvBias, 'normal'),
      ...(ownKeys && {
        k: matrix(`${to}.k`, `${from}.self_attn.k_proj`, kv, hidden, qkvBias, 'normal'),
        v: matrix(`${to}.v`, `${from}.self_attn.v_proj`, kv, hidden, qkvBias, 'normal'),
      }),
      o: matrix(`${to}.o`, `${from}.self_attn.o_proj`, hidden, q, outBias, 'residual'),
      ...(spec.qkNorm && { qNorm: norm(`${to}.qNorm`, `${from}.self_attn.q_norm`, spec.headDim) }),
      ...(spec.qkNorm && ownKeys && { kNorm: norm(`${to}.kNorm`, `${from}.self_attn.k_norm`, spec.headDim) }),
      ...(spec.postNorms && {
        postNorm1: norm(`${to}.postNorm1`, `${from}.post_attention_layernorm`),
        postNorm2: norm(`${to}.postNorm2`, `${from}.post_feedforward_layernorm`),
      }),
      norm2: norm(`${to}.norm2`, `${from}.${spec.postNorms ? 'pre_feedforward' : 'post_attention'}_layernorm`),
      ...(spec.gated && { gate: matrix(`${to}.gate`, `${from}.mlp.gate_proj`, ffn, hidden, mlpBias, 'normal') }),
      up: matrix(`${to}.up`, `${from}.mlp.up_proj`, ffn, hidden, mlpBias, 'normal'),
      down: matrix(`${to}.down`, `${from}.mlp.down_proj`, hidden, ffn, mlpBias, 'residual'),
      ...(spec.streams && { streams: streamsOf(spec.streams, i) }),
    };
  };

  // Tables and projections of all layers' own embeddings lie side by side.
  const streamsOf = (
    { count, laurelRank, perLayerWidth: width, perLayerVocab }: StreamSpec,
    i: number,
  ): LayerStreamWeights<T> => {
    const plain = (name: string, file: string, out: number, input: number, init: Init = 'normal') =>
      matrix(`layers.${i}.streams.${name}`, `layers.${i}.${file}`, out, input, false, init);
    const scale = (name: string, file: string) => norm(`layers.${i}.streams.${name}`, `layers.${i}.${file}`);
    const all = spec.layers * width;
    const table = { shape: [perLayerVocab, all], column: i * width };
    const to = `layers.${i}.streams`;
    return {
      routerNorm: scale('routerNorm', 'altup.router_norm'),
      router: plain('router', 'altup.modality_router', count, hidden),
      prediction: plain('prediction', 'altup.prediction_coefs', count * count, count),
      correction: plain('correction', 'altup.correction_coefs', count, count),
      scale: { weight: slot(`${to}.scale.weight`, [hidden], 'one', `layers.${i}.altup.correct_output_scale`) },
      laurelA: plain('laurelA', 'laurel.linear_left', laurelRank, hidden),
      laurelB: plain('laurelB', 'laurel.linear_right', hidden, laurelRank),
      laurelNorm: scale('laurelNorm', 'laurel.post_laurel_norm'),
      embed: {
        weight: slot(`${to}.embed.weight`, [perLayerVocab, width], 'normal', 'embed_tokens_per_layer.weight', table),
      },
      projection: matrix(`${to}.projection`, 'per_layer_model_projection', width, hidden, false, 'normal', [
        i * width,
        all,
      ]),
      inputGate: plain('inputGate', 'per_layer_input_gate', width, hidden),
      inputUp: plain('inputUp', 'per_layer_projection', hidden, width),
      inputNorm: scale('inputNorm', 'post_per_layer_input_norm'),
    };
  };
  const between = (name: string, file: string): Affine<T>[] =>
    Array.from({ length: spec.streams!.count - 1 }, (_, i) =>
      matrix(`streams.${name}.${i}`, `${file}.${i}`, hidden, hidden, false, 'normal'),
    );

  const embed = slot('embed', [vocab, hidden], 'normal', gpt2 ? 'wte.weight' : 'embed_tokens.weight');
  return {
    embed,
    ...(spec.positions === 'learned' && {
      positions: slot('positions', [spec.maxPositions, hidden], 'normal', 'wpe.weight'),
    }),
    layers: Array.from({ length: spec.layers }, (_, i) => layer(i)),
    ...(spec.streams && {
      streams: {
        expand: between('expand', 'altup_projections'),
        join: between('join', 'altup_unembed_projections'),
        projectionNorm: norm('streams.projectionNorm', 'per_layer_projection_norm', spec.streams.perLayerWidth),
      },
    }),
    finalNorm: norm('finalNorm', gpt2 ? 'ln_f' : 'norm'),
    head: spec.tied ? embed : slot('head', [vocab, hidden], 'normal', 'lm_head.weight', { head: true }),
  };
}

function mapAffine<A, B>({ weight, bias }: Affine<A>, f: (value: A) => B): Affine<B> {
  return { weight: f(weight), ...(bias !== undefined && { bias: f(bias) }) };
}

/** Of groups of weights within groups. */
export function mapGroup(group: object, f: (value: never) => unknown): object {
  return Object.fromEntries(
    Object.entries(group).map(([name, value]: [string, object]) => [
      name,
      'weight' in value ? mapAffine(value as Affine<never>, f) : mapGroup(value, f),
    ]),
  );
}

/** The same structure with every weight replaced. `f` is called once for each object: tied weights stay tied. */
export function mapWeights<A, B>(weights: DecoderWeights<A>, f: (value: A) => B): DecoderWeights<B> {
  const { embed, positions, layers, streams, finalNorm, head } = weights;
  const embedding = f(embed);
  return {
    embed: embedding,
    ...(positions !== undefined && { positions: f(positions) }),
    layers: layers.map((layer) => mapGroup(layer, f) as LayerWeights<B>),
    ...(streams && {
      streams: {
        expand: streams.expand.map((affine) => mapAffine(affine, f)),
        join: streams.join.map((affine) => mapAffine(affine, f)),
        projectionNorm: mapAffine(streams.projectionNorm, f),
      },
    }),
    finalNorm: mapAffine(finalNorm, f),
    head: head === embed ? embedding : f(head),
  };
}

/** Binds weights to a graph: read-only tensors as weights, writable ones as state. */
export function bindWeights(graph: Graph, weights: DecoderTensors): DecoderNodes {
  return mapWeights(weights, bindTensor(graph));
}

export const bindTensor =
  (graph: Graph) =>
  (tensor: Tensor): Node =>
    tensor.writable ? graph.state(tensor) : graph.weight(tensor);

/** Weights of a checkpoint. Programs that use them keep them alive after `dispose`. */
export interface LoadedWeights<W = DecoderTensors> extends Disposable {
  readonly weights: W;
  /** The same by the names of `parameterPlan`. */
  readonly byName: ReadonlyMap<string, Tensor>;
  /** Element type of the matrices while computing. */
  readonly dtype: DType;
  /** Of these views; tied weights once. */
  readonly bytes: number;
  /** Tensors of the checkpoint that are no weights of this architecture. */
  readonly unused: readonly string[];
  dispose(): void;
}

/**
 * Finds every weight of a spec in a checkpoint, with or without the prefix `model.` or `transformer.`. Nothing is copied:
 * each weight is a read-only view of the mapped file, transposed and split by strides where the file is.
 *
 * @param options.dtype element type in which matrices are packed for the kernels; default as stored
 * @param options.widths units of every layer's feed-forward to load, [layers], the first ones; default all
 * @throws InvalidFileError naming the file and the tensor that is missing or has the wrong shape or element type.
 */
export function loadWeights(
  spec: ModelSpec,
  checkpoint: Checkpoint,
  { dtype, widths }: { dtype?: 'f32' | 'bf16' | 'f16'; widths?: readonly number[] } = {},
): LoadedWeights {
  const loaded = loadSlots(spec, checkpoint, (get) => assemble(spec, get), { dtype, widths });
  // A tied head may be stored all the same; it is the embedding.
  const unused = loaded.unused.filter((name) => !(spec.tied && name === 'lm_head.weight'));
  return { ...loaded, unused };
}

/** Finds the weights of any structure, as `loadWeights` does those of decoders. */
export function loadSlots<W extends { readonly embed: Tensor }>(
  spec: ModelSpec,
  checkpoint: Checkpoint,
  build: (get: Get<Tensor>) => W,
  { dtype, widths }: { dtype?: 'f32' | 'bf16' | 'f16'; widths?: readonly number[] } = {},
): LoadedWeights<W> {
  const used = new Set<string>();
  const byName = new Map<string, Tensor>();
  const dispose = () => {
    for (const tensor of byName.values()) tensor.dispose();
  };
  try {
    const weights = build((slot) => {
      const name = nameIn(checkpoint, spec, slot);
      if (name === undefined) {
        throw new InvalidFileError(
          `[weights] ${checkpoint.directory} has no tensor ${storedName(spec, slot.file)}, expected with shape [${slot.file.shape}]`,
        );
      }
      used.add(name);
      const tensor = storedView(checkpoint, name, slot, widths && keptShape(slot, widths));
      byName.set(slot.name, tensor);
      if (dtype !== undefined && slot.shape.length === 2) tensor.setPackAs(dtype);
      return tensor;
    });
    const unused = checkpoint.names().filter((name) => !used.has(name) && !isBuffer(name));
    const bytes = [...byName.values()].reduce((sum, { dtype, shape }) => sum + elements(shape) * dtypeBytes[dtype], 0);
    return { weights, byName, dtype: dtype ?? weights.embed.dtype, bytes, unused, dispose, [Symbol.dispose]: dispose };
  } catch (error) {
    dispose();
    throw error;
  }
}

/** The name that a checkpoint has for a weight, if it has it. */
export const nameIn = (
  checkpoint: Checkpoint,
  spec: Pick<ModelSpec, 'family'>,
  { file: { name, aliases = [], ...file } }: Slot,
): string | undefined =>
  [name, ...aliases]
    .flatMap((name) => [storedName(spec, { ...file, name }), name])
    .find((candidate) => checkpoint.has(candidate));

/** A weight's values in a checkpoint, as f32; null where it is not. Errors: InvalidFileError for a wrong shape or element type. */
export function storedValues(checkpoint: Checkpoint, spec: Pick<ModelSpec, 'family'>, slot: Slot): Float32Array | null {
  const name = nameIn(checkpoint, spec, slot);
  if (name === undefined) return null;
  using tensor = storedView(checkpoint, name, slot);
  return tensor.readFloat();
}

const dtypeBytes: Readonly<Record<DType, number>> = { f32: 4, bf16: 2, f16: 2, i32: 4 };

const unitsOf = /^(?:(?:en|de)coder\.)?layers\.(\d+)\.(gate|up|down)\.(weight|bias)$/;

/** The shape of a weight of which the units of a feed-forward are cut to their layer's width. */
function keptShape({ name, shape }: Slot, widths: readonly number[]): readonly number[] {
  const [, layer, projection, kind] = unitsOf.exec(name) ?? [];
  if (layer === undefined || (projection === 'down' && kind === 'bias')) return shape;
  const axis = projection === 'down' ? 1 : 0;
  return shape.map((size, i) => (i === axis ? widths[Number(layer)] : size));
}

/** @param kept shape of the prefix that is taken; default all */
function storedView(checkpoint: Checkpoint, name: string, { shape, file }: Slot, kept = shape): Tensor {
  const info = checkpoint.info(name);
  if (info.shape.join() !== file.shape.join()) {
    throw new InvalidFileError(
      `[weights] ${info.file}: tensor ${name} must have the shape [${file.shape}], got [${info.shape}]`,
    );
  }
  const tensor = checkpoint.tensor(name);
  if (tensor.dtype === 'i32') {
    throw new InvalidFileError(`[weights] ${info.file}: tensor ${name} must be F32, BF16 or F16, got ${info.dtype}`);
  }
  if (shape.length === 1) return tensor.slice(file.start, [...kept]);
  const stride = file.shape[1];
  return file.transposed
    ? tensor.slice(file.start, [...kept], [1, stride])
    : tensor.slice(file.start * stride + file.column, [...kept], [stride, 1]);
}

export interface Parameter {
  /** `layers.0.q.weight` */
  readonly name: string;
  readonly shape: readonly number[];
  /** Of the first element, in the flat vector. */
  readonly offset: number;
  readonly size: number;
  /** Whether weight decay applies: matrices yes, norms and biases no. */
  readonly decay: boolean;
}

/** Every trainable weight in one flat vector, those that decay first. */
export interface ParameterPlan {
  readonly parameters: readonly Parameter[];
  /** Elements in all. */
  readonly size: number;
  /** Elements that decay. */
  readonly decayCount: number;
  /** Ranges of the vector that the optimizer updates one by one, each with its own norm; absent: one, of all. */
  readonly groups?: readonly ParameterGroup[];
}

/** A range of the flat vector, those elements first that decay. */
export interface ParameterGroup {
  readonly offset: number;
  readonly size: number;
  readonly decayCount: number;
  /** Factor of the optimizer's learning rate. */
  readonly lrScale: number;
}

function slots(spec: ModelSpec): Slot[] {
  const all: Slot[] = [];
  assemble(spec, (slot) => {
    all.push(slot);
    return slot;
  });
  return all;
}

/** The linear module of a Hugging Face model that computes a projection, as outputs `start` to `start + outputs`. */
export interface StoredModule {
  /** `model.layers.0.self_attn.q_proj` */
  readonly module: string;
  readonly inputs: number;
  readonly outputs: number;
  readonly start: number;
  /** Outputs of the whole module. */
  readonly moduleOutputs: number;
}

/**
 * The modules of all projections, by `layers.{layer}.{projection}`.
 *
 * @param all weights of the model; default those of a decoder
 */
export function storedModules(spec: ModelSpec, all: readonly Slot[] = slots(spec)): Map<string, StoredModule> {
  return new Map(
    all.flatMap(({ name, shape, file }) => {
      const slot = /^(.*\blayers\.\d+\.(?:cross\.)?(?:q|k|v|o|gate|up|down))\.weight$/.exec(name)?.[1];
      if (!slot) return [];
      const [outputs, inputs] = shape;
      const module = PREFIX[spec.family] + file.name.replace(/\.weight$/, '');
      const moduleOutputs = file.transposed ? file.shape[1] : file.shape[0];
      return [[slot, { module, inputs, outputs, start: file.start, moduleOutputs }]];
    }),
  );
}

/** A stored tensor that has units of a feed-forward. */
export interface StoredUnits {
  /** Whose they are: `layers.0`, of an encoder-decoder model `encoder.layers.0`. */
  readonly part: string;
  readonly layer: number;
  /** Of what is stored, along which they lie. */
  readonly axis: 0 | 1;
}

/** The axis of what is stored of a weight that the units of a feed-forward lie along; null: it has none. */
export function storedUnitAxis({ name, file }: Pick<Slot, 'name' | 'file'>): 0 | 1 | null {
  const [, projection, kind] = /\.(gate|up|down)\.(weight|bias)$/.exec(name) ?? [];
  if (projection === undefined || (projection === 'down' && kind === 'bias')) return null;
  return (projection === 'down') === file.transposed || kind === 'bias' ? 0 : 1;
}

/**
 * The stored tensors that have the units of feed-forwards, by their names in files, with and without the prefix: the layer, and
 * the axis of what is stored that the units lie along.
 *
 * @param all weights of the model; default those of a decoder
 */
export function storedUnits(
  spec: ModelSpec,
  all: readonly Pick<Slot, 'name' | 'file'>[] = slots(spec),
): Map<string, StoredUnits> {
  return new Map(
    all.flatMap(({ name, file }) => {
      const found = unitsOf.exec(name);
      const axis = storedUnitAxis({ name, file });
      if (!found || axis === null) return [];
      const part = name.slice(0, name.indexOf(`.${found[2]}.`));
      const units = { part, layer: Number(found[1]), axis };
      return [file.name, PREFIX[spec.family] + file.name].map((stored) => [stored, units] as const);
    }),
  );
}

/** The layer that a decoder's stored tensor is of, and its name were the layer another; null: it is of none alone. */
export function storedLayer(
  { family }: Pick<ModelSpec, 'family'>,
  name: string,
): { layer: number; renamed: (layer: number) => string } | null {
  const layers = family === 'gpt2' ? /^((?:transformer\.)?h\.)(\d+)(\..*)$/ : /^((?:model\.)?layers\.)(\d+)(\..*)$/;
  const [, before, layer, after] = layers.exec(name) ?? [];
  return layer === undefined ? null : { layer: Number(layer), renamed: (other) => `${before}${other}${after}` };
}

/**
 * The stored tensors in which parts of all layers lie side by side, by their names in files, with and without the prefix: the
 * axis of what is stored that they lie along, and how long one is.
 */
export function storedParts(spec: ModelSpec): Map<string, { axis: 0 | 1; size: number }> {
  return new Map(
    slots(spec).flatMap(({ name, shape, file }) => {
      const found = /^layers\.0\.streams\.(embed|projection)\.weight$/.exec(name);
      if (!found) return [];
      const axis = found[1] === 'embed' ? (1 as const) : (0 as const);
      const part = { axis, size: shape[axis] };
      return [file.name, PREFIX[spec.family] + file.name].map((stored) => [stored, part] as const);
    }),
  );
}

/** Where each weight of a decoder, or each that `kept` keeps by its name, lies in its flat vector. */
export const parameterPlan = (spec: ModelSpec, kept: (name: string) => boolean = () => true): ParameterPlan =>
  planOf(slots(spec).filter(({ name }) => kept(name)));

/** Where each of some weights lies in their flat vector. */
export function planOf(all: readonly Pick<Slot, 'name' | 'shape'>[]): ParameterPlan {
  const ordered = [...all.filter((slot) => slot.shape.length > 1), ...all.filter((slot) => slot.shape.length === 1)];
  let size = 0;
  let decayCount = 0;
  const parameters = ordered.map(({ name, shape }): Parameter => {
    const parameter = { name, shape, offset: size, size: elements(shape), decay: shape.length > 1 };
    size += parameter.size;
    if (parameter.decay) decayCount = size;
    return parameter;
  });
  return { parameters, size, decayCount };
}

const elements = (shape: readonly number[]) => shape.reduce((product, n) => product * n, 1);

/** The structure of a decoder's weights, each one given by `get` for its name and shape in `parameterPlan`. */
export function weightsByName<T>(
  spec: ModelSpec,
  get: (name: string, shape: readonly number[]) => T,
): DecoderWeights<T> {
  return assemble(spec, ({ name, shape }) => get(name, shape));
}

/** Copies weights into a flat vector `[parameterPlan(spec).size]`, as f32. */
export const flattenWeights = (spec: ModelSpec, { byName }: LoadedWeights): Float32Array =>
  flattened(parameterPlan(spec), byName);

/** The values of a plan's weights as one vector `[plan.size]`, as f32. */
export function flattened(plan: ParameterPlan, byName: ReadonlyMap<string, Tensor>): Float32Array {
  const flat = new Float32Array(plan.size);
  for (const { name, offset } of plan.parameters) flat.set(byName.get(name)!.readFloat(), offset);
  return flat;
}

/**
 * Random weights for training from scratch, as GPT-2 was initialised: matrices normal with deviation 0.02, those that
 * write to the residual stream `0.02 / sqrt(2 layers)`, norms 1, biases 0.
 *
 * @param normal draws from the normal distribution with mean 0 and deviation 1
 * @returns a flat vector `[parameterPlan(spec).size]`
 */
export function initialWeights(spec: ModelSpec, normal: () => number): Float32Array {
  const plan = parameterPlan(spec);
  const flat = new Float32Array(plan.size);
  const init = new Map(slots(spec).map((slot) => [slot.name, slot.init]));
  for (const { name, offset, size } of plan.parameters) {
    initialise(flat.subarray(offset, offset + size), init.get(name)!, spec.layers, normal);
  }
  return flat;
}

/** Fills zeros with a weight's initial values, as `initialWeights` says. */
export function initialise(values: Float32Array, kind: Init, layers: number, normal: () => number): void {
  if (kind === 'one') values.fill(1);
  else if (kind !== 'zero') {
    const deviation = kind === 'residual' ? 0.02 / Math.sqrt(2 * layers) : 0.02;
    for (let i = 0; i < values.length; i++) values[i] = deviation * normal();
  }
}

/**
 * The reverse of loading: tensors with the names and layouts of a Hugging Face checkpoint, as f32.
 *
 * @param flat `[parameterPlan(spec).size]`
 */
export const exportWeights = (spec: ModelSpec, flat: Float32Array): Record<string, TensorData> =>
  exportSlots(spec, slots(spec), flat);

/** The same of the weights of any structure, `flat` being `[planOf(all).size]`. */
export function exportSlots(
  spec: Pick<ModelSpec, 'family'>,
  all: readonly Slot[],
  flat: Float32Array,
): Record<string, TensorData> {
  const plan = planOf(all);
  if (flat.length !== plan.size) {
    throw new InvalidArgumentError(`[weights] the vector must have ${plan.size} elements, got ${flat.length}`);
  }
  const place = new Map(plan.parameters.map((parameter) => [parameter.name, parameter]));
  const tensors: Record<string, TensorData & { data: Float32Array }> = {};
  for (const { name, shape, file } of all) {
    const { offset, size } = place.get(name)!;
    const values = flat.subarray(offset, offset + size);
    const fileName = storedName(spec, file);
    tensors[fileName] ??= { dtype: 'f32', shape: file.shape, data: new Float32Array(elements(file.shape)) };
    const { data } = tensors[fileName];
    const [out, input = 1] = shape;
    const stride = file.shape[1] ?? 1;
    if (file.transposed) {
      for (let o = 0; o < out; o++) {
        for (let i = 0; i < input; i++) data[i * stride + file.start + o] = values[o * input + i];
      }
    } else {
      for (let o = 0; o < out; o++) {
        data.set(values.subarray(o * input, (o + 1) * input), (file.start + o) * stride + file.column);
      }
    }
  }
  return tensors;
}
