// LoRA: low-rank corrections of a model's projections, as parameters, as nodes of a graph, and as modules of an adapter.
import type { Graph, Node } from '../graph/graph.js';
import { type Dim, embedding, segmentBroadcast } from '../graph/index.js';
import type { LoraMatrices } from '../io/peft.js';
import type { TensorPlan } from '../io/slices.js';
import {
  type LowRank,
  type Projection,
  placeOf,
  projections,
  type Selector,
  type UnitPart,
  unitAxis,
} from '../model/select.js';
import type { Seq2SeqSpec } from '../model/seq2seq_spec.js';
import { seq2seqModules } from '../model/seq2seq_weights.js';
import type { ModelSpec } from '../model/spec.js';
import { moduleOf, type StoredModule, storedModules } from '../model/weights.js';
import { InvalidDataError } from '../native/errors.js';
import { Tensor } from '../native/index.js';
import { type ExpertAxis, expertAxisOf } from './axes.js';
import type { ElasticPolicy } from './policy.js';

/** Corrections by `layers.{layer}.{projection}`, of encoder-decoder models by the names of `seq2seqModules`. */
export type Lora = ReadonlyMap<string, LoraMatrices>;

export const loraId = (layer: number, projection: Projection): string => `layers.${layer}.${projection}`;

/** A trainable matrix of a correction, or the part of it that belongs to one part of the projection's units. */
export interface LoraParameter {
  /** `layers.0.q.lora_A`, `layers.0.up.lora_B.3` */
  name: string;
  id: string;
  matrix: 'a' | 'b';
  shape: readonly [number, number];
  part: UnitPart | null;
}

type LoraTargets = Pick<NonNullable<ElasticPolicy['lora']>, 'rank' | 'targets'>;

/** How many parts a projection is computed in while training; keys and values are cut by their own heads. */
function partsOf(
  policy: Pick<ElasticPolicy, ExpertAxis>,
  { kvHeads }: ModelSpec,
  layer: number,
  projection: Projection,
): number {
  const experts = policy[expertAxisOf(placeOf(projection))];
  if (!experts?.layers.includes(layer)) return 1;
  return projection === 'k' || projection === 'v' ? kvHeads : experts.count;
}

const parameterName = (id: string, matrix: 'a' | 'b', part?: UnitPart | null): string =>
  `${id}.lora_${matrix.toUpperCase()}${part ? `.${part.index}` : ''}`;

/** The trainable matrices of a policy's corrections, in the order of execution. */
export function loraParameters(policy: Pick<ElasticPolicy, ExpertAxis | 'lora'>, spec: ModelSpec): LoraParameter[] {
  const { lora } = policy;
  if (!lora) return [];
  const modules = storedModules(spec);
  return lora.layers.flatMap((layer) =>
    lora.targets.flatMap((projection) => {
      const id = loraId(layer, projection);
      const module = modules.get(id);
      // A layer that uses the keys and values of another has no products of its own for them.
      if (!module) return [];
      const { inputs, outputs } = module;
      const count = partsOf(policy, spec, layer, projection);
      const cut = unitAxis(projection) === 0 ? 'b' : 'a';
      return (['a', 'b'] as const).flatMap((matrix): LoraParameter[] => {
        const parts = matrix === cut && count > 1 ? count : 1;
        return Array.from({ length: parts }, (_, index) => {
          const part = parts > 1 ? { index, count } : null;
          const shape =
            matrix === 'a' ? ([lora.rank, inputs / parts] as const) : ([outputs / parts, lora.rank] as const);
          return { name: parameterName(id, matrix, part), id, matrix, shape, part };
        });
      });
    }),
  );
}

/** The same of an encoder-decoder model: of the layers of both its stacks. */
export function seq2seqLoraParameters({ rank, targets }: LoraTargets, spec: Seq2SeqSpec): LoraParameter[] {
  const corrected = [...seq2seqModules(spec)].filter(([id]) => targets.includes(id.split('.').at(-1) as Projection));
  return corrected.flatMap(([id, { inputs, outputs }]): LoraParameter[] => [
    { name: parameterName(id, 'a'), id, matrix: 'a', shape: [rank, inputs], part: null },
    { name: parameterName(id, 'b'), id, matrix: 'b', shape: [outputs, rank], part: null },
  ]);
}

/** The correction of a matrix of an encoder-decoder model, `tensors` by the names of parameters; null: it has none. */
export function trainableCorrection<T>(
  { targets }: LoraTargets,
  tensors: (name: string) => T,
): (id: string) => { a: T; b: T } | null {
  return (id) =>
    targets.includes(id.split('.').at(-1) as Projection)
      ? { a: tensors(parameterName(id, 'a')), b: tensors(parameterName(id, 'b')) }
      : null;
}

/** The corrections that parameters hold, whole. */
export function loraOfParameters(
  parameters: readonly LoraParameter[],
  rank: number,
  values: (name: string) => Float32Array,
): Lora {
  const sizes = new Map<string, number>();
  for (const { id, matrix, shape, part } of parameters) {
    if ((part?.index ?? 0) === 0) sizes.set(`${id} ${matrix}`, shape[0] * shape[1] * (part?.count ?? 1));
  }
  const all = new Map<string, LoraMatrices>();
  for (const parameter of parameters) {
    const { id, name } = parameter;
    const of = (matrix: string) => new Float32Array(sizes.get(`${id} ${matrix}`)!);
    const whole = all.get(id) ?? { rank, a: of('a'), b: of('b') };
    all.set(id, whole);
    eachElement(parameter, whole, (matrix, at, i) => {
      matrix[at] = values(name)[i];
    });
  }
  return all;
}

/** The value of one parameter in whole corrections; null when they have none for its projection. */
export function loraParameterValue(parameter: LoraParameter, lora: Lora): Float32Array | null {
  const whole = lora.get(parameter.id);
  if (!whole) return null;
  const value = new Float32Array(parameter.shape[0] * parameter.shape[1]);
  eachElement(parameter, whole, (matrix, at, i) => {
    value[i] = matrix[at];
  });
  return value;
}

// Where element i of a parameter lies in its whole matrix: parts of b are rows, parts of a columns.
function eachElement(
  { matrix, shape: [rows, columns], part }: LoraParameter,
  whole: LoraMatrices,
  use: (matrix: Float32Array, at: number, i: number) => void,
): void {
  const { index, count } = part ?? { index: 0, count: 1 };
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const at =
        matrix === 'b' ? (index * rows + row) * columns + column : row * columns * count + index * columns + column;
      use(whole[matrix], at, row * columns + column);
    }
  }
}

/** A new correction, which changes nothing: a uniform in plus or minus 1 / sqrt(inputs), b zero. */
export function initialLora(parameter: LoraParameter, inputs: number, uniform: () => number): Float32Array {
  const value = new Float32Array(parameter.shape[0] * parameter.shape[1]);
  if (parameter.matrix === 'a')
    for (let i = 0; i < value.length; i++) value[i] = (2 * uniform() - 1) / Math.sqrt(inputs);
  return value;
}

/** Inputs of the projection that a parameter corrects. */
export const loraInputs = ({ shape, part }: LoraParameter): number => shape[1] * (part?.count ?? 1);

export type Patch = NonNullable<Selector['patch']>;

/** A patch of trainable parameters, `tensors` by their names, each cut as `loraParameters` cuts it. */
export function trainablePatch(graph: Graph, tensors: (name: string) => Tensor, policy: ElasticPolicy): Patch {
  const node = (name: string) => graph.state(tensors(name), name);
  return (layer, projection, part): LowRank | null => {
    const { lora } = policy;
    if (!lora?.layers.includes(layer) || !lora.targets.includes(projection)) return null;
    const id = loraId(layer, projection);
    const cut = unitAxis(projection) === 0 ? 'b' : 'a';
    const [a, b] = (['a', 'b'] as const).map((matrix) => node(parameterName(id, matrix, matrix === cut ? part : null)));
    return { a, b };
  };
}

/** Corrections as read-only tensors. */
export class LoraTensors implements Disposable {
  readonly #byId = new Map<string, { a: Tensor; b: Tensor }>();

  constructor(lora: Lora) {
    for (const [id, { rank, a, b }] of lora) {
      this.#byId.set(id, {
        a: Tensor.fromData('f32', [rank, a.length / rank], a),
        b: Tensor.fromData('f32', [b.length / rank, rank], b),
      });
    }
  }

  /** The correction of a matrix by its id, null where there is none. */
  whole(graph: Graph): (id: string) => { a: Node; b: Node } | null {
    return (id) => {
      const found = this.#byId.get(id);
      return found ? { a: graph.weight(found.a), b: graph.weight(found.b) } : null;
    };
  }

  patch(graph: Graph): Patch {
    return (layer, projection, part): LowRank | null => {
      const found = this.#byId.get(loraId(layer, projection));
      if (!found) return null;
      const axis = unitAxis(projection);
      const piece = (tensor: Tensor, cut: boolean) =>
        part && cut ? tensor.part(axis, part.index, part.count) : tensor;
      return { a: graph.weight(piece(found.a, axis === 1)), b: graph.weight(piece(found.b, axis === 0)) };
    };
  }

  dispose(): void {
    for (const { a, b } of this.#byId.values()) {
      a.dispose();
      b.dispose();
    }
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}

/**
 * Adapters of which each sequence has one or none, in one run. The ranks of all lie side by side in the matrices of a
 * projection, and a mask keeps those of the sequence's own: what the others would add is a product with zeros, so a sequence
 * gets the bits that it gets beside others with its adapter, or alone.
 */
export class AdapterTensors implements Disposable {
  readonly names: readonly string[];
  readonly #stacked: LoraTensors;
  /** By projection, the rank that each adapter has there; 0: none. */
  readonly #ranks = new Map<string, readonly number[]>();

  constructor(adapters: ReadonlyMap<string, Lora>) {
    this.names = [...adapters.keys()];
    const all = [...adapters.values()];
    const stacked = new Map<string, LoraMatrices>();
    for (const id of new Set(all.flatMap((lora) => [...lora.keys()]))) {
      this.#ranks.set(
        id,
        all.map((lora) => lora.get(id)?.rank ?? 0),
      );
      stacked.set(
        id,
        all
          .flatMap((lora) => lora.get(id) ?? [])
          .reduce((before, own) => beside(before, own, { start: 0, outputs: own.b.length / own.rank }), nothing),
      );
    }
    this.#stacked = new LoraTensors(stacked);
  }

  /** What all of them together are to a layer. */
  ofLayer(layer: number): NonNullable<ElasticPolicy['lora']>[] {
    return projections.flatMap((projection) => {
      const ranks = this.#ranks.get(loraId(layer, projection));
      return ranks ? [{ rank: ranks.reduce((a, b) => a + b), targets: [projection], layers: [layer] }] : [];
    });
  }

  /** @param chosen of each sequence, i32 [S]: 0 for none, else one more than its adapter's place among the names */
  patch(graph: Graph, chosen: Node, offsets: Node, rows: Dim | number): Patch {
    const stacked = this.#stacked.patch(graph);
    const masks = new Map<string, Node>();
    const maskOf = (ranks: readonly number[]): Node => {
      const known = masks.get(ranks.join());
      if (known) return known;
      const owners = ranks.flatMap((rank, index) => new Array<number>(rank).fill(index + 1));
      const table = [0, ...ranks.map((_, index) => index + 1)].flatMap((own) =>
        owners.map((owner) => +(owner === own)),
      );
      const ofSequences = embedding(graph.constant(table, [ranks.length + 1, owners.length]), chosen);
      const mask = segmentBroadcast(ofSequences, offsets, rows);
      masks.set(ranks.join(), mask);
      return mask;
    };
    return (layer, projection, part): LowRank | null => {
      const matrices = stacked(layer, projection, part);
      return matrices && { ...matrices, mask: maskOf(this.#ranks.get(loraId(layer, projection))!) };
    };
  }

  dispose(): void {
    this.#stacked.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}

/** The selector with corrections; null: none. */
export function patched<S extends Selector>(selector: S, patch: Patch | null): S {
  return patch ? { ...selector, patch } : selector;
}

/**
 * Corrections as modules of a Hugging Face model. Where one module computes several projections (GPT-2's c_attn) their
 * ranks add up: a stacked, b block-diagonal.
 *
 * @param all projections of the model; default those of a decoder
 */
export function loraModules(
  spec: ModelSpec,
  lora: Lora,
  all: ReadonlyMap<string, StoredModule> = storedModules(spec),
): Map<string, LoraMatrices> {
  const modules = new Map<string, LoraMatrices>();
  for (const [id, stored] of all) {
    const own = lora.get(id);
    if (!own) continue;
    const { module, moduleOutputs, start } = stored;
    modules.set(module, beside(modules.get(module) ?? nothing, own, { start, outputs: moduleOutputs }));
  }
  return modules;
}

const nothing: LoraMatrices = { rank: 0, a: new Float32Array(0), b: new Float32Array(0) };

/** The ranks of both corrections side by side; those of `own` add to the outputs from `start` on, of so many. */
function beside(
  before: LoraMatrices,
  own: LoraMatrices,
  { start, outputs }: { start: number; outputs: number },
): LoraMatrices {
  const rank = before.rank + own.rank;
  const a = new Float32Array(before.a.length + own.a.length);
  a.set(before.a);
  a.set(own.a, before.a.length);
  const b = new Float32Array(outputs * rank);
  for (let row = 0; row < outputs; row++)
    b.set(before.b.subarray(row * before.rank, (row + 1) * before.rank), row * rank);
  for (let row = 0; row < own.b.length / own.rank; row++)
    b.set(own.b.subarray(row * own.rank, (row + 1) * own.rank), (start + row) * rank + before.rank);
  return { rank, a, b };
}

/**
 * The change of each stored tensor by which its correction becomes part of it: b a is added, to the columns that are there.
 *
 * @param all as `loraModules`
 * @throws InvalidDataError, from the change, when the sum is not finite.
 */
export function mergedLora(
  spec: ModelSpec,
  lora: Lora,
  all?: ReadonlyMap<string, StoredModule>,
): (name: string) => TensorPlan['edit'] {
  const modules = loraModules(spec, lora, all);
  const transposed = spec.family === 'gpt2';
  return (name) => {
    const correction = modules.get(moduleOf(spec, name));
    if (!correction) return undefined;
    const { rank, a, b } = correction;
    const inputs = a.length / rank;
    return (values, first, rows) => {
      const columns = values.length / rows;
      for (let r = 0; r < rows; r++) {
        for (let c = 0; c < columns; c++) {
          const [output, input] = transposed ? [c, first + r] : [first + r, c];
          let sum = values[r * columns + c];
          for (let k = 0; k < rank; k++) sum += b[output * rank + k] * a[k * inputs + input];
          values[r * columns + c] = sum;
        }
      }
      if (!values.every(Number.isFinite)) {
        throw new InvalidDataError(`[adapter] ${name} with its correction is not finite`);
      }
    };
  };
}

/**
 * The reverse of loraModules; ranks that do nothing for a projection are left out.
 *
 * @param source names the adapter in messages
 * @param stored as `loraModules`
 * @throws InvalidDataError when a module is not one of the model's projections or has another shape.
 */
export function loraOfModules(
  spec: ModelSpec,
  modules: ReadonlyMap<string, LoraMatrices>,
  source: string,
  stored: ReadonlyMap<string, StoredModule> = storedModules(spec),
): Lora {
  const known = new Map([...stored.values()].map((entry) => [entry.module, entry]));
  for (const [module, { rank, a, b }] of modules) {
    const entry = known.get(module);
    if (!entry) {
      const layers = `the projections of ${spec.layers} layers, such as ${[...known.keys()].slice(0, 3).join(', ')}`;
      throw new InvalidDataError(`[adapter] ${source}: this model has no module ${module}; it has ${layers}`);
    }
    const [inputs, outputs] = [a.length / rank, b.length / rank];
    if (inputs !== entry.inputs || outputs !== entry.moduleOutputs) {
      throw new InvalidDataError(
        `[adapter] ${source}: ${module} must have ${entry.inputs} inputs and ${entry.moduleOutputs} outputs, got ` +
          `${inputs} and ${outputs}: the adapter was made for another model`,
      );
    }
  }
  const lora = new Map<string, LoraMatrices>();
  for (const [id, { module, inputs, outputs, start }] of stored) {
    const whole = modules.get(module);
    if (!whole) continue;
    const b = whole.b.subarray(start * whole.rank, (start + outputs) * whole.rank);
    const used = Array.from({ length: whole.rank }, (_, r) => r).filter((r) =>
      b.some((value, i) => i % whole.rank === r && value !== 0),
    );
    if (used.length === 0) continue;
    lora.set(id, {
      rank: used.length,
      a: Float32Array.from(
        { length: used.length * inputs },
        (_, i) => whole.a[used[Math.floor(i / inputs)] * inputs + (i % inputs)],
      ),
      b: Float32Array.from(
        { length: outputs * used.length },
        (_, i) => b[Math.floor(i / used.length) * whole.rank + used[i % used.length]],
      ),
    });
  }
  return lora;
}
