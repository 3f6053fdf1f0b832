// Quality, counted compute and measured speed of a model at budgets, with intervals, beside baselines at equal compute.
import { isExperts, ofSequences, routerId } from '../../elastic/axes.js';
import { type Budget, budgetText } from '../../elastic/budget.js';
import { routerPlaces, rowAxisOf } from '../../elastic/policy.js';
import { capacityFeed, droppedSelector, randomSelector, scoreFeed, thresholdFeeds } from '../../elastic/rows.js';
import type { Program, RunOptions } from '../../graph/index.js';
import { forwardFlops, headFlops } from '../../model/flops.js';
import { type Place, selectEverything } from '../../model/select.js';
import { InvalidArgumentError, InvalidDataError } from '../../native/errors.js';
import type { TypedArray } from '../../native/index.js';
import {
  type Batch,
  base,
  count,
  cut,
  type EvalDocument,
  limitsOf,
  pack,
  type Sequence,
  scoreFeeds,
  take,
} from '../batches.js';
import { ComputeMeter } from '../compute.js';
import { type ElasticModel, loadModel } from '../model.js';
import { type Network, requireWhole, resolveFor } from '../network.js';
import { checkNumber, checkOptions, naturalNumber, positiveInteger } from '../options.js';
import {
  budgetDims,
  budgetSelector,
  compileCompare,
  compilePrefill,
  compileScore,
  type PackedLimits,
  packedDims,
  type SelectorFactory,
} from '../programs.js';
import { philox, seedLimit } from '../random.js';
import { expertShares } from '../trace.js';
import { bootstrap, type Measured, median, type Sums } from './statistics.js';

/** What routing is compared with: random tokens, or sub-layers left out. */
export type Baseline = 'random' | 'drop';
/** 'full' is the backbone, which any budget of 1 runs; 'nested' a slice of it, without routers. */
export type Method = 'full' | 'nested' | 'routed' | Baseline;
/** Whether a method is the model itself at a budget below full. */
export const isElastic = (method: Method): boolean => method === 'nested' || method === 'routed';

/** Options of `evaluate`. */
export interface EvalOptions {
  /** Documents to predict. */
  data: readonly EvalDocument[];
  /** Default: 'full'. */
  budgets?: readonly Budget[];
  /**
   * Measured at the compute of every budget below full. 'random': as many tokens, or sequences, enter each sub-layer, chosen at
   * random.
   * 'drop': whole sub-layers, of those with routers or widths, are left out, in the order that hurts least on calibration
   * data; of the two choices around the compute each gets a share of the sequences, in expectation, so that the mean is the
   * same.
   */
  baselines?: readonly Baseline[];
  /** What the order of 'drop' is chosen on; default: about a tenth of `data`, which is then not evaluated on. */
  calibration?: readonly EvalDocument[];
  /** Longest sequence in tokens; longer documents are cut. Default: the model's context, at most 512. */
  sequenceLength?: number;
  /** Tokens of one batch; default 2048. */
  batchTokens?: number;
  /** Tokens to evaluate at most. */
  limit?: number;
  /** Measure prefill speed as well; default true. */
  speed?: boolean;
  /** Of random baselines and of the bootstrap; default 0. */
  seed?: number;
  /** Called as the work goes on: what is being done, and how many of its steps are. */
  onProgress?: (event: { phase: string; done: number; total: number }) => void;
  /** Stops the work; the promise rejects with the signal's reason. */
  signal?: AbortSignal;
}

/** One method at one budget. Intervals are 95 %, from a bootstrap over sequences. */
export interface EvalLevel {
  /** What was measured: the model itself, or a baseline. */
  method: Method;
  /** As it was asked for. */
  budget: Budget;
  /** FLOPs the kernels counted over those of the full model; both with the logits of every token. */
  ratio: number;
  /** Mean share of tokens that entered a sub-layer. */
  share: number;
  /** Mean share of tokens that entered, and of units they used, [layers] each. */
  layersRun: { attn: Float32Array; mlp: Float32Array };
  /** Per token. */
  perplexity: Measured;
  /** Perplexity over that of the full model, on the same sequences. */
  perplexityRatio: Measured;
  /** Null when the size of the text is not known. */
  bitsPerByte: Measured | null;
  /** Mean KL divergence of the next-token distribution from the full model's, nats per token. */
  kl: Measured;
  /** Share of positions whose most likely next token is the full model's. */
  agreement: Measured;
  /** Prefill, median of repeated runs; null when not measured. */
  tokensPerSecond: number | null;
  /** Time of prefill over that of the full model, the two run in turns; null when not measured. */
  timeRatio: number | null;
  /** Sub-layers left out by 'drop', in the smaller of its two models. */
  dropped?: string[];
  /** How much better the routed model is at the same budget, on the same sequences; positive is better. */
  routedAdvantage?: { kl: Measured; agreement: Measured };
}

/** What `evaluate` measured. */
export interface EvalReport {
  /** Tokens predicted. */
  tokens: number;
  /** They were predicted in so many sequences. */
  sequences: number;
  /** Tokens of the longest. */
  sequenceLength: number;
  /** One for every method and budget. */
  levels: EvalLevel[];
}

const optionNames = [
  ...['data', 'budgets', 'baselines', 'calibration', 'sequenceLength', 'batchTokens', 'limit', 'speed', 'seed'],
  ...['onProgress', 'signal'],
];
const calibrationTokens = 4096;
const timedRuns = 7;

/**
 * Evaluates a model, given loaded or by its directory.
 *
 * @throws InvalidArgumentError for unknown options and budgets that cannot be served, InvalidDataError when the data
 * holds nothing to predict.
 */
export async function evaluate(model: string | ElasticModel, options: EvalOptions): Promise<EvalReport> {
  checkOptions('evaluate', options, optionNames);
  if (typeof model !== 'string') return new Evaluation(model.network, options).run();
  await using loaded = await loadModel(model, { signal: options.signal });
  return await new Evaluation(loaded.network, options).run();
}

class Evaluation {
  readonly #network: Network;
  readonly #options: EvalOptions;
  readonly #seed: number;
  readonly #length: number;
  readonly #limits: PackedLimits;
  readonly #batches: readonly Batch[];
  readonly #calibration: readonly Batch[];
  /** Static choices measured. */
  readonly #static = new Map<DropStep, Promise<{ level: EvalLevel; sums: readonly Sums[] }>>();
  /** Final hidden states of the full model, per batch. */
  readonly #teacher = new Map<Batch, Float32Array>();
  /** The full model's, per sequence. */
  #full: readonly Sums[] = [];
  #done = 0;
  #total = 1;

  constructor(network: Network, options: EvalOptions) {
    const { budgets = ['full'], baselines = [], sequenceLength, batchTokens = 2048, limit, seed = 0 } = options;
    checkNumber(
      'evaluate',
      'sequenceLength',
      sequenceLength,
      (n) => positiveInteger(n) && n >= 2,
      'an integer of at least 2',
    );
    checkNumber('evaluate', 'batchTokens', batchTokens, positiveInteger, 'a positive integer');
    checkNumber('evaluate', 'limit', limit, positiveInteger, 'a positive integer');
    checkNumber('evaluate', 'seed', seed, (s) => naturalNumber(s) && s < seedLimit, 'an integer in [0, 2^32)');
    const unknown = baselines.find((b) => b !== 'random' && b !== 'drop');
    if (unknown)
      throw new InvalidArgumentError(`[evaluate] baselines must be 'random' or 'drop', got '${String(unknown)}'`);
    requireWhole('evaluate', network);
    if (budgets.length === 0) throw new InvalidArgumentError('[evaluate] budgets must not be empty');
    this.#network = network;
    this.#options = options;
    this.#seed = seed;
    this.#length = sequenceLength ?? Math.min(network.maxContext, 512);
    if (this.#length > network.maxContext) {
      throw new InvalidArgumentError(
        `[evaluate] sequenceLength ${this.#length} is longer than the context of ${network.maxContext}`,
      );
    }
    for (const budget of budgets) {
      const { full, widths } = this.#resolve(budget);
      if (full || !widths || !baselines.includes('random')) continue;
      throw new InvalidArgumentError(
        `[evaluate] the baseline 'random' chooses what routers would, and ${budgetText(budget)} has narrower feed-forwards; leave it out`,
      );
    }

    let sequences = cut('evaluate', network, options.data, this.#length, 'data');
    let calibration: Sequence[] = [];
    if (baselines.includes('drop')) {
      if (options.calibration) calibration = cut('evaluate', network, options.calibration, this.#length, 'calibration');
      else {
        if (sequences.length < 2) {
          throw new InvalidDataError(
            "[evaluate] 'drop' needs calibration data: the data is a single sequence and cannot be split",
          );
        }
        const most = Math.max(1, Math.floor(sequences.length / 10));
        calibration = sequences.slice(-most);
        sequences = sequences.slice(0, -most);
      }
      calibration = take(calibration, calibrationTokens);
    }
    if (limit !== undefined) sequences = take(sequences, limit);
    const rows = Math.max(batchTokens, this.#length);
    this.#batches = pack(sequences, rows);
    this.#calibration = pack(calibration, rows);
    this.#limits = limitsOf([...this.#batches, ...this.#calibration]);
  }

  async run(): Promise<EvalReport> {
    const { budgets = ['full'], baselines = [] } = this.#options;
    const elasticBudgets = budgets.filter((budget) => !this.#resolve(budget).full);
    const search = baselines.includes('drop') && elasticBudgets.length > 0;
    this.#total = 1 + budgets.length + elasticBudgets.length * baselines.length + (search ? 1 : 0);

    const full = await this.#teach();
    this.#full = full.sums;
    const order = search ? await this.#dropOrder() : [];
    const levels: EvalLevel[] = [];
    for (const budget of budgets) {
      const point = this.#resolve(budget);
      if (point.full) {
        levels.push(await this.#level('full', budget, full, backbone));
        this.#progress(`full at ${budgetText(budget)}`);
        continue;
      }
      const student: Student = {
        select: (graph, _rows, segments) => budgetSelector(graph, this.#network, point, segments),
        feeds: (batch) => thresholdFeeds(point.thresholds, batch.sequences.length),
        dims: budgetDims(this.#network, point),
      };
      const measured = await this.#compare(student);
      const method = [...point.thresholds.values()].every((t) => t === Number.NEGATIVE_INFINITY) ? 'nested' : 'routed';
      const routed = await this.#level(method, budget, measured, student);
      this.#progress(`${method} at ${budgetText(budget)}`);
      levels.push(routed);
      for (const baseline of baselines) {
        const level =
          baseline === 'random' ? await this.#random(budget, routed) : await this.#drop(budget, routed.ratio, order);
        const versus = (pick: (s: Sums, who: string) => number): Measured =>
          bootstrap(paired(measured.sums, level.sums), (t) => pick(t, 'b') - pick(t, 'a'), this.#seed);
        level.result.routedAdvantage = {
          kl: versus((t, who) => t[`${who}.kl`] / t[`${who}.n`]),
          agreement: versus((t, who) => -t[`${who}.agree`] / t[`${who}.n`]),
        };
        levels.push(level.result);
      }
    }
    const tokens = sum(this.#batches, (b) => sum(b.sequences, (s) => count(s)));
    return { tokens, sequences: sum(this.#batches, (b) => b.sequences.length), sequenceLength: this.#length, levels };
  }

  #resolve(budget: Budget) {
    return resolveFor(this.#network, budget, { length: this.#length });
  }

  #progress(phase: string): void {
    this.#options.onProgress?.({ phase, done: Math.min(++this.#done, this.#total), total: this.#total });
  }

  // The full model on every batch: hidden states for comparisons, and its own quality.
  async #teach(): Promise<Comparison> {
    const network = this.#network;
    const meter = new ComputeMeter(network.spec);
    const sums: Sums[] = [];
    using program = compileScore(network, this.#limits, () => selectEverything);
    for (const batch of [...this.#calibration, ...this.#batches]) {
      const { signal } = this.#options;
      const result = await program.run({ dims: packedDims(batch), feeds: scoreFeeds(batch), signal });
      this.#teacher.set(batch, result.outputs.hidden as Float32Array);
      if (!this.#batches.includes(batch)) continue;
      meter.add(result, batch.ids.length, ['head']);
      sums.push(...perSequence(batch, { ce: result.outputs.ce, kl: null, agree: null }));
    }
    this.#progress('full model');
    return { meter, sums };
  }

  /** Runs a student over batches, by default those evaluated. */
  async #compare({ select, feeds, dims }: Student, batches = this.#batches): Promise<Comparison> {
    const meter = new ComputeMeter(this.#network.spec);
    const sums: Sums[] = [];
    using program = compileCompare(this.#network, this.#limits, select);
    for (const [i, batch] of batches.entries()) {
      const result = await program.run({
        dims: { ...packedDims(batch), ...dims },
        feeds: { ...scoreFeeds(batch), ...feeds(batch, i), teacher: this.#teacher.get(batch)! },
        signal: this.#options.signal,
      });
      meter.add(result, batch.ids.length, ['compare']);
      const { ce, kl, agree } = result.outputs;
      sums.push(...perSequence(batch, { ce, kl, agree }));
    }
    return { meter, sums };
  }

  async #random(budget: Budget, routed: EvalLevel): Promise<{ result: EvalLevel; sums: readonly Sums[] }> {
    const policy = this.#network.policy!;
    const routers = routerPlaces(policy);
    // A sub-layer ran on its share of tokens times its share of experts, of which whole ones are used.
    const experts = expertShares(this.#network, this.#resolve(budget));
    const shares = routers.map(({ id, layer, place, axis, outputs }) => {
      const ran = routed.layersRun[place][layer];
      // Where rows are not routed, too, all that is less than whole is the share of experts.
      const used = rowAxisOf(policy, layer, place) ? experts[place][layer] : ran;
      return { id, axis, outputs, share: ran === 0 ? 0 : isExperts(axis) ? used : ran / used };
    });
    const present = shares.filter(({ share }) => share > 0);
    const absent = new Set(shares.filter(({ share }) => share === 0).map(({ id }) => id));
    // Experts come whole: of the numbers around a share each is drawn for some sequences, so that the mean is the same.
    const whole = (share: number, u: number) => Math.floor(Math.round(share * 1e6) / 1e6 + u);
    const entering = new Map(
      present.flatMap(({ id, axis, share }, r) =>
        ofSequences(axis) ? [[id, randomSequences(this.#batches, share, this.#seed, r)] as const] : [],
      ),
    );
    const feeds = (batch: Batch, index: number): Record<string, TypedArray> =>
      Object.fromEntries(
        present.flatMap(({ id, axis, outputs, share }, r) => {
          if (ofSequences(axis)) {
            const enters = entering.get(id)!;
            return [[scoreFeed(id), Float32Array.from(batch.sequences, (s) => (enters.has(s) ? 1 : -1))]];
          }
          const capacities = noise(this.#seed, index, r + 2048, batch.sequences.length).map((u) =>
            Math.min(1, outputs === 1 ? share : whole(share * outputs, u) / outputs),
          );
          return [
            [capacityFeed(id), capacities],
            [scoreFeed(id), noise(this.#seed, index, r, batch.ids.length * outputs)],
          ];
        }),
      );
    const select: SelectorFactory = (graph, rows, segments) => randomSelector(graph, policy, rows, segments, absent);
    const student = { select, feeds, dims: {} };
    const measured = await this.#compare(student);
    const result = await this.#level('random', budget, measured, student);
    this.#progress(`random at ${budgetText(budget)}`);
    return { result, sums: measured.sums };
  }

  // Static choices come in steps, so the two around the routed model's compute share the sequences in expectation.
  async #drop(
    budget: Budget,
    ratio: number,
    order: readonly DropStep[],
  ): Promise<{ result: EvalLevel; sums: readonly Sums[] }> {
    const found = order.findIndex((step) => step.ratio <= ratio);
    const below = found < 0 ? order.length - 1 : found;
    const a = await this.#dropped(order[found < 0 ? below : Math.max(below - 1, 0)]);
    const b = await this.#dropped(order[below]);
    const t = a === b ? 0 : Math.min(Math.max((a.level.ratio - ratio) / (a.level.ratio - b.level.ratio), 0), 1);
    const mean = (x: number, y: number): number => x + (y - x) * t;
    const sums = a.sums.map((s, q) =>
      Object.fromEntries(Object.entries(s).map(([key, value]) => [key, mean(value, b.sums[q][key])])),
    );
    const layers = (place: Place) => a.level.layersRun[place].map((x, l) => mean(x, b.level.layersRun[place][l]));
    const [fast, slow] = [b.level.tokensPerSecond, a.level.tokensPerSecond];
    const [less, more] = [b.level.timeRatio, a.level.timeRatio];
    const result: EvalLevel = {
      ...a.level,
      ...this.#quality(sums),
      budget,
      ratio: mean(a.level.ratio, b.level.ratio),
      share: mean(a.level.share, b.level.share),
      layersRun: { attn: layers('attn'), mlp: layers('mlp') },
      tokensPerSecond: slow && fast && 1 / mean(1 / slow, 1 / fast),
      timeRatio: less && more && mean(more, less),
      dropped: [...order[below].dropped],
    };
    this.#progress(`drop at ${budgetText(budget)}`);
    return { result, sums };
  }

  /** The model without some sub-layers, measured once. */
  #dropped(step: DropStep): Promise<{ level: EvalLevel; sums: readonly Sums[] }> {
    const student = without(step.dropped);
    const measure = async () => {
      const measured = await this.#compare(student);
      return { level: await this.#level('drop', 'full', measured, student), sums: measured.sums };
    };
    const known = this.#static.get(step) ?? measure();
    this.#static.set(step, known);
    return known;
  }

  /** Greedy: of the sub-layers that are left, drop the one after which the KL on calibration data is least. */
  async #dropOrder(): Promise<DropStep[]> {
    const least = Math.min(...(this.#options.budgets ?? []).map((budget) => this.#resolve(budget).flopsRatio));
    const order: DropStep[] = [{ dropped: [], ratio: 1 }];
    const policy = this.#network.policy!;
    const routed = routerPlaces(policy).map(({ layer, place, places }) =>
      routerId(layer, places.length > 1 ? 'block' : place),
    );
    const nested = policy.nested?.layers.map((layer) => routerId(layer, 'mlp')) ?? [];
    let left = [...new Set([...routed, ...nested])];
    while (left.length > 0 && order.at(-1)!.ratio >= least) {
      let best: { id: string; kl: number; ratio: number } | null = null;
      for (const id of left) {
        const { meter, sums } = await this.#compare(without([...order.at(-1)!.dropped, id]), this.#calibration);
        const kl = sum(sums, (s) => s.kl);
        if (!best || kl < best.kl) best = { id, kl, ratio: this.#ratio(meter, this.#calibration) };
      }
      order.push({ dropped: [...order.at(-1)!.dropped, best!.id], ratio: best!.ratio });
      left = left.filter((id) => id !== best!.id);
    }
    this.#progress('order of dropping');
    return order;
  }

  async #level(method: Method, budget: Budget, { meter, sums }: Comparison, student: Student): Promise<EvalLevel> {
    const layersRun = meter.layersRun();
    const all = [...layersRun.attn, ...layersRun.mlp];
    return {
      method,
      budget,
      ratio: this.#ratio(meter, this.#batches),
      share: sum(all, (x) => x) / all.length,
      layersRun,
      ...this.#quality(sums),
      ...((this.#options.speed ?? true)
        ? await this.#speed(method, student)
        : { tokensPerSecond: null, timeRatio: null }),
    };
  }

  #quality(
    sums: readonly Sums[],
  ): Pick<EvalLevel, 'perplexity' | 'perplexityRatio' | 'bitsPerByte' | 'kl' | 'agreement'> {
    const statistic = (f: (t: Sums) => number): Measured => bootstrap(sums, f, this.#seed);
    return {
      perplexity: statistic((t) => Math.exp(t.ce / t.n)),
      perplexityRatio: bootstrap(
        paired(this.#full, sums),
        (t) => Math.exp(t['b.ce'] / t['b.n'] - t['a.ce'] / t['a.n']),
        this.#seed,
      ),
      bitsPerByte: sum(sums, (s) => s.bytes) > 0 ? statistic((t) => t.ce / Math.LN2 / t.bytes) : null,
      kl: statistic((t) => t.kl / t.n),
      agreement: statistic((t) => t.agree / t.n),
    };
  }

  // Counted without the loss, which generation does not run; the logits of every token are added to both sides.
  #ratio(meter: ComputeMeter, batches: readonly Batch[]): number {
    const { spec } = this.#network;
    const lengths = batches.flatMap((b) => b.sequences.map((s) => s.ids.length));
    return (meter.flops + headFlops(spec, meter.rows)) / forwardFlops(spec, lengths).total;
  }

  // Medians over runs of the first batch, after one to warm up. The full model takes turns with the other, so that what
  // else the machine does slows both.
  async #speed(
    method: Method,
    { select, feeds, dims }: Student,
  ): Promise<Pick<EvalLevel, 'tokensPerSecond' | 'timeRatio'>> {
    const batch = this.#batches[0];
    const segments = batch.sequences.length;
    const last = batch.offsets.slice(1).map((end) => end - 1);
    const common = { ...base(batch), last, sampling: new Float32Array(segments * 4) };
    const { signal } = this.#options;
    const timed = async (program: Program, own: Pick<RunOptions, 'dims' | 'feeds'>): Promise<number> =>
      (
        await program.run({
          dims: { ...packedDims(batch), ...own.dims },
          feeds: { ...common, ...own.feeds },
          signal,
        })
      ).ms;

    using program = compilePrefill(this.#network, this.#limits, select);
    using full = method === 'full' ? null : compilePrefill(this.#network, this.#limits, () => selectEverything);
    const own = { dims, feeds: feeds(batch, 0) };
    const [ms, fullMs]: [number[], number[]] = [[], []];
    for (let i = 0; i <= timedRuns; i++) {
      const [a, b] = [full && (await timed(full, {})), await timed(program, own)];
      if (i === 0) continue;
      ms.push(b);
      fullMs.push(a ?? b);
    }
    const typical = median(ms);
    return { tokensPerSecond: (batch.ids.length / typical) * 1000, timeRatio: typical / median(fullMs) };
  }
}

interface Comparison {
  readonly meter: ComputeMeter;
  /** Per sequence: n tokens predicted, bytes, and sums of ce, kl and agree. */
  readonly sums: readonly Sums[];
}

/** What is compared with the full model. */
interface Student {
  readonly select: SelectorFactory;
  readonly feeds: (batch: Batch, index: number) => Record<string, TypedArray>;
  readonly dims: Readonly<Record<string, number>>;
}

const backbone: Student = { select: () => selectEverything, feeds: () => ({}), dims: {} };

const without = (dropped: readonly string[]): Student => ({
  ...backbone,
  select: () => droppedSelector(new Set(dropped)),
});

interface DropStep {
  readonly dropped: readonly string[];
  readonly ratio: number;
}

/** Without kl and agree the model is compared with itself. */
function perSequence(batch: Batch, rows: { ce: TypedArray; kl: TypedArray | null; agree: TypedArray | null }): Sums[] {
  return batch.sequences.map((s, i) => {
    const [from, to] = [batch.offsets[i], batch.offsets[i + 1]];
    const total = (values: TypedArray | null, otherwise: number): number => {
      if (!values) return otherwise;
      let result = 0;
      for (let row = from; row < to; row++) result += values[row];
      return result;
    };
    return {
      n: count(s),
      bytes: s.bytes,
      ce: total(rows.ce, 0),
      kl: total(rows.kl, 0),
      agree: total(rows.agree, count(s)),
    };
  });
}

function paired(a: readonly Sums[], b: readonly Sums[]): Sums[] {
  return a.map((s, i) => {
    const named = (prefix: string, sums: Sums) => Object.entries(sums).map(([k, v]) => [`${prefix}.${k}`, v] as const);
    return Object.fromEntries([...named('a', s), ...named('b', b[i])]);
  });
}

/** Sequences at random that hold a share of all tokens, as nearly as whole ones do. */
function randomSequences(
  batches: readonly Batch[],
  share: number,
  seed: number,
  router: number,
): ReadonlySet<Sequence> {
  const all = batches.flatMap(({ sequences }) => sequences);
  const at = noise(seed, batches.length, router, all.length);
  const order = [...all.keys()].sort((a, b) => at[a] - at[b]).map((i) => all[i]);
  const wanted = share * sum(all, ({ ids }) => ids.length);
  let tokens = 0;
  const end = order.findIndex(({ ids }) => {
    tokens += ids.length;
    return tokens - ids.length / 2 > wanted;
  });
  return new Set(end < 0 ? order : order.slice(0, end));
}

/** Uniform scores, fresh for every batch and router. */
function noise(seed: number, batch: number, router: number, rows: number): Float32Array {
  return Float32Array.from({ length: rows }, (_, i) => philox(i, batch * 4096 + router, seed)[0] / 2 ** 32);
}

function sum<T>(items: readonly T[], value: (item: T) => number): number {
  return items.reduce((total, item) => total + value(item), 0);
}
