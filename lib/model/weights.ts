// The weights of a decoder: where they lie in a checkpoint, as mapped views or as one flat vector that is trained.
import type { Graph, Node } from '../graph/graph.js';
import type { Checkpoint, TensorData } from '../io/safetensors.js';
import { InvalidArgumentError, InvalidFileError } from '../native/errors.js';
import type { DType, Tensor } from '../native/index.js';
import type { ModelSpec } from './spec.js';

/** A matrix `[out, in]` or a norm's scale `[features]`, and its bias. */
export interface Affine<T> {
  readonly weight: T;
  readonly bias?: T;
}

export interface LayerWeights<T> {
  readonly norm1: Affine<T>;
  readonly q: Affine<T>;
  readonly k: Affine<T>;
  readonly v: Affine<T>;
  readonly o: Affine<T>;
  readonly norm2: Affine<T>;
  /** Present when the spec is gated. */
  readonly gate?: Affine<T>;
  readonly up: Affine<T>;
  readonly down: Affine<T>;
}

/** Everything a decoder computes with, as tensors or as nodes of a graph. */
export interface DecoderWeights<T> {
  /** `[vocab, hidden]` */
  readonly embed: T;
  /** Learned positions `[maxPositions, hidden]`. */
  readonly positions?: T;
  readonly layers: readonly LayerWeights<T>[];
  readonly finalNorm: Affine<T>;
  /** `[vocab, hidden]`; the same object as `embed` when tied. */
  readonly head: T;
}

export type DecoderTensors = DecoderWeights<Tensor>;
export type DecoderNodes = DecoderWeights<Node>;

/** One weight by its logical shape, and the part of a tensor of a Hugging Face checkpoint that holds it. */
interface Slot {
  /** `layers.0.q.weight` */
  readonly name: string;
  /** `[out, in]` or `[features]` */
  readonly shape: readonly number[];
  readonly init: 'normal' | 'residual' | 'one' | 'zero';
  readonly file: {
    readonly name: string;
    readonly shape: readonly number[];
    /** Stored `[in, out]` (GPT-2's Conv1D). */
    readonly transposed: boolean;
    /** First of the tensor's outputs that belongs to this weight. */
    readonly start: number;
  };
}

type Init = Slot['init'];
type Get<T> = (slot: Slot) => T;
type Storage = Partial<Slot['file']>;

// Prefix that the names of a model with a head have, and those of the model alone lack.
const PREFIX = { llama: 'model.', gpt2: 'transformer.' } as const;

// Buffers that old checkpoints store and that hold no weights.
const BUFFERS = /(^|\.)(rotary_emb\.inv_freq|attn\.(bias|masked_bias))$/;

/** Whether a tensor of a checkpoint holds no weights. */
export const isBuffer = (name: string): boolean => BUFFERS.test(name);

/** The module that a tensor of a checkpoint belongs to; names without the prefix of a model with a head get it. */
export function moduleOf({ family }: Pick<ModelSpec, 'family'>, name: string): string {
  const module = name.replace(/\.weight$/, '');
  return module.startsWith(PREFIX[family]) ? module : PREFIX[family] + module;
}

/** Builds the structure of a decoder's weights from its slots. */
function assemble<T>(spec: ModelSpec, get: Get<T>): DecoderWeights<T> {
  const { hidden, ffn, vocab } = spec;
  const [q, kv] = [spec.heads * spec.headDim, spec.kvHeads * spec.headDim];
  const gpt2 = spec.family === 'gpt2';

  const slot = (name: string, shape: number[], init: Init, file: string, storage: Storage = {}) =>
    get({ name, shape, init, file: { name: file, shape, transposed: false, start: 0, ...storage } });
  const norm = (name: string, file: string): Affine<T> => ({
    weight: slot(`${name}.weight`, [hidden], 'one', `${file}.weight`),
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
    const weight: Storage = gpt2 ? { shape: [input, of], transposed: true, start } : {};
    return {
      weight: slot(`${name}.weight`, [out, input], init, `${file}.weight`, weight),
      ...(bias && { bias: slot(`${name}.bias`, [out], 'zero', `${file}.bias`, { shape: [of], start }) }),
    };
  };

  const layer = (i: number): LayerWeights<T> => {
    const to = `layers.${i}`;
    const { attnBias, mlpBias } = spec;
    if (gpt2) {
      const from = `h.${i}`;
      const fused = (name: string, part: number) =>
        matrix(`${to}.${name}`, `${from}.attn.c_attn`, q, hidden, attnBias, 'normal', [part * q, 3 * q]);
      return {
        norm1: norm(`${to}.norm1`, `${from}.ln_1`),
        q: fused('q', 0),
        k: fused('k', 1),
        v: fused('v', 2),
        o: matrix(`${to}.o`, `${from}.attn.c_proj`, hidden, q, attnBias, 'residual'),
        norm2: norm(`${to}.norm2`, `${from}.ln_2`),
        up: matrix(`${to}.up`, `${from}.mlp.c_fc`, ffn, hidden, mlpBias, 'normal'),
        down: matrix(`${to}.down`, `${from}.mlp.c_proj`, hidden, ffn, mlpBias, 'residual'),
      };
    }
    const from = `layers.${i}`;
    return {
      norm1: norm(`${to}.norm1`, `${from}.input_layernorm`),
      q: matrix(`${to}.q`, `${from}.self_attn.q_proj`, q, hidden, attnBias, 'normal'),
      k: matrix(`${to}.k`, `${from}.self_attn.k_proj`, kv, hidden, attnBias, 'normal'),
      v: matrix(`${to}.v`, `${from}.self_attn.v_proj`, kv, hidden, attnBias, 'normal'),
      o: matrix(`${to}.o`, `${from}.self_attn.o_proj`, hidden, q, attnBias, 'residual'),
      norm2: norm(`${to}.norm2`, `${from}.post_attention_layernorm`),
      ...(spec.gated && { gate: matrix(`${to}.gate`, `${from}.mlp.gate_proj`, ffn, hidden, mlpBias, 'normal') }),
      up: matrix(`${to}.up`, `${from}.mlp.up_proj`, ffn, hidden, mlpBias, 'normal'),
      down: matrix(`${to}.down`, `${from}.mlp.down_proj`, hidden, ffn, mlpBias, 'residual'),
    };
  };

  const embed = slot('embed', [vocab, hidden], 'normal', gpt2 ? 'wte.weight' : 'embed_tokens.weight');
  return {
    embed,
    ...(!spec.rope && { positions: slot('positions', [spec.maxPositions, hidden], 'normal', 'wpe.weight') }),
    layers: Array.from({ length: spec.layers }, (_, i) => layer(i)),
    finalNorm: norm('finalNorm', gpt2 ? 'ln_f' : 'norm'),
    head: spec.tied ? embed : slot('head', [vocab, hidden], 'normal', 'lm_head.weight'),
  };
}

function mapAffine<A, B>({ weight, bias }: Affine<A>, f: (value: A) => B): Affine<B> {
  return { weight: f(weight), ...(bias !== undefined && { bias: f(bias) }) };
}

/** The same structure with every weight replaced. `f` is called once for each object: tied weights stay tied. */
export function mapWeights<A, B>(weights: DecoderWeights<A>, f: (value: A) => B): DecoderWeights<B> {
  const { embed, positions, layers, finalNorm, head } = weights;
  const embedding = f(embed);
  return {
    embed: embedding,
    ...(positions !== undefined && { positions: f(positions) }),
    layers: layers.map((layer) => ({
      norm1: mapAffine(layer.norm1, f),
      q: mapAffine(layer.q, f),
      k: mapAffine(layer.k, f),
      v: mapAffine(layer.v, f),
      o: mapAffine(layer.o, f),
      norm2: mapAffine(layer.norm2, f),
      ...(layer.gate && { gate: mapAffine(layer.gate, f) }),
      up: mapAffine(layer.up, f),
      down: mapAffine(layer.down, f),
    })),
    finalNorm: mapAffine(finalNorm, f),
    head: head === embed ? embedding : f(head),
  };
}

/** Binds weights to a graph: read-only tensors as weights, writable ones as state. */
export function bindWeights(graph: Graph, weights: DecoderTensors): DecoderNodes {
  return mapWeights(weights, (tensor) => (tensor.writable ? graph.state(tensor) : graph.weight(tensor)));
}

/** Weights of a checkpoint. Programs that use them keep them alive after `dispose`. */
export interface LoadedWeights extends Disposable {
  readonly weights: DecoderTensors;
  /** The same by the names of `parameterPlan`. */
  readonly byName: ReadonlyMap<string, Tensor>;
  /** Element type of the matrices while computing. */
  readonly dtype: DType;
  /** Tensors of the checkpoint that are no weights of this architecture. */
  readonly unused: readonly string[];
  dispose(): void;
}

/**
 * Finds every weight of a spec in a checkpoint, with or without the prefix `model.` or `transformer.`. Nothing is copied:
 * each weight is a read-only view of the mapped file, transposed and split by strides where the file is.
 *
 * @param options.dtype element type in which matrices are packed for the kernels; default as stored
 * @throws InvalidFileError naming the file and the tensor that is missing or has the wrong shape or element type.
 */
export function loadWeights(
  spec: ModelSpec,
  checkpoint: Checkpoint,
  { dtype }: { dtype?: 'f32' | 'bf16' | 'f16' } = {},
): LoadedWeights {
  const used = new Set<string>();
  const byName = new Map<string, Tensor>();
  const prefix = PREFIX[spec.family];
  const find = (name: string) => [prefix + name, name].find((candidate) => checkpoint.has(candidate));
  const dispose = () => {
    for (const tensor of byName.values()) tensor.dispose();
  };
  try {
    const weights = assemble(spec, (slot) => {
      const name = find(slot.file.name);
      if (name === undefined) {
        const shown = slot.file.name === 'lm_head.weight' ? slot.file.name : prefix + slot.file.name;
        throw new InvalidFileError(
          `[weights] ${checkpoint.directory} has no tensor ${shown}, expected with shape [${slot.file.shape}]`,
        );
      }
      used.add(name);
      const tensor = storedView(checkpoint, name, slot);
      byName.set(slot.name, tensor);
      if (dtype !== undefined && slot.shape.length === 2) tensor.setPackAs(dtype);
      return tensor;
    });
    // A tied head may be stored all the same; it is the embedding.
    if (spec.tied) used.add('lm_head.weight');
    const unused = checkpoint.names().filter((name) => !used.has(name) && !isBuffer(name));
    return { weights, byName, dtype: dtype ?? weights.embed.dtype, unused, dispose, [Symbol.dispose]: dispose };
  } catch (error) {
    dispose();
    throw error;
  }
}

function storedView(checkpoint: Checkpoint, name: string, { shape, file }: Slot): Tensor {
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
  return file.transposed
    ? tensor.slice(file.start, [...shape], [1, file.shape[1]])
    : tensor.slice(file.start * (shape[1] ?? 1), [...shape]);
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

/** The modules of all projections, by `layers.{layer}.{projection}`. */
export function storedModules(spec: ModelSpec): Map<string, StoredModule> {
  return new Map(
    slots(spec).flatMap(({ name, shape, file }) => {
      const slot = /^(layers\.\d+\.(?:q|k|v|o|gate|up|down))\.weight$/.exec(name)?.[1];
      if (!slot) return [];
      const [outputs, inputs] = shape;
      const module = PREFIX[spec.family] + file.name.replace(/\.weight$/, '');
      const moduleOutputs = file.transposed ? file.shape[1] : file.shape[0];
      return [[slot, { module, inputs, outputs, start: file.start, moduleOutputs }]];
    }),
  );
}

/** Where each weight of a spec lies in its flat vector. */
export function parameterPlan(spec: ModelSpec): ParameterPlan {
  const all = slots(spec);
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
export function flattenWeights(spec: ModelSpec, { byName }: LoadedWeights): Float32Array {
  const plan = parameterPlan(spec);
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
    const values = flat.subarray(offset, offset + size);
    const kind = init.get(name);
    if (kind === 'one') values.fill(1);
    else if (kind !== 'zero') {
      const deviation = kind === 'residual' ? 0.02 / Math.sqrt(2 * spec.layers) : 0.02;
      for (let i = 0; i < size; i++) values[i] = deviation * normal();
    }
  }
  return flat;
}

/**
 * The reverse of loading: tensors with the names and layouts of a Hugging Face checkpoint, as f32.
 *
 * @param flat `[parameterPlan(spec).size]`
 */
export function exportWeights(spec: ModelSpec, flat: Float32Array): Record<string, TensorData> {
  const plan = parameterPlan(spec);
  if (flat.length !== plan.size) {
    throw new InvalidArgumentError(`[weights] the vector must have ${plan.size} elements, got ${flat.length}`);
  }
  const place = new Map(plan.parameters.map((parameter) => [parameter.name, parameter]));
  const tensors: Record<string, TensorData & { data: Float32Array }> = {};
  for (const { name, shape, file } of slots(spec)) {
    const { offset, size } = place.get(name)!;
    const values = flat.subarray(offset, offset + size);
    const fileName = file.name === 'lm_head.weight' ? file.name : PREFIX[spec.family] + file.name;
    tensors[fileName] ??= { dtype: 'f32', shape: file.shape, data: new Float32Array(elements(file.shape)) };
    const { data } = tensors[fileName];
    if (!file.transposed) data.set(values, file.start * (shape[1] ?? 1));
    else {
      const [out, input] = shape;
      const stride = file.shape[1];
      for (let o = 0; o < out; o++) {
        for (let i = 0; i < input; i++) data[i * stride + file.start + o] = values[o * input + i];
      }
    }
  }
  return tensors;
}
