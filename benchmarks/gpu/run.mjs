// GPU benchmarks: elastiform and its peers on one card, taking turns in rotated order; medians, ratios, goals.
import fs from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { Child } from '../harness/child.mjs';
import { summary } from '../harness/measure.mjs';
import { number, table } from '../harness/report.mjs';
import { cardNow, Results } from './results.mjs';
import { FULL, flops, GROUPS, TINY } from './shapes.mjs';

const HELP = `node benchmarks/gpu/run.mjs [options]

  --only LIST     comma-separated: ${GROUPS.join(', ')} (default: all)
  --rounds N      rounds of every group (default: 7)
  --seconds N     what may take so long in all (default: no limit); groups that do not fit are left out
  --device NAME   cuda (default) or simt
  --dry-run       tiny shapes, one round: shows that everything runs, measures nothing
  --out DIR       where the results go (default: results)
  --work DIR      where they grow (default: the same)
  --help

The Python of the peers is named by ELASTIFORM_BENCH_PYTHON (default: python3).`;

const { values } = parseArgs({
  options: {
    only: { type: 'string' },
    rounds: { type: 'string' },
    seconds: { type: 'string' },
    device: { type: 'string', default: 'cuda' },
    'dry-run': { type: 'boolean', default: false },
    out: { type: 'string', default: 'results' },
    work: { type: 'string' },
    help: { type: 'boolean', default: false },
  },
});
if (values.help) {
  console.log(HELP);
  process.exit(0);
}
const dry = values['dry-run'];
const only = values.only?.split(',') ?? GROUPS;
for (const name of only) if (!GROUPS.includes(name)) throw new Error(`--only takes ${GROUPS.join(', ')}, got ${name}`);
const rounds = dry ? 1 : Number(values.rounds ?? 7);
// Seconds that a process may take to start, to prepare a group, and for a turn; a dry run may share its machine.
const [START, PREPARE, TURN] = dry ? [600, 900, 600] : [90, 150, 60];
const end = performance.now() + 1000 * Number(values.seconds ?? 1e6);
const left = () => (end - performance.now()) / 1000;
const log = (message) => console.log(`[gpu] ${message}`);

const python = process.env.ELASTIFORM_BENCH_PYTHON || 'python3';
const CONTESTANTS = {
  ours: { file: '../gpu/ours.mjs', args: { device: values.device } },
  torch: { file: '../gpu/torch_worker.py', options: { program: python }, args: { compiled: false } },
  // In a process of its own, where compiling does not keep the others from being prepared.
  compiled: { file: '../gpu/torch_worker.py', options: { program: python }, args: { compiled: true } },
};
const children = {};
const facts = {};

async function within(seconds, what, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what} took longer than ${Math.round(seconds)} s`)), 1000 * seconds);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** The contestant's process; a new one when it died or was ended. */
async function contestant(name) {
  if (!children[name]) {
    const { file, options, args } = CONTESTANTS[name];
    const child = new Child(name, file, options);
    children[name] = child;
    facts[name] = await within(Math.min(START, left()), `starting ${name}`, child.ask('setup', args));
  }
  return children[name];
}

function stop(name) {
  children[name]?.kill();
  delete children[name];
}

/** Asks, and ends the process when it fails: a device that a fault has lost answers nothing any more. */
async function ask(name, command, args, seconds) {
  try {
    const child = await contestant(name);
    return await within(Math.max(1, Math.min(seconds, left())), `${name}: ${command}`, child.ask(command, args));
  } catch (error) {
    stop(name);
    throw error;
  }
}

async function measure(group, shape) {
  const names = Object.keys(CONTESTANTS).filter((name) => name !== 'compiled' || group.startsWith('ffn'));
  const entries = {};
  const prepared = await Promise.allSettled(names.map((name) => ask(name, 'group', { name: group, shape }, PREPARE)));
  const ready = [];
  const gone = new Map();
  const before = cardNow();
  for (const [i, name] of names.entries()) {
    const { status, value, reason } = prepared[i];
    if (status === 'rejected') {
      entries[name] = { missing: reason.message.slice(0, 2000) };
      continue;
    }
    for (const [key, found] of Object.entries(value)) {
      const entry = name === 'ours' ? `ours ${key}` : key;
      entries[entry] = found.missing ? found : { unit: found.unit, facts: found.facts, samples: [] };
      if (!found.missing) ready.push({ name, key, entry, calls: dry ? 1 : found.calls });
    }
  }
  const began = performance.now();
  let done = 0;
  for (; done < rounds; done++) {
    // Slow groups get fewer rounds.
    if (done >= 3 && performance.now() - began > 45_000) break;
    for (let turn = 0; turn < ready.length; turn++) {
      const c = ready[(turn + done) % ready.length];
      const entry = entries[c.entry];
      if (gone.has(c.name) || left() < 5) continue;
      try {
        const { samples, facts } = await ask(c.name, 'turn', { key: c.key, calls: c.calls }, TURN);
        if (!samples.every(Number.isFinite)) throw new Error('a time is not a number');
        entry.samples.push(...samples);
        entry.facts = facts;
      } catch (error) {
        // Its process is gone, and all that was prepared in it; what it measured so far counts.
        gone.set(c.name, error.message);
      }
    }
  }
  for (const name of names) {
    if (!children[name]) continue;
    // A device that a fault has lost answers nothing any more: what failed begins anew with the next group.
    const own = Object.entries(entries).filter(([key]) => key.startsWith('ours ') === (name === 'ours'));
    if (own.some(([, entry]) => entry.missing)) stop(name);
    else await ask(name, 'free', {}, 30).catch(() => {});
  }
  const measured = Object.fromEntries(
    Object.entries(entries).map(([key, entry]) => {
      if (!entry.samples?.length) {
        const who = ready.find((c) => c.entry === key)?.name;
        return [key, { missing: entry.missing ?? gone.get(who) ?? 'out of time' }];
      }
      return [key, { unit: entry.unit, facts: entry.facts, ...summary(entry.samples) }];
    }),
  );
  return { shape, rounds: done, clocks: { before, after: cardNow() }, entries: measured };
}

/** What a time means: TFLOP/s, or TB/s. */
function rate(group, key, shape, ms) {
  const name = key.replace(/^(ours|cublaslt|cublas|flash|eager|compiled|triton) /, '');
  const tera = (count) => `${number(count / ms / 1e9, count / ms / 1e9 < 10 ? 2 : 0)}`;
  if (group === 'ceilings') {
    return key === 'copy' ? `${tera(2 * shape.copyBytes)} TB/s` : `${tera(2 * shape.size ** 3)} TFLOP/s`;
  }
  if (group === 'gemm') return `${tera(flops.product(shape.rows, shape.products[name]))} TFLOP/s`;
  if (group.startsWith('ffn') && key !== 'ours cpu') {
    return `${tera(flops.ffn(shape, name === 'routed' ? shape.capacity : 1))} TFLOP/s`;
  }
  if (group === 'slices') return `${tera(flops.ffn(shape, Number(name)))} TFLOP/s`;
  if (group === 'attention') return `${tera(flops.attention(shape, Number.parseInt(name, 10)))} TFLOP/s`;
  if (group === 'loss') return `${tera(flops.loss(shape))} TFLOP/s`;
  return '';
}

function report(group, { shape, entries }) {
  const rows = Object.entries(entries).map(([key, entry]) => {
    if (entry.missing) return [key, '-', '', entry.missing.split('\n')[0].slice(0, 100)];
    const unit = entry.unit === 'ms' ? 'ms' : 'µs';
    const bytes = entry.facts?.peakBytes ?? entry.facts?.extraBytes;
    return [
      key,
      `${entry.median.toPrecision(4)} ${unit} (${entry.min.toPrecision(3)} to ${entry.max.toPrecision(3)})`,
      rate(group, key, shape, entry.median),
      bytes === undefined ? '' : `${(bytes / 1e9).toFixed(2)} GB`,
    ];
  });
  return table([group, 'median (range)', 'rate', ''], rows);
}

const root = path.join(import.meta.dirname, '../..');
const manifestFile = path.join(root, 'manifest.json');
const manifest = fs.existsSync(manifestFile) ? JSON.parse(fs.readFileSync(manifestFile, 'utf8')) : { commit: null };
const work = values.work ?? values.out;
fs.mkdirSync(work, { recursive: true });
const results = dry ? null : Results.open(values.out, work, manifest);
process.on('exit', () => {
  for (const name of Object.keys(children)) stop(name);
});
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(130));

let ran = 0;
let failed = 0; // ours
let peersMissing = 0;
let leftOut = 0;
for (const group of GROUPS) {
  if (!only.includes(group)) continue;
  if (left() < 15) {
    log(`${group}: no time left`);
    leftOut++;
    continue;
  }
  const started = performance.now();
  const shape = (dry ? TINY : FULL)[group];
  const measured = await measure(group, shape);
  const missing = Object.entries(measured.entries).filter(([, entry]) => entry.missing);
  ran += Object.keys(measured.entries).length - missing.length;
  const isOurs = ([key]) => /^ours\b/.test(key);
  failed += missing.filter(isOurs).length;
  peersMissing += missing.filter((entry) => !isOurs(entry)).length;
  if (dry) {
    for (const [key, entry] of Object.entries(measured.entries)) {
      const how = isOurs([key]) ? 'FAILS' : 'not run';
      console.log(`${group}: ${key}: ${entry.missing ? `${how}: ${entry.missing.trim().split('\n').at(-1)}` : 'runs'}`);
    }
  } else {
    console.log(`\n${report(group, measured)}`);
    results.update((data) => {
      data.facts = { ...data.facts, ...facts };
      data.groups[group] = measured;
    });
  }
  log(`${group}: ${((performance.now() - started) / 1000).toFixed(1)} s`);
}
for (const name of Object.keys(children)) stop(name);
if (dry) {
  const parts = [`${ran} cases ran`, `${failed} of ours failed`, `${peersMissing} of peers not run`];
  if (leftOut) parts.push(`${leftOut} groups out of time`);
  console.log(`DRY RUN: ${parts.join(', ')}; nothing was measured.`);
}
// A dry run answers for all of ours. 78: only a part ran, which scripts/gpu/run.sh reports as such.
const bad = ran === 0 || (dry && failed + leftOut > 0);
process.exitCode = bad ? 1 : dry && peersMissing > 0 ? 78 : 0;
