// Checks prebuilt addons: node scripts/prebuild/check.mjs [--glibc VERSION] [--max-mb 8] [--cuda] FILE...
// Each must be no larger than that, load with an empty environment, and with --cuda have CUDA kernels. An ELF file must
// also need no glibc newer than VERSION, no libstdc++ and no library beyond those of every Linux system, export what
// Node-API looks for and nothing else, stay loaded when a worker thread ends, and name no folder of the build.
import { execFileSync, spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { resolve } from 'node:path';
import { parseArgs } from 'node:util';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    glibc: { type: 'string' },
    'max-mb': { type: 'string', default: '8' },
    cuda: { type: 'boolean', default: false },
  },
});
const libraries = /^(libc\.so\.6|libm\.so\.6|libpthread\.so\.0|libdl\.so\.2|librt\.so\.1|ld-linux-[\w-]+\.so\.[12])$/;
const entryPoints = ['napi_register_module_v1', 'node_api_module_get_api_version_v1'];

const read = (command, ...args) => execFileSync(command, args, { encoding: 'utf8', maxBuffer: 1 << 28 });
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
const newer = (a, b) => a.localeCompare(b, 'en', { numeric: true }) > 0;

function* problemsOfElf(file, bytes) {
  const header = read('objdump', '-p', file);
  const needed = [...header.matchAll(/^ {2}NEEDED +(\S+)$/gm)].map(([, name]) => name);
  for (const name of needed) if (!libraries.test(name)) yield `needs ${name}`;
  if (/^ {2}R(UN)?PATH/m.test(header)) yield 'has a path to search libraries in';
  const flags = Number(/^ {2}FLAGS_1 +(\S+)$/m.exec(header)?.[1] ?? 0);
  if (!(flags & 0x8)) yield 'would be unloaded with its last worker thread (no -z nodelete)';

  const symbols = read('objdump', '-T', file);
  const versions = new Set(
    [...symbols.matchAll(/\((GLIBC(?:XX)?|CXXABI|GCC)_([\d.]+)\)/g)].map(([, a, b]) => `${a} ${b}`),
  );
  let glibc = '0';
  for (const [family, version] of [...versions].map((text) => text.split(' '))) {
    if (family !== 'GLIBC') yield `needs ${family}_${version} of a shared C++ library`;
    else if (newer(version, glibc)) glibc = version;
  }
  if (values.glibc && newer(glibc, values.glibc)) yield `needs glibc ${glibc}, newer than ${values.glibc}`;
  const exported = read('nm', '-D', '--defined-only', file)
    .trim()
    .split('\n')
    .map((line) => line.split(' ').at(-1));
  for (const name of exported) if (!entryPoints.includes(name)) yield `exports ${name}`;
  for (const name of entryPoints) if (!exported.includes(name)) yield `does not export ${name}`;
  if (bytes.includes(process.cwd())) yield `names the folder ${process.cwd()}`;
  console.log(`  glibc ${glibc}; ${needed.join(', ')}`);
}

function* problemsOf(file) {
  const bytes = readFileSync(file);
  console.log(`${file}: ${megabytes(bytes.length)}`);
  if (bytes.length > Number(values['max-mb']) * 1e6) yield `is larger than ${values['max-mb']} MB`;
  if (bytes.subarray(0, 4).equals(Buffer.from('\x7fELF', 'latin1'))) yield* problemsOfElf(file, bytes);
  else console.log('  no ELF file: symbols and libraries not checked');

  const load = `console.log(JSON.stringify(require(${JSON.stringify(resolve(file))}).info()))`;
  const env = process.platform === 'win32' ? { SystemRoot: process.env.SystemRoot } : {};
  const { status, signal, stdout, stderr } = spawnSync(process.execPath, ['-e', load], { encoding: 'utf8', env });
  if (status !== 0 || stderr) return yield `does not load: ${stderr.trim() || signal}`;
  const { isaAvailable, devices } = JSON.parse(stdout);
  console.log(`  loads: ${isaAvailable.join(', ')}; CUDA: ${devices.cuda.description}`);
  if (values.cuda && /no CUDA kernels/.test(devices.cuda.description)) yield 'has no CUDA kernels';
}

let failed = positionals.length === 0;
if (failed) console.error('no file to check');
for (const file of positionals) {
  for (const problem of problemsOf(file)) {
    failed = true;
    console.error(`${file}: ${problem}`);
  }
}
process.exit(failed ? 1 : 0);
