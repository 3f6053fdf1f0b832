// All op builders.
import type { Node } from '../graph.js';

export {
  type AttentionOptions,
  attention,
  attentionCached,
  type Cache,
  cacheAppend,
  type HeadOptions,
} from './attention.js';
export {
  type Act,
  activation,
  activationGrad,
  activations,
  add,
  gatedActivation,
  gatedActivationGrad,
  scale,
  zeros,
} from './elementwise.js';
export { embedding } from './embedding.js';
export {
  type ExpertGate,
  type ExpertRule,
  type ExpertScores,
  expertBalance,
  expertChoice,
  expertGate,
  expertGates,
  expertRules,
} from './expert.js';
export {
  type LinearAddOptions,
  type LinearGatedOptions,
  type LinearOptions,
  linear,
  linearAdd,
  linearDw,
  linearDx,
  linearGated,
  type Patch,
} from './linear.js';
export {
  type CrossEntropy,
  crossEntropy,
  type Divergence,
  type DivergenceKind,
  type DivergenceOptions,
  divergence,
  hiddenDistance,
  type TopLogits,
  topkDivergence,
  topLogits,
} from './loss.js';
export { layerNorm, type NormOptions, rmsNorm } from './norm.js';
export { accumulate, adamw } from './optimizer.js';
export { type RopeOptions, rope } from './rope.js';
export { type GateModeCode, gate, type Routed, routeThreshold, routeTopk, topkBce, topkCredit } from './routing.js';
export { dot, gatherIds, gatherRows, scatterAdd, sumRows } from './rows.js';
export { sample } from './sample.js';

/** The same value, through which no gradient flows. Costs nothing. */
export const stopGradient = (x: Node): Node => x.graph.alias(x);
