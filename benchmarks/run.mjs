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
import { encoder } from './suites/encoder.mjs';
import { engine } from './suites/engine.mjs';
import { exits } from './suites/exits.mjs';
import { gemm } from './suites/gemm.mjs';
import { importing } from './suites/import.mjs';
import { inference } from './suites/inference.mjs';
import { nested } from './suites/nested.mjs';
import { routed } from './suites/routed.mjs';
import { seq2seq } from './suites/seq2seq.mjs';
import { speculative } from './suites/speculative.mjs';
import { training } from './suites/train.mjs';

const SUITES = {
  encoder,
  engine,
  exits,
  gemm,
  import: importing,
  inference,
  nested,
  routed,
  seq2seq,
  speculative,
  train: training,
};
const NAMES = Object.keys(SUITES);
const FORMAT = 2; // of the results file
const HELP = `npm run bench -- [options]

  --only LIST    comma-separated: ${NAMES.join(', ')} (default: all); the others keep the day's results
  --rounds N     rounds of every timing (default: 9; 5 for train)
  --quick        2 rounds of short batches, fewer cases: checks that everything runs, times nothing
  --threads N    default: all cores that this process may use
  --help`;

function readOptions() {
  try {
    return options();
  } catch (error) {
    console.error(`bench: ${error.message}\n\n${HELP}`);
    process.exit(2);
  }
}

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
  const only = new Set(values.only?.split(',') ?? NAMES);
  for (const name of only) {
    if (!NAMES.includes(name)) throw new Error(`--only takes ${NAMES.join(', ')}, got ${name}`);
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

const settings = readOptions();
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

const started = new Date().toISOString();
const machine = machineFacts();
// Virtual machines call many a processor by one name.
const cpu = [machine.cpu, machine.cpuFamilyModel ?? '']
  .join(' ')
  .toLowerCase()
  .replaceAll(/[^a-z0-9]+/g, '-')
  .replaceAll(/^-|-$/g, '');
const folder = quick ? CACHE : path.join(import.meta.dirname, 'results');
const base = path.join(folder, `${cpu}-${started.slice(0, 10)}`);

/** Suites measured earlier today, with as many threads on such a machine, that this run does not repeat. */
function earlierSuites() {
  if (!fs.existsSync(`${base}.json`)) return {};
  const earlier = JSON.parse(fs.readFileSync(`${base}.json`, 'utf8'));
  if (earlier.format !== FORMAT || earlier.threads !== threads) return {};
  if (JSON.stringify(earlier.machine) !== JSON.stringify(machine)) return {};
  return earlier.suites;
}

const fresh = {};
for (const name of NAMES) {
  if (!only.has(name)) continue;
  const facts = { started: new Date().toISOString(), commit: commit() };
  try {
    const rounds = settings.rounds ?? (quick ? 2 : name === 'train' ? 5 : 9);
    const { libraries, data, text, targets } = await SUITES[name]({ ...context, rounds });
    fresh[name] = { ...facts, libraries, ...data, targets, text };
  } catch (error) {
    process.exitCode = 1;
    fresh[name] = { ...facts, error: error.message, targets: [], text: `failed: ${error.message}` };
    log(`${name} failed: ${error.stack}`);
  }
}
const measured = { ...earlierSuites(), ...fresh };
const results = {
  format: FORMAT,
  machine,
  threads,
  quick,
  rules: { foreignLoadLimit: FOREIGN_LIMIT, statistic: 'median of rounds, rotated order, one process per library' },
  model: { name: 'GPT-2 small shape, random weights', seed: SEED, ...SHAPE },
  missing: Object.fromEntries(Object.entries(peers).flatMap(([name, p]) => (p.missing ? [[name, p.missing]] : []))),
  suites: Object.fromEntries(NAMES.filter((name) => name in measured).map((name) => [name, measured[name]])),
};

const disturbed = JSON.stringify(results.suites).match(/"disturbed":[1-9]/g)?.length ?? 0;
const targets = Object.values(results.suites).flatMap((suite) => suite.targets);
const report = [
  `# ${machine.cpu}, ${threads} threads, ${started.slice(0, 10)}`,
  ...(quick ? ['This was a quick run: its numbers mean nothing.'] : []),
  `## Targets\n\n${targetTable(targets)}`,
  ...Object.entries(results.suites).map(([name, suite]) => `## ${name}\n\n${suite.text}`),
  disturbed > 0
    ? `${disturbed} timings hold turns during which other programs used the machine.`
    : 'No turn was disturbed by other programs.',
].join('\n\n');
console.log(`\n${report}\n`);

fs.mkdirSync(folder, { recursive: true });
fs.writeFileSync(`${base}.json`, `${JSON.stringify(results, null, 1)}\n`);
fs.writeFileSync(`${base}.md`, `${report}\n`);
log(`written to ${path.relative(process.cwd(), base)}.json and .md`);
