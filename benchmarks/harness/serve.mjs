// The child's side of a benchmark: answers requests of the coordinator, one JSON line each (stdin in, descriptor 3 out).
import fs from 'node:fs';
import readline from 'node:readline';

/** Serves `commands` (name -> async (args) => JSON value) until stdin ends. */
export async function serve(commands) {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const { command, args } = JSON.parse(line);
    let reply;
    try {
      reply = { result: (await commands[command](args ?? {})) ?? null };
    } catch (error) {
      reply = { error: error?.stack ?? String(error) };
    }
    fs.writeSync(3, `${JSON.stringify(reply)}\n`);
  }
  process.exit(0);
}

/** Calls `body` until `targetMs` have passed (at least once); milliseconds per call by the wall clock. */
export async function batch(targetMs, body) {
  const start = performance.now();
  let calls = 0;
  let elapsed;
  do {
    await body();
    calls++;
    elapsed = performance.now() - start;
  } while (elapsed < targetMs);
  return { ms: elapsed / calls, calls };
}

/** Float32Array to base64, for one reply. */
export const encode = (values) => Buffer.from(values.buffer, values.byteOffset, values.byteLength).toString('base64');

/** Resident memory of this process in bytes: peak since `resetPeak`, and now split into anonymous and file pages. */
export function memory() {
  if (process.platform !== 'linux') return { peak: process.resourceUsage().maxRSS * 1024 };
  const status = fs.readFileSync('/proc/self/status', 'utf8');
  const field = (name) => 1024 * Number(new RegExp(`${name}:\\s+(\\d+)`).exec(status)[1]);
  return { peak: field('VmHWM'), anonymous: field('RssAnon'), file: field('RssFile') };
}

/** Starts the peak over; false where the system cannot (the peak then includes loading). */
export function resetPeak() {
  try {
    fs.writeFileSync('/proc/self/clear_refs', '5');
    return true;
  } catch {
    return false;
  }
}
