// Which sub-layers each token of a text entered.

import { axes, axisTraits, isExperts, routerId, specByAxis } from '../elastic/axes.js';
import type { OperatingPoint } from '../elastic/budget.js';
import { routerCapacities, routerPlaces, usedShare } from '../elastic/policy.js';
import { enteredOutput } from '../elastic/rows.js';
import { type Place, places } from '../model/select.js';
import type { TypedArray } from '../native/index.js';
import type { Network } from './network.js';

/** Which sub-layers each token of a text used. */
export interface ElasticTrace {
  /**
   * The text each token adds; joined they are the decoded text. Empty for special tokens and where the character is not
   * complete yet. Without a tokenizer, the id and a space.
   */
  readonly tokens: readonly string[];
  /** Layers that each token used: those where it entered attention, the FFN or both. */
  readonly depth: Uint8Array;
  /** 1 where a token entered a layer's attention, [tokens, layers]. */
  readonly attn: Uint8Array;
  /** 1 where a token entered a layer's FFN, [tokens, layers]. */
  readonly mlp: Uint8Array;
  /** Share of a layer's attention heads that each token which enters uses, [layers]: 1 where heads are not routed. */
  readonly headShare: Float32Array;
  /** Share of a layer's FFN that each token which enters uses, [layers]: 1 where it is neither cut into blocks nor nested. */
  readonly blockShare: Float32Array;
  /** Of the model. */
  readonly layers: number;
  /** The bytes as base64. */
  toJSON(): {
    tokens: readonly string[];
    layers: number;
    depth: string;
    attn: string;
    mlp: string;
    headShare: number[];
    blockShare: number[];
  };
}

/** Whether some rows may enter a sub-layer and some not: there is something to run. */
export function choosesTokens({ policy }: Network, { thresholds }: OperatingPoint): boolean {
  return (
    policy !== null &&
    routerPlaces(policy).some(({ id, axis }) => !isExperts(axis) && Number.isFinite(thresholds.get(id)))
  );
}

/**
 * Share of each sub-layer's experts, or of its units, that a token which enters uses at a budget, [layers]; by mass, the
 * expected mean.
 */
export function expertShares({ spec, policy }: Network, point: OperatingPoint): Record<Place, Float32Array> {
  const whole = () => new Float32Array(spec.layers).fill(1);
  const shares = { attn: whole(), mlp: whole() };
  if (!policy) return shares;
  for (const [layer, units] of (point.widths ?? []).entries()) shares.mlp[layer] = units / spec.ffn;
  const capacities = routerCapacities(policy, specByAxis(point.spec));
  for (const [i, { layer, place, axis }] of routerPlaces(policy).entries()) {
    if (isExperts(axis)) shares[place][layer] = usedShare(policy[axis]!, capacities[i]);
  }
  return shares;
}

/** @param outputs of the program of compileTrace at `point`: rows of the sub-layers where some tokens enter and some do not */
export function traceOf(
  network: Network,
  ids: Int32Array,
  point: OperatingPoint,
  outputs: Readonly<Record<string, TypedArray>>,
): ElasticTrace {
  const { layers } = network.spec;
  const isAbsent = (id: string) => point.thresholds.get(id) === Number.POSITIVE_INFINITY;
  const entered = (place: Place): Uint8Array => {
    const bits = new Uint8Array(ids.length * layers);
    for (let layer = 0; layer < layers; layer++) {
      const absent = axes.some((axis) => axisTraits[axis].places.includes(place) && isAbsent(routerId(layer, axis)));
      const rows: Iterable<number> = absent ? [] : (outputs[enteredOutput(layer, place)] ?? ids.keys());
      for (const row of rows) bits[row * layers + layer] = 1;
    }
    return bits;
  };
  const [attn, mlp] = places.map(entered);
  const depth = new Uint8Array(ids.length);
  for (const i of attn.keys()) depth[Math.floor(i / layers)] += attn[i] | mlp[i];
  const base64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64');
  const tokens = tokenPieces(ids, network.tokenizer);
  const { attn: headShare, mlp: blockShare } = expertShares(network, point);
  return {
    ...{ tokens, depth, attn, mlp, headShare, blockShare, layers },
    toJSON: () => ({
      ...{ tokens, layers, depth: base64(depth), attn: base64(attn), mlp: base64(mlp) },
      headShare: [...headShare],
      blockShare: [...blockShare],
    }),
  };
}

function tokenPieces(ids: Int32Array, tokenizer: Network['tokenizer']): string[] {
  if (!tokenizer) return Array.from(ids, (id) => `${id} `);
  const stream = tokenizer.stream();
  const pieces = Array.from(ids, (id) => stream.push(id));
  const rest = stream.end();
  if (rest !== '') pieces[pieces.length - 1] += rest;
  return pieces;
}
