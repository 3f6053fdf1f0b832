// Prints the counts of test runs as one plain line, from what vitest wrote: node scripts/test-summary.mjs FILE.json...
import { readFileSync } from 'node:fs';

const runs = process.argv.slice(2).map((file) => JSON.parse(readFileSync(file, 'utf8')));
const sum = (count) => runs.reduce((total, run) => total + count(run), 0);
const passed = sum((run) => run.numPassedTests);
const failed = sum((run) => run.numFailedTests);
const skipped = sum((run) => run.numPendingTests + run.numTodoTests);
console.log(`${passed} passed, ${failed} failed, ${skipped} skipped`);
process.exit(runs.every((run) => run.success && run.numPassedTests > 0) && passed > 0 ? 0 : 1);
