// All op builders.
import type { Node } from '../graph.js';

export {
  type AttentionOptions,
  attention,
  attentionCached,
  type Cache,
  cacheAppend,
  type HeadOptions,
  pageCopy,
} from './attention.js';
export {
  activation,
  activationGrad,
  add,
  gatedActivation,
  gatedActivationGrad,
  scale,
  softcap,
  zeros,
} from './elementwise.js';
export { embedding } from './embedding.js';
export {
  type ExpertGate,
  type ExpertRule,
  type ExpertScores,
  expertBalance,
  expertCredit,
  expertGate,
  expertGates,
  expertRows,
  expertRules,
  heldWidth,
  type TileScores,
  tileScores,
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
  type DivergenceOptions,
  divergence,
  hiddenDistance,
  type TopLogits,
  topkDivergence,
  topLogits,
} from './loss.js';
export { type Act, activations, type DivergenceKind, divergenceKinds } from './names.js';
export { layerNorm, type NormOptions, rmsNorm } from './norm.js';
export { accumulate, adamw } from './optimizer.js';
export { type RopeOptions, rope } from './rope.js';
export { type GateModeCode, gate, type Routed, routeThreshold, routeTopk, topkBce, topkCredit } from './routing.js';
export { addRows, dot, gatherIds, gatherRows, scatterAdd, sumRows } from './rows.js';
export { sample } from './sample.js';
export { latch, segmentBroadcast, segmentMean } from './segments.js';
export { addScaled, gaussianTopk, rescaleRows, scaleColumns } from './streams.js';

/** The same value, through which no gradient flows. Costs nothing. */
export const stopGradient = (x: Node): Node => x.graph.alias(x);
