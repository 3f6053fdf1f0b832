// Ends a run on a GPU host: puts the stages into the results and prints the table of goals: node finish.mjs
// --work DIR --out DIR [--dry-run].
import fs from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { goalTable, judge } from '../../benchmarks/gpu/goals.mjs';
import { Results } from '../../benchmarks/gpu/results.mjs';
import { table } from '../../benchmarks/harness/report.mjs';

const { values } = parseArgs({
  options: { work: { type: 'string' }, out: { type: 'string' }, 'dry-run': { type: 'boolean', default: false } },
});
const manifest = JSON.parse(fs.readFileSync(path.join(import.meta.dirname, '../../manifest.json'), 'utf8'));
const stagesFile = path.join(values.work, 'stages.tsv');
const lines = fs.existsSync(stagesFile) ? fs.readFileSync(stagesFile, 'utf8').trim().split('\n').filter(Boolean) : [];
const stages = lines.map((line) => {
  const [name, state, seconds, note] = line.split('\t');
  return { name, state, seconds: Number(seconds), note };
});
console.log(
  table(
    ['stage', 'state', 's', ''],
    stages.map(({ name, state, seconds, note }) => [name, state, seconds, note]),
  ),
);
if (values['dry-run']) {
  console.log('\nDRY RUN on the emulated device: nothing was measured, and no results were written.');
} else {
  const results = Results.open(values.out, values.work, manifest);
  results.update((data) => {
    data.stages = stages;
    for (const [name, file] of Object.entries({ tests: 'tests.json' })) {
      const full = path.join(values.work, file);
      if (fs.existsSync(full)) data[name] = JSON.parse(fs.readFileSync(full, 'utf8'));
    }
  });
  const { card, commit, facts, groups } = results.data;
  console.log(`\n${card ? `${card.name}, driver ${card.driver}` : 'no card found'}, commit ${commit}\n`);
  if (facts.ours) console.log(`values between our ops are kept as ${facts.ours.activations}\n`);
  console.log(goalTable(judge(groups)));
  console.log(
    fs.existsSync(results.file) ? `\nwritten: ${results.file}` : '\nnothing was measured: no results written',
  );
}
