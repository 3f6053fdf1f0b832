// Makes a pretrained model elastic: attaches untrained routers by a recipe and writes the plan that distillation trains.
import { existsSync } from 'node:fs';
import { readdir, realpath } from 'node:fs/promises';
import { basename, resolve } from 'node:path';
import { FileSystemError, inFileSystem, replaceDirectory } from '../io/files.js';
import { rounded } from '../io/rounding.js';
import { Checkpoint, type TensorData } from '../io/safetensors.js';
import { copyCheckpoint } from '../io/slices.js';
import { readArchitecture, readSpec } from '../model/directory.js';
import { encoderSlots, loadEncoderWeights } from '../model/encoder_weights.js';
import type { Modules } from '../model/parts.js';
import { loadSeq2SeqWeights, seq2seqModuleSlots } from '../model/seq2seq_weights.js';
import type { EncoderSpec, ModelSpec } from '../model/spec.js';
import { loadWeights, type StoredUnits, storedUnits } from '../model/weights.js';
import { InvalidArgumentError } from '../native/errors.js';
import { type ExitHead, exitId } from './exits.js';
import { planLength, standardLevels } from './levels.js';
import { type Lora, loraParameters, seq2seqLoraParameters } from './lora.js';
import type { Nested } from './nested.js';
import {
  type ElasticPolicy,
  encoderConflict,
  type Level,
  type Range,
  type Router,
  type Routing,
  routerParameters,
  routerPlaces,
  sourceRouters,
} from './policy.js';
import { provenanceOf } from './provenance.js';
import { fail, type PartialPolicy, plainPolicy, policyOf, type Recipe } from './recipes.js';
import {
  baseFiles,
  checkReadable,
  copyCompanions,
  elasticConfigFile,
  hashFiles,
  readElastic,
  weightsSha256,
  writeElastic,
} from './store.js';

export * from './recipes.js';

/** What `elastify` wrote. */
export interface ElasticPlan {
  /** The plan's directory. */
  dir: string;
  /** Parameters of routers and corrections. */
  trainableParameters: number;
  /** Trainable parameters over the parameters of the backbone. */
  trainableShare: number;
  /** What will not work, for a person. */
  warnings: readonly string[];
}

/** Routers that give every token, and every expert, the score 0. */
export function zeroRouters(policy: Routing & Pick<ElasticPolicy, 'hidden'>): Map<string, Router> {
  const zeros = (n: number) => new Float32Array(n);
  return new Map(
    routerPlaces(policy).map(({ id, outputs }) => [
      id,
      { weight: zeros(outputs * policy.hidden), bias: zeros(outputs) },
    ]),
  );
}

/** The order of units, by layer: which unit of the model comes first, second, ... */
export type UnitOrders = ReadonlyMap<number, Uint32Array>;

/**
 * Models with several residual streams share keys among layers, so that no attention can be left out or cut, and have sparse
 * feed-forwards, in which units act by what all of them are.
 */
function checkStreams({ nested, tokens, sequences, heads, blocks }: PartialPolicy, spec: ModelSpec): void {
  if (!spec.streams) return;
  if (tokens.attn || tokens.block || sequences?.attn || sequences?.block || heads) {
    fail(
      `attention of ${spec.type} has keys that other layers use, and is not routed: use tokens: { mlp } or matformer`,
    );
  }
  if (blocks) {
    fail(`feed-forwards of ${spec.type} are sparse, and cannot be cut into blocks: use tokens: { mlp } or matformer`);
  }
  const uneven = nested?.layers.find((layer) => spec.perLayer[layer].ffn !== spec.ffn);
  if (uneven === undefined) return;
  const { ffn } = spec.perLayer[uneven];
  fail(
    `matformer needs feed-forwards of one width: that of layer ${uneven} has ${ffn} units and the widest ${spec.ffn}`,
  );
}

export interface ElastifyOptions {
  /** Directory to write. */
  out: string;
  /** Measures the order that the recipe's `rank` asks for. */
  order?: (nested: Nested) => Promise<UnitOrders>;
}

/**
 * Writes a plan: the checkpoint of `model`, unchanged or with the units of its feed-forwards in another order, zero routers,
 * and the policy of the recipe. The directory appears complete or not at all; an earlier plan there is replaced, anything
 * else is left alone with an error.
 *
 * @throws InvalidArgumentError for a bad recipe, InvalidFileError for a bad checkpoint, FileSystemError from the disk.
 */
export async function elastify(
  model: string,
  recipe: Recipe | readonly Recipe[],
  { out, order }: ElastifyOptions,
): Promise<ElasticPlan> {
  const names = baseFiles(model);
  const spec = await readSpec(model);
  const partial = policyOf(recipe, spec);
  const conflict = encoderConflict(partial, spec);
  if (conflict) fail(`${conflict}; nest its feed-forwards (matformer), or give it exits (writeExits)`);
  checkStreams(partial, spec);
  const backbone = countParameters(model, spec);
  if ((partial.nested || partial.blocks) && spec.perLayer.some(({ ffn }) => ffn !== spec.ffn)) {
    fail(`feed-forwards of ${model} have different widths, and only equal ones can be nested or cut into blocks`);
  }
  const ranked = partial.nested && partial.nested.scores !== 'none' ? partial.nested : null;
  if (ranked && !order) fail(`rank '${ranked.scores}' measures units on a text: give calibration data`);
  await replaceable(out, model);
  const levels = partial.nested ? standardLevels(spec, partial, null, planLength) : partial.levels;
  const base = await baseOf(model, names);
  await replaceDirectory('elastify', out, async (dir) => {
    let policy: ElasticPolicy = { ...partial, levels, base };
    if (ranked) {
      const orders = await order!(ranked);
      const units = spec.encoder ? storedUnits(spec, encoderSlots(spec as EncoderSpec)) : storedUnits(spec);
      await writePermuted(model, dir, units, ({ layer }) => orders.get(layer));
      const { weightsSha256 } = await baseOf(dir, names);
      const nested = { ...ranked, permutedFrom: base.weightsSha256 };
      policy = { ...policy, nested, base: { ...base, weightsSha256 } };
    }
    await writeElastic(dir, ranked ? dir : model, policy, zeroRouters(policy), null);
  });
  const corrections = loraParameters(partial, spec).reduce((sum, { shape }) => sum + shape[0] * shape[1], 0);
  const trainableParameters = routerParameters(partial) + corrections;
  const warnings = base.tokenizerSha256 ? [] : [`${model} has no tokenizer.json: text cannot be encoded with it`];
  return { dir: out, trainableParameters, trainableShare: trainableParameters / backbone, warnings };
}

/**
 * The same model with the units of its feed-forwards in another order.
 *
 * @param units the stored tensors that have some
 * @param order of the units of each, if it is another
 */
export async function writePermuted(
  model: string,
  out: string,
  units: ReadonlyMap<string, StoredUnits>,
  order: (of: StoredUnits) => Uint32Array | undefined,
): Promise<void> {
  await copyCheckpoint(model, out, (name) => {
    const found = units.get(name);
    const kept = found && order(found);
    return kept ? { slice: { axis: found.axis, kept } } : null;
  });
  await copyCompanions(model, out);
}

/**
 * Makes a checkpoint elastic where it lies: nested feed-forwards, no routers.
 * Errors: InvalidFileError for a bad checkpoint, FileSystemError from the disk.
 */
export async function writeNested(dir: string, spec: ModelSpec, nested: Nested, license?: string): Promise<void> {
  const policy = plainPolicy(spec, { nested });
  const base = { ...(await baseOf(dir, baseFiles(dir))), ...(license && { license }) };
  const levels = standardLevels(spec, policy, null, planLength);
  await writeElastic(dir, dir, { ...policy, levels, base }, new Map(), null);
}

/**
 * Gives a classifier exits: writes the checkpoint in `base` with these heads to `out`, an elastic directory as `writeElastic`
 * describes it. Of a base that is elastic already its nested feed-forwards stay, and levels that leave at no exit; earlier exits are replaced.
 *
 * @param exits in the order of their layers
 * @throws InvalidArgumentError for heads of other shapes or values that are not finite, InvalidDataError for what a reader would
 * refuse, such as a layer that the model lacks; InvalidFileError for a bad checkpoint, FileSystemError from the disk.
 */
export async function writeExits(out: string, base: string, exits: readonly ExitHead[]): Promise<void> {
  const spec = await readSpec(base);
  const classes = spec.encoder?.labels.length ?? 0;
  for (const { afterLayer, weight, bias } of exits) {
    const shapes: [string, Float32Array, number[]][] = [
      ['weight', weight, [classes, spec.hidden]],
      ['bias', bias, [classes]],
    ];
    for (const [name, data, shape] of shapes) {
      const numbers = shape.reduce((a, b) => a * b, 1);
      if (data.length === numbers && data.every(Number.isFinite)) continue;
      const what = `must be ${numbers} finite numbers, [${shape}], got ${data.length}`;
      throw new InvalidArgumentError(`[elastic] ${exitId(afterLayer)}.${name} ${what}`);
    }
  }
  const elastic = await readElastic(base);
  const old = elastic?.policy ?? {
    ...plainPolicy(spec, {}),
    base: await baseOf(base, baseFiles(base)),
  };
  const policy: ElasticPolicy = {
    ...old,
    exits: exits.map(({ afterLayer, rule, threshold }) => ({ afterLayer, rule, threshold })),
    levels: old.levels.filter(({ spec }) => spec.exit === undefined),
  };
  await checkReadable(base, policy);
  const heads = new Map<string, Router>(
    exits.map(({ afterLayer, weight, bias }) => [exitId(afterLayer), { weight, bias }]),
  );
  await writeElastic(out, base, policy, heads, null);
}

/** Modules, and their weights by the names of `seq2seqModuleSlots`. */
export interface TrainedModules {
  spec: Modules;
  weights: ReadonlyMap<string, Float32Array>;
  /** Feed-forwards of layers and modules run at any width; default not. */
  nested?: Nested;
  /** The directory that the base was made of by putting its units in order; default the base. */
  origin?: string;
  /** Corrections of the model's own layers, as the policy has them, and their matrices; default none. */
  lora?: { policy: NonNullable<ElasticPolicy['lora']>; matrices: Lora };
  /** Routers of the encoder's tokens, by the ids of `sourceRouters`: weight [hidden], bias [1]. */
  routing?: {
    capacity: { readonly attn?: Range; readonly mlp?: Range };
    routers: ReadonlyMap<string, { weight: Float32Array; bias: Float32Array }>;
  };
}

/**
 * Gives an encoder-decoder model modules: writes the checkpoint in `base` with them to `out`, an elastic directory as `writeElastic` describes it.
 * They are stored in the element type of the checkpoint's embedding. Modules and levels that `base` may have are not taken over.
 *
 * @param levels named assemblies, besides `full`
 * @throws InvalidArgumentError for weights that are missing, of other sizes or not finite, or a base that is no encoder-decoder model,
 * InvalidDataError for what a reader would refuse, such as spans that do not fit the stack or levels with gaps; InvalidFileError for a bad
 * checkpoint, FileSystemError from the disk.
 */
export async function writeModules(
  out: string,
  base: string,
  { spec: modules, weights, nested, lora, routing, origin }: TrainedModules,
  levels: readonly Level[] = [],
): Promise<void> {
  const { spec, seq2seq } = await readArchitecture(base);
  if (!seq2seq) {
    throw new InvalidArgumentError(
      `[elastic] modules are for encoder-decoder models, and ${base} is a ${spec.type} model`,
    );
  }
  const own = await baseOf(base, baseFiles(base));
  const made = origin === undefined || origin === base ? null : await baseOf(origin, baseFiles(origin));
  const ordered = nested && made ? { ...nested, permutedFrom: made.weightsSha256 } : nested;
  const plain = plainPolicy(spec, { ...(ordered && { nested: ordered }) });
  const policy: ElasticPolicy = {
    ...plain,
    ...{ modules, levels: [...plain.levels, ...levels] },
    ...(lora && { lora: lora.policy }),
    ...(routing && { sourceTokens: { layers: seq2seq.encoder.layers, capacity: routing.capacity } }),
    base: { ...(made ?? own), weightsSha256: own.weightsSha256 },
  };
  await checkReadable(base, policy);
  const slots = seq2seqModuleSlots(seq2seq, modules);
  const extra = [...weights.keys()].find((name) => !slots.some((slot) => slot.name === name));
  if (extra !== undefined) throw new InvalidArgumentError(`[elastic] ${extra} is a weight of no module`);
  using checkpoint = Checkpoint.open(base);
  using loaded = loadSeq2SeqWeights(seq2seq, checkpoint);
  const dtype = loaded.dtype as 'f32' | 'bf16' | 'f16';
  const tensors: Record<string, TensorData> = {};
  for (const { name, shape } of slots) {
    const values = weights.get(name);
    const numbers = shape.reduce((a, b) => a * b, 1);
    if (values?.length !== numbers || !values.every(Number.isFinite)) {
      const what = `must be ${numbers} finite numbers, [${shape}], got ${values?.length ?? 'none'}`;
      throw new InvalidArgumentError(`[elastic] ${name} ${what}`);
    }
    tensors[name] = { dtype, shape, data: rounded(values, dtype) };
  }
  for (const { name, id, matrix, shape } of lora ? seq2seqLoraParameters(lora.policy, seq2seq) : []) {
    const values = lora!.matrices.get(id)?.[matrix];
    const numbers = shape[0] * shape[1];
    if (values?.length === numbers && values.every(Number.isFinite)) continue;
    const what = `must be ${numbers} finite numbers, [${shape}], got ${values?.length ?? 'none'}`;
    throw new InvalidArgumentError(`[elastic] ${name} ${what}`);
  }
  for (const { id } of sourceRouters(policy)) {
    const { weight, bias } = routing!.routers.get(id) ?? {};
    const finite = [...(weight ?? []), ...(bias ?? [])].every(Number.isFinite);
    if (weight?.length === spec.hidden && bias?.length === 1 && finite) continue;
    throw new InvalidArgumentError(
      `[elastic] ${id} must have ${spec.hidden} finite weights and a bias, got ${weight?.length ?? 'none'} and ${bias?.length ?? 'none'}`,
    );
  }
  await writeElastic(out, base, policy, routing?.routers ?? new Map(), lora?.matrices ?? null, tensors);
}

/** What a policy says of its backbone: the checkpoint in `dir`. */
async function baseOf(dir: string, names: readonly string[]): Promise<ElasticPolicy['base']> {
  const sha256 = await hashFiles(
    dir,
    names.filter((name) => name.endsWith('.safetensors') || name === 'tokenizer.json'),
  );
  return {
    name: basename(resolve(dir)),
    ...(await provenanceOf(dir)),
    weightsSha256: weightsSha256(sha256),
    tokenizerSha256: sha256['tokenizer.json'] ?? null,
  };
}

function countParameters(model: string, spec: ModelSpec): number {
  using checkpoint = Checkpoint.open(model);
  // Every weight is there with its shape: a broken checkpoint should fail here, not in training.
  if (spec.encoder) loadEncoderWeights(spec as EncoderSpec, checkpoint).dispose();
  else loadWeights(spec, checkpoint).dispose();
  return checkpoint.names().reduce((sum, name) => sum + checkpoint.info(name).shape.reduce((a, b) => a * b, 1), 0);
}

async function replaceable(out: string, model: string): Promise<void> {
  if (!existsSync(out)) return;
  if ((await realpath(out)) === (await realpath(model))) {
    throw new InvalidArgumentError(`[elastify] out must be another directory than the model, got ${out}`);
  }
  const names = await inFileSystem('replace', out, () => readdir(out));
  if (names.length === 0) return;
  if (!names.includes(elasticConfigFile) || names.includes('checkpoints')) {
    throw new FileSystemError(`[elastify] ${out} exists and is not a plan; choose another directory or delete it`);
  }
}
