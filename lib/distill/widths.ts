// Which widths of nested feed-forwards a step trains: all of them, one at random, or the sandwich rule.
import { layerWidths, type Nested, widthDims, widthName } from '../elastic/nested.js';
import type { ModelSpec } from '../model/spec.js';
import { InvalidArgumentError } from '../native/errors.js';
import type { Random } from './random.js';
import { checkKeys } from './trainer.js';

export const widthStrategies = ['joint', 'random', 'sandwich'] as const;

/** How steps choose among the granularities of nested feed-forwards. */
export interface WidthSampling {
  /**
   * `joint`, the default: every step trains all granularities, the sum of their losses (MatFormer's code); `random`: one, drawn
   * for each micro-batch; `sandwich`: the largest, the smallest and one between at random (arXiv 1903.05134).
   */
  strategy?: (typeof widthStrategies)[number];
  /** One for each granularity, ascending: how often `random` draws it; the factor of its loss otherwise. Default all 1. */
  weights?: readonly number[];
}

/** A granularity that a micro-batch is run at. */
export interface TrainedWidth {
  /** `ffn50`, or `full` */
  name: string;
  dims: Record<string, number>;
  /** Factor of its loss. */
  weight: number;
}

/** The granularities that steps train, and how they choose among them. */
export class Widths {
  readonly identity: unknown;
  private constructor(
    /** Ascending, each with its weight. */
    readonly all: readonly TrainedWidth[],
    private readonly strategy: (typeof widthStrategies)[number],
  ) {
    this.identity = { strategy, widths: all };
  }

  /**
   * @param nested undefined: one width, all of it
   * @param below whether the whole width is left out: what is trained has no part in it
   * @throws InvalidArgumentError for a sampling that is none, or one where nothing is nested.
   */
  static of(
    api: string,
    sampling: WidthSampling | undefined,
    nested: Nested | undefined,
    { layers, ffn }: ModelSpec,
    below = false,
  ): Widths {
    const fail = (what: string): never => {
      throw new InvalidArgumentError(`[${api}] ${what}`);
    };
    if (!nested) {
      if (sampling !== undefined) fail('sample says which widths are trained, and no feed-forward is nested');
      return new Widths([{ name: 'full', dims: {}, weight: 1 }], 'joint');
    }
    const { strategy = 'joint', weights, ...rest } = sampling ?? {};
    checkKeys(api, 'key of sample', rest, ['strategy', 'weights']);
    if (!widthStrategies.includes(strategy)) {
      fail(`sample.strategy must be one of ${widthStrategies.join(', ')}, got ${JSON.stringify(strategy)}`);
    }
    const shares = below ? nested.granularities.slice(0, -1) : nested.granularities;
    if (shares.length === 0) fail('there must be a granularity below 1: corrections are of narrower widths alone');
    const good = (list: readonly number[]) =>
      Array.isArray(list) && list.length === shares.length && list.every((w) => Number.isFinite(w) && w > 0);
    if (weights !== undefined && !good(weights)) {
      fail(`sample.weights must be ${shares.length} positive numbers, of ${shares}, got ${JSON.stringify(weights)}`);
    }
    return new Widths(
      shares.map((share, i) => ({
        name: share === 1 ? 'full' : widthName(share),
        dims: widthDims(nested, layerWidths(share, nested, layers, ffn), ffn),
        weight: weights?.[i] ?? 1,
      })),
      strategy,
    );
  }

  /** Whether a micro-batch is run at more than one. */
  get several(): boolean {
    return this.strategy !== 'random' && this.all.length > 1;
  }

  /** Those of one micro-batch. */
  draw(random: Random): TrainedWidth[] {
    const { all, strategy } = this;
    if (strategy === 'random') {
      let left = random.uniform() * all.reduce((sum, { weight }) => sum + weight, 0);
      const drawn = all.find(({ weight }) => {
        left -= weight;
        return left < 0;
      });
      return [{ ...(drawn ?? all.at(-1)!), weight: 1 }];
    }
    if (strategy === 'joint' || all.length <= 3) return [...all];
    return [all[0], all[1 + random.below(all.length - 2)], all.at(-1)!];
  }
}
