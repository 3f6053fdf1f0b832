/**
 * Makes a pretrained transformer elastic and runs it at budgets.
 *
 * @module elastiform
 */

// What TypeScript and the API reference read; index.ts is what runs.
export { type CacheTeacherOptions, cacheTeacher } from './distill/cache.js';
export type { DataSource } from './distill/data.js';
export { type DistillConfig, distill } from './distill/distill.js';
export type { Metric } from './distill/encoder/classifier.js';
export {
  type CostEffConfig,
  type CostEffModel,
  type CostEffResult,
  costEff,
  type StageConfig,
} from './distill/encoder/cost_eff.js';
export type { ExampleFields, ExampleSource } from './distill/encoder/examples.js';
export {
  type CalibrateConfig,
  type CalibratedLevel,
  type CalibrateResult,
  calibrateExits,
} from './distill/encoder/exit_levels.js';
export { type ExampleConfig, type FinetuneConfig, type FinetuneResult, finetune } from './distill/encoder/finetune.js';
export type { Allocation } from './distill/encoder/importance.js';
export {
  DivergedError,
  type OptimizerConfig,
  type TrainConfig,
  type TrainEvent,
  type TrainResult,
  type WarningCode,
} from './distill/events.js';
export type { LossTerm } from './distill/objectives.js';
export { type PretrainConfig, pretrain } from './distill/pretrain.js';
export { type ElastifyOptions, elastify } from './distill/rank.js';
export { type MeasuredAssembly, type ModularConfig, type ModularResult, modular } from './distill/seq2seq/modular.js';
export type { AssemblyQuality, ModuleLosses } from './distill/seq2seq/replacing.js';
export type { TeacherConfig } from './distill/teacher.js';
export type { WidthSampling } from './distill/widths.js';
export type { Axis, Capacity, ElasticSpec, ExpertAxis, Granularity, RowAxis, Target } from './elastic/axes.js';
export type { Budget, BudgetContext, OperatingPoint } from './elastic/budget.js';
export type {
  ElasticPlan,
  ElastiformerRecipe,
  HeadGroup,
  LoraRecipe,
  MatformerRecipe,
  Recipe,
  RouterTuningRecipe,
  TrainCapacity,
} from './elastic/elastify.js';
export { type TrainedModules, writeExits, writeModules } from './elastic/elastify.js';
export type { Exit, ExitHead, ExitRule, ExitRuleName, ExitSetting } from './elastic/exits.js';
export type { Lora } from './elastic/lora.js';
export type { Assembly, Modules, Span, Stack } from './elastic/modules.js';
export type { FfnWidth, Nested, NestedTraining } from './elastic/nested.js';
export type { AttentionKeys, GateMode, Level, QualityValue, Range } from './elastic/policy.js';
export {
  type BatchTimes,
  type DeviceProfile,
  type LatencyMetric,
  type LevelTimes,
  type MeasuredOn,
  writeProfile,
} from './elastic/profile.js';
export type { ExpertGate, ExpertRule } from './graph/ops/expert.js';
export type { EvalDocument } from './infer/batches.js';
export type { SequenceState } from './infer/engine/state.js';
export {
  type AssembledCheckpoint,
  type AssembleOptions,
  type AssembleResult,
  type AssemblyCost,
  assemble,
} from './infer/export/assemble.js';
export { type ExtractOptions, type ExtractResult, extract, type Layout } from './infer/export/extract.js';
export { type MergeOptions, type MergeResult, mergeAdapter } from './infer/export/merge.js';
export { type ExportSlimOptions, type ExportSlimResult, exportSlim } from './infer/export/slim.js';
export { type CallOptions, type ElasticModel, loadModel, type ScoreOptions } from './infer/model.js';
export { type ProfileOptions, profile } from './infer/profile.js';
export {
  type Baseline,
  type EvalLevel,
  type EvalOptions,
  type EvalReport,
  evaluate,
  type Method,
} from './infer/quality/evaluate.js';
export { recordQuality } from './infer/quality/quality.js';
export {
  recordSearch,
  type SearchConstraint,
  type SearchOptions,
  type SearchResult,
  search,
} from './infer/quality/search.js';
export { InfeasibleError, type SearchPoint } from './infer/quality/searched.js';
export type { Measured } from './infer/quality/statistics.js';
export { getRuntime } from './infer/runtime.js';
export type { ElasticTrace } from './infer/trace.js';
export type {
  BeamSampling,
  ClassifyOptions,
  ClassifyResult,
  ComputeReport,
  Dtype,
  EmbedOptions,
  EmbedResult,
  EncoderTask,
  FinishReason,
  GenerateChunk,
  GenerateOptions,
  GenerateStream,
  LoadOptions,
  ModelInfo,
  ModelLoad,
  Pooling,
  PrefillOptions,
  Sampling,
  ScoreResult,
  SpeculativeOptions,
  SpeculativeReport,
  TextInput,
  Usage,
} from './infer/types.js';
export { FileSystemError } from './io/files.js';
export type { LoraMatrices } from './io/peft.js';
export type { Place } from './model/select.js';
export type { NativeInfo } from './native/addon.js';
export type { Activations, DeviceChoice } from './native/engine.js';
export * from './native/errors.js';
export {
  agreementChart,
  type LevelResult,
  type Levels,
  type LineChartOptions,
  levelsCsv,
  lineChart,
  type PerLayer,
  type Point,
  qualityChart,
  type ReportData,
  type RouterMap,
  reportHtml,
  type Sample,
  type SampleTrace,
  type Series,
  type TrainingEvaluation,
  type TrainingPoint,
} from './report/index.js';
