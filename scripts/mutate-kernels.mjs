// Asks whether the native tests would notice: seeds each defect of scripts/kernel-mutations.mjs into a copy of the
// sources in build/mutants, compiles, and runs a native test. Fails when a mutation does not apply or compile, or when
// one that should be caught is not. node scripts/mutate-kernels.mjs [--only text] [--test device]
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { mutations } from './kernel-mutations.mjs';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..');
const source = join(root, 'build/mutants/source');
const build = join(root, 'build/mutants/build');
const { values } = parseArgs({
  options: { only: { type: 'string', default: '' }, test: { type: 'string', default: 'device' } },
});

function run(command, args, options = {}) {
  const result = spawnSync(command, args, { encoding: 'utf8', maxBuffer: 1 << 26, ...options });
  return { ok: result.status === 0, timedOut: result.error?.code === 'ETIMEDOUT', text: result.stderr + result.stdout };
}

/** Writes a file unless it has that content: what is not touched is not compiled again. */
function put(path, content) {
  if (existsSync(path) && readFileSync(path, 'utf8') === content) return;
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, content);
}

function stop(message) {
  console.error(message);
  process.exit(1);
}

const compile = () => run('cmake', ['--build', build, '--target', 'elastiform_tests', '--parallel', '2']);
const test = () => run(join(build, 'elastiform_tests'), [values.test], { timeout: 60_000, killSignal: 'SIGKILL' });

const files = run('git', ['ls-files', 'CMakeLists.txt', 'native', 'package.json'], { cwd: root })
  .text.trim()
  .split('\n');
for (const file of files) put(join(source, file), readFileSync(join(root, file), 'utf8'));

const started = performance.now();
const configured = run('cmake', [
  ...['-S', source, '-B', build, '-DCMAKE_BUILD_TYPE=Release', '-DCMAKE_CXX_FLAGS_RELEASE=-O1'],
  ...['-DELASTIFORM_TESTS=ON', '-DELASTIFORM_CUDA=OFF'],
]);
if (!configured.ok) stop(configured.text);
const compiled = compile();
if (!compiled.ok) stop(compiled.text);
const sound = test();
if (!sound.ok) stop(`the test fails without any mutation:\n${sound.text}`);

let caught = 0;
let wrong = 0;
const selected = mutations.filter((mutation) => mutation.what.includes(values.only));
for (const mutation of selected) {
  const path = join(source, mutation.file);
  const original = readFileSync(path, 'utf8');
  const parts = original.split(mutation.search);
  let verdict;
  if (parts.length !== 2) {
    verdict = `DOES NOT APPLY: found ${parts.length - 1} times`;
    wrong++;
  } else {
    writeFileSync(path, parts.join(mutation.replace));
    const mutant = compile();
    if (!mutant.ok) {
      verdict = `DOES NOT COMPILE:\n${mutant.text}`;
      wrong++;
    } else {
      const result = test();
      if (result.ok) {
        verdict = mutation.missed ? `missed, as expected: ${mutation.missed}` : 'MISSED';
        if (!mutation.missed) wrong++;
      } else {
        caught++;
        const says = /\[simt\] .*/.exec(result.text)?.[0] ?? result.text.split('\n')[0];
        verdict = `caught: ${result.timedOut ? 'hangs' : says.slice(0, 160)}`;
        if (mutation.missed) verdict += ' (the table says it would be missed)';
      }
    }
    writeFileSync(path, original);
  }
  console.log(`${mutation.what}\n    ${verdict}`);
}
const seconds = ((performance.now() - started) / 1000).toFixed(0);
console.log(`${caught} of ${selected.length} seeded defects caught in ${seconds} s`);
process.exit(wrong > 0 ? 1 : 0);
