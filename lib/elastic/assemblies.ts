// From a budget to what runs of an encoder-decoder model: an assembly, and how much of its parts; and what that costs.
import { type Seq2SeqFlops, seq2seqFlops, writingFlops } from '../model/flops.js';
import { isModule } from '../model/parts.js';
import { type Place, type Projection, places, projections } from '../model/select.js';
import { type Seq2SeqSpec, withLayers } from '../model/seq2seq_spec.js';
import type { ModelSpec } from '../model/spec.js';
import { InvalidArgumentError } from '../native/errors.js';
import { axisTraits, type ElasticSpec, meanCapacity } from './axes.js';
import {
  type Budget,
  type BudgetContext,
  fullPoint,
  type LevelPoint,
  type OperatingPoint,
  withinLatency,
  withQuality,
} from './budget.js';
import { loraFlops } from './cost.js';
import { assemblyPath, assemblyText, backboneOf, settingNames, settingsProblem, stacks } from './modules.js';
import { alignedWidth } from './nested.js';
import type { ElasticPolicy, Level } from './policy.js';
import { entering, savedSourceFlops, sourceCapacities } from './source_routing.js';

/** Tokens of a generation: those of its source, and those that are written. */
export interface Lengths {
  readonly source: number;
  readonly target: number;
}

/** What the cost of settings is stated for unless said otherwise. */
export const typicalLengths: Lengths = { source: 64, target: 64 };

/** What of a policy decides about the cost of settings; null: of a plain model. */
type Elastic = Pick<ElasticPolicy, 'nested' | 'lora'> | null;

/** Units of every feed-forward that run at settings. */
export function unitsAt({ ffnWidth = 1 }: ElasticSpec, { decoder: { ffn } }: Seq2SeqSpec, policy: Elastic): number {
  const width = ffnWidth as number;
  if (width > 1) return width;
  return width < 1 ? alignedWidth(width, policy!.nested!, ffn) : ffn;
}

/** The sizes of what runs at settings: as many layers as parts, and their units. */
export function assembledSpec(spec: Seq2SeqSpec, settings: ElasticSpec, policy: Elastic): Seq2SeqSpec {
  const { encoder, decoder } = settings.assembly ?? backboneOf(spec);
  return withLayers(
    spec,
    { encoder: encoder.length, decoder: decoder.length },
    settings.ffnWidth === undefined ? undefined : unitsAt(settings, spec, policy),
  );
}

/** FLOPs of what generations run at settings that differ from full, by formula, as the kernels count them. */
export function flopsAt(spec: Seq2SeqSpec, settings: ElasticSpec, policy: Elastic): Seq2SeqFlops {
  const sizes = assembledSpec(spec, settings, policy);
  const { encoder, decoder } = settings.assembly ?? backboneOf(spec);
  const capacities = sourceCapacities(encoder.length, settings.tokenCapacity);
  const whole = seq2seqFlops(sizes);
  const plain: Seq2SeqFlops = {
    ...whole,
    source: (tokens) => whole.source(tokens) - savedSourceFlops(sizes.encoder, capacities, tokens),
  };
  const lora = policy?.lora;
  if (!lora || Object.keys(settings).length === 0) return plain;
  // Modules have no corrections.
  const corrected = (parts: readonly string[]) => parts.filter((part) => !isModule(part)).length;
  const of = (
    model: ModelSpec,
    place: Place,
    rows: number,
    { kept = projections, share = 1 }: { kept?: readonly Projection[]; share?: number } = {},
  ) => {
    const targets = lora.targets.filter((projection) => kept.includes(projection));
    const tokens = { attn: { layers: [0], keys: 'all' }, mlp: { layers: [0] } } as const;
    const one = { tokens, layers: 1, lora: { ...lora, layers: [0], targets } };
    const shares = { tokens: entering(share, rows) / rows, experts: 1, units: model.ffn };
    return loraFlops(model, one, { layer: 0, place, ...shares }, rows);
  };
  const ofPart = (part: string, i: number, rows: number): number =>
    isModule(part)
      ? 0
      : places.reduce((sum, place) => sum + of(sizes.encoder, place, rows, { share: capacities[place][i] }), 0);
  return {
    source: (tokens) =>
      plain.source(tokens) +
      encoder.reduce((sum, part, i) => sum + ofPart(part, i, tokens), 0) +
      corrected(decoder) * of(sizes.decoder, 'attn', tokens, { kept: ['k', 'v'] }),
    target: (before, source) =>
      plain.target(before, source) +
      corrected(decoder) *
        (of(sizes.decoder, 'attn', 1) +
          of(sizes.decoder, 'mlp', 1) +
          of(sizes.decoder, 'attn', 1, { kept: ['q', 'o'] })),
  };
}

/** FLOPs of a generation at settings over those by the whole model. */
export const settingsRatio = (
  spec: Seq2SeqSpec,
  settings: ElasticSpec,
  policy: Elastic,
  { source, target }: Lengths = typicalLengths,
): number =>
  writingFlops(flopsAt(spec, settings, policy), source, target) / writingFlops(seq2seqFlops(spec), source, target);

/**
 * How many times as fast settings are expected to be where writing token by token takes most of the time, as it does for one text at a time: a run then takes
 * about as long as its first row, so that a source counts as one token.
 */
export const settingsSpeedup = (
  spec: Seq2SeqSpec,
  settings: ElasticSpec,
  policy: Elastic,
  { source, target }: Lengths = typicalLengths,
): number => {
  const time = (of: Seq2SeqFlops) => writingFlops(of, source, target) - of.source(source) + of.source(1);
  return time(seq2seqFlops(spec)) / time(flopsAt(spec, settings, policy));
};

/**
 * What a budget means for an encoder-decoder model: of a number the costliest assembly within that share of the FLOPs of a typical generation, on the path
 * that shrinks the decoder first, with feed-forwards as wide as they are.
 *
 * @param policy null, or one without modules: only the full budget runs
 * @throws InvalidArgumentError when the budget is malformed, names no level, cannot be reached, has an assembly with a gap, an overlap or a part that the
 * model lacks, another setting that it lacks, or needs modules or measurements that are missing.
 */
export function resolveAssembly(
  budget: Budget,
  spec: Seq2SeqSpec,
  policy: ElasticPolicy | null,
  context: Omit<BudgetContext, 'length'> & { length: number },
): OperatingPoint {
  if (budget === 'full' || budget === 1) return fullPoint(budget === 'full' ? 'full' : null);
  if (!policy?.modules) {
    throw new InvalidArgumentError(
      `[budget] budget ${JSON.stringify(budget)} needs modules, and this model has none; train them with \`elastiform modular\``,
    );
  }
  const levelPoint = ({ name, spec: settings }: Level): LevelPoint => ({
    ...{ name, spec: settings },
    point: pointOf(settings, spec, policy, name),
  });
  if (typeof budget === 'string') {
    const level = policy.levels.find(({ name }) => name === budget);
    if (level) return levelPoint(level).point;
    const names = ['full', ...policy.levels.map(({ name }) => name).filter((name) => name !== 'full')];
    throw new InvalidArgumentError(`[budget] no level is named '${budget}'; there are ${names.join(', ')}`);
  }
  if (typeof budget === 'number') {
    if (!(budget > 0 && budget < 1))
      throw new InvalidArgumentError(`[budget] a budget must be in (0, 1], got ${budget}`);
    const points = speedPath(spec, policy);
    const chosen = points.find(({ point }) => point.flopsRatio <= budget);
    if (chosen) return chosen.point;
    const least = points.at(-1)!;
    throw new InvalidArgumentError(
      `[budget] budget ${budget} cannot be reached: the smallest assembly, ${least.name}, takes ${least.point.flopsRatio.toFixed(3)} of the FLOPs of a typical generation`,
    );
  }
  const keys = Object.keys(budget ?? {})
    .sort()
    .join();
  const costliestFirst = (points: LevelPoint[]) => points.sort((a, b) => b.point.flopsRatio - a.point.flopsRatio);
  if (keys === 'latencyMs' || keys === 'latencyMs,metric') {
    const points = costliestFirst([...policy.levels.map(levelPoint), ...speedPath(spec, policy)]);
    return withinLatency(budget as Extract<Budget, { latencyMs: number }>, points, context);
  }
  if (keys === 'minQuality') {
    return withQuality(
      (budget as { minQuality: number }).minQuality,
      costliestFirst(policy.levels.map(levelPoint)),
      policy.levels,
    );
  }
  const wanted = keys === 'spec' ? (budget as { spec: unknown }).spec : null;
  if (typeof wanted === 'object' && wanted !== null) {
    const other = Object.keys(wanted).find((key) => !settingNames.includes(key));
    if (other !== undefined) {
      throw new InvalidArgumentError(
        `[budget] an encoder-decoder model has the settings ${settingNames.join(', ')}, got '${other}'`,
      );
    }
    const problem = settingsProblem(wanted, spec, policy);
    if (problem) throw new InvalidArgumentError(`[budget] ${problem}`);
    return pointOf(wanted, spec, policy, null);
  }
  throw new InvalidArgumentError(
    `[budget] a budget must be a number in (0, 1], 'full', a level, {latencyMs, metric}, {minQuality} or {spec: {${settingNames.join(', ')}}}, got ${JSON.stringify(budget)}`,
  );
}

const speedPaths = new WeakMap<ElasticPolicy, readonly LevelPoint[]>();

/** The path for speed of a model with modules, found once: calls choose on it. */
function speedPath(spec: Seq2SeqSpec, policy: ElasticPolicy): readonly LevelPoint[] {
  let path = speedPaths.get(policy);
  if (!path) {
    path = assemblyPath(spec, policy.modules!, 'speed-first').map((assembly) => {
      const point = pointOf({ assembly }, spec, policy, null);
      return { name: assemblyText(assembly), spec: point.spec, point };
    });
    speedPaths.set(policy, path);
  }
  return path;
}

/** The point of settings without a problem; full where they leave all of the model. */
function pointOf(
  settings: ElasticSpec,
  spec: Seq2SeqSpec,
  policy: ElasticPolicy,
  level: string | null,
): OperatingPoint {
  const effective = effectiveSettings(settings, spec, policy);
  if (Object.keys(effective).length === 0) return fullPoint(level);
  const { encoder, decoder } = effective.assembly ?? backboneOf(spec);
  const units = unitsAt(effective, spec, policy);
  const notes = stacks.map(
    (stack) => `${{ encoder, decoder }[stack].length} of ${spec[stack].layers} layers of the ${stack}`,
  );
  if (effective.ffnWidth) notes.push(`feed-forwards of ${units} of ${spec.decoder.ffn} units`);
  const capacities = sourceCapacities(encoder.length, effective.tokenCapacity);
  const mean = { attn: meanCapacity(capacities.attn), mlp: meanCapacity(capacities.mlp) };
  for (const place of places.filter((place) => mean[place] < 1)) {
    const [low] = policy.sourceTokens!.capacity[place]!;
    const below = mean[place] < low ? `, below the ${low * 100} % it was trained for` : '';
    notes.push(`${(mean[place] * 100).toFixed(1)} % ${axisTraits[place].of} of the encoder${below}`);
  }
  const { source, target } = typicalLengths;
  const full = fullPoint(level);
  return {
    ...full,
    capacity: { ...full.capacity, ...mean },
    ...{ spec: effective, full: false, flopsRatio: settingsRatio(spec, effective, policy) },
    ...(effective.ffnWidth && { widths: decoder.map(() => units) }),
    why: `${notes.join(', ')}: ${assemblyText({ encoder, decoder })}, for ${source} tokens read and ${target} written`,
  };
}

/** What of settings without a problem differs from full; nothing where they leave all of the model. */
export function effectiveSettings(settings: ElasticSpec, spec: Seq2SeqSpec, policy: Elastic): ElasticSpec {
  const backbone = backboneOf(spec);
  const { encoder, decoder } = settings.assembly ?? backbone;
  const { ffn } = spec.decoder;
  const units = unitsAt(settings, spec, policy);
  const capacities = sourceCapacities(encoder.length, settings.tokenCapacity);
  const routed = places.filter((place) => capacities[place].some((share) => share < 1));
  return {
    ...(assemblyText({ encoder, decoder }) !== assemblyText(backbone) && { assembly: { encoder, decoder } }),
    ...(units < ffn && { ffnWidth: units / ffn }),
    ...(routed.length > 0 && {
      tokenCapacity: Object.fromEntries(routed.map((place) => [place, settings.tokenCapacity![place]])),
    }),
  };
}
