// A loaded model: mapped weights, routers and tokenizer on one engine, shared by everything that runs it.
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { type Budget, type BudgetContext, type OperatingPoint, resolveBudget } from '../elastic/budget.js';
import { LoraTensors, loraOfModules } from '../elastic/lora.js';
import type { ElasticPolicy } from '../elastic/policy.js';
import { type MeasuredOn, Profiles } from '../elastic/profile.js';
import { adapterDirectory, readElastic } from '../elastic/store.js';
import { readJson } from '../io/files.js';
import { readPeft } from '../io/peft.js';
import { Checkpoint } from '../io/safetensors.js';
import { loadTokenizer, type Tokenizer } from '../io/tokenizer.js';
import { type ModelSpec, specFromConfig } from '../model/spec.js';
import { type DecoderTensors, loadWeights } from '../model/weights.js';
import { InvalidArgumentError, InvalidFileError } from '../native/errors.js';
import { Engine, loadAddon, Tensor } from '../native/index.js';
import { measuredOn } from './machine.js';
import { checkNumber, checkOptions, positiveInteger } from './options.js';
import type { Dtype, LoadOptions } from './types.js';

/** Contexts are no longer than this unless asked for: caches are allocated for all of it. */
const defaultContext = 4096;
const dtypes: readonly Dtype[] = ['f32', 'bf16', 'f16'];

export interface RouterTensors {
  /** f32 [1, hidden] */
  readonly weight: Tensor;
  /** f32 [1] */
  readonly bias: Tensor;
}

export interface Network {
  readonly dir: string;
  readonly spec: ModelSpec;
  readonly engine: Engine;
  readonly weights: DecoderTensors;
  readonly policy: ElasticPolicy | null;
  /** By router id; empty for a plain model. */
  readonly routers: ReadonlyMap<string, RouterTensors>;
  /** Corrections of projections, and whether the full budget has them, too: not those it was trained with. */
  readonly lora: LoraTensors | null;
  readonly loraAtFull: boolean;
  readonly tokenizer: Tokenizer | null;
  /** What a text without a beginning starts from. */
  readonly startId: number | null;
  /** Tokens that end a text. */
  readonly endIds: ReadonlySet<number>;
  readonly maxContext: number;
  /** What was measured of this model's levels, here or on other machines. */
  readonly profiles: Profiles;
  /** What times measured now depend on. */
  measuredOn(): MeasuredOn;
  dispose(): void;
}

/** What a budget means for a model on its device. Errors: those of resolveBudget. */
export function resolveFor(network: Network, budget: Budget, context: Omit<BudgetContext, 'profile'>): OperatingPoint {
  const profile = () => network.profiles.of(network.measuredOn());
  return resolveBudget(budget, network.spec, network.policy, { ...context, profile });
}

/**
 * Maps a Hugging Face or elastic directory. Errors: InvalidFileError or InvalidDataError naming the file and what is
 * wrong with it, InvalidArgumentError for an unknown option or a value out of range, AbortError.
 */
export async function loadNetwork(dir: string, options: LoadOptions = {}): Promise<Network> {
  checkOptions('loadModel', options, [
    'dtype',
    'adapter',
    'device',
    'activations',
    'maxContext',
    'threads',
    'onProgress',
    'signal',
  ]);
  const { dtype, threads, onProgress, signal } = options;
  if (dtype !== undefined && !dtypes.includes(dtype)) {
    throw new InvalidArgumentError(`[loadModel] dtype must be one of ${dtypes.join(', ')}, got ${String(dtype)}`);
  }
  checkNumber('loadModel', 'threads', threads, positiveInteger, 'a positive integer');
  checkNumber('loadModel', 'maxContext', options.maxContext, positiveInteger, 'a positive integer');
  const phases = ['config', 'weights', 'tokenizer'];
  const progress = (done: number): void => {
    signal?.throwIfAborted();
    onProgress?.({ phase: phases[done] ?? 'ready', done, total: phases.length });
  };

  progress(0);
  if (!existsSync(dir)) throw new InvalidFileError(`[loadModel] ${dir} does not exist; expected a model directory`);
  const configPath = join(dir, 'config.json');
  const config = await readJson(configPath);
  const spec = specFromConfig(config, configPath);
  if (options.maxContext !== undefined && options.maxContext > spec.maxPositions) {
    throw new InvalidArgumentError(
      `[loadModel] maxContext must be at most ${spec.maxPositions}, the model's positions, got ${options.maxContext}`,
    );
  }
  const elastic = await readElastic(dir);

  progress(1);
  const owned: { dispose(): void }[] = [];
  const dispose = (): void => {
    for (const item of owned.splice(0).reverse()) item.dispose();
  };
  try {
    const checkpoint = Checkpoint.open(dir);
    owned.push(checkpoint);
    const loaded = loadWeights(spec, checkpoint, { dtype });
    owned.push(loaded);
    const routers = new Map<string, RouterTensors>();
    for (const [id, router] of elastic?.routers ?? []) {
      const weight = Tensor.fromData('f32', [router.bias.length, spec.hidden], router.weight);
      const bias = Tensor.fromData('f32', [router.bias.length], router.bias);
      owned.push(weight, bias);
      routers.set(id, { weight, bias });
    }
    const { adapter } = options;
    if (adapter !== undefined && elastic?.lora && resolve(adapter) !== resolve(dir, adapterDirectory)) {
      throw new InvalidArgumentError(
        `[loadModel] ${dir} has corrections of its own; merge ${adapter} into its base before it is made elastic`,
      );
    }
    const matrices = adapter === undefined ? elastic?.lora : loraOfModules(spec, await readPeft(adapter), adapter);
    const lora = matrices ? new LoraTensors(matrices) : null;
    if (lora) owned.push(lora);

    progress(2);
    const tokenizer = existsSync(join(dir, 'tokenizer.json')) ? await loadTokenizer(dir) : null;
    const generationPath = join(dir, 'generation_config.json');
    const generation = existsSync(generationPath) ? await readJson(generationPath) : {};
    const ids = specialIds(spec, config, configPath, generation, generationPath, tokenizer);
    progress(3);

    if (threads !== undefined) loadAddon().setThreads(threads);
    const engine = new Engine(options.device, { activations: options.activations, weights: loaded.dtype });
    owned.push(engine);
    return {
      dir,
      spec,
      engine,
      weights: loaded.weights,
      policy: elastic?.policy ?? null,
      routers,
      lora,
      loraAtFull: adapter !== undefined,
      tokenizer,
      ...ids,
      profiles: await Profiles.read(dir),
      measuredOn: () => measuredOn(engine, loaded.dtype),
      maxContext: options.maxContext ?? Math.min(spec.maxPositions, defaultContext),
      dispose,
    };
  } catch (error) {
    dispose();
    throw error;
  }
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
