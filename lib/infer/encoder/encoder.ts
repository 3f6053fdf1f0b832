// Encoders at work: classes and vectors of texts packed end to end, features and scores of one text.
import { createHash } from 'node:crypto';
import { type Budget, type OperatingPoint, resolveBudget } from '../../elastic/budget.js';
import { decideExit, type Exit, type ExitState, settingProblem, usableExits } from '../../elastic/exits.js';
import { sharesSpace } from '../../elastic/nested.js';
import { poolings } from '../../model/encoder.js';
import { InvalidArgumentError } from '../../native/errors.js';
import { requireNumbers } from '../compute.js';
import { checkNumber, checkOptions, positiveInteger } from '../options.js';
import type { ClassifyOptions, ClassifyResult, ComputeReport, EmbedOptions, EmbedResult, TextInput } from '../types.js';
import type { EncoderNetwork } from './network.js';
import { EncoderPrograms, type End, packedTexts, type StageRun } from './programs.js';
import { compacted, encodeRow, encodeRows, type Row } from './rows.js';

const defaultBatch = 64;
/** Tokens of the texts that shares of FLOPs and times are for, where the context holds as many. */
const budgetTokens = 128;

/** What one text took, in all its windows. */
interface Spent {
  flops: number;
  /** At the full budget. */
  flopsFull: number;
  readonly layersRun: { attn: Float32Array; mlp: Float32Array };
  /** Of the runs that it was in. */
  ms: number;
  /** Tokens of these, where a text is in several for its layers those of the first. */
  tokens: number;
}

/** A text as its windows come in. */
interface Reading {
  /** Mean so far of what they give. */
  readonly values: Float64Array;
  readonly spent: Spent;
  truncated: number;
  windows: number;
  /** The last layer that any window ran. */
  layer: number;
}

/** Calls of one loaded encoder; made by `ElasticModel`. */
export class Encoder implements Disposable {
  readonly network: EncoderNetwork;
  readonly #programs: EncoderPrograms;
  #warned = false;

  constructor(network: EncoderNetwork) {
    this.network = network;
    this.#programs = new EncoderPrograms(network);
  }

  async classify(inputs: readonly TextInput[], options: ClassifyOptions): Promise<ClassifyResult[]> {
    checkOptions('classify', options, ['budget', 'exit', 'batch', 'windows', 'signal']);
    const { spec, policy, dir } = this.network;
    const { labels, scores, task } = spec.encoder;
    if (task !== 'sequence-classification') {
      throw new InvalidArgumentError(
        `[classify] ${dir} has no classifier: it is a ${spec.type} model for ${task}; embed makes vectors of texts`,
      );
    }
    const { budget = 'full', exit, signal } = options;
    const problem = exit === undefined ? null : settingProblem(exit, policy?.exits);
    if (problem) throw new InvalidArgumentError(`[classify] exit must be ${problem}`);
    const point = this.resolve('classify', budget);
    const setting = exit ?? point.exit;
    const exits = setting ? usableExits(setting, policy!.exits!) : [];
    if (setting && exits.length === 0) this.#warnOfNoExit(setting);
    const effective = { ...point.spec, ...(setting && { exit: setting }) };
    const readings = new Map<number, Reading>();
    for (const rows of this.#batches('classify', 'classes', inputs, options)) {
      const spent = this.#begin(readings, rows, 'classes', labels.length);
      for await (const { row, own, layer } of this.#decided(rows, spent, exits, point.widths, signal)) {
        const reading = readings.get(row.index)!;
        for (const [i, score] of scoring[scores](own).entries()) reading.values[i] += row.weight * score;
        reading.layer = Math.max(reading.layer, layer);
      }
    }
    return inputs.map((_, i) => {
      const { values, spent, truncated, windows, layer } = readings.get(i)!;
      const ranked = labels.map((label, c) => ({ label, score: values[c] })).sort((a, b) => b.score - a.score);
      const compute: ComputeReport = {
        ...report({ requested: budget, level: exit ? null : point.level, effective }, spent),
        ...(setting && { exitLayer: layer }),
      };
      return { ...ranked[0], scores: ranked, truncated, windows, compute };
    });
  }

  async embed(inputs: readonly TextInput[], options: EmbedOptions): Promise<EmbedResult> {
    checkOptions('embed', options, ['budget', 'pooling', 'normalize', 'dims', 'batch', 'windows', 'signal']);
    const { spec, policy } = this.network;
    const { pooling = this.network.pooling, normalize = this.network.normalize, dims = spec.hidden } = options;
    if (!poolings.includes(pooling)) {
      throw new InvalidArgumentError(`[embed] pooling must be one of ${poolings.join(', ')}, got ${String(pooling)}`);
    }
    if (typeof normalize !== 'boolean') {
      throw new InvalidArgumentError(`[embed] normalize must be true or false, got ${String(normalize)}`);
    }
    const within = (n: number) => positiveInteger(n) && n <= spec.hidden;
    checkNumber('embed', 'dims', dims, within, `an integer from 1 to ${spec.hidden}`);
    const { budget = 'full', signal } = options;
    const point = this.resolve('embed', budget);
    if (point.exit) throw new InvalidArgumentError('[embed] budget leaves at exits, and those are for classify');
    const { widths } = point;
    const readings = new Map<number, Reading>();
    const total = this.#nothing();
    for (const rows of this.#batches('embed', pooling, inputs, options)) {
      const spent = this.#begin(readings, rows, pooling, dims);
      const run = await this.#programs.run({ end: pooling }, rows, { widths, signal });
      requireNumbers('embed', run.values);
      for (const [s, row] of rows.entries()) {
        const { values } = readings.get(row.index)!;
        for (let d = 0; d < dims; d++) values[d] += row.weight * run.values[s * spec.hidden + d];
      }
      add(spent, run, rows);
      total.ms += run.ms;
      total.tokens += countTokens(rows);
      // The same of every run: all rows enter, at the widths of the call.
      total.layersRun.attn.set(run.layersRun.attn);
      total.layersRun.mlp.set(run.layersRun.mlp);
    }
    const read = inputs.map((_, i) => readings.get(i)!);
    for (const { spent } of read) {
      total.flops += spent.flops;
      total.flopsFull += spent.flopsFull;
    }
    const vectors = read.map(({ values }) => {
      const vector = Float32Array.from(values);
      return normalize ? normalized(vector) : vector;
    });
    const asked = { requested: budget, level: point.level, effective: point.spec };
    const own = widths && !(policy?.nested && sharesSpace(widths, policy.nested, spec.ffn)) ? [widths] : [];
    const space = [await this.network.fingerprint(), pooling, normalize, dims, ...own];
    const spaceId = createHash('sha256').update(space.join(' ')).digest('hex').slice(0, 16);
    return {
      ...{ vectors, dims, spaceId },
      truncated: read.map(({ truncated }) => truncated),
      windows: read.map(({ windows }) => windows),
      compute: read.map(({ spent }) => report(asked, spent)),
      usage: { inputTokens: total.tokens, cachedTokens: 0, outputTokens: 0, compute: report(asked, total) },
    };
  }

  /** Features of every token of a text after the last layer: f32 [tokens, hidden]. */
  async features(input: TextInput, signal?: AbortSignal): Promise<Float32Array> {
    return this.#single('features', 'features', input, signal);
  }

  /** f32 [tokens, vocab] of a model for masked tokens, [classes] of a classifier. */
  async logits(input: TextInput, signal?: AbortSignal): Promise<Float32Array> {
    const { dir, spec } = this.network;
    if (spec.encoder.task === 'feature-extraction') {
      throw new InvalidArgumentError(`[logits] ${dir} has no head: it is a ${spec.type} model for features`);
    }
    const classifies = spec.encoder.task === 'sequence-classification';
    return this.#single('logits', classifies ? 'classes' : 'tokens', input, signal);
  }

  dispose(): void {
    this.#programs.dispose();
    this.network.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  async #single(api: string, end: End, input: TextInput, signal?: AbortSignal): Promise<Float32Array> {
    const row = encodeRow(this.network, api, input, 0);
    const { values } = await this.#programs.run({ end }, [row], { widths: null, signal });
    requireNumbers(api, values);
    return values;
  }

  /**
   * What a budget means for texts of so many tokens, alone on this device.
   * @throws InvalidArgumentError when the model cannot run at that budget.
   */
  resolve(api: string, budget: Budget, length = Math.min(this.network.maxContext, budgetTokens)): OperatingPoint {
    const { spec, policy, dir, profiles, measuredOn } = this.network;
    if (typeof budget === 'object' && budget !== null && 'latencyMs' in budget && budget.metric === 'tpot') {
      throw new InvalidArgumentError(
        `[${api}] metric must be total or ttft: ${dir} is an encoder and generates nothing`,
      );
    }
    if (!policy && budget !== 'full' && budget !== 1) {
      throw new InvalidArgumentError(
        `[${api}] ${dir} has the full budget alone: it has no exits and no nested feed-forwards, got ${JSON.stringify(budget)}`,
      );
    }
    return resolveBudget(budget, spec, policy, { length, profile: () => profiles.of(measuredOn()) });
  }

  #warnOfNoExit(setting: unknown): void {
    if (this.#warned) return;
    this.#warned = true;
    process.emitWarning(
      `no text can leave at an exit by ${JSON.stringify(setting)}: all layers run, as at the full budget`,
      { type: 'ElastiformWarning', code: 'ExitsDisabled' },
    );
  }

  /**
   * The classes' scores before softmax of every row, `own` f32 [classes], as rows leave: at an exit after `layer` or after the
   * last one. Rows that stay are packed anew for the next layers.
   *
   * @param spent by text, added to
   */
  async *#decided(
    rows: readonly Row[],
    spent: ReadonlyMap<number, Spent>,
    exits: readonly Exit[],
    widths: readonly number[] | null,
    signal?: AbortSignal,
  ): AsyncGenerator<{ row: Row; own: Float32Array; layer: number }> {
    const { spec } = this.network;
    const classes = spec.encoder.labels.length;
    const before = new Map<Row, ExitState>();
    let staying = rows;
    let residual: Float32Array | undefined;
    let from = 0;
    for (const exit of [...exits, null]) {
      const to = exit ? exit.afterLayer + 1 : spec.layers;
      const run = await this.#programs.run({ from, to, end: exit ? 'exit' : 'classes' }, staying, {
        ...{ residual, widths, signal },
      });
      requireNumbers('classify', run.values);
      add(spent, run, staying);
      const kept = new Set<Row>();
      for (const [s, row] of staying.entries()) {
        const own = run.values.subarray(s * classes, (s + 1) * classes);
        const decision = exit && decideExit(exit, own, before.get(row) ?? null);
        if (decision && !decision.leaves) {
          before.set(row, decision);
          kept.add(row);
        } else yield { row, own, layer: to - 1 };
      }
      if (kept.size === 0) return;
      residual = compacted(run.residual!, staying, kept, spec.hidden);
      staying = staying.filter((row) => kept.has(row));
      from = to;
    }
  }

  /** @internal Scores before softmax of every exit's head, then of the classifier, for texts of which none leaves, [classes] each. */
  async *exitScores(
    inputs: readonly TextInput[],
    { signal }: Pick<ClassifyOptions, 'signal'>,
  ): AsyncGenerator<{ index: number; tokens: number; truncated: number; scores: Float32Array[] }[]> {
    const { spec, policy } = this.network;
    const classes = spec.encoder.labels.length;
    const ends = [...(policy?.exits ?? []).map(({ afterLayer }) => afterLayer + 1), spec.layers];
    for (const rows of this.#batches('calibrate', 'classes', inputs, {})) {
      const scores: Float32Array[][] = rows.map(() => []);
      let residual: Float32Array | undefined;
      for (const [e, to] of ends.entries()) {
        const stage = { from: e === 0 ? 0 : ends[e - 1], to, end: to < spec.layers ? 'exit' : 'classes' } as const;
        const run = await this.#programs.run(stage, rows, { residual, widths: null, signal });
        requireNumbers('calibrate', run.values);
        for (const [s, own] of scores.entries()) own.push(run.values.slice(s * classes, (s + 1) * classes));
        residual = run.residual ?? undefined;
      }
      yield rows.map(({ index, ids, truncated }, s) => ({ index, tokens: ids.length, truncated, scores: scores[s] }));
    }
  }

  #nothing(): Spent {
    const { layers } = this.network.spec;
    const layersRun = { attn: new Float32Array(layers), mlp: new Float32Array(layers) };
    return { flops: 0, flopsFull: 0, layersRun, ms: 0, tokens: 0 };
  }

  /** Notes the texts of rows that are about to run, and returns what they take, by text; `size` values come of each. */
  #begin(readings: Map<number, Reading>, rows: readonly Row[], end: End, size: number): ReadonlyMap<number, Spent> {
    const spent = new Map<number, Spent>();
    const tokens = countTokens(rows);
    for (const row of rows) {
      const { index, truncated, windows } = row;
      const reading = readings.get(index) ?? {
        ...{ values: new Float64Array(size), spent: this.#nothing(), truncated, windows, layer: 0 },
      };
      readings.set(index, reading);
      reading.spent.flopsFull += this.#programs.flops(end, row);
      if (!spent.has(index)) reading.spent.tokens += tokens;
      spent.set(index, reading.spent);
    }
    return spent;
  }

  /** Rows of as many texts as fit one run, in their order. */
  *#batches(
    api: string,
    end: End,
    inputs: readonly TextInput[],
    { batch = defaultBatch, windows }: Pick<ClassifyOptions, 'batch' | 'windows'>,
  ): Generator<Row[]> {
    if (!Array.isArray(inputs)) throw new InvalidArgumentError(`[${api}] texts must be a list, got ${typeof inputs}`);
    const within = (n: number) => positiveInteger(n) && n <= packedTexts;
    checkNumber(api, 'batch', batch, within, `an integer from 1 to ${packedTexts}`);
    const overlap = this.#overlapOf(api, windows);
    const limit = this.#programs.limits(end).rows;
    let open: Row[] = [];
    let count = 0;
    for (const [i, input] of inputs.entries()) {
      for (const row of encodeRows(this.network, api, input, i, overlap)) {
        if (open.length > 0 && (open.length === batch || count + row.ids.length > limit)) {
          yield open;
          open = [];
          count = 0;
        }
        open.push(row);
        count += row.ids.length;
      }
    }
    if (open.length > 0) yield open;
  }

  #overlapOf(api: string, windows: ClassifyOptions['windows']): number | undefined {
    if (windows === undefined) return undefined;
    const most = Math.floor(this.network.maxContext / 2);
    const overlap: unknown = typeof windows === 'object' ? windows?.overlap : undefined;
    if (Number.isInteger(overlap) && (overlap as number) >= 0 && (overlap as number) <= most) return overlap as number;
    throw new InvalidArgumentError(
      `[${api}] windows must be { overlap } of 0 to ${most} tokens, half the context, got ${JSON.stringify(windows)}`,
    );
  }
}

function report(
  asked: Pick<ComputeReport, 'requested' | 'level' | 'effective'>,
  { flops, flopsFull, layersRun, ms, tokens }: Spent,
): ComputeReport {
  return {
    ...asked,
    layersRun,
    ...{ flops, flopsFull, ratio: flopsFull > 0 ? flops / flopsFull : 1 },
    ...{ ms: { queue: 0, prefill: ms, decode: 0, total: ms }, tokensPerSecond: ms > 0 ? (tokens / ms) * 1000 : null },
  };
}

const countTokens = (rows: readonly Row[]): number => rows.reduce((sum, { ids }) => sum + ids.length, 0);

/** Adds what a run took of its rows to what their texts took. Every layer runs a row in one stage at most. */
function add(spent: ReadonlyMap<number, Spent>, { flops, layersRun, ms }: StageRun, rows: readonly Row[]): void {
  for (const [s, { index, weight }] of rows.entries()) {
    const own = spent.get(index)!;
    own.flops += flops[s];
    for (const place of ['attn', 'mlp'] as const) {
      for (const [layer, share] of layersRun[place].entries()) own.layersRun[place][layer] += weight * share;
    }
  }
  for (const index of new Set(rows.map((row) => row.index))) spent.get(index)!.ms += ms;
}

const scoring = {
  softmax(logits: Float32Array): number[] {
    const largest = Math.max(...logits);
    const exp = Array.from(logits, (x) => Math.exp(x - largest));
    const sum = exp.reduce((a, b) => a + b, 0);
    return exp.map((e) => e / sum);
  },
  sigmoid: (logits: Float32Array): number[] => Array.from(logits, (x) => 1 / (1 + Math.exp(-x))),
  none: (logits: Float32Array): number[] => [...logits],
} as const;

/** The vector with length 1; of zeros, itself. */
function normalized(vector: Float32Array): Float32Array {
  const length = Math.hypot(...vector);
  return length > 0 ? vector.map((x) => x / length) : vector;
}
