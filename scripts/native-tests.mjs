// Builds the native tests with AddressSanitizer and UBSan in build/ and runs them, then a bounded fuzz of the
// program validator: node scripts/native-tests.mjs [--no-sanitize] [--fuzz-seconds 10] [test name]...
import { spawnSync } from 'node:child_process';
import { dirname, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..');
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    'no-sanitize': { type: 'boolean', default: false },
    'fuzz-seconds': { type: 'string', default: '10' },
    'fuzz-seed': { type: 'string', default: '1' },
  },
});
const sanitize = !values['no-sanitize'];
const build = resolve(root, 'build', sanitize ? 'native-tests-sanitized' : 'native-tests');

function run(command, args, env = {}) {
  console.log(`$ ${[command, ...args].join(' ')}`);
  const { status, signal, error } = spawnSync(command, args, { stdio: 'inherit', env: { ...process.env, ...env } });
  if (status !== 0) {
    console.error(`native tests: ${command} failed: ${error?.message ?? signal ?? `exit code ${status}`}`);
    process.exit(1);
  }
}

run('cmake', [
  ...['-S', root, '-B', build, '-DCMAKE_BUILD_TYPE=Release', '-DELASTIFORM_TESTS=ON'],
  `-DELASTIFORM_SANITIZE=${sanitize ? 'ON' : 'OFF'}`,
]);
run('cmake', ['--build', build, '--config', 'Release', '--parallel', '2']);
const options = {
  ASAN_OPTIONS: 'detect_leaks=1:detect_stack_use_after_return=1',
  UBSAN_OPTIONS: 'print_stacktrace=1:halt_on_error=1',
};
run(resolve(build, 'elastiform_tests'), positionals, options);
run(resolve(build, 'elastiform_fuzz'), ['100000000', values['fuzz-seed'], values['fuzz-seconds']], options);
