// What routers of sequences have decided: taken in a sequence's first run, kept with its keys and values for all others.
import { ofSequences } from '../../elastic/axes.js';
import { routerPlaces } from '../../elastic/policy.js';
import { decidedFeed, decidedOutput } from '../../elastic/rows.js';
import type { RunResult } from '../../graph/index.js';
import type { Decisions } from '../mixed.js';
import type { Network } from '../network.js';

/** Scores of a sequence, by router id. */
export type Decided = Map<string, number>;

/** Routers of sequences that a program has. */
function deciding({ policy }: Network, { full, thresholds }: Decisions) {
  if (full || !policy) return [];
  return routerPlaces(policy).filter(({ id, axis }) => ofSequences(axis) && Number.isFinite(thresholds.get(id)));
}

/** Feeds f32 [segments] of a program that decides so: what its sequences have decided before. */
export function decidedFeeds(
  network: Network,
  joint: Decisions,
  sequences: readonly Decided[],
): Record<string, Float32Array> {
  const feeds = deciding(network, joint).map(({ id }) => {
    return [decidedFeed(id), Float32Array.from(sequences, (decided) => decided.get(id) ?? Number.NaN)] as const;
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
  for (const { id } of deciding(network, joint)) {
    const scores = outputs[decidedOutput(id)];
    for (const [s, { decided, point }] of sequences.entries())
      if (Number.isFinite(point.thresholds.get(id))) decided.set(id, scores[s]);
  }
}

/** Layers whose attention a sequence skips for good at these thresholds. */
export function skippedAttention(network: Network, { full, thresholds }: Decisions, decided: Decided): number[] {
  return deciding(network, { full, thresholds }).flatMap(({ id, layer, places }) => {
    const score = decided.get(id);
    const skips = score !== undefined && !(score > thresholds.get(id)!);
    return skips && places.includes('attn') ? [layer] : [];
  });
}
