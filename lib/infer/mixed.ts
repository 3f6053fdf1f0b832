// Sequences of one call packed into runs, each at its own budget, and what each of them cost.
import { axisTraits, expertAxisOf, isExperts, ofSequences, routerId } from '../elastic/axes.js';
import type { OperatingPoint } from '../elastic/budget.js';
import { type Costed, loraFlops } from '../elastic/cost.js';
import { groupDims, groupFeeds, mostWidths, widthGroups } from '../elastic/nested.js';
import { type AttentionKeys, type Experts, keysOf, routerPlaces, rowAxisOf } from '../elastic/policy.js';
import { type CachedKeys, cachedKeys, enteredOutput, expertRowsOutput, thresholdFeed } from '../elastic/rows.js';
import type { RunResult } from '../graph/index.js';
import { attentionFlops, causalPairs, feedForwardFlops, inWindow, keyValueFlops } from '../model/flops.js';
import type { Place } from '../model/select.js';
import { type LayerSpec, layerOf, type ModelSpec } from '../model/spec.js';
import type { Network } from './network.js';
import type { PackedBatch, PackedLimits } from './programs.js';

/** What decides at the routers of a run (`thresholds` of policy.ts), and how many widths it has room for. */
export interface Decisions extends Pick<OperatingPoint, 'full' | 'thresholds'> {
  /** Of nested feed-forwards in any layer (`nestedWidths`); default 1. */
  readonly widthGroups?: number;
}

/** The same of sequences that share a run, and their widths: those of each nested layer in turn, in units. */
export interface Joint extends Decisions {
  readonly widths: readonly (readonly number[])[];
}

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
function company({ policy, lora, loraAtFull }: Network, point: Decisions): string {
  if (!policy) return '';
  const kinds = routerPlaces(policy).map(({ id, layer, place, axis }) => {
    const at = decision(point, id);
    if (!isExperts(axis)) return policy.gate === 'straight-through' || at !== whole ? '' : 'whole';
    // Rows that no router of rows lets in choose no expert.
    const entersNone = at === absent && rowAxisOf(policy, layer, place) !== null;
    return at === whole ? 'whole' : at === absent && !entersNone ? 'absent' : 'cut';
  });
  return `${kinds}${lora && !loraAtFull && point.full ? ' full' : ''}`;
}

/** Units of a nested layer at a budget. */
const unitsAt = ({ spec }: Network, { widths }: OperatingPoint, layer: number): number => widths?.[layer] ?? spec.ffn;

/** The widths of a run while sequences join it: so many of each nested layer have room (`mostWidths`). */
export class RunWidths {
  readonly #network: Network;
  readonly #byLayer: readonly Set<number>[];

  constructor(network: Network) {
    this.#network = network;
    this.#byLayer = network.policy?.nested?.layers.map(() => new Set()) ?? [];
  }

  /** Whether a sequence at a budget may join; it then has. */
  join(point: OperatingPoint): boolean {
    const units = this.#network.policy?.nested?.layers.map((layer) => unitsAt(this.#network, point, layer)) ?? [];
    if (!this.#byLayer.every((seen, i) => seen.size < mostWidths || seen.has(units[i]))) return false;
    for (const [i, seen] of this.#byLayer.entries()) seen.add(units[i]);
    return true;
  }

  /** Of each nested layer in turn, in units. */
  get widths(): number[][] {
    return this.#byLayer.map((seen) => [...seen]);
  }
}

/**
 * Which sequences may share a run that appends to their caches. Rows that are keys whether or not they enter attention
 * are so for all sequences of the run, and one whose budget leaves that attention out has no place for them.
 */
export function cachedCompany(network: Network, point: Decisions): string {
  const { policy, spec } = network;
  const layers = policy ? [...spec.perLayer.keys()].filter((layer) => keysOf(policy, layer) === 'all') : [];
  const keys = layers.map((layer) => (keysAt(network, point, layer) ? 'keys' : 'none'));
  return `${company(network, point)} ${keys}`;
}

const wholeKeys: CachedKeys = { parts: 1, everyRow: true, everyRowOrNone: true };

/** What the caches hold of a layer's attention when a program decides so; null: it runs none, or uses keys of another. */
export function keysAt({ spec, policy }: Network, { thresholds }: Decisions, layer: number): CachedKeys | null {
  if (spec.perLayer[layer].keysOf !== null) return null;
  return policy ? cachedKeys(policy, thresholds, layer, spec.kvHeads) : wholeKeys;
}

/** Whether every row that runs has keys in each layer with attention. */
export const keepsEveryRow = (network: Network, point: Decisions): boolean =>
  network.spec.perLayer.every((_, layer) => keysAt(network, point, layer)?.everyRow ?? true);

/** Indices of the sequences of each run, in the order given: as many together as the limits and their budgets allow. */
export function packRuns(network: Network, sequences: readonly Sequence[], limits: PackedLimits): number[][] {
  const runs: number[][] = [];
  const open = new Map<string, { run: number[]; rows: number; widths: RunWidths }>();
  for (const [i, { ids, point }] of sequences.entries()) {
    const key = company(network, point);
    const last = open.get(key);
    const fits = last && last.rows + ids.length <= limits.rows && last.run.length < limits.segments;
    if (fits && last.widths.join(point)) {
      last.run.push(i);
      last.rows += ids.length;
      continue;
    }
    const [run, widths] = [[i], new RunWidths(network)];
    widths.join(point);
    runs.push(run);
    open.set(key, { run, rows: ids.length, widths });
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
export function jointDecisions(network: Network, sequences: readonly Sequence[]): Joint {
  const run = new RunWidths(network);
  for (const { point } of sequences) run.join(point);
  const { widths } = run;
  const full = sequences.every(({ point }) => point.full);
  if (full) return { full, thresholds: new Map(), widths };
  const thresholds = routerPlaces(network.policy!).map(({ id }) => {
    const all = sequences.map(({ point }) => decision(point, id));
    return [id, all.every((t) => t === all[0] && !Number.isFinite(t)) ? all[0] : 0] as const;
  });
  return { full, thresholds: new Map(thresholds), widths, widthGroups: widthGroups(widths) };
}

/** Dims of that program: its widths. */
export const jointDims = ({ policy }: Network, { widths }: Joint): Record<string, number> =>
  policy?.nested ? groupDims(policy.nested, widths) : {};

/** Feeds of that program, f32 [segments] each: every sequence's own decision at routers, and which width it has. */
export function decisionFeeds(
  network: Network,
  joint: Joint,
  sequences: readonly Sequence[],
): Record<string, Float32Array> {
  if (joint.full) return {};
  const { policy } = network;
  const units = sequences.map(
    ({ point }) =>
      (layer: number) =>
        unitsAt(network, point, layer),
  );
  const widths = policy!.nested ? groupFeeds(policy!.nested, joint.widths, units) : {};
  const feeds = routerPlaces(policy!).flatMap(({ id, axis }) => {
    if (!Number.isFinite(joint.thresholds.get(id))) return [];
    const all = sequences.map(({ point }) => decision(point, id));
    // Not a threshold but a share.
    const shares = all.map((share) => (share === absent ? 0 : share));
    return [[thresholdFeed(id), Float32Array.from(isExperts(axis) ? shares : all)] as const];
  });
  return { ...widths, ...Object.fromEntries(feeds) };
}

/**
 * Rows that a run appended to the caches of each of its sequences, [layers * kvHeads] as in `SequenceKeys`.
 *
 * @param result of a program that records rows and experts, unless every row has keys
 */
export function appendedRows(
  network: Network,
  { offsets }: Pick<PackedBatch, 'offsets'>,
  joint: Decisions,
  { outputs }: Pick<RunResult, 'outputs'>,
): Int32Array[] {
  const { spec, policy } = network;
  const result = Array.from({ length: offsets.length - 1 }, () => new Int32Array(spec.layers * spec.kvHeads));
  for (let layer = 0; layer < spec.layers; layer++) {
    const kept = keysAt(network, joint, layer);
    if (!kept) continue;
    const rows = outputs[enteredOutput(layer, 'attn')] as Int32Array | undefined;
    const entered = rows ? segmentsOf(rows, offsets) : offsets;
    const ofEntered = rows && keysOf(policy!, layer) === 'selected' ? entered : offsets;
    const own = policy?.heads?.keys === 'selected' ? expertRows(outputs, layer, 'attn') : [];
    for (let part = 0; part < kept.parts; part++) {
      const ends = own.length > 0 ? segmentsOf(own[part], entered) : ofEntered;
      for (const [s, appended] of result.entries()) appended[layer * spec.kvHeads + part] = ends[s + 1] - ends[s];
    }
  }
  return result;
}

/** What else a run did that continued sequences from caches. */
interface Continued {
  /** Rows of sequence s whose logits were computed. */
  headRows(s: number): number;
  /** Rows that its caches held before, of a part of a layer's heads of keys. */
  cached(s: number, layer: number, part: number): number;
}

/**
 * Divides the counters of a run among its sequences: rows are those the program's outputs list, FLOPs of a sub-layer are
 * divided as its rows cost at its width (of corrections, nearly so).
 *
 * @param joint what the run's program decided
 * @param result of a program whose selector records rows and experts (`recordedSelector`, `recordedExperts`)
 * @param continued of a program with caches; else logits are those of all rows
 */
export function sequenceCounters(
  { spec, policy, lora, adapters }: Network,
  { offsets }: Pick<PackedBatch, 'offsets'>,
  joint: Decisions,
  { counters, outputs }: Pick<RunResult, 'counters' | 'outputs'>,
  sequences: readonly Pick<Sequence, 'point'>[],
  continued?: Continued,
): RunResult['counters'][] {
  const cached: Continued['cached'] = (...of) => continued?.cached(...of) ?? 0;
  const lengths = Array.from({ length: offsets.length - 1 }, (_, s) => offsets[s + 1] - offsets[s]);
  const result: RunResult['counters'][] = lengths.map(() => ({}));
  for (const [tag, total] of Object.entries(counters)) {
    const [, number, place, part] = /^L(\d+)\.(attn|mlp)(.*)$/.exec(tag) ?? [];
    const layer = Number(number);
    const rows =
      place === undefined ? undefined : (outputs[enteredOutput(layer, place as Place)] as Int32Array | undefined);
    const axis = place === undefined || !policy ? null : rowAxisOf(policy, layer, place as Place);
    const entered = rows ? segmentsOf(rows, offsets) : offsets;
    const experts = expertRows(outputs, layer, place as Place | undefined).map((chosen) => ({
      ...{ chosen, at: segmentsOf(chosen, entered) },
    }));
    const whole = layerOf(spec, layer);
    const costs = lengths.map((length, s): { rows: number; flops: number } => {
      const own = rows?.subarray(entered[s], entered[s + 1]) ?? null;
      const n = own?.length ?? (tag === 'head' && continued ? continued.headRows(s) : length);
      if (place === undefined) return { rows: n, flops: n };
      const units = sequences[s].point.widths?.[layer] ?? whole.ffn;
      const sizes = units === whole.ffn ? whole : { ...whole, ffn: units };
      const keys = own && keysOf(policy!, layer);
      if (part?.startsWith('/')) {
        const uses = experts.map(({ chosen, at }) => chosen.subarray(at[s], at[s + 1]).map((row) => row - entered[s]));
        const count = uses.reduce((sum, use) => sum + use.length, 0);
        const cost = (use: Int32Array, expert: number) => {
          const before = cached(s, layer, Math.floor((expert * spec.kvHeads) / uses.length));
          return headsFlops(sizes, policy!.heads!, keys, use, own, offsets[s], before);
        };
        return { rows: count, flops: place === 'mlp' ? count : uses.reduce((sum, use, e) => sum + cost(use, e), 0) };
      }
      const shares = { layer, place: place as Place, tokens: n / length, experts: 1, units };
      if (part !== '') return { rows: n, flops: n };
      const trained = policy?.lora && lora && !joint.full ? [policy.lora] : [];
      // Without a policy all rows enter, and nothing else of it is asked for.
      const corrections = [...trained, ...(adapters?.ofLayer(layer) ?? [])]
        .map((lora) => loraFlops(spec, { ...policy, lora } as Costed, shares, length))
        .reduce((sum, flops) => sum + flops, 0);
      const decides = own !== null && axisTraits[axis!].places[0] === place;
      const router = decides ? 2 * (ofSequences(axis!) ? 1 : length) * spec.hidden : 0;
      if (experts.length > 0) {
        const choice = 2 * n * spec.hidden * experts.length;
        const withKeys = keys === 'all' ? length : n;
        const shared = place === 'attn' && policy!.heads!.keys !== 'selected' ? keyValueFlops(spec, withKeys) : 0;
        return { rows: n, flops: router + choice + shared };
      }
      const before = place === 'attn' ? cached(s, sizes.keysOf ?? layer, 0) : 0;
      const dense =
        place === 'attn' ? attention(sizes, keys, length, own, offsets[s], before) : feedForwardFlops(sizes, n);
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
 * @param ofRows which rows have keys where not all enter
 * @param chosen the rows that chose it, counted among those that entered
 * @param own those that entered; null: all
 * @param start the sequence's first row
 * @param cached rows that its part of the cache held before
 */
function headsFlops(
  { hidden, heads, headDim, window }: ModelSpec & LayerSpec,
  { count, keys }: Experts,
  ofRows: AttentionKeys | null,
  chosen: Int32Array,
  own: Int32Array | null,
  start: number,
  cached: number,
): number {
  const n = chosen.length;
  const units = (heads / count) * headDim;
  const products = 2 * n * hidden * 2 * units;
  if (keys === 'selected')
    return products + 2 * n * hidden * 2 * headDim + 4 * units * causalPairs([n], [cached], window);
  const seen = own && ofRows === 'all' ? (at: number) => own[at] - start : (at: number) => at;
  return products + 4 * units * chosen.reduce((sum, at) => sum + inWindow(cached + seen(at) + 1, window), 0);
}

/** FLOPs of the attention of one sequence of `length` rows after `cached` ones, of which `rows` enter; null: all. */
function attention(
  spec: ModelSpec & LayerSpec,
  keys: AttentionKeys | null,
  length: number,
  rows: Int32Array | null,
  start: number,
  cached: number,
): number {
  if (!rows) return attentionFlops(spec, [length], [cached]);
  if (keys === 'selected') return attentionFlops(spec, [rows.length], [cached]);
  // A query sees every row up to its own; rows that are no queries have keys and values all the same.
  const pairs = rows.reduce((sum, row) => sum + inWindow(cached + row - start + 1, spec.window), 0);
  const scores = 4 * spec.headDim * spec.heads;
  const own = attentionFlops(spec, [rows.length]) - scores * causalPairs([rows.length], [], spec.window);
  return own + scores * pairs + keyValueFlops(spec, length - rows.length);
}
