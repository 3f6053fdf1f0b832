// Modular Transformers (arXiv 2306.02379), after what is known of it: modules of several granularities learn to replace spans of layers.
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { writeModules } from '../../elastic/elastify.js';
import { type Lora, loraOfParameters, seq2seqLoraParameters } from '../../elastic/lora.js';
import { assemblyPath, granularityProblem, settingsText, spansOf } from '../../elastic/modules.js';
import { type Nested, nestedOf, unitScores } from '../../elastic/nested.js';
import { type ElasticPolicy, type SourceTokens, sourceRouters } from '../../elastic/policy.js';
import {
  capacityRange,
  type LoraRecipe,
  loraOf,
  type MatformerRecipe,
  type TrainCapacity,
} from '../../elastic/recipes.js';
import { replaceDirectory } from '../../io/files.js';
import { Checkpoint } from '../../io/safetensors.js';
import type { Assembly, Modules, Stack } from '../../model/parts.js';
import { type Projection, places, projections } from '../../model/select.js';
import type { Seq2SeqSpec } from '../../model/seq2seq_spec.js';
import { loadSeq2SeqWeights, seq2seqModuleSlots } from '../../model/seq2seq_weights.js';
import { InvalidArgumentError } from '../../native/errors.js';
import { Engine } from '../../native/index.js';
import { BadRows, type ExampleSource } from '../encoder/examples.js';
import { checkExampleConfig, readPairs } from '../encoder/finetune.js';
import type { TrainConfig, TrainResult } from '../events.js';
import { trainedRouters } from '../plan.js';
import { Random } from '../random.js';
import { checkConfig, checkKeys, resolveConfig, type Task, train, withLock } from '../trainer.js';
import { drawAssembly, drawSources, drawWidth, sharesAt } from './draws.js';
import { encodePairs, lossRows } from './finetune.js';
import { openSeq2Seq } from './model.js';
import type { PairBatch } from './pairs.js';
import { writeOrdered } from './rank.js';
import { type AssemblyQuality, type ModuleLosses, replacing, type SourceShares } from './replacing.js';

/** Settings of `modular`. */
export interface ModularConfig extends TrainConfig {
  /** Directory of an encoder-decoder model that does its task; it stays as it is. */
  from: string;
  /** Becomes an elastic directory: the model, and modules for it. */
  out: string;
  /** Pairs of a source and a target to train on, as `finetune` reads them. */
  data: ExampleSource;
  /** Assemblies are measured on these every `evalEvery` steps; the best modules are kept. */
  evalData?: ExampleSource;
  /** Without evalData: share of the rows to hold out. */
  heldOut?: number;
  /** 'stop' (the default): a bad row ends the run with an error; 'skip': bad rows are left out, counted and named. */
  badRows?: 'stop' | 'skip';
  /** How many consecutive layers a module stands for: divisors of the layers of a stack, above 1; of a stack that none divides there are no modules. */
  granularities: readonly number[];
  /**
   * How often a span is replaced: at first `start` of the spans (default 0.3), then more by the same amount at each step, until the share `full`
   * of all steps (default 0.4) is done. From then on assemblies are drawn that are like those chosen in the end.
   */
  replace?: { start?: number; full?: number };
  /** What modules learn from. */
  losses?: ModuleLosses;
  /**
   * Corrections of a rank for projections (default all) of the model's own layers, attention to the source included, which learn with the modules;
   * every budget below full has them. Default none.
   */
  lora?: Pick<LoraRecipe, 'rank' | 'targets'>;
  /**
   * Trains routers of the encoder's layers and modules, too: shares of a source's tokens that enter attention and the feed-forward, or ranges
   * `[low, high]` from which one is drawn for each source. Default none.
   */
  tokens?: { attn?: TrainCapacity; mlp?: TrainCapacity };
  /**
   * Makes feed-forwards of layers and modules run at any width, a prefix of their units; two of three micro-batches are at full width, the others at one
   * of these shares. `rank` as of `elastify`, measured on the data: by default 'activation', so that the model is written with its units in
   * that order, the same function.
   */
  nested?: Pick<MatformerRecipe, 'granularities' | 'alignment' | 'rank'>;
}

/** An assembly, and how it does on held-out pairs. */
export interface MeasuredAssembly extends AssemblyQuality {
  assembly: Assembly;
  /** Share of the units of feed-forwards; absent: all. */
  ffnWidth?: number;
  /** Shares of tokens that enter sub-layers of the encoder; absent: all enter. */
  tokenCapacity?: SourceShares;
}

type Settings = Omit<MeasuredAssembly, keyof AssemblyQuality>;

/** How a `modular` run ended. */
export interface ModularResult extends TrainResult {
  /** Modules of both stacks. */
  modules: Modules;
  /** Of held-out pairs: the whole model first, then ever smaller assemblies, those that speed asks for; nested ones at each width; with routers some of them at the middle and the low end of what is trained. */
  assemblies?: readonly MeasuredAssembly[];
  /** Pairs trained on, and held out. */
  examples: { train: number; heldOut: number };
  /** Rows left out. */
  badRows: number;
  /** Pairs of which a side was cut. */
  truncated: number;
}

const ownKeys = [
  ...[
    'from',
    'out',
    'data',
    'evalData',
    'heldOut',
    'badRows',
    'granularities',
    'replace',
    'losses',
    'lora',
    'nested',
    'tokens',
  ],
];
const replaceDefaults = { start: 0.3, full: 0.4 };
const lossDefaults: Required<ModuleLosses> = { task: 1, logits: 1, hidden: 0.5, attention: 0.2 };
const lossNames = Object.keys(lossDefaults) as (keyof ModuleLosses)[];

/**
 * Trains modules of an encoder-decoder model: one layer for every span of i consecutive layers, for each granularity i and both stacks. At
 * each micro-batch an assembly of layers and modules is drawn and run beside the whole model, which stays frozen; its modules learn from the
 * targets and from the whole model's logits, hidden states and attention. See docs/methods/modular.md for what is drawn when. The same config gives
 * the same bits whatever the thread count, and a killed run, started again, continues to the same bits.
 *
 * @throws InvalidArgumentError for a bad config or a model that cannot have modules, InvalidDataError for bad rows unless they are left out,
 * InvalidFileError for bad files, FileSystemError when another process writes to `out`, DivergedError when training does not recover from NaN.
 */
export async function modular(config: ModularConfig): Promise<ModularResult> {
  check(config);
  return withLock(config.out, async () => {
    const { from, seed = 0 } = config;
    const model = await openSeq2Seq('modular', { from }, seed);
    const { spec } = model;
    const modules = modulesOf(spec, config.granularities);
    const lora = config.lora && loraOf({ targets: targetsOf(spec), ...config.lora }, spec.decoder, fail);
    const nested = config.nested && nestedIn(spec, config.nested);
    const routing = config.tokens && routingIn(spec, config.tokens);
    const bad = new BadRows('modular', config.badRows === 'skip');
    const rows = await readPairs('modular', config, bad);
    const { data, evalData } = await encodePairs('modular', config, rows, model, bad);
    const resolved = resolveConfig(config, data, { batchTokens: 4096, lr: 5e-4, weightDecay: 0.01 });
    const losses = { ...lossDefaults, ...config.losses };
    const replace = { ...replaceDefaults, ...config.replace };

    const { batchTokens } = resolved;
    const recompute = config.gradCheckpointing ?? false;
    using engine = new Engine(config.device);
    // Of nested feed-forwards the same function with its units in order; gone when all is written.
    await using ordered = nested && nested.scores !== 'none' ? temporary(join(config.out, 'ordered')) : null;
    if (ordered) {
      using checkpoint = Checkpoint.open(from);
      using loaded = loadSeq2SeqWeights(spec, checkpoint);
      const { scores } = nested!;
      const ranked = { spec, weights: loaded.weights, scores, data, engine, batchTokens, onEvent: config.onEvent };
      await replaceDirectory('modular', ordered.dir, (dir) => writeOrdered(from, dir, ranked));
    }
    const base = ordered?.dir ?? from;
    using checkpoint = Checkpoint.open(base);
    using loaded = loadSeq2SeqWeights(spec, checkpoint);
    using student = await replacing(spec, checkpoint, loaded.weights, modules, data, losses, {
      ...{ engine, batchTokens, recompute, seed, lora, nested, sourceTokens: routing },
      routerLrScale: routerLr / resolved.optimizer.lr,
    });
    const path = assemblyPath(spec, modules, 'speed-first');
    // Some of the path: with stacks of equal size the decoder by a third and as small as it gets, then the encoder, too.
    const some = [path[path.length >> 2], path[path.length >> 1], path.at(-1)!];
    const routed = (at: number): Settings[] =>
      routing ? [path[0], ...some].map((assembly) => ({ assembly, tokenCapacity: sharesAt(routing, at) })) : [];
    const watched = [...some.flatMap((assembly) => atWidths(assembly, nested)), ...routed(0.5)];
    // Of all layers there is nothing to compare but what comes of them.
    const learning = lora !== undefined && losses.task + losses.logits > 0;
    const task: Task<PairBatch> = {
      api: 'modular',
      engine,
      trainable: student.trainable,
      data,
      identity: {
        ...{ method: 'modular', from: model.sha256, granularities: config.granularities, replace, losses },
        ...{ evalData: evalData?.sha256() ?? null, sequenceLength: data.sequenceLength },
        ...(lora && { lora }),
        ...(nested && { nested }),
        ...(routing && { tokens: routing.capacity }),
      },
      lossRows,
      async micro(batch, { step, index, total, signal }) {
        const number = step * resolved.gradAccumulation + index;
        const random = new Random(seed, 'assembly', number);
        const assembly = drawAssembly(spec, modules, { progress: step / resolved.steps, replace, random });
        const drawn = nested ? drawWidth(nested, learning, new Random(seed, 'width', number)) : {};
        const own =
          routing && drawSources(routing, new Random(seed, 'tokens', number), batch.source.offsets.length - 1);
        // Of all layers routers learn, if there is something to compare.
        const whole = own?.whole && losses.task + losses.logits > 0 ? { assembly: undefined } : {};
        const settings = { assembly, ...drawn, ...whole };
        return { ...(await student.run(settings, batch, { weight: 1 / total, tokens: own?.tokens, signal })) };
      },
      ...(evalData && {
        async evaluate(signal?: AbortSignal) {
          const levels: Record<string, Record<string, number>> = {};
          for (const settings of watched)
            levels[settingsText(settings)] = { ...(await student.quality(settings, evalData, signal)) };
          const values = Object.values(levels);
          return { levels, metric: values.reduce((sum, { loss }) => sum + loss, 0) / values.length };
        },
      }),
    };
    const result = await train(task, resolved, config.out, config);
    const assemblies: MeasuredAssembly[] = [];
    if (result.stopped !== 'signal') {
      const values = student.trainable.values();
      await writeModules(config.out, base, {
        ...{ spec: modules, origin: from },
        weights: new Map(seq2seqModuleSlots(spec, modules).map(({ name }) => [name, values.get(name)!])),
        ...(nested && { nested: { ...nested, trained: 'modules' } }),
        ...(lora && { lora: { policy: lora, matrices: trainedLora(lora, spec, values) } }),
        ...(routing && {
          routing: {
            capacity: routing.capacity,
            routers: trainedRouters(values, sourceRouters({ sourceTokens: routing, modules })),
          },
        }),
      });
      if (evalData) {
        const settings = path.flatMap((assembly) => atWidths(assembly, nested));
        for (const one of [...settings, ...routed(0.5), ...routed(0)])
          assemblies.push({ ...one, ...(await student.quality(one, evalData)) });
      }
    }
    return {
      ...{ dir: config.out, step: result.step, stopped: result.stopped, modules },
      ...(result.best && { best: result.best }),
      ...(assemblies.length > 0 && { assemblies }),
      ...{ examples: { train: data.count, heldOut: evalData?.count ?? 0 }, badRows: bad.count },
      truncated: data.truncated + (evalData?.truncated ?? 0),
    };
  });
}

const fail = (what: string): never => {
  throw new InvalidArgumentError(`[modular] ${what}`);
};

function check(config: ModularConfig): void {
  checkConfig('modular', config, ownKeys);
  const { from, granularities, replace = {}, losses = {}, lora = {}, nested = {}, tokens = {} } = config;
  if (typeof from !== 'string' || from === '')
    fail(`from must be the path of a directory, got ${JSON.stringify(from)}`);
  checkExampleConfig('modular', config);
  if (
    !Array.isArray(granularities) ||
    granularities.length === 0 ||
    new Set(granularities).size !== granularities.length
  )
    fail(`granularities must be different integers above 1, got ${JSON.stringify(granularities)}`);
  for (const [name, group] of Object.entries({ replace, losses, lora, nested, tokens })) {
    if (typeof group !== 'object' || group === null) fail(`${name} must be an object, got ${JSON.stringify(group)}`);
  }
  checkKeys('modular', 'key of replace', replace, Object.keys(replaceDefaults));
  checkKeys('modular', 'key of losses', losses, lossNames);
  checkKeys('modular', 'key of lora', lora, ['rank', 'targets']);
  checkKeys('modular', 'key of nested', nested, ['granularities', 'alignment', 'rank']);
  checkKeys('modular', 'key of tokens', tokens, places);
  for (const [place, value] of Object.entries(tokens)) {
    const range = capacityRange(value);
    if (!range || range[0] > range[1])
      fail(`tokens.${place} must be a share in (0, 1] or an ascending range of them, got ${JSON.stringify(value)}`);
  }
  if (config.tokens && Object.keys(tokens).length === 0) fail(`tokens must have some of ${places.join(', ')}`);
  for (const [name, value] of Object.entries(replace)) {
    if (!(typeof value === 'number' && value >= 0 && value <= 1))
      fail(`replace.${name} must be a number from 0 to 1, got ${String(value)}`);
  }
  for (const [name, value] of Object.entries(losses)) {
    if (!(typeof value === 'number' && value >= 0 && Number.isFinite(value)))
      fail(`losses.${name} must be a number of zero or more, got ${String(value)}`);
  }
  if (Object.values({ ...lossDefaults, ...losses }).every((factor) => factor === 0))
    fail('losses must leave something to learn: one of them above 0');
}

const targetsOf = ({ decoder: { gated } }: Seq2SeqSpec): Projection[] =>
  projections.filter((projection) => gated || projection !== 'gate');

function nestedIn(
  { encoder, decoder }: Seq2SeqSpec,
  { granularities, alignment, rank = 'activation' }: NonNullable<ModularConfig['nested']>,
): Nested {
  const wrong = (what: string) => fail(`nested: ${what}`);
  if (encoder.ffn !== decoder.ffn) {
    wrong(`feed-forwards of both stacks must have as many units, and these have ${encoder.ffn} and ${decoder.ffn}`);
  }
  if (!unitScores.includes(rank)) wrong(`rank must be one of ${unitScores.join(', ')}, got ${JSON.stringify(rank)}`);
  const layers = Array.from({ length: decoder.layers }, (_, layer) => layer);
  const nested = nestedOf({ granularities, alignment, layers, scores: rank }, decoder.ffn, wrong);
  if (granularities.length < 2) wrong(`granularities must have one below 1, got ${JSON.stringify(granularities)}`);
  return nested;
}

function trainedLora(
  lora: NonNullable<ElasticPolicy['lora']>,
  spec: Seq2SeqSpec,
  values: ReadonlyMap<string, Float32Array>,
): Lora {
  return loraOfParameters(seq2seqLoraParameters(lora, spec), lora.rank, (name) => values.get(name)!);
}

function routingIn({ encoder }: Seq2SeqSpec, tokens: NonNullable<ModularConfig['tokens']>): SourceTokens {
  const ranges = Object.entries(tokens).map(([place, value]) => [place, capacityRange(value)!]);
  return { layers: encoder.layers, capacity: Object.fromEntries(ranges) };
}

/** Learning rate of routers, whatever that of modules is: what they score does not depend on how those begin. */
const routerLr = 2e-2;

/** An assembly with all units, and with as many as each granularity has. */
const atWidths = (assembly: Assembly, nested: Nested | undefined): Settings[] => [
  { assembly },
  ...(nested?.granularities ?? [])
    .filter((share) => share < 1)
    .toReversed()
    .map((ffnWidth) => ({ assembly, ffnWidth })),
];

/** A directory that is gone when its block ends. */
const temporary = (dir: string) => ({
  dir,
  [Symbol.asyncDispose]: () => rm(dir, { recursive: true, force: true }),
});

function modulesOf(spec: Seq2SeqSpec, granularities: readonly number[]): Modules {
  const fitting = (stack: Stack) =>
    granularities.filter((granularity) => granularityProblem(granularity, spec[stack].layers) === null);
  const useless = granularities.find((granularity) =>
    (['encoder', 'decoder'] as const).every((stack) => !fitting(stack).includes(granularity)),
  );
  if (useless !== undefined) {
    throw new InvalidArgumentError(
      `[modular] granularities must be integers above 1 that divide ${spec.encoder.layers} encoder or ${spec.decoder.layers} decoder layers, got ${String(useless)}`,
    );
  }
  const of = (stack: Stack) => spansOf(spec[stack].layers, fitting(stack));
  return { encoder: of('encoder'), decoder: of('decoder') };
}
