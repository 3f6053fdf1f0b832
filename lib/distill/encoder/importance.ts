// Importance of heads and feed-forward units (COST-EFF, arXiv 2210.15523, section 3.2): first-order Taylor, and which are kept.
import type { Kept } from '../../model/slim.js';
import type { EncoderSpec } from '../../model/spec.js';
import { layerOf } from '../../model/spec.js';
import type { ExitedEncoder } from './exits.js';

/** Importance of every head and unit, by layer. */
export interface Importance {
  readonly heads: readonly Float64Array[];
  readonly units: readonly Float64Array[];
}

/** The weights whose gradients importance is made of. */
export const isRanked = (name: string): boolean => /^layers\.\d+\.(o|up|down)\.weight$/.test(name);

/**
 * Importance `|A w|` of weights w, A being the sum over batches of the magnitude of the gradient, f32 by name: of a head the sum over the
 * columns of the output projection that are its own, of a unit over its row of the first matrix and its column of the second.
 */
export function importanceOf({ spec, weights }: ExitedEncoder, sums: ReadonlyMap<string, Float32Array>): Importance {
  const of = (layer: number, part: string): ((index: number) => number) => {
    const name = `layers.${layer}.${part}.weight`;
    const [w, a] = [weights.get(name)!, sums.get(name)!];
    return (index) => Math.abs(w[index] * a[index]);
  };
  const layers = spec.perLayer.map((_, layer) => {
    const { heads, headDim, ffn, hidden } = layerOf(spec, layer);
    const [o, up, down] = [of(layer, 'o'), of(layer, 'up'), of(layer, 'down')];
    const [ofHeads, ofUnits] = [new Float64Array(heads), new Float64Array(ffn)];
    for (let d = 0; d < hidden; d++) {
      for (let i = 0; i < heads * headDim; i++) ofHeads[Math.floor(i / headDim)] += o(d * heads * headDim + i);
      for (let u = 0; u < ffn; u++) ofUnits[u] += up(u * hidden + d) + down(d * ffn + u);
    }
    return { heads: ofHeads, units: ofUnits };
  });
  return { heads: layers.map(({ heads }) => heads), units: layers.map(({ units }) => units) };
}

/** How parts are divided among layers: as many in each, or the most important ones wherever they are, at least one in each. */
export type Allocation = 'uniform' | 'importance';

/** The most important parts, ids ascending; of equal ones the first. @param count of each layer, or their mean over layers */
export function keptParts(
  importance: Importance,
  { heads, ffn }: { heads: number; ffn: number },
  allocation: Allocation,
): Kept {
  return { heads: best(importance.heads, heads, allocation), units: best(importance.units, ffn, allocation) };
}

function best(scores: readonly Float64Array[], count: number, allocation: Allocation): number[][] {
  const ranked = scores.map((own) => Array.from(own, (_, i) => i).sort((i, j) => own[j] - own[i] || i - j));
  const counts = scores.map((own) => Math.min(allocation === 'uniform' ? count : 1, own.length));
  if (allocation === 'importance') {
    const rest = ranked.flatMap((order, layer) => order.slice(1).map((id) => ({ layer, score: scores[layer][id] })));
    rest.sort((a, b) => b.score - a.score || a.layer - b.layer);
    for (const { layer } of rest.slice(0, count * scores.length - scores.length)) counts[layer]++;
  }
  return ranked.map((order, layer) => order.slice(0, counts[layer]).sort((a, b) => a - b));
}

/** Heads and units of every layer, and the rank of embeddings, after `event` of `events` events: straight lines to the target. */
export function sizesAfter(
  spec: EncoderSpec,
  target: { heads: number; ffn: number; rank?: number },
  event: number,
  events: number,
): { heads: number; ffn: number; rank: number | null } {
  const between = (from: number, to: number) => Math.round(from + ((to - from) * event) / events);
  return {
    heads: between(spec.heads, target.heads),
    ffn: between(spec.ffn, target.ffn),
    rank:
      target.rank === undefined
        ? spec.encoder.embeddingRank
        : between(spec.encoder.embeddingRank ?? spec.hidden, target.rank),
  };
}
