// Runs the benchmarks: elastiform and its peers side by side, medians and ratios of one run, JSON and a report.
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { Child } from './harness/child.mjs';
import { machineFacts } from './harness/machine.mjs';
import { FOREIGN_LIMIT } from './harness/measure.mjs';
import { findPeers } from './harness/peers.mjs';
import { targetTable } from './harness/report.mjs';
import { CACHE, prepareModel } from './model/prepare.mjs';
import { SEED, SHAPE } from './model/shape.mjs';
import { gemm } from './suites/gemm.mjs';
import { inference } from './suites/inference.mjs';
import { routed } from './suites/routed.mjs';
import { training } from './suites/train.mjs';

const BENCHMARKS = ['gemm', 'prefill', 'decode', 'routed', 'train'];
const HELP = `npm run bench -- [options]

  --only LIST    comma-separated: ${BENCHMARKS.join(', ')} (default: all)
  --rounds N     rounds of every timing (default: 9; 5 for train)
  --quick        2 rounds of short batches, fewer cases: checks that everything runs, times nothing
  --threads N    default: all cores that this process may use
  --help`;

function options() {
  const { values } = parseArgs({
    options: {
      only: { type: 'string' },
      rounds: { type: 'string' },
      threads: { type: 'string' },
      quick: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  });
  if (values.help) {
    console.log(HELP);
    process.exit(0);
  }
  const positive = (name) => {
    if (values[name] === undefined) return undefined;
    const value = Number(values[name]);
    if (!Number.isInteger(value) || value < 1)
      throw new Error(`--${name} must be a positive integer, got ${values[name]}`);
    return value;
  };
  const only = new Set(values.only?.split(',') ?? BENCHMARKS);
  for (const name of only) {
    if (!BENCHMARKS.includes(name)) throw new Error(`--only takes ${BENCHMARKS.join(', ')}, got ${name}`);
  }
  return {
    only,
    quick: values.quick,
    rounds: positive('rounds'),
    threads: positive('threads') ?? os.availableParallelism(),
  };
}

function commit() {
  try {
    const git = (...args) =>
      execFileSync('git', args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim();
    const changed = git('status', '--porcelain', '--', 'lib', 'native') !== '';
    return git('rev-parse', 'HEAD') + (changed ? ' with changes' : '');
  } catch {
    return null;
  }
}

const settings = options();
const { only, quick, threads } = settings;
const log = (message) => console.error(`[bench] ${message}`);

const peers = findPeers();
for (const [name, peer] of Object.entries(peers)) {
  if (peer.missing) log(`${name} is missing and will not be compared; to have it: ${peer.missing}`);
}
const children = new Set();
process.on('exit', () => {
  for (const child of children) child.kill();
});
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(130));

const context = {
  ...settings,
  // Turns that other programs disturbed are repeated so often at most.
  repeats: quick ? 0 : 6,
  peers,
  log,
  cache: CACHE,
  dir: prepareModel(log),
  start(...args) {
    const child = new Child(...args);
    children.add(child);
    return child;
  },
};
const rounds = (many) => settings.rounds ?? (quick ? 2 : many);
const suites = {
  gemm: only.has('gemm') && (() => gemm({ ...context, rounds: rounds(9) })),
  inference: (only.has('prefill') || only.has('decode')) && (() => inference({ ...context, rounds: rounds(9) })),
  routed: only.has('routed') && (() => routed({ ...context, rounds: rounds(9) })),
  train: only.has('train') && (() => training({ ...context, rounds: rounds(5) })),
};

const results = {
  format: 1,
  started: new Date().toISOString(),
  commit: commit(),
  machine: machineFacts(),
  threads,
  quick,
  rules: { foreignLoadLimit: FOREIGN_LIMIT, statistic: 'median of rounds, rotated order, one process per library' },
  model: { name: 'GPT-2 small shape, random weights', seed: SEED, ...SHAPE },
  missing: Object.fromEntries(Object.entries(peers).flatMap(([name, p]) => (p.missing ? [[name, p.missing]] : []))),
  suites: {},
  targets: [],
};
const texts = [];
for (const [name, run] of Object.entries(suites)) {
  if (!run) continue;
  try {
    const { libraries, data, text, targets } = await run();
    results.suites[name] = { libraries, ...data };
    results.targets.push(...targets);
    texts.push(`## ${name}\n\n${text}`);
  } catch (error) {
    process.exitCode = 1;
    results.suites[name] = { error: error.message };
    texts.push(`## ${name}\n\nfailed: ${error.message}`);
    log(`${name} failed: ${error.stack}`);
  }
}
results.finished = new Date().toISOString();

const disturbed = JSON.stringify(results.suites).match(/"disturbed":[1-9]/g)?.length ?? 0;
const report = [
  `# ${results.machine.cpu}, ${threads} threads, ${results.started.slice(0, 10)}`,
  ...(quick ? ['This was a quick run: its numbers mean nothing.'] : []),
  ...texts,
  `## Targets\n\n${targetTable(results.targets)}`,
  disturbed > 0
    ? `${disturbed} timings hold turns during which other programs used the machine.`
    : 'No turn was disturbed by other programs.',
].join('\n\n');
console.log(`\n${report}\n`);

const cpu = results.machine.cpu
  .toLowerCase()
  .replaceAll(/[^a-z0-9]+/g, '-')
  .replaceAll(/^-|-$/g, '');
const base = `${cpu}-${results.started.slice(0, 10)}`;
const folder = quick ? CACHE : path.join(import.meta.dirname, 'results');
fs.mkdirSync(folder, { recursive: true });
fs.writeFileSync(path.join(folder, `${base}.json`), `${JSON.stringify(results, null, 1)}\n`);
fs.writeFileSync(path.join(folder, `${base}.md`), `${report}\n`);
log(`written to ${path.relative(process.cwd(), path.join(folder, base))}.json and .md`);
