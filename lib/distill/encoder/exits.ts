// Encoders with an exit after every layer in training: scores, losses from a teacher, and gradients in equilibrium.
import { exitId } from '../../elastic/exits.js';
import {
  add,
  Graph,
  gatherRows,
  hiddenDistance,
  linear,
  type Node,
  Program,
  scale,
  softcap,
  stopGradient,
} from '../../graph/index.js';
import { encoder, headLogits } from '../../model/encoder.js';
import { encoderByName, encoderSlots } from '../../model/encoder_weights.js';
import { type FlatEncoder, weightsOf } from '../../model/slim.js';
import type { EncoderSpec } from '../../model/spec.js';
import { initialise, type ParameterPlan, planOf, type Slot } from '../../model/weights.js';
import { type Engine, Tensor } from '../../native/index.js';
import { Random } from '../random.js';
import { Trainable } from '../trainable.js';
import {
  qualityOf,
  scoreExamples,
  type TextInputs,
  targetLoss,
  targetRun,
  textInputs,
  textRun,
  trainedNode,
} from './classifier.js';
import type { ExampleBatch, ExampleData } from './examples.js';
import { softClassLoss } from './score_losses.js';

/** A classifier and its exits: weights by name, those of the exit after layer i being `exits.i.weight` [C, D] and `exits.i.bias` [C]. */
export interface ExitedEncoder {
  readonly spec: EncoderSpec;
  /** Text of its config.json. */
  readonly config: string;
  readonly weights: ReadonlyMap<string, Float32Array>;
}

type NamedSlot = Pick<Slot, 'name' | 'shape' | 'init'>;

const exitSlots = ({ layers, hidden, encoder }: EncoderSpec): NamedSlot[] =>
  Array.from({ length: layers - 1 }, (_, i) => [
    { name: `${exitId(i)}.weight`, shape: [encoder.labels.length, hidden], init: 'normal' } as const,
    { name: `${exitId(i)}.bias`, shape: [encoder.labels.length], init: 'zero' } as const,
  ]).flat();

/** Every weight of the encoder, its classifier and its exits. */
export const exitedSlots = (spec: EncoderSpec): NamedSlot[] => [...encoderSlots(spec), ...exitSlots(spec)];

/** A classifier with exits that are random. */
export function withExits(model: FlatEncoder, seed: number): ExitedEncoder {
  const random = new Random(seed, 'exits');
  const exits = exitSlots(model.spec).map(({ name, shape, init }) => {
    const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
    initialise(values, init, model.spec.layers, () => random.normal());
    return [name, values] as const;
  });
  return { spec: model.spec, config: model.config, weights: new Map([...weightsOf(model), ...exits]) };
}

/** The encoder and its classifier alone. */
export function withoutExits({ spec, config, weights }: ExitedEncoder): FlatEncoder {
  const plan = planOf(encoderSlots(spec));
  const flat = new Float32Array(plan.size);
  for (const { name, offset } of plan.parameters) flat.set(weights.get(name)!, offset);
  return { spec, config, weights: flat };
}

/** The same exits on another encoder, whose residual stream is as wide. */
export function exitsOn(model: FlatEncoder, { weights }: ExitedEncoder): ExitedEncoder {
  const exits = exitSlots(model.spec).map(({ name }) => [name, weights.get(name)!] as const);
  return { spec: model.spec, config: model.config, weights: new Map([...weightsOf(model), ...exits]) };
}

/** x, of whose gradient only the share `factor` goes on. */
export const damped = (x: Node, factor: number): Node =>
  factor === 1 ? x : add(scale(x, factor), scale(stopGradient(x), 1 - factor));

type NodeOf = (name: string) => Node;

/** Weights that are not trained, in native memory once they are used. */
class Weights implements Disposable {
  readonly #tensors = new Map<string, Tensor>();
  readonly #shapes: ReadonlyMap<string, readonly number[]>;

  constructor(readonly model: ExitedEncoder) {
    this.#shapes = new Map(exitedSlots(model.spec).map(({ name, shape }) => [name, shape]));
  }

  nodes(graph: Graph): NodeOf {
    return (name) => {
      let tensor = this.#tensors.get(name);
      if (!tensor) {
        tensor = Tensor.fromData('f32', [...this.#shapes.get(name)!], this.model.weights.get(name)!);
        this.#tensors.set(name, tensor);
      }
      return graph.weight(tensor, name);
    };
  }

  [Symbol.dispose](): void {
    for (const tensor of this.#tensors.values()) tensor.dispose();
  }
}

/** What an encoder with exits computes. */
interface Exited {
  /** Embeddings and the residual stream after each layer, f32 [N, D]. */
  readonly residuals: readonly Node[];
  /** Of the exit after each layer, the last being the classifier: f32 [S, C]. */
  readonly scores: readonly Node[];
}

/**
 * Builds an encoder with exits: `e_i = W_i tanh(h_i) + b_i` of each text's first row after layer i. With `equilibrium` the gradient of
 * the residual stream after layer i, with k = layers - i exits from there on, is `(g_exit + (k - 1) g_deeper) / k`: every exit then
 * weighs the same in a layer, 1 over the exits that it serves (gradient equilibrium: Li et al., Improved Techniques for Training
 * Adaptive Deep Networks, 2019).
 */
function exited(
  graph: Graph,
  spec: EncoderSpec,
  node: NodeOf,
  inputs: TextInputs,
  { equilibrium = false, recompute = false }: { equilibrium?: boolean; recompute?: boolean } = {},
): Exited {
  const weights = encoderByName(spec, node);
  const residuals: Node[] = [];
  const share = (factor: number): number => (equilibrium ? factor : 1);
  const x = encoder(graph, spec, weights, inputs, undefined, {
    residuals,
    recompute,
    after: (layer, h) => damped(h, share(1 - 1 / (spec.layers - layer))),
  });
  const scores = residuals.slice(1, -1).map((h, i) =>
    graph.tag(exitId(i), () => {
      const first = damped(gatherRows(h, inputs.first), share(1 / (spec.layers - i)));
      return linear(softcap(first, 1), node(`${exitId(i)}.weight`), { bias: node(`${exitId(i)}.bias`) });
    }),
  );
  return { residuals, scores: [...scores, headLogits(graph, spec, weights, x, inputs.first)] };
}

/** Factors of the parts of a loss; a part of factor 0 is not computed. */
export interface ExitLosses {
  /** Squared distance of the residual stream from the teacher's, mean over features, summed over embeddings and layers. */
  readonly hidden: number;
  /** KL from the teacher's scores, summed over exits. */
  readonly soft: number;
  /** Cross-entropy of classes, summed over exits. */
  readonly hard: number;
  /** Whose scores an exit learns from: those of the teacher's same exit, or of its classifier. */
  readonly teacher: 'matching' | 'classifier';
  /** The exits that learn: all, or the classifier alone. */
  readonly exits: 'all' | 'classifier';
}

/** A program of a student that learns from a teacher. */
export interface ExitProgram extends Disposable {
  readonly trainable: Trainable;
  /** Adds the gradient to `trainable.grads`. Factors of the losses of scores may be made smaller for a run. */
  run(
    batch: ExampleBatch,
    at: { weight: number; rows: 'text' | 'batch'; scores?: number; signal?: AbortSignal },
  ): Promise<{ loss: number; hidden: number; soft: number; hard: number }>;
  /** Metrics of the student's exits now, [layers]. */
  quality(data: ExampleData, signal?: AbortSignal): Promise<Record<string, number>[]>;
  /** The student now. */
  student(): ExitedEncoder;
}

/**
 * @param trained names of the student's weights that are trained; the others are as they are
 * @param teacher of other widths or none: its residual stream must be as wide
 */
export function exitProgram(
  student: ExitedEncoder,
  teacher: ExitedEncoder,
  data: ExampleData,
  losses: ExitLosses,
  trained: (name: string) => boolean,
  { engine, batchTokens, recompute }: { engine: Engine; batchTokens: number; recompute?: boolean },
): ExitProgram {
  const { spec } = student;
  const owned: Disposable[] = [];
  const own = <T extends Disposable>(item: T): T => {
    owned.push(item);
    return item;
  };
  const plan: ParameterPlan = planOf(exitedSlots(spec).filter(({ name }) => trained(name)));
  const trainable = own(new Trainable(plan));
  const values = new Float32Array(plan.size);
  for (const { name, offset } of plan.parameters) values.set(student.weights.get(name)!, offset);
  trainable.params.write(values);

  const frozen = own(new Weights(student));
  const names = new Set(plan.parameters.map(({ name }) => name));
  const nodesOf = (graph: Graph): NodeOf => {
    const [state, weight] = [trainedNode(graph, trainable), frozen.nodes(graph)];
    return (name) => (names.has(name) ? state(name) : weight(name));
  };
  const graph = new Graph();
  const { rows, segments, inputs } = textInputs(graph, spec, batchTokens);
  const node = nodesOf(graph);
  const scored = losses.soft > 0 || losses.hard > 0;
  const equilibrium = scored && losses.exits === 'all';
  const mine = exited(graph, spec, node, inputs, { equilibrium, recompute });
  const theirs = exited(graph, teacher.spec, own(new Weights(teacher)).nodes(graph), inputs);

  const terms: Record<'hidden' | 'soft' | 'hard', Node[]> = { hidden: [], soft: [], hard: [] };
  const weight = graph.feed('weight', 'f32', [segments]);
  const learning = losses.exits === 'all' ? mine.scores.map((_, i) => i) : [spec.layers - 1];
  if (losses.hidden > 0) {
    const rowWeight = graph.feed('rowWeight', 'f32', [rows]);
    terms.hidden = mine.residuals.map((h, i) => hiddenDistance(h, theirs.residuals[i], rowWeight, 'mse').loss);
  }
  if (losses.soft > 0) {
    const of = (i: number) => theirs.scores[losses.teacher === 'matching' ? i : spec.layers - 1];
    terms.soft = learning.map((i) => softClassLoss(graph, mine.scores[i], of(i), weight).loss);
  }
  if (losses.hard > 0) terms.hard = learning.map((i) => targetLoss(graph, spec, mine.scores[i], weight).loss);
  const parts: Node[] = [];
  for (const [name, nodes] of Object.entries(terms) as [keyof typeof terms, Node[]][]) {
    if (nodes.length === 0) continue;
    const sum = nodes.reduce(add);
    graph.output(name, sum);
    parts.push(scale(sum, losses[name]));
  }
  const loss = parts.reduce(add);
  trainable.accumulateGradients(graph, loss, node);
  const program = own(Program.compile(graph, engine));
  let measure: Program | null = null;
  return {
    trainable,
    async run(batch, { weight, rows, scores = 1, signal }) {
      const { dims, feeds } = textRun(batch, spec);
      const { targets, weight: weights } = targetRun(data, batch, spec, weight * scores);
      const all = {
        ...feeds,
        ...(scored && { weight: weights }),
        ...(losses.hard > 0 && { targets }),
        ...(losses.hidden > 0 && { rowWeight: rowWeights(batch, weight, rows) }),
      };
      const { outputs } = await program.run({ dims, feeds: all, signal });
      const [hidden, soft, hard] = ['hidden', 'soft', 'hard'].map((name) => outputs[name]?.[0] ?? 0);
      return { loss: losses.hidden * hidden + losses.soft * soft + losses.hard * hard, hidden, soft, hard };
    },
    async quality(evalData, signal) {
      measure ??= own(scoresProgram(spec, nodesOf, engine, batchTokens));
      return qualityOfExits(measure, spec, evalData, batchTokens, signal);
    },
    student() {
      return { ...student, weights: new Map([...student.weights, ...trainable.values()]) };
    },
    [Symbol.dispose]() {
      for (const item of owned.reverse()) item[Symbol.dispose]();
    },
  };
}

/** The weight of every row, f32 [N]: of each text the mean over its rows, times `weight`; or the mean over the rows of the batch. */
function rowWeights({ ids, offsets }: ExampleBatch, weight: number, kind: 'text' | 'batch'): Float32Array {
  const weights = new Float32Array(ids.length).fill(1 / ids.length);
  if (kind === 'text') {
    for (let s = 0; s + 1 < offsets.length; s++)
      weights.fill(weight / (offsets[s + 1] - offsets[s]), offsets[s], offsets[s + 1]);
  }
  return weights;
}

// Outputs `scores.{layer}` f32 [S, C] of every exit, and the classifier's `loss`, for `scoreExamples`.
function scoresProgram(
  spec: EncoderSpec,
  nodesOf: (graph: Graph) => NodeOf,
  engine: Engine,
  batchTokens: number,
): Program {
  const graph = new Graph();
  const { segments, inputs } = textInputs(graph, spec, batchTokens);
  const { scores } = exited(graph, spec, nodesOf(graph), inputs);
  for (const [layer, node] of scores.entries()) graph.output(`scores.${layer}`, node);
  const last = scores[spec.layers - 1];
  graph.output('loss', targetLoss(graph, spec, last, graph.feed('weight', 'f32', [segments])).loss);
  return Program.compile(graph, engine);
}

async function qualityOfExits(
  program: Program,
  spec: EncoderSpec,
  data: ExampleData,
  batchTokens: number,
  signal?: AbortSignal,
): Promise<Record<string, number>[]> {
  const outputs = Array.from({ length: spec.layers }, (_, layer) => `scores.${layer}`);
  const { scores } = await scoreExamples(program, spec, data, { batchTokens, outputs, signal });
  return outputs.map((name) => qualityOf(spec, data, scores[name]));
}

/** Metrics of every exit of a model, [layers], the last being its classifier. */
export async function exitQuality(
  model: ExitedEncoder,
  data: ExampleData,
  { engine, batchTokens, signal }: { engine: Engine; batchTokens: number; signal?: AbortSignal },
): Promise<Record<string, number>[]> {
  using weights = new Weights(model);
  using program = scoresProgram(model.spec, (graph) => weights.nodes(graph), engine, batchTokens);
  return await qualityOfExits(program, model.spec, data, batchTokens, signal);
}
