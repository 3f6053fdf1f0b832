// Turns report data into charts, a table and one self-contained HTML page that needs no network.
import { toCsv } from './csv.js';
import { barChart, escapeXml, heatMap, lineChart, type Series } from './svg.js';
import type { LevelResult, Measured, Method, ReportData } from './types.js';

const methodNames: Record<Method, string> = {
  routed: 'learned routing',
  random: 'random tokens',
  drop: 'dropped sub-layers',
};
const methods: readonly Method[] = ['routed', 'random', 'drop'];

/** Quality against compute for every method present: the KL divergence from the full model over counted FLOPs. */
export function qualityChart(data: ReportData): string {
  return lineChart({
    title: 'Distance from the full model at each compute budget (lower is better)',
    xLabel: 'share of the full model’s FLOPs, counted by the kernels',
    yLabel: 'KL divergence, nats per token',
    series: curves(data.evaluation.levels, (l) => l.kl),
  });
}

/** Top-1 agreement with the full model over counted FLOPs. */
export function agreementChart(data: ReportData): string {
  return lineChart({
    title: 'Same next token as the full model (higher is better)',
    xLabel: 'share of the full model’s FLOPs, counted by the kernels',
    yLabel: 'top-1 agreement',
    series: curves(data.evaluation.levels, (l) => l.agreement),
  });
}

function curves(levels: readonly LevelResult[], pick: (level: LevelResult) => Measured): Series[] {
  const present = methods.filter((m) => levels.some((l) => l.method === m));
  return present.map((method) => ({
    name: methodNames[method],
    points: levels
      .filter((l) => l.method === method)
      .map((l) => {
        const m = pick(l);
        const note = `${methodNames[method]}, ${percent(l.ratio)} of FLOPs: ${show(m.value)} [${show(m.low)}, ${show(m.high)}]`;
        return { x: l.ratio, y: m.value, low: m.low, high: m.high, note };
      }),
  }));
}

function speedChart(data: ReportData): string {
  return barChart({
    title: 'Measured speed on this machine',
    xLabel: 'prefill tokens per second, routers included',
    bars: data.evaluation.levels
      .filter((l) => l.method === 'routed' && l.tokensPerSecond !== null)
      .map((l) => ({ name: `budget ${l.budget}`, value: l.tokensPerSecond! })),
    format: (v) => Math.round(v).toLocaleString('en-US'),
  });
}

function trainingChart(data: ReportData): string {
  return lineChart({
    title: 'Distillation loss',
    xLabel: 'step',
    yLabel: 'loss',
    series: [
      { name: 'training loss', points: data.training.points.map((p) => ({ x: p.step, y: p.loss })), plain: true },
    ],
    height: 320,
  });
}

function routerMaps(data: ReportData): string[] {
  return data.evaluation.levels
    .filter((l) => l.method === 'routed' && l.budget < 1)
    .map((l) =>
      heatMap({
        title: `Tokens processed at budget ${l.budget}, per cent`,
        columns: l.layers.attn.map((_, i) => `L${i}`),
        rows: [
          { name: 'attention', values: l.layers.attn },
          { name: 'FFN', values: l.layers.mlp },
        ],
      }),
    );
}

/** One row per method and budget; intervals are 95 %. */
export function levelsCsv(levels: readonly LevelResult[]): string {
  const measured = ['perplexity', 'bits_per_byte', 'kl', 'top1_agreement'];
  return toCsv(
    [
      'method',
      'budget',
      'flops_ratio',
      'token_share',
      ...measured.flatMap((m) => [m, `${m}_low`, `${m}_high`]),
      'tokens_per_second',
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
    ]),
  );
}

/** The page. Everything it shows is inside it: no script, no font, no image is loaded. */
export function reportHtml(data: ReportData): string {
  const { model, elastic, training, evaluation } = data;
  const facts: [string, string][] = [
    ['Model', `${model.name} (${model.architecture}, ${count(model.parameters)} parameters, ${model.layers} layers)`],
    [
      'Trained',
      `${count(elastic.trainable)} router parameters, ${percent(elastic.share, 3)} of the model; ${elastic.places}`,
    ],
    [
      'Training',
      `${count(training.steps)} steps in ${training.seconds.toFixed(0)} s, ${count(Math.round(training.tokensPerSecond))} tokens/s`,
    ],
    ['Evaluated on', `${evaluation.data}: ${count(evaluation.tokens)} tokens in ${evaluation.sequences} sequences`],
    ['Machine', data.machine],
    ['Written', `${data.created} by elastiform ${data.version}, in ${data.seconds.toFixed(0)} s`],
  ];
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escapeXml(data.title)}</title>
<style>
:root{color-scheme:light dark;--bg:#fff;--ink:#1c2430;--soft:#5b6675;--line:#d5dbe3;--card:#f5f7fa}
@media (prefers-color-scheme:dark){:root{--bg:#11161d;--ink:#e6ebf2;--soft:#9aa7b8;--line:#2c3644;--card:#18202a}}
body{background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{font-size:1.2rem;margin-top:2.2rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}dt{color:var(--soft)}dd{margin:0}
figure{margin:1rem 0}svg{max-width:100%;height:auto}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}small{color:var(--soft)}
.text{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.8rem 1rem;white-space:pre-wrap}
.prompt{color:var(--soft)}
</style>
</head>
<body>
<h1>${escapeXml(data.title)}</h1>
<p>${escapeXml(summary(data))}</p>
<dl>${facts.map(([k, v]) => `<dt>${escapeXml(k)}</dt><dd>${escapeXml(v)}</dd>`).join('\n')}</dl>
<h2>Quality against compute</h2>
<figure>${qualityChart(data)}</figure>
<figure>${agreementChart(data)}</figure>
<div class="scroll">${table(evaluation.levels)}</div>
<h2>Speed</h2>
<figure>${speedChart(data)}</figure>
<h2>What the routers learned</h2>
${routerMaps(data)
  .map((svg) => `<figure>${svg}</figure>`)
  .join('\n')}
<h2>Training</h2>
<figure>${trainingChart(data)}</figure>
<h2>Text at each budget</h2>
${data.samples
  .map(
    (s) =>
      `<h3>${escapeXml(s.label)} <small>${percent(s.ratio)} of the FLOPs, ${Math.round(s.tokensPerSecond)} tokens/s</small></h3>
<div class="text"><span class="prompt">${escapeXml(s.prompt)}</span>${escapeXml(s.text)}</div>`,
  )
  .join('\n')}
<h2>Notes</h2>
<ul>${data.notes.map((n) => `<li>${escapeXml(n)}</li>`).join('\n')}</ul>
</body>
</html>
`;
}

function summary(data: ReportData): string {
  const at = (method: Method): LevelResult | undefined =>
    data.evaluation.levels
      .filter((l) => l.method === method)
      .toSorted((a, b) => Math.abs(a.budget - 0.7) - Math.abs(b.budget - 0.7))[0];
  const routed = at('routed');
  if (!routed) return '';
  const others = (['random', 'drop'] as const).flatMap((m) => {
    const level = at(m);
    return level ? [`${percent(level.agreement.value)} with ${methodNames[m]}`] : [];
  });
  const versus = others.length === 0 ? '' : `, against ${others.join(' and ')} at equal compute`;
  return `At ${percent(routed.ratio)} of the full model’s FLOPs the elastic model predicts the same next token as the full model in ${percent(routed.agreement.value)} of positions${versus}.`;
}

function table(levels: readonly LevelResult[]): string {
  const head = [
    'method',
    'budget',
    'FLOPs',
    'perplexity',
    'bits per byte',
    'KL to full',
    'top-1 agreement',
    'tokens/s',
  ];
  const body = levels.map((l) => [
    escapeXml(methodNames[l.method]),
    String(l.budget),
    percent(l.ratio),
    interval(l.perplexity),
    l.bitsPerByte ? interval(l.bitsPerByte) : '–',
    interval(l.kl),
    interval(l.agreement),
    l.tokensPerSecond === null ? '–' : count(Math.round(l.tokensPerSecond)),
  ]);
  return `<table><thead><tr>${head.map((h) => `<th>${h}</th>`).join('')}</tr></thead><tbody>${body
    .map((row) => `<tr>${row.map((c) => `<td>${c}</td>`).join('')}</tr>`)
    .join('\n')}</tbody></table>`;
}

function interval(m: Measured): string {
  return `${show(m.value)} <small>[${show(m.low)}, ${show(m.high)}]</small>`;
}

function show(value: number): string {
  return value.toFixed(Math.abs(value) >= 10 ? 2 : Math.abs(value) >= 1 ? 3 : 4);
}

function percent(share: number, digits = 1): string {
  return `${(share * 100).toFixed(digits)} %`;
}

function count(value: number): string {
  return value.toLocaleString('en-US');
}
