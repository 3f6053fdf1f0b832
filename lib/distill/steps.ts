// The programs of self-distillation: teacher and student in one graph, its gradients, evaluation, router logits.
import { isExperts, ofSequences } from '../elastic/axes.js';
import { LoraTensors, patched, trainablePatch } from '../elastic/lora.js';
import { nestedWidth } from '../elastic/nested.js';
import { type ElasticPolicy, hasQuantiles, type Routing, routerPlaces } from '../elastic/policy.js';
import {
  capacityFeed,
  inferenceSelector,
  noiseFeed,
  ones,
  type RoutedExperts,
  type RoutedPlace,
  type RouterNodes,
  recordedSelector,
  spanFeed,
  trainingSelector,
} from '../elastic/rows.js';
import {
  add,
  boundOf,
  type Dim,
  divergence,
  dot,
  expertCredit,
  Graph,
  gatedActivation,
  gradients,
  linear,
  type Node,
  Program,
  scale,
  segmentMean,
  stopGradient,
  type TopLogits,
  topkCredit,
  zeros,
} from '../graph/index.js';
import { norm } from '../model/blocks.js';
import { type Change, decoder, finalNorm } from '../model/decoder.js';
import { type Place, type Selector, selectEverything } from '../model/select.js';
import type { ModelSpec } from '../model/spec.js';
import { bindWeights, type DecoderNodes, type DecoderTensors } from '../model/weights.js';
import type { Engine } from '../native/index.js';
import { batchInputs } from './batches.js';
import { type Loss, type ModelNodes, objective, ofHidden, ofTeacher, segmentWeightFeed } from './objectives.js';
import { trainedLora } from './plan.js';
import type { Random } from './random.js';
import type { Trainable } from './trainable.js';

/** What the programs of one distillation are built from. */
export interface DistillModel {
  spec: ModelSpec;
  /** The frozen backbone. */
  weights: DecoderTensors;
  policy: ElasticPolicy;
  /** Routers, named `<router id>.weight` and `<router id>.bias`, and corrections; see trainablePlan. */
  trainable: Trainable;
  engine: Engine;
  /** Most rows of a batch. */
  batchTokens: number;
  /** What the losses compare the student with; default: the full model itself. */
  teacher?: Teacher;
}

/**
 * Another model of the same vocabulary; `fed`: its hidden states, which `teacherProgram` gives, are the feed `teacher`. Or the
 * `topK` largest probabilities of one, which are fed.
 */
export type Teacher = { spec: ModelSpec; weights: DecoderTensors; fed?: boolean } | { topK: number };

/** Feeds of a teacher's `topK` largest probabilities: i32 and f32 [rows, topK], f32 [rows]; see TopLogits. */
export const topLogitsFeeds = { ids: 'teacher.ids', logp: 'teacher.logp', rest: 'teacher.rest' } as const;

/** The gates of routers, some of which train by credit and some by their own gradient. */
const gatesOf = (policy: ElasticPolicy) =>
  routerPlaces(policy).map(({ axis }) => (isExperts(axis) ? policy[axis]!.gate : policy.gate));

/**
 * The teacher with its hidden states fed, where training needs nothing else of it: one run of it then serves every width of a
 * batch. Null where it needs more, the inside of the full model for credit or for terms of hidden states, or no model at all.
 */
export function fedTeacher(
  { spec, weights, policy, teacher = { spec, weights } }: DistillModel,
  losses: readonly Loss[],
): Exclude<Teacher, { topK: number }> | null {
  const inside = gatesOf(policy).includes('straight-through') || losses.some(ofHidden);
  return inside || 'topK' in teacher || !losses.some(ofTeacher) ? null : { ...teacher, fed: true };
}

/** How many whole sequences of a batch enter where a router, by its position, wants a number that is none. */
export type WholeSequences = (router: number, wanted: number) => number;

/** Of the two numbers around what is wanted that which keeps the sum over batches: for one pass over some. */
export function evenly(): WholeSequences {
  const owed: number[] = [];
  return (router, wanted) => {
    const due = wanted + (owed[router] ?? 0);
    const whole = Math.floor(due + 0.5);
    owed[router] = due - whole;
    return whole;
  };
}

/** Either of them at random, so that the mean is what is wanted. */
export const drawn =
  (random: Random): WholeSequences =>
  (_, wanted) =>
    Math.floor(wanted + random.uniform());

/**
 * Capacity feeds: a share of rows for every router, in the order of execution, and segment; routers of sequences have that
 * of segment 0, as so many of the segments as `whole` says.
 */
export function capacityFeeds(
  policy: ElasticPolicy,
  segments: number,
  of: (router: number, segment: number) => number,
  whole: WholeSequences = evenly(),
): Record<string, Float32Array | Int32Array> {
  const routers = routerPlaces(policy);
  const feeds = routers.map(({ id, axis }, r) => {
    if (!ofSequences(axis)) return [capacityFeed(id), Float32Array.from({ length: segments }, (_, s) => of(r, s))];
    const count = Math.min(Math.max(whole(r, of(r, 0) * segments), 0), segments);
    // Half a segment less is rounded up to as many, whatever the rounding of the share.
    return [capacityFeed(id), Float32Array.of(Math.max(count - 0.5, 0) / segments)];
  });
  const span = routers.some(({ axis }) => ofSequences(axis)) && { [spanFeed]: Int32Array.of(0, segments) };
  return { ...Object.fromEntries(feeds), ...span };
}

/**
 * Exploration: standard logistic noise for every router and row, or segment, so that a row enters with about the probability
 * sigmoid(logit - threshold). Without it routers of zeros would choose the first rows of every sequence, and later the
 * same ones again and again, and what the others are worth would never be seen.
 */
export function noiseFeeds(
  policy: Routing,
  { rows, segments }: { rows: number; segments: number },
  random: Random,
): Record<string, Float32Array> {
  const draw = () => {
    // Inside (0, 1), so that the logarithm is finite.
    const u = (random.uniform() + 2 ** -33) / (1 + 2 ** -32);
    return Math.log(u / (1 - u));
  };
  return Object.fromEntries(
    routerPlaces(policy).map(({ id, axis, outputs }) => [
      noiseFeed(id),
      Float32Array.from({ length: ofSequences(axis) ? segments : rows * outputs }, draw),
    ]),
  );
}

/** The student: routed by top-k, at widths that are dims (`widthDims`), with corrections. */
function studentSelector(graph: Graph, model: DistillModel, segments: Dim | number, explore = false) {
  const { policy, trainable } = model;
  const selector = trainingSelector(graph, policy, routerNodes(graph, trainable), segments, { explore });
  return {
    ...patched(
      selector,
      trainablePatch(graph, (name) => trainable.view(name), policy),
    ),
    ...nestedOf(graph, model),
  };
}

const nestedOf = (graph: Graph, { policy, spec }: DistillModel): Pick<Selector, 'width'> =>
  policy.nested ? { width: nestedWidth(graph, policy.nested, spec.ffn) } : {};

function routerNodes(graph: Graph, trainable: Trainable): (id: string) => RouterNodes {
  const node = (name: string) => graph.state(trainable.view(name), name);
  return (id) => ({ weight: node(`${id}.weight`), bias: node(`${id}.bias`) });
}

/** What the full model computes besides its output, of every sub-layer. */
interface Inside {
  changes: readonly Change[];
  /** What its last product reads, f32 [rows, its units]. */
  units: readonly Node[];
}

/** Places where a router's choice has no gradient of its own. */
interface Credited {
  tokens: readonly RoutedPlace[];
  experts: readonly RoutedExperts[];
}

/** Credit of whole segments among those of a batch: the mean over a segment's rows of what each changes, f32 [S, 1]. */
function segmentCredit(r: RoutedPlace, span: Node, dy: Node, from: Node, to: Node, offsets: Node): Node {
  const { graph } = dy;
  const [segments] = r.z.shape;
  const width = boundOf(dy.shape[1]);
  const changes = gatedActivation(dy, add(to, scale(from, -1)), 'none');
  const change = linear(segmentMean(changes, offsets, segments), graph.constant(new Array(width).fill(1), [1, width]));
  const weight = graph.feed(segmentWeightFeed, 'f32', [segments]);
  return topkCredit(change, zeros(graph, change.shape), ones(graph, segments), r.z, span, r.offsets, weight);
}

/**
 * Of a loss of the student's output, for routers whose gates are straight-through: `emit` gets for each of them what is to be
 * differentiated with respect to its parameters, the sum over its scores of score times credit. At gate value 1 the derivative of
 * the loss by the gate says nothing about what was left out; its credit is what its output would change, and the full model has
 * computed that output: a sub-layer's before and after, and of an expert the units that the last product reads, and behind that the
 * norm of all that the sub-layer adds where there is one. Each is emitted as soon as the loss has been differentiated back to
 * its sub-layer, so that what only it reads need not be kept.
 */
export function credited(
  loss: Node,
  { tokens, experts }: Credited,
  student: readonly Change[],
  full: Inside,
  { spec, layers }: Pick<DecoderNodes, 'layers'> & { spec: ModelSpec },
  { offsets, weight }: { offsets: Node; weight: Node },
  emit: (router: RoutedPlace | RoutedExperts, credits: Node) => void,
): void {
  const subLayer = (layer: number, place: Place) => 2 * layer + (place === 'attn' ? 0 : 1);
  const last = (r: RoutedPlace | RoutedExperts) => subLayer(r.layer, 'places' in r ? r.places.at(-1)! : r.place);
  const ofRows = (r: RoutedPlace, dy: Node): Node => {
    const [{ before }, { after }] = [full.changes[subLayer(r.layer, r.places[0])], full.changes[last(r)]];
    const credit = r.span
      ? segmentCredit(r, r.span, dy, before, after, offsets)
      : topkCredit(dy, before, after, r.z, offsets, r.offsets, weight);
    return dot(r.detached, stopGradient(credit));
  };
  const ofExperts = (r: RoutedExperts, dy: Node): Node => {
    const { o, down, postNorm1, postNorm2 } = layers[r.layer];
    const [last, post] = r.place === 'attn' ? [o, postNorm1] : [down, postNorm2];
    const h = full.units[subLayer(r.layer, r.place)];
    const y = linear(h, last.weight, { bias: last.bias });
    const [dh] = gradients(post ? norm(spec, y, post) : y, [h], { seed: dy });
    return dot(r.detached.z, stopGradient(expertCredit(h, dh, r.detached, weight, r.rows)));
  };
  const routers = [...tokens, ...experts];
  gradients(
    loss,
    routers.map((r) => student[last(r)].after),
    {
      onGradient: (i, dy) => {
        const r = routers[i];
        emit(r, 'places' in r ? ofRows(r, dy) : ofExperts(r, dy));
      },
    },
  );
}

/**
 * One micro-batch of training: adds the gradients of the loss to `trainable.grads`. Feeds besides the batch: lossFeeds,
 * capacities, with `explore` noise, and topLogitsFeeds or `teacher` of a teacher that is known by them; dims: widthDims.
 * Outputs: `loss` and those of `objective`.
 *
 * Credit needs what every sub-layer would add to the rows and by the experts it leaves out, whoever the teacher is. So the full
 * model's layers run when a router is straight-through, or when the full model is the teacher, and its head only then.
 */
export function trainProgram(
  model: DistillModel,
  losses: readonly Loss[],
  { recompute = false, explore = false }: { recompute?: boolean; explore?: boolean } = {},
): Program {
  const { spec, policy, trainable, teacher } = model;
  const graph = new Graph();
  const weights = bindWeights(graph, model.weights);
  const { rows, segments, ...inputs } = batchInputs(graph, model.batchTokens);
  const run = (tagPrefix: string, spec: ModelSpec, weights: DecoderNodes): ModelNodes & Inside => {
    const [changes, residuals, units]: [Change[], Node[], Node[]] = [[], [], []];
    const options = { tagPrefix, changes, residuals, units };
    const last = decoder(graph, spec, weights, inputs, selectEverything, options);
    const hidden = graph.tag('teacher/head', () => finalNorm(spec, weights, last));
    return { hidden, head: weights.head, softcap: spec.logitSoftcap, changes, residuals, units };
  };
  const taught = losses.some(ofTeacher);
  const gates = gatesOf(policy);
  const byCredit = gates.includes('straight-through');
  const byGate = gates.some((gate) => gate !== 'straight-through');
  // The full model comes first, so what both compute alike (the start of the model) is counted as its own.
  const full = byCredit || (taught && !teacher) ? run('teacher/', spec, weights) : null;
  const other = (given: Teacher): ModelNodes | TopLogits => {
    if ('topK' in given) {
      return {
        ids: graph.feed(topLogitsFeeds.ids, 'i32', [rows, given.topK]),
        logp: graph.feed(topLogitsFeeds.logp, 'f32', [rows, given.topK]),
        rest: graph.feed(topLogitsFeeds.rest, 'f32', [rows]),
      };
    }
    const nodes = bindWeights(graph, given.weights);
    if (!given.fed) return run('teacher/other/', given.spec, nodes);
    const hidden = graph.feed('teacher', 'f32', [rows, given.spec.hidden]);
    return { hidden, head: nodes.head, softcap: given.spec.logitSoftcap, residuals: [] };
  };
  const selector = studentSelector(graph, model, segments, explore);
  const [changes, residuals]: [Change[], Node[]] = [[], []];
  const student = decoder(graph, spec, weights, inputs, selector, { recompute, changes, residuals });
  const { routed, routedExperts } = selector;
  const weight = graph.feed('weight', 'f32', [rows]);
  graph.feed('share', 'f32', [1]);
  const {
    output,
    routers,
    scale: credit,
  } = objective(losses, {
    graph,
    rows,
    student: {
      hidden: graph.tag('head', () => finalNorm(spec, weights, student)),
      ...{ head: weights.head, softcap: spec.logitSoftcap, residuals },
    },
    teacher: taught ? (teacher ? other(teacher) : full) : null,
    routed,
    routedExperts,
    weight,
  });
  const loss = routers ? add(output, routers) : output;
  graph.output('loss', loss);
  const node = (name: string) => graph.state(trainable.view(name));
  if (byCredit) {
    const chosen: Credited = {
      tokens: policy.gate === 'straight-through' ? routed : [],
      experts: routedExperts.filter(({ gate }) => gate === 'straight-through'),
    };
    credited(
      output,
      chosen,
      changes,
      full!,
      { spec, ...weights },
      { offsets: inputs.offsets, weight },
      ({ id }, credits) =>
        // Credit is relative to its mean magnitude; it weighs what the terms weigh together.
        graph.tag('routers', () =>
          trainable.accumulateGradients(graph, scale(credits, 1, credit), node, (name) => name.startsWith(`${id}.`)),
        ),
    );
  }
  // Gates that are not straight-through, and corrections, are in the output itself.
  const rest = !byCredit || byGate || policy.lora ? loss : routers;
  if (rest) trainable.accumulateGradients(graph, rest, node);
  return Program.compile(graph, model.engine);
}

/** The full model, or another teacher. Output `hidden` f32 [rows, hidden], after the final norm. */
export function teacherProgram(
  { engine, batchTokens, ...model }: DistillModel,
  { spec, weights }: Pick<DistillModel, 'spec' | 'weights'> = model,
): Program {
  const graph = new Graph();
  const nodes = bindWeights(graph, weights);
  const { rows: _, segments: __, ...inputs } = batchInputs(graph, batchTokens);
  graph.output('hidden', finalNorm(spec, nodes, decoder(graph, spec, nodes, inputs)));
  return Program.compile(graph, engine);
}

/**
 * The routed model against the `hidden` of teacherProgram, fed as `teacher` f32 [rows, hidden]. Routed by top-k at the
 * capacities fed. Outputs `kl` and `agree`: sums over rows weighted by the feed `weight` f32 [rows].
 */
export function evalProgram(model: DistillModel): Program {
  const { spec } = model;
  const graph = new Graph();
  const weights = bindWeights(graph, model.weights);
  const { rows, segments, ...inputs } = batchInputs(graph, model.batchTokens);
  const selector = studentSelector(graph, model, segments);
  const student = finalNorm(spec, weights, decoder(graph, spec, weights, inputs, selector));
  const weight = graph.feed('weight', 'f32', [rows]);
  const teacher = graph.feed('teacher', 'f32', [rows, spec.hidden]);
  const caps = { softcap: spec.logitSoftcap, teacherSoftcap: spec.logitSoftcap };
  const { loss, agree } = divergence(student, teacher, weights.head, weight, caps);
  graph.output('kl', loss);
  graph.output('agree', dot(agree, weight));
  return Program.compile(graph, model.engine);
}

/**
 * The logits of every router that has calibrated quantiles, f32 [rows that it scored, outputs], of a sequence for all its rows,
 * as outputs named by router id, routed by top-k at the capacities fed.
 */
export function logitsProgram(model: DistillModel): Program {
  const graph = new Graph();
  const { segments, rows: _, ...inputs } = batchInputs(graph, model.batchTokens);
  const selector = studentSelector(graph, model, segments);
  decoder(graph, model.spec, bindWeights(graph, model.weights), inputs, selector);
  for (const { id, z, perRow } of selector.routed) graph.output(id, perRow(z));
  const byMass = new Set(routerPlaces(model.policy).flatMap((r) => (hasQuantiles(model.policy, r.axis) ? [r.id] : [])));
  for (const { id, detached } of selector.routedExperts) if (byMass.has(id)) graph.output(id, detached.z);
  return Program.compile(graph, model.engine);
}

/** Rows that enter each sub-layer whose router of rows has a finite threshold, i32 (`enteredOutput`). Feeds: thresholdFeeds. */
export function thresholdProgram(model: DistillModel, thresholds: ReadonlyMap<string, number>): Program {
  const graph = new Graph();
  const { segments, rows: _, ...inputs } = batchInputs(graph, model.batchTokens);
  const routers = routerNodes(graph, model.trainable);
  using lora = new LoraTensors(trainedLora(model.trainable, model.policy, model.spec) ?? new Map());
  const routed = inferenceSelector(graph, model.policy, routers, segments, thresholds);
  const selector = { ...patched(routed, lora.patch(graph)), ...nestedOf(graph, model) };
  decoder(graph, model.spec, bindWeights(graph, model.weights), inputs, recordedSelector(graph, selector));
  return Program.compile(graph, model.engine);
}
