// The programs of self-distillation: teacher and student in one graph, its gradients, evaluation, router logits.
import { isExperts } from '../elastic/axes.js';
import { LoraTensors, patched, trainablePatch } from '../elastic/lora.js';
import { type ElasticPolicy, hasQuantiles, routerPlaces } from '../elastic/policy.js';
import {
  capacityFeed,
  inferenceSelector,
  noiseFeed,
  type RoutedPlace,
  type RouterNodes,
  recordedSelector,
  trainingSelector,
} from '../elastic/rows.js';
import {
  add,
  type Dim,
  divergence,
  dot,
  Graph,
  gradients,
  type Node,
  Program,
  scale,
  stopGradient,
  type TopLogits,
  topkCredit,
} from '../graph/index.js';
import { decoder, finalNorm } from '../model/decoder.js';
import { selectEverything } from '../model/select.js';
import type { ModelSpec } from '../model/spec.js';
import { bindWeights, type DecoderNodes, type DecoderTensors } from '../model/weights.js';
import type { Engine } from '../native/index.js';
import { batchInputs } from './batches.js';
import { type Loss, type ModelNodes, objective, ofTeacher } from './objectives.js';
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

/** Another model of the same vocabulary, or the `topK` largest probabilities of one, which are fed. */
export type Teacher = { spec: ModelSpec; weights: DecoderTensors } | { topK: number };

/** Feeds of a teacher's `topK` largest probabilities: i32 and f32 [rows, topK], f32 [rows]; see TopLogits. */
export const topLogitsFeeds = { ids: 'teacher.ids', logp: 'teacher.logp', rest: 'teacher.rest' } as const;

/** Capacity feeds: a share of rows for every router, in the order of execution, and segment. */
export function capacityFeeds(
  policy: ElasticPolicy,
  segments: number,
  of: (router: number, segment: number) => number,
): Record<string, Float32Array> {
  return Object.fromEntries(
    routerPlaces(policy).map(({ id }, r) => [
      capacityFeed(id),
      Float32Array.from({ length: segments }, (_, s) => of(r, s)),
    ]),
  );
}

/**
 * Exploration: standard logistic noise for every router and row, so that a row enters with about the probability
 * sigmoid(logit - threshold). Without it routers of zeros would choose the first rows of every sequence, and later the
 * same ones again and again, and what the others are worth would never be seen.
 */
export function noiseFeeds(policy: ElasticPolicy, rows: number, random: Random): Record<string, Float32Array> {
  const draw = () => {
    // Inside (0, 1), so that the logarithm is finite.
    const u = (random.uniform() + 2 ** -33) / (1 + 2 ** -32);
    return Math.log(u / (1 - u));
  };
  return Object.fromEntries(
    routerPlaces(policy).map(({ id, outputs }) => [noiseFeed(id), Float32Array.from({ length: rows * outputs }, draw)]),
  );
}

/** The student: routed by top-k, with corrections. */
function studentSelector(graph: Graph, { policy, trainable }: DistillModel, segments: Dim | number, explore = false) {
  const selector = trainingSelector(graph, policy, routerNodes(graph, trainable), segments, { explore });
  return patched(
    selector,
    trainablePatch(graph, (name) => trainable.view(name), policy),
  );
}

function routerNodes(graph: Graph, trainable: Trainable): (id: string) => RouterNodes {
  const node = (name: string) => graph.state(trainable.view(name), name);
  return (id) => ({ weight: node(`${id}.weight`), bias: node(`${id}.bias`) });
}

/**
 * The gradient of a loss of the student's output with respect to routers whose gates are straight-through, as a loss to be
 * differentiated: sum over routers and rows of logit times credit. At gate value 1 the derivative of the loss by the gate
 * says nothing about a row left out; its credit is what its output would change, and the full model has computed that
 * output (before and after the sub-layer, in `full`).
 */
function credited(
  loss: Node,
  routed: readonly RoutedPlace[],
  student: readonly Node[],
  full: readonly Node[],
  offsets: Node,
  weight: Node,
): Node {
  const after = (r: RoutedPlace) => 2 * r.layer + (r.place === 'attn' ? 1 : 2);
  const dys = gradients(
    loss,
    routed.map((r) => student[after(r)]),
  );
  return routed
    .map((r, i) => {
      const [from, to] = [full[after(r) - 1], full[after(r)]];
      return dot(r.detached, stopGradient(topkCredit(dys[i], from, to, r.z, offsets, r.offsets, weight)));
    })
    .reduce((a, b) => add(a, b));
}

/**
 * One micro-batch of training: adds the gradients of the loss to `trainable.grads`. Feeds besides the batch: lossFeeds,
 * capacities, with `explore` noise, and topLogitsFeeds of a teacher that is known by them. Outputs: `loss` and those of
 * `objective`.
 *
 * Credit needs what every sub-layer would add to the rows it leaves out, whoever the teacher is. So the full model's layers
 * run when a token router is straight-through, or when the full model is the teacher, and its head only then.
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
  const run = (tagPrefix: string, spec: ModelSpec, weights: DecoderNodes): ModelNodes => {
    const residuals: Node[] = [];
    const last = decoder(graph, spec, weights, inputs, selectEverything, { tagPrefix, residuals });
    const hidden = graph.tag('teacher/head', () => finalNorm(spec, weights, last));
    return { hidden, head: weights.head, residuals };
  };
  const taught = losses.some(ofTeacher);
  const byCredit = policy.gate === 'straight-through' && routerPlaces(policy).some(({ axis }) => !isExperts(axis));
  // The full model comes first, so what both compute alike (the start of the model) is counted as its own.
  const full = byCredit || (taught && !teacher) ? run('teacher/', spec, weights) : null;
  const other = (given: Teacher): ModelNodes | TopLogits =>
    'topK' in given
      ? {
          ids: graph.feed(topLogitsFeeds.ids, 'i32', [rows, given.topK]),
          logp: graph.feed(topLogitsFeeds.logp, 'f32', [rows, given.topK]),
          rest: graph.feed(topLogitsFeeds.rest, 'f32', [rows]),
        }
      : run('teacher/other/', given.spec, bindWeights(graph, given.weights));
  const selector = studentSelector(graph, model, segments, explore);
  const residuals: Node[] = [];
  const student = decoder(graph, spec, weights, inputs, selector, { recompute, residuals });
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
    student: { hidden: graph.tag('head', () => finalNorm(spec, weights, student)), head: weights.head, residuals },
    teacher: taught ? (teacher ? other(teacher) : full) : null,
    routed,
    routedExperts,
    weight,
  });
  const total = (loss: Node): Node => (routers ? add(loss, routers) : loss);
  const loss = total(output);
  graph.output('loss', loss);
  // Gates of experts, of tokens that are not straight-through, and corrections are in the output itself.
  const trained = byCredit
    ? graph.tag('routers', () => {
        // Credit is relative to its mean magnitude; it weighs what the terms weigh together.
        const unscaled = credited(output, routed, residuals, full!.residuals, inputs.offsets, weight);
        const credits = scale(unscaled, 1, credit);
        return total(routedExperts.length > 0 || policy.lora ? add(credits, output) : credits);
      })
    : loss;
  trainable.accumulateGradients(graph, trained, (name) => graph.state(trainable.view(name)));
  return Program.compile(graph, model.engine);
}

/** The full model. Output `hidden` f32 [rows, hidden], after the final norm. */
export function teacherProgram(model: DistillModel): Program {
  const graph = new Graph();
  const weights = bindWeights(graph, model.weights);
  const { rows: _, segments: __, ...inputs } = batchInputs(graph, model.batchTokens);
  graph.output('hidden', finalNorm(model.spec, weights, decoder(graph, model.spec, weights, inputs)));
  return Program.compile(graph, model.engine);
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
  const { loss, agree } = divergence(student, graph.feed('teacher', 'f32', [rows, spec.hidden]), weights.head, weight);
  graph.output('kl', loss);
  graph.output('agree', dot(agree, weight));
  return Program.compile(graph, model.engine);
}

/**
 * The logits of every router that has calibrated quantiles, f32 [rows that it scored, outputs], as outputs named by router
 * id, routed by top-k at the capacities fed.
 */
export function logitsProgram(model: DistillModel): Program {
  const graph = new Graph();
  const { segments, rows: _, ...inputs } = batchInputs(graph, model.batchTokens);
  const selector = studentSelector(graph, model, segments);
  decoder(graph, model.spec, bindWeights(graph, model.weights), inputs, selector);
  for (const { id, z } of selector.routed) graph.output(id, z);
  const byMass = new Set(routerPlaces(model.policy).flatMap((r) => (hasQuantiles(model.policy, r.axis) ? [r.id] : [])));
  for (const { id, detached } of selector.routedExperts) if (byMass.has(id)) graph.output(id, detached.z);
  return Program.compile(graph, model.engine);
}

/** Rows that pass the threshold of each router of tokens where it is finite, i32, as outputs named by router id. Feeds: thresholdFeeds. */
export function thresholdProgram(model: DistillModel, thresholds: ReadonlyMap<string, number>): Program {
  const graph = new Graph();
  const { segments, rows: _, ...inputs } = batchInputs(graph, model.batchTokens);
  const routers = routerNodes(graph, model.trainable);
  using lora = new LoraTensors(trainedLora(model.trainable, model.policy, model.spec) ?? new Map());
  const routed = inferenceSelector(graph, model.policy, routers, segments, thresholds);
  const selector = patched(routed, lora.patch(graph));
  decoder(graph, model.spec, bindWeights(graph, model.weights), inputs, recordedSelector(graph, selector));
  return Program.compile(graph, model.engine);
}
