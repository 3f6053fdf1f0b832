// How far slices of a nested model are from the whole one on a text, each measured once: a file keeps the scores.
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { resolveBudget } from '../../elastic/budget.js';
import { widthShares } from '../../elastic/nested.js';
import { Reader } from '../../elastic/reader.js';
import { thresholdFeeds } from '../../elastic/rows.js';
import { adapterDirectory } from '../../elastic/store.js';
import type { Program } from '../../graph/index.js';
import { inFileSystem, readJson, sha256File, writeFileAtomic } from '../../io/files.js';
import { adapterWeightsFile } from '../../io/peft.js';
import { selectEverything } from '../../model/select.js';
import { InvalidDataError } from '../../native/errors.js';
import { type Batch, count, cut, type EvalDocument, limitsOf, pack, scoreFeeds, take } from '../batches.js';
import type { Network } from '../network.js';
import { budgetDims, budgetSelector, compileCompare, compileScore, packedDims } from '../programs.js';
import type { SearchPoint } from './searched.js';

type SliceScore = Pick<SearchPoint, 'kl' | 'agreement'>;

export interface ScoreOptions {
  data: readonly EvalDocument[];
  /** Longest sequence in tokens. */
  length: number;
  /** Tokens of the text to measure on at most. */
  limit: number;
  /** Where scores are kept. */
  file: string;
  signal?: AbortSignal;
}

const batchTokens = 2048;
const key = (widths: readonly number[]): string => widths.join();

/** Scores slices by their widths, [layers] units; those in the file are not measured again. */
export class SliceScores implements Disposable {
  measured = 0;
  /** Tokens that each score is of. */
  readonly tokens: number;
  #program: Program | null = null;
  #teacher: Float32Array[] | null = null;

  private constructor(
    private readonly network: Network,
    private readonly options: ScoreOptions,
    private readonly batches: readonly Batch[],
    /** What the scores in the file are of. */
    private readonly of: Readonly<Record<string, string>>,
    private readonly known: Map<string, SliceScore>,
  ) {
    this.tokens = batches.reduce((sum, { sequences }) => sum + sequences.reduce((n, s) => n + count(s), 0), 0);
  }

  /**
   * Errors: InvalidDataError when the text holds nothing to predict, or the file is damaged or has scores of other weights or
   * another text.
   */
  static async open(network: Network, options: ScoreOptions): Promise<SliceScores> {
    const { data, length, limit, file } = options;
    const sequences = take(cut('search', network, data, length, 'data'), limit);
    const text = createHash('sha256').update(JSON.stringify(sequences.map(({ ids, targets }) => [ids, targets])));
    const adapter = join(network.dir, adapterDirectory, adapterWeightsFile);
    const of = {
      weights_sha256: network.policy!.base.weightsSha256,
      corrections_sha256: network.lora && existsSync(adapter) ? await sha256File(adapter) : '',
      text_sha256: text.digest('hex'),
    };
    const known = existsSync(file) ? scoresFromJson(await readJson(file), file, of) : new Map<string, SliceScore>();
    return new SliceScores(network, options, pack(sequences, Math.max(batchTokens, length)), of, known);
  }

  has = (widths: readonly number[]): boolean => this.known.has(key(widths));

  /** Every slice with a score. */
  all(): { widths: number[]; score: SliceScore }[] {
    return [...this.known].map(([text, score]) => ({ widths: text.split(',').map(Number), score }));
  }

  async score(widths: readonly number[]): Promise<SliceScore> {
    const { spec, policy } = this.network;
    if (widths.every((units, layer) => units === spec.perLayer[layer].ffn)) return { kl: 0, agreement: 1 };
    const found = this.known.get(key(widths));
    if (found) return found;
    const ffnWidth = widthShares(widths, policy!.nested!, spec.ffn);
    const point = resolveBudget({ spec: { ffnWidth } }, spec, policy);
    const teacher = await this.#teach();
    this.#program ??= compileCompare(this.network, limitsOf(this.batches), (graph, _rows, segments) =>
      budgetSelector(graph, this.network, point, segments),
    );
    const sum = { kl: 0, agreement: 0 };
    for (const [i, batch] of this.batches.entries()) {
      const { outputs } = await this.#program.run({
        dims: { ...packedDims(batch), ...budgetDims(this.network, point) },
        feeds: {
          ...scoreFeeds(batch),
          ...thresholdFeeds(point.thresholds, batch.sequences.length),
          teacher: teacher[i],
        },
        signal: this.options.signal,
      });
      for (let row = 0; row < batch.ids.length; row++) {
        sum.kl += outputs.kl[row];
        sum.agreement += outputs.agree[row];
      }
    }
    const score = { kl: sum.kl / this.tokens, agreement: sum.agreement / this.tokens };
    if (!Number.isFinite(score.kl)) {
      throw new InvalidDataError(`[search] the model computes NaN at widths ${widths}: its weights are damaged`);
    }
    this.known.set(key(widths), score);
    this.measured++;
    return score;
  }

  /** Writes the file. */
  async save(): Promise<void> {
    const { file } = this.options;
    await inFileSystem('create', dirname(file), () => mkdir(dirname(file), { recursive: true }));
    const scores = Object.fromEntries([...this.known].map(([widths, { kl, agreement }]) => [widths, [kl, agreement]]));
    await writeFileAtomic(
      file,
      `${JSON.stringify({ version: 1, ...this.of, tokens: this.tokens, scores }, null, 1)}\n`,
    );
  }

  [Symbol.dispose](): void {
    this.#program?.dispose();
  }

  /** Final hidden states of the whole model, f32 [rows, hidden] per batch. */
  async #teach(): Promise<Float32Array[]> {
    if (this.#teacher) return this.#teacher;
    using program = compileScore(this.network, limitsOf(this.batches), () => selectEverything);
    const hidden: Float32Array[] = [];
    for (const batch of this.batches) {
      const { signal } = this.options;
      const { outputs } = await program.run({ dims: packedDims(batch), feeds: scoreFeeds(batch), signal });
      hidden.push(outputs.hidden as Float32Array);
    }
    this.#teacher = hidden;
    return hidden;
  }
}

function scoresFromJson(json: unknown, file: string, of: Readonly<Record<string, string>>): Map<string, SliceScore> {
  const read = new Reader(file, []);
  const root = read.object(json, '');
  if (root.version !== 1) read.fail('version', '1', root.version);
  const what = { weights_sha256: 'weights', corrections_sha256: 'corrections', text_sha256: 'text' };
  for (const [name, value] of Object.entries(of)) {
    if (root[name] === value) continue;
    throw new InvalidDataError(
      `[search] ${file} has scores of other ${what[name as keyof typeof what]} than these: delete it, or name another file for scores`,
    );
  }
  return new Map(
    Object.entries(read.object(root.scores, 'scores')).map(([widths, entry]) => {
      const score = read.numbers(entry, `scores.${widths}`);
      if (score.length !== 2 || !score.every(Number.isFinite)) read.fail(`scores.${widths}`, 'two numbers', entry);
      return [widths, { kl: score[0], agreement: score[1] }];
    }),
  );
}
