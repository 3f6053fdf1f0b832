// The public API as it runs. Importing it takes milliseconds: functions that work with models load what they need at their
// first call. Types and documentation are those of api.ts, which the package's `types` name.
export type * from './api.js';
export { DivergedError } from './distill/events.js';
export { InfeasibleError } from './infer/quality/searched.js';
export { getRuntime } from './infer/runtime.js';
export { FileSystemError } from './io/files.js';
export * from './native/errors.js';
export { agreementChart, levelsCsv, lineChart, qualityChart, reportHtml } from './report/index.js';

export const cacheTeacher: typeof import('./distill/cache.js').cacheTeacher = async (...args) =>
  (await import('./distill/cache.js')).cacheTeacher(...args);
export const costEff: typeof import('./distill/encoder/cost_eff.js').costEff = async (...args) =>
  (await import('./distill/encoder/cost_eff.js')).costEff(...args);
export const distill: typeof import('./distill/distill.js').distill = async (...args) =>
  (await import('./distill/distill.js')).distill(...args);
export const pretrain: typeof import('./distill/pretrain.js').pretrain = async (...args) =>
  (await import('./distill/pretrain.js')).pretrain(...args);
export const finetune: typeof import('./distill/encoder/finetune.js').finetune = async (...args) =>
  (await import('./distill/encoder/finetune.js')).finetune(...args);
export const modular: typeof import('./distill/seq2seq/modular.js').modular = async (...args) =>
  (await import('./distill/seq2seq/modular.js')).modular(...args);
export const elastify: typeof import('./distill/rank.js').elastify = async (...args) =>
  (await import('./distill/rank.js')).elastify(...args);
export const calibrateExits: typeof import('./distill/encoder/exit_levels.js').calibrateExits = async (...args) =>
  (await import('./distill/encoder/exit_levels.js')).calibrateExits(...args);
export const writeExits: typeof import('./elastic/elastify.js').writeExits = async (...args) =>
  (await import('./elastic/elastify.js')).writeExits(...args);
export const writeProfile: typeof import('./elastic/profile.js').writeProfile = async (...args) =>
  (await import('./elastic/profile.js')).writeProfile(...args);
export const writeModules: typeof import('./elastic/elastify.js').writeModules = async (...args) =>
  (await import('./elastic/elastify.js')).writeModules(...args);
export const assemble: typeof import('./infer/export/assemble.js').assemble = async (...args) =>
  (await import('./infer/export/assemble.js')).assemble(...args);
export const evaluate: typeof import('./infer/quality/evaluate.js').evaluate = async (...args) =>
  (await import('./infer/quality/evaluate.js')).evaluate(...args);
export const exportSlim: typeof import('./infer/export/slim.js').exportSlim = async (...args) =>
  (await import('./infer/export/slim.js')).exportSlim(...args);
export const extract: typeof import('./infer/export/extract.js').extract = async (...args) =>
  (await import('./infer/export/extract.js')).extract(...args);
export const mergeAdapter: typeof import('./infer/export/merge.js').mergeAdapter = async (...args) =>
  (await import('./infer/export/merge.js')).mergeAdapter(...args);
export const loadModel: typeof import('./infer/model.js').loadModel = async (...args) =>
  (await import('./infer/model.js')).loadModel(...args);
export const profile: typeof import('./infer/profile.js').profile = async (...args) =>
  (await import('./infer/profile.js')).profile(...args);
export const search: typeof import('./infer/quality/search.js').search = async (...args) =>
  (await import('./infer/quality/search.js')).search(...args);
export const recordSearch: typeof import('./infer/quality/search.js').recordSearch = async (...args) =>
  (await import('./infer/quality/search.js')).recordSearch(...args);
export const recordQuality: typeof import('./infer/quality/quality.js').recordQuality = async (...args) =>
  (await import('./infer/quality/quality.js')).recordQuality(...args);
