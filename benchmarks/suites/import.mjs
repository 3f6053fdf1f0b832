// What importing the package's entry points takes, in fresh processes: the clock around the import alone.
import { execFileSync } from 'node:child_process';
import { summary } from '../harness/measure.mjs';
import { milliseconds, table, target } from '../harness/report.mjs';

const ENTRIES = ['elastiform', 'elastiform/kernels'];
const RUNS = 3; // of each entry in a round

const script = (entry) => `
  const start = performance.now();
  await import('${entry}');
  console.log(performance.now() - start);`;

export async function importing({ rounds, log }) {
  log('import');
  const times = new Map(ENTRIES.map((entry) => [entry, []]));
  for (let run = 0; run < RUNS * rounds; run++) {
    for (const entry of ENTRIES) {
      // A package can import itself by its name.
      const args = ['--input-type=module', '--eval', script(entry)];
      times.get(entry).push(Number(execFileSync(process.execPath, args, { encoding: 'utf8' })));
    }
  }
  const imports = Object.fromEntries([...times].map(([entry, samples]) => [entry, summary(samples)]));
  return {
    libraries: {},
    data: { milliseconds: imports },
    text: table(
      ['entry point', 'ms'],
      ENTRIES.map((entry) => [entry, milliseconds(imports[entry])]),
    ),
    targets: ENTRIES.map((entry) =>
      target(`importing ${entry}`, 30, imports[entry].median, { most: true, unit: ' ms' }),
    ),
  };
}
