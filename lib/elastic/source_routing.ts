// Routing of the tokens of sources: which of them enter the sub-layers of an encoder-decoder model's encoder, of its layers and of its modules.
import type { Dim } from '../graph/dims.js';
import type { Graph } from '../graph/graph.js';
import { attentionFlops, feedForwardFlops, keyValueFlops } from '../model/flops.js';
import { type Place, places } from '../model/select.js';
import { layerOf, type ModelSpec } from '../model/spec.js';
import { type Capacity, type ElasticSpec, isCapacity, routerId } from './axes.js';
import { type ElasticPolicy, type Routing, type SourceTokens, sourceRouterId } from './policy.js';
import { capacityFeed, type RouterNodes, trainingSelector } from './rows.js';

/** Shares of a source's tokens, in [0, 1], one for each part of an encoder that runs. */
export type SourceCapacities = Readonly<Record<Place, readonly number[]>>;

/** What is wrong with shares of tokens for an encoder of so many parts, beginning with the name of the setting, or null. */
export function tokenCapacityProblem(
  capacity: unknown,
  parts: number,
  sourceTokens: SourceTokens | undefined,
): string | null {
  if (capacity === undefined) return null;
  if (typeof capacity !== 'object' || capacity === null) {
    return `tokenCapacity must be an object such as { attn: 0.5, mlp: 0.5 }, got ${JSON.stringify(capacity)}`;
  }
  for (const [place, share] of Object.entries(capacity)) {
    if (!places.some((known) => known === place))
      return `tokenCapacity takes ${places.join(', ')} of an encoder, got '${place}'`;
    if (share === undefined || share === 1) continue;
    if (!sourceTokens?.capacity[place as Place]) {
      return `tokenCapacity.${place} must be absent: the encoder has no routers for it, which \`elastiform modular --${place}\` trains, got ${JSON.stringify(share)}`;
    }
    if (!isCapacity(share, parts)) {
      return `tokenCapacity.${place} must be in (0, 1] or ${parts} numbers in [0, 1], one for each part of the encoder, got ${JSON.stringify(share)}`;
    }
  }
  return null;
}

/** The shares of an encoder of so many parts. */
export function sourceCapacities(
  parts: number,
  { attn = 1, mlp = 1 }: ElasticSpec['tokenCapacity'] = {},
): SourceCapacities {
  const each = (share: Capacity) => (typeof share === 'number' ? new Array<number>(parts).fill(share) : share);
  return { attn: each(attn), mlp: each(mlp) };
}

/** Where all tokens, none or some enter: equal ones run in one program. */
export const sourceKey = (capacities: SourceCapacities): string =>
  places.map((place) => capacities[place].map((share) => (share > 0 && share < 1 ? '~' : share)).join('')).join('/');

/** The encoder's parts as layers whose tokens are routed where some enter. Those that do not are keys all the same. */
export function routingOf(capacities: SourceCapacities): Routing & Pick<ElasticPolicy, 'gate'> {
  const some = (place: Place) => capacities[place].flatMap((share, i) => (share > 0 && share < 1 ? [i] : []));
  return {
    layers: capacities.attn.length,
    gate: 'straight-through',
    tokens: { attn: { layers: some('attn'), keys: 'all' }, mlp: { layers: some('mlp') } },
  };
}

/**
 * Top-k routing of an encoder of `parts`: of each source the `ceil(share * tokens)` rows with the highest scores enter, of equal ones the
 * first. A source is there as a whole, so that the choice is the same in training and afterwards, and depends on no other source.
 * Feeds are those of `trainingSelector`, `sourceCapacityFeeds` among them.
 */
export function sourceSelector(
  graph: Graph,
  parts: readonly string[],
  capacities: SourceCapacities,
  routers: (id: string) => RouterNodes,
  segments: Dim | number,
  options: { explore?: boolean } = {},
): ReturnType<typeof trainingSelector> {
  const ids = new Map(
    parts.flatMap((part, i) => places.map((place) => [routerId(i, place), sourceRouterId(part, place)])),
  );
  return {
    ...trainingSelector(graph, routingOf(capacities), (id) => routers(ids.get(id)!), segments, options),
    runs: (layer, place) => capacities[place][layer] > 0,
  };
}

/** Values of the feeds with each source's shares; all sources have one `sourceKey`. */
export function sourceCapacityFeeds(sources: readonly SourceCapacities[]): Record<string, Float32Array> {
  const { tokens } = routingOf(sources[0]);
  return Object.fromEntries(
    places.flatMap((place) =>
      tokens[place]!.layers.map((i) => [
        capacityFeed(routerId(i, place)),
        Float32Array.from(sources, (capacities) => capacities[place][i]),
      ]),
    ),
  );
}

/** Rows of so many that enter at a share, as `route_topk` counts them. */
export const entering = (share: number, rows: number): number =>
  share >= 1 ? rows : Math.min(Math.max(Math.ceil(Math.fround(share) * rows - 1e-6), 0), rows);

/** FLOPs that shares save of reading a source of so many tokens by an encoder of as many parts, the routers' own counted. */
export function savedSourceFlops(encoder: ModelSpec, capacities: SourceCapacities, tokens: number): number {
  const { hidden } = encoder;
  let saved = 0;
  for (let i = 0; i < capacities.attn.length; i++) {
    const layer = layerOf(encoder, i);
    for (const place of places) {
      const share = capacities[place][i];
      if (share >= 1) continue;
      const keys = place === 'attn' ? keyValueFlops(layer, tokens) : 0;
      const rest = place === 'attn' ? attentionFlops(layer, [tokens]) - keys : feedForwardFlops(layer, tokens);
      saved += share <= 0 ? keys + rest : rest * (1 - entering(share, tokens) / tokens) - 2 * tokens * hidden;
    }
  }
  return saved;
}
