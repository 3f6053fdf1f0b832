// Makes a pretrained model elastic: attaches untrained routers by a recipe and writes the plan that distillation trains.
import { randomBytes } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, readdir, realpath, rename, rm, rmdir } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { type ExpertGate, type ExpertRule, expertGates, expertRules } from '../graph/index.js';
import { FileSystemError, inFileSystem, readJson } from '../io/files.js';
import { Checkpoint } from '../io/safetensors.js';
import { type Place, type Projection, places, projections } from '../model/select.js';
import { type ModelSpec, specFromConfig } from '../model/spec.js';
import { loadWeights } from '../model/weights.js';
import { InvalidArgumentError } from '../native/errors.js';
import type { ExpertAxis } from './axes.js';
import { loraParameters } from './lora.js';
import {
  type AttentionKeys,
  attentionKeys,
  cutRule,
  type ElasticPolicy,
  type Experts,
  type GateMode,
  gateModes,
  type ModelSizes,
  ownKeysRule,
  type Range,
  type Router,
  type Routing,
  routerParameters,
  routerPlaces,
  targetProblem,
} from './policy.js';
import { provenanceOf } from './provenance.js';
import { baseFiles, elasticConfigFile, hashFiles, weightsSha256, writeElastic } from './store.js';

/** A capacity to train at, or a range to draw it from, uniformly for every step and sequence. */
export type TrainCapacity = number | Range;

/** ElastiFormer (arXiv 2411.15281): routing of tokens, and of experts that a sub-layer is cut into. */
export interface ElastiformerRecipe {
  kind: 'elastiformer';
  /** Places to route and the capacities to train at; default both places over [0.3, 1]. */
  tokens?: { attn?: TrainCapacity; mlp?: TrainCapacity };
  /** Which rows routed attention attends to; default 'all'. 'selected' saves more and loses more. */
  keys?: AttentionKeys;
  /** Cuts the feed-forward into `count` blocks, of which every token uses a share; default not. */
  blocks?: { count: number; share?: TrainCapacity; gate?: ExpertGate; rule?: ExpertRule };
  /**
   * Makes experts of attention's heads, of which every token uses a share; default not. `group` 'gqa': heads that share keys
   * and values are one expert, the default where they do; 'head': every head is one. `keys` 'selected': a row has only the
   * keys and values of heads that it chose, default 'all'.
   */
  heads?: { share?: TrainCapacity; gate?: ExpertGate; rule?: ExpertRule; group?: HeadGroup; keys?: AttentionKeys };
  /**
   * Trains corrections of a rank for projections (default q and v) of all layers, or of some; every budget below full has
   * them. Default none.
   */
  lora?: { rank: number; targets?: readonly Projection[]; layers?: 'all' | readonly number[] };
  /** Layers to route; 'even' leaves every second one dense (1, 3, 5, ... are routed). Default 'all'. */
  layers?: 'all' | 'even' | readonly number[];
  /** Default 'straight-through': exactly the teacher at full capacity. 'raw' is the paper's. */
  gate?: GateMode;
}
export type Recipe = ElastiformerRecipe;

export type HeadGroup = 'head' | 'gqa';
export const headGroups: readonly HeadGroup[] = ['head', 'gqa'];

export interface ElasticPlan {
  dir: string;
  trainableParameters: number;
  /** Trainable parameters over the parameters of the backbone. */
  trainableShare: number;
  warnings: readonly string[];
}

const defaultRange: Range = [0.3, 1];

/**
 * The policy of a recipe for a model, without hashes of a checkpoint.
 * Errors: InvalidArgumentError for an unknown kind or key, a capacity outside (0, 1], a layer the model lacks.
 */
export function policyOf(recipe: Recipe, spec: ModelSizes): Omit<ElasticPolicy, 'base'> {
  const fail: Fail = (message) => {
    throw new InvalidArgumentError(`[elastify] ${message}`);
  };
  if (typeof recipe !== 'object' || recipe === null) fail(`recipe must be an object, got ${String(recipe)}`);
  if (recipe.kind !== 'elastiformer') {
    fail(`recipe.kind must be 'elastiformer', got ${JSON.stringify((recipe as { kind?: unknown }).kind)}`);
  }
  const {
    kind: _,
    tokens: given,
    blocks: cut,
    heads: divided,
    lora: corrections,
    layers: which = 'all',
    ...others
  } = recipe;
  const { gate = 'straight-through', keys = 'all', ...rest } = others;
  for (const key of Object.keys(rest))
    fail(`unknown recipe key '${key}'; elastiformer takes tokens, heads, blocks, lora, keys, layers, gate`);
  for (const [key, group] of Object.entries({ tokens: given, heads: divided, blocks: cut, lora: corrections })) {
    if (group !== undefined && (typeof group !== 'object' || group === null || Array.isArray(group)))
      fail(`${key} must be an object, got ${JSON.stringify(group)}`);
  }
  if (!gateModes.includes(gate)) fail(`gate must be one of ${gateModes.join(', ')}, got ${JSON.stringify(gate)}`);
  if (!attentionKeys.includes(keys))
    fail(`keys must be one of ${attentionKeys.join(', ')}, got ${JSON.stringify(keys)}`);
  const layers = layersOf(which, spec.layers, fail);

  const everything: Partial<Record<Place, TrainCapacity>> =
    cut || divided ? {} : { attn: defaultRange, mlp: defaultRange };
  const chosen = given ?? everything;
  for (const key of Object.keys(chosen)) {
    if (!places.includes(key as Place)) fail(`unknown place '${key}' in recipe.tokens; it takes ${places.join(', ')}`);
  }
  const tokens: ElasticPolicy['tokens'] = {};
  const capacity: ElasticPolicy['capacity'] = {};
  const rangeOf = (key: string, value: TrainCapacity): Range => {
    const range: Range = typeof value === 'number' ? [value, value] : value;
    const good =
      Array.isArray(range) && range.length === 2 && range.every((c) => typeof c === 'number' && c > 0 && c <= 1);
    if (!good) fail(`${key}: capacity must be in (0, 1], got ${JSON.stringify(value)}`);
    if (range[0] > range[1]) fail(`${key}: the capacity range must ascend, got ${JSON.stringify(value)}`);
    return [range[0], range[1]];
  };
  for (const place of places) {
    const value = chosen[place];
    if (value === undefined) continue;
    if (place === 'attn') tokens.attn = { layers, keys };
    else tokens.mlp = { layers };
    capacity[place] = rangeOf(`tokens.${place}`, value);
  }
  const heads = divided && headsOf(divided, layers, spec, fail);
  if (divided) capacity.heads = rangeOf('heads.share', divided.share ?? defaultRange);
  const blocks = cut && blocksOf(cut, layers, spec, fail);
  if (cut) capacity.blocks = rangeOf('blocks.share', cut.share ?? defaultRange);
  if (heads?.keys === 'selected' && tokens.attn?.keys === 'all') {
    fail("heads.keys 'selected' leaves tokens that do not enter attention without keys: keys must be 'selected' too");
  }
  if (!tokens.attn && !tokens.mlp && !heads && !blocks) {
    fail('the recipe must route tokens of attn, mlp or both, or heads or blocks');
  }
  const lora = corrections && loraOf(corrections, spec, fail);
  return {
    version: 1,
    hidden: spec.hidden,
    layers: spec.layers,
    gate,
    tokens,
    ...(heads && { heads }),
    ...(blocks && { blocks }),
    ...(lora && { lora }),
    capacity,
    calibration: null,
    levels: [{ name: 'full', spec: {} }],
  };
}

type Fail = (message: string) => never;

function blocksOf(
  { count, gate, rule, share: _, ...rest }: NonNullable<ElastiformerRecipe['blocks']>,
  layers: readonly number[],
  spec: ModelSizes,
  fail: Fail,
): Experts {
  for (const key of Object.keys(rest)) fail(`unknown key 'blocks.${key}'; blocks takes count, share, gate, rule`);
  const [accepts, counts] = cutRule('blocks', spec);
  if (!accepts(count)) fail(`blocks.count must be ${counts}, got ${JSON.stringify(count)}`);
  return { layers, count, ...choiceOf('blocks', gate, rule, fail) };
}

function loraOf(
  { rank, targets = ['q', 'v'], layers = 'all', ...rest }: NonNullable<ElastiformerRecipe['lora']>,
  spec: ModelSizes,
  fail: Fail,
): NonNullable<ElasticPolicy['lora']> {
  for (const key of Object.keys(rest)) fail(`unknown key 'lora.${key}'; lora takes rank, targets, layers`);
  if (!Number.isInteger(rank) || rank < 1) fail(`lora.rank must be a positive integer, got ${JSON.stringify(rank)}`);
  const sorted = Array.isArray(targets)
    ? [...new Set(targets)].sort((a, b) => projections.indexOf(a) - projections.indexOf(b))
    : targets;
  const problem = targetProblem(sorted, spec);
  if (problem) fail(`lora.targets must be ${problem}, got ${JSON.stringify(targets)}`);
  return { rank, targets: sorted, layers: layersOf(layers, spec.layers, fail) };
}

function headsOf(
  { gate, rule, share: _, group, keys = 'all', ...rest }: NonNullable<ElastiformerRecipe['heads']>,
  layers: readonly number[],
  spec: ModelSizes,
  fail: Fail,
): Experts {
  for (const key of Object.keys(rest)) fail(`unknown key 'heads.${key}'; heads takes share, gate, rule, group, keys`);
  if (group !== undefined && !headGroups.includes(group)) {
    fail(`heads.group must be one of ${headGroups.join(', ')}, got ${JSON.stringify(group)}`);
  }
  if (!attentionKeys.includes(keys)) {
    fail(`heads.keys must be one of ${attentionKeys.join(', ')}, got ${JSON.stringify(keys)}`);
  }
  const grouped = group ? group === 'gqa' : spec.kvHeads > 1;
  const count = grouped ? spec.kvHeads : spec.heads;
  if (!cutRule('heads', spec)[0](count)) {
    fail(
      `heads.group ${grouped ? "'gqa'" : "'head'"} makes ${count} expert of attention, and there must be at least 2`,
    );
  }
  const bad = keys === 'selected' ? ownKeysRule(count, spec.kvHeads) : null;
  if (bad) fail(`heads.keys must be ${bad}`);
  return { layers, count, ...choiceOf('heads', gate, rule, fail), keys };
}

function choiceOf(
  axis: ExpertAxis,
  gate: ExpertGate = 'straight-through',
  rule: ExpertRule = 'top-k',
  fail: Fail,
): Pick<Experts, 'gate' | 'rule'> {
  if (!expertGates.includes(gate)) {
    fail(`${axis}.gate must be one of ${expertGates.join(', ')}, got ${JSON.stringify(gate)}`);
  }
  if (!expertRules.includes(rule)) {
    fail(`${axis}.rule must be one of ${expertRules.join(', ')}, got ${JSON.stringify(rule)}`);
  }
  return { gate, rule };
}

function layersOf(which: 'all' | 'even' | readonly number[], count: number, fail: Fail): number[] {
  const all = Array.from({ length: count }, (_, i) => i);
  if (which === 'all') return all;
  // The first layer stays dense: every token's embedding is processed at least once.
  if (which === 'even') return count === 1 ? all : all.filter((i) => i % 2 === 1);
  if (!Array.isArray(which) || which.length === 0)
    fail(`layers must be 'all', 'even' or a list, got ${JSON.stringify(which)}`);
  const sorted = [...new Set(which as readonly number[])].sort((a, b) => a - b);
  for (const layer of sorted) {
    if (!Number.isInteger(layer) || layer < 0 || layer >= count) {
      fail(`layers must be ids from 0 to ${count - 1}, got ${JSON.stringify(layer)}`);
    }
  }
  return sorted;
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

/**
 * Writes a plan: the checkpoint of `model` unchanged, zero routers, and the policy of the recipe. The directory appears
 * complete or not at all; an earlier plan there is replaced, anything else is left alone with an error.
 * Errors: InvalidArgumentError for a bad recipe, InvalidFileError for a bad checkpoint, FileSystemError from the disk.
 */
export async function elastify(model: string, recipe: Recipe, { out }: { out: string }): Promise<ElasticPlan> {
  const names = baseFiles(model);
  const spec = specFromConfig(await readJson(join(model, 'config.json')), join(model, 'config.json'));
  const partial = policyOf(recipe, spec);
  const backbone = countParameters(model, spec);
  const sha256 = await hashFiles(
    model,
    names.filter((name) => name.endsWith('.safetensors') || name === 'tokenizer.json'),
  );
  const policy: ElasticPolicy = {
    ...partial,
    base: {
      name: basename(resolve(model)),
      ...(await provenanceOf(model)),
      weightsSha256: weightsSha256(sha256),
      tokenizerSha256: sha256['tokenizer.json'] ?? null,
    },
  };
  await replaceable(out, model);
  await inFileSystem('create', dirname(resolve(out)), () => mkdir(dirname(resolve(out)), { recursive: true }));
  const temporary = `${resolve(out)}.partial-${randomBytes(4).toString('hex')}`;
  try {
    await writeElastic(temporary, model, policy, zeroRouters(policy), null);
    await moveInto(temporary, out);
  } finally {
    await rm(temporary, { recursive: true, force: true });
  }
  const corrections = loraParameters(policy, spec).reduce((sum, { shape }) => sum + shape[0] * shape[1], 0);
  const trainableParameters = routerParameters(policy) + corrections;
  const warnings = sha256['tokenizer.json'] ? [] : [`${model} has no tokenizer.json: text cannot be encoded with it`];
  return { dir: out, trainableParameters, trainableShare: trainableParameters / backbone, warnings };
}

function countParameters(model: string, spec: ModelSpec): number {
  using checkpoint = Checkpoint.open(model);
  // Every weight is there with its shape: a broken checkpoint should fail here, not in training.
  loadWeights(spec, checkpoint).dispose();
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

async function moveInto(temporary: string, out: string): Promise<void> {
  const aside = `${temporary}.old`;
  try {
    if (existsSync(out)) {
      // An empty directory needs no detour.
      await rmdir(out).catch(() => rename(out, aside));
    }
    await rename(temporary, out);
  } catch (cause) {
    if (existsSync(aside) && !existsSync(out)) await rename(aside, out);
    throw new FileSystemError(
      `[elastify] cannot write ${out}: ${(cause as Error).message}; another process may be writing it`,
      cause,
    );
  } finally {
    await rm(aside, { recursive: true, force: true });
  }
}
