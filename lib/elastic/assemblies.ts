// From a budget to an assembly of an encoder-decoder model, and what assemblies cost.
import { sourceFlops, writingFlops } from '../model/flops.js';
import { type Seq2SeqSpec, withLayers } from '../model/seq2seq_spec.js';
import { InvalidArgumentError } from '../native/errors.js';
import {
  type Budget,
  type BudgetContext,
  fullPoint,
  type LevelPoint,
  type OperatingPoint,
  withinLatency,
  withQuality,
} from './budget.js';
import { type Assembly, assemblyPath, assemblyProblem, assemblyText, backboneOf, stacks } from './modules.js';
import type { ElasticPolicy, Level } from './policy.js';

/** Tokens of a generation: those of its source, and those that are written. */
export interface Lengths {
  readonly source: number;
  readonly target: number;
}

/** What the cost of an assembly is stated for unless said otherwise. */
export const typicalLengths: Lengths = { source: 64, target: 64 };

/** The sizes of what an assembly runs. */
export const assembledSpec = (spec: Seq2SeqSpec, { encoder, decoder }: Assembly): Seq2SeqSpec =>
  withLayers(spec, { encoder: encoder.length, decoder: decoder.length });

/** FLOPs of a generation by an assembly over those by the whole model. */
export const assemblyRatio = (
  spec: Seq2SeqSpec,
  assembly: Assembly,
  { source, target }: Lengths = typicalLengths,
): number => writingFlops(assembledSpec(spec, assembly), source, target) / writingFlops(spec, source, target);

/**
 * How many times as fast an assembly is expected to be where writing token by token takes most of the time, as it does for one text at a time: a run then takes
 * about as long as its first row, so that a source counts as one token.
 */
export const assemblySpeedup = (
  spec: Seq2SeqSpec,
  assembly: Assembly,
  { source, target }: Lengths = typicalLengths,
): number => {
  const time = (of: Seq2SeqSpec) => writingFlops(of, source, target) - sourceFlops(of, source) + sourceFlops(of, 1);
  return time(spec) / time(assembledSpec(spec, assembly));
};

/**
 * What a budget means for an encoder-decoder model: of a number the costliest assembly within that share of the FLOPs of a typical generation, on the path
 * that shrinks the decoder first.
 *
 * @param policy null, or one without modules: only the full budget runs
 * @throws InvalidArgumentError when the budget is malformed, names no level, cannot be reached, has an assembly with a gap, an overlap or a part that the
 * model lacks, or needs modules or measurements that are missing.
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
  const { modules } = policy;
  const levelPoint = ({ name, spec: settings }: Level): LevelPoint => {
    const point = settings.assembly ? pointOf(settings.assembly, spec, name) : fullPoint(name);
    return { name, spec: settings, point };
  };
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
    const settings = wanted as { assembly?: unknown };
    const other = Object.keys(settings).find((key) => key !== 'assembly');
    if (other !== undefined) {
      throw new InvalidArgumentError(
        `[budget] an encoder-decoder model has the setting assembly alone, got '${other}'`,
      );
    }
    if (settings.assembly === undefined) return fullPoint(null);
    const problem = assemblyProblem(settings.assembly, spec, modules);
    if (problem) throw new InvalidArgumentError(`[budget] assembly must be ${problem}`);
    return pointOf(settings.assembly as Assembly, spec, null);
  }
  throw new InvalidArgumentError(
    `[budget] a budget must be a number in (0, 1], 'full', a level, {latencyMs, metric}, {minQuality} or {spec: {assembly}}, got ${JSON.stringify(budget)}`,
  );
}

const speedPaths = new WeakMap<ElasticPolicy, readonly LevelPoint[]>();

/** The path for speed of a model with modules, found once: calls choose on it. */
function speedPath(spec: Seq2SeqSpec, policy: ElasticPolicy): readonly LevelPoint[] {
  let path = speedPaths.get(policy);
  if (!path) {
    path = assemblyPath(spec, policy.modules!, 'speed-first').map((assembly) => {
      const point = pointOf(assembly, spec, null);
      return { name: assemblyText(assembly), spec: point.spec, point };
    });
    speedPaths.set(policy, path);
  }
  return path;
}

function pointOf({ encoder, decoder }: Assembly, spec: Seq2SeqSpec, level: string | null): OperatingPoint {
  const assembly = { encoder, decoder };
  if (assemblyText(assembly) === assemblyText(backboneOf(spec))) return fullPoint(level);
  const counts = stacks.map((stack) => `${assembly[stack].length} of ${spec[stack].layers} layers of the ${stack}`);
  return {
    ...fullPoint(level),
    ...{ spec: { assembly }, full: false, flopsRatio: assemblyRatio(spec, assembly) },
    why: `${counts.join(', ')}: ${assemblyText(assembly)}, for ${typicalLengths.source} tokens read and ${typicalLengths.target} written`,
  };
}
