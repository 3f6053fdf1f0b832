// The axes along which a model is elastic, what tells them apart, and the shares that are set on them.
import type { Assembly } from '../model/parts.js';
import type { Place } from '../model/select.js';
import type { ExitSetting } from './exits.js';
import type { FfnWidth } from './nested.js';

/** Experts: parts of a sub-layer of which every token uses some. */
export type ExpertAxis = 'heads' | 'blocks';
/** What rows enter or skip: attention, the feed-forward, or the whole block, both sub-layers of a layer together. */
export type Target = 'attn' | 'mlp' | 'block';
export const targets: readonly Target[] = ['attn', 'mlp', 'block'];
/** Whether every token is decided about by itself, or a sequence as a whole. */
export type Granularity = 'sequence' | 'token';
export const granularities: readonly Granularity[] = ['sequence', 'token'];
/** Routing of rows: of every token by itself, or of whole sequences. */
export type RowAxis = Target | `${Target}-sequence`;
/**
 * What is routed: tokens and whole sequences into attention, the feed-forward and whole blocks, and for every token heads of
 * attention and blocks of the feed-forward's units.
 */
export type Axis = RowAxis | ExpertAxis;

interface AxisTraits {
  /** What rows enter, or whose experts tokens use. */
  target: Target;
  /** The sub-layers that a router decides about; it reads what the first one does. */
  places: readonly Place[];
  /** Tokens enter or do not, sequences as a whole; experts are used by every token that enters, some of several. */
  routes: 'tokens' | 'sequences' | 'experts';
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

const tokens = { routes: 'tokens', router: 'token', act: 'sigmoid' } as const;
const sequences = { routes: 'sequences', router: 'sequence', act: 'sigmoid' } as const;
const experts = { routes: 'experts', act: 'softmax' } as const;

export const axisTraits: Readonly<Record<Axis, AxisTraits>> = {
  block: {
    ...{ ...tokens, target: 'block', places: ['attn', 'mlp'], setting: 'tokenCapacity.block' },
    ...{ of: 'of tokens into whole blocks', title: 'blocks', column: 'block tokens' },
  },
  'block-sequence': {
    ...{ ...sequences, target: 'block', places: ['attn', 'mlp'], setting: 'sequenceCapacity.block' },
    ...{ of: 'of sequences into whole blocks', title: 'blocks per sequence', column: 'block sequences' },
  },
  attn: {
    ...{ ...tokens, target: 'attn', places: ['attn'], setting: 'tokenCapacity.attn' },
    ...{ of: 'of tokens into attn', title: 'attention', column: 'attn tokens' },
  },
  'attn-sequence': {
    ...{ ...sequences, target: 'attn', places: ['attn'], setting: 'sequenceCapacity.attn' },
    ...{ of: 'of sequences into attn', title: 'attention per sequence', column: 'attn sequences' },
  },
  heads: {
    ...{ ...experts, target: 'attn', places: ['attn'], router: 'heads', setting: 'headShare' },
    ...{ of: 'of the heads of attention', title: 'attention heads', column: 'heads' },
  },
  mlp: {
    ...{ ...tokens, target: 'mlp', places: ['mlp'], setting: 'tokenCapacity.mlp' },
    ...{ of: 'of tokens into mlp', title: 'FFN', column: 'FFN tokens' },
  },
  'mlp-sequence': {
    ...{ ...sequences, target: 'mlp', places: ['mlp'], setting: 'sequenceCapacity.mlp' },
    ...{ of: 'of sequences into mlp', title: 'FFN per sequence', column: 'FFN sequences' },
  },
  blocks: {
    ...{ ...experts, target: 'mlp', places: ['mlp'], router: 'blocks', setting: 'blockShare' },
    ...{ of: 'of the blocks of the feed-forward', title: 'FFN blocks', column: 'FFN blocks' },
  },
};

/** In the order in which the routers of a layer run. */
export const axes: readonly Axis[] = [
  ...(['block', 'block-sequence', 'attn', 'attn-sequence', 'heads', 'mlp', 'mlp-sequence', 'blocks'] as const),
];

export const isExperts = (axis: Axis): axis is ExpertAxis => axisTraits[axis].routes === 'experts';
/** Whether whole sequences enter or skip. */
export const ofSequences = (axis: Axis): boolean => axisTraits[axis].routes === 'sequences';
export const expertAxes: readonly ExpertAxis[] = axes.filter(isExperts);
export const rowAxes: readonly RowAxis[] = axes.filter((axis): axis is RowAxis => !isExperts(axis));
/** The axis of the experts of a sub-layer. */
export const expertAxisOf = (place: Place): ExpertAxis =>
  expertAxes.find((axis) => axisTraits[axis].places.includes(place))!;
/** The axis of whole sequences into a target. */
export const sequenceAxis = (target: Target): RowAxis => `${target}-sequence`;

/** The value of every axis. */
export const perAxis = <T>(of: (axis: Axis) => T): Record<Axis, T> =>
  Object.fromEntries(axes.map((axis) => [axis, of(axis)])) as Record<Axis, T>;

/** `layers.{layer}.{attn|mlp|block}.{token|sequence|heads|blocks}`, the name of a router in files, programs and reports. */
export function routerId(layer: number, axis: Axis): string {
  const { target, router } = axisTraits[axis];
  return `layers.${layer}.${target}.${router}`;
}

/** A share: one in (0, 1] for all routed layers of an axis, or one in [0, 1] for each of them, ascending. */
export type Capacity = number | readonly number[];

/** Explicit settings per axis; an absent axis is full. */
export interface ElasticSpec {
  /** Share of tokens that routed sub-layers, and whole blocks, process. */
  tokenCapacity?: { [target in Target]?: Capacity };
  /** Share of sequences that enter them, as wholes. */
  sequenceCapacity?: { [target in Target]?: Capacity };
  /** Share of attention's heads, or of groups of them, that every token uses, rounded up to whole ones. */
  headShare?: Capacity;
  /** Share of the feed-forward's blocks that every token uses, rounded up to whole blocks. */
  blockShare?: Capacity;
  /**
   * Width of the nested feed-forwards: a share of their units, rounded to the alignment, or a number of units. Of an encoder-decoder model
   * that of all parts of both stacks.
   */
  ffnWidth?: FfnWidth;
  /** When a text leaves at an exit of an encoder, before all layers have run. */
  exit?: ExitSetting;
  /** Layers and modules of an encoder-decoder model that run. */
  assembly?: Assembly;
}

export const specKeys: readonly string[] = [
  'tokenCapacity',
  'sequenceCapacity',
  ...expertAxes.map((axis) => axisTraits[axis].setting),
  'ffnWidth',
  'exit',
  'assembly',
];

/** The settings of a spec that are shares of what routers choose from, by axis, and back. */
export function specByAxis(spec: ElasticSpec): Partial<Record<Axis, Capacity>> {
  const { tokenCapacity, sequenceCapacity = {}, headShare, blockShare } = spec;
  const whole = Object.entries(sequenceCapacity).map(([target, share]) => [sequenceAxis(target as Target), share]);
  return {
    ...tokenCapacity,
    ...Object.fromEntries(whole),
    ...(headShare !== undefined && { heads: headShare }),
    ...(blockShare !== undefined && { blocks: blockShare }),
  };
}
export function specOfAxes({ heads, blocks, ...rows }: Partial<Record<Axis, Capacity>>): ElasticSpec {
  const own = (of: (axis: RowAxis) => boolean) => {
    const found = rowAxes.filter((axis) => of(axis) && rows[axis] !== undefined);
    return found.length > 0 ? Object.fromEntries(found.map((axis) => [axisTraits[axis].target, rows[axis]])) : null;
  };
  const [tokenCapacity, sequenceCapacity] = [own((axis) => !ofSequences(axis)), own(ofSequences)];
  return {
    ...(tokenCapacity && { tokenCapacity }),
    ...(sequenceCapacity && { sequenceCapacity }),
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
