// Sequences of one call packed into runs, each at its own budget, and what each of them cost.
import { expertAxisOf, isExperts, routerId } from '../elastic/axes.js';
import { loraFlops, type OperatingPoint } from '../elastic/budget.js';
import { type Routing, routedLayers, routerPlaces } from '../elastic/policy.js';
import { expertRowsOutput, thresholdFeed } from '../elastic/rows.js';
import type { RunResult } from '../graph/index.js';
import { attentionFlops, causalPairs, feedForwardFlops, keyValueFlops } from '../model/flops.js';
import type { Place } from '../model/select.js';
import type { ModelSpec } from '../model/spec.js';
import type { Network } from './network.js';
import type { PackedBatch, PackedLimits } from './programs.js';

/** What decides at the routers of a run (`thresholds` of policy.ts). */
export type Decisions = Pick<OperatingPoint, 'full' | 'thresholds'>;

export interface Sequence {
  readonly ids: Int32Array;
  readonly point: OperatingPoint;
}

const whole = Number.NEGATIVE_INFINITY;
const absent = Number.POSITIVE_INFINITY;

const decision = ({ full, thresholds }: Decisions, id: string): number => (full ? whole : thresholds.get(id)!);

// Sequences may share a run when each gets there the bits that it gets alone. Tokens let in by a threshold of minus infinity
// are as without a router, if its gate is 1; a sub-layer summed from all its experts is rounded otherwise than whole.
// Corrections that a model was trained with are of every budget but full.
function company({ policy, lora, loraAtFull }: Network, point: OperatingPoint): string {
  if (!policy) return '';
  const kinds = routerPlaces(policy).map(({ id, layer, place, axis }) => {
    const at = decision(point, id);
    if (!isExperts(axis)) return policy.gate === 'straight-through' || at !== whole ? '' : 'whole';
    // Rows that no token router lets in choose no expert.
    const entersNone = at === absent && routedLayers(policy, place).includes(layer);
    return at === whole ? 'whole' : at === absent && !entersNone ? 'absent' : 'cut';
  });
  return `${kinds}${lora && !loraAtFull && point.full ? ' full' : ''}`;
}

/** Indices of the sequences of each run, in the order given: as many together as the limits and their budgets allow. */
export function packRuns(network: Network, sequences: readonly Sequence[], limits: PackedLimits): number[][] {
  const runs: number[][] = [];
  const open = new Map<string, { run: number[]; rows: number }>();
  for (const [i, { ids, point }] of sequences.entries()) {
    const key = company(network, point);
    const last = open.get(key);
    if (last && last.rows + ids.length <= limits.rows && last.run.length < limits.segments) {
      last.run.push(i);
      last.rows += ids.length;
      continue;
    }
    const run = [i];
    runs.push(run);
    open.set(key, { run, rows: ids.length });
  }
  return runs;
}

export function packedBatch(sequences: readonly Sequence[]): PackedBatch {
  const offsets = Int32Array.from({ length: sequences.length + 1 });
  for (const [s, { ids }] of sequences.entries()) offsets[s + 1] = offsets[s] + ids.length;
  const ids = new Int32Array(offsets[sequences.length]);
  for (const [s, sequence] of sequences.entries()) ids.set(sequence.ids, offsets[s]);
  return { ids, positions: Int32Array.from(sequences.flatMap((s) => [...s.ids.keys()])), offsets };
}

/** What the program of a run must decide: where all its sequences are whole or none enters there is no router to run. */
export function jointDecisions({ policy }: Network, sequences: readonly Sequence[]): Decisions {
  const full = sequences.every(({ point }) => point.full);
  if (full) return { full, thresholds: new Map() };
  const thresholds = routerPlaces(policy!).map(({ id }) => {
    const all = sequences.map(({ point }) => decision(point, id));
    return [id, all.every((t) => t === all[0] && !Number.isFinite(t)) ? all[0] : 0] as const;
  });
  return { full, thresholds: new Map(thresholds) };
}

/** Feeds of the routers of that program, f32 [segments] each: every sequence's own decision. */
export function decisionFeeds(
  { policy }: Network,
  joint: Decisions,
  sequences: readonly Sequence[],
): Record<string, Float32Array> {
  if (joint.full) return {};
  const feeds = routerPlaces(policy!).flatMap(({ id, axis }) => {
    if (!Number.isFinite(joint.thresholds.get(id))) return [];
    const all = sequences.map(({ point }) => decision(point, id));
    // Not a threshold but a share.
    const shares = all.map((share) => (share === absent ? 0 : share));
    return [[thresholdFeed(id), Float32Array.from(isExperts(axis) ? shares : all)] as const];
  });
  return Object.fromEntries(feeds);
}

/**
 * Divides the counters of a run among its sequences: rows are those the program's outputs list, FLOPs of a sub-layer are
 * divided as its rows cost (of corrections, nearly so).
 *
 * @param joint what the run's program decided
 * @param result of a program whose selector records rows and experts (`recordedSelector`, `recordedExperts`)
 */
export function sequenceCounters(
  { spec, policy, lora }: Network,
  { offsets }: PackedBatch,
  joint: Decisions,
  { counters, outputs }: RunResult,
): RunResult['counters'][] {
  const lengths = Array.from({ length: offsets.length - 1 }, (_, s) => offsets[s + 1] - offsets[s]);
  const result: RunResult['counters'][] = lengths.map(() => ({}));
  for (const [tag, total] of Object.entries(counters)) {
    const [, number, place, part] = /^L(\d+)\.(attn|mlp)(.*)$/.exec(tag) ?? [];
    const layer = Number(number);
    const rows = place === undefined ? undefined : (outputs[routerId(layer, place as Place)] as Int32Array | undefined);
    const entered = rows ? segmentsOf(rows, offsets) : offsets;
    const experts = expertRows(outputs, layer, place as Place | undefined).map((chosen) => ({
      ...{ chosen, at: segmentsOf(chosen, entered) },
    }));
    const costs = lengths.map((length, s): { rows: number; flops: number } => {
      const own = rows?.subarray(entered[s], entered[s + 1]) ?? null;
      const n = own?.length ?? length;
      if (part?.startsWith('/')) {
        const uses = experts.map(({ chosen, at }) => chosen.subarray(at[s], at[s + 1]).map((row) => row - entered[s]));
        const count = uses.reduce((sum, use) => sum + use.length, 0);
        const cost = (use: Int32Array) => headsFlops(spec, policy!, use, own, offsets[s]);
        return { rows: count, flops: place === 'mlp' ? count : uses.reduce((sum, use) => sum + cost(use), 0) };
      }
      const shares = { layer, place: place as Place, tokens: n / length, experts: 1 };
      const corrections = policy?.lora && lora && !joint.full ? loraFlops(spec, policy, shares, length) : 0;
      if (place === undefined || part !== '') return { rows: n, flops: n };
      const router = own ? 2 * length * spec.hidden : 0;
      if (experts.length > 0) {
        const choice = 2 * n * spec.hidden * experts.length;
        const keys = own && policy!.tokens.attn?.keys === 'all' ? length : n;
        const shared = place === 'attn' && policy!.heads!.keys !== 'selected' ? keyValueFlops(spec, keys) : 0;
        return { rows: n, flops: router + choice + shared };
      }
      const dense = place === 'attn' ? attention(spec, policy, length, own, offsets[s]) : feedForwardFlops(spec, n);
      return { rows: n, flops: router + dense + corrections };
    });
    const all = costs.reduce((sum, { flops }) => sum + flops, 0);
    for (const [s, { rows, flops }] of costs.entries()) {
      const share = all === 0 ? 0 : Math.round((total.flops * flops) / all);
      result[s][tag] = { flops: share, rows: total.rows === 0 ? 0 : rows };
    }
  }
  return result;
}

/** The rows, among those that entered, that chose each expert of a sub-layer; none where it is not cut. */
function expertRows(outputs: RunResult['outputs'], layer: number, place: Place | undefined): Int32Array[] {
  const all: Int32Array[] = [];
  if (!place) return all;
  const id = routerId(layer, expertAxisOf(place));
  for (;;) {
    const rows = outputs[expertRowsOutput(id, all.length)] as Int32Array | undefined;
    if (!rows) return all;
    all.push(rows);
  }
}

/** Where the segments lie among ascending rows, as offsets [S + 1]. */
function segmentsOf(rows: Int32Array, offsets: Int32Array): Int32Array {
  let at = 0;
  return offsets.map((end) => {
    while (at < rows.length && rows[at] < end) at++;
    return at;
  });
}

/**
 * FLOPs of one of the experts of an attention in one sequence.
 *
 * @param chosen the rows that chose it, counted among those that entered
 * @param own those that entered; null: all
 * @param start the sequence's first row
 */
function headsFlops(
  { hidden, heads, headDim }: ModelSpec,
  policy: Pick<Routing, 'tokens' | 'heads'>,
  chosen: Int32Array,
  own: Int32Array | null,
  start: number,
): number {
  const n = chosen.length;
  const { count, keys } = policy.heads!;
  const units = (heads / count) * headDim;
  const products = 2 * n * hidden * 2 * units;
  if (keys === 'selected') return products + 2 * n * hidden * 2 * headDim + 4 * units * causalPairs([n]);
  const seen = own && policy.tokens.attn!.keys === 'all' ? (at: number) => own[at] - start : (at: number) => at;
  return products + 4 * units * chosen.reduce((sum, at) => sum + seen(at) + 1, 0);
}

/** FLOPs of the attention of one sequence of `length` rows, of which `rows` enter; null: all. */
function attention(
  spec: ModelSpec,
  policy: Pick<Routing, 'tokens'> | null,
  length: number,
  rows: Int32Array | null,
  start: number,
): number {
  if (!rows) return attentionFlops(spec, [length]);
  if (policy!.tokens.attn!.keys === 'selected') return attentionFlops(spec, [rows.length]);
  // A query sees every row up to its own; rows that are no queries have keys and values all the same.
  const pairs = rows.reduce((sum, row) => sum + row - start + 1, 0);
  const scores = 4 * spec.headDim * spec.heads;
  const own = attentionFlops(spec, [rows.length]) - scores * causalPairs([rows.length]);
  return own + scores * pairs + keyValueFlops(spec, length - rows.length);
}
