// Round-robin timing of several libraries side by side, watching for foreign CPU load.
import fs from 'node:fs';
import os from 'node:os';

const TICK_MS = 10; // USER_HZ is 100 on every Linux architecture Node runs on
export const FOREIGN_LIMIT = 0.08;

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Busy ticks of the whole machine (time stolen by the hypervisor included), and of one process.
function machineTicks() {
  const [user, nice, system, , , irq, softirq, steal] = fs
    .readFileSync('/proc/stat', 'utf8')
    .split('\n', 1)[0]
    .split(/\s+/)
    .slice(1)
    .map(Number);
  return user + nice + system + irq + softirq + steal;
}
function processTicks(pid) {
  const stat = fs.readFileSync(`/proc/${pid}/stat`, 'utf8');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return Number(fields[11]) + Number(fields[12]);
}

/** Runs `body` and returns its result with the share of the machine used meanwhile by processes other than `pids`. */
async function watched(pids, body) {
  if (process.platform !== 'linux') return { result: await body(), foreign: null };
  const own = () => [process.pid, ...pids].reduce((sum, pid) => sum + processTicks(pid), 0);
  const start = performance.now();
  const [machine, ours] = [machineTicks(), own()];
  const result = await body();
  const foreignTicks = machineTicks() - machine - (own() - ours);
  const available = ((performance.now() - start) / TICK_MS) * os.cpus().length;
  return { result, foreign: Math.max(0, foreignTicks / available) };
}

/**
 * `body`, run again while other processes used more than 8 % of the machine, up to `repeats` times: its quietest try, and the share
 * they used then (null where the system does not say).
 */
export async function undisturbed(pids, repeats, body) {
  let best = null;
  for (let attempt = 0; attempt <= repeats; attempt++) {
    await sleep(30); // thread pools of the others stop spinning
    const seen = await watched(pids, body);
    if (best === null || seen.foreign < best.foreign) best = seen;
    if (best.foreign === null || best.foreign <= FOREIGN_LIMIT) break;
  }
  return best;
}

export const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
};

export function summary(values) {
  return { median: median(values), min: Math.min(...values), max: Math.max(...values), samples: values };
}

/** One call of each contestant: weights get packed, caches and threads get made. */
export async function warmUp(contestants) {
  for (const c of contestants) await c.child.ask(c.command, { ...c.args, batchMs: 0 });
}

/**
 * Times `contestants` ({ key, child, command, args }) in `rounds` rounds of rotated order. A turn during which other
 * processes used more than 8 % of the machine is repeated, up to `repeats` times; then its quietest try counts and the
 * turn is recorded as disturbed. Returns key -> { median, min, max, samples } in milliseconds, with the
 * foreign share of the machine at each sample and the number of disturbed ones.
 */
export async function roundRobin(contestants, { rounds, repeats, batchMs = 0 }) {
  const pids = [...new Set(contestants.map((c) => c.child.pid))];
  const times = new Map(contestants.map((c) => [c.key, []]));
  const foreign = new Map(contestants.map((c) => [c.key, []]));
  for (let round = 0; round < rounds; round++) {
    for (let turn = 0; turn < contestants.length; turn++) {
      const c = contestants[(turn + round) % contestants.length];
      const best = await undisturbed(pids, repeats, () => c.child.ask(c.command, { ...c.args, batchMs }));
      foreign.get(c.key).push(best.foreign);
      times.get(c.key).push(best.result.ms);
    }
  }
  return Object.fromEntries(
    contestants.map(({ key }) => {
      const shares = foreign.get(key);
      const disturbed = shares.filter((share) => share !== null && share > FOREIGN_LIMIT).length;
      return [key, { ...summary(times.get(key)), foreign: shares, disturbed }];
    }),
  );
}
