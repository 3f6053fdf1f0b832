// The programs of self-distillation: teacher and student in one graph, its gradients, evaluation, router logits.
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
  expertBalance,
  Graph,
  gradients,
  type Node,
  Program,
  scale,
  stopGradient,
  topkBce,
  topkCredit,
} from '../graph/index.js';
import { decoder, finalNorm } from '../model/decoder.js';
import { selectEverything } from '../model/select.js';
import type { ModelSpec } from '../model/spec.js';
import { bindWeights, type DecoderTensors } from '../model/weights.js';
import type { Engine } from '../native/index.js';
import { batchInputs } from './batches.js';
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
}

export interface LossWeights {
  kl: number;
  topkBce: number;
  loadBalance: number;
}

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
 * The gradient of the divergence `kl` with respect to routers whose gates are straight-through, as a loss to be
 * differentiated: sum over routers and rows of logit times credit. At gate value 1 the derivative of the loss by the gate
 * says nothing about a row left out; its credit is what its output would change, and the teacher has computed that output
 * (before and after the sub-layer, in `teacher`).
 */
function credited(
  kl: Node,
  routed: readonly RoutedPlace[],
  student: readonly Node[],
  teacher: readonly Node[],
  offsets: Node,
  weight: Node,
): Node {
  const after = (r: RoutedPlace) => 2 * r.layer + (r.place === 'attn' ? 1 : 2);
  const dys = gradients(
    kl,
    routed.map((r) => student[after(r)]),
  );
  return routed
    .map((r, i) => {
      const [from, to] = [teacher[after(r) - 1], teacher[after(r)]];
      return dot(r.detached, stopGradient(topkCredit(dys[i], from, to, r.z, offsets, r.offsets, weight)));
    })
    .reduce((a, b) => add(a, b));
}

/**
 * One micro-batch of training: adds the gradients of `kl weight * KL + bce weight * mean over routers of BCE + balance
 * weight * mean over sub-layers cut into experts of their load balance` to `trainable.grads`. Feeds besides the batch: `weight` f32 [rows], `share` f32 [1] (this micro-batch's part of the
 * step's rows), capacities, and with `explore` noise. Outputs `loss`, `kl`, `agree` and, when they have a weight, `bce` and
 * `balance`.
 */
export function trainProgram(
  model: DistillModel,
  losses: LossWeights,
  { recompute = false, explore = false }: { recompute?: boolean; explore?: boolean } = {},
): Program {
  const { spec, policy, trainable } = model;
  const graph = new Graph();
  const weights = bindWeights(graph, model.weights);
  const { rows, segments, ...inputs } = batchInputs(graph, model.batchTokens);
  const [teacherResiduals, residuals]: [Node[], Node[]] = [[], []];
  // The teacher comes first, so what both compute alike (the start of the model) is counted as its own.
  const teacher = decoder(graph, spec, weights, inputs, selectEverything, {
    tagPrefix: 'teacher/',
    residuals: teacherResiduals,
  });
  const ht = graph.tag('teacher/head', () => finalNorm(spec, weights, teacher));
  const selector = studentSelector(graph, model, segments, explore);
  const student = decoder(graph, spec, weights, inputs, selector, { recompute, residuals });
  const { routed, routedExperts } = selector;
  const weight = graph.feed('weight', 'f32', [rows]);
  const share = graph.feed('share', 'f32', [1]);
  const { loss: kl, agree } = graph.tag('head', () =>
    divergence(finalNorm(spec, weights, student), ht, weights.head, weight),
  );
  graph.output('kl', kl);
  graph.output('agree', dot(agree, weight));
  const extra: Node[] = [];
  const auxiliary = (name: string, weight: number, terms: () => readonly Node[]): void => {
    if (weight === 0) return;
    graph.tag('routers', () => {
      const each = terms();
      if (each.length === 0) return;
      const mean = scale(
        each.reduce((a, b) => add(a, b)),
        1 / each.length,
        share,
      );
      graph.output(name, mean);
      extra.push(scale(mean, weight));
    });
  };
  auxiliary('bce', losses.topkBce, () => routed.map((r) => topkBce(r.detached, r.rows)));
  auxiliary('balance', losses.loadBalance, () => routedExperts.map((r) => expertBalance(r.detached)));
  const total = (divergence: Node): Node => extra.reduce((sum, term) => add(sum, term), scale(divergence, losses.kl));
  const loss = total(kl);
  graph.output('loss', loss);
  // Gates of experts, of tokens that are not straight-through, and corrections are in the divergence itself.
  const byCredit = policy.gate === 'straight-through' && routed.length > 0;
  const objective = byCredit
    ? graph.tag('routers', () => {
        const credit = credited(kl, routed, residuals, teacherResiduals, inputs.offsets, weight);
        return total(routedExperts.length > 0 || policy.lora ? add(credit, kl) : credit);
      })
    : loss;
  trainable.accumulateGradients(graph, objective, (name) => graph.state(trainable.view(name)));
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
