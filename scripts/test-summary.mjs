// Prints the counts of the last test run (build/test-results.json, written by vitest) as one plain line.
import { readFileSync } from 'node:fs';

const results = JSON.parse(readFileSync('build/test-results.json', 'utf8'));
console.log(
  `${results.numPassedTests} passed, ${results.numFailedTests} failed, ${results.numPendingTests + results.numTodoTests} skipped`,
);
process.exit(results.success && results.numPassedTests > 0 ? 0 : 1);
