// Writes the README's GPU table from benchmarks/results/gpu/*.json alone: node scripts/gpu/table.mjs [--check].
import fs from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { goalTable, judge } from '../../benchmarks/gpu/goals.mjs';
import { FORMAT } from '../../benchmarks/gpu/results.mjs';

const root = path.resolve(import.meta.dirname, '../..');
const BEGIN = '<!-- GPU table: node scripts/gpu/table.mjs -->';
const END = '<!-- end of the GPU table -->';

const { values } = parseArgs({ options: { check: { type: 'boolean', default: false } } });

/** All runs, oldest first. */
function runs() {
  const folder = path.join(root, 'benchmarks/results/gpu');
  if (!fs.existsSync(folder)) return [];
  const files = fs.readdirSync(folder).filter((file) => file.endsWith('.json'));
  const list = files.map((file) => ({ file, ...JSON.parse(fs.readFileSync(path.join(folder, file), 'utf8')) }));
  for (const { file, format, card } of list) {
    if (format !== FORMAT) throw new Error(`${file}: format ${FORMAT} expected, got ${format}`);
    if (!card?.name) throw new Error(`${file} names no card`);
  }
  return list.sort((a, b) => a.started.localeCompare(b.started));
}

/** One table per card: every group as it was measured last. */
function text() {
  const cards = new Map();
  for (const { card, started, commit, facts, groups } of runs()) {
    const known = cards.get(card.name) ?? { groups: {}, runs: new Set(), driver: card.driver };
    for (const [name, group] of Object.entries(groups)) {
      known.groups[name] = group;
      known.runs.add(`${started.slice(0, 10)}, commit ${commit.slice(0, 7)}, ${facts.ours?.activations} activations`);
    }
    cards.set(card.name, { ...known, driver: card.driver });
  }
  if (cards.size === 0)
    return 'Their speed is **not yet measured on a GPU**; [docs/gpu.md](docs/gpu.md) says how it will be.';
  return [...cards]
    .map(([name, { groups, runs, driver }]) => {
      const when = [...runs].join('; ');
      const head = `${name}, driver ${driver}, ${when}: medians, goals met or missed ([how](docs/gpu.md)).`;
      return `${head}\n\n${goalTable(judge(groups))}`;
    })
    .join('\n\n');
}

const readme = path.join(root, 'README.md');
const old = fs.readFileSync(readme, 'utf8');
const [begin, end] = [old.indexOf(BEGIN), old.indexOf(END)];
if (begin < 0 || end < begin) throw new Error(`README.md must hold ${BEGIN} and ${END}`);
const now = `${old.slice(0, begin)}${BEGIN}\n\n${text()}\n\n${old.slice(end)}`;
if (!values.check) fs.writeFileSync(readme, now);
else if (now !== old) {
  console.error("README.md's GPU table is not what benchmarks/results/gpu says; run node scripts/gpu/table.mjs");
  process.exitCode = 1;
}
