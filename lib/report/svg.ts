// A small chart writer: line charts with intervals and bar charts as standalone SVG text, at any width.

/** A point of a line; `low` and `high` are its interval. */
export interface Point {
  readonly x: number;
  readonly y: number;
  /** Ends of the interval around y; both or neither. */
  readonly low?: number;
  readonly high?: number;
  /** Shown as a tooltip. */
  readonly note?: string;
}

/** One line of a chart. */
export interface Series {
  readonly name: string;
  readonly points: readonly Point[];
  /** Without markers: for curves of many points. */
  readonly plain?: boolean;
  /** A pale curve behind another one; plain, too. */
  readonly faint?: boolean;
}

/** What a line chart shows; sizes in pixels. */
export interface LineChartOptions {
  readonly title: string;
  readonly xLabel: string;
  readonly yLabel: string;
  readonly series: readonly Series[];
  readonly yScale?: 'linear' | 'log';
  readonly width?: number;
  readonly height?: number;
}

export interface BarChartOptions {
  readonly title: string;
  readonly xLabel: string;
  readonly bars: readonly { readonly name: string; readonly value: number; readonly group?: number }[];
  readonly format?: (value: number) => string;
  readonly width?: number;
}

// Colours that stay apart for colour-blind readers (Okabe and Ito, 2008), brighter on dark grounds.
const style = `
.ef{--bg:#ffffff;--ink:#1c2430;--soft:#5b6675;--line:#d5dbe3;--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#a1588c}
@media (prefers-color-scheme:dark){.ef{--bg:#11161d;--ink:#e6ebf2;--soft:#9aa7b8;--line:#2c3644;--s0:#56b4e9;--s1:#ff9d4d;--s2:#34d1a0;--s3:#e29fce}}
.ef text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--soft)}
.ef .title{font-size:15px;font-weight:600;fill:var(--ink)}
.ef .ink{fill:var(--ink)}
.ef .grid{stroke:var(--line);stroke-width:1}
.ef .axis{stroke:var(--soft);stroke-width:1}
.ef .l{fill:none;stroke-width:2;stroke-linejoin:round}
.ef .l0{stroke:var(--s0)}.ef .l1{stroke:var(--s1)}.ef .l2{stroke:var(--s2)}.ef .l3{stroke:var(--s3)}
.ef .f0{fill:var(--s0)}.ef .f1{fill:var(--s1)}.ef .f2{fill:var(--s2)}.ef .f3{fill:var(--s3)}
`.trim();

const seriesColours = 4;

/** A line chart; points with `low` and `high` get an interval bar. `yScale: 'log'` needs positive values. */
export function lineChart(o: LineChartOptions): string {
  const width = o.width ?? 720;
  const height = o.height ?? 420;
  const head = heading(o.title, width);
  const legend = legendRows(o.series, width - 20);
  const xLabel = wrap(o.xLabel, width - 88, labelWidth);
  const box = {
    left: 68,
    right: width - 20,
    top: head.bottom + legend.at(-1)!.y + 22,
    bottom: height - 36 - 16 * xLabel.length,
  };
  const points = o.series.flatMap((s) => s.points).filter((p) => Number.isFinite(p.x) && Number.isFinite(p.y));
  const log = o.yScale === 'log';
  const ys = points
    .flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y])
    .filter((y) => Number.isFinite(y) && (!log || y > 0));
  const xAxis = linearAxis(
    points.map((p) => p.x),
    box.left,
    box.right,
    Math.max(2, Math.round((box.right - box.left) / 80)),
  );
  const yAxis = log ? logAxis(ys, box.bottom, box.top) : linearAxis(ys, box.bottom, box.top, 6);

  const parts: string[] = [];
  for (const t of yAxis.ticks) {
    const y = num(yAxis.at(t));
    parts.push(`<line class="grid" x1="${box.left}" x2="${box.right}" y1="${y}" y2="${y}"/>`);
    parts.push(`<text x="${box.left - 8}" y="${y}" dy="4" text-anchor="end">${tick(t)}</text>`);
  }
  for (const t of xAxis.ticks) {
    const x = num(xAxis.at(t));
    parts.push(`<line class="axis" x1="${x}" x2="${x}" y1="${box.bottom}" y2="${box.bottom + 5}"/>`);
    parts.push(`<text x="${x}" y="${box.bottom + 20}" text-anchor="middle">${tick(t)}</text>`);
  }
  parts.push(`<line class="axis" x1="${box.left}" x2="${box.right}" y1="${box.bottom}" y2="${box.bottom}"/>`);
  const middle = (box.top + box.bottom) / 2;
  parts.push(
    ...xLabel.map(
      (line, i) =>
        `<text class="ink" x="${(box.left + box.right) / 2}" y="${box.bottom + 40 + 16 * i}" text-anchor="middle">${escapeXml(line)}</text>`,
    ),
    `<text class="ink" x="18" y="${middle}" text-anchor="middle" transform="rotate(-90 18 ${middle})">${escapeXml(o.yLabel)}</text>`,
  );

  o.series.forEach((s, i) => {
    const colour = i % seriesColours;
    const seen = s.points
      .filter((p) => Number.isFinite(p.x) && Number.isFinite(p.y) && (!log || p.y > 0))
      .toSorted((a, b) => a.x - b.x);
    const path = seen.map((p, k) => `${k === 0 ? 'M' : 'L'}${num(xAxis.at(p.x))} ${num(yAxis.at(p.y))}`).join('');
    const plain = s.plain || s.faint;
    const stroke = s.faint ? ' stroke-opacity="0.35"' : dash(i);
    if (path !== '') parts.push(`<path class="l l${colour}" d="${path}"${stroke}/>`);
    for (const p of plain ? [] : seen) {
      const x = num(xAxis.at(p.x));
      if (p.low !== undefined && p.high !== undefined && (!log || p.low > 0)) {
        const low = num(yAxis.at(p.low));
        const high = num(yAxis.at(p.high));
        parts.push(
          `<path class="l l${colour}" d="M${x} ${low}V${high}M${num(x - 4)} ${low}h8M${num(x - 4)} ${high}h8"/>`,
        );
      }
      const tip = p.note === undefined ? '' : `<title>${escapeXml(p.note)}</title>`;
      parts.push(marker(i, x, num(yAxis.at(p.y)), tip));
    }
    const at = legend[i];
    const y = head.bottom + at.y;
    parts.push(`<path class="l l${colour}" d="M${at.x} ${y}h22"${stroke}/>`);
    if (!plain) parts.push(marker(i, at.x + 11, y, ''));
    parts.push(`<text class="ink" x="${at.x + 28}" y="${y + 4}">${escapeXml(s.name)}</text>`);
  });
  return svg(width, height, o.title, [...head.parts, ...parts]);
}

/** Horizontal bars, one per entry, from zero. `group` chooses the colour. */
export function barChart(o: BarChartOptions): string {
  const width = o.width ?? 720;
  const rowHeight = 26;
  const left = Math.min(220, 24 + Math.max(0, ...o.bars.map((b) => textWidth(b.name))));
  const right = width - 90;
  const head = heading(o.title, width);
  const top = head.bottom + 8;
  const height = top + o.bars.length * rowHeight + 44;
  const most = Math.max(0, ...o.bars.map((b) => b.value)) || 1;
  const format = o.format ?? tick;
  // Under the axis where there is room, else from the edge.
  const xLabelAt = left + textWidth(o.xLabel) < width ? left : 20;
  const parts: string[] = [];
  o.bars.forEach((bar, i) => {
    const y = top + i * rowHeight;
    const length = num((Math.max(0, bar.value) / most) * (right - left));
    parts.push(
      `<text class="ink" x="${left - 8}" y="${y + 16}" text-anchor="end">${escapeXml(bar.name)}</text>`,
      `<rect class="f${(bar.group ?? 0) % seriesColours}" x="${left}" y="${y + 4}" width="${length}" height="${rowHeight - 8}" rx="2"/>`,
      `<text x="${num(left + length + 6)}" y="${y + 16}">${escapeXml(format(bar.value))}</text>`,
    );
  });
  parts.push(`<line class="axis" x1="${left}" x2="${left}" y1="${top}" y2="${height - 40}"/>`);
  parts.push(`<text class="ink" x="${xLabelAt}" y="${height - 14}">${escapeXml(o.xLabel)}</text>`);
  return svg(width, height, o.title, [...head.parts, ...parts]);
}

export function escapeXml(text: string): string {
  return text
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
    .replaceAll('"', '&quot;')
    .replaceAll("'", '&#39;')
    .replaceAll('\r', '&#13;')
    .replace(unprintable, '\ufffd');
}

// What XML 1.0 forbids, lone surrogates included: generated text may hold any of it.
const unprintable = /(?![\t\n\r])[\p{Cc}\p{Cs}\ufffe\uffff]/gu;

function svg(width: number, height: number, title: string, parts: readonly string[]): string {
  const name = escapeXml(title);
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" class="ef" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img" aria-label="${name}">`,
    `<style>${style}</style>`,
    `<rect width="${width}" height="${height}" style="fill:var(--bg)"/>`,
    ...parts,
    '</svg>',
    '',
  ].join('\n');
}

// The title in as many lines as it takes.
function heading(title: string, width: number): { readonly parts: readonly string[]; readonly bottom: number } {
  const lines = wrap(title, width - 40, titleWidth);
  return {
    parts: lines.map((line, i) => `<text class="title" x="20" y="${28 + 20 * i}">${escapeXml(line)}</text>`),
    bottom: 20 + 20 * lines.length,
  };
}

// Where each entry of a legend begins: entries that do not fit start a new row.
function legendRows(series: readonly Series[], right: number): readonly { readonly x: number; readonly y: number }[] {
  let [x, y] = [20, 14];
  const starts = series.map(({ name }) => {
    const length = 28 + textWidth(name);
    if (x > 20 && x + length > right) [x, y] = [20, y + 20];
    const start = { x, y };
    x += length + 22;
    return start;
  });
  return starts.length > 0 ? starts : [{ x, y }];
}

interface Axis {
  readonly ticks: readonly number[];
  at(value: number): number;
}

function linearAxis(values: readonly number[], from: number, to: number, wanted: number): Axis {
  let low = values.length === 0 ? 0 : values.reduce((a, b) => Math.min(a, b));
  let high = values.length === 0 ? 1 : values.reduce((a, b) => Math.max(a, b));
  if (high === low) {
    low -= Math.abs(low) * 0.1 || 0.5;
    high += Math.abs(high) * 0.1 || 0.5;
  }
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999) ?? 10 * power;
  const first = Math.floor(low / step + 1e-9) * step;
  const last = Math.ceil(high / step - 1e-9) * step;
  const ticks: number[] = [];
  for (let i = 0; first + i * step <= last + step * 1e-6; i++) ticks.push(Number((first + i * step).toPrecision(12)));
  return { ticks, at: (v) => from + ((v - first) / (last - first)) * (to - from) };
}

function logAxis(values: readonly number[], from: number, to: number): Axis {
  const low = values.length === 0 ? 1 : values.reduce((a, b) => Math.min(a, b));
  const high = values.length === 0 ? 10 : values.reduce((a, b) => Math.max(a, b));
  const first = Math.floor(Math.log10(low) + 1e-9);
  const last = Math.max(first + 1, Math.ceil(Math.log10(high) - 1e-9));
  const ticks: number[] = [];
  const steps = last - first > 3 ? [1] : [1, 2, 5];
  for (let e = first; e <= last; e++)
    for (const m of e === last ? [1] : steps) ticks.push(Number((m * 10 ** e).toPrecision(3)));
  return { ticks, at: (v) => from + ((Math.log10(v) - first) / (last - first)) * (to - from) };
}

function marker(i: number, x: number, y: number, inner: string): string {
  const colour = `f${i % seriesColours}`;
  switch (i % seriesColours) {
    case 0:
      return `<circle class="${colour}" cx="${x}" cy="${y}" r="4.5">${inner}</circle>`;
    case 1:
      return `<rect class="${colour}" x="${num(x - 4)}" y="${num(y - 4)}" width="8" height="8">${inner}</rect>`;
    case 2:
      return `<path class="${colour}" d="M${x} ${num(y - 5.5)}l5 9.5h-10z">${inner}</path>`;
    default:
      return `<path class="${colour}" d="M${x} ${num(y - 5.5)}l5.5 5.5l-5.5 5.5l-5.5 -5.5z">${inner}</path>`;
  }
}

function dash(i: number): string {
  const pattern = ['', '7 4', '2 4', '9 3 2 3'][i % seriesColours];
  return pattern === '' ? '' : ` stroke-dasharray="${pattern}"`;
}

function num(value: number): number {
  return Math.round(value * 100) / 100;
}

function tick(value: number): string {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  return String(Number(value.toPrecision(4)));
}

// SVG cannot measure text: the mean advance of a sans-serif face, rounded up, at 12 px and at 15 px semi-bold.
const labelWidth = 6.6;
const titleWidth = 8.2;

function textWidth(text: string): number {
  return Math.ceil(text.length * labelWidth);
}

function wrap(text: string, width: number, advance: number): string[] {
  const lines = [''];
  for (const word of text.split(' ')) {
    const longer = lines.at(-1) === '' ? word : `${lines.at(-1)} ${word}`;
    if (lines.at(-1) === '' || longer.length * advance <= width) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}
