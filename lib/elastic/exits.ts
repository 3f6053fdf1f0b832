// Exits of a classifier (COST-EFF, arXiv 2210.15523): heads after inner layers, and the rules by which a text's class is decided there.
import type { ModelSpec } from '../model/spec.js';

/**
 * When a text leaves at an exit, by the softmax p of its head: `entropy` -sum p ln p (nats) is below the threshold; `margin`, the largest
 * p less the second, or `maxprob`, the largest p, is above it; `patience`: so many exits in a row named the class of the one before
 * (PABEE, arXiv 2006.04152).
 */
export type ExitRuleName = 'entropy' | 'margin' | 'maxprob' | 'patience';
export const exitRules: readonly ExitRuleName[] = ['entropy', 'margin', 'maxprob', 'patience'];

/** A head after a layer, and what decides there unless a call says otherwise. */
export interface Exit {
  /** It reads the residual stream after this layer; not the last one, after which the classifier is. */
  afterLayer: number;
  rule: ExitRuleName;
  threshold: number;
}

/** What decides at all exits of a call. */
export interface ExitRule {
  rule: ExitRuleName;
  threshold: number;
  /** Exits after earlier layers are not used. Default 0. */
  minLayer?: number;
}

/** One rule for all exits, or `true`: what the model has for each. */
export type ExitSetting = ExitRule | true;

/** A head: class scores before softmax are `weight tanh(h) + bias` of the features h of a text's first token. */
export interface ExitHead extends Exit {
  /** f32 [classes, hidden] */
  weight: Float32Array;
  /** f32 [classes] */
  bias: Float32Array;
}

/** `exits.{layer}`, the name of a head in files and programs. */
export const exitId = (afterLayer: number): string => `exits.${afterLayer}`;

/** What is wrong with a threshold of a rule, or null. */
export function thresholdProblem(rule: ExitRuleName, threshold: unknown): string | null {
  if (rule !== 'patience') return Number.isFinite(threshold) ? null : 'a finite number';
  return Number.isSafeInteger(threshold) && (threshold as number) >= 1 ? null : 'a positive integer, of exits';
}

/** Why a model has no exits, or null. */
export function exitsProblem({ encoder, layers, type }: Pick<ModelSpec, 'encoder' | 'layers' | 'type'>): string | null {
  if (encoder?.task !== 'sequence-classification' || encoder.scores !== 'softmax' || encoder.labels.length < 2) {
    return `absent: exits are for encoders that choose one of several classes, and this is a ${type} model for ${encoder?.task ?? 'causal-lm'}`;
  }
  return layers < 2 ? 'absent: the model has one layer' : null;
}

/** What is wrong with an exit setting of a call or a level for a model with `exits`, or null. */
export function settingProblem(setting: unknown, exits: readonly Exit[] | undefined): string | null {
  if (!exits) return 'absent: the model has no exits';
  if (setting === true) return null;
  if (typeof setting !== 'object' || setting === null) return `true or { rule, threshold }, got ${shown(setting)}`;
  const { rule, threshold, minLayer = 0, ...rest } = setting as ExitRule;
  const [unknown] = Object.keys(rest);
  if (unknown !== undefined) return `{ rule, threshold, minLayer }, got ${unknown}`;
  if (!exitRules.includes(rule)) return `of a rule among ${exitRules.join(', ')}, got ${shown(rule)}`;
  const bad = thresholdProblem(rule, threshold);
  if (bad) return `of a threshold of ${rule} that is ${bad}, got ${shown(threshold)}`;
  if (Number.isSafeInteger(minLayer) && minLayer >= 0) return null;
  return `of a minLayer that is a layer's id, got ${shown(minLayer)}`;
}

/** As the command line takes it: `entropy:0.3`, `patience:2:3`, which uses exits from layer 3 on; `own` for what the model has. */
export const exitText = (setting: ExitSetting): string =>
  setting === true
    ? 'own'
    : [setting.rule, setting.threshold, ...(setting.minLayer === undefined ? [] : [setting.minLayer])].join(':');

const shown = (value: unknown): string => (typeof value === 'number' ? String(value) : JSON.stringify(value));

/** Exits at which a text can leave at a setting without a problem, and those before them whose heads it takes to decide. */
export function usableExits(setting: ExitSetting, exits: readonly Exit[]): Exit[] {
  const used =
    setting === true
      ? exits
      : exits
          .filter(({ afterLayer }) => afterLayer >= (setting.minLayer ?? 0))
          .map(({ afterLayer }) => ({ afterLayer, rule: setting.rule, threshold: setting.threshold }));
  const last = used.findLastIndex(({ rule, threshold }, i) => {
    if (rule === 'entropy') return threshold > 0;
    return rule === 'patience' ? threshold <= i : threshold < 1;
  });
  return used.slice(0, last + 1);
}

/** What a text has been through: the class that the last exit named, and how many exits in a row named that of the one before. */
export interface ExitState {
  readonly best: number;
  readonly agreed: number;
}

/**
 * The number that a rule compares with its threshold, from the scores [classes] of an exit's head and what was before it; null at
 * the first one.
 */
export function measureExit(
  rule: ExitRuleName,
  scores: Float32Array,
  before: ExitState | null,
): ExitState & { value: number } {
  const largest = Math.max(...scores);
  const best = scores.indexOf(largest);
  const agreed = before?.best === best ? before.agreed + 1 : 0;
  const measured = (value: number) => ({ best, agreed, value });
  if (rule === 'patience') return measured(agreed);
  // Logarithms of p, of which none is minus infinity: p ln p is 0, not NaN, where p underflows.
  const total = Math.log(scores.reduce((sum, score) => sum + Math.exp(score - largest), 0));
  const logs = Array.from(scores, (score) => score - largest - total);
  if (rule === 'entropy') return measured(-logs.reduce((sum, log) => sum + Math.exp(log) * log, 0));
  if (rule === 'maxprob') return measured(Math.exp(logs[best]));
  const second = Math.max(...logs.filter((_, i) => i !== best));
  return measured(Math.exp(logs[best]) - Math.exp(second));
}

/** Whether a text leaves at a value of `measureExit`. */
export function leavesAt({ rule, threshold }: Pick<Exit, 'rule' | 'threshold'>, value: number): boolean {
  if (rule === 'entropy') return value < threshold;
  return rule === 'patience' ? value >= threshold : value > threshold;
}

/** What a text is in after an exit, and whether it leaves there. */
export function decideExit(
  exit: Exit,
  scores: Float32Array,
  before: ExitState | null,
): ExitState & { leaves: boolean } {
  const { value, ...state } = measureExit(exit.rule, scores, before);
  return { ...state, leaves: leavesAt(exit, value) };
}
