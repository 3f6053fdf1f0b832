// Turns report data into charts, tables and one self-contained HTML page that needs no network.
import { toCsv } from './csv.js';
import { budgetName, count, percent, show } from './format.js';
import { page } from './page.js';
import { routerMaps } from './routing.js';
import { barChart, escapeXml, lineChart, type Series } from './svg.js';
import { sampleTexts } from './texts.js';
import type { LevelResult, Measured, Method, ReportData } from './types.js';

const methodNames: Record<Method, string> = {
  routed: 'learned routing',
  nested: 'nested feed-forwards',
  random: 'random tokens',
  drop: 'dropped sub-layers',
};
const methods: readonly Method[] = ['routed', 'nested', 'random', 'drop'];
const isElastic = ({ method }: LevelResult): boolean => method === 'routed' || method === 'nested';

/** Methods at budgets. */
export type Levels = readonly LevelResult[];

/** A way to say what a level costs; null where it is not known. */
interface Cost {
  readonly label: string;
  readonly of: (level: LevelResult) => number | null;
}

const flops: Cost = { label: 'share of the full model’s FLOPs, counted by the kernels', of: (l) => l.ratio };
const time: Cost = {
  label: 'share of the full model’s prefill time, measured on this machine',
  of: (l) => l.timeRatio,
};

const fullLevel = (levels: Levels): LevelResult | undefined => levels.find((l) => isElastic(l) && l.budget === 1);

/** Width and height; pages draw every chart twice, for wide and for narrow screens. */
type Size = readonly [width: number, height: number];
const wide: Size = [720, 420];
const narrow: Size = [326, 360];

/** Quality against compute for every method present: the KL divergence from the full model over counted FLOPs. */
export function qualityChart(data: ReportData): string {
  return klChart(data.evaluation?.levels ?? [], flops, wide);
}

/** Top-1 agreement with the full model over counted FLOPs. */
export function agreementChart(data: ReportData): string {
  return sameTokenChart(data.evaluation?.levels ?? [], flops, wide);
}

function klChart(levels: Levels, cost: Cost, [width, height]: Size): string {
  return lineChart({
    ...{ width, height, xLabel: cost.label },
    title: 'Distance from the full model at each compute budget (lower is better)',
    yLabel: 'KL divergence, nats per token',
    series: curves(levels, cost, (l) => l.kl),
  });
}

function sameTokenChart(levels: Levels, cost: Cost, [width, height]: Size): string {
  return lineChart({
    ...{ width, height, xLabel: cost.label },
    title: 'Same next token as the full model (higher is better)',
    yLabel: 'top-1 agreement',
    series: curves(levels, cost, (l) => l.agreement),
  });
}

function curves(levels: Levels, cost: Cost, pick: (level: LevelResult) => Measured): Series[] {
  const present = methods.filter((m) => levels.some((l) => l.method === m));
  return present.map((method) => ({
    name: methodNames[method],
    points: levels.flatMap((l) => {
      const x = cost.of(l);
      if (l.method !== method || x === null) return [];
      const m = pick(l);
      const note = `${methodNames[method]}, ${percent(x)}: ${show(m.value)} [${show(m.low)}, ${show(m.high)}]`;
      return [{ x, y: m.value, low: m.low, high: m.high, note }];
    }),
  }));
}

function figure(draw: (size: Size) => string): string {
  return `<figure><div class="wide">${draw(wide)}</div><div class="narrow">${draw(narrow)}</div></figure>`;
}

/** Both quality charts, over FLOPs and, by a switch, over measured time. */
function pareto(levels: Levels): string {
  const charts = (cost: Cost): string =>
    figure((size) => klChart(levels, cost, size)) + figure((size) => sameTokenChart(levels, cost, size));
  if (levels.every((l) => l.timeRatio === null)) return charts(flops);
  return `<fieldset><legend>Compute as</legend>
<input type="radio" name="axis" id="axis-flops" checked="checked"><label for="axis-flops">counted FLOPs</label>
<input type="radio" name="axis" id="axis-time"><label for="axis-time">measured time</label>
<div class="by-flops">${charts(flops)}</div>
<div class="by-time">${charts(time)}</div></fieldset>`;
}

interface Retention {
  readonly name: string;
  readonly of: (level: LevelResult) => number | null | undefined;
}

/** What of each metric a level keeps: 1 is the full model. */
function retentions(levels: Levels): Retention[] {
  const full = fullLevel(levels);
  return [
    { name: 'same next token', of: (l) => l.agreement.value },
    { name: 'probability kept, exp(−KL)', of: (l) => Math.exp(-l.kl.value) },
    { name: 'perplexity, full / level', of: (l) => full && full.perplexity.value / l.perplexity.value },
    {
      name: 'bits per byte, full / level',
      of: (l) => full?.bitsPerByte && l.bitsPerByte && full.bitsPerByte.value / l.bitsPerByte.value,
    },
  ];
}

function retentionTable(levels: Levels): string {
  const columns = levels.filter((l) => isElastic(l) && l.budget !== 1);
  const rows = retentions(levels).map(({ name, of }) => ({ name, values: columns.map((l) => of(l) ?? null) }));
  const worst = columns.map((_, c) => Math.min(...rows.map(({ values }) => values[c] ?? Number.POSITIVE_INFINITY)));
  if (columns.length === 0) return '';
  const least = Math.min(...worst);
  const at = worst.indexOf(least);
  const metric = rows.find(({ values }) => values[at] === least)!.name;
  return `<h2>What each budget keeps of the full model</h2>
<p>The worst: <strong>${escapeXml(metric)}</strong>, ${percent(least)} at ${escapeXml(budgetName(columns[at].budget))}. The worst of every budget is marked.</p>
${table(
  'Retention of every metric',
  ['metric', ...columns.map((l) => budgetName(l.budget))],
  rows
    .filter(({ values }) => values.some((v) => v !== null))
    .map(({ name, values }) => [
      escapeXml(name),
      ...values.map((v, c) => (v === null ? '–' : `${percent(v)}${v === worst[c] ? ' <small>worst</small>' : ''}`)),
    ]),
  (cell) => cell.includes('worst'),
)}`;
}

function speedChart(levels: Levels): string {
  const bars = levels
    .filter((l) => isElastic(l) && l.timeRatio !== null)
    .map((l) => ({ name: budgetName(l.budget), value: 1 / l.timeRatio! }));
  if (bars.length === 0) return '';
  return `<h2>Speed</h2>\n${figure(([width]) =>
    barChart({
      ...{ width, bars },
      title: 'Measured speed on this machine',
      xLabel: 'prefill, times as fast as the full model',
      format: (v) => v.toFixed(2),
    }),
  )}`;
}

function training({ points, evaluations }: ReportData['training']): string {
  const span = Math.max(1, Math.round(points.length / 20));
  const smooth = points.slice(span - 1).map(({ step }, i) => {
    const window = points.slice(i, i + span);
    return { x: step, y: window.reduce((sum, p) => sum + p.loss, 0) / window.length };
  });
  const loss = figure(([width]) =>
    lineChart({
      ...{ width, height: 320, title: 'Distillation loss', xLabel: 'step', yLabel: 'loss' },
      series: [
        { name: 'mean', points: smooth, plain: true },
        { name: 'each step', points: points.map((p) => ({ x: p.step, y: p.loss })), faint: true },
      ],
    }),
  );
  const names = [...new Set(evaluations.flatMap(({ levels }) => Object.keys(levels)))];
  const held = (metric: string, title: string, yLabel: string): string => {
    const series = names.map((name) => ({
      name,
      points: evaluations.flatMap(({ step, levels }) => {
        const y = levels[name]?.[metric];
        return y === undefined ? [] : [{ x: step, y, note: `${name}, step ${step}: ${show(y)}` }];
      }),
    }));
    if (series.every((s) => s.points.length < 2)) return '';
    return figure(([width]) => lineChart({ ...{ width, height: 320, title, xLabel: 'step', yLabel, series } }));
  };
  return [
    loss,
    held('kl', 'Distance from the full model on held-out text', 'KL divergence'),
    held('top1_agreement', 'Same next token as the full model on held-out text', 'top-1 agreement'),
  ].join('\n');
}

/** One row per method and budget; intervals are 95 %. */
export function levelsCsv(levels: Levels): string {
  const measured = ['perplexity', 'bits_per_byte', 'kl', 'top1_agreement'];
  return toCsv(
    [
      'method',
      'budget',
      'flops_ratio',
      'token_share',
      ...measured.flatMap((m) => [m, `${m}_low`, `${m}_high`]),
      'tokens_per_second',
      'time_ratio',
    ],
    levels.map((l) => [
      l.method,
      l.budget,
      l.ratio,
      l.share,
      ...[l.perplexity, l.bitsPerByte, l.kl, l.agreement].flatMap((m) =>
        m ? [m.value, m.low, m.high] : [null, null, null],
      ),
      l.tokensPerSecond,
      l.timeRatio,
    ]),
  );
}

/** The page. Everything it shows is inside it: no script, no font, no image is loaded. */
export function reportHtml(data: ReportData): string {
  const { evaluation, routing } = data;
  const quality = evaluation
    ? `<h2>Quality against compute</h2>
${pareto(evaluation.levels)}
${retentionTable(evaluation.levels)}
<h2>All measurements</h2>
${levelTable(evaluation.levels)}
${speedChart(evaluation.levels)}`
    : '';
  return page(
    data.title,
    `<h1>${escapeXml(data.title)}</h1>
<p>${escapeXml(summary(data))}</p>
<dl>${facts(data)
      .map(([k, v]) => `<dt>${escapeXml(k)}</dt><dd>${escapeXml(v)}</dd>`)
      .join('\n')}</dl>
${quality}
<h2>What the routers do</h2>
<p>Share of tokens that enter each sub-layer, counted on ${escapeXml(routing.on)}, and the share meant to enter; what is more than ten points off is outlined.</p>
${routerMaps(routing.maps)}
<h2>Text at each budget</h2>
${sampleTexts(data.samples)}
<h2>Training</h2>
${training(data.training)}
<h2>Notes</h2>
<ul>${data.notes.map((n) => `<li>${escapeXml(n)}</li>`).join('\n')}</ul>`,
  );
}

function facts({ model, elastic, training, evaluation, ...data }: ReportData): [string, string][] {
  const took = training.seconds === null ? '' : ` in ${training.seconds.toFixed(0)} s`;
  return [
    ['Model', `${model.name} (${model.architecture}, ${count(model.parameters)} parameters, ${model.layers} layers)`],
    [
      'Trained',
      `${count(elastic.trainable)} router parameters, ${percent(elastic.share, 3)} of the model; ${elastic.places}`,
    ],
    ['Training', `${count(training.steps)} steps${took}, ${count(Math.round(training.tokensPerSecond))} tokens/s`],
    [
      'Evaluated on',
      evaluation
        ? `${evaluation.data}: ${count(evaluation.tokens)} tokens in ${evaluation.sequences} sequences`
        : 'nothing: quality needs a text',
    ],
    ['Machine', data.machine],
    ['Written', `${data.created} by elastiform ${data.version}, in ${data.seconds.toFixed(0)} s`],
  ];
}

function summary({ evaluation }: ReportData): string {
  const levels = evaluation?.levels ?? [];
  const distance = (l: LevelResult): number => Math.abs(l.ratio - 0.7);
  const [elastic] = levels.filter((l) => isElastic(l) && l.budget !== 1).toSorted((a, b) => distance(a) - distance(b));
  if (!elastic) return '';
  const others = (['random', 'drop'] as const).flatMap((m) => {
    const level = levels.find((l) => l.method === m && l.budget === elastic.budget);
    return level ? [`${percent(level.agreement.value)} with ${methodNames[m]}`] : [];
  });
  const versus = others.length === 0 ? '' : `, against ${others.join(' and ')} at equal compute`;
  return `At ${percent(elastic.ratio)} of the full model’s FLOPs the elastic model predicts the same next token as the full model in ${percent(elastic.agreement.value)} of positions${versus}.`;
}

function levelTable(levels: Levels): string {
  return table(
    'Every method at every budget',
    [
      ...['method', 'budget', 'FLOPs', 'time', 'perplexity', 'bits per byte', 'KL to full', 'top-1 agreement'],
      'tokens/s',
    ],
    levels.map((l) => [
      escapeXml(methodNames[l.method]),
      escapeXml(String(l.budget)),
      percent(l.ratio),
      l.timeRatio === null ? '–' : percent(l.timeRatio),
      interval(l.perplexity),
      l.bitsPerByte ? interval(l.bitsPerByte) : '–',
      interval(l.kl),
      interval(l.agreement),
      l.tokensPerSecond === null ? '–' : count(Math.round(l.tokensPerSecond)),
    ]),
  );
}

/** @param rows cells as markup */
function table(
  name: string,
  head: readonly string[],
  rows: readonly (readonly string[])[],
  marked: (cell: string) => boolean = () => false,
): string {
  const cell = (c: string, i: number): string =>
    i === 0 ? `<th scope="row">${c}</th>` : `<td${marked(c) ? ' class="worst"' : ''}>${c}</td>`;
  return `<div class="scroll" role="region" tabindex="0" aria-label="${name}"><table><thead><tr>${head
    .map((h) => `<th scope="col">${escapeXml(h)}</th>`)
    .join(
      '',
    )}</tr></thead><tbody>${rows.map((row) => `<tr>${row.map(cell).join('')}</tr>`).join('\n')}</tbody></table></div>`;
}

function interval(m: Measured): string {
  return `${show(m.value)} <small>[${show(m.low)}, ${show(m.high)}]</small>`;
}
