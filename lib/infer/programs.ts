// The programs inference runs: next token with caches, and whole sequences without.
import type { OperatingPoint } from '../elastic/budget.js';
import { patched } from '../elastic/lora.js';
import { inferenceSelector, recordedExperts, recordedSelector, routerNodes } from '../elastic/rows.js';
import { crossEntropy, type Dim, divergence, Graph, type Node, Program, sample } from '../graph/index.js';
import { decoder, finalNorm, logits } from '../model/decoder.js';
import { type Selector, selectEverything } from '../model/select.js';
import { bindWeights, type DecoderNodes } from '../model/weights.js';
import type { Session } from './cache.js';
import type { Decisions } from './mixed.js';
import type { Network } from './network.js';

/** Rows that one run appends at most: memory is planned for as many. */
const prefillRows = 512;

/** Rows of one run of the program of `compileDecode`. */
export const decodeRows = (network: Network): number => Math.min(prefillRows, network.maxContext);

/** The selector of a model at a budget: feeds `threshold.<router id>` where it is finite. */
export function budgetSelector(
  graph: Graph,
  network: Network,
  { full, thresholds }: Decisions,
  segments: Dim | number,
): Selector {
  const { policy, routers, lora, loraAtFull } = network;
  if (full) return loraAtFull ? patched(selectEverything, lora!.patch(graph)) : selectEverything;
  const selector = inferenceSelector(graph, policy!, routerNodes(graph, routers), segments, thresholds);
  return patched(selector, lora?.patch(graph) ?? null);
}

/** Programs kept at a time: each holds memory for its longest run. */
const keptPrograms = 4;

/** Programs by what they compute, compiled when first needed; the one unused for longest makes room. */
export class ProgramCache {
  readonly #programs = new Map<string, Program>();

  /** The program of `name` for a budget: budgets that leave out and keep whole the same sub-layers share one. */
  get(name: string, { full, thresholds }: Decisions, compile: () => Program): Program {
    const decided = [...thresholds.values()].map((t) => (Number.isFinite(t) ? 'routed' : t < 0 ? 'whole' : 'absent'));
    const key = full ? name : `${name} ${decided.join()}`;
    const program = this.#programs.get(key) ?? compile();
    this.#programs.delete(key);
    this.#programs.set(key, program);
    if (this.#programs.size > keptPrograms) {
      const [oldest] = this.#programs.keys();
      // A run under way keeps what it needs.
      this.#programs.get(oldest)!.dispose();
      this.#programs.delete(oldest);
    }
    return program;
  }

  dispose(): void {
    for (const program of this.#programs.values()) program.dispose();
    this.#programs.clear();
  }
}

/**
 * Appends rows of one sequence to the caches and samples a token after the last of them.
 * Feeds: ids, positions i32 [rows], offsets i32 [2], last i32 [1], sampling f32 [1, 4].
 * Outputs: token i32 [1], logprob f32 [1].
 */
export function compileDecode(network: Network, session: Session, point: OperatingPoint): Program {
  const graph = new Graph();
  const rows = graph.dim('rows', decodeRows(network));
  const weights = bindWeights(graph, network.weights);
  const inputs = {
    ids: graph.feed('ids', 'i32', [rows]),
    positions: graph.feed('positions', 'i32', [rows]),
    offsets: graph.feed('offsets', 'i32', [2]),
    caches: session.bind(graph),
  };
  const x = decoder(graph, network.spec, weights, inputs, budgetSelector(graph, network, point, 1));
  sampleLast(graph, network, weights, x, graph.feed('last', 'i32', [1]), graph.feed('sampling', 'f32', [1, 4]));
  return Program.compile(graph, network.engine);
}

/** Only the rows that are sampled from go through the final norm and the head. */
function sampleLast(graph: Graph, network: Network, weights: DecoderNodes, x: Node, last: Node, sampling: Node): void {
  const { ids, logprob } = sample(logits(graph, network.spec, weights, x, { rows: last }), sampling);
  graph.output('token', ids);
  graph.output('logprob', logprob);
}

/** Whole sequences packed end to end. */
export interface PackedBatch {
  /** i32 [rows] */
  readonly ids: Int32Array;
  readonly positions: Int32Array;
  /** i32 [segments + 1] */
  readonly offsets: Int32Array;
}

export interface PackedLimits {
  readonly rows: number;
  readonly segments: number;
}

export type SelectorFactory = (graph: Graph, rows: Dim, segments: Dim) => Selector;

interface Packed {
  readonly graph: Graph;
  readonly rows: Dim;
  readonly segments: Dim;
  readonly weights: DecoderNodes;
  /** The residual stream after the last layer, f32 [rows, hidden]. */
  readonly x: Node;
}

function packed(network: Network, limits: PackedLimits, select: SelectorFactory): Packed {
  const graph = new Graph();
  const rows = graph.dim('rows', limits.rows);
  const segments = graph.dim('segments', limits.segments);
  const weights = bindWeights(graph, network.weights);
  const inputs = {
    ids: graph.feed('ids', 'i32', [rows]),
    positions: graph.feed('positions', 'i32', [rows]),
    offsets: graph.feed('offsets', 'i32', [graph.dim('offsets', limits.segments + 1)]),
  };
  const x = decoder(graph, network.spec, weights, inputs, select(graph, rows, segments));
  return { graph, rows, segments, weights, x };
}

/** Dims of a packed batch. */
export function packedDims(batch: PackedBatch): Record<string, number> {
  const segments = batch.offsets.length - 1;
  return { rows: batch.ids.length, segments, offsets: segments + 1 };
}

/** Output: logits f32 [rows, vocab]. */
export function compileLogits(network: Network, limits: PackedLimits, select: SelectorFactory): Program {
  const { graph, weights, x } = packed(network, limits, select);
  graph.output('logits', logits(graph, network.spec, weights, x));
  return Program.compile(graph, network.engine);
}

/**
 * Feeds targets i32 [rows] (-1: none) besides the batch. Outputs: ce f32 [rows], the cross-entropy in nats (0 without
 * a target); hidden f32 [rows, hidden] after the final norm.
 */
export function compileScore(network: Network, limits: PackedLimits, select: SelectorFactory): Program {
  const { graph, rows, weights, x } = packed(network, limits, select);
  graph.tag('head', () => {
    const hidden = finalNorm(network.spec, weights, x);
    const targets = graph.feed('targets', 'i32', [rows]);
    const weight = graph.feed('weight', 'f32', [rows]);
    graph.output('ce', crossEntropy(hidden, weights.head, targets, weight).row);
    graph.output('hidden', hidden);
  });
  return Program.compile(graph, network.engine);
}

/**
 * Compares with a teacher whose final hidden states are fed as `teacher` f32 [rows, hidden].
 * Outputs: kl, ce f32 [rows] in nats, agree f32 [rows] (1 where the most likely token is the same).
 */
export function compileCompare(network: Network, limits: PackedLimits, select: SelectorFactory): Program {
  const { graph, rows, weights, x } = packed(network, limits, select);
  graph.tag('compare', () => {
    const teacher = graph.feed('teacher', 'f32', [rows, network.spec.hidden]);
    const targets = graph.feed('targets', 'i32', [rows]);
    const weight = graph.feed('weight', 'f32', [rows]);
    const hidden = finalNorm(network.spec, weights, x);
    const { row, agree, ce } = divergence(hidden, teacher, weights.head, weight, { targets });
    graph.output('kl', row);
    graph.output('agree', agree);
    graph.output('ce', ce!);
  });
  return Program.compile(graph, network.engine);
}

/** Rows that enter each sub-layer whose router has a choice, i32, as outputs named by router id. */
export function compileTrace(network: Network, limits: PackedLimits, select: SelectorFactory): Program {
  const { graph } = packed(network, limits, (graph, rows, segments) =>
    recordedSelector(graph, select(graph, rows, segments)),
  );
  return Program.compile(graph, network.engine);
}

/** The score program with what routers chose as outputs (`sequenceCounters`). */
export function compileCountedScore(network: Network, limits: PackedLimits, select: SelectorFactory): Program {
  return compileScore(network, limits, (graph, rows, segments) =>
    recordedExperts(graph, recordedSelector(graph, select(graph, rows, segments))),
  );
}

/** Prefill as generation runs it, for timing: the last row of each segment (feed `last` i32 [segments]) is sampled. */
export function compilePrefill(network: Network, limits: PackedLimits, select: SelectorFactory): Program {
  const { graph, segments, weights, x } = packed(network, limits, select);
  const sampling = graph.feed('sampling', 'f32', [segments, 4]);
  sampleLast(graph, network, weights, x, graph.feed('last', 'i32', [segments]), sampling);
  return Program.compile(graph, network.engine);
}
