// The axes along which a model is elastic, what tells them apart, and the shares that are set on them.
import type { Place } from '../model/select.js';

/** Experts: parts of a sub-layer of which every token uses some. */
export type ExpertAxis = 'heads' | 'blocks';
/**
 * What is routed: tokens into attention, tokens into the feed-forward, and for every token heads of attention and blocks
 * of the feed-forward's units.
 */
export type Axis = Place | ExpertAxis;

interface AxisTraits {
  /** Of whose sub-layer a router decides. */
  place: Place;
  /** Tokens enter or do not; experts are used by every token that enters, some of several. */
  routes: 'tokens' | 'experts';
  /** Kind of the router, the last part of its id. */
  router: string;
  /** What its logits go through. */
  act: 'sigmoid' | 'softmax';
  /** Name of the setting in an ElasticSpec. */
  setting: string;
  /** A share of what, for a person. */
  of: string;
  /** What has routers, and whose shares a column of a table has, for a person. */
  title: string;
  column: string;
}

export const axisTraits: Readonly<Record<Axis, AxisTraits>> = {
  attn: {
    ...{ place: 'attn', routes: 'tokens', router: 'token', act: 'sigmoid', setting: 'tokenCapacity.attn' },
    ...{ of: 'of tokens into attn', title: 'attention', column: 'attn tokens' },
  },
  heads: {
    ...{ place: 'attn', routes: 'experts', router: 'heads', act: 'softmax', setting: 'headShare' },
    ...{ of: 'of the heads of attention', title: 'attention heads', column: 'heads' },
  },
  mlp: {
    ...{ place: 'mlp', routes: 'tokens', router: 'token', act: 'sigmoid', setting: 'tokenCapacity.mlp' },
    ...{ of: 'of tokens into mlp', title: 'FFN', column: 'FFN tokens' },
  },
  blocks: {
    ...{ place: 'mlp', routes: 'experts', router: 'blocks', act: 'softmax', setting: 'blockShare' },
    ...{ of: 'of the blocks of the feed-forward', title: 'FFN blocks', column: 'FFN blocks' },
  },
};

/** In the order in which the routers of a layer run. */
export const axes: readonly Axis[] = ['attn', 'heads', 'mlp', 'blocks'];

export const isExperts = (axis: Axis): axis is ExpertAxis => axisTraits[axis].routes === 'experts';
export const expertAxes: readonly ExpertAxis[] = axes.filter(isExperts);
/** The axis of the experts of a sub-layer. */
export const expertAxisOf = (place: Place): ExpertAxis => expertAxes.find((axis) => axisTraits[axis].place === place)!;

/** The value of every axis. */
export const perAxis = <T>(of: (axis: Axis) => T): Record<Axis, T> =>
  Object.fromEntries(axes.map((axis) => [axis, of(axis)])) as Record<Axis, T>;

/** `layers.{layer}.{attn|mlp}.{token|heads|blocks}`, the name of a router in files, programs and reports. */
export function routerId(layer: number, axis: Axis): string {
  const { place, router } = axisTraits[axis];
  return `layers.${layer}.${place}.${router}`;
}

/** A share: one in (0, 1] for all routed layers of an axis, or one in [0, 1] for each of them, ascending. */
export type Capacity = number | readonly number[];

/** Explicit settings per axis; an absent axis is full. */
export interface ElasticSpec {
  /** Share of tokens that routed sub-layers process. */
  tokenCapacity?: { attn?: Capacity; mlp?: Capacity };
  /** Share of attention's heads, or of groups of them, that every token uses, rounded up to whole ones. */
  headShare?: Capacity;
  /** Share of the feed-forward's blocks that every token uses, rounded up to whole blocks. */
  blockShare?: Capacity;
}

export const specKeys: readonly string[] = ['tokenCapacity', ...expertAxes.map((axis) => axisTraits[axis].setting)];

/** The settings of a spec by axis, and back. */
export function specByAxis({ tokenCapacity, headShare, blockShare }: ElasticSpec): Partial<Record<Axis, Capacity>> {
  return {
    ...tokenCapacity,
    ...(headShare !== undefined && { heads: headShare }),
    ...(blockShare !== undefined && { blocks: blockShare }),
  };
}
export function specOfAxes({ heads, blocks, ...tokens }: Partial<Record<Axis, Capacity>>): ElasticSpec {
  return {
    ...(Object.keys(tokens).length > 0 && { tokenCapacity: tokens }),
    ...(heads !== undefined && { headShare: heads }),
    ...(blocks !== undefined && { blockShare: blocks }),
  };
}

/** The whole experts that a share of `count` comes to, as the kernels count them. */
export const expertsUsed = (share: number, count: number): number => Math.ceil(Math.fround(share) * count - 1e-6);

/** Whether a value is a share for an axis with so many routed layers. */
export function isCapacity(value: unknown, layers: number): value is Capacity {
  if (!Array.isArray(value)) return typeof value === 'number' && value > 0 && value <= 1;
  return value.length === layers && value.every((c) => typeof c === 'number' && c >= 0 && c <= 1);
}

/** The rule of isCapacity in words. */
export const capacityRule = (layers: number): string => `in (0, 1] or ${layers} numbers in [0, 1], one per layer`;

/** Mean of capacities; 1 when there is none. */
export function meanCapacity(capacities: Capacity): number {
  const all = [capacities].flat();
  return all.length === 0 ? 1 : all.reduce((a, b) => a + b, 0) / all.length;
}
