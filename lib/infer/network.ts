// A loaded model: mapped weights, routers and tokenizer on one engine, shared by everything that runs it.
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { type Budget, type BudgetContext, budgetText, type OperatingPoint, resolveBudget } from '../elastic/budget.js';
import { AdapterTensors, type Lora, LoraTensors, loraOfModules } from '../elastic/lora.js';
import type { ElasticPolicy, Router } from '../elastic/policy.js';
import { type MeasuredOn, Profiles } from '../elastic/profile.js';
import { decidingRows } from '../elastic/rows.js';
import { adapterDirectory, readElastic } from '../elastic/store.js';
import { readJson } from '../io/files.js';
import { readPeft } from '../io/peft.js';
import { Checkpoint } from '../io/safetensors.js';
import { loadTokenizer, type Tokenizer } from '../io/tokenizer.js';
import { type ModelSpec, specFromConfig } from '../model/spec.js';
import { type DecoderTensors, loadWeights } from '../model/weights.js';
import { InvalidArgumentError, InvalidFileError } from '../native/errors.js';
import { Engine, loadAddon, Tensor } from '../native/index.js';
import { defaultCacheBytes } from './engine/cache.js';
import { measuredOn } from './machine.js';
import { checkNumber, checkOptions, positiveInteger } from './options.js';
import { type Own, owning } from './owning.js';
import type { Dtype, LoadOptions } from './types.js';

/** Contexts are no longer than this unless asked for: a cache holds all of one. */
export const defaultContext = 4096;
export const defaultSequences = 32;
const dtypes: readonly Dtype[] = ['f32', 'bf16', 'f16'];

export interface RouterTensors {
  /** f32 [outputs, hidden] */
  readonly weight: Tensor;
  /** f32 [outputs] */
  readonly bias: Tensor;
}

/** What generations of a model may take together. */
export interface GenerationLimits {
  readonly maxSequences: number;
  readonly maxBatchTokens: number;
  readonly kvCacheBytes: number;
  /** Tokens of a prompt that one run reads at most. */
  readonly chunkRows: number;
}

export interface Network {
  readonly dir: string;
  readonly spec: ModelSpec;
  readonly engine: Engine;
  readonly weights: DecoderTensors;
  readonly policy: ElasticPolicy | null;
  /** What runs when no budget is named: the full model, or the level it was loaded up to. */
  readonly most: OperatingPoint;
  /** Bytes of the weights that are loaded. */
  readonly weightBytes: number;
  /** By router id; empty for a plain model. */
  readonly routers: ReadonlyMap<string, RouterTensors>;
  /** Corrections of projections, and whether the full budget has them, too: not those it was trained with. */
  readonly lora: LoraTensors | null;
  readonly loraAtFull: boolean;
  /** Of which each call may choose one. */
  readonly adapters: AdapterTensors | null;
  readonly tokenizer: Tokenizer | null;
  /** What a text without a beginning starts from. */
  readonly startId: number | null;
  /** Tokens that end a text. */
  readonly endIds: ReadonlySet<number>;
  readonly maxContext: number;
  readonly limits: GenerationLimits;
  /** What was measured of this model's levels, here or on other machines. */
  readonly profiles: Profiles;
  /** What times measured now depend on. */
  measuredOn(): MeasuredOn;
  dispose(): void;
}

/**
 * What a budget means for a model on its device.
 * Errors: those of resolveBudget; InvalidArgumentError for widths of which the units were not loaded.
 */
export function resolveFor(network: Network, budget: Budget, context: Omit<BudgetContext, 'profile'>): OperatingPoint {
  const { spec, policy, most } = network;
  const profile = () => network.profiles.of(network.measuredOn());
  const point = resolveBudget(budget, spec, policy, { ...context, profile });
  const wider = most.widths?.findIndex((units, layer) => (point.widths?.[layer] ?? spec.ffn) > units) ?? -1;
  if (wider >= 0) {
    const [asked, loaded] = [point.widths?.[wider] ?? spec.ffn, most.widths![wider]];
    throw new InvalidArgumentError(
      `[budget] ${budgetText(budget)} runs ${asked} units of layer ${wider}, and the model was loaded with ${loaded}, up to maxLevel '${most.level}'`,
    );
  }
  return point;
}

/** Throws InvalidArgumentError for a model that was loaded up to a level: what compares with the full model needs all of it. */
export function requireWhole(api: string, { most }: Network): void {
  if (!most.widths) return;
  throw new InvalidArgumentError(
    `[${api}] the full model is needed, and this one was loaded up to maxLevel '${most.level}'`,
  );
}

/** The budget of calls that name none. */
export const defaultBudget = ({ most }: Network): Budget => most.level ?? 'full';

/**
 * Maps a Hugging Face or elastic directory. Errors: InvalidFileError or InvalidDataError naming the file and what is
 * wrong with it, InvalidArgumentError for an unknown option or a value out of range, AbortError.
 */
export async function loadNetwork(dir: string, options: LoadOptions = {}, start?: ModelStart): Promise<Network> {
  const { config, configPath, progress } = start ?? (await readModelConfig(dir, options));
  const { dtype, threads } = options;
  const spec = specFromConfig(config, configPath);
  checkContext(spec, options);
  const elastic = await readElastic(dir);
  const maxContext = options.maxContext ?? Math.min(spec.maxPositions, defaultContext);
  const limits = limitsOf(options, { spec, policy: elastic?.policy ?? null, maxContext });
  const most = mostOf(options.maxLevel, spec, elastic?.policy ?? null, dir);

  progress(1);
  return owning(async (own, dispose) => {
    const checkpoint = own(Checkpoint.open(dir));
    const loaded = own(loadWeights(spec, checkpoint, { dtype, ...(most.widths && { widths: most.widths }) }));
    const routers = new Map<string, RouterTensors>();
    for (const [id, router] of elastic?.routers ?? []) routers.set(id, routerTensors(router, spec.hidden, own));
    const { adapter, adapters: named = {} } = options;
    const [other] = [adapter, ...Object.values(named)].filter((from) => from !== undefined);
    if (
      other !== undefined &&
      elastic?.lora &&
      (other !== adapter || resolve(other) !== resolve(dir, adapterDirectory))
    ) {
      throw new InvalidArgumentError(
        `[loadModel] ${dir} has corrections of its own; merge ${other} into its base before it is made elastic`,
      );
    }
    const read = async (from: string) => loraOfModules(spec, await readPeft(from), from);
    const matrices = adapter === undefined ? elastic?.lora : await read(adapter);
    const lora = matrices ? own(new LoraTensors(matrices)) : null;
    const byName = new Map<string, Lora>();
    for (const [name, from] of Object.entries(named)) byName.set(name, await read(from));
    const adapters = byName.size > 0 ? own(new AdapterTensors(byName)) : null;

    progress(2);
    const tokenizer = existsSync(join(dir, 'tokenizer.json')) ? await loadTokenizer(dir) : null;
    const generationPath = join(dir, 'generation_config.json');
    const generation = existsSync(generationPath) ? await readJson(generationPath) : {};
    const ids = specialIds(spec, config, configPath, generation, generationPath, tokenizer);
    progress(3);

    if (threads !== undefined) loadAddon().setThreads(threads);
    const engine = own(new Engine(options.device, { activations: options.activations, weights: loaded.dtype }));
    return {
      dir,
      spec,
      engine,
      weights: loaded.weights,
      policy: elastic?.policy ?? null,
      most,
      weightBytes: loaded.bytes,
      routers,
      lora,
      loraAtFull: adapter !== undefined,
      adapters,
      tokenizer,
      ...ids,
      profiles: await Profiles.read(dir, elastic?.policy.base.weightsSha256),
      measuredOn: () => measuredOn(engine, loaded.dtype),
      maxContext,
      limits,
      dispose,
    };
  });
}

/** What a router or the head of an exit computes with, disposed of with what else is owned. */
export function routerTensors({ weight, bias }: Router, hidden: number, own: Own): RouterTensors {
  return {
    weight: own(Tensor.fromData('f32', [bias.length, hidden], weight)),
    bias: own(Tensor.fromData('f32', [bias.length], bias)),
  };
}

function limitsOf(options: LoadOptions, model: Pick<Network, 'spec' | 'policy' | 'maxContext'>): GenerationLimits {
  const { maxBatchTokens: asked = Number.POSITIVE_INFINITY } = options;
  const maxSequences = options.maxSequences ?? Math.max(1, Math.min(defaultSequences, asked - 1));
  if (asked <= maxSequences) {
    throw new InvalidArgumentError(
      `[loadModel] maxBatchTokens must be more than maxSequences, ${maxSequences}, for prompts to be read beside their tokens, got ${asked}`,
    );
  }
  // The first run of a sequence has the rows that decide about it, unless maxBatchTokens leaves fewer.
  const chunkRows = Math.min(decidingRows, model.maxContext, asked - maxSequences);
  const maxBatchTokens = Number.isFinite(asked) ? asked : chunkRows + maxSequences;
  const kvCacheBytes = options.kvCacheBytes ?? defaultCacheBytes({ ...model, limits: { chunkRows } }, maxSequences);
  return { maxSequences, maxBatchTokens, kvCacheBytes, chunkRows };
}

/** A model of which the options are checked and the configuration is read, the first of the phases that `progress` reports. */
export interface ModelStart {
  readonly config: unknown;
  readonly configPath: string;
  readonly progress: (done: number) => void;
}

export async function readModelConfig(dir: string, options: LoadOptions): Promise<ModelStart> {
  checkOptions('loadModel', options, [
    'dtype',
    'adapter',
    'adapters',
    'maxLevel',
    'device',
    'activations',
    'maxContext',
    'maxSequences',
    'maxBatchTokens',
    'kvCacheBytes',
    'threads',
    'onProgress',
    'signal',
  ]);
  const { dtype, threads, adapter, adapters, onProgress, signal } = options;
  if (dtype !== undefined && !dtypes.includes(dtype)) {
    throw new InvalidArgumentError(`[loadModel] dtype must be one of ${dtypes.join(', ')}, got ${String(dtype)}`);
  }
  checkNumber('loadModel', 'threads', threads, positiveInteger, 'a positive integer');
  for (const name of ['maxContext', 'maxSequences', 'maxBatchTokens', 'kvCacheBytes'] as const)
    checkNumber('loadModel', name, options[name], positiveInteger, 'a positive integer');
  if (adapters !== undefined && !isTextByName(adapters)) {
    throw new InvalidArgumentError(
      '[loadModel] adapters must be an object with the directory of each adapter by its name',
    );
  }
  if (adapter !== undefined && adapters !== undefined) {
    throw new InvalidArgumentError(
      '[loadModel] give adapter, which every call has, or adapters, of which each chooses one, not both',
    );
  }
  const phases = ['config', 'weights', 'tokenizer'];
  const progress = (done: number): void => {
    signal?.throwIfAborted();
    onProgress?.({ phase: phases[done] ?? 'ready', done, total: phases.length });
  };

  progress(0);
  if (!existsSync(dir)) throw new InvalidFileError(`[loadModel] ${dir} does not exist; expected a model directory`);
  const configPath = join(dir, 'config.json');
  return { config: await readJson(configPath), configPath, progress };
}

const isTextByName = (value: unknown): boolean =>
  typeof value === 'object' && value !== null && Object.values(value).every((text) => typeof text === 'string');

/**
 * The number of an adapter by its name: 0 for none, else one more than its place.
 * Throws InvalidArgumentError for one that was not loaded.
 */
export function adapterNumber(api: string, { adapters }: Network, name: string | undefined): number {
  if (name === undefined) return 0;
  const place = adapters?.names.indexOf(name) ?? -1;
  if (place >= 0) return place + 1;
  const names = adapters ? `it has ${adapters.names.join(', ')}` : 'it was loaded without adapters';
  throw new InvalidArgumentError(`[${api}] the model has no adapter '${name}'; ${names}`);
}

/** Throws InvalidArgumentError for a context longer than the model's positions. */
export function checkContext({ maxPositions }: ModelSpec, { maxContext }: LoadOptions): void {
  if (maxContext === undefined || maxContext <= maxPositions) return;
  throw new InvalidArgumentError(
    `[loadModel] maxContext must be at most ${maxPositions}, the model's positions, got ${maxContext}`,
  );
}

/** The point of the widest slice that is loaded: all of the model, or a level that takes away widths alone. */
function mostOf(level: string | undefined, spec: ModelSpec, policy: ElasticPolicy | null, dir: string): OperatingPoint {
  const point = resolveBudget(level ?? 'full', spec, policy);
  const others = Object.keys(point.spec).filter((key) => key !== 'ffnWidth');
  if (others.length > 0) {
    throw new InvalidArgumentError(
      `[loadModel] maxLevel must be a level of widths alone, and '${level}' of ${dir} has ${others.join(', ')}`,
    );
  }
  return point;
}

// As transformers does: generation_config.json comes before config.json.
function specialIds(
  spec: ModelSpec,
  config: unknown,
  configPath: string,
  generation: unknown,
  generationPath: string,
  tokenizer: Tokenizer | null,
): Pick<Network, 'startId' | 'endIds'> {
  const read = (json: unknown, file: string, key: string): number[] => {
    const value = (json as Record<string, unknown> | null)?.[key];
    if (value === undefined || value === null) return [];
    const list = [value].flat();
    for (const id of list) {
      if (!Number.isInteger(id) || (id as number) < 0 || (id as number) >= spec.vocab) {
        throw new InvalidFileError(
          `[loadModel] ${file}: ${key} must be token ids below ${spec.vocab}, got ${JSON.stringify(value)}`,
        );
      }
    }
    return list as number[];
  };
  const find = (key: 'bos_token_id' | 'eos_token_id', fallback: number | null | undefined): number[] => {
    for (const [json, file] of [
      [generation, generationPath],
      [config, configPath],
    ] as const) {
      const ids = read(json, file, key);
      if (ids.length > 0) return ids;
    }
    return fallback !== null && fallback !== undefined && fallback < spec.vocab ? [fallback] : [];
  };
  const begin = find('bos_token_id', tokenizer?.bosId);
  const end = find('eos_token_id', tokenizer?.eosId);
  return { startId: begin[0] ?? end[0] ?? null, endIds: new Set(end) };
}
