// Objectives of distillation: terms of the loss, their checks, their weights over the steps, and what they are in a graph.
import { isExperts, ofSequences } from '../elastic/axes.js';
import { type ElasticPolicy, routerPlaces } from '../elastic/policy.js';
import type { RoutedExperts, RoutedPlace } from '../elastic/rows.js';
import {
  add,
  crossEntropy,
  type Dim,
  divergence,
  dot,
  expertBalance,
  type Graph,
  gate,
  hiddenDistance,
  type Node,
  scale,
  type TopLogits,
  topkBce,
  topkDivergence,
  topLogits,
} from '../graph/index.js';
import { InvalidArgumentError } from '../native/errors.js';
import type { Sequences } from './data.js';
import { checkKeys } from './trainer.js';

/** One term of the loss; docs/distillation.md has the equations. */
export type LossTerm = {
  /** Factor of the term. */
  weight: number;
  /** The weight at the last step; it changes linearly from `weight` at the first one. Default: it does not. */
  to?: number;
} & (
  | {
      /** KL divergence of the student's next-token distribution from the teacher's, or the teacher's from the student's. */
      kind: 'kl' | 'reverse-kl';
      /** Divides the logits of both; the term is multiplied by its square. Default 1. */
      temperature?: number;
      /** Only the teacher's K most likely tokens are told apart, all others are one. Default: none are joined. */
      topK?: number;
    }
  | {
      /** Generalised Jensen-Shannon divergence. */
      kind: 'jsd';
      temperature?: number;
      /** The teacher's share of the mixture, between 0 and 1; default 0.5. */
      beta?: number;
    }
  /** Of the data's next token. */
  | { kind: 'cross-entropy' }
  | {
      /** Distance of the student's residual stream from the teacher's behind some layers. */
      kind: 'hidden-cosine' | 'hidden-mse';
      /** Default: the last one. */
      layers?: 'all' | readonly number[];
    }
  /** Binary cross-entropy of every router of rows against its own top-k choice: makes thresholds, which are causal, agree. */
  | { kind: 'topk-bce' }
  /** Load balance of the experts of every sub-layer that is cut into some: 0 when all are used alike. */
  | { kind: 'load-balance' }
  /** Squared difference of every such router's mean sigmoid from its capacity. */
  | { kind: 'capacity' }
);

/** A checked term: its name in metrics, the kind and, from the second of a kind on, a number; `to` is always given. */
export type Loss = LossTerm & { readonly name: string; readonly to: number };

const keysOf: Readonly<Record<LossTerm['kind'], readonly string[]>> = {
  kl: ['temperature', 'topK'],
  'reverse-kl': ['temperature', 'topK'],
  jsd: ['temperature', 'beta'],
  'cross-entropy': [],
  'hidden-cosine': ['layers'],
  'hidden-mse': ['layers'],
  'topk-bce': [],
  'load-balance': [],
  capacity: [],
};
export const lossKinds = Object.keys(keysOf) as readonly LossTerm['kind'][];

/** Terms of routers alone. All others are of the student's output: what it costs that rows are left out. */
const routerKinds = ['topk-bce', 'load-balance', 'capacity'] as const;
type RouterLoss = Extract<Loss, { kind: (typeof routerKinds)[number] }>;
type OutputLoss = Exclude<Loss, RouterLoss>;
type HiddenLoss = Extract<Loss, { kind: 'hidden-cosine' | 'hidden-mse' }>;
const ofRouters = (loss: Loss): loss is RouterLoss => routerKinds.some((kind) => kind === loss.kind);
/** Whether it compares residual streams. */
export const ofHidden = (loss: Loss): loss is HiddenLoss => loss.kind === 'hidden-cosine' || loss.kind === 'hidden-mse';
/** Whether a term compares the student with the teacher. */
export const ofTeacher = (loss: Loss): boolean => !ofRouters(loss) && loss.kind !== 'cross-entropy';

/**
 * Checks the terms of a loss for a student of so many layers and tokens.
 * Errors: InvalidArgumentError naming the term.
 */
export function resolveLosses(
  terms: readonly LossTerm[] = [
    { kind: 'kl', weight: 1 },
    { kind: 'topk-bce', weight: 0.1 },
    { kind: 'load-balance', weight: 0.01 },
  ],
  { layers, vocab }: { layers: number; vocab: number },
): Loss[] {
  const wrong = !Array.isArray(terms as unknown) || terms.some((term) => typeof term !== 'object' || term === null);
  if (wrong) throw new InvalidArgumentError(`[distill] loss must be a list of terms, got ${JSON.stringify(terms)}`);
  const count = new Map<string, number>();
  const losses = terms.map((term): Loss => {
    const { kind, weight, to = weight } = term;
    const number = (count.get(kind) ?? 0) + 1;
    count.set(kind, number);
    if (!Object.hasOwn(keysOf, kind)) {
      throw new InvalidArgumentError(
        `[distill] a loss must be one of ${lossKinds.join(', ')}, got ${JSON.stringify(kind)}`,
      );
    }
    checkKeys('distill', `key of the loss ${kind}`, term, ['kind', 'weight', 'to', ...keysOf[kind]]);
    const check = (name: string, value: unknown, ok: boolean, expected: string) => {
      if (!ok) {
        throw new InvalidArgumentError(`[distill] the ${name} of ${kind} must be ${expected}, got ${String(value)}`);
      }
    };
    check('weight', weight, Number.isFinite(weight) && (weight > 0 || (weight === 0 && to > 0)), 'positive');
    check('to', to, Number.isFinite(to) && to >= 0, 'zero or more');
    const { temperature = 1, beta = 0.5, topK = 1, layers: chosen = 'all' } = term as Record<string, unknown>;
    const positive = typeof temperature === 'number' && Number.isFinite(temperature) && temperature > 0;
    check('temperature', temperature, positive, 'a positive number');
    check('beta', beta, typeof beta === 'number' && beta > 0 && beta < 1, 'between 0 and 1');
    const tokens = Number.isInteger(topK) && (topK as number) >= 1 && (topK as number) <= vocab;
    check('topK', topK, tokens, `an integer from 1 to the vocabulary's ${vocab}`);
    const layer = (l: unknown): boolean => Number.isInteger(l) && (l as number) >= 0 && (l as number) < layers;
    const some = chosen === 'all' || (Array.isArray(chosen) && chosen.length > 0 && chosen.every(layer));
    check('layers', chosen, some, `'all' or a list of layers from 0 to ${layers - 1}`);
    return { ...term, to, name: number === 1 ? kind : `${kind}-${number}` };
  });
  if (!losses.some((loss) => !ofRouters(loss))) {
    const known = lossKinds.filter((kind) => !routerKinds.some((of) => of === kind)).join(', ');
    throw new InvalidArgumentError(`[distill] loss must have a term of the student's output: ${known}`);
  }
  return losses;
}

/** Weight of a term at a step, from 0. */
export function lossWeight({ weight, to }: Loss, step: number, steps: number): number {
  return weight + (to - weight) * (steps > 1 ? step / (steps - 1) : 0);
}

const weightFeed = (loss: Loss): string => `weight.${loss.name}`;
const wantedFeed = (id: string): string => `wanted.${id}`;

/** Feed f32 [segments]: factors of segments where whole ones are routed. */
export const segmentWeightFeed = 'weight of segments';

/** Routers of rows and their positions among all. */
const rowRouters = (policy: ElasticPolicy) =>
  routerPlaces(policy).flatMap(({ id, axis }, router) => (isExperts(axis) ? [] : [{ id, axis, router }]));

/** Values of the feeds of `objective` for a micro-batch whose rows weigh `1 / total` each, all terms times `factor`. */
export function lossFeeds(
  losses: readonly Loss[],
  policy: ElasticPolicy,
  batch: Sequences,
  {
    step,
    steps,
    total,
    capacity,
    factor = 1,
  }: {
    step: number;
    steps: number;
    total: number;
    capacity: (router: number, segment: number) => number;
    factor?: number;
  },
): Record<string, Float32Array | Int32Array> {
  const rows = batch.ids.length;
  const feeds: Record<string, Float32Array | Int32Array> = {
    weight: new Float32Array(rows).fill(1 / total),
    share: Float32Array.of(rows / total),
  };
  for (const loss of losses) feeds[weightFeed(loss)] = Float32Array.of(factor * lossWeight(loss, step, steps));
  if (losses.some(({ kind }) => kind === 'cross-entropy')) feeds.targets = batch.targets;
  const routers = rowRouters(policy);
  const lengths = Array.from(batch.offsets.subarray(1), (end, s) => end - batch.offsets[s]);
  if (routers.some(({ axis }) => ofSequences(axis))) {
    feeds[segmentWeightFeed] = Float32Array.from(lengths, (length) => length / total);
  }
  if (losses.some(({ kind }) => kind === 'capacity') && routers.length > 0) {
    feeds['every row'] = Int32Array.from({ length: rows }, (_, r) => r);
    feeds['per share'] = Float32Array.of(total / rows);
    for (const { id, router } of routers) {
      const sum = lengths.reduce((sum, length, s) => sum + length * capacity(router, s), 0);
      feeds[wantedFeed(id)] = Float32Array.of(sum / total);
    }
  }
  return feeds;
}

/** A model's output: the hidden states that its head multiplies, and the residual stream from the embedding on. */
export interface ModelNodes {
  /** f32 [rows, hidden], after the final norm. */
  hidden: Node;
  /** [vocab, hidden] */
  head: Node;
  /** Of the logits; 0: none. */
  softcap: number;
  /** f32 [rows, hidden] each: before the first sub-layer and after every one. */
  residuals: readonly Node[];
}

/** What the terms of a training graph are made of. */
export interface ObjectiveNodes {
  graph: Graph;
  rows: Dim;
  student: ModelNodes;
  /** A model in the same graph, its largest probabilities from elsewhere, or null where no term needs it. */
  teacher: ModelNodes | TopLogits | null;
  routed: readonly RoutedPlace[];
  routedExperts: readonly RoutedExperts[];
  /** f32 [rows]: factors of rows. */
  weight: Node;
}

export interface Objective {
  /** Weighted sum of the terms of the student's output, f32 [1]. */
  output: Node;
  /** Weighted sum of the terms of routers, f32 [1]; null without any. */
  routers: Node | null;
  /** Sum of the weights in `output`, f32 [1]. */
  scale: Node;
}

/**
 * Builds the terms; each becomes an output of the graph by its name, without its weight, and `agree` the share of rows
 * where student and teacher prefer the same token, if a divergence over the whole vocabulary is among them.
 */
export function objective(losses: readonly Loss[], nodes: ObjectiveNodes): Objective {
  const { graph, weight } = nodes;
  let agree: Node | null = null;
  const [output, routers, weights]: [Node[], Node[], Node[]] = [[], [], []];
  for (const loss of losses) {
    const factor = graph.feed(weightFeed(loss), 'f32', [1]);
    if (ofRouters(loss)) {
      const value = graph.tag('routers', () => routerTerm(loss, nodes));
      if (!value) continue;
      graph.output(loss.name, value);
      routers.push(scale(value, 1, factor));
      continue;
    }
    const term = graph.tag('head', () => outputTerm(loss, nodes));
    graph.output(loss.name, term.loss);
    agree ??= term.agree ?? null;
    weights.push(factor);
    output.push(scale(term.loss, 1, factor));
  }
  if (agree) graph.output('agree', dot(agree, weight));
  return { output: sum(output), routers: routers.length > 0 ? sum(routers) : null, scale: sum(weights) };
}

const sum = (nodes: readonly Node[]): Node => nodes.reduce((a, b) => add(a, b));

function outputTerm(loss: OutputLoss, nodes: ObjectiveNodes): { loss: Node; agree?: Node } {
  const { graph, rows, student, weight } = nodes;
  if (loss.kind === 'cross-entropy') {
    return crossEntropy(student.hidden, student.head, graph.feed('targets', 'i32', [rows]), weight, student.softcap);
  }
  const teacher = nodes.teacher!;
  if (ofHidden(loss)) {
    const { residuals } = teacher as ModelNodes;
    // Two sub-layers to a layer.
    const count = (residuals.length - 1) / 2;
    const { layers = [count - 1] } = loss;
    const chosen = layers === 'all' ? Array.from({ length: count }, (_, layer) => layer) : layers;
    const kind = loss.kind === 'hidden-mse' ? 'mse' : 'cosine';
    const of = (layer: number) =>
      hiddenDistance(student.residuals[2 * layer + 2], residuals[2 * layer + 2], weight, kind).loss;
    return { loss: scale(sum(chosen.map(of)), 1 / chosen.length) };
  }
  // Products with the head are linear in hidden states: a temperature divides either, and the cap of capped logits too.
  const { temperature = 1 } = loss;
  const softcap = student.softcap / temperature;
  const cooled = (hidden: Node): Node => scale(hidden, 1 / temperature);
  const hs = cooled(student.hidden);
  const scaled = (value: Node): Node => scale(value, temperature * temperature);
  if (loss.kind !== 'jsd' && ('ids' in teacher || loss.topK !== undefined)) {
    const top =
      'ids' in teacher
        ? teacher
        : graph.tag('teacher/head', () =>
            topLogits(cooled(teacher.hidden), teacher.head, loss.topK!, teacher.softcap / temperature),
          );
    return { loss: scaled(topkDivergence(hs, student.head, top, weight, loss.kind, softcap).loss) };
  }
  const { hidden, head, softcap: ofTeacher } = teacher as ModelNodes;
  const { loss: value, agree } = divergence(hs, cooled(hidden), student.head, weight, {
    kind: loss.kind,
    ...(loss.kind === 'jsd' && loss.beta !== undefined && { beta: loss.beta }),
    ...{ wt: head === student.head ? null : head, softcap, teacherSoftcap: ofTeacher / temperature },
  });
  return { loss: scaled(value), agree };
}

/** Null where the plan has no router of this kind. */
function routerTerm(loss: RouterLoss, nodes: ObjectiveNodes): Node | null {
  const { graph, rows, routed, routedExperts, weight } = nodes;
  const mean = (terms: readonly Node[], share: Node) =>
    terms.length > 0 ? scale(sum(terms), 1 / terms.length, share) : null;
  if (loss.kind === 'capacity') {
    if (routed.length === 0) return null;
    const [every, perShare] = [graph.feed('every row', 'i32', [rows]), graph.feed('per share', 'f32', [1])];
    const squares = routed.map(({ id, detached, perRow }) => {
      const passing = dot(gate(perRow(detached), every, 1), weight);
      const off = add(passing, scale(graph.feed(wantedFeed(id), 'f32', [1]), -1));
      return dot(off, off);
    });
    // Passing and wanted are parts of the step's rows, of which this micro-batch has a share.
    return mean(squares, perShare);
  }
  const share = graph.feed('share', 'f32', [1]);
  return loss.kind === 'topk-bce'
    ? mean(
        routed.map((r) => topkBce(r.detached, r.rows)),
        share,
      )
    : mean(
        routedExperts.map((r) => expertBalance(r.explored)),
        share,
      );
}
