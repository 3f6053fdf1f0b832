// The programs inference runs: next token with caches, and whole sequences without.
import type { OperatingPoint } from '../elastic/budget.js';
import { patched } from '../elastic/lora.js';
import { nestedWidth, nestedWidths, widthDims } from '../elastic/nested.js';
import { inferenceSelector, recordedExperts, recordedSelector, routerNodes } from '../elastic/rows.js';
import { crossEntropy, type Dim, divergence, Graph, KeptPrograms, type Node, Program, sample } from '../graph/index.js';
import { decoder, finalNorm, logits } from '../model/decoder.js';
import { type Selector, selectEverything } from '../model/select.js';
import { bindWeights, type DecoderNodes } from '../model/weights.js';
import type { KeyValueCache } from './engine/cache.js';
import type { Decisions } from './mixed.js';
import type { Network } from './network.js';

/**
 * The selector of a model at a budget: feeds `threshold.<router id>` where it is finite, and has `budgetDims`, or with groups of
 * widths `groupDims` and `groupFeeds`; where sequences go on in several runs also `decidedFeed`, and its outputs.
 *
 * @param rows of sequences that may have adapters: feeds those of `adapterFeeds`
 */
export function budgetSelector(
  graph: Graph,
  network: Network,
  { full, thresholds, widthGroups: groups = 1 }: Decisions,
  segments: Dim,
  { resumed = false, rows }: { resumed?: boolean; rows?: Dim } = {},
): Selector {
  const { spec, policy, most, routers, lora, loraAtFull, adapters } = network;
  const selector = full
    ? selectEverything
    : inferenceSelector(graph, policy!, routerNodes(graph, routers), segments, thresholds, { resumed });
  const chosen = () => graph.feed('adapters', 'i32', [segments]);
  const patch =
    adapters && rows
      ? adapters.patch(graph, chosen(), offsetsFeed(graph, segments), rows)
      : full && !loraAtFull
        ? null
        : (lora?.patch(graph) ?? null);
  const corrected = patched(selector, patch);
  const nested = policy?.nested;
  if (!nested) return corrected;
  return groups === 1
    ? { ...corrected, width: nestedWidth(graph, nested, spec.ffn, most.widths) }
    : { ...corrected, widths: nestedWidths(graph, nested, spec.ffn, most.widths, { segments, groups }) };
}

/** i32 [segments + 1] */
const offsetsFeed = (graph: Graph, segments: Dim): Node =>
  graph.feed('offsets', 'i32', [graph.dim('offsets', segments.bound + 1)]);

/** The adapter of every sequence of a run (`adapterNumber`). */
export const adapterFeeds = ({ adapters }: Network, numbers: readonly number[]): Record<string, Int32Array> =>
  adapters ? { adapters: Int32Array.from(numbers) } : {};

/** Dims of a program with `budgetSelector` whose sequences are all at one budget: widths of nested feed-forwards. */
export const budgetDims = (
  { spec, policy }: Network,
  { widths }: Pick<OperatingPoint, 'widths'>,
): Record<string, number> => widthDims(policy?.nested, widths, spec.ffn);

// Budgets that leave out and keep whole the same sub-layers share a program, whatever their thresholds and widths.
function decisionKey({ lora, loraAtFull }: Network, { full, thresholds, widthGroups = 1 }: Decisions): string {
  const decided = [...thresholds.values()].map((t) => (Number.isFinite(t) ? 'routed' : t < 0 ? 'whole' : 'absent'));
  return `${decided}${lora && !loraAtFull && !full ? ' corrected' : ''} ${widthGroups}`;
}

/**
 * Tokens that speculative decoding drafts at most before they are verified. Few enough for the head's product to be one of few
 * rows on a device, as in plain decoding, and so to have its bits (docs/gpu.md).
 */
export const maxDraftTokens = 16;

/** Programs kept at a time. */
const keptPrograms = 4;

/** The programs of a network, by what they compute and the budgets that they are for. */
export class ProgramCache {
  readonly #network: Network;
  readonly #programs: KeptPrograms;

  constructor(network: Network, kept = keptPrograms) {
    this.#network = network;
    this.#programs = new KeptPrograms(kept);
  }

  /** The program of `name` for a budget. */
  get(name: string, decisions: Decisions, compile: () => Program): Program {
    return this.#programs.get(`${name} ${decisionKey(this.#network, decisions)}`, compile);
  }

  dispose(): void {
    this.#programs.dispose();
  }
}

/** What one run of `compileStep` appends at most. */
export interface StepLimits {
  readonly rows: number;
  readonly sequences: number;
  /** Rows sampled from. */
  readonly sampled: number;
}

/**
 * Appends rows of several sequences to their caches and samples a token after some of them.
 * Dims: rows, segments, offsets (segments + 1), sampled, and those of `budgetSelector`.
 * Feeds: ids, positions i32 [rows], offsets i32 [segments + 1], slots i32 [segments], last i32 [sampled] (rows), sampling
 * f32 [sampled, 4]; those of `budgetSelector` with adapters, and of what was decided about sequences (`decidedFeeds`). Outputs: token i32 [sampled], logprob f32 [sampled].
 *
 * @param recorded what routers choose becomes outputs, too (`sequenceCounters`, `appendedRows`)
 */
export function compileStep(
  network: Network,
  cache: KeyValueCache,
  limits: StepLimits,
  decisions: Decisions,
  recorded = false,
): Program {
  const graph = new Graph();
  const rows = graph.dim('rows', limits.rows);
  const segments = graph.dim('segments', limits.sequences);
  const sampled = graph.dim('sampled', limits.sampled);
  const weights = bindWeights(graph, network.weights);
  const inputs = {
    ids: graph.feed('ids', 'i32', [rows]),
    positions: graph.feed('positions', 'i32', [rows]),
    offsets: offsetsFeed(graph, segments),
    caches: cache.caches(graph, graph.feed('slots', 'i32', [segments])),
  };
  const chosen = budgetSelector(graph, network, decisions, segments, { resumed: true, rows });
  const selector = recorded ? recordedExperts(graph, recordedSelector(graph, chosen)) : chosen;
  const x = decoder(graph, network.spec, weights, inputs, selector);
  const sampling = graph.feed('sampling', 'f32', [sampled, 4]);
  sampleLast(graph, network, weights, x, graph.feed('last', 'i32', [sampled]), sampling);
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
    offsets: offsetsFeed(graph, segments),
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
    graph.output('ce', crossEntropy(hidden, weights.head, targets, weight, network.spec.logitSoftcap).row);
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
    const { logitSoftcap: softcap } = network.spec;
    const options = { targets, softcap, teacherSoftcap: softcap };
    const { row, agree, ce } = divergence(hidden, teacher, weights.head, weight, options);
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
