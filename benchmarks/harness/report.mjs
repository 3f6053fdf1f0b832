// Tables for people: markdown from rows of cells.

export function table(header, rows) {
  const cells = [header, ...rows].map((row) => row.map(String));
  const widths = header.map((_, i) => Math.max(3, ...cells.map((row) => row[i].length)));
  const line = (row) => `| ${row.map((cell, i) => cell.padEnd(widths[i])).join(' | ')} |`;
  return [line(cells[0]), `|${widths.map((w) => '-'.repeat(w + 2)).join('|')}|`, ...cells.slice(1).map(line)].join(
    '\n',
  );
}

export const number = (value, digits = 1) => (value === null ? '-' : value.toFixed(digits));
export const milliseconds = ({ median, min, max }) =>
  `${median.toPrecision(4)} (${min.toPrecision(3)} to ${max.toPrecision(3)})`;
export const mebibytes = (bytes) => Math.round(bytes / 2 ** 20);

/**
 * A wanted ratio or limit. `value` is null when what it compares with was not there; `most` targets are upper limits.
 */
export function target(name, wanted, value, { most = false, unit = '' } = {}) {
  const met = value === null ? null : most ? value <= wanted : value >= wanted;
  return { name, wanted, value, limit: most ? 'at most' : 'at least', unit, met };
}

export function targetTable(targets) {
  return table(
    ['target', 'wanted', 'measured', ''],
    targets.map(({ name, wanted, value, limit, unit, met }) => [
      name,
      `${limit} ${wanted}${unit}`,
      value === null ? 'not measured' : `${value.toPrecision(3)}${unit}`,
      met === null ? '-' : met ? 'met' : 'MISSED',
    ]),
  );
}
