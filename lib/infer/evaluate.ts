// Quality, counted compute and measured speed of a model at budgets, with intervals, beside baselines at equal compute.
import { isExperts, routerId } from '../elastic/axes.js';
import { type Budget, budgetText } from '../elastic/budget.js';
import { routedLayers, routerPlaces } from '../elastic/policy.js';
import { capacityFeed, droppedSelector, randomSelector, scoreFeed, thresholdFeeds } from '../elastic/rows.js';
import type { Program } from '../graph/index.js';
import { forwardFlops, headFlops } from '../model/flops.js';
import { type Place, places, selectEverything } from '../model/select.js';
import { InvalidArgumentError, InvalidDataError } from '../native/errors.js';
import type { TypedArray } from '../native/index.js';
import { ComputeMeter } from './compute.js';
import { type ElasticModel, loadModel } from './model.js';
import { type Network, resolveFor } from './network.js';
import { checkNumber, checkOptions, naturalNumber, positiveInteger } from './options.js';
import {
  budgetSelector,
  compileCompare,
  compilePrefill,
  compileScore,
  type PackedBatch,
  type PackedLimits,
  packedDims,
  type SelectorFactory,
} from './programs.js';
import { philox, seedLimit } from './random.js';
import { bootstrap, type Measured, median, type Sums } from './statistics.js';
import { expertShares } from './trace.js';

export type Baseline = 'random' | 'drop';
/** 'full' is the backbone, which any budget of 1 runs. */
export type Method = 'full' | 'routed' | Baseline;

/** A text, or token ids with the size of the text they stand for when it is known. */
export type EvalDocument = string | { ids: readonly number[]; bytes?: number };

export interface EvalOptions {
  data: readonly EvalDocument[];
  /** Default: 'full'. */
  budgets?: readonly Budget[];
  /**
   * Measured at the compute of every budget below full. 'random': as many tokens enter each sub-layer, chosen at random.
   * 'drop': whole sub-layers are left out, in the order that hurts least on calibration data; of the two choices around
   * the compute each gets a share of the sequences, in expectation, so that the mean is the same.
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
  seed?: number;
  onProgress?: (event: { phase: string; done: number; total: number }) => void;
  signal?: AbortSignal;
}

/** One method at one budget. Intervals are 95 %, from a bootstrap over sequences. */
export interface EvalLevel {
  method: Method;
  budget: Budget;
  /** FLOPs the kernels counted over those of the full model; both with the logits of every token. */
  ratio: number;
  /** Mean share of tokens that entered a sub-layer. */
  share: number;
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

export interface EvalReport {
  /** Tokens predicted. */
  tokens: number;
  sequences: number;
  sequenceLength: number;
  levels: EvalLevel[];
}

/** A stretch of a document: row i predicts targets[i]. */
interface Sequence {
  readonly ids: readonly number[];
  readonly targets: readonly number[];
  readonly bytes: number;
}

interface Batch extends PackedBatch {
  readonly sequences: readonly Sequence[];
  readonly targets: Int32Array;
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
    for (const budget of budgets) this.#resolve(budget);

    let sequences = cut(network, options.data, this.#length, 'data');
    let calibration: Sequence[] = [];
    if (baselines.includes('drop')) {
      if (options.calibration) calibration = cut(network, options.calibration, this.#length, 'calibration');
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
    const all = [...this.#batches, ...this.#calibration];
    this.#limits = {
      rows: Math.max(...all.map((b) => b.ids.length)),
      segments: Math.max(...all.map((b) => b.sequences.length)),
    };
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
        levels.push(
          await this.#level(
            'full',
            budget,
            full,
            () => selectEverything,
            () => ({}),
          ),
        );
        this.#progress(`full at ${budgetText(budget)}`);
        continue;
      }
      const feeds = (batch: Batch) => thresholdFeeds(point.thresholds, batch.sequences.length);
      const routedSelector: SelectorFactory = (graph, _rows, segments) =>
        budgetSelector(graph, this.#network, point, segments);
      const measured = await this.#compare(routedSelector, feeds);
      const routed = await this.#level('routed', budget, measured, routedSelector, feeds);
      this.#progress(`routed at ${budgetText(budget)}`);
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
    const meter = new ComputeMeter(network.spec.layers);
    const sums: Sums[] = [];
    using program = compileScore(network, this.#limits, () => selectEverything);
    for (const batch of [...this.#calibration, ...this.#batches]) {
      const feeds = { ...base(batch), targets: batch.targets, weight: new Float32Array(batch.ids.length) };
      const result = await program.run({ dims: packedDims(batch), feeds, signal: this.#options.signal });
      this.#teacher.set(batch, result.outputs.hidden as Float32Array);
      if (!this.#batches.includes(batch)) continue;
      meter.add(result, batch.ids.length, ['head']);
      sums.push(...perSequence(batch, { ce: result.outputs.ce, kl: null, agree: null }));
    }
    this.#progress('full model');
    return { meter, sums };
  }

  /** Runs a student over batches, by default those evaluated. */
  async #compare(
    select: SelectorFactory,
    feeds: (batch: Batch, index: number) => Record<string, TypedArray>,
    batches = this.#batches,
  ): Promise<Comparison> {
    const meter = new ComputeMeter(this.#network.spec.layers);
    const sums: Sums[] = [];
    using program = compileCompare(this.#network, this.#limits, select);
    for (const [i, batch] of batches.entries()) {
      const result = await program.run({
        dims: packedDims(batch),
        feeds: {
          ...base(batch),
          ...feeds(batch, i),
          teacher: this.#teacher.get(batch)!,
          targets: batch.targets,
          weight: new Float32Array(batch.ids.length),
        },
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
      // Where tokens are not routed, too, all that is less than whole is the share of experts.
      const used = routedLayers(policy, place).includes(layer) ? experts[place][layer] : ran;
      return { id, outputs, share: ran === 0 ? 0 : isExperts(axis) ? used : ran / used };
    });
    const present = shares.filter(({ share }) => share > 0);
    const absent = new Set(shares.filter(({ share }) => share === 0).map(({ id }) => id));
    const selector: SelectorFactory = (graph, rows, segments) => randomSelector(graph, policy, rows, segments, absent);
    // Experts come whole: of the numbers around a share each is drawn for some sequences, so that the mean is the same.
    const whole = (share: number, u: number) => Math.floor(Math.round(share * 1e6) / 1e6 + u);
    const feeds = (batch: Batch, index: number): Record<string, TypedArray> =>
      Object.fromEntries(
        present.flatMap(({ id, outputs, share }, r) => [
          [
            capacityFeed(id),
            noise(this.#seed, index, r + 2048, batch.sequences.length).map((u) =>
              Math.min(1, outputs === 1 ? share : whole(share * outputs, u) / outputs),
            ),
          ],
          [scoreFeed(id), noise(this.#seed, index, r, batch.ids.length * outputs)],
        ]),
      );
    const measured = await this.#compare(selector, feeds);
    const result = await this.#level('random', budget, measured, selector, feeds);
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
    const selector: SelectorFactory = () => droppedSelector(new Set(step.dropped));
    const measure = async () => {
      const measured = await this.#compare(selector, () => ({}));
      return { level: await this.#level('drop', 'full', measured, selector, () => ({})), sums: measured.sums };
    };
    const known = this.#static.get(step) ?? measure();
    this.#static.set(step, known);
    return known;
  }

  /** Greedy: of the sub-layers that are left, drop the one after which the KL on calibration data is least. */
  async #dropOrder(): Promise<DropStep[]> {
    const { spec } = this.#network;
    const least = Math.min(...(this.#options.budgets ?? []).map((budget) => this.#resolve(budget).flopsRatio));
    const order: DropStep[] = [{ dropped: [], ratio: 1 }];
    let left = Array.from({ length: spec.layers }, (_, l) => places.map((p) => routerId(l, p))).flat();
    while (left.length > 0 && order.at(-1)!.ratio >= least) {
      let best: { id: string; kl: number; ratio: number } | null = null;
      for (const id of left) {
        const dropped = new Set([...order.at(-1)!.dropped, id]);
        const { meter, sums } = await this.#compare(
          () => droppedSelector(dropped),
          () => ({}),
          this.#calibration,
        );
        const kl = sum(sums, (s) => s.kl);
        if (!best || kl < best.kl) best = { id, kl, ratio: this.#ratio(meter, this.#calibration) };
      }
      order.push({ dropped: [...order.at(-1)!.dropped, best!.id], ratio: best!.ratio });
      left = left.filter((id) => id !== best!.id);
    }
    this.#progress('order of dropping');
    return order;
  }

  async #level(
    method: Method,
    budget: Budget,
    { meter, sums }: Comparison,
    select: SelectorFactory,
    feeds: (batch: Batch, index: number) => Record<string, TypedArray>,
  ): Promise<EvalLevel> {
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
        ? await this.#speed(method, select, feeds)
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
    select: SelectorFactory,
    feeds: (batch: Batch, index: number) => Record<string, TypedArray>,
  ): Promise<Pick<EvalLevel, 'tokensPerSecond' | 'timeRatio'>> {
    const batch = this.#batches[0];
    const segments = batch.sequences.length;
    const last = batch.offsets.slice(1).map((end) => end - 1);
    const common = { ...base(batch), last, sampling: new Float32Array(segments * 4) };
    const { signal } = this.#options;
    const timed = async (program: Program, more: Record<string, TypedArray>): Promise<number> =>
      (await program.run({ dims: packedDims(batch), feeds: { ...common, ...more }, signal })).ms;

    using program = compilePrefill(this.#network, this.#limits, select);
    using full = method === 'full' ? null : compilePrefill(this.#network, this.#limits, () => selectEverything);
    const own = feeds(batch, 0);
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

interface DropStep {
  readonly dropped: readonly string[];
  readonly ratio: number;
}

/**
 * Cuts documents into sequences of at most `length` rows; every token but the first of a document is predicted exactly
 * once. Where the tokenizer begins texts with a BOS, every sequence begins with it and a document's first token counts.
 */
function cut(network: Network, documents: readonly EvalDocument[], length: number, name: string): Sequence[] {
  const { tokenizer, spec } = network;
  const sequences: Sequence[] = [];
  if (!Array.isArray(documents))
    throw new InvalidArgumentError(`[evaluate] ${name} must be a list of texts or token ids`);
  for (const document of documents) {
    let ids: readonly number[];
    let bytes = 0;
    if (typeof document === 'string') {
      if (!tokenizer)
        throw new InvalidArgumentError('[evaluate] texts need a tokenizer, and this model has no tokenizer.json');
      ids = tokenizer.encode(document);
      bytes = Buffer.byteLength(document);
    } else {
      ids = document.ids;
      bytes = document.bytes ?? 0;
    }
    const bad = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= spec.vocab);
    if (bad !== undefined) {
      throw new InvalidDataError(
        `[evaluate] ${name} has token id ${bad}; the model's vocabulary ends at ${spec.vocab - 1}`,
      );
    }
    const bos = tokenizer?.bosId ?? null;
    const begins = bos !== null && ids[0] === bos;
    const predicted = ids.length - 1;
    for (let at = 0; at < predicted; at += length) {
      const end = Math.min(at + length, predicted);
      const rows = ids.slice(at, end);
      // Later sequences of a document start over from BOS instead of the token before.
      const first = begins && at > 0 ? [bos, ...rows.slice(1)] : rows;
      sequences.push({ ids: first, targets: ids.slice(at + 1, end + 1), bytes: (bytes * (end - at)) / predicted });
    }
  }
  if (sequences.length === 0) throw new InvalidDataError(`[evaluate] ${name} holds no text to predict`);
  return sequences;
}

const count = (s: Sequence): number => s.targets.length;

/** The first sequences with at most `tokens` tokens; at least one. */
function take(sequences: readonly Sequence[], tokens: number): Sequence[] {
  let total = 0;
  return sequences.filter((s, i) => {
    total += count(s);
    return i === 0 || total <= tokens;
  });
}

function pack(sequences: readonly Sequence[], rows: number): Batch[] {
  const batches: Batch[] = [];
  for (let at = 0; at < sequences.length; ) {
    let end = at;
    for (let total = 0; end < sequences.length && (end === at || total + sequences[end].ids.length <= rows); end++) {
      total += sequences[end].ids.length;
    }
    const chosen = sequences.slice(at, end);
    const offsets = [0];
    for (const s of chosen) offsets.push(offsets.at(-1)! + s.ids.length);
    batches.push({
      sequences: chosen,
      ids: Int32Array.from(chosen.flatMap((s) => s.ids)),
      positions: Int32Array.from(chosen.flatMap((s) => s.ids.map((_, i) => i))),
      targets: Int32Array.from(chosen.flatMap((s) => s.targets)),
      offsets: Int32Array.from(offsets),
    });
    at = end;
  }
  return batches;
}

const base = ({ ids, positions, offsets }: Batch) => ({ ids, positions, offsets });

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

/** Uniform scores, fresh for every batch and router. */
function noise(seed: number, batch: number, router: number, rows: number): Float32Array {
  return Float32Array.from({ length: rows }, (_, i) => philox(i, batch * 4096 + router, seed)[0] / 2 ** 32);
}

function sum<T>(items: readonly T[], value: (item: T) => number): number {
  return items.reduce((total, item) => total + value(item), 0);
}
