// What routers have decided about sequences as wholes, in their first run, and about tiles of them that go on in the next; kept
// with a sequence's keys and values.
import { ofSequences } from '../../elastic/axes.js';
import { routerPlaces } from '../../elastic/policy.js';
import { decidedFeed, decidedOutput, decidedWidth } from '../../elastic/rows.js';
import type { RunResult } from '../../graph/index.js';
import type { Decisions } from '../mixed.js';
import type { Network } from '../network.js';

/** What is held of a sequence (`decidedFeed`), by router id: of routers of sequences one value, of tiles more. */
export type Decided = Map<string, Float32Array>;

/** Routers that hold something in a program, and how much of each sequence. */
function deciding({ policy }: Network, { full, thresholds }: Decisions) {
  if (full || !policy) return [];
  return routerPlaces(policy).flatMap((router) => {
    const width = Number.isFinite(thresholds.get(router.id)) ? decidedWidth(policy, router.axis) : 0;
    return width > 0 ? [{ ...router, width }] : [];
  });
}

/** Feeds f32 [segments, width] of a program that decides so: what was decided about its sequences before. */
export function decidedFeeds(
  network: Network,
  joint: Decisions,
  sequences: readonly Decided[],
): Record<string, Float32Array> {
  const feeds = deciding(network, joint).map(({ id, width }) => {
    const held = new Float32Array(sequences.length * width).fill(Number.NaN);
    for (const [s, decided] of sequences.entries()) held.set(decided.get(id) ?? [], s * width);
    return [decidedFeed(id), held] as const;
  });
  return Object.fromEntries(feeds);
}

/** Keeps what a run of that program decided about sequences that have a choice there, each run at a budget. */
export function keepDecided(
  network: Network,
  joint: Decisions,
  { outputs }: Pick<RunResult, 'outputs'>,
  sequences: readonly { readonly decided: Decided; readonly point: Decisions }[],
): void {
  for (const { id, width } of deciding(network, joint)) {
    const held = outputs[decidedOutput(id)] as Float32Array;
    for (const [s, { decided, point }] of sequences.entries())
      if (Number.isFinite(point.thresholds.get(id))) decided.set(id, held.slice(s * width, (s + 1) * width));
  }
}

/**
 * Takes back what rows from a position on decided about tiles. There is one decision before it: so few rows are taken back that
 * they are of two tiles at most.
 */
export function takeBack(decided: Decided, rows: number): void {
  for (const [id, held] of decided) {
    if (held.length === 1) continue;
    const decision = held.length / 2;
    const kept = [held.subarray(0, decision), held.subarray(decision)].filter((values) => !(values.at(-1)! >= rows));
    const next = new Float32Array(held.length).fill(Number.NaN);
    for (const [i, values] of kept.entries()) next.set(values, i * decision);
    decided.set(id, next);
  }
}

/** Layers whose attention a sequence skips for good at these thresholds. */
export function skippedAttention(network: Network, { full, thresholds }: Decisions, decided: Decided): number[] {
  return deciding(network, { full, thresholds }).flatMap(({ id, axis, layer, places }) => {
    const [score] = decided.get(id) ?? [];
    const skips = ofSequences(axis) && score !== undefined && !(score > thresholds.get(id)!);
    return skips && places.includes('attn') ? [layer] : [];
  });
}
