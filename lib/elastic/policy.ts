// What is elastic in a model: which sub-layers are routed, by which gates, how capacities map to thresholds, named levels.

import { type ExpertGate, type ExpertRule, expertGates, expertRules } from '../graph/index.js';
import { type Place, type Projection, places, projections } from '../model/select.js';
import type { ModelSpec } from '../model/spec.js';
import { InvalidDataError } from '../native/errors.js';
import {
  type Axis,
  axes,
  axisTraits,
  type Capacity,
  capacityRule,
  type ElasticSpec,
  type ExpertAxis,
  expertAxes,
  expertsUsed,
  isCapacity,
  isExperts,
  meanCapacity,
  routerId,
  specKeys,
  specOfAxes,
} from './axes.js';
import type { Provenance } from './provenance.js';
import { type Json, Reader } from './reader.js';

/** How a selected row's sub-layer output is scaled; see docs/ops.md, op `gate`. */
export type GateMode = 'straight-through' | 'raw' | 'two-sigma';
export const gateModes: readonly GateMode[] = ['straight-through', 'raw', 'two-sigma'];

/**
 * Which rows routed attention attends to: `all` rows of the sequence have keys and values and routing saves queries, scores
 * and output; with `selected` a row left out is no key either.
 */
export type AttentionKeys = 'all' | 'selected';
export const attentionKeys: readonly AttentionKeys[] = ['all', 'selected'];

/** The metric that `minQuality` is about: the share of positions whose most likely next token is the full model's. */
export const qualityMetric = 'top1_agreement';

export interface QualityValue {
  value: number;
  lo: number;
  hi: number;
  n: number;
}

/** A named operating point. `flopsRatio` is analytic, at the calibration's sequence length; `quality` is measured. */
export interface Level {
  name: string;
  spec: ElasticSpec;
  flopsRatio?: number;
  quality?: Record<string, QualityValue>;
}

/**
 * What was measured after training: how compute is best taken away, and the logits that routers then give.
 *
 * `path` holds capacities of all routers in the order of execution; it starts at all 1 and every step lowers one router,
 * the one whose tokens cost the least divergence per FLOP saved. Budgets lie on it.
 *
 * `quantiles.get(id)` is [capacities.length, points], row-major, ascending within a row: the quantiles of a router's
 * logits while the model ran on the path at each mean capacity of `capacities`, since the logits a router sees depend on
 * what the routers before it dropped. Point j is the j/(points-1) quantile.
 *
 * Of routers of experts by mass they are quantiles of the mass that a token's better experts have before each: the share c of
 * all experts is used at a mass that is the c quantile.
 */
export interface Calibration {
  path: readonly (readonly number[])[];
  /** Mean capacities, ascending. */
  capacities: readonly number[];
  points: number;
  /** Tokens measured at each capacity. */
  tokens: number;
  /** Length of the sequences measured, in tokens: budgets are solved for it unless a caller names another. */
  sequenceLength: number;
  quantiles: ReadonlyMap<string, Float32Array>;
}

export type Range = readonly [low: number, high: number];

/** Layers cut into `count` experts, of which every token uses some. */
export interface Experts {
  layers: readonly number[];
  count: number;
  gate: ExpertGate;
  /**
   * How a token's share becomes experts where the model is used: `top-k`, so many of them; `mass`, as many as its scores take
   * to reach a mass of which tokens use the share on the mean. Routers are trained by top-k.
   */
  rule: ExpertRule;
  /**
   * Of heads, whose keys and values a row that enters has: default `all`; with `selected` only those of the heads that it
   * chose.
   */
  keys?: AttentionKeys;
}

/** Into how many experts a sub-layer can be cut, and the rule in words. */
export function cutRule(axis: ExpertAxis, { heads, kvHeads, ffn }: ModelSizes): [(count: number) => boolean, string] {
  if (axis === 'blocks') {
    const divides = (count: number) => Number.isInteger(count) && count >= 2 && ffn % count === 0;
    return [divides, `an integer from 2 that divides the feed-forward's width ${ffn}`];
  }
  const counts = [...new Set([heads, kvHeads])].filter((count) => count >= 2);
  const words = counts.length > 0 ? `${counts.join(' or ')}, the model's heads` : 'absent: the model has one head';
  return [(count) => counts.includes(count), words];
}
export type ModelSizes = Pick<ModelSpec, 'layers' | 'hidden' | 'ffn' | 'gated' | 'heads' | 'kvHeads'>;

/** Heads have keys of their own only where no other expert shares them. */
export const ownKeysRule = (count: number, kvHeads: number): string | null =>
  count === kvHeads ? null : `'all' where heads share keys: ${count} experts share ${kvHeads}`;

export interface ElasticPolicy {
  version: 1;
  /** The unchanged backbone this policy belongs to. */
  base: { name: string; weightsSha256: string; tokenizerSha256: string | null } & Provenance;
  /** Of the backbone: routers are [1, hidden]. */
  hidden: number;
  layers: number;
  gate: GateMode;
  /** Routed layers of each place, ascending. */
  tokens: { attn?: { layers: readonly number[]; keys: AttentionKeys }; mlp?: { layers: readonly number[] } };
  /** Layers of whose attention heads, or groups of heads that share keys and values, are experts. */
  heads?: Experts;
  /** Layers whose feed-forward is cut into blocks of equal width. */
  blocks?: Experts;
  /** Corrections of projections by matrices of a rank, which every budget below full has. */
  lora?: { rank: number; targets: readonly Projection[]; layers: readonly number[] };
  /** Mean capacities each axis is trained at: drawn uniformly per sequence; equal ends mean one fixed capacity. */
  capacity: Partial<Record<Axis, Range>>;
  /** Null until trained: a budget below full needs it. */
  calibration: Calibration | null;
  levels: readonly Level[];
}

export interface Router {
  /** [outputs, hidden] */
  weight: Float32Array;
  /** [outputs] */
  bias: Float32Array;
}

/** A router. They are always listed in the order of execution: layer by layer, within one as `axes` are. */
export interface RouterPlace {
  id: string;
  layer: number;
  axis: Axis;
  /** Of whose sub-layer it decides. */
  place: Place;
  /** Scores it gives a token: one, or one for every expert. */
  outputs: number;
}

/** What is routed in a policy. */
export type Routing = Pick<ElasticPolicy, 'tokens' | ExpertAxis | 'layers'>;

/** The layers routed on an axis, ascending. */
export function routedLayers(policy: Omit<Routing, 'layers'>, axis: Axis): readonly number[] {
  return (isExperts(axis) ? policy[axis] : policy.tokens[axis])?.layers ?? [];
}

/** Every router of a policy, in the order of execution. */
export function routerPlaces(policy: Routing): RouterPlace[] {
  return Array.from({ length: policy.layers }, (_, layer) =>
    axes
      .filter((axis) => routedLayers(policy, axis).includes(layer))
      .map((axis) => ({
        id: routerId(layer, axis),
        layer,
        axis,
        place: axisTraits[axis].place,
        outputs: isExperts(axis) ? policy[axis]!.count : 1,
      })),
  ).flat();
}

/** Weights and biases of all routers. */
export function routerParameters(policy: Routing & Pick<ElasticPolicy, 'hidden'>): number {
  return routerPlaces(policy).reduce((sum, { outputs }) => sum + outputs * (policy.hidden + 1), 0);
}

/** The share of experts that tokens use on the mean when a share is asked for: whole ones, at least one. */
export const usedShare = ({ count, rule }: Experts, share: number): number =>
  rule === 'mass' ? Math.max(share, 1 / count) : expertsUsed(share, count) / count;

/** Whether routers of an axis have calibrated quantiles; the others need none. */
export const hasQuantiles = (policy: Routing, axis: Axis): boolean => !isExperts(axis) || policy[axis]!.rule === 'mass';

/** Smaller than the mass of a token's best expert. */
const leastMass = 1e-6;

/** One capacity per router, in the order of execution, from shares per axis; absent axes are full. */
export function routerCapacities(policy: Routing, shares: Partial<Record<Axis, Capacity>>): number[] {
  return routerPlaces(policy).map(({ layer, axis }) => {
    const share = shares[axis] ?? 1;
    return typeof share === 'number' ? share : share[routedLayers(policy, axis).indexOf(layer)];
  });
}

/**
 * What decides at each router so that it passes about its capacity: the logit threshold of tokens, the share of experts;
 * minus infinity for full ones, infinity for 0. Quantiles are interpolated linearly between points and between calibrated
 * capacities.
 *
 * @param capacities one per router, in the order of execution
 */
export function thresholds(
  policy: Routing,
  calibration: Calibration,
  capacities: readonly number[],
): Map<string, number> {
  // What dropped rows upstream is the mean capacity over routed sub-layers.
  const mean = meanCapacity(capacities);
  const routers = routerPlaces(policy);
  const name = ({ layer, place }: RouterPlace) => `${layer} ${place}`;
  // Where no token enters or no expert is used the sub-layer does not run, and neither does its other router.
  const absent = new Set(routers.filter((_, i) => capacities[i] <= 0).map(name));
  return new Map(
    routers.map((router, i) => {
      const { id, axis } = router;
      const c = capacities[i];
      if (absent.has(name(router))) return [id, Number.POSITIVE_INFINITY];
      if (c >= 1) return [id, Number.NEGATIVE_INFINITY];
      if (isExperts(axis) && policy[axis]!.rule === 'top-k') return [id, c];
      // Of no mass a token would use no expert, and it uses at least one.
      if (isExperts(axis)) return [id, Math.max(quantile(calibration, id, mean, c), leastMass)];
      // A router that scores all tokens alike cannot choose: all pass.
      const table = calibration.quantiles.get(id)!;
      if (Math.max(...table) === Math.min(...table)) return [id, Number.NEGATIVE_INFINITY];
      return [id, quantile(calibration, id, mean, 1 - c)];
    }),
  );
}

function quantile(calibration: Calibration, id: string, context: number, q: number): number {
  const { capacities, points } = calibration;
  const table = calibration.quantiles.get(id)!;
  const at = (row: number): number => {
    const x = q * (points - 1);
    const i = Math.min(Math.floor(x), points - 2);
    const a = table[row * points + i];
    const b = table[row * points + i + 1];
    return a + (b - a) * (x - i);
  };
  // capacities ascend
  if (context <= capacities[0]) return at(0);
  for (let i = 1; i < capacities.length; i++) {
    if (context <= capacities[i]) {
      const t = (context - capacities[i - 1]) / (capacities[i] - capacities[i - 1]);
      return at(i - 1) * (1 - t) + at(i) * t;
    }
  }
  return at(capacities.length - 1);
}

// ---- elastic_config.json ----

/** How tokens are chosen while training and afterwards. */
const tokenRules = { train: 'top-k', decode: 'threshold' } as const;

/** The content of elastic_config.json, version 1. */
export function policyToJson(policy: ElasticPolicy): Json {
  const tokens: Json = {};
  for (const place of places) {
    const routed = policy.tokens[place];
    if (!routed) continue;
    tokens[place] = {
      layers: routed.layers,
      ...('keys' in routed ? { keys: routed.keys } : {}),
      ...tokenRules,
      train_capacity: policy.capacity[place],
    };
  }
  const { calibration, lora } = policy;
  return {
    elastic_version: 1,
    base: {
      name_or_path: policy.base.name,
      ...(policy.base.revision && { revision: policy.base.revision }),
      ...(policy.base.license && { license: policy.base.license }),
      weights_sha256: policy.base.weightsSha256,
      tokenizer_sha256: policy.base.tokenizerSha256,
    },
    gate: policy.gate,
    tokens,
    ...Object.fromEntries(
      expertAxes.flatMap((axis) => {
        const experts = policy[axis];
        if (!experts) return [];
        return [[axis, { ...experts, train_share: policy.capacity[axis] }]];
      }),
    ),
    ...(lora && { lora: { rank: lora.rank, targets: lora.targets, layers: lora.layers } }),
    routers: routerPlaces(policy).map(({ id, axis, outputs }) => ({
      id,
      kind: axisTraits[axis].router,
      act: axisTraits[axis].act,
      in: policy.hidden,
      hidden: 0,
      out: outputs,
      tensors: [`${id}.weight`, `${id}.bias`],
    })),
    calibration: calibration && {
      path: calibration.path,
      capacities: calibration.capacities,
      points: calibration.points,
      tokens: calibration.tokens,
      sequence_length: calibration.sequenceLength,
    },
    levels: policy.levels.map((level) => ({
      name: level.name,
      spec: level.spec,
      ...(level.flopsRatio === undefined ? {} : { flops_ratio: level.flopsRatio }),
      ...(level.quality === undefined ? {} : { quality: level.quality }),
    })),
  };
}

/**
 * Reads and checks the content of elastic_config.json. Calibration quantiles live in the routers' file, so the
 * calibration comes back with an empty `quantiles`.
 * `warnings` receives one line per unknown key. Errors: InvalidDataError naming the file and the key.
 */
export function policyFromJson(json: unknown, file: string, model: ModelSizes, warnings: string[]): ElasticPolicy {
  const read = new Reader(file, warnings);
  const root = read.object(json, '');
  const version = root.elastic_version;
  if (version !== 1) {
    throw new InvalidDataError(
      `[elastic] ${file}: elastic_version must be 1, got ${JSON.stringify(version)}; it was written by a newer elastiform`,
    );
  }
  read.known(root, '', [
    'elastic_version',
    'base',
    'gate',
    'tokens',
    ...expertAxes,
    'lora',
    'routers',
    'calibration',
    'levels',
  ]);

  const base = read.object(root.base, 'base');
  read.known(base, 'base.', ['name_or_path', 'revision', 'license', 'weights_sha256', 'tokenizer_sha256']);

  const gate = root.gate as GateMode;
  if (!gateModes.includes(gate)) read.fail('gate', `one of ${gateModes.join(', ')}`, gate);

  const tokens: ElasticPolicy['tokens'] = {};
  const capacity: ElasticPolicy['capacity'] = {};
  const layersAt = (entry: Json, key: string): number[] => {
    const layers = read.numbers(entry.layers, `${key}.layers`);
    layers.forEach((layer, i) => {
      const ascending = i === 0 || layer > layers[i - 1];
      if (!Number.isInteger(layer) || layer < 0 || layer >= model.layers || !ascending) {
        read.fail(`${key}.layers`, `ascending layer ids below ${model.layers}`, layers);
      }
    });
    if (layers.length === 0) read.fail(`${key}.layers`, 'at least one layer', layers);
    return layers;
  };
  const rangeAt = (value: unknown, key: string): Range => {
    const range = read.numbers(value, key);
    if (range.length !== 2 || !(range[0] > 0 && range[0] <= range[1] && range[1] <= 1)) {
      read.fail(key, 'two ascending numbers in (0, 1]', range);
    }
    return [range[0], range[1]];
  };
  const tokensJson = read.object(root.tokens, 'tokens');
  read.known(tokensJson, 'tokens.', places);
  for (const place of places) {
    if (tokensJson[place] === undefined) continue;
    const key = `tokens.${place}`;
    const entry = read.object(tokensJson[place], key);
    read.known(entry, `${key}.`, [
      'layers',
      'train',
      'train_capacity',
      'decode',
      ...(place === 'attn' ? ['keys'] : []),
    ]);
    const layers = layersAt(entry, key);
    const keys = entry.keys as AttentionKeys;
    if (place === 'attn' && !attentionKeys.includes(keys)) {
      read.fail(`${key}.keys`, `one of ${attentionKeys.join(', ')}`, keys);
    }
    if (place === 'attn') tokens.attn = { layers, keys };
    else tokens.mlp = { layers };
    capacity[place] = rangeAt(entry.train_capacity, `${key}.train_capacity`);
    for (const [name, rule] of Object.entries(tokenRules)) {
      if (entry[name] !== rule) read.fail(`${key}.${name}`, JSON.stringify(rule), entry[name]);
    }
  }

  const experts: Partial<Record<ExpertAxis, Experts>> = {};
  for (const axis of expertAxes) {
    if (root[axis] === undefined) continue;
    const entry = read.object(root[axis], axis);
    read.known(entry, `${axis}.`, [
      'layers',
      'count',
      'gate',
      'rule',
      ...(axis === 'heads' ? ['keys'] : []),
      'train_share',
    ]);
    const layers = layersAt(entry, axis);
    const count = entry.count as number;
    const [accepts, rule] = cutRule(axis, model);
    if (!accepts(count)) read.fail(`${axis}.count`, rule, count);
    const expertGate = entry.gate as ExpertGate;
    if (!expertGates.includes(expertGate)) read.fail(`${axis}.gate`, `one of ${expertGates.join(', ')}`, expertGate);
    const expertRule = entry.rule as ExpertRule;
    if (!expertRules.includes(expertRule)) read.fail(`${axis}.rule`, `one of ${expertRules.join(', ')}`, expertRule);
    experts[axis] = { layers, count, gate: expertGate, rule: expertRule };
    if (axis === 'heads') {
      const keys = entry.keys as AttentionKeys;
      if (!attentionKeys.includes(keys)) read.fail('heads.keys', `one of ${attentionKeys.join(', ')}`, keys);
      const bad = keys === 'selected' ? ownKeysRule(count, model.kvHeads) : null;
      if (bad) read.fail('heads.keys', bad, keys);
      experts[axis] = { ...experts[axis], keys };
    }
    capacity[axis] = rangeAt(entry.train_share, `${axis}.train_share`);
  }

  let lora: ElasticPolicy['lora'];
  if (root.lora !== undefined) {
    const entry = read.object(root.lora, 'lora');
    read.known(entry, 'lora.', ['rank', 'targets', 'layers']);
    const rank = entry.rank as number;
    if (!Number.isInteger(rank) || rank < 1) read.fail('lora.rank', 'a positive integer', rank);
    const problem = targetProblem(entry.targets, model);
    if (problem) read.fail('lora.targets', problem, entry.targets);
    lora = { rank, targets: entry.targets as Projection[], layers: layersAt(entry, 'lora') };
  }

  const policy: ElasticPolicy = {
    version: 1,
    base: {
      name: read.string(base.name_or_path, 'base.name_or_path'),
      ...(base.revision !== undefined && { revision: read.string(base.revision, 'base.revision') }),
      ...(base.license !== undefined && { license: read.string(base.license, 'base.license') }),
      weightsSha256: read.string(base.weights_sha256, 'base.weights_sha256'),
      tokenizerSha256:
        base.tokenizer_sha256 === null ? null : read.string(base.tokenizer_sha256, 'base.tokenizer_sha256'),
    },
    hidden: model.hidden,
    layers: model.layers,
    gate,
    tokens,
    ...experts,
    ...(lora && { lora }),
    capacity,
    calibration: null,
    levels: [],
  };

  const routers = routerPlaces(policy);
  const expected = routers.map((r) => r.id);
  if (!Array.isArray(root.routers)) read.fail('routers', 'a list', root.routers);
  const listed = (root.routers as unknown[]).map((entry, i) => {
    const router = read.object(entry, `routers[${i}]`);
    read.known(router, `routers[${i}].`, ['id', 'kind', 'in', 'hidden', 'out', 'act', 'tensors']);
    const id = read.string(router.id, `routers[${i}].id`);
    const wanted = routers.find((r) => r.id === id);
    if (!wanted) read.fail(`routers[${i}].id`, `one of ${expected.join(', ')}`, id);
    const { router: kind, act } = axisTraits[wanted!.axis];
    if (router.kind !== kind) read.fail(`routers[${i}].kind`, JSON.stringify(kind), router.kind);
    if (router.in !== model.hidden)
      read.fail(`routers[${i}].in`, `${model.hidden}, the model's hidden size`, router.in);
    if (router.hidden !== 0) read.fail(`routers[${i}].hidden`, '0 (a linear router)', router.hidden);
    if (router.out !== wanted!.outputs) read.fail(`routers[${i}].out`, `${wanted!.outputs}`, router.out);
    if (router.act !== act) read.fail(`routers[${i}].act`, JSON.stringify(act), router.act);
    const names = [`${id}.weight`, `${id}.bias`];
    if (JSON.stringify(router.tensors) !== JSON.stringify(names)) {
      read.fail(`routers[${i}].tensors`, JSON.stringify(names), router.tensors);
    }
    return id;
  });
  if (listed.join() !== expected.join()) read.fail('routers', `the routed sub-layers [${expected.join(', ')}]`, listed);

  if (root.calibration !== null && root.calibration !== undefined) {
    const entry = read.object(root.calibration, 'calibration');
    read.known(entry, 'calibration.', ['path', 'capacities', 'points', 'tokens', 'sequence_length']);
    const capacities = read.numbers(entry.capacities, 'calibration.capacities');
    if (capacities.length === 0 || capacities.some((c, i) => !(c > 0 && c <= 1) || (i > 0 && c <= capacities[i - 1]))) {
      read.fail('calibration.capacities', 'ascending numbers in (0, 1]', capacities);
    }
    if (!Array.isArray(entry.path) || entry.path.length === 0) read.fail('calibration.path', 'a list', entry.path);
    let before = expected.map(() => 1);
    const path = (entry.path as unknown[]).map((step, i) => {
      const key = `calibration.path[${i}]`;
      const shares = read.numbers(step, key);
      const ok = shares.length === expected.length && shares.every((c) => c >= 0 && c <= 1);
      if (!ok) read.fail(key, `${expected.length} capacities in [0, 1]`, step);
      if (i === 0 && shares.some((c) => c < 1)) read.fail(key, 'all 1, where the path starts', step);
      if (shares.some((c, r) => c > before[r])) read.fail(key, 'nowhere above the capacities before', step);
      before = shares;
      return shares;
    });
    const integer = (key: string, least: number, most: number): number => {
      const value = entry[key];
      if (!Number.isInteger(value) || (value as number) < least || (value as number) > most) {
        read.fail(`calibration.${key}`, `an integer from ${least} to ${most}`, value);
      }
      return value as number;
    };
    policy.calibration = {
      path,
      capacities,
      points: integer('points', 2, 65_536),
      tokens: integer('tokens', 1, Number.MAX_SAFE_INTEGER),
      sequenceLength: integer('sequence_length', 1, 2 ** 31),
      quantiles: new Map(),
    };
  }
  policy.levels = readLevels(read, policy, root.levels);
  return policy;
}

/** What is wrong with a list of projections to correct, or null. They stand in the order of `projections`. */
export function targetProblem(targets: unknown, { gated }: Pick<ModelSpec, 'gated'>): string | null {
  const there = projections.filter((projection) => gated || projection !== 'gate');
  const known =
    Array.isArray(targets) &&
    targets.length > 0 &&
    there.filter((projection) => targets.includes(projection)).join() === targets.join();
  return known ? null : `some of ${there.join(', ')}, in this order`;
}

function readLevels(read: Reader, policy: ElasticPolicy, json: unknown): Level[] {
  if (!Array.isArray(json)) read.fail('levels', 'a list', json);
  const names = new Set<string>();
  return (json as unknown[]).map((entry, i) => {
    const key = `levels[${i}]`;
    const level = read.object(entry, key);
    read.known(level, `${key}.`, ['name', 'spec', 'flops_ratio', 'quality']);
    const name = read.string(level.name, `${key}.name`);
    if (names.has(name)) read.fail(`${key}.name`, 'unique', name);
    names.add(name);
    if (name === '') read.fail(`${key}.name`, 'a name', name);
    const specJson = read.object(level.spec, `${key}.spec`);
    read.known(specJson, `${key}.spec.`, specKeys);
    const shares: Partial<Record<Axis, Capacity>> = {};
    const shareAt = (value: unknown, axis: Axis): void => {
      if (value === undefined) return;
      const layers = routedLayers(policy, axis).length;
      if (!isCapacity(value, layers)) read.fail(`${key}.spec.${axisTraits[axis].setting}`, capacityRule(layers), value);
      shares[axis] = value as Capacity;
    };
    if (specJson.tokenCapacity !== undefined) {
      const capacity = read.object(specJson.tokenCapacity, `${key}.spec.tokenCapacity`);
      read.known(capacity, `${key}.spec.tokenCapacity.`, places);
      for (const place of places) shareAt(capacity[place], place);
    }
    for (const axis of expertAxes) shareAt(specJson[axisTraits[axis].setting], axis);
    const spec = specOfAxes(shares);
    if (name === 'full' && Object.keys(spec).length > 0) read.fail(`${key}.spec`, "{}: 'full' has no settings", spec);
    const result: Level = { name, spec };
    if (level.flops_ratio !== undefined) {
      const ratio = level.flops_ratio;
      if (typeof ratio !== 'number' || !(ratio > 0)) read.fail(`${key}.flops_ratio`, 'a positive number', ratio);
      result.flopsRatio = ratio as number;
    }
    if (level.quality !== undefined) result.quality = readQuality(read, level.quality, `${key}.quality`);
    return result;
  });
}

function readQuality(read: Reader, json: unknown, key: string): Record<string, QualityValue> {
  const metrics = Object.entries(read.object(json, key)).map(([metric, entry]) => {
    const at = `${key}.${metric}`;
    const quality = read.object(entry, at);
    read.known(quality, `${at}.`, ['value', 'lo', 'hi', 'n']);
    const [value, lo, hi] = ['value', 'lo', 'hi'].map((name) => {
      const number = quality[name];
      if (typeof number !== 'number') read.fail(`${at}.${name}`, 'a number', number);
      return number as number;
    });
    // A percentile interval may leave the value just outside.
    const shares = metric !== qualityMetric || [value, lo, hi].every((share) => share >= 0 && share <= 1);
    if (!shares) read.fail(at, 'a share, in [0, 1]', entry);
    if (lo > hi) read.fail(`${at}.lo`, 'at most hi', lo);
    const n = quality.n;
    if (!Number.isInteger(n) || (n as number) < 1) read.fail(`${at}.n`, 'a positive integer', n);
    return [metric, { value, lo, hi, n: n as number }] as const;
  });
  return Object.fromEntries(metrics);
}
