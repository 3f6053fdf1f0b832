// Charts, CSV and the self-contained HTML report.
export { toCsv } from './csv.js';
export { agreementChart, levelsCsv, qualityChart, reportHtml } from './html.js';
export {
  type BarChartOptions,
  barChart,
  type HeatMapOptions,
  heatMap,
  type LineChartOptions,
  lineChart,
  type Point,
  type Series,
} from './svg.js';
export type { LevelResult, Measured, Method, ReportData, Sample, TrainingPoint } from './types.js';
