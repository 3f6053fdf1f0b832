// Charts and the HTML report are well-formed and self-contained, whatever text they show.
import { describe, expect, test } from 'vitest';
import { barChart, levelsCsv, lineChart, reportHtml, toCsv } from '../../lib/report/index.js';
import { hostile, reportData } from './fixture.js';

const void_ = new Set(['meta', 'br', 'img', 'link', 'hr', 'input']);

/** Without style and script. */
const shown = (html: string): string => html.replace(/<style>[^<]*<\/style>|<script>[^<]*<\/script>/g, '');

/** Throws on tags that do not nest, attributes without quotes and bare ampersands. */
function checkMarkup(text: string): void {
  const open: string[] = [];
  const body = shown(text).replace(/<!doctype html>/i, '');
  let at = 0;
  for (const match of body.matchAll(/<(\/?)([a-zA-Z0-9]+)((?:\s+[\w:-]+="[^"<]*")*)\s*(\/?)>/g)) {
    const between = body.slice(at, match.index);
    expect(between).not.toMatch(/[<>]/);
    expect(between.replace(/&(amp|lt|gt|quot|#39|#13);/g, '')).not.toContain('&');
    at = match.index + match[0].length;
    const [, closing, name, , selfClosing] = match;
    if (closing) expect(open.pop()).toBe(name);
    else if (!selfClosing && !void_.has(name)) open.push(name);
  }
  expect(body.slice(at).trim()).toBe('');
  expect(open).toEqual([]);
}

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

test('bar chart', () => {
  for (const bars of [
    [
      { name: hostile, value: 3 },
      { name: 'zero', value: 0 },
    ],
    [],
  ]) {
    const chart = barChart({ title: 't', xLabel: 'x', bars });
    checkMarkup(chart);
    expect(chart).not.toMatch(/NaN|Infinity|undefined/);
  }
});

test('in a narrow chart, title, legend and axis label take several lines inside its width', () => {
  const words = 'several words that do not fit on one line of a telephone';
  const series = ['one name', 'another name', 'a third name'].map((name) => ({ name, points: [{ x: 1, y: 1 }] }));
  const chart = lineChart({ title: words, xLabel: words, yLabel: 'y', series, width: 320, height: 300 });
  checkMarkup(chart);
  const texts = [...chart.matchAll(/<text class="(ink|title)" x="([\d.]+)"( [^>]*)?>([^<]*)</g)];
  expect(texts.filter(([, kind]) => kind === 'title').length).toBeGreaterThan(1);
  for (const [, kind, x, more, text] of texts) {
    if (more?.includes('rotate')) continue;
    const width = text.length * (kind === 'title' ? 8.2 : 6.6);
    const left = more?.includes('middle') ? Number(x) - width / 2 : Number(x);
    expect(left).toBeGreaterThanOrEqual(0);
    expect(left + width).toBeLessThanOrEqual(320);
  }
});

describe('the report', () => {
  test('is one page that loads nothing and escapes whatever it shows', () => {
    const html = reportHtml(reportData());
    checkMarkup(html);
    expect(html.match(/<script/g)).toHaveLength(1);
    expect(html).not.toMatch(/<img|onerror=alert\(2\)>/);
    expect(html).toContain("default-src 'none'");
    expect(html.replaceAll('http://www.w3.org/2000/svg', '')).not.toMatch(/https?:|src=x?"|@import|url\(/);
    expect(shown(html)).not.toMatch(/NaN|undefined|Infinity/);
  });

  test('names the worst retention', () => {
    const html = reportHtml(reportData());
    // perplexity and bits per byte keep as much as agreement, which comes first; e^-0.5 is more than 0.5
    expect(html).toContain('The worst: <strong>same next token</strong>, 50.0 % at level p50');
    expect(html.match(/class="worst"/g)).toHaveLength(6);
  });

  test('marks shares far from their target', () => {
    const html = reportHtml(reportData(4));
    expect(html).toContain('style="--c:0.250">25 % <small>target 50, off</small>');
    expect(html).toContain('style="--c:1.000">100 % <small>target 95</small>');
    expect(html).toContain('<small>no router</small>');
  });

  test('without an evaluation has no quality and no speed, and says so', () => {
    const html = reportHtml({ ...reportData(), evaluation: null });
    checkMarkup(html);
    expect(html).toContain('nothing: quality needs a text');
    expect(shown(html)).not.toMatch(/Quality against compute|Measured speed|axis-time|undefined/);
  });

  test('without times has no switch', () => {
    const data = reportData();
    const levels = data.evaluation!.levels.map((l) => ({ ...l, tokensPerSecond: null, timeRatio: null }));
    const html = reportHtml({ ...data, evaluation: { ...data.evaluation!, levels } });
    checkMarkup(html);
    expect(html).not.toMatch(/name="axis"|Measured speed/);
  });

  test('tokens keep their text and carry their layers', () => {
    const html = reportHtml(reportData(3));
    expect(html).toContain('style="--c:1" data-attn="111" data-ffn="111"> whale</span>');
    expect(html).toContain('data-attn="010" data-ffn="100"> whale</span>');
    // A parser would make a line feed of a carriage return.
    expect(html).toContain('>\n&#13;</span>');
  });

  test('as CSV has a row for every method and budget', () => {
    const csv = levelsCsv(reportData().evaluation!.levels).trimEnd().split('\r\n');
    expect(csv.length).toBe(10);
    expect(new Set(csv.map((line) => line.split(',').length)).size).toBe(1);
  });
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
