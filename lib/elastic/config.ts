// elastic_config.json: a policy as the file has it, and back, with everything checked.
import { type ExpertGate, type ExpertRule, expertGates, expertRules } from '../graph/index.js';
import { type Assembly, type Modules, partId, type Span, type Stack, spanOf, stacks } from '../model/parts.js';
import { type Projection, places } from '../model/select.js';
import type { Seq2SeqSpec } from '../model/seq2seq_spec.js';
import type { ModelSpec } from '../model/spec.js';
import { InvalidDataError } from '../native/errors.js';
import {
  type Axis,
  axisTraits,
  type Capacity,
  capacityRule,
  type ElasticSpec,
  type ExpertAxis,
  expertAxes,
  isCapacity,
  sequenceAxis,
  specKeys,
  specOfAxes,
  targets,
} from './axes.js';
import {
  type Exit,
  type ExitRuleName,
  type ExitSetting,
  exitId,
  exitRules,
  exitsProblem,
  settingProblem,
  thresholdProblem,
} from './exits.js';
import { settingNames, settingsProblem, spanProblem } from './modules.js';
import { alignedWidth, type FfnWidth, type Nested, nestedTrainings, unitScores, widthProblem } from './nested.js';
import {
  type AttentionKeys,
  attentionKeys,
  cutRule,
  type ElasticPolicy,
  type Experts,
  encoderConflict,
  type GateMode,
  gateModes,
  type Level,
  type ModelSizes,
  modulesConflict,
  nestedConflict,
  ownKeysRule,
  type QualityValue,
  qualityMetric,
  type Range,
  routedLayers,
  routerPlaces,
  routingConflict,
  type SourceTokens,
  sourceRouters,
  targetProblem,
  tileProblem,
} from './policy.js';
import { type Json, Reader } from './reader.js';

/** How tokens are chosen while training and afterwards. */
const tokenRules = { train: 'top-k', decode: 'threshold' } as const;
/** The same of tokens of a source, which is there as a whole, and which of them attention attends to. */
const sourceRules = { train: 'top-k', decode: 'top-k' } as const;
const sourceKeys = { keys: 'all' } as const;
/** The same of whole sequences: they are chosen among those of a batch, and by their first rows for as long as they go on. */
const sequenceRules = { train: 'top-k', decode: 'threshold', decide_at: 'prefill' } as const;

/** The content of elastic_config.json, version 1. */
export function policyToJson(policy: ElasticPolicy): Json {
  const tokens: Json = {};
  const sequences: Json = {};
  for (const target of targets) {
    const [routed, whole] = [policy.tokens[target], policy.sequences?.[target]];
    if (routed) {
      tokens[target] = {
        layers: routed.layers,
        ...('keys' in routed ? { keys: routed.keys } : {}),
        ...tokenRules,
        train_capacity: policy.capacity[target],
      };
    }
    if (whole) {
      const range = policy.capacity[sequenceAxis(target)];
      sequences[target] = { layers: whole.layers, ...sequenceRules, train_capacity: range };
    }
  }
  const { calibration, lora, nested } = policy;
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
    ...(Object.keys(sequences).length > 0 && { sequences }),
    ...Object.fromEntries(
      expertAxes.flatMap((axis) => {
        const experts = policy[axis];
        if (!experts) return [];
        return [[axis, { ...experts, train_share: policy.capacity[axis] }]];
      }),
    ),
    ...(nested && {
      ffn: {
        nested: true,
        layers: nested.layers,
        alignment: nested.alignment,
        granularities: nested.granularities,
        permuted: nested.scores !== 'none',
        scores: nested.scores,
        ...(nested.searched && { searched: nested.searched }),
        ...(nested.permutedFrom && { permuted_from: nested.permutedFrom }),
        ...(nested.trained && { trained: nested.trained }),
      },
    }),
    ...(policy.exits && {
      exits: policy.exits.map(({ afterLayer, rule, threshold }) => ({
        ...{ after_layer: afterLayer, head: exitId(afterLayer), rule, threshold },
      })),
    }),
    ...(policy.modules && {
      modules: Object.fromEntries(stacks.map((stack) => [stack, policy.modules![stack].map(partId)])),
    }),
    ...(policy.sourceTokens && {
      source_tokens: Object.fromEntries(
        Object.entries(policy.sourceTokens.capacity).map(([place, range]) => [
          place,
          { ...(place === 'attn' && sourceKeys), ...sourceRules, train_capacity: range },
        ]),
      ),
    }),
    ...(lora && { lora: { rank: lora.rank, targets: lora.targets, layers: lora.layers } }),
    routers: [...routerPlaces(policy), ...sourceRouters(policy)].map(({ id, axis, outputs }) => ({
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
 * `model`: of an encoder-decoder model, which is `seq2seq`, the decoder.
 * `warnings` receives one line per unknown key. Errors: InvalidDataError naming the file and the key.
 */
export function policyFromJson(
  json: unknown,
  file: string,
  model: ModelSpec,
  warnings: string[],
  seq2seq: Seq2SeqSpec | null = null,
): ElasticPolicy {
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
    'sequences',
    ...expertAxes,
    'ffn',
    'exits',
    'modules',
    'source_tokens',
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
  const rulesAt = (entry: Json, key: string, rules: Readonly<Record<string, string>>): void => {
    for (const [name, rule] of Object.entries(rules)) {
      if (entry[name] !== rule) read.fail(`${key}.${name}`, JSON.stringify(rule), entry[name]);
    }
  };
  const tokensJson = read.object(root.tokens, 'tokens');
  read.known(tokensJson, 'tokens.', targets);
  for (const target of targets) {
    if (tokensJson[target] === undefined) continue;
    const key = `tokens.${target}`;
    const entry = read.object(tokensJson[target], key);
    const keyed = target === 'mlp' ? [] : ['keys'];
    read.known(entry, `${key}.`, ['layers', 'train', 'train_capacity', 'decode', ...keyed]);
    const layers = layersAt(entry, key);
    const keys = entry.keys as AttentionKeys;
    if (target === 'mlp') tokens.mlp = { layers };
    else {
      if (!attentionKeys.includes(keys)) read.fail(`${key}.keys`, `one of ${attentionKeys.join(', ')}`, keys);
      tokens[target] = { layers, keys };
    }
    capacity[target] = rangeAt(entry.train_capacity, `${key}.train_capacity`);
    rulesAt(entry, key, tokenRules);
  }

  const sequences: NonNullable<ElasticPolicy['sequences']> = {};
  const sequencesJson = root.sequences === undefined ? {} : read.object(root.sequences, 'sequences');
  read.known(sequencesJson, 'sequences.', targets);
  for (const target of targets) {
    if (sequencesJson[target] === undefined) continue;
    const key = `sequences.${target}`;
    const entry = read.object(sequencesJson[target], key);
    read.known(entry, `${key}.`, ['layers', 'train_capacity', ...Object.keys(sequenceRules)]);
    sequences[target] = { layers: layersAt(entry, key) };
    capacity[sequenceAxis(target)] = rangeAt(entry.train_capacity, `${key}.train_capacity`);
    rulesAt(entry, key, sequenceRules);
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
      'tile',
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
    const tile = entry.tile as number | undefined;
    const badTile = tile === undefined ? null : tileProblem(tile);
    if (badTile) read.fail(`${axis}.tile`, badTile, tile);
    experts[axis] = { layers, count, gate: expertGate, rule: expertRule, ...(tile !== undefined && { tile }) };
    if (axis === 'heads') {
      const keys = entry.keys as AttentionKeys;
      if (!attentionKeys.includes(keys)) read.fail('heads.keys', `one of ${attentionKeys.join(', ')}`, keys);
      const bad = keys === 'selected' ? ownKeysRule(count, model.kvHeads) : null;
      if (bad) read.fail('heads.keys', bad, keys);
      experts[axis] = { ...experts[axis], keys };
    }
    capacity[axis] = rangeAt(entry.train_share, `${axis}.train_share`);
  }

  let nested: Nested | undefined;
  if (root.ffn !== undefined) {
    const entry = read.object(root.ffn, 'ffn');
    read.known(entry, 'ffn.', [
      ...[
        'nested',
        'layers',
        'alignment',
        'granularities',
        'permuted',
        'scores',
        'searched',
        'permuted_from',
        'trained',
      ],
    ]);
    if (entry.nested !== true) read.fail('ffn.nested', 'true', entry.nested);
    const among = <T>(key: string, known: readonly T[]): T => {
      if (!known.includes(entry[key] as T)) read.fail(`ffn.${key}`, `one of ${known.join(', ')}`, entry[key]);
      return entry[key] as T;
    };
    const scores = among('scores', unitScores);
    if (entry.permuted !== (scores !== 'none')) read.fail('ffn.permuted', `${scores !== 'none'}`, entry.permuted);
    const granularities = read.numbers(entry.granularities, 'ffn.granularities');
    const ascend = granularities.every((share, i) => share > (granularities[i - 1] ?? 0));
    if (!ascend || granularities.at(-1) !== 1) {
      read.fail('ffn.granularities', 'ascending shares up to 1', granularities);
    }
    const alignment = entry.alignment as number;
    if (!Number.isInteger(alignment) || alignment < 1 || model.ffn % alignment !== 0) {
      read.fail('ffn.alignment', `a positive integer that divides the feed-forward's width ${model.ffn}`, alignment);
    }
    const layers = layersAt(entry, 'ffn');
    nested = { layers, granularities, alignment, scores };
    if (entry.searched !== undefined) nested.searched = searchedAt(read, entry.searched, nested, model.ffn);
    if (entry.permuted_from !== undefined) nested.permutedFrom = read.string(entry.permuted_from, 'ffn.permuted_from');
    if (entry.trained !== undefined) nested.trained = among('trained', nestedTrainings);
  }

  const exits = root.exits === undefined ? undefined : exitsAt(read, root.exits, model);

  const modules = root.modules === undefined || !seq2seq ? undefined : modulesAt(read, root.modules, seq2seq);
  if (root.modules !== undefined && !seq2seq) {
    read.fail('modules', 'absent: they are for encoder-decoder models', root.modules);
  }

  let sourceTokens: SourceTokens | undefined;
  if (root.source_tokens !== undefined) {
    if (!seq2seq) read.fail('source_tokens', 'absent: they are of encoder-decoder models', root.source_tokens);
    const json = read.object(root.source_tokens, 'source_tokens');
    read.known(json, 'source_tokens.', places);
    const routed = places.filter((place) => json[place] !== undefined);
    if (routed.length === 0) read.fail('source_tokens', `some of ${places.join(', ')}`, json);
    const ranges = routed.map((place) => {
      const key = `source_tokens.${place}`;
      const entry = read.object(json[place], key);
      const rules = { ...(place === 'attn' && sourceKeys), ...sourceRules };
      read.known(entry, `${key}.`, [...Object.keys(rules), 'train_capacity']);
      rulesAt(entry, key, rules);
      return [place, rangeAt(entry.train_capacity, `${key}.train_capacity`)];
    });
    sourceTokens = { layers: seq2seq!.encoder.layers, capacity: Object.fromEntries(ranges) };
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
    ...(Object.keys(sequences).length > 0 && { sequences }),
    ...experts,
    ...(nested && { nested }),
    ...(exits && { exits }),
    ...(modules && { modules }),
    ...(sourceTokens && { sourceTokens }),
    ...(lora && { lora }),
    capacity,
    calibration: null,
    levels: [],
  };
  const conflict = nestedConflict(policy);
  if (conflict) read.fail('ffn.layers', conflict, nested!.layers);
  const routing = routingConflict(policy) ?? encoderConflict(policy, model) ?? modulesConflict(policy, seq2seq);
  if (routing) throw new InvalidDataError(`[elastic] ${file}: ${routing}`);

  const routers = [...routerPlaces(policy), ...sourceRouters(policy)];
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
    if (
      capacities.length === 0 ||
      capacities.some((c, i) => !(c >= 0 && c <= 1) || (i > 0 && c <= capacities[i - 1]))
    ) {
      read.fail('calibration.capacities', 'ascending numbers in [0, 1]', capacities);
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
  policy.levels = readLevels(read, policy, model, seq2seq, root.levels);
  return policy;
}

function exitsAt(read: Reader, json: unknown, model: ModelSpec): Exit[] {
  const problem = exitsProblem(model);
  if (problem) read.fail('exits', problem, json);
  if (!Array.isArray(json) || json.length === 0) read.fail('exits', 'a list of heads', json);
  let before = -1;
  return (json as unknown[]).map((item, i) => {
    const key = `exits[${i}]`;
    const entry = read.object(item, key);
    read.known(entry, `${key}.`, ['after_layer', 'head', 'rule', 'threshold']);
    const afterLayer = entry.after_layer as number;
    if (!Number.isInteger(afterLayer) || afterLayer <= before || afterLayer >= model.layers - 1) {
      read.fail(`${key}.after_layer`, `ascending layer ids below ${model.layers - 1}, the last layer`, afterLayer);
    }
    before = afterLayer;
    if (entry.head !== exitId(afterLayer)) read.fail(`${key}.head`, JSON.stringify(exitId(afterLayer)), entry.head);
    const rule = entry.rule as ExitRuleName;
    if (!exitRules.includes(rule)) read.fail(`${key}.rule`, `one of ${exitRules.join(', ')}`, rule);
    const bad = thresholdProblem(rule, entry.threshold);
    if (bad) read.fail(`${key}.threshold`, bad, entry.threshold);
    return { afterLayer, rule, threshold: entry.threshold as number };
  });
}

function modulesAt(read: Reader, json: unknown, model: Seq2SeqSpec): Modules {
  const entry = read.object(json, 'modules');
  read.known(entry, 'modules.', stacks);
  const ofStack = (stack: Stack): Span[] => {
    const key = `modules.${stack}`;
    const ids = entry[stack];
    if (!Array.isArray(ids)) read.fail(key, 'a list of spans of layers', ids);
    const spans = (ids as unknown[]).map((id, i): Span => {
      const span = spanOf(id);
      if (!span || ids.indexOf(id) !== i) read.fail(`${key}[${i}]`, "a span of layers such as '2-3', once", id);
      const problem = spanProblem(span!, model[stack].layers);
      if (problem) read.fail(`${key}[${i}]`, problem, id);
      return span!;
    });
    return spans;
  };
  const modules = { encoder: ofStack('encoder'), decoder: ofStack('decoder') };
  if (stacks.every((stack) => modules[stack].length === 0)) read.fail('modules', 'at least one span', json);
  return modules;
}

function searchedAt(read: Reader, json: unknown, nested: Nested, ffn: number): number[][] {
  if (!Array.isArray(json) || json.length === 0) read.fail('ffn.searched', 'a list of widths', json);
  let before = 0;
  return (json as unknown[]).map((entry, i) => {
    const key = `ffn.searched[${i}]`;
    const shares = read.numbers(entry, key);
    const problem = widthProblem(shares, nested, ffn);
    if (problem || shares.some((share) => share > 1)) read.fail(key, 'the share of every nested layer', entry);
    const units = shares.reduce((sum, share) => sum + alignedWidth(share, nested, ffn), 0);
    if (units <= before) read.fail(key, 'wider than the one before', entry);
    before = units;
    return shares;
  });
}

function readLevels(
  read: Reader,
  policy: ElasticPolicy,
  { ffn }: ModelSizes,
  seq2seq: Seq2SeqSpec | null,
  json: unknown,
): Level[] {
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
    read.known(specJson, `${key}.spec.`, seq2seq ? settingNames : specKeys);
    const shares: Partial<Record<Axis, Capacity>> = {};
    const shareAt = (value: unknown, axis: Axis): void => {
      if (value === undefined) return;
      const layers = routedLayers(policy, axis).length;
      if (!isCapacity(value, layers)) read.fail(`${key}.spec.${axisTraits[axis].setting}`, capacityRule(layers), value);
      shares[axis] = value as Capacity;
    };
    for (const setting of ['tokenCapacity', 'sequenceCapacity'] as const) {
      if (specJson[setting] === undefined || seq2seq) continue;
      const capacity = read.object(specJson[setting], `${key}.spec.${setting}`);
      read.known(capacity, `${key}.spec.${setting}.`, targets);
      for (const target of targets) {
        shareAt(capacity[target], setting === 'tokenCapacity' ? target : sequenceAxis(target));
      }
    }
    for (const axis of seq2seq ? [] : expertAxes) shareAt(specJson[axisTraits[axis].setting], axis);
    const spec = specOfAxes(shares);
    const { assembly, ffnWidth: width } = specJson;
    if (seq2seq) {
      const problem = settingsProblem(specJson, seq2seq, policy);
      if (problem) throw new InvalidDataError(`[elastic] ${read.file}: ${key}.spec.${problem}`);
      if (assembly !== undefined) spec.assembly = assembly as Assembly;
      if (specJson.tokenCapacity !== undefined)
        spec.tokenCapacity = specJson.tokenCapacity as ElasticSpec['tokenCapacity'];
    } else if (assembly !== undefined) {
      read.fail(`${key}.spec.assembly`, 'absent: assemblies are of encoder-decoder models', assembly);
    }
    if (width !== undefined) {
      const problem = policy.nested ? widthProblem(width, policy.nested, ffn) : 'must be absent: no layer is nested';
      if (problem) throw new InvalidDataError(`[elastic] ${read.file}: ${key}.spec.ffnWidth ${problem}`);
      spec.ffnWidth = width as FfnWidth;
    }
    const exit = specJson.exit;
    if (exit !== undefined) {
      const problem = settingProblem(exit, policy.exits);
      if (problem) throw new InvalidDataError(`[elastic] ${read.file}: ${key}.spec.exit must be ${problem}`);
      spec.exit = exit as ExitSetting;
    }
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
