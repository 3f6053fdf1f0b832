// Runs the compiled tests of a bundle, one process per file: node tests.mjs [--summary FILE] [--seconds N] FILE...
import fs from 'node:fs';
import path from 'node:path';
import { run } from 'node:test';
import { parseArgs } from 'node:util';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { summary: { type: 'string' }, seconds: { type: 'string', default: '0' } },
});
const end = Number(values.seconds) > 0 ? performance.now() + 1000 * Number(values.seconds) : Number.POSITIVE_INFINITY;

/** The message, and those of what caused it: fast-check puts the failure itself there. */
function explain(error) {
  const inner = error?.cause instanceof Error ? `${explain(error.cause)}\n` : '';
  return inner + String(error?.message ?? error);
}

/** One file: counts, failures, and whether it came to its end. */
async function runFile(file, milliseconds) {
  const result = {
    file: path.relative(process.cwd(), file),
    passed: 0,
    skipped: 0,
    failed: 0,
    failures: [],
    seconds: 0,
  };
  const started = performance.now();
  const limit = Number.isFinite(milliseconds) ? { timeout: Math.max(1, Math.round(milliseconds)) } : {};
  for await (const { type, data } of run({ files: [file], concurrency: false, ...limit })) {
    if (type === 'test:stderr') process.stderr.write(data.message);
    const own = data?.name !== file && data?.name !== path.relative(process.cwd(), file);
    if (type === 'test:pass' && data.details?.type !== 'suite' && own) {
      if (data.skip !== undefined) result.skipped++;
      else result.passed++;
    }
    if (type === 'test:fail') {
      const error = data.details?.error;
      // A suite, or a file, fails with its tests; only what failed by itself counts.
      if (error?.failureType === 'subtestsFailed') continue;
      result.failed++;
      result.failures.push({ name: data.name, message: explain(error?.cause ?? error).slice(0, 1000) });
    }
  }
  result.seconds = Number(((performance.now() - started) / 1000).toFixed(2));
  return result;
}

const results = [];
for (const [i, file] of positionals.entries()) {
  const left = end - performance.now();
  if (left < 1000) {
    const rest = positionals.slice(i).map((name) => path.relative(process.cwd(), name));
    console.log(`out of time: ${rest.length} files were not run: ${rest.join(', ')}`);
    for (const name of rest)
      results.push({
        file: name,
        passed: 0,
        skipped: 0,
        failed: 1,
        failures: [{ name, message: 'not run: out of time' }],
        seconds: 0,
      });
    break;
  }
  const result = await runFile(path.resolve(file), left);
  results.push(result);
  console.log(
    `${result.failed ? 'FAILED' : 'passed'} ${result.file}: ${result.passed} passed, ${result.failed} failed, ` +
      `${result.skipped} skipped, ${result.seconds} s`,
  );
  for (const { name, message } of result.failures) console.log(`  ${name}\n    ${message.replaceAll('\n', '\n    ')}`);
}
const total = (key) => results.reduce((sum, result) => sum + result[key], 0);
console.log(`tests: ${total('passed')} passed, ${total('failed')} failed, ${total('skipped')} skipped`);
if (values.summary) fs.writeFileSync(values.summary, `${JSON.stringify(results, null, 1)}\n`);
process.exitCode = total('failed') > 0 || total('passed') === 0 ? 1 : 0;
