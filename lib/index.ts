// The public API of elastiform.
export { type CacheTeacherOptions, cacheTeacher } from './distill/cache.js';
export type { DataSource } from './distill/data.js';
export { type DistillConfig, distill } from './distill/distill.js';
export type { OptimizerConfig, TrainConfig, TrainEvent, TrainResult } from './distill/events.js';
export type { LossTerm } from './distill/objectives.js';
export { type PretrainConfig, pretrain } from './distill/pretrain.js';
export type { TeacherConfig } from './distill/teacher.js';
export { DivergedError } from './distill/trainer.js';
export type { Axis, Capacity, ElasticSpec } from './elastic/axes.js';
export type { Budget, BudgetContext, OperatingPoint } from './elastic/budget.js';
export {
  type ElasticPlan,
  type ElastiformerRecipe,
  elastify,
  type Recipe,
  type TrainCapacity,
} from './elastic/elastify.js';
export type { AttentionKeys, GateMode, Level } from './elastic/policy.js';
export {
  type DeviceProfile,
  type LatencyMetric,
  type LevelTimes,
  type MeasuredOn,
  writeProfile,
} from './elastic/profile.js';
export type { ExpertGate } from './graph/ops/expert.js';
export {
  type Baseline,
  type EvalDocument,
  type EvalLevel,
  type EvalOptions,
  type EvalReport,
  evaluate,
} from './infer/evaluate.js';
export { type MergeOptions, type MergeResult, mergeAdapter } from './infer/merge.js';
export { type ElasticModel, loadModel } from './infer/model.js';
export { type ProfileOptions, profile } from './infer/profile.js';
export { recordQuality } from './infer/quality.js';
export { getRuntime } from './infer/runtime.js';
export type { Measured } from './infer/statistics.js';
export type { ElasticTrace } from './infer/trace.js';
export type {
  ComputeReport,
  Dtype,
  FinishReason,
  GenerateChunk,
  GenerateOptions,
  GenerateStream,
  LoadOptions,
  ModelInfo,
  Sampling,
  ScoreResult,
  Usage,
} from './infer/types.js';
export { FileSystemError } from './io/files.js';
export type { NativeInfo } from './native/addon.js';
export type { Activations, DeviceChoice } from './native/engine.js';
export * from './native/errors.js';
export { agreementChart, levelsCsv, lineChart, qualityChart, type ReportData, reportHtml } from './report/index.js';
