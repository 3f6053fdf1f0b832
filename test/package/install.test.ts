// The package installed into empty folders in the ways that users do: with scripts and without, with a prebuilt addon,
// without one, and built from source.
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { basename, join, resolve } from 'node:path';
import { expect, inject, it } from 'vitest';
import { cleanEnvironment, emptyFolder, install, installed, pathWithoutCompiler, run, runScript } from './tools.js';

const tarball = join(inject('folder'), inject('packed').filename);
const platform = `${process.platform}-${process.arch}`;
const withoutCompiler = { PATH: pathWithoutCompiler() };

/** The addon that `elastiform doctor` loads from an installation, its path relative to the package. */
function loadedBy(folder: string): string {
  const { code, stdout, stderr } = run(
    'npx',
    ['elastiform', 'doctor', '--json'],
    folder,
    cleanEnvironment(withoutCompiler),
  );
  expect({ code, stderr: withoutNpm(stderr) }).toEqual({ code: 0, stderr: '' });
  const { binary } = JSON.parse(stdout);
  return binary.replace(`${resolve(folder, 'node_modules/elastiform')}/`, '');
}

/** What npm itself warns of (its settings) is not ours. */
function withoutNpm(text: string): string {
  return text.replaceAll(/^npm (warn|notice).*\n/gm, '');
}

const prebuilt = expect.stringMatching(new RegExp(`^prebuilds/${platform}/elastiform.*\\.node$`));

it('normal, with a PATH without compiler', () => {
  const folder = emptyFolder('normal');
  const { code, stderr, seconds } = install(folder, tarball, { env: withoutCompiler });
  expect({ code, stderr: withoutNpm(stderr) }).toEqual({ code: 0, stderr: '' });
  console.log(`installed in ${seconds.toFixed(1)} s, with ${readdirSync(join(folder, 'node_modules')).length} entries`);
  expect(loadedBy(folder)).toEqual(prebuilt);
  expect(existsSync(join(folder, 'node_modules/elastiform/build'))).toBe(false);
});

it('as the README says, with a PATH without compiler', () => {
  const folder = join(inject('folder'), 'fresh'); // beside the tarball
  mkdirSync(folder);
  const commands = [
    'npm init -y',
    'npm install ../elastiform-*.tgz',
    'npx elastiform doctor',
    'npx elastiform generate node_modules/elastiform/models/tiny --prompt "Call me" --max-tokens 30',
  ];
  for (const command of commands) {
    const { code, stdout, stderr } = run('sh', ['-c', command], folder, cleanEnvironment(withoutCompiler));
    console.log(`$ ${command}\n${stdout}${withoutNpm(stderr)}`);
    expect({ command, code }).toEqual({ command, code: 0 });
    if (command.includes('generate')) expect(stdout.length).toBeGreaterThan(30);
  }
});

it('with --ignore-scripts', () => {
  const folder = emptyFolder('no-scripts');
  expect(install(folder, tarball, { flags: ['--ignore-scripts'], env: withoutCompiler }).code).toBe(0);
  expect(loadedBy(folder)).toEqual(prebuilt);
});

it('without a prebuilt addon and without scripts: one error, with every attempt and the command that builds it', () => {
  const folder = emptyFolder('no-prebuild');
  expect(install(folder, inject('bare'), { flags: ['--ignore-scripts'] }).code).toBe(0);
  const script = `import { getRuntime } from 'elastiform';
    try { getRuntime(); } catch ({ name, code, attempts, message }) {
      console.log(JSON.stringify({ name, code, attempts, message }));
    }`;
  const error = JSON.parse(runScript(folder, script).stdout);
  const home = join(folder, 'node_modules/elastiform');
  expect(error).toMatchObject({ name: 'AddonLoadError', code: 'AddonLoad' });
  expect(error.attempts).toEqual([
    { path: join(home, 'build/Release/elastiform.node'), reason: 'no such file' },
    { path: expect.stringContaining(join(home, 'prebuilds', platform)), reason: 'no such file' },
  ]);
  const command = `cd ${home} && npx cmake-js compile`;
  expect(error.message.endsWith(`Build it with a C++20 compiler and cmake: ${command}`)).toBe(true);

  const { code, stdout, stderr } = run('npx', ['elastiform', 'doctor'], folder);
  expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
  expect(withoutNpm(stderr)).toBe(`elastiform: ${error.message.replaceAll(/\s*\n\s*/g, ' ')}\n`);
});

it('without a prebuilt addon and without a compiler: the installation says what is missing', () => {
  const { code, stdout, stderr } = install(emptyFolder('no-compiler'), inject('bare'), { env: withoutCompiler });
  expect(code).not.toBe(0);
  for (const text of [
    'could not be built',
    'C++20 compiler',
    'cmake',
    'npx cmake-js compile',
    'ELASTIFORM_SKIP_BUILD',
  ]) {
    expect(stdout + stderr).toContain(text);
  }
});

it('with a damaged addon', () => {
  const folder = join(inject('folder'), 'damaged');
  cpSync(installed(), folder, { recursive: true });
  const prebuilds = join(folder, 'node_modules/elastiform/prebuilds', platform);
  const file = join(prebuilds, readdirSync(prebuilds)[0]);
  const bytes = readFileSync(file);
  writeFileSync(file, bytes.fill(0, 0, 64)); // the header of every format
  const { code, stderr } = run(process.execPath, ['node_modules/elastiform/dist/cli/main.js', 'doctor'], folder);
  expect(code).toBe(1);
  expect(stderr).toMatch(/build\/Release\/elastiform\.node: no such file /);
  expect(stderr).toMatch(new RegExp(`${basename(file)}: (?!no such file).+ Build it`));
});

it('from source, and again with the command that the error names', () => {
  const folder = emptyFolder('source');
  const { code, stdout, stderr, seconds } = install(folder, tarball, { flags: ['--build-from-source'] });
  expect(code, stdout + stderr).toBe(0);
  console.log(`built from source in ${seconds.toFixed(0)} s`);
  expect(loadedBy(folder)).toBe('build/Release/elastiform.node');

  rmSync(join(folder, 'node_modules/elastiform/build/Release/elastiform.node'));
  rmSync(join(folder, 'node_modules/elastiform/prebuilds'), { recursive: true });
  const failed = run('npx', ['elastiform', 'doctor'], folder);
  expect(failed.code).toBe(1);
  const command = /: (cd .* && npx cmake-js compile)$/m.exec(failed.stderr)?.[1] ?? failed.stderr;
  const built = run('sh', ['-c', command], folder);
  expect(built.code, command + built.stderr).toBe(0);
  expect(loadedBy(folder)).toBe('build/Release/elastiform.node');
});
