// Charts and the HTML report are well-formed and self-contained, whatever text they show.
import { expect, test } from 'vitest';
import {
  barChart,
  heatMap,
  type LevelResult,
  levelsCsv,
  lineChart,
  type ReportData,
  reportHtml,
  toCsv,
} from '../../lib/report/index.js';

const void_ = new Set(['meta', 'br', 'img', 'link', 'hr']);

/** Throws on tags that do not nest, attributes without quotes and bare ampersands. */
function checkMarkup(text: string): void {
  const open: string[] = [];
  const body = text.replace(/<!doctype html>/i, '').replace(/<style>[^<]*<\/style>/g, '');
  let at = 0;
  for (const match of body.matchAll(/<(\/?)([a-zA-Z0-9]+)((?:\s+[\w:-]+="[^"<]*")*)\s*(\/?)>/g)) {
    const between = body.slice(at, match.index);
    expect(between).not.toMatch(/[<>]/);
    expect(between.replace(/&(amp|lt|gt|quot|#39);/g, '')).not.toContain('&');
    at = match.index + match[0].length;
    const [, closing, name, , selfClosing] = match;
    if (closing) expect(open.pop()).toBe(name);
    else if (!selfClosing && !void_.has(name)) open.push(name);
  }
  expect(body.slice(at).trim()).toBe('');
  expect(open).toEqual([]);
}

const hostile = 'a<b>&"\'\u0000\ud800</svg><script>alert(1)</script>';
const measured = (value: number) => ({ value, low: value * 0.9, high: value * 1.1 });
const level = (method: LevelResult['method'], budget: number): LevelResult => ({
  method,
  budget,
  ratio: budget + 0.01,
  share: budget,
  perplexity: measured(5),
  bitsPerByte: method === 'drop' ? null : measured(1.2),
  kl: measured(1 - budget),
  agreement: measured(budget),
  tokensPerSecond: method === 'routed' ? 1234 / budget : null,
  layers: { attn: [budget, 1], mlp: [budget, 0.5] },
});

test('line chart: markup, intervals, legend, hostile text', () => {
  const chart = lineChart({
    title: hostile,
    xLabel: hostile,
    yLabel: 'y',
    series: [
      {
        name: hostile,
        points: [
          { x: 1, y: 2, low: 1, high: 3, note: hostile },
          { x: 0.5, y: 4 },
        ],
      },
      { name: 'curve', points: [{ x: 0.1, y: 1 }], plain: true },
      { name: 'empty', points: [] },
    ],
  });
  checkMarkup(chart);
  expect(chart).not.toContain('<script');
  expect(chart).not.toMatch(/NaN|Infinity|undefined/);
});

test.each(['linear', 'log'] as const)('line chart survives odd data on a %s axis', (yScale) => {
  for (const points of [
    [],
    [{ x: 0, y: 0 }],
    [{ x: 1, y: Number.NaN }],
    [
      { x: 1, y: 5 },
      { x: 1, y: 5 },
    ],
    [
      { x: -1e9, y: 1e-9 },
      { x: 1e9, y: 1e9 },
    ],
  ]) {
    const chart = lineChart({ title: 't', xLabel: 'x', yLabel: 'y', series: [{ name: 's', points }], yScale });
    checkMarkup(chart);
    expect(chart).not.toMatch(/NaN|Infinity|undefined/);
  }
});

test('bar chart and heat map', () => {
  for (const chart of [
    barChart({
      title: 't',
      xLabel: 'x',
      bars: [
        { name: hostile, value: 3 },
        { name: 'zero', value: 0 },
      ],
    }),
    barChart({ title: 't', xLabel: 'x', bars: [] }),
    heatMap({ title: 't', columns: ['a', 'b'], rows: [{ name: 'r', values: [0.25, null] }] }),
  ]) {
    checkMarkup(chart);
    expect(chart).not.toMatch(/NaN|Infinity|undefined/);
  }
});

test('the report is one self-contained page', () => {
  const data: ReportData = {
    title: 'Elastic',
    version: '1.0.0',
    created: '2026-01-01T00:00:00Z',
    machine: 'test',
    model: { name: 'tiny', architecture: 'llama', parameters: 1000, layers: 2, hidden: 8 },
    elastic: { trainable: 18, share: 0.018, places: 'attention and FFN of every layer' },
    training: {
      steps: 2,
      seconds: 1,
      tokensPerSecond: 100,
      points: [
        { step: 1, loss: 1 },
        { step: 2, loss: 0.5 },
      ],
    },
    evaluation: {
      data: 'text',
      tokens: 100,
      sequences: 4,
      levels: [1, 0.7].flatMap((b) => (['routed', 'random', 'drop'] as const).map((m) => level(m, b))),
    },
    samples: [{ label: 'full', prompt: hostile, text: hostile, ratio: 1, tokensPerSecond: 10 }],
    notes: [hostile],
    seconds: 2,
  };
  const html = reportHtml(data);
  checkMarkup(html);
  expect(html).not.toContain('<script');
  expect(html.replaceAll('http://www.w3.org/2000/svg', '')).not.toMatch(/https?:|src=|@import|url\(/);
  const csv = levelsCsv(data.evaluation.levels).trimEnd().split('\r\n');
  expect(csv.length).toBe(7);
  expect(new Set(csv.map((line) => line.split(',').length)).size).toBe(1);
});

test('CSV quotes what it must', () => {
  expect(
    toCsv(
      ['a', 'b'],
      [
        ['x,y', 'say "hi"'],
        [null, 1.5],
      ],
    ),
  ).toBe('a,b\r\n"x,y","say ""hi"""\r\n,1.5\r\n');
});
