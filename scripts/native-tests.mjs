// Builds the native tests with AddressSanitizer and UBSan in build/ and runs them, then a bounded fuzz of the program
// validator and kernels on every instruction set: node scripts/native-tests.mjs [--no-sanitize] [--fuzz-seconds 12]
// [--fuzz-seed 1] [test name]...
import { spawn } from 'node:child_process';
import { dirname, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..');
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    'no-sanitize': { type: 'boolean', default: false },
    'fuzz-seconds': { type: 'string', default: '12' },
    'fuzz-seed': { type: 'string', default: '1' },
  },
});
const sanitize = !values['no-sanitize'];
const build = resolve(root, 'build', sanitize ? 'native-tests-sanitized' : 'native-tests');

/** Runs a command and prints its output when it has ended; resolves to whether it succeeded. */
function run(command, args, env = {}) {
  const line = [...Object.entries(env).map(([name, value]) => `${name}=${value}`), command, ...args].join(' ');
  const started = performance.now();
  return new Promise((done) => {
    const child = spawn(command, args, { env: { ...process.env, ...sanitizers, ...env } });
    const output = [];
    child.stdout.on('data', (chunk) => output.push(chunk));
    child.stderr.on('data', (chunk) => output.push(chunk));
    const end = (failure) => {
      const seconds = ((performance.now() - started) / 1000).toFixed(1);
      process.stdout.write(`$ ${line}  (${seconds} s)\n${Buffer.concat(output)}`);
      if (failure) console.error(`native tests: ${line} failed: ${failure}`);
      done(!failure);
    };
    child.on('error', (error) => end(error.message));
    child.on('close', (code, signal) => end(code === 0 ? null : (signal ?? `exit code ${code}`)));
  });
}

const sanitizers = {
  ASAN_OPTIONS: 'detect_leaks=1:detect_stack_use_after_return=1',
  UBSAN_OPTIONS: 'print_stacktrace=1',
};

/** Runs commands side by side and ends the process when one fails. */
async function all(...runs) {
  if ((await Promise.all(runs)).includes(false)) process.exit(1);
}

await all(
  run('cmake', [
    ...['-S', root, '-B', build, '-DCMAKE_BUILD_TYPE=Release', '-DELASTIFORM_TESTS=ON'],
    `-DELASTIFORM_SANITIZE=${sanitize ? 'ON' : 'OFF'}`,
  ]),
);
await all(run('cmake', ['--build', build, '--config', 'Release', '--parallel', '2']));
// Every test goes through the instruction sets of this machine by itself.
const tests = positionals.length > 0 ? positionals : ['gemm', 'kernels', 'runtime', 'device', 'gpu'];
await all(...tests.map((test) => run(resolve(build, 'elastiform_tests'), [test])));
// Different seeds: the validator is the same on every instruction set. One that this machine lacks runs as the best it has.
const fuzzed = ['portable', 'avx2', 'avx512'].map((isa, i) =>
  run(
    resolve(build, 'elastiform_fuzz'),
    ['1000000000', String(Number(values['fuzz-seed']) + i), values['fuzz-seconds']],
    { ELASTIFORM_ISA: isa },
  ),
);
await all(...fuzzed);
