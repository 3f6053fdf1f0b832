// A teacher's largest probabilities in files: written once, whole or resumed, and fed to any number of trainings.
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Graph, Program, topLogits } from '../graph/index.js';
import { readJson, sha256File, writeFileAtomic } from '../io/files.js';
import { toF16 } from '../io/rounding.js';
import { Checkpoint, openSafetensors, type SafetensorsFile, writeSafetensors } from '../io/safetensors.js';
import { loadTokenizer } from '../io/tokenizer.js';
import { decoder, finalNorm } from '../model/decoder.js';
import { specFromConfig } from '../model/spec.js';
import { bindWeights, loadWeights } from '../model/weights.js';
import { InvalidArgumentError, InvalidDataError } from '../native/errors.js';
import { type Activations, type DeviceChoice, Engine } from '../native/index.js';
import { batchInputs, batchRun, trainingTexts } from './batches.js';
import { type Batch, type Cursor, type DataSource, TokenData } from './data.js';
import { checkKeys, withLock } from './trainer.js';

/** Settings of `cacheTeacher`. */
export interface CacheTeacherOptions {
  /** A Hugging Face directory; of an elastic one, its full model. */
  model: string;
  /** What will be trained on: the same documents, `heldOut`, `seed` and `sequenceLength` as in the training. */
  data: DataSource;
  /** Share of the documents that training holds out, from 0 to 1; they are not cached. Default 0. */
  heldOut?: number;
  /** Of the choice of held-out documents; default 0. */
  seed?: number;
  /** Default: 512, or the model's positions if they are fewer. */
  sequenceLength?: number;
  /** Probabilities kept of every row. */
  topK: number;
  /** Directory of the cache. An interrupted one is continued. */
  out: string;
  /** Rows computed at a time; default 2048. */
  batchTokens?: number;
  /** How the model's matrices are stored while computing; default as in the checkpoint. */
  dtype?: 'f32' | 'bf16' | 'f16';
  /** Where the model runs; default: `ELASTIFORM_DEVICE`, else the CPU. */
  device?: DeviceChoice;
  /** How activations are stored; default: bf16 on CUDA with bf16 weights, else f32. */
  activations?: Activations;
  /** Called after every shard with the tokens done and their total. */
  onProgress?: (done: number, total: number) => unknown;
  /** Stops after the shard under way; started again, the cache goes on from there. */
  signal?: AbortSignal;
}

/** What decides the content of a cache. */
interface CacheSettings {
  version: 1;
  modelSha256: string;
  tokenizerSha256: string;
  /** Of the tokens and the longest sequence; see TokenData. */
  dataSha256: string;
  sequenceLength: number;
  vocab: number;
  topK: number;
  tokens: number;
  dtype: 'f32' | 'bf16' | 'f16' | null;
  activations: Activations;
}

/** Whole segments of the data, in its order. */
interface Shard {
  file: string;
  segments: number;
  tokens: number;
  sha256: string;
}

interface CacheMeta extends CacheSettings {
  /** Those written so far: the cache is complete when they hold all tokens. */
  shards: readonly Shard[];
}

const metaFile = 'meta.json';
/** Rows of a shard, the last one and what ends a segment aside. */
const shardTokens = 65536;
const optionKeys = [
  ...['model', 'data', 'heldOut', 'seed', 'sequenceLength', 'topK', 'out', 'batchTokens', 'dtype', 'device'],
  ...['activations', 'onProgress', 'signal'],
];

/** SHA-256 of a model directory's tokenizer. */
export const tokenizerSha256 = (model: string): Promise<string> => sha256File(join(model, 'tokenizer.json'));

/**
 * Runs a model over data and writes for every token the `topK` largest log-probabilities of its successor: files
 * `shard-*.safetensors` with token_ids i32 [N], topk_ids i32 [N, topK] ascending, topk_logp f16 [N, topK] and rest_logp
 * f16 [N], the logarithm of the probability of all other tokens; and meta.json, which says what they were made from.
 *
 * Every shard is written whole and then listed with its hash. A run that was interrupted, started again with the same
 * settings, goes on behind the last listed shard; one that is complete is left alone.
 *
 * @throws InvalidArgumentError for bad options, InvalidDataError when `out` holds a cache of other settings or a listed
 * shard was changed, FileSystemError when another process writes there. An abort rejects with the signal's reason.
 */
export async function cacheTeacher(
  options: CacheTeacherOptions,
): Promise<{ dir: string; tokens: number; shards: number }> {
  checkKeys('cacheTeacher', 'option', options, optionKeys);
  const { model, out, topK, signal } = options;
  const configPath = join(model, 'config.json');
  const spec = specFromConfig(await readJson(configPath), configPath);
  const integer = (name: string, value: number, low: number, high: number) => {
    if (Number.isInteger(value) && value >= low && value <= high) return;
    throw new InvalidArgumentError(`[cacheTeacher] ${name} must be an integer from ${low} to ${high}, got ${value}`);
  };
  integer('topK', topK, 1, spec.vocab);
  const sequenceLength = options.sequenceLength ?? Math.min(512, spec.maxPositions);
  integer('sequenceLength', sequenceLength, 2, spec.maxPositions);
  const batchTokens = options.batchTokens ?? Math.max(2048, sequenceLength);
  integer('batchTokens', batchTokens, sequenceLength, 2 ** 24);
  const texts = await trainingTexts('cacheTeacher', options);
  const data = TokenData.tokenise(texts.train, await loadTokenizer(model), sequenceLength);

  return withLock(out, async () => {
    using checkpoint = Checkpoint.open(model);
    using loaded = loadWeights(spec, checkpoint, options.dtype ? { dtype: options.dtype } : {});
    using engine = new Engine(options.device, { activations: options.activations, weights: loaded.dtype });
    const settings: CacheSettings = {
      version: 1,
      modelSha256: await checkpoint.sha256(),
      tokenizerSha256: await tokenizerSha256(model),
      dataSha256: data.sha256(),
      sequenceLength,
      vocab: spec.vocab,
      topK,
      tokens: data.tokenCount,
      dtype: options.dtype ?? null,
      activations: engine.activations,
    };
    const shards: Shard[] = [];
    if (existsSync(join(out, metaFile))) {
      const meta = await readMeta(out);
      checkSettings(out, meta, settings, 'use the same settings, another directory, or remove it');
      for (const shard of meta.shards) await checkShard(out, shard);
      shards.push(...meta.shards);
    }
    const graph = new Graph();
    const { rows: _, segments: __, ...inputs } = batchInputs(graph, batchTokens);
    const weights = bindWeights(graph, loaded.weights);
    const hidden = finalNorm(spec, weights, decoder(graph, spec, weights, inputs));
    for (const [name, node] of Object.entries(topLogits(hidden, weights.head, topK, spec.logitSoftcap)))
      graph.output(name, node);
    using program = Program.compile(graph, engine);

    let done = shards.reduce((sum, { tokens }) => sum + tokens, 0);
    let cursor: Cursor = { epoch: 0, segment: shards.reduce((sum, { segments }) => sum + segments, 0) };
    while (done < data.tokenCount) {
      const parts: Rows[] = [];
      let tokens = 0;
      let segments = 0;
      while (tokens < shardTokens && done + tokens < data.tokenCount) {
        const next = data.next(cursor, batchTokens, null);
        const { outputs } = await program.run({ ...batchRun(next.batch), signal });
        const { ids, logp, rest } = outputs as { ids: Int32Array; logp: Float32Array; rest: Float32Array };
        parts.push({ tokens: next.batch.ids, ids, logp, rest });
        tokens += next.batch.ids.length;
        segments += next.batch.offsets.length - 1;
        cursor = next.cursor;
        await options.onProgress?.(done + tokens, data.tokenCount);
      }
      const file = `shard-${String(shards.length).padStart(5, '0')}.safetensors`;
      await writeShard(join(out, file), parts, tokens, topK);
      shards.push({ file, segments, tokens, sha256: await sha256File(join(out, file)) });
      await writeFileAtomic(join(out, metaFile), `${JSON.stringify({ ...settings, shards }, null, 2)}\n`);
      done += tokens;
    }
    return { dir: out, tokens: done, shards: shards.length };
  });
}

/** Of one batch. */
interface Rows {
  tokens: Int32Array;
  ids: Int32Array;
  logp: Float32Array;
  rest: Float32Array;
}

async function writeShard(path: string, parts: readonly Rows[], tokens: number, topK: number): Promise<void> {
  const join = <T extends Int32Array | Float32Array>(into: T, of: (part: Rows) => T): T => {
    let at = 0;
    for (const part of parts) {
      into.set(of(part), at);
      at += of(part).length;
    }
    return into;
  };
  const ids = join(new Int32Array(tokens * topK), (part) => part.ids);
  const logp = join(new Float32Array(tokens * topK), (part) => part.logp);
  const rest = join(new Float32Array(tokens), (part) => part.rest);
  if (!logp.every(Number.isFinite)) {
    throw new InvalidDataError('[cacheTeacher] the model gives no finite probabilities: check its weights for NaN');
  }
  await writeSafetensors(path, {
    token_ids: { dtype: 'i32', shape: [tokens], data: join(new Int32Array(tokens), (part) => part.tokens) },
    topk_ids: { dtype: 'i32', shape: [tokens, topK], data: ids },
    topk_logp: { dtype: 'f16', shape: [tokens, topK], data: toF16(logp) },
    rest_logp: { dtype: 'f16', shape: [tokens], data: toF16(rest) },
  });
}

async function readMeta(dir: string): Promise<CacheMeta> {
  const path = join(dir, metaFile);
  const meta = (await readJson(path)) as CacheMeta;
  const whole = (n: unknown): boolean => Number.isSafeInteger(n) && (n as number) >= 0;
  const valid =
    meta?.version === 1 &&
    whole(meta.topK) &&
    whole(meta.tokens) &&
    Array.isArray(meta.shards) &&
    meta.shards.every(
      (shard, i) =>
        shard?.file === `shard-${String(i).padStart(5, '0')}.safetensors` &&
        whole(shard.segments) &&
        whole(shard.tokens) &&
        typeof shard.sha256 === 'string',
    );
  if (!valid) throw new InvalidDataError(`[teacher] ${path} does not describe a cache of version 1`);
  return meta;
}

function checkSettings(dir: string, meta: CacheMeta, wanted: Partial<CacheSettings>, advice: string): void {
  for (const [key, value] of Object.entries(wanted)) {
    const was = meta[key as keyof CacheSettings];
    if (was !== value) {
      throw new InvalidDataError(
        `[teacher] ${dir} was made with ${key} = ${JSON.stringify(was)}, here it is ${JSON.stringify(value)}; ${advice}`,
      );
    }
  }
}

async function checkShard(dir: string, { file, sha256 }: Shard): Promise<void> {
  const path = join(dir, file);
  if (existsSync(path) && (await sha256File(path)) === sha256) return;
  throw new InvalidDataError(
    `[teacher] ${path} is missing or does not match its hash in ${metaFile}: remove the directory and write it anew`,
  );
}

/** A complete cache, every shard of which has its hash. */
export class TeacherCache implements Disposable {
  private constructor(
    private readonly dir: string,
    /** Largest probabilities of every row. */
    readonly topK: number,
    /** Identifies the content. */
    readonly sha256: string,
    /** In the order of the data. */
    private readonly shards: readonly { first: number; file: SafetensorsFile }[],
  ) {}

  /**
   * Opens a cache made from this data, tokenised by the same tokenizer.
   * Errors: InvalidDataError when it is incomplete, was made from something else, or a file was changed.
   */
  static async open(
    dir: string,
    wanted: Pick<CacheSettings, 'tokenizerSha256' | 'dataSha256' | 'sequenceLength' | 'vocab'>,
  ): Promise<TeacherCache> {
    const meta = await readMeta(dir);
    const { sequenceLength, tokenizerSha256, vocab, dataSha256 } = wanted;
    const advice = 'write a cache for the same documents, heldOut, seed, sequenceLength and tokenizer';
    checkSettings(dir, meta, { tokenizerSha256, vocab, sequenceLength, dataSha256 }, advice);
    const tokens = meta.shards.reduce((sum, shard) => sum + shard.tokens, 0);
    if (tokens !== meta.tokens) {
      throw new InvalidDataError(
        `[teacher] ${dir} is incomplete, ${tokens} of ${meta.tokens} tokens: run cache-teacher again to finish it`,
      );
    }
    const shards: { first: number; file: SafetensorsFile }[] = [];
    try {
      let first = 0;
      for (const shard of meta.shards) {
        await checkShard(dir, shard);
        const file = openSafetensors(join(dir, shard.file));
        shards.push({ first, file });
        const shapes = { token_ids: [], topk_ids: [meta.topK], topk_logp: [meta.topK], rest_logp: [] };
        for (const [name, rest] of Object.entries(shapes)) {
          const wanted = [shard.tokens, ...rest].join();
          if (!file.has(name) || file.info(name).shape.join() !== wanted) {
            throw new InvalidDataError(`[teacher] ${file.path}: tensor ${name} must have the shape [${wanted}]`);
          }
        }
        first += shard.tokens;
      }
    } catch (error) {
      for (const { file } of shards) file.dispose();
      throw error;
    }
    const sha256 = createHash('sha256')
      .update(await readFile(join(dir, metaFile)))
      .digest('hex');
    return new TeacherCache(dir, meta.topK, sha256, shards);
  }

  /**
   * What the teacher says of the rows of a batch: ids i32 [rows, topK], logp f32 [rows, topK], rest f32 [rows].
   * Errors: InvalidDataError when the batch has other tokens than the cache there.
   */
  rows({ ids: tokens, offsets, starts }: Batch): { ids: Int32Array; logp: Float32Array; rest: Float32Array } {
    const { topK } = this;
    const rows = tokens.length;
    const ids = new Int32Array(rows * topK);
    const [logp, rest] = [new Float32Array(rows * topK), new Float32Array(rows)];
    for (const [s, start] of starts.entries()) {
      const [at, end] = [offsets[s], offsets[s + 1]];
      // A shard holds whole segments.
      const { first, file } = this.shards.findLast((shard) => shard.first <= start)!;
      const part = (name: string, width: number) => {
        using slice = file.tensor(name).slice((start - first) * width, [(end - at) * width]);
        return slice.dtype === 'i32' ? (slice.read() as Int32Array) : slice.readFloat();
      };
      if (part('token_ids', 1).some((token, i) => token !== tokens[at + i])) {
        throw new InvalidDataError(`[teacher] ${this.dir} has other tokens at ${start}: it was made from other data`);
      }
      ids.set(part('topk_ids', topK), at * topK);
      logp.set(part('topk_logp', topK), at * topK);
      rest.set(part('rest_logp', 1), at);
    }
    return { ids, logp, rest };
  }

  [Symbol.dispose](): void {
    for (const { file } of this.shards) file.dispose();
  }
}
