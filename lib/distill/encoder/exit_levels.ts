// Thresholds of exits, calibrated on held-out texts to what calls may cost or must reach, and kept as levels.
import { type Exit, type ExitRule, type ExitRuleName, exitRules, leavesAt, measureExit } from '../../elastic/exits.js';
import { type Level, type QualityValue, qualityMetric } from '../../elastic/policy.js';
import { writeLevels } from '../../elastic/store.js';
import { loadModel } from '../../infer/model.js';
import { type Measured, shareOf } from '../../infer/quality/statistics.js';
import type { LoadOptions, TextInput } from '../../infer/types.js';
import { encoderFlops } from '../../model/flops.js';
import type { EncoderSpec } from '../../model/spec.js';
import { InvalidArgumentError } from '../../native/errors.js';
import { checkKeys } from '../trainer.js';
import { BadRows, type ExampleSource, readExamples, targetOf } from './examples.js';

/** What `calibrateExits` takes. */
export interface CalibrateConfig {
  /** Held-out labelled texts, which nothing was trained on. */
  data: ExampleSource;
  /** Shares of the full model's FLOPs, each a level `exit50` for 0.5: the most that is within it on these texts. */
  compute?: readonly number[];
  /**
   * Shares of texts whose class is the full model's, each a level `same98` for 0.98: the cheapest that reaches it by the lower end of the
   * 95 % interval. Default, where `compute` is absent, too: 0.98.
   */
  quality?: readonly number[];
  /** Default 'entropy'. */
  rule?: ExitRuleName;
  /** Exits after earlier layers are not used. Default 0. */
  minLayer?: number;
  /** At a bad row, or a label that the model has not: stop (default), or leave it out and count it. */
  badRows?: 'stop' | 'skip';
  /** Where it runs; default as `loadModel`. */
  device?: LoadOptions['device'];
  threads?: number;
  /** Called as texts are read: what is being done, and how many are. */
  onProgress?: (event: { phase: string; done: number; total: number }) => unknown;
  /** Stops the work; the promise rejects with the signal's reason, and nothing is written. */
  signal?: AbortSignal;
}

/** A level that was calibrated. */
export interface CalibratedLevel {
  name: string;
  exit: ExitRule;
  /** FLOPs over those of the full model, of all texts together. */
  ratio: number;
  /** Share of texts whose class is the full model's, and whose class is right. */
  agreement: Measured;
  accuracy: Measured;
  /** Share of texts that leave after each layer; at the last one, those that ran all. [layers] */
  left: number[];
}

/** What `calibrateExits` found and wrote. */
export interface CalibrateResult {
  dir: string;
  texts: number;
  /** Texts that were cut to the context. */
  truncated: number;
  /** Rows that were left out, and why the first ones were. */
  bad: { count: number; named: string[] };
  /** Of the full model. */
  accuracy: Measured;
  /** The costliest first. */
  levels: CalibratedLevel[];
}

/** Thresholds tried at most. */
const candidates = 400;
/** Texts between two reports of progress. */
const chunkTexts = 512;

/** A text at every usable exit: what its rule measures, whether the class is the full model's and right, FLOPs up to there. */
interface Walk {
  readonly values: Float64Array;
  /** The full model's last. */
  readonly same: boolean[];
  readonly right: boolean[];
  readonly flops: number[];
  readonly full: number;
}

/**
 * Measures at which exit each held-out text would leave by every threshold of a rule, chooses thresholds by what they cost and keep,
 * and writes them as levels of the directory; earlier levels with exits are replaced.
 *
 * @throws InvalidArgumentError when the model has no exits, a value is out of range or cannot be reached on these texts (the message says
 * what can be); InvalidDataError for bad rows; errors of `loadModel` and of writing.
 */
export async function calibrateExits(dir: string, config: CalibrateConfig): Promise<CalibrateResult> {
  const { rule, minLayer, compute, quality } = checked(config);
  const { badRows, device, threads, onProgress, signal } = config;
  const bad = new BadRows('calibrate', badRows === 'skip');
  const examples = await readExamples(config.data, bad);
  const options = { ...(device && { device }), ...(threads && { threads }), ...(signal && { signal }) };
  await using model = await loadModel(dir, options);
  const { labels, levels: before } = model.info;
  const { policy, spec } = model.encoder.network;
  const exits = (policy?.exits ?? []).filter(({ afterLayer }) => afterLayer >= minLayer);
  if (exits.length === 0) {
    const why = policy?.exits ? `after layer ${minLayer} or a later one` : 'at all';
    throw new InvalidArgumentError(`[calibrate] ${dir} has no exits ${why}`);
  }
  const usable = examples.flatMap(({ text, pair, label, at }) => {
    const target = targetOf(label, { kind: 'classes', labels });
    if (typeof target === 'string') bad.refuse(at, target);
    const input: TextInput = pair === undefined ? text : [text, pair];
    return typeof target === 'number' ? [{ input, target }] : [];
  });
  const skipped = policy!.exits!.length - exits.length;
  const walks: Walk[] = [];
  let truncated = 0;
  for (let start = 0; start < usable.length; start += chunkTexts) {
    await onProgress?.({ phase: 'texts', done: start, total: usable.length });
    const chunk = usable.slice(start, start + chunkTexts);
    for await (const batch of model.encoder.exitScores(
      chunk.map(({ input }) => input),
      { ...(signal && { signal }) },
    )) {
      for (const { index, tokens, truncated: cut, scores } of batch) {
        walks.push(walkOf(spec, rule, exits, scores.slice(skipped), tokens, chunk[index].target));
        if (cut > 0) truncated++;
      }
    }
  }
  if (walks.length === 0) throw new InvalidArgumentError('[calibrate] there is no text with a label of the model');
  const points = thresholdsOf(rule, exits.length, walks).map((threshold) => pointOf(walks, { rule, threshold }));
  const exitOf = (threshold: number): ExitRule => ({ rule, threshold, ...(minLayer > 0 && { minLayer }) });
  const chosen = [
    ...compute.map((share) => ({ name: `exit${percent(share)}`, point: within(points, share) })),
    ...quality.map((share) => ({ name: `same${percent(share)}`, point: reaching(points, share, walks.length) })),
  ];
  const levels = chosen
    .map(({ name, point: { threshold, ratio, agreement, accuracy, exitCounts } }): CalibratedLevel => {
      const left = new Array<number>(spec.layers).fill(0);
      exitCounts.forEach((count, e) => {
        left[exits[e]?.afterLayer ?? spec.layers - 1] = count / walks.length;
      });
      return { name, exit: exitOf(threshold), ratio, agreement, accuracy, left };
    })
    .sort((a, b) => b.ratio - a.ratio);
  const kept = before.filter(({ spec }) => spec.exit === undefined);
  signal?.throwIfAborted();
  await writeLevels(dir, [...kept, ...levels.map((level) => savedLevel(level, walks.length))]);
  const full = walks.filter(({ right }) => right.at(-1)).length;
  return {
    ...{ dir, texts: walks.length, truncated, bad: { count: bad.count, named: bad.named } },
    ...{ accuracy: shareOf(full, walks.length), levels },
  };
}

const percent = (share: number): number => Math.round(share * 1e4) / 100;

function checked(
  config: CalibrateConfig,
): Required<Pick<CalibrateConfig, 'rule' | 'minLayer' | 'compute' | 'quality'>> {
  const fail = (what: string): never => {
    throw new InvalidArgumentError(`[calibrate] ${what}`);
  };
  checkKeys('calibrate', 'option', config, [
    ...['data', 'compute', 'quality', 'rule', 'minLayer', 'badRows', 'device', 'threads', 'onProgress', 'signal'],
  ]);
  const { compute = [], quality = config.compute ? [] : [0.98], rule = 'entropy', minLayer = 0, badRows } = config;
  for (const [name, shares] of Object.entries({ compute, quality })) {
    const good = Array.isArray(shares) && shares.every((share) => typeof share === 'number' && share > 0 && share < 1);
    if (!good) fail(`${name} must be shares in (0, 1), got ${JSON.stringify(shares)}`);
    if (new Set(shares.map(percent)).size < shares.length) fail(`${name} has a share twice: ${shares.join(', ')}`);
  }
  if (compute.length + quality.length === 0) fail('there is nothing to calibrate to: give compute or quality');
  if (!exitRules.includes(rule)) fail(`rule must be one of ${exitRules.join(', ')}, got ${JSON.stringify(rule)}`);
  if (!Number.isSafeInteger(minLayer) || minLayer < 0) fail(`minLayer must be a layer's id, got ${String(minLayer)}`);
  if (!['stop', 'skip', undefined].includes(badRows)) fail(`badRows must be 'stop' or 'skip', got ${String(badRows)}`);
  return { rule, minLayer, compute, quality };
}

/** @param scores of the usable exits, then of the classifier */
function walkOf(
  spec: EncoderSpec,
  rule: ExitRuleName,
  exits: readonly Exit[],
  scores: readonly Float32Array[],
  tokens: number,
  target: number,
): Walk {
  const best = scores.map((own) => own.indexOf(Math.max(...own)));
  const values = new Float64Array(exits.length);
  let state: { best: number; agreed: number } | null = null;
  for (let e = 0; e < exits.length; e++) {
    const measured = measureExit(rule, scores[e], state);
    values[e] = measured.value;
    state = measured;
  }
  const head = encoderFlops(spec, [tokens], 'exit', { to: 0 }) - encoderFlops(spec, [tokens], 'none', { to: 0 });
  const upTo = exits.map(
    ({ afterLayer }, e) => encoderFlops(spec, [tokens], 'none', { to: afterLayer + 1 }) + (e + 1) * head,
  );
  const full = encoderFlops(spec, [tokens], 'head');
  return {
    values,
    same: best.map((own) => own === best.at(-1)),
    right: best.map((own) => own === target),
    flops: [...upTo, full + exits.length * head],
    full,
  };
}

/** Thresholds that tell the texts apart: between neighbours among what they measure, ascending. */
function thresholdsOf(rule: ExitRuleName, exits: number, walks: readonly Walk[]): number[] {
  if (rule === 'patience') return Array.from({ length: exits - 1 }, (_, i) => i + 1);
  const all = Float64Array.from(walks.flatMap(({ values }) => [...values])).sort();
  const distinct = all.filter((value, i) => i === 0 || value > all[i - 1]);
  const count = Math.min(candidates, distinct.length - 1);
  const between = Array.from({ length: count }, (_, i) => {
    const at = Math.floor(((i + 0.5) / count) * (distinct.length - 1));
    return (distinct[at] + distinct[at + 1]) / 2;
  });
  // All leave at the first exit, too: beyond what any text measures.
  const beyond = rule === 'entropy' ? distinct[distinct.length - 1] * 1.01 : distinct[0] * 0.99 - 1e-6;
  return [...new Set([...between, beyond])].sort((a, b) => a - b);
}

interface ThresholdPoint {
  readonly threshold: number;
  readonly ratio: number;
  readonly agreement: Measured;
  readonly accuracy: Measured;
  /** Texts that leave at each usable exit, then those that run all layers. */
  readonly exitCounts: number[];
}

function pointOf(walks: readonly Walk[], rule: Pick<Exit, 'rule' | 'threshold'>): ThresholdPoint {
  let [flops, full, same, right] = [0, 0, 0, 0];
  const exitCounts = new Array<number>(walks[0].flops.length).fill(0);
  for (const walk of walks) {
    const found = walk.values.findIndex((value) => leavesAt(rule, value));
    const at = found < 0 ? walk.values.length : found;
    exitCounts[at]++;
    flops += walk.flops[at];
    full += walk.full;
    same += walk.same[at] ? 1 : 0;
    right += walk.right[at] ? 1 : 0;
  }
  const n = walks.length;
  return {
    ...{ threshold: rule.threshold, ratio: flops / full, agreement: shareOf(same, n), accuracy: shareOf(right, n) },
    exitCounts,
  };
}

/** The most that is within a share of FLOPs; of those that cost the same, what keeps most. */
function within(points: readonly ThresholdPoint[], share: number): ThresholdPoint {
  const fitting = points.filter(({ ratio }) => ratio <= share);
  if (fitting.length > 0) {
    return fitting.reduce((a, b) =>
      b.ratio > a.ratio || (b.ratio === a.ratio && b.agreement.value > a.agreement.value) ? b : a,
    );
  }
  const least = Math.min(...points.map(({ ratio }) => ratio));
  throw new InvalidArgumentError(
    `[calibrate] compute ${share} cannot be reached: these exits take at least ${least.toFixed(3)} of the FLOPs`,
  );
}

/** The least compute that is the full model's class for a share of texts, by the lower end of the interval. */
function reaching(points: readonly ThresholdPoint[], share: number, texts: number): ThresholdPoint {
  const fitting = points.filter(({ agreement, ratio }) => agreement.low >= share && ratio < 1);
  if (fitting.length > 0) return fitting.reduce((a, b) => (b.ratio < a.ratio ? b : a));
  const { low } = shareOf(texts, texts);
  throw new InvalidArgumentError(
    low < share
      ? `[calibrate] quality ${share} cannot be shown on ${texts} texts: even if all agree the interval begins at ${low.toFixed(4)}; give more texts`
      : `[calibrate] quality ${share} cannot be reached in fewer FLOPs than all: no threshold saves any and keeps it`,
  );
}

function savedLevel({ name, exit, ratio, agreement, accuracy }: CalibratedLevel, texts: number): Level {
  const saved = ({ value, low, high }: Measured): QualityValue => ({ value, lo: low, hi: high, n: texts });
  const quality = { [qualityMetric]: saved(agreement), accuracy: saved(accuracy) };
  return { name, spec: { exit }, flopsRatio: ratio, quality };
}
