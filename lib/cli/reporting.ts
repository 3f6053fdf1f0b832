// What `demo` and `report` share: measuring a model, reading how it was trained, and writing the report.
import { existsSync } from 'node:fs';
import { readdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { axes, axisTraits, expertAxes, isExperts, specByAxis } from '../elastic/axes.js';
import type { Budget, OperatingPoint } from '../elastic/budget.js';
import { type ElasticPolicy, routedLayers, routerCapacities, routerPlaces } from '../elastic/policy.js';
import { promptIds } from '../infer/engine/generate.js';
import type { ElasticModel } from '../infer/model.js';
import { type Baseline, type EvalLevel, type EvalReport, evaluate, isElastic } from '../infer/quality/evaluate.js';
import { median } from '../infer/quality/statistics.js';
import { type ElasticTrace, expertShares } from '../infer/trace.js';
import { FileSystemError, inFileSystem, replaceDirectory } from '../io/files.js';
import { InvalidFileError } from '../native/errors.js';
import { loadAddon } from '../native/index.js';
import {
  type LevelResult,
  levelsCsv,
  type PerLayer,
  qualityChart,
  type ReportData,
  type RouterMap,
  reportHtml,
  type Sample,
} from '../report/index.js';
import type { CommandContext } from './command.js';
import { machineLine } from './doctor.js';
import { levelTable } from './eval.js';
import { Progress } from './progress.js';

const sampledTokens = 100;

export interface MeasureOptions {
  /** Levels are given by name, shares by number; 1 comes first. */
  readonly budgets: readonly (number | string)[];
  /** Null: only texts are generated. */
  readonly data: { readonly name: string; readonly heldOut: string[]; readonly calibration?: string[] } | null;
  readonly prompt: string;
  readonly seed: number;
  readonly limit?: number;
  readonly sequenceLength?: number;
}

export interface Measurements extends Pick<ReportData, 'evaluation' | 'routing' | 'samples' | 'notes'> {
  /** As evaluated, with what the report leaves out. */
  readonly evaluated: EvalReport | null;
}

/** A prompt: how a text begins. */
export function firstWords(text: string): string {
  const words = text.trimStart().split(/(?<=\s)/);
  return words.slice(0, 8).join('').trimEnd();
}

/** Evaluates a model at budgets and against baselines, and generates texts; prints the table of levels. */
export async function measureModel(
  context: CommandContext,
  model: ElasticModel,
  { budgets, data, prompt, seed, limit = 8192, sequenceLength = 256 }: MeasureOptions,
): Promise<Measurements> {
  const { signal } = context;
  const length = Math.min(sequenceLength, model.network.maxContext);
  const { policy } = model.network;
  const own = policy?.calibration ? 'routed' : 'nested';
  // Narrower feed-forwards leave nothing to choose at random.
  const baselines: Baseline[] = policy?.nested ? ['drop'] : ['random', 'drop'];
  const progress = new Progress('evaluate');
  const evaluated =
    data &&
    (await evaluate(model, {
      ...{ data: data.heldOut, budgets, baselines, sequenceLength: length, limit, seed, signal },
      ...(data.calibration && { calibration: data.calibration }),
      onProgress: progress.phase,
    }).finally(() => progress.finish()));
  if (evaluated && !context.json) context.print(`\n${levelTable(evaluated.levels)}`);

  const sampled = sampleBudgets(model, budgets, length);
  const writing = new Progress('generate');
  const samples: Sample[] = [];
  const traced: RouterMap[] = [];
  for (const [i, budget] of sampled.entries()) {
    writing.update({ done: i, total: sampled.length, facts: [`budget ${budget}`] });
    const { sample, trace, point } = await sampleText(model, prompt, budget, seed, signal);
    samples.push(sample);
    if (!point.full) traced.push({ budget, measured: shares(trace), target: targets(model, point) });
  }
  writing.finish();

  const maps = evaluated?.levels
    .filter((l) => isElastic(l.method))
    .map((l) => ({
      budget: l.budget as number | string,
      measured: layerShares(l),
      target: targets(model, model.resolve(l.budget, { length })),
    }));
  return {
    evaluated,
    evaluation: evaluated && {
      ...{ data: data!.name, tokens: evaluated.tokens, sequences: evaluated.sequences },
      levels: evaluated.levels.map((level) => levelResult(level, own)),
    },
    routing: maps
      ? { on: `${data!.name}, ${evaluated!.tokens} tokens`, maps }
      : { on: 'the texts below, prompts included', maps: traced },
    samples,
    notes: [...expertNotes(model), ...notes(evaluated, policy)],
  };
}

/** Full, and of the others those nearest to 0.75 and 0.5 of the FLOPs. */
function sampleBudgets(model: ElasticModel, budgets: readonly (number | string)[], length: number) {
  const points = budgets.map((budget) => ({ budget, point: model.resolve(budget, { length }) }));
  const below = points.filter(({ point }) => !point.full);
  const nearest = (ratio: number) =>
    below.toSorted((a, b) => Math.abs(a.point.flopsRatio - ratio) - Math.abs(b.point.flopsRatio - ratio)).slice(0, 1);
  return [...new Set([1, ...[...nearest(0.75), ...nearest(0.5)].map(({ budget }) => budget)])];
}

async function sampleText(
  model: ElasticModel,
  prompt: string,
  budget: number | string,
  seed: number,
  signal: AbortSignal,
): Promise<{ sample: Sample; trace: ElasticTrace; point: OperatingPoint }> {
  const stream = model.generate(prompt, { budget, maxTokens: sampledTokens, temperature: 0.7, seed, signal });
  const { inputTokens, compute } = await stream.usage;
  signal.throwIfAborted();
  // Generation may end one token after the context does.
  const ids = [...promptIds(model.network, prompt), ...(await stream.ids)].slice(0, model.network.maxContext);
  const asRun: Budget = { spec: compute.effective };
  const trace = await model.trace(ids, { budget: asRun, signal });
  const { depth: _, tokens, ...layers } = trace.toJSON();
  const sample: Sample = {
    label: budget === 1 ? 'Full budget' : typeof budget === 'number' ? `Budget ${budget}` : `Level ${budget}`,
    ...{ prompt, text: await stream.text, ratio: compute.ratio, tokensPerSecond: compute.tokensPerSecond ?? 0 },
    trace: { tokens, promptTokens: inputTokens, ...layers },
  };
  return { sample, trace, point: model.resolve(asRun, { length: ids.length }) };
}

function shares({ tokens, layers, attn, mlp, headShare, blockShare }: ElasticTrace): PerLayer<number> {
  const share = (bits: Uint8Array): number[] =>
    Array.from({ length: layers }, (_, l) => tokens.filter((_, t) => bits[t * layers + l]).length / tokens.length);
  const times = (entered: number[], used: Float32Array) => entered.map((s, l) => s * used[l]);
  return { attn: times(share(attn), headShare), mlp: times(share(mlp), blockShare) };
}

const layerShares = ({ layersRun }: EvalLevel): PerLayer<number> => ({
  attn: [...layersRun.attn],
  mlp: [...layersRun.mlp],
});

/** As ComputeReport counts: share of tokens, times the share of experts where it is cut. */
function targets(model: ElasticModel, point: OperatingPoint): PerLayer<number | null> {
  const { policy } = model.network;
  const none = (): (number | null)[] => new Array(model.info.layers).fill(null);
  const target = { attn: none(), mlp: none() };
  if (!policy) return target;
  const capacities = routerCapacities(policy, specByAxis(point.spec));
  const experts = expertShares(model.network, point);
  for (const [i, { layer, places, axis }] of routerPlaces(policy).entries()) {
    for (const place of places)
      target[place][layer] = (target[place][layer] ?? 1) * (isExperts(axis) ? experts[place][layer] : capacities[i]);
  }
  return target;
}

function levelResult(level: EvalLevel, own: 'routed' | 'nested'): LevelResult {
  const { ratio, share, perplexity, bitsPerByte, kl, agreement, tokensPerSecond, timeRatio } = level;
  return {
    method: level.method === 'full' ? own : level.method,
    budget: level.method === 'full' ? 1 : (level.budget as number | string),
    ...{ ratio, share, perplexity, bitsPerByte, kl, agreement, tokensPerSecond, timeRatio },
    layers: layerShares(level),
  };
}

const expertNotes = ({ network: { policy } }: ElasticModel): string[] =>
  expertAxes
    .filter((axis) => policy?.[axis])
    .map(
      (axis) =>
        `Where tokens choose ${axis} of ${axis === 'heads' ? 'attention' : 'an FFN'}, the share of tokens is times the share of ${axis} that they use, and so is its part in a token’s colour.`,
    );

function notes(evaluated: EvalReport | null, policy: ElasticPolicy | null): string[] {
  const sampling = 'The generated text was drawn with a fixed seed, not chosen.';
  const causal =
    'The elastic model chooses tokens causally, by thresholds calibrated on training text, as generation does; the share it achieves on other text may differ a little from the share asked for.';
  const slices =
    'Feed-forwards run with a prefix of their units, chosen for each layer by the budget; the same weights serve every width.';
  const how = [...(policy?.nested ? [slices] : []), ...(policy?.calibration ? [causal] : [])];
  if (!evaluated) return [...how, sampling];
  const random =
    'The random baseline gets the same share of tokens in every sub-layer, chosen afresh for every batch: it shows what the choice of tokens is worth. ';
  return [
    'FLOPs are counted by the kernels from the rows and units they really ran, routers included; the loss of the evaluation is not counted.',
    ...how,
    `${policy?.nested ? '' : random}The dropping baseline leaves out whole sub-layers, in the order that hurts least on calibration text; of the two such models around the compute in question each gets a share of the sequences, so that the mean is the same. No baseline is trained.`,
    `Speed is the median of repeated prefills of packed sequences of ${evaluated.sequenceLength} tokens on the machine named above; the share of time is against the full model, run in turns with the other.`,
    `Intervals are 95 %, from a bootstrap over sequences. ${sampling}`,
  ];
}

/**
 * How a model was trained, from the metrics.jsonl of its directory.
 *
 * @throws InvalidFileError when the file is missing, damaged or holds no training step.
 */
export async function readTraining(dir: string): Promise<ReportData['training']> {
  const path = join(dir, 'metrics.jsonl');
  const text = await readFile(path, 'utf8').catch((cause) => {
    throw new InvalidFileError(
      `[report] ${path} cannot be read; expected a directory written by \`elastiform distill\``,
      { cause },
    );
  });
  const points: { step: number; loss: number }[] = [];
  const evaluations: ReportData['training']['evaluations'][number][] = [];
  const rates: number[] = [];
  for (const [i, line] of text.split('\n').entries()) {
    if (line.trim() === '') continue;
    const event = parseEvent(line);
    if (!event) throw new InvalidFileError(`[report] ${path}, line ${i + 1} is not an event of a training run`);
    if (event.type === 'eval') evaluations.push({ step: event.step, levels: event.levels });
    if (event.type !== 'step') continue;
    // JSON has no NaN: such a step is null.
    points.push({ step: event.step, loss: event.loss ?? Number.NaN });
    rates.push(event.tokensPerSecond);
  }
  const last = points.at(-1);
  if (!last) throw new InvalidFileError(`[report] ${path} records no training step; train with \`elastiform distill\``);
  return { steps: last.step, seconds: null, tokensPerSecond: median(rates), points, evaluations };
}

type Event =
  | { type: 'step'; step: number; loss: number | null; tokensPerSecond: number }
  | { type: 'eval'; step: number; levels: Record<string, Record<string, number>> }
  | { type: 'warn' };

function parseEvent(line: string): Event | null {
  try {
    const { type, step, loss, tokensPerSecond, levels } = JSON.parse(line);
    const isMetrics = (level: unknown): boolean =>
      typeof level === 'object' && level !== null && Object.values(level).every((v) => typeof v === 'number');
    if (type === 'warn') return { type };
    if (!Number.isInteger(step)) return null;
    if (type === 'step' && (loss === null || typeof loss === 'number') && typeof tokensPerSecond === 'number')
      return { type, step, loss, tokensPerSecond };
    if (type === 'eval' && typeof levels === 'object' && levels && Object.values(levels).every(isMetrics))
      return { type, step, levels };
  } catch {}
  return null;
}

/** Puts a report together. `started`: performance.now() when the work began. */
export function reportOf(
  name: string,
  model: ElasticModel,
  training: ReportData['training'],
  { evaluation, routing, samples, notes }: Measurements,
  started: number,
): ReportData {
  const { architecture, parameters, layers, hidden, routerParameters } = model.info;
  return {
    title: `${name}, made elastic`,
    version: loadAddon().info().version,
    created: new Date().toISOString(),
    machine: machineLine(),
    model: { name, architecture, parameters, layers, hidden },
    elastic: {
      trainable: routerParameters,
      share: routerParameters / parameters,
      places: routersOf(model),
    },
    ...{ training, evaluation, routing, samples, notes },
    seconds: (performance.now() - started) / 1000,
  };
}

function routersOf({ network: { policy } }: ElasticModel): string {
  const parts = axes.flatMap((axis) => {
    const layers = policy ? routedLayers(policy, axis).length : 0;
    return layers > 0 ? [`${axisTraits[axis].title} of ${layers} layers`] : [];
  });
  const nested = policy?.nested ? [`nested feed-forwards of ${policy.nested.layers.length} layers`] : [];
  return [...(parts.length > 0 ? [`routers for ${parts.join(', ')}`] : []), ...nested].join('; ');
}

/** report.json, report.html and, where quality was measured, chart.svg and levels.csv. */
export async function writeReport(dir: string, report: ReportData): Promise<void> {
  const files: Record<string, string> = {
    'report.json': `${JSON.stringify(report, null, 2)}\n`,
    'report.html': reportHtml(report),
    ...(report.evaluation && {
      'chart.svg': qualityChart(report),
      'levels.csv': levelsCsv(report.evaluation.levels),
    }),
  };
  for (const [name, content] of Object.entries(files)) {
    const path = join(dir, name);
    await inFileSystem('write', path, () => writeFile(path, content));
  }
}

/**
 * Makes a directory with a report as a whole.
 *
 * @throws FileSystemError when `out` is there and holds something else than a report; otherwise as replaceDirectory.
 */
export async function replaceReport<T>(api: string, out: string, write: (dir: string) => Promise<T>): Promise<T> {
  if (existsSync(out)) {
    const names = await readdir(out).catch((cause) => {
      throw new FileSystemError(`[${api}] ${out} is not a directory that can be read`, cause);
    });
    if (names.length > 0 && !names.includes('report.json'))
      throw new FileSystemError(`[${api}] ${out} exists and holds no report; choose another directory with --out`);
  }
  return await replaceDirectory(api, out, write);
}
