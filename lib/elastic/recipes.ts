// Recipes: what to make elastic in a model, their checks, and the policies they come to.
import { type ExpertGate, type ExpertRule, expertGates, expertRules } from '../graph/index.js';
import { type Place, type Projection, places, projections } from '../model/select.js';
import { InvalidArgumentError } from '../native/errors.js';
import { type ExpertAxis, type Granularity, granularities, sequenceAxis, type Target, targets } from './axes.js';
import { nestedOf, type UnitScores, unitScores } from './nested.js';
import {
  type AttentionKeys,
  attentionKeys,
  cutRule,
  type ElasticPolicy,
  type Experts,
  type GateMode,
  gateModes,
  type ModelSizes,
  nestedConflict,
  ownKeysRule,
  type Range,
  routingConflict,
  targetProblem,
  tileProblem,
} from './policy.js';

/** A capacity to train at, or a range to draw it from, uniformly for every step and sequence. */
export type TrainCapacity = number | Range;

/** ElastiFormer (arXiv 2411.15281): routing of tokens, and of experts that a sub-layer is cut into. */
export interface ElastiformerRecipe {
  kind: 'elastiformer';
  /** Places to route and the capacities to train at; default both places over [0.3, 1]. */
  tokens?: { attn?: TrainCapacity; mlp?: TrainCapacity };
  /** Which rows routed attention attends to; default 'all'. 'selected' saves more and loses more. */
  keys?: AttentionKeys;
  /**
   * Cuts the feed-forward into `count` blocks, of which every token uses a share; default not. `tile`: tokens of so many
   * consecutive positions, from 32, choose together, by the first of them; default every token by itself.
   */
  blocks?: { count: number; share?: TrainCapacity; gate?: ExpertGate; rule?: ExpertRule; tile?: number };
  /**
   * Makes experts of attention's heads, of which every token uses a share; default not. `group` 'gqa': heads that share keys
   * and values are one expert, the default where they do; 'head': every head is one. `keys` 'selected': a row has only the
   * keys and values of heads that it chose, default 'all'. `tile`: as of blocks.
   */
  heads?: {
    share?: TrainCapacity;
    gate?: ExpertGate;
    rule?: ExpertRule;
    group?: HeadGroup;
    keys?: AttentionKeys;
    tile?: number;
  };
  /**
   * Trains corrections of a rank for projections (default q and v) of all layers, or of some; every budget below full has
   * them. Default none.
   */
  lora?: LoraRecipe;
  /** Layers to route; 'even' leaves every second one dense (1, 3, 5, ... are routed). Default 'all'. */
  layers?: 'all' | 'even' | readonly number[];
  /** Default 'straight-through': exactly the teacher at full capacity. 'raw' is the paper's. */
  gate?: GateMode;
}

/** Corrections of projections (LoRA, arXiv 2106.09685) to train. */
export interface LoraRecipe {
  /** Columns of its factors, from 1. */
  rank: number;
  /** Projections that have one. */
  targets?: readonly Projection[];
  /** Default 'all'. */
  layers?: 'all' | readonly number[];
}

/** MatFormer (arXiv 2310.07707): feed-forwards that run at any width, a prefix of their units. */
export interface MatformerRecipe {
  kind: 'matformer';
  /** Shares of the units to train at, ascending up to 1. */
  granularities: readonly number[];
  /** Widths are multiples of so many units. Default: the largest power of two up to 64 that leaves eight widths. */
  alignment?: number;
  /** Default 'all'. */
  layers?: 'all' | 'even' | readonly number[];
  /**
   * Puts units in order before anything is trained, those first that matter most by the scores `activation` or `taylor`, measured
   * on a text; the model stays the same function. Default 'none'.
   */
  rank?: UnitScores;
  /** Trains corrections of a rank (default of gate, up and down) that every width below full has. Default none. */
  lora?: LoraRecipe;
}

/** Router-Tuning (arXiv 2410.13184): which sequences, or tokens, run which attentions, feed-forwards or whole blocks. */
export interface RouterTuningRecipe {
  kind: 'router-tuning';
  /** What is run or skipped; default 'attn'. */
  target?: Target;
  /**
   * What is decided about: a 'sequence' as a whole, by its first rows and for as long as it goes on (default), or every 'token'
   * by itself.
   */
  granularity?: Granularity;
  /** Layers to route: ids, 'all', or so many before the last one, which always runs. Default: half of the layers. */
  layers?: 'all' | number | readonly number[];
  /** Share of sequences, or tokens, to train for; default [0.3, 1]. */
  capacity?: TrainCapacity;
  /**
   * Of tokens, which rows attention attends to: with 'selected', the default, a token that skips it is no key there either and
   * has no place in the cache (D-LLM). Sequences that skip attention have no keys in any case.
   */
  keys?: AttentionKeys;
  /** Trains corrections of a rank with the routers; every budget below full has them. Default none. */
  lora?: LoraRecipe;
}

/** What to make elastic in a model, and how. Recipes in a list compose; one of each kind. */
export type Recipe = ElastiformerRecipe | MatformerRecipe | RouterTuningRecipe;

/** What an expert of attention is: one query head, or those that share a head of keys and values. */
export type HeadGroup = 'head' | 'gqa';
export const headGroups: readonly HeadGroup[] = ['head', 'gqa'];

const defaultRange: Range = [0.3, 1];

/** A policy without hashes of a checkpoint. */
export type PartialPolicy = Omit<ElasticPolicy, 'base'>;

export const fail: Fail = (message) => {
  throw new InvalidArgumentError(`[elastify] ${message}`);
};

/**
 * The policy of a recipe for a model, or of recipes of different kinds, without hashes of a checkpoint.
 * Errors: InvalidArgumentError for an unknown kind or key, a capacity outside (0, 1], a layer the model lacks, recipes that
 * do not go together.
 */
export function policyOf(recipe: Recipe | readonly Recipe[], spec: ModelSizes): PartialPolicy {
  const recipes = [recipe].flat() as Recipe[];
  for (const one of recipes) {
    if (typeof one !== 'object' || one === null) fail(`recipe must be an object, got ${String(one)}`);
  }
  const policies = recipes.map((one) => {
    if (recipes.filter(({ kind }) => kind === one.kind).length > 1) fail(`there are two recipes of kind '${one.kind}'`);
    if (one.kind === 'elastiformer') return elastiformerPolicy(one, spec);
    if (one.kind === 'matformer') return matformerPolicy(one, spec);
    if (one.kind === 'router-tuning') return routerTuningPolicy(one, spec);
    const { kind } = one as { kind?: unknown };
    return fail(`recipe.kind must be 'elastiformer', 'matformer' or 'router-tuning', got ${JSON.stringify(kind)}`);
  });
  if (policies.length === 0) fail('there is no recipe');
  if (policies.filter(({ lora }) => lora).length > 1) fail('lora must be in one recipe: it is of the whole model');
  const twice = targets.find((target) => policies.filter(({ tokens }) => tokens[target]).length > 1);
  if (twice) fail(`tokens of ${twice} are in two recipes`);
  const gate = policies.find(({ gate }) => gate !== 'straight-through')?.gate ?? 'straight-through';
  if (gate !== 'straight-through' && recipes.some(({ kind }) => kind === 'router-tuning'))
    fail(`router-tuning needs the gate 'straight-through' in all recipes, got '${gate}'`);
  const policy = Object.assign({}, ...policies, {
    gate,
    tokens: Object.assign({}, ...policies.map(({ tokens }) => tokens)),
    ...(policies.some(({ sequences }) => sequences) && {
      sequences: Object.assign({}, ...policies.map(({ sequences }) => sequences)),
    }),
    capacity: Object.assign({}, ...policies.map(({ capacity }) => capacity)),
  }) as PartialPolicy;
  const conflict = nestedConflict(policy);
  if (conflict) fail(`matformer must be in ${conflict}`);
  const routing = routingConflict(policy);
  if (routing) fail(routing);
  return policy;
}

function matformerPolicy(
  { kind: _, granularities, alignment, layers = 'all', rank = 'none', lora, ...rest }: MatformerRecipe,
  spec: ModelSizes,
): PartialPolicy {
  for (const key of Object.keys(rest))
    fail(`unknown recipe key '${key}'; matformer takes granularities, alignment, layers, rank, lora`);
  if (!unitScores.includes(rank)) fail(`rank must be one of ${unitScores.join(', ')}, got ${JSON.stringify(rank)}`);
  const own = layersOf(layers, spec.layers, fail);
  const targets = spec.gated ? (['gate', 'up', 'down'] as const) : (['up', 'down'] as const);
  const nested = nestedOf({ granularities, alignment, layers: own, scores: rank }, spec.ffn, fail);
  return { ...plainPolicy(spec, { nested }), ...(lora && { lora: loraOf({ targets, ...lora }, spec, fail) }) };
}

/** A policy without routers. */
export const plainPolicy = (
  { hidden, layers }: Pick<ModelSizes, 'hidden' | 'layers'>,
  parts: Pick<PartialPolicy, 'nested' | 'exits'>,
): PartialPolicy => ({
  ...{ version: 1, hidden, layers, gate: 'straight-through', tokens: {}, ...parts, capacity: {} },
  ...{ calibration: null, levels: [{ name: 'full', spec: {} }] },
});

function routerTuningPolicy(recipe: RouterTuningRecipe, spec: ModelSizes): PartialPolicy {
  const {
    kind: _,
    target = 'attn',
    granularity = 'sequence',
    layers,
    capacity = defaultRange,
    keys,
    ...others
  } = recipe;
  const { lora, ...rest } = others;
  for (const key of Object.keys(rest)) {
    fail(`unknown recipe key '${key}'; router-tuning takes target, granularity, layers, capacity, keys, lora`);
  }
  if (!targets.includes(target)) fail(`target must be one of ${targets.join(', ')}, got ${JSON.stringify(target)}`);
  if (!granularities.includes(granularity)) {
    fail(`granularity must be one of ${granularities.join(', ')}, got ${JSON.stringify(granularity)}`);
  }
  if (keys !== undefined && !attentionKeys.includes(keys))
    fail(`keys must be one of ${attentionKeys.join(', ')}, got ${JSON.stringify(keys)}`);
  if (keys !== undefined && (granularity === 'sequence' || target === 'mlp'))
    fail('keys is for tokens of attn and block: a sequence that skips attention has none');
  const routed = { layers: beforeLast(layers ?? Math.floor(spec.layers / 2), spec.layers) };
  const ofTokens = target === 'mlp' ? { mlp: routed } : { [target]: { ...routed, keys: keys ?? 'selected' } };
  const axis = granularity === 'sequence' ? sequenceAxis(target) : target;
  return {
    ...{ version: 1, hidden: spec.hidden, layers: spec.layers, gate: 'straight-through' },
    ...(granularity === 'sequence' ? { tokens: {}, sequences: { [target]: routed } } : { tokens: ofTokens }),
    ...(lora && { lora: loraOf(lora, spec, fail) }),
    ...{ capacity: { [axis]: rangeOf('capacity', capacity) }, calibration: null, levels: [{ name: 'full', spec: {} }] },
  };
}

/** Layers by their ids, or so many before the last one. */
function beforeLast(which: NonNullable<RouterTuningRecipe['layers']>, count: number): number[] {
  if (typeof which !== 'number') return layersOf(which, count, fail);
  if (!Number.isInteger(which) || which < 1 || which >= count) {
    fail(`layers must be a number from 1 to ${count - 1}, of those before the last, 'all' or ids, got ${which}`);
  }
  return Array.from({ length: which }, (_, i) => count - 1 - which + i);
}

/** From low to high, whether or not it ascends; null for what is no capacity to train at. */
export function capacityRange(value: unknown): Range | null {
  const range = typeof value === 'number' ? [value, value] : value;
  const good =
    Array.isArray(range) && range.length === 2 && range.every((c) => typeof c === 'number' && c > 0 && c <= 1);
  return good ? [range[0], range[1]] : null;
}

function rangeOf(key: string, value: TrainCapacity): Range {
  const range = capacityRange(value) ?? fail(`${key}: capacity must be in (0, 1], got ${JSON.stringify(value)}`);
  if (range[0] > range[1]) fail(`${key}: the capacity range must ascend, got ${JSON.stringify(value)}`);
  return [range[0], range[1]];
}

function elastiformerPolicy(recipe: ElastiformerRecipe, spec: ModelSizes): PartialPolicy {
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
  { count, gate, rule, tile, share: _, ...rest }: NonNullable<ElastiformerRecipe['blocks']>,
  layers: readonly number[],
  spec: ModelSizes,
  fail: Fail,
): Experts {
  for (const key of Object.keys(rest)) fail(`unknown key 'blocks.${key}'; blocks takes count, share, gate, rule, tile`);
  const [accepts, counts] = cutRule('blocks', spec);
  if (!accepts(count)) fail(`blocks.count must be ${counts}, got ${JSON.stringify(count)}`);
  return { layers, count, ...choiceOf('blocks', { gate, rule, tile }, fail) };
}

/** Corrections of a recipe as a policy has them. */
export function loraOf(
  { rank, targets = ['q', 'v'], layers = 'all', ...rest }: LoraRecipe,
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
  { gate, rule, tile, share: _, group, keys = 'all', ...rest }: NonNullable<ElastiformerRecipe['heads']>,
  layers: readonly number[],
  spec: ModelSizes,
  fail: Fail,
): Experts {
  for (const key of Object.keys(rest))
    fail(`unknown key 'heads.${key}'; heads takes share, gate, rule, group, keys, tile`);
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
  return { layers, count, ...choiceOf('heads', { gate, rule, tile }, fail), keys };
}

function choiceOf(
  axis: ExpertAxis,
  { gate = 'straight-through', rule = 'top-k', tile }: Partial<Pick<Experts, 'gate' | 'rule' | 'tile'>>,
  fail: Fail,
): Pick<Experts, 'gate' | 'rule' | 'tile'> {
  if (!expertGates.includes(gate)) {
    fail(`${axis}.gate must be one of ${expertGates.join(', ')}, got ${JSON.stringify(gate)}`);
  }
  if (!expertRules.includes(rule)) {
    fail(`${axis}.rule must be one of ${expertRules.join(', ')}, got ${JSON.stringify(rule)}`);
  }
  const bad = tile === undefined ? null : tileProblem(tile);
  if (bad) fail(`${axis}.tile must be ${bad}, got ${JSON.stringify(tile)}`);
  return { gate, rule, ...(tile !== undefined && { tile }) };
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
