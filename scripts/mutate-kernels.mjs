// Asks whether the tests would notice: seeds each defect of scripts/kernel-mutations.mjs into a copy of its file, compiles
// what the defect is to be seen in, links that with the sound objects in build/mutants, and runs the test that the table
// names. Fails when a test fails without any defect, when a mutation does not apply or compile, or when one that should
// be caught is not. node scripts/mutate-kernels.mjs [--only pattern] [--part 1/3]
import { spawn } from 'node:child_process';
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { mutations } from './kernel-mutations.mjs';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..');
const build = join(root, 'build/mutants');
const { values } = parseArgs({
  options: { only: { type: 'string', default: '' }, part: { type: 'string', default: '1/1' } },
});
const workers = availableParallelism();

/** Runs a command line; resolves to how it ended and what it printed. It may take `limit` seconds. */
function run(command, { cwd = build, env = {}, limit = 600 } = {}) {
  return new Promise((done) => {
    // A group of its own: nothing that hangs is left behind.
    const child = spawn(command, { shell: true, detached: true, cwd, env: { ...process.env, ...env } });
    const output = [];
    child.stdout.on('data', (chunk) => output.push(chunk));
    child.stderr.on('data', (chunk) => output.push(chunk));
    let timedOut = false;
    const timer = setTimeout(() => {
      timedOut = true;
      process.kill(-child.pid, 'SIGKILL');
    }, limit * 1000);
    child.on('close', (code) => {
      clearTimeout(timer);
      done({ ok: code === 0, timedOut, text: Buffer.concat(output).toString() });
    });
  });
}

/** `body` of every item, some at a time; body's second argument tells those apart that run together. */
async function together(items, body) {
  let next = 0;
  const work = async (worker) => {
    while (next < items.length) {
      const i = next++;
      await body(items[i], worker, i);
    }
  };
  await Promise.all(Array.from({ length: workers }, (_, worker) => work(worker)));
}

function stop(message) {
  console.error(message);
  process.exit(1);
}

// A test of an op: cases of test/ops/<ops>.test.ts on the emulated device. Others are the native tests of the device.
const targetOf = ({ ops }) => (ops ? 'elastiform' : 'elastiform_tests');
const binaryOf = ({ ops }) => (ops ? 'elastiform.node' : 'elastiform_tests');
const soundBinary = (mutation) => join(build, mutation.ops ? 'Release' : '', binaryOf(mutation));

function test(binary, { ops, cases, env }) {
  if (!ops) return run(`"${binary}" device`, { limit: 120 });
  const vitest = `node "${root}/node_modules/vitest/vitest.mjs" run --project simt --reporter default --bail 1`;
  return run(`${vitest} test/ops/${ops}.test.ts -t "$CASES"`, {
    cwd: root,
    // A schedule that finds values overwritten before they were read, and those not written yet as well.
    env: {
      ...{ ELASTIFORM_NATIVE_PATH: binary, ELASTIFORM_SIMT_SCHEDULE: 'sprint:1', ELASTIFORM_THREADS: '1' },
      ...{ NO_COLOR: '1', CASES: cases, ...env },
    },
    limit: 120,
  });
}

/** Compiles and links a mutation in a folder of its own; resolves to the binary, or says what prevents it. */
async function seed(mutation, folder) {
  rmSync(folder, { recursive: true, force: true });
  const mutated = join(folder, mutation.file);
  mkdirSync(dirname(mutated), { recursive: true });
  // A function, so that no `$` of the replacement means anything.
  writeFileSync(
    mutated,
    readFileSync(join(root, mutation.file), 'utf8').replace(mutation.search, () => mutation.replace),
  );

  const binary = join(folder, binaryOf(mutation));
  let link = readFileSync(join(build, `CMakeFiles/${targetOf(mutation)}.dir/link.txt`), 'utf8')
    .trim()
    .split(' ');
  const objects = [];
  for (const unit of mutation.seenIn ?? [mutation.file]) {
    const name = `${unit.replace(/[/.]/g, '_')}.cc`;
    const [source, object] = [join(folder, name), join(folder, `${name}.o`)];
    writeFileSync(source, `#include "${unit.replace('native/', '')}"\n`);
    const { command, file } = units.find((compiled) => compiled.file.endsWith(`/simt/${name}`));
    const sound = / -o (\S+)/.exec(command)[1];
    const compile = command.replace(' ', ` "-I${folder}/native" `).replace(file, source).replace(sound, object);
    const compiled = await run(`${compile} -O1`);
    if (!compiled.ok) return { failure: `DOES NOT COMPILE:\n${compiled.text}` };
    link = link.filter((word) => word !== sound);
    objects.push(`"${object}"`);
  }
  // First, so that of functions in headers these are taken.
  link[link.indexOf('-o') + 1] = `"${binary}" ${objects.join(' ')}`;
  // An addon that does not load would fail every test.
  const linked = await run(`${link.join(' ')}${mutation.ops ? ` && node -e 'require("${binary}")'` : ''}`);
  return linked.ok ? { binary } : { failure: `DOES NOT LINK:\n${linked.text}` };
}

// Of all of them, whatever part runs: code moves.
for (const { what, file, search } of mutations) {
  const found = readFileSync(join(root, file), 'utf8').split(search).length - 1;
  if (found !== 1) stop(`${what}\n    DOES NOT APPLY: found ${found} times in ${file}`);
}

const started = performance.now();
const configured = await run(
  `npx cmake-js configure -l error -O "${build}" -G "Unix Makefiles" --CDCMAKE_CXX_FLAGS_RELEASE=-O1 ` +
    '--CDELASTIFORM_TESTS=ON --CDELASTIFORM_CUDA=OFF --CDCMAKE_EXPORT_COMPILE_COMMANDS=ON',
  { cwd: root },
);
if (!configured.ok) stop(configured.text);
const compiled = await run(`cmake --build . --target elastiform elastiform_tests --parallel ${workers}`);
if (!compiled.ok) stop(compiled.text);
const units = JSON.parse(readFileSync(join(build, 'compile_commands.json'), 'utf8'));

const [part, parts] = values.part.split('/').map(Number);
if (!(part >= 1 && part <= parts)) stop(`--part must be I/N with 1 <= I <= N, got ${values.part}`);
const selected = mutations
  .filter((mutation) => new RegExp(values.only).test(mutation.what))
  .filter((_, i) => i % parts === part - 1);
/** Tests that several mutations name, in one run. */
const sound = new Map();
for (const mutation of selected) {
  const key = JSON.stringify([mutation.ops, mutation.env]);
  const before = sound.get(key);
  sound.set(key, { ...mutation, cases: before ? `${before.cases}|${mutation.cases}` : mutation.cases });
}
await together([...sound.values()], async (mutation) => {
  const { ok, text } = await test(soundBinary(mutation), mutation);
  if (!ok) stop(`a test fails without any mutation:\n${text}`);
});
console.log(`built, and tests passed without mutations, in ${((performance.now() - started) / 1000).toFixed(0)} s`);

let caught = 0;
let wrong = 0;
async function verdictOf(mutation, folder) {
  const { binary, failure } = await seed(mutation, folder);
  if (failure) {
    wrong++;
    return failure;
  }
  const { ok, timedOut, text } = await test(binary, mutation);
  if (ok) {
    if (!mutation.missed) wrong++;
    return mutation.missed ? `missed, as expected: ${mutation.missed}` : 'MISSED';
  }
  caught++;
  const says = /\[simt\] .*/.exec(text)?.[0] ?? /\w*Error: .*/.exec(text)?.[0] ?? text.split('\n')[0];
  return `caught: ${timedOut ? 'hangs' : says.slice(0, 160)}${mutation.missed ? ' (the table says it would be missed)' : ''}`;
}

const verdicts = [];
let printed = 0;
await together(selected, async (mutation, worker, i) => {
  verdicts[i] = await verdictOf(mutation, join(build, `mutant${worker}`));
  for (; verdicts[printed]; ++printed) console.log(`${selected[printed].what}\n    ${verdicts[printed]}`);
});
const seconds = ((performance.now() - started) / 1000).toFixed(0);
console.log(`${caught} of ${selected.length} seeded defects caught in ${seconds} s`);
process.exit(wrong > 0 ? 1 : 0);
