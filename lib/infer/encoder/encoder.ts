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
import { compacted, encodeRow, type Row } from './rows.js';

const defaultBatch = 64;
/** Tokens of the texts that shares of FLOPs are for, where the context holds as many. */
const budgetTokens = 128;

/** What one text took. */
interface Spent {
  flops: number;
  readonly layersRun: { attn: Float32Array; mlp: Float32Array };
  /** Of the runs that it was in. */
  ms: number;
  /** Tokens of the first of them. */
  readonly tokens: number;
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
    checkOptions('classify', options, ['budget', 'exit', 'batch', 'signal']);
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
    const point = this.#resolve('classify', budget);
    const setting = exit ?? point.exit;
    const exits = setting ? usableExits(setting, policy!.exits!) : [];
    if (setting && exits.length === 0) this.#warnOfNoExit(setting);
    const effective = { ...point.spec, ...(setting && { exit: setting }) };
    const results = new Array<ClassifyResult>(inputs.length);
    for (const rows of this.#batches('classify', 'classes', inputs, options)) {
      for await (const { row, own, spent, layer } of this.#decided(rows, exits, point.widths, signal)) {
        const values = scoring[scores](own);
        const ranked = labels.map((label, i) => ({ label, score: values[i] })).sort((a, b) => b.score - a.score);
        const compute: ComputeReport = {
          ...this.#report({ requested: budget, level: exit ? null : point.level, effective }, spent, 'classes', [row]),
          ...(setting && { exitLayer: layer }),
        };
        results[row.index] = { ...ranked[0], scores: ranked, truncated: row.truncated, compute };
      }
    }
    return results;
  }

  async embed(inputs: readonly TextInput[], options: EmbedOptions): Promise<EmbedResult> {
    checkOptions('embed', options, ['budget', 'pooling', 'normalize', 'dims', 'batch', 'signal']);
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
    const point = this.#resolve('embed', budget);
    if (point.exit) throw new InvalidArgumentError('[embed] budget leaves at exits, and those are for classify');
    const { widths } = point;
    const vectors = new Array<Float32Array>(inputs.length);
    const truncated = new Array<number>(inputs.length);
    const total: Spent = { flops: 0, layersRun: this.#noLayers(), ms: 0, tokens: 0 };
    let tokens = 0;
    const all: Row[] = [];
    for (const rows of this.#batches('embed', pooling, inputs, options)) {
      const run = await this.#programs.run({ end: pooling }, rows, { widths, signal });
      requireNumbers('embed', run.values);
      for (const [s, row] of rows.entries()) {
        const vector = run.values.slice(s * spec.hidden, s * spec.hidden + dims);
        vectors[row.index] = normalize ? normalized(vector) : vector;
        truncated[row.index] = row.truncated;
        total.flops += run.flops[s];
      }
      all.push(...rows);
      tokens += countTokens(rows);
      total.ms += run.ms;
      // The same of every run: all rows enter, at the widths of the call.
      total.layersRun.attn.set(run.layersRun.attn);
      total.layersRun.mlp.set(run.layersRun.mlp);
    }
    const asked = { requested: budget, level: point.level, effective: point.spec };
    const compute = this.#report(asked, { ...total, tokens }, pooling, all);
    const own = widths && !(policy?.nested && sharesSpace(widths, policy.nested, spec.ffn)) ? [widths] : [];
    const space = [await this.network.fingerprint(), pooling, normalize, dims, ...own];
    const spaceId = createHash('sha256').update(space.join(' ')).digest('hex').slice(0, 16);
    const usage = { inputTokens: tokens, cachedTokens: 0, outputTokens: 0, compute };
    return { vectors, dims, spaceId, truncated, usage };
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

  #resolve(api: string, budget: Budget): OperatingPoint {
    const { spec, policy, maxContext, dir } = this.network;
    if (typeof budget === 'object' && budget !== null && 'latencyMs' in budget) {
      throw new InvalidArgumentError(`[${api}] budgets by time are for decoders, and ${dir} is an encoder`);
    }
    if (!policy && budget !== 'full' && budget !== 1) {
      throw new InvalidArgumentError(
        `[${api}] ${dir} has the full budget alone: it has no exits and no nested feed-forwards, got ${JSON.stringify(budget)}`,
      );
    }
    return resolveBudget(budget, spec, policy, { length: Math.min(maxContext, budgetTokens) });
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
   * The classes' scores before softmax of every row, `own` f32 [classes], with what it cost, as rows leave: at an exit after `layer`
   * or after the last one. Rows that stay are packed anew for the next layers.
   */
  async *#decided(
    rows: readonly Row[],
    exits: readonly Exit[],
    widths: readonly number[] | null,
    signal?: AbortSignal,
  ): AsyncGenerator<{ row: Row; own: Float32Array; spent: Spent; layer: number }> {
    const { spec } = this.network;
    const classes = spec.encoder.labels.length;
    const tokens = countTokens(rows);
    const spent = new Map(rows.map((row) => [row, { flops: 0, layersRun: this.#noLayers(), ms: 0, tokens }] as const));
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
      const kept = new Set<Row>();
      for (const [s, row] of staying.entries()) {
        const own = run.values.subarray(s * classes, (s + 1) * classes);
        addTo(spent.get(row)!, run, s);
        const decision = exit && decideExit(exit, own, before.get(row) ?? null);
        if (decision && !decision.leaves) {
          before.set(row, decision);
          kept.add(row);
        } else yield { row, own, spent: spent.get(row)!, layer: to - 1 };
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

  #noLayers() {
    const { layers } = this.network.spec;
    return { attn: new Float32Array(layers), mlp: new Float32Array(layers) };
  }

  /** Rows of as many texts as fit one run, in their order. */
  *#batches(
    api: string,
    end: End,
    inputs: readonly TextInput[],
    { batch = defaultBatch }: Pick<ClassifyOptions, 'batch'>,
  ): Generator<Row[]> {
    if (!Array.isArray(inputs)) throw new InvalidArgumentError(`[${api}] texts must be a list, got ${typeof inputs}`);
    const within = (n: number) => positiveInteger(n) && n <= packedTexts;
    checkNumber(api, 'batch', batch, within, `an integer from 1 to ${packedTexts}`);
    const limit = this.#programs.limits(end).rows;
    let open: Row[] = [];
    let count = 0;
    for (const [i, input] of inputs.entries()) {
      const row = encodeRow(this.network, api, input, i);
      if (open.length > 0 && (open.length === batch || count + row.ids.length > limit)) {
        yield open;
        open = [];
        count = 0;
      }
      open.push(row);
      count += row.ids.length;
    }
    if (open.length > 0) yield open;
  }

  #report(
    asked: Pick<ComputeReport, 'requested' | 'level' | 'effective'>,
    { flops, layersRun, ms, tokens }: Spent,
    end: End,
    rows: readonly Row[],
  ): ComputeReport {
    const flopsFull = rows.reduce((sum, row) => sum + this.#programs.flops(end, row), 0);
    return {
      ...asked,
      layersRun,
      ...{ flops, flopsFull, ratio: flopsFull > 0 ? flops / flopsFull : 1 },
      ...{ ms: { queue: 0, prefill: ms, decode: 0, total: ms }, tokensPerSecond: ms > 0 ? (tokens / ms) * 1000 : null },
    };
  }
}

const countTokens = (rows: readonly Row[]): number => rows.reduce((sum, { ids }) => sum + ids.length, 0);

/** Adds what a run took of its row `s`. Every layer runs in one stage at most. */
function addTo(spent: Spent, { flops, layersRun, ms }: StageRun, s: number): void {
  spent.flops += flops[s];
  spent.ms += ms;
  for (const place of ['attn', 'mlp'] as const) {
    for (const [layer, share] of layersRun[place].entries()) spent.layersRun[place][layer] += share;
  }
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
