// Where the student's targets come from: its own full model, another model of the same tokenizer, or a cache.
import { join } from 'node:path';
import { readJson } from '../io/files.js';
import { Checkpoint } from '../io/safetensors.js';
import { type ModelSpec, specFromConfig } from '../model/spec.js';
import { loadWeights } from '../model/weights.js';
import { InvalidArgumentError } from '../native/errors.js';
import { TeacherCache, tokenizerSha256 } from './cache.js';
import type { Batch, TokenData } from './data.js';
import { type Loss, ofTeacher } from './objectives.js';
import { type Teacher, topLogitsFeeds } from './steps.js';
import { checkKeys } from './trainer.js';

/** Whom the student imitates. */
export type TeacherConfig =
  /** The full model of the plan. */
  | { kind: 'self' }
  /** Another model, of the same tokenizer and vocabulary. */
  | { kind: 'model'; model: string }
  /** What cacheTeacher wrote for the same data. */
  | { kind: 'cache'; dir: string };

const keysOf: Readonly<Record<TeacherConfig['kind'], readonly string[]>> = {
  self: [],
  model: ['model'],
  cache: ['dir'],
};

/** A teacher that is ready to be compared with. */
export interface OpenTeacher extends Disposable {
  /** For the training program; absent where the full model is the teacher. */
  teacher?: Teacher;
  /** What a resumed run must agree on. */
  identity: { kind: TeacherConfig['kind']; sha256: string | null };
  /** Feeds of the training program for a batch. */
  feeds(batch: Batch): Record<string, Float32Array | Int32Array>;
}

/**
 * Opens the teacher of a plan.
 * Errors: InvalidArgumentError when it does not fit the plan or a term of the loss, InvalidDataError for a cache of other
 * data or one that was damaged, InvalidFileError for a model that cannot be read.
 */
export async function openTeacher(
  config: TeacherConfig | undefined,
  {
    plan,
    spec,
    data,
    losses,
    dtype,
  }: {
    plan: string;
    spec: ModelSpec;
    data: TokenData;
    losses: readonly Loss[];
    dtype: 'f32' | 'bf16' | 'f16' | undefined;
  },
): Promise<OpenTeacher> {
  const given = config ?? { kind: 'self' };
  if (!Object.hasOwn(keysOf, given.kind)) {
    throw new InvalidArgumentError(
      `[distill] teacher.kind must be one of ${Object.keys(keysOf).join(', ')}, got ${JSON.stringify(given.kind)}`,
    );
  }
  checkKeys('distill', 'key of teacher', given, ['kind', ...keysOf[given.kind]]);
  if (given.kind === 'self') {
    return { identity: { kind: 'self', sha256: null }, feeds: () => ({}), [Symbol.dispose]: () => {} };
  }
  if (!losses.some(ofTeacher)) {
    throw new InvalidArgumentError(
      '[distill] no term of the loss compares with the teacher: leave teacher out, or add kl',
    );
  }
  if (given.kind === 'cache') {
    const cache = await TeacherCache.open(given.dir, {
      tokenizerSha256: await tokenizerSha256(plan),
      vocab: spec.vocab,
      sequenceLength: data.sequenceLength,
      dataSha256: data.sha256(),
    });
    try {
      for (const loss of losses) checkCached(loss, cache.topK);
    } catch (error) {
      cache[Symbol.dispose]();
      throw error;
    }
    return {
      teacher: { topK: cache.topK },
      identity: { kind: 'cache', sha256: cache.sha256 },
      feeds(batch) {
        const { ids, logp, rest } = cache.rows(batch);
        return { [topLogitsFeeds.ids]: ids, [topLogitsFeeds.logp]: logp, [topLogitsFeeds.rest]: rest };
      },
      [Symbol.dispose]: () => cache[Symbol.dispose](),
    };
  }
  const { model } = given;
  const configPath = join(model, 'config.json');
  const other = specFromConfig(await readJson(configPath), configPath);
  const refuse = (what: string, got: unknown, wanted: unknown): never => {
    throw new InvalidArgumentError(`[distill] the teacher ${model} must have ${what}, ${wanted}, got ${got}`);
  };
  const [own, its] = [await tokenizerSha256(plan), await tokenizerSha256(model)];
  if (its !== own) refuse("the plan's tokenizer.json", `SHA-256 ${its}`, `SHA-256 ${own}`);
  if (other.vocab !== spec.vocab) refuse("the plan's vocabulary", other.vocab, spec.vocab);
  if (other.maxPositions < data.sequenceLength) {
    refuse('positions for sequenceLength', other.maxPositions, data.sequenceLength);
  }
  if (losses.some(({ kind }) => kind === 'hidden-cosine' || kind === 'hidden-mse')) {
    if (other.hidden !== spec.hidden) refuse("the plan's hidden size for hidden terms", other.hidden, spec.hidden);
    if (other.layers !== spec.layers) refuse("the plan's layers for hidden terms", other.layers, spec.layers);
  }
  const checkpoint = Checkpoint.open(model);
  try {
    const sha256 = await checkpoint.sha256();
    const loaded = loadWeights(other, checkpoint, dtype ? { dtype } : {});
    return {
      teacher: { spec: other, weights: loaded.weights },
      identity: { kind: 'model', sha256 },
      feeds: () => ({}),
      [Symbol.dispose]() {
        loaded.dispose();
        checkpoint.dispose();
      },
    };
  } catch (error) {
    checkpoint.dispose();
    throw error;
  }
}

/** A cache holds probabilities at temperature 1 of the tokens it names: nothing else can be compared with it. */
function checkCached(loss: Loss, topK: number): void {
  const refuse = (what: string): never => {
    throw new InvalidArgumentError(`[distill] with a cached teacher ${what}`);
  };
  if (loss.kind === 'jsd' || loss.kind === 'hidden-cosine' || loss.kind === 'hidden-mse') {
    refuse(`the loss cannot have ${loss.kind}: kl and reverse-kl compare with it`);
  }
  if (loss.kind !== 'kl' && loss.kind !== 'reverse-kl') return;
  if ((loss.temperature ?? 1) !== 1) refuse(`the temperature of ${loss.kind} must be 1, got ${loss.temperature}`);
  if ((loss.topK ?? topK) !== topK) refuse(`the topK of ${loss.kind} must be the cache's ${topK}, got ${loss.topK}`);
}
