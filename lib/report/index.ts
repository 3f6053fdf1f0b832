// Charts, CSV and the self-contained HTML report.
export { toCsv } from './csv.js';
export { agreementChart, type Levels, levelsCsv, qualityChart, reportHtml } from './html.js';
export {
  type BarChartOptions,
  barChart,
  type LineChartOptions,
  lineChart,
  type Point,
  type Series,
} from './svg.js';
export type {
  LevelResult,
  Measured,
  Method,
  PerLayer,
  ReportData,
  RouterMap,
  Sample,
  SampleTrace,
  TrainingEvaluation,
  TrainingPoint,
} from './types.js';
