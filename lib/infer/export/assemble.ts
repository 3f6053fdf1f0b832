// Choosing an assembly of a modular model by speed, size or measured time, and writing it as a stock checkpoint.
import { join } from 'node:path';
import {
  assembledSpec,
  effectiveSettings,
  type Lengths,
  settingsRatio,
  settingsSpeedup,
  typicalLengths,
  unitsAt,
} from '../../elastic/assemblies.js';
import type { ElasticSpec } from '../../elastic/axes.js';
import type { Budget } from '../../elastic/budget.js';
import { assemblyCard } from '../../elastic/card.js';
import { mergedLora } from '../../elastic/lora.js';
import {
  type Assembly,
  assemblyPath,
  assemblyProblem,
  assemblyText,
  backboneOf,
  type Modules,
  settingsProblem,
  settingsText,
  stacks,
} from '../../elastic/modules.js';
import type { Level } from '../../elastic/policy.js';
import { type LevelTimes, writeProfile } from '../../elastic/profile.js';
import { copyCompanions, readElastic, routerFile, writeLevels } from '../../elastic/store.js';
import { editJson, newDirectory, readJsonText, writeFileAtomic } from '../../io/files.js';
import { Checkpoint, openSafetensors } from '../../io/safetensors.js';
import { type CopiedTensor, copyTensors } from '../../io/slices.js';
import { isModule, spanOf } from '../../model/parts.js';
import { type Seq2SeqSpec, seq2seqSpecFromConfig } from '../../model/seq2seq_spec.js';
import {
  seq2seqModuleSlots,
  seq2seqModules,
  seq2seqParameters,
  seq2seqSlots,
  storedLayer,
} from '../../model/seq2seq_weights.js';
import { nameIn, storedUnitAxis, storedUnits } from '../../model/weights.js';
import { InvalidArgumentError, InvalidDataError } from '../../native/errors.js';
import { loadModel } from '../model.js';
import { checkNumber, checkOptions, positiveInteger } from '../options.js';
import { median } from '../quality/statistics.js';
import type { Seq2Seq } from '../seq2seq/seq2seq.js';
import type { LoadOptions } from '../types.js';
import { largestDifference, probeIds } from './compared.js';

/** Options of `assemble`. At most one of `speedup`, `size`, `latencyMs` and the lists says what to choose; without, only the path is shown. */
export interface AssembleOptions extends Pick<LoadOptions, 'device' | 'activations' | 'threads' | 'dtype' | 'signal'> {
  /** The costliest assembly that is expected to write a typical text so many times as fast; the decoder shrinks first. */
  speedup?: number;
  /** The largest assembly with at most this share of the model's parameters; both stacks shrink. */
  size?: number;
  /** The costliest assembly that runs a typical generation in so many milliseconds, measured here by generating; the decoder shrinks first. */
  latencyMs?: number;
  /** Parts by name, `['0', '1', '2-3']`; a stack that is not listed has all its layers. */
  encoder?: readonly string[];
  decoder?: readonly string[];
  /** Where feed-forwards are nested, the width that all assemblies but the whole model are at: a share of the units or their number; default 1. */
  ffnWidth?: number;
  /** Shares of a source's tokens that enter sub-layers of the encoder, to be kept with the chosen assembly in a level; default all. */
  tokenCapacity?: ElasticSpec['tokenCapacity'];
  /** Tokens that a typical generation reads and writes; default 64 each, or what the context holds. */
  sourceTokens?: number;
  targetTokens?: number;
  /** Measure the time of every assembly of the path. */
  measure?: boolean;
  /** Measure, and keep the times beside the model for budgets of a latency. */
  record?: boolean;
  /** Keep the chosen assembly in the model as a level of this name. */
  saveLevel?: string;
  /** New or empty directory for the chosen assembly as a stock checkpoint. */
  out?: string;
  /** Called as the work goes on: what is being done, and how many of its steps are. */
  onProgress?: (event: { phase: string; done: number; total: number }) => unknown;
}

/** An assembly, and what it costs. */
export interface AssemblyCost {
  assembly: Assembly;
  /** Share of the units of every feed-forward. */
  ffnWidth: number;
  parameters: number;
  /** Of a typical generation, over those of the whole model. */
  flopsRatio: number;
  /**
   * How many times as fast as the whole model it is expected to be for one text at a time, by FLOPs: a run, also that which reads a source, takes about as
   * long as its first row.
   */
  speedup: number;
  /** Milliseconds of a typical generation; null when not measured. */
  ms: number | null;
}

/** What `assemble` found and wrote. */
export interface AssembleResult {
  /** Assemblies from the whole model to the smallest, in the order that was asked for. */
  path: AssemblyCost[];
  /** Null when nothing was asked for. */
  chosen: AssemblyCost | null;
  /** Of `out`; null without. */
  written: AssembledCheckpoint | null;
}

/** A checkpoint that was written, and compared with the assembly that it is of. */
export interface AssembledCheckpoint {
  dir: string;
  /** Of the weights. */
  bytes: number;
  /** Of three sources, those whose greedy texts are the same by both. */
  texts: number;
  /** Largest difference of logits of their tokens: 0, or where corrections were merged into weights what that rounds. */
  largestDifference: number;
  /** What loads it. */
  loadsIn: readonly string[];
}

/** After one to warm up. */
const timedRounds = 5;
/** Tokens of a short source, at which times are recorded besides those of a typical one. */
const shortSource = 8;
/** The largest logit may be off by so much of itself where corrections were merged, into weights of 32 or of 16 bits. */
const tolerances = { wide: 1e-3, narrow: 0.05 };
const ways = ['speedup', 'size', 'latencyMs'] as const;

/**
 * Chooses an assembly of a model with modules and says what all on the way to it cost; with `out` writes it as a checkpoint with fewer layers in the
 * element types of the model. `out` appears complete or not at all, after greedy texts and logits of both were compared.
 *
 * @throws InvalidArgumentError for a model without modules, more than one wish, one that cannot be met, an assembly with a gap, an overlap or a part that
 * is not there, an `out` in use; InvalidDataError when the checkpoint does not compute what the assembly does; InvalidFileError for a bad
 * checkpoint; FileSystemError from the disk.
 */
export async function assemble(model: string, options: AssembleOptions = {}): Promise<AssembleResult> {
  checkOptions('assemble', options, [
    ...[
      ...ways,
      'encoder',
      'decoder',
      'ffnWidth',
      'tokenCapacity',
      'sourceTokens',
      'targetTokens',
      'measure',
      'record',
      'saveLevel',
      'out',
    ],
    ...['device', 'activations', 'threads', 'dtype', 'signal', 'onProgress'],
  ]);
  const { speedup, size, latencyMs, encoder, decoder, ffnWidth, out, saveLevel, signal, onProgress } = options;
  checkNumber('assemble', 'speedup', speedup, (n) => n >= 1, 'at least 1');
  checkNumber('assemble', 'size', size, (n) => n > 0 && n <= 1, 'in (0, 1]');
  checkNumber('assemble', 'latencyMs', latencyMs, (n) => n > 0, 'above 0');
  for (const name of ['sourceTokens', 'targetTokens'] as const)
    checkNumber('assemble', name, options[name], positiveInteger, 'a positive integer');
  const byWay = ways.some((way) => options[way] !== undefined);
  const { tokenCapacity } = options;
  const beside = ffnWidth !== undefined || tokenCapacity !== undefined;
  const listed = encoder !== undefined || decoder !== undefined || (beside && !byWay);
  const asked = [...ways.filter((way) => options[way] !== undefined), ...(listed ? ['encoder and decoder'] : [])];
  if (asked.length > 1) throw new InvalidArgumentError(`[assemble] choose by one of them, got ${asked.join(' and ')}`);
  if (tokenCapacity !== undefined && (out !== undefined || saveLevel === undefined)) {
    throw new InvalidArgumentError(
      '[assemble] tokenCapacity is kept in a level, with saveLevel: a stock checkpoint has no routers, and runs every token everywhere',
    );
  }
  if (options.record && ffnWidth !== undefined) {
    throw new InvalidArgumentError(
      '[assemble] record keeps times of whole feed-forwards and of levels: leave out ffnWidth, or save a level first',
    );
  }
  if (asked.length === 0 && (out !== undefined || saveLevel !== undefined)) {
    throw new InvalidArgumentError(
      '[assemble] which assembly? Give speedup, size, latencyMs, or the parts of encoder and decoder',
    );
  }
  if (saveLevel === '' || saveLevel === 'full') {
    throw new InvalidArgumentError(
      `[assemble] saveLevel must be a name, and not that of all layers, got '${saveLevel}'`,
    );
  }
  const { device, activations, threads, dtype } = options;
  const loading = Object.fromEntries(
    Object.entries({ device, activations, threads, dtype, signal }).filter(([, value]) => value !== undefined),
  );
  await using loaded = await loadModel(model, loading);
  const { seq2seq } = loaded;
  const { spec, policy, maxContext, weights, dir } = seq2seq.network;
  if (!policy?.modules) {
    throw new InvalidArgumentError(`[assemble] ${dir} has no modules; train them with \`elastiform modular\``);
  }
  const { modules } = policy;
  const problem = settingsProblem({ ffnWidth }, spec, policy);
  if (problem) throw new InvalidArgumentError(`[assemble] ${problem}`);
  const lengths = {
    source: options.sourceTokens ?? Math.min(typicalLengths.source, maxContext),
    target: options.targetTokens ?? Math.min(typicalLengths.target, maxContext),
  };
  const ownHead = weights.head.weight !== weights.embed;
  const settingsOf = (assembly: Assembly, width = ffnWidth): ElasticSpec =>
    effectiveSettings({ assembly, ffnWidth: width }, spec, policy);
  const costOf = (assembly: Assembly, width = ffnWidth): AssemblyCost => {
    const settings = settingsOf(assembly, width);
    return {
      ...{ assembly, ffnWidth: (settings.ffnWidth as number) ?? 1 },
      parameters: seq2seqParameters(assembledSpec(spec, settings, policy), ownHead),
      flopsRatio: settingsRatio(spec, settings, policy, lengths),
      speedup: settingsSpeedup(spec, settings, policy, lengths),
      ms: null,
    };
  };
  const list = listed ? listedAssembly(spec, modules, { encoder, decoder }) : null;
  const assemblies = assemblyPath(spec, modules, size === undefined ? 'speed-first' : 'size-first');
  const path = assemblies.map((assembly) => costOf(assembly));
  // The whole model comes first, whatever the width.
  if (path[0].ffnWidth < 1) path.unshift(costOf(assemblies[0], 1));
  const explicit = list && costOf(list);
  if (options.measure || options.record || latencyMs !== undefined) {
    const levels = options.record ? policy.levels : [];
    const timed = [...path, ...(explicit ? [explicit] : [])];
    const settings = [
      ...timed.map((cost) => settingsOf(cost.assembly, cost.ffnWidth)),
      ...levels.map((level) => level.spec),
    ];
    const times = await measure(seq2seq, settings, {
      ...{ lengths, both: options.record === true, signal, onProgress },
    });
    for (const [i, cost] of timed.entries()) cost.ms = times.total[i];
    if (options.record) {
      const named = [...timed.map(({ assembly }) => asLevel(spec, assembly)), ...levels];
      await writeProfile(dir, {
        ...{ version: 1, on: seq2seq.network.measuredOn(), weightsSha256: policy.base.weightsSha256 },
        lengths: times.lengths,
        levels: named.map(({ name, spec }, i): LevelTimes => ({ level: name, spec, ...times.each[i] })),
      });
    }
  }
  const chosen = explicit ?? (asked.length > 0 ? choose(path, options) : null);
  if (chosen && saveLevel !== undefined) {
    const { assembly, ffnWidth: width } = chosen;
    const settings = { assembly, ...(width < 1 && { ffnWidth: width }), ...(tokenCapacity && { tokenCapacity }) };
    const wrong = settingsProblem(settings, spec, policy);
    if (wrong) throw new InvalidArgumentError(`[assemble] ${wrong}`);
    const flopsRatio = settingsRatio(spec, effectiveSettings(settings, spec, policy), policy, lengths);
    const level = { name: saveLevel, spec: settings, flopsRatio };
    await writeLevels(dir, [...policy.levels.filter(({ name }) => name !== saveLevel), level]);
  }
  const written = chosen && out !== undefined ? await writeAssembly(model, out, chosen, options) : null;
  return { path, chosen, written };
}

function listedAssembly(
  spec: Seq2SeqSpec,
  modules: Modules,
  { encoder, decoder }: Pick<AssembleOptions, 'encoder' | 'decoder'>,
): Assembly {
  const whole = backboneOf(spec);
  const assembly = { encoder: encoder ?? whole.encoder, decoder: decoder ?? whole.decoder };
  const problem = assemblyProblem(assembly, spec, modules);
  if (problem) throw new InvalidArgumentError(`[assemble] the assembly must be ${problem}`);
  return assembly;
}

function choose(path: readonly AssemblyCost[], { speedup, size, latencyMs }: AssembleOptions): AssemblyCost {
  const whole = path[0];
  const [fits, wish, best] =
    speedup !== undefined
      ? ([
          (cost: AssemblyCost) => cost.speedup >= speedup,
          `a speed-up of ${speedup}`,
          (cost: AssemblyCost) => `has ${cost.speedup.toFixed(2)}`,
        ] as const)
      : size !== undefined
        ? ([
            ({ parameters }: AssemblyCost) => parameters <= size * whole.parameters,
            `${size} of the parameters`,
            ({ parameters }: AssemblyCost) => `has ${(parameters / whole.parameters).toFixed(3)} of them`,
          ] as const)
        : ([
            ({ ms }: AssemblyCost) => ms! <= latencyMs!,
            `${latencyMs} ms`,
            ({ ms }: AssemblyCost) => `takes ${ms!.toFixed(1)} ms on this device`,
          ] as const);
  const found = path.find(fits);
  if (found) return found;
  const least = path.at(-1)!;
  throw new InvalidArgumentError(
    `[assemble] no assembly has ${wish}: the smallest, ${assemblyText(least.assembly)}, ${best(least)}`,
  );
}

/** As `resolveAssembly` names what it finds by time. */
function asLevel(spec: Seq2SeqSpec, assembly: Assembly): Level {
  const name = assemblyText(assembly);
  return { name, spec: name === assemblyText(backboneOf(spec)) ? {} : { assembly } };
}

/**
 * Times generations at some settings in turns, so that what else the machine does is shared by all.
 *
 * @param options.both at a short source besides the typical one
 * @returns medians: of whole typical generations, and at each of the settings of every length of a source
 */
async function measure(
  seq2seq: Seq2Seq,
  all: readonly ElasticSpec[],
  {
    lengths: { source, target },
    both,
    signal,
    onProgress,
  }: { lengths: Lengths; both: boolean } & Pick<AssembleOptions, 'signal' | 'onProgress'>,
): Promise<{ lengths: number[]; total: number[]; each: Pick<LevelTimes, 'prefillMs' | 'decodeMs'>[] }> {
  const { vocab } = seq2seq.network.spec.decoder;
  const lengths = both && source > shortSource ? [shortSource, source] : [source];
  const runs = all.map(() =>
    lengths.map(() => ({ total: [] as number[], token: [] as number[], read: [] as number[] })),
  );
  for (let round = 0; round <= timedRounds; round++) {
    onProgress?.({ phase: 'timing assemblies', done: round, total: timedRounds + 1 });
    for (const [i, spec] of all.entries()) {
      for (const [at, tokens] of lengths.entries()) {
        const budget: Budget = { spec };
        const ms = await seq2seq.time(probeIds(tokens, vocab), { budget, tokens: target, signal });
        if (round === 0) continue;
        const token = ms.decode / target;
        runs[i][at].total.push(ms.prefill + ms.decode);
        runs[i][at].token.push(token);
        runs[i][at].read.push(ms.prefill + token);
      }
    }
  }
  return {
    lengths,
    total: runs.map((own) => median(own.at(-1)!.total)),
    each: runs.map((own) => ({
      prefillMs: own.map(({ read }) => median(read)),
      decodeMs: own.map(({ token }) => median(token)),
    })),
  };
}

async function writeAssembly(
  model: string,
  out: string,
  { assembly, ffnWidth }: AssemblyCost,
  { signal, onProgress }: AssembleOptions,
): Promise<AssembledCheckpoint> {
  const configPath = join(model, 'config.json');
  const { text, json } = await readJsonText(configPath);
  const spec = seq2seqSpecFromConfig(json, configPath);
  const { policy, lora } = (await readElastic(model))!;
  const settings = effectiveSettings({ assembly, ffnWidth }, spec, policy);
  const units = unitsAt(settings, spec, policy);
  const merged = lora !== null && Object.keys(settings).length > 0;
  const edit = merged ? mergedLora(spec.decoder, lora, seq2seqModules(spec)) : () => undefined;
  const ofLayers = storedUnits(spec.decoder, seq2seqSlots(spec, false));
  const cut = (axis: 0 | 1 | null | undefined) =>
    axis == null || units === spec.decoder.ffn ? {} : { slice: { axis, kept: units } };
  return await newDirectory('assemble', out, async (dir) => {
    using checkpoint = Checkpoint.open(model);
    using modules = openSafetensors(join(model, routerFile));
    const tensors = new Map<string, CopiedTensor>();
    const layers = /^((?:model\.)?(encoder|decoder)\.(?:layers|block)\.)(\d+)(\..*)$/;
    for (const name of checkpoint.names()) {
      const [, before, stack, layer, after] = layers.exec(name) ?? [];
      // T5's table of distances, which its first layer has, is the stack's.
      const own = before === undefined || name.endsWith('SelfAttention.relative_attention_bias.weight');
      const at = own ? -1 : assembly[stack as 'encoder'].indexOf(layer);
      const info = checkpoint.info(name);
      if (own) tensors.set(name, { info });
      else if (at >= 0) {
        const plan = { ...cut(ofLayers.get(name)?.axis), edit: edit(name) };
        tensors.set(`${before}${at}${after}`, { info, ...plan });
      }
    }
    for (const stack of stacks) {
      for (const [at, part] of assembly[stack].entries()) {
        if (!isModule(part)) continue;
        const span = spanOf(part)!;
        const only = { encoder: [], decoder: [], [stack]: [span] };
        for (const slot of seq2seqModuleSlots(spec, only)) {
          const stored = nameIn(checkpoint, spec.decoder, slot)!;
          const name = stored.replace(storedLayer(spec, stack, span.last), storedLayer(spec, stack, at));
          tensors.set(name, { info: modules.info(slot.name), ...cut(storedUnitAxis(slot)) });
        }
      }
    }
    const bytes = await copyTensors(join(dir, 'model.safetensors'), tensors, {
      signal,
      onProgress: (done, total) => onProgress?.({ phase: 'writing tensors', done, total }),
      metadata: { format: 'pt' },
    });
    await copyCompanions(model, dir);
    const { encoder, decoder } = assembly;
    const t5 = spec.decoder.family === 't5';
    const [first, second] = t5 ? ['num_layers', 'num_decoder_layers'] : ['encoder_layers', 'decoder_layers'];
    const widths = t5 ? { d_ff: units } : { encoder_ffn_dim: units, decoder_ffn_dim: units };
    const config = editJson(text, (fields) => ({
      ...fields,
      ...{ [first]: encoder.length, [second]: decoder.length },
      ...('num_hidden_layers' in fields && { num_hidden_layers: encoder.length }),
      ...(units < spec.decoder.ffn && widths),
    }));
    await writeFileAtomic(join(dir, 'config.json'), `${config}\n`);
    await writeFileAtomic(join(dir, 'README.md'), assemblyCard(policy.base, { assembly, units, merged }));
    const compared = await compare(model, settings, dir, { merged, signal });
    const loadsIn = ['elastiform', 'transformers', `other runtimes that read ${spec.type} checkpoints`];
    return { dir: out, bytes, ...compared, loadsIn };
  });
}

/**
 * Compares greedy texts of some sources and the logits of their tokens, at the settings and by the checkpoint that was written. Products with
 * corrections beside a matrix round otherwise than with their sum, so with corrections that were `merged` logits may differ a little, and texts where
 * two tokens are as likely; else all must be the same to the bit.
 */
async function compare(
  model: string,
  settings: ElasticSpec,
  written: string,
  { merged, signal }: { merged: boolean; signal?: AbortSignal },
): Promise<Pick<AssembledCheckpoint, 'texts' | 'largestDifference'>> {
  const loading: LoadOptions = { device: 'cpu', ...(signal && { signal }) };
  await using before = await loadModel(model, loading);
  await using after = await loadModel(written, loading);
  const { spec, maxContext, settings: writing, weights } = before.seq2seq.network;
  const { vocab } = spec.decoder;
  const maxTokens = Math.min(16, maxContext);
  const budget: Budget = { spec: settings };
  const tolerance = tolerances[weights.embed.dtype === 'f32' ? 'wide' : 'narrow'];
  let [texts, largest] = [0, 0];
  for (const tokens of [3, 9, 24]) {
    const source = probeIds(Math.min(tokens, maxContext), vocab);
    const textOf = (one: typeof before, options: { budget?: Budget }) =>
      one.generate(source, { ...options, maxTokens, beams: 1, ...(signal && { signal }) }).ids;
    const [own, theirs] = [await textOf(before, { budget }), await textOf(after, {})];
    const target = [writing.startId, ...own.slice(0, -1)];
    const logits = await before.seq2seq.logits(source, target, { budget, ...(signal && { signal }) });
    const others = await after.seq2seq.logits(source, target, { budget: 'full', ...(signal && { signal }) });
    const difference = largestDifference(logits, others);
    const most = merged ? tolerance * logits.reduce((size, value) => Math.max(size, Math.abs(value)), 0) : 0;
    const same = own.join() === theirs.join();
    if (!(difference <= most) || !(same || merged)) {
      throw new InvalidDataError(
        `[assemble] the checkpoint that was written does not compute what ${settingsText(settings) || 'the whole model'} does (logits differ by ${difference}, more than ${most}): nothing was written`,
      );
    }
    texts += Number(same);
    largest = Math.max(largest, difference);
  }
  return { texts, largestDifference: largest };
}
