// What runs of claims have in common: their options, and values that are kept as they are measured.
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

/**
 * Reads the command line of `npm run claims:<name>`; ends the process with help, or where it makes no sense.
 *
 * @param more lines of help on `flags`, which are parseArgs's
 */
export function readOptions(name, modelNames, { more = '', flags = {} } = {}) {
  const help = `npm run claims:${name} -- [options]

  --models LIST   ${modelNames.join(', ')} (default: all that are at hand)
  --steps N       steps of 2048 tokens that every cell trains (default: 100)
${more}  --quick         2 steps, few tokens: checks that everything runs; writes no results
  --fresh         measure cells again that an earlier run finished
  --finished      measure nothing: report the cells that earlier runs finished
  --help

Cells are kept in benchmarks/.cache as they finish; a run that was stopped goes on where it was.`;
  const { values: options } = parseArgs({
    options: {
      models: { type: 'string' },
      steps: { type: 'string', default: '100' },
      ...flags,
      quick: { type: 'boolean', default: false },
      fresh: { type: 'boolean', default: false },
      finished: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  });
  if (options.help) {
    console.log(help);
    process.exit(0);
  }
  const names = options.models?.split(',') ?? modelNames;
  const unknown = names.find((name) => !modelNames.includes(name));
  const steps = options.quick ? 2 : Number(options.steps);
  if (unknown !== undefined || !(Number.isInteger(steps) && steps > 0)) {
    console.error(
      `claims: ${unknown === undefined ? '--steps must be a positive integer' : `no model ${unknown}`}\n\n${help}`,
    );
    process.exit(2);
  }
  const cache = join(import.meta.dirname, `../.cache/claims-${name}`);
  mkdirSync(cache, { recursive: true });
  return { options, names, steps, cache };
}

/** Gives a value that is computed once for its inputs; null when it is not there and nothing is to be measured. */
export const cellsIn =
  (cache, { fresh, quick, finished }) =>
  async (key, compute) => {
    const file = join(cache, `${createHash('sha256').update(JSON.stringify(key)).digest('hex').slice(0, 24)}.json`);
    if (existsSync(file) && !fresh && !quick) return JSON.parse(readFileSync(file, 'utf8'));
    if (finished) return null;
    const value = await compute();
    if (!quick) writeFileSync(file, JSON.stringify(value));
    return value;
  };
