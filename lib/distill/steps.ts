// The programs of self-distillation: teacher and student in one graph, its gradients, evaluation, router logits.
import { type ElasticPolicy, routerId, routerPlaces } from '../elastic/policy.js';
import { capacityFeed, inferenceSelector, type RouterNodes, thresholdFeed, trainingSelector } from '../elastic/rows.js';
import { add, distillKl, dot, Graph, type Node, Program, scale, topkBce } from '../graph/index.js';
import { decoder, finalNorm } from '../model/decoder.js';
import { type Place, places } from '../model/select.js';
import type { ModelSpec } from '../model/spec.js';
import { bindWeights, type DecoderTensors, type ParameterPlan } from '../model/weights.js';
import type { Engine } from '../native/index.js';
import { batchInputs } from './batches.js';
import type { Trainable } from './trainable.js';

/** What the programs of one distillation are built from. */
export interface DistillModel {
  spec: ModelSpec;
  /** The frozen backbone. */
  weights: DecoderTensors;
  policy: ElasticPolicy;
  /** Parameters named `<router id>.weight` and `<router id>.bias`; see routerPlan. */
  trainable: Trainable;
  engine: Engine;
  /** Most rows of a batch. */
  batchTokens: number;
}

export interface LossWeights {
  kl: number;
  topkBce: number;
}

/** Where every router's parameters lie in the flat vector: all weights, which decay, then all biases. */
export function routerPlan(policy: Pick<ElasticPolicy, 'tokens' | 'layers' | 'hidden'>): ParameterPlan {
  const ids = routerPlaces(policy).map((r) => r.id);
  const { hidden } = policy;
  const decayCount = ids.length * hidden;
  return {
    parameters: [
      ...ids.map((id, i) => ({
        name: `${id}.weight`,
        shape: [1, hidden],
        offset: i * hidden,
        size: hidden,
        decay: true,
      })),
      ...ids.map((id, i) => ({ name: `${id}.bias`, shape: [1], offset: decayCount + i, size: 1, decay: false })),
    ],
    size: decayCount + ids.length,
    decayCount,
  };
}

/** Capacity feeds: for each routed place, one value per segment. */
export function capacityFeeds(
  policy: Pick<ElasticPolicy, 'tokens'>,
  segments: number,
  of: (place: Place, segment: number) => number,
): Record<string, Float32Array> {
  const routed = places.filter((place) => policy.tokens[place]);
  return Object.fromEntries(
    routed.map((place) => [capacityFeed(place), Float32Array.from({ length: segments }, (_, s) => of(place, s))]),
  );
}

function routerNodes(graph: Graph, trainable: Trainable): (id: string) => RouterNodes {
  const node = (name: string) => graph.state(trainable.view(name), name);
  return (id) => ({ weight: node(`${id}.weight`), bias: node(`${id}.bias`) });
}

/** Teacher, student and their divergence. Outputs `kl` and `agree`: sums over rows weighted by the feed `weight`. */
function divergence(graph: Graph, model: DistillModel, recompute: boolean) {
  const { spec, policy, trainable } = model;
  const weights = bindWeights(graph, model.weights);
  const { rows, segments, ...inputs } = batchInputs(graph, model.batchTokens);
  // The teacher comes first, so what both compute alike (the start of the model) is counted as its own.
  const teacher = decoder(graph, spec, weights, inputs, undefined, { tagPrefix: 'teacher/' });
  const ht = graph.tag('teacher/head', () => finalNorm(spec, weights, teacher));
  const selector = trainingSelector(graph, policy, routerNodes(graph, trainable), segments);
  const student = decoder(graph, spec, weights, inputs, selector, { recompute });
  const weight = graph.feed('weight', 'f32', [rows]);
  const { loss: kl, agree } = graph.tag('head', () =>
    distillKl(finalNorm(spec, weights, student), ht, weights.head, weight),
  );
  graph.output('kl', kl);
  graph.output('agree', dot(agree, weight));
  return { kl, routed: selector.routed };
}

/**
 * One micro-batch of training: adds the gradients of `kl weight * KL + bce weight * mean over routers of BCE` to
 * `trainable.grads`. Feeds besides the batch: `weight` f32 [rows], `share` f32 [1] (this micro-batch's part of the
 * step's rows), capacities. Outputs `loss`, `kl`, `agree` and, when it has a weight, `bce`.
 */
export function trainProgram(model: DistillModel, losses: LossWeights, recompute: boolean): Program {
  const graph = new Graph();
  const { kl, routed } = divergence(graph, model, recompute);
  const share = graph.feed('share', 'f32', [1]);
  let loss: Node = scale(kl, losses.kl);
  if (losses.topkBce > 0) {
    const bce = graph.tag('auxiliary', () => {
      const sum = routed.map((r) => topkBce(r.detached, r.rows)).reduce((a, b) => add(a, b));
      return scale(sum, 1 / routed.length, share);
    });
    graph.output('bce', bce);
    loss = add(loss, scale(bce, losses.topkBce));
  }
  graph.output('loss', loss);
  model.trainable.accumulateGradients(graph, loss, (name) => graph.state(model.trainable.view(name)));
  return Program.compile(graph, model.engine);
}

/** The divergence alone: outputs `kl` and `agree`, routed by top-k at the capacities fed. */
export function evalProgram(model: DistillModel): Program {
  const graph = new Graph();
  divergence(graph, model, false);
  return Program.compile(graph, model.engine);
}

/** Every router's logits, f32 [rows, 1] each, as outputs named by router id, routed by top-k at the capacities fed. */
export function logitsProgram(model: DistillModel): Program {
  const graph = new Graph();
  const { segments, rows: _, ...inputs } = batchInputs(graph, model.batchTokens);
  const selector = trainingSelector(graph, model.policy, routerNodes(graph, model.trainable), segments);
  decoder(graph, model.spec, bindWeights(graph, model.weights), inputs, selector);
  for (const { id, z } of selector.routed) graph.output(id, z);
  return Program.compile(graph, model.engine);
}

/** Rows that pass each router's threshold, i32, as outputs named by router id. */
export function thresholdProgram(model: DistillModel): Program {
  const graph = new Graph();
  const { segments, rows: _, ...inputs } = batchInputs(graph, model.batchTokens);
  const selector = inferenceSelector(graph, model.policy, routerNodes(graph, model.trainable), segments);
  decoder(graph, model.spec, bindWeights(graph, model.weights), inputs, {
    runs: selector.runs,
    rows(subLayer) {
      const selection = selector.rows(subLayer);
      if (selection) graph.output(routerId(subLayer.layer, subLayer.place), selection.rows);
      return selection;
    },
  });
  return Program.compile(graph, model.engine);
}

/** Threshold feeds: every router's threshold for every segment. */
export function thresholdFeeds(
  thresholds: ReadonlyMap<string, number>,
  segments: number,
): Record<string, Float32Array> {
  return Object.fromEntries(
    [...thresholds].map(([id, value]) => [thresholdFeed(id), new Float32Array(segments).fill(value)]),
  );
}
