// Search for widths of nested feed-forwards: the best slices within a constraint, by measured distance from the whole model.
import { join } from 'node:path';
import { flopsRatio } from '../../elastic/cost.js';
import { alignedWidth, granularityWidths, mixAndMatch, type Nested, widthShares } from '../../elastic/nested.js';
import { routerPlaces } from '../../elastic/policy.js';
import { expectedMs, type LatencyMetric, type LevelTimes, latencyMetrics } from '../../elastic/profile.js';
import { writeLevels } from '../../elastic/store.js';
import { parameterPlan } from '../../model/weights.js';
import { InvalidArgumentError } from '../../native/errors.js';
import type { EvalDocument } from '../batches.js';
import type { ElasticModel } from '../model.js';
import { type Network, requireWhole } from '../network.js';
import { checkNumber, checkOptions, naturalNumber, positiveInteger } from '../options.js';
import { seedLimit, uniform } from '../random.js';
import { SliceScores } from './scores.js';
import { InfeasibleError, type SearchPoint } from './searched.js';

/** What a slice may cost at most: parameters, a share of the FLOPs, bytes of its weights, or a time on this device. */
export type SearchConstraint =
  | { params: number }
  | { flops: number }
  | { bytes: number }
  | { latencyMs: number; metric?: LatencyMetric };

export const searchMethods = ['mix-n-match', 'greedy', 'evolution'] as const;

/** Options of `search`. */
export interface SearchOptions {
  /** Text on which slices are compared with the whole model. */
  data: readonly EvalDocument[];
  /** Without it the method must be `mix-n-match`, and only the Pareto front is found. */
  constraint?: SearchConstraint;
  /**
   * `mix-n-match`: the models that budgets choose among anyway; `greedy`, the default: besides, from the whole model down, always
   * the narrower layer that costs the least KL for what it saves; `evolution`: besides, crossing and changing the best ones.
   */
  method?: (typeof searchMethods)[number];
  /** Slices that `evolution` measures besides; default 64. */
  trials?: number;
  /** Longest sequence in tokens; FLOPs and times are meant for it. Default: the model's context, at most 512. */
  sequenceLength?: number;
  /** Tokens of the text to measure on at most; default 4096. */
  limit?: number;
  /** Of `evolution`; default 0. */
  seed?: number;
  /** File in which scores are kept and reused; default `search/scores.json` in the model's directory. */
  scores?: string;
  /** Called as the work goes on: what is being done, and how many of its steps are. */
  onProgress?: (event: { phase: string; done: number; total: number }) => void;
  /** Stops the work; scores measured so far are kept. */
  signal?: AbortSignal;
}

/** What `search` found. */
export interface SearchResult {
  /** The slice within the constraint with the least KL; null without a constraint. */
  readonly best: SearchPoint | null;
  /** Slices of which none cheaper, by the constraint's cost (default FLOPs), is better: the cheapest first. */
  readonly pareto: readonly SearchPoint[];
  /** Slices measured now, and found in the file. */
  readonly measured: number;
  readonly reused: number;
  /** Tokens that each was measured on. */
  readonly tokens: number;
}

const optionNames = [
  ...['data', 'constraint', 'method', 'trials', 'sequenceLength', 'limit', 'seed', 'scores', 'onProgress', 'signal'],
];

/**
 * Searches the widths of a nested model.
 *
 * @throws InvalidArgumentError when nothing is nested, for bad options, or when a time is asked for and none was measured here or
 *   the weights have changed since; InvalidDataError for scores of other weights or text; InfeasibleError when no slice keeps
 *   the constraint.
 */
export async function search(model: ElasticModel, options: SearchOptions): Promise<SearchResult> {
  checkOptions('search', options, optionNames);
  const { network } = model;
  requireWhole('search', network);
  const { nested } = network.policy ?? {};
  if (!nested) {
    throw new InvalidArgumentError(
      `[search] ${network.dir} has no nested feed-forwards; make it so with \`elastiform elastify --nested\``,
    );
  }
  const { constraint, method = constraint ? 'greedy' : 'mix-n-match', trials = 64, limit = 4096, seed = 0 } = options;
  if (!searchMethods.includes(method) || (method !== 'mix-n-match' && !constraint)) {
    const which = constraint ? searchMethods.join(', ') : 'mix-n-match without a constraint';
    throw new InvalidArgumentError(`[search] method must be ${constraint ? 'one of ' : ''}${which}, got ${method}`);
  }
  const { sequenceLength: length = Math.min(network.maxContext, 512) } = options;
  checkNumber(
    'search',
    'sequenceLength',
    length,
    (n) => positiveInteger(n) && n >= 2 && n <= network.maxContext,
    `from 2 to ${network.maxContext}`,
  );
  checkNumber('search', 'trials', trials, naturalNumber, 'an integer of zero or more');
  checkNumber('search', 'limit', limit, positiveInteger, 'a positive integer');
  checkNumber('search', 'seed', seed, (s) => naturalNumber(s) && s < seedLimit, 'an integer in [0, 2^32)');
  const costs = new Costs(network, nested, constraint, length);
  const { data, signal, scores: file = join(network.dir, 'search', 'scores.json') } = options;
  using scores = await SliceScores.open(network, { data, length, limit, file, ...(signal && { signal }) });
  const reused = scores.all().length;

  const ladder = mixAndMatch(nested, network.spec.layers, network.spec.ffn);
  if (costs.of(ladder[0]) > costs.most) {
    const nearest = costs.point(ladder[0], await scores.score(ladder[0]));
    await scores.save();
    throw new InfeasibleError(
      `[search] no slice has ${costs.text(costs.most)}: the nearest, all layers at ${nested.granularities[0]} of their units, has ${costs.text(costs.of(ladder[0]))}`,
      nearest,
    );
  }
  const walk = new Walk(network, nested, costs, scores, options);
  try {
    for (const [i, rung] of ladder.entries()) {
      options.onProgress?.({ phase: "Mix'n'Match", done: i, total: ladder.length });
      await scores.score(rung);
    }
    if (method === 'greedy') await walk.greedy();
    if (method === 'evolution') await walk.evolve(trials, seed);
  } finally {
    await scores.save();
  }
  const whole = costs.point(ladder.at(-1)!, { kl: 0, agreement: 1 });
  const points = [...scores.all().map(({ widths, score }) => costs.point(widths, score)), whole];
  const pareto = paretoOf(points, (point) => costs.of(point.widths));
  const best = constraint ? (pareto.findLast((point) => costs.of(point.widths) <= costs.most) ?? null) : null;
  return { best, pareto, measured: scores.measured, reused, tokens: scores.tokens };
}

/**
 * Keeps what a search found in a model's directory: budgets then choose among its slices, and the best one becomes a level.
 *
 * @throws InvalidArgumentError for a name that levels of other kinds have, such as `p80` and `ffn50`; the errors of reading and
 *   writing the directory.
 */
export async function recordSearch(
  model: ElasticModel,
  { best, pareto }: SearchResult,
  name = 'searched',
): Promise<void> {
  const { dir, spec, policy } = model.network;
  const nested = policy!.nested!;
  if (name === '' || name === 'full' || /^(p|ffn)\d/.test(name)) {
    throw new InvalidArgumentError(`[search] a level cannot be named '${name}': choose another name`);
  }
  const shares = ({ widths }: SearchPoint) => nested.layers.map((layer) => widths[layer] / spec.ffn);
  const units = ({ widths }: SearchPoint) => widths.reduce((sum, width) => sum + width, 0);
  // FLOPs and parameters grow with units alone; times need not, and budgets are of FLOPs.
  const searched = paretoOf(pareto, units).map(shares);
  const levels = policy!.levels.filter((level) => level.name !== name);
  const found = best && {
    ...{ name, spec: { ffnWidth: best.ffnWidth }, flopsRatio: Math.round(best.flopsRatio * 1e4) / 1e4 },
  };
  await writeLevels(dir, found && best.kl > 0 ? [...levels, found] : levels, searched);
}

/** Points of which none that costs as much or less is better, the cheapest first. */
function paretoOf(points: readonly SearchPoint[], cost: (point: SearchPoint) => number): SearchPoint[] {
  let least = Number.POSITIVE_INFINITY;
  return points
    .toSorted((a, b) => cost(a) - cost(b) || a.kl - b.kl)
    .filter(({ kl }) => {
      const better = kl < least;
      least = Math.min(least, kl);
      return better;
    });
}

/** What slices cost, by every measure, and by that of the constraint. */
class Costs {
  /** Of the constraint. */
  readonly most: number;
  readonly of: (widths: readonly number[]) => number;
  readonly text: (cost: number) => string;
  readonly #latency: ((widths: readonly number[]) => number) | null;

  constructor(
    private readonly network: Network,
    private readonly nested: Nested,
    constraint: SearchConstraint = { flops: 1 },
    private readonly length: number,
  ) {
    const entries = Object.entries(constraint).filter(([name]) => name !== 'metric');
    const [name, most] = entries[0] ?? [];
    const kinds = ['params', 'flops', 'bytes', 'latencyMs'];
    const fits = typeof most === 'number' && Number.isFinite(most) && most > 0;
    if (entries.length !== 1 || !kinds.includes(name) || !fits || ('metric' in constraint && name !== 'latencyMs')) {
      throw new InvalidArgumentError(
        `[search] constraint must be one of ${kinds.join(', ')} with a positive number, got ${JSON.stringify(constraint)}`,
      );
    }
    this.most = most as number;
    this.#latency = 'latencyMs' in constraint ? this.#times(constraint.metric ?? 'ttft') : null;
    const of = { params: this.#parameters, flops: this.#flops, bytes: this.#bytes, latencyMs: this.#latency! };
    this.of = of[name as keyof typeof of];
    const units = { params: 'parameters', flops: 'of the FLOPs', bytes: 'bytes', latencyMs: 'ms' }[
      name as keyof typeof of
    ];
    this.text = (cost) => `${name === 'flops' || name === 'latencyMs' ? cost.toFixed(3) : Math.round(cost)} ${units}`;
  }

  point(widths: readonly number[], score: Pick<SearchPoint, 'kl' | 'agreement'>): SearchPoint {
    return {
      ...{ widths, ffnWidth: widthShares(widths, this.nested, this.network.spec.ffn) },
      ...{ parameters: this.#parameters(widths), bytes: this.#bytes(widths), flopsRatio: this.#flops(widths) },
      ...{ latencyMs: this.#latency?.(widths) ?? null, ...score },
    };
  }

  /** Sum over layers of `per(layer)` for every unit that is left out. */
  #without(widths: readonly number[], per: (layer: number) => number): number {
    return widths.reduce((sum, units, layer) => sum + (this.network.spec.perLayer[layer].ffn - units) * per(layer), 0);
  }

  /** Parameters of one unit. */
  #unit(): number {
    const { hidden, gated, mlpBias } = this.network.spec;
    const matrices = gated ? 3 : 2;
    return matrices * hidden + (mlpBias ? matrices - 1 : 0);
  }

  #parameters = (widths: readonly number[]): number =>
    parameterPlan(this.network.spec).size - this.#without(widths, () => this.#unit());

  #bytes = (widths: readonly number[]): number => {
    const { layers } = this.network.weights;
    const width = (layer: number) => (layers[layer].up.weight.dtype === 'f32' ? 4 : 2);
    return this.network.weightBytes - this.#without(widths, (layer) => this.#unit() * width(layer));
  };

  #flops = (widths: readonly number[]): number => {
    const { spec, policy } = this.network;
    const whole = routerPlaces(policy!).map(() => 1);
    return flopsRatio(spec, policy!, whole, this.length, widths);
  };

  /**
   * Times by those measured of levels with one width: every layer has its part, on straight lines between the widths that were
   * measured.
   */
  #times(metric: LatencyMetric): (widths: readonly number[]) => number {
    if (!latencyMetrics.includes(metric)) {
      throw new InvalidArgumentError(
        `[search] metric must be one of ${latencyMetrics.join(', ')}, got ${String(metric)}`,
      );
    }
    const { spec, profiles, measuredOn } = this.network;
    const times = profiles.of(measuredOn());
    const call = { prompt: this.length, generated: 0 };
    const alike = ({ spec: { ffnWidth, ...others } }: LevelTimes) =>
      Object.keys(others).length === 0 && (ffnWidth === undefined || typeof ffnWidth === 'number');
    const measured = times.levels
      .filter(alike)
      .map((level) => {
        const share = (level.spec.ffnWidth as number | undefined) ?? 1;
        const units = share > 1 ? share : alignedWidth(share, this.nested, spec.ffn);
        return { units, ms: expectedMs(times, level, metric, call) };
      })
      .sort((a, b) => a.units - b.units);
    if (measured.length < 2) {
      throw new InvalidArgumentError(
        `[search] the times of this device are of no width alike in all layers; measure again: elastiform profile ${this.network.dir}`,
      );
    }
    const at = (units: number): number => {
      const to = Math.max(
        1,
        measured.findIndex((known) => units <= known.units),
      );
      const [a, b] = [measured[to - 1], measured[to]];
      return a.ms + ((b.ms - a.ms) * (units - a.units)) / (b.units - a.units);
    };
    const { layers } = this.nested;
    return (widths) => layers.reduce((sum, layer) => sum + at(widths[layer]), 0) / layers.length;
  }
}

/** Ways through the widths of granularities. */
class Walk {
  private readonly steps: readonly number[];

  constructor(
    private readonly network: Network,
    private readonly nested: Nested,
    private readonly costs: Costs,
    private readonly scores: SliceScores,
    private readonly options: SearchOptions,
  ) {
    this.steps = granularityWidths(nested, network.spec.ffn);
  }

  /** The next narrower or wider granularity of a layer; null beyond the ends. */
  #moved(widths: readonly number[], layer: number, by: -1 | 1): number[] | null {
    const to = this.steps[this.steps.indexOf(widths[layer]) + by];
    return to === undefined ? null : widths.with(layer, to);
  }

  /**
   * From the whole model down to the constraint. Distance per cost mostly grows on the way, so what a layer cost earlier is nearly
   * a lower bound, and only the best candidates are measured anew.
   */
  async greedy(): Promise<void> {
    const { costs, scores } = this;
    let at = this.network.spec.perLayer.map(({ ffn }) => ffn);
    const start = costs.of(at);
    const slopes = new Map(
      this.nested.layers.map((layer) => [layer, { slope: Number.NEGATIVE_INFINITY, at: [] as number[] }]),
    );
    while (costs.of(at) > costs.most) {
      const { kl } = await scores.score(at);
      const [layer, best] = [...slopes].reduce((a, b) => (b[1].slope < a[1].slope ? b : a));
      const next = this.#moved(at, layer, -1);
      if (!next) {
        slopes.delete(layer);
        continue;
      }
      if (best.at !== at) {
        const saved = costs.of(at) - costs.of(next);
        const slope = ((await scores.score(next)).kl - kl) / Math.max(saved, Number.MIN_VALUE);
        slopes.set(layer, { slope, at });
        continue;
      }
      at = next;
      const gone = (start - costs.of(at)) / (start - costs.most);
      this.options.onProgress?.({ phase: 'greedy', done: Math.min(100, Math.round(100 * gone)), total: 100 });
    }
  }

  /** Crosses two of the eight best slices within the constraint and changes layers by one granularity, so many times. */
  async evolve(trials: number, seed: number): Promise<void> {
    const { costs, scores } = this;
    const { layers } = this.nested;
    let drawn = 0;
    const draw = () => uniform(seed, drawn++);
    const pick = <T>(list: readonly T[]): T => list[Math.floor(draw() * list.length)];
    const least = this.steps[0];
    for (let trial = 0, failures = 0; trial < trials && failures < 100; ) {
      const parents = scores
        .all()
        .filter(({ widths }) => costs.of(widths) <= costs.most)
        .sort((a, b) => a.score.kl - b.score.kl)
        .slice(0, 8);
      const [a, b] = [pick(parents).widths, pick(parents).widths];
      let child = a.map((units, layer) => (draw() < 0.5 ? units : b[layer]));
      for (const layer of layers) {
        if (draw() < 1 / layers.length) child = this.#moved(child, layer, draw() < 0.5 ? -1 : 1) ?? child;
      }
      // Narrower until it keeps the constraint, which the narrowest does.
      while (costs.of(child) > costs.most) {
        child = this.#moved(child, pick(layers.filter((layer) => child[layer] > least)), -1)!;
      }
      if (scores.has(child)) {
        failures++;
        continue;
      }
      failures = 0;
      await scores.score(child);
      this.options.onProgress?.({ phase: 'evolution', done: ++trial, total: trials });
    }
  }
}
