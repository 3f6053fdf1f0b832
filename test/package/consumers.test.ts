// The installed package as programs use it: both module systems, TypeScript, worker threads, the end of processes, a
// bundler; and what importing it does and takes.
import { cpSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { build } from 'esbuild';
import { beforeAll, expect, it } from 'vitest';
import { installed, root, run, runScript } from './tools.js';

const model = "'node_modules/elastiform/models/tiny'";
/** Every name that a program may import. */
const entries = Object.keys(JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')).exports)
  .filter((path) => path !== './package.json')
  .map((path) => path.replace(/^\./, 'elastiform'));
let folder: string;
beforeAll(() => {
  folder = installed();
}, 600_000);

/** Generates five tokens with `loadModel` and prints the share of the model's FLOPs that they took: 1. */
const generateFive = `
  const model = await loadModel(${model});
  const stream = model.generate('Call me', { maxTokens: 5 });
  for await (const chunk of stream);
  console.log((await stream.usage).compute.ratio);
  await model.dispose();`;

it.each(entries)('import and require of %s give the same, and print nothing else', (entry) => {
  const imported = runScript(folder, `import * as m from '${entry}'; console.log(Object.keys(m).sort().join());`);
  const required = runScript(folder, `console.log(Object.keys(require('${entry}')).sort().join());`, 'script.cjs');
  expect(imported).toMatchObject({ code: 0, stderr: '' });
  expect(imported.stdout).toMatch(/\w+,\w+/);
  expect(required).toMatchObject({ code: 0, stdout: imported.stdout, stderr: '' });
});

it('what runs has every value that the declarations promise', () => {
  const { types, default: code } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')).exports['.'];
  const names = (path: string) => {
    const script = `console.log(Object.keys(await import('./node_modules/elastiform/${path}')).sort().join());`;
    return runScript(folder, script).stdout;
  };
  const declared = names(types.replace(/\.d\.ts$/, '.js'));
  expect(declared).toContain('loadModel');
  expect(names(code)).toBe(declared);
});

it('what is no entry point cannot be imported', () => {
  const { code, stderr } = runScript(folder, `await import('elastiform/dist/native/load.js');`);
  expect(code).toBe(1);
  expect(stderr).toContain('ERR_PACKAGE_PATH_NOT_EXPORTED');
});

it.each(entries)('importing %s has no side effects: the addon stays unloaded, the process as it was', (entry) => {
  const { code, stdout } = runScript(
    folder,
    `const state = () => JSON.stringify({
      globals: Object.getOwnPropertyNames(globalThis),
      environment: process.env,
      listeners: process.eventNames().map((name) => [String(name), process.listenerCount(name)]),
      resources: process.getActiveResourcesInfo(),
      addons: process.report.getReport().sharedObjects.filter((path) => path.endsWith('.node')),
    });
    const before = state();
    await import('${entry}');
    console.log(state() === before ? 'same' : before + '\\n' + state());`,
  );
  expect({ code, stdout }).toEqual({ code: 0, stdout: 'same\n' });
});

// Modules are what importing costs, about half a millisecond each: of them the limit is 30 ms (`npm run bench -- --only import`).
it.each(entries)("importing %s loads few of the package's files", (entry) => {
  const hooks = `export async function load(url, context, next) {
    if (url.includes('/elastiform/dist/')) process._rawDebug(url);
    return next(url, context);
  }`;
  const { code, stderr } = runScript(
    folder,
    `import { register } from 'node:module';
    register(${JSON.stringify(`data:text/javascript,${encodeURIComponent(hooks)}`)});
    await import('${entry}');`,
  );
  const files = stderr.trim().split('\n');
  expect(code).toBe(0);
  expect(files).toEqual(files.filter((file) => file.startsWith('file:')));
  expect(files.length).toBeGreaterThan(1);
  expect(files.length).toBeLessThanOrEqual(20);
});

it.each([
  ['an ES module', 'consumer.mts', 'import'],
  ['CommonJS', 'consumer.cts', 'require'],
])('TypeScript compiles %s, strictly and with the checks of declarations', (_, file, kind) => {
  const project = join(folder, kind);
  mkdirSync(project);
  cpSync(join(root, 'node_modules/@types/node'), join(folder, 'node_modules/@types/node'), { recursive: true });
  cpSync(join(root, 'node_modules/undici-types'), join(folder, 'node_modules/undici-types'), { recursive: true });
  const load =
    kind === 'import'
      ? entries.map((entry, i) => `import * as entry${i} from '${entry}';`)
      : entries.map((entry, i) => `import entry${i} = require('${entry}');`);
  const source = (budget: string) => `${load.join('\n')}
    export const used = [${entries.map((_, i) => `entry${i}`)}];
    export async function text(dir: string): Promise<string> {
      await using model = await entry0.loadModel(dir);
      const stream = model.generate('Call me', { budget: ${budget}, maxTokens: 5 });
      let all = '';
      for await (const chunk of stream) all += chunk.text;
      const ratio: number = (await stream.usage).compute.ratio;
      return all + ratio;
    }`;
  const compilerOptions = {
    ...{ module: 'NodeNext', moduleResolution: 'NodeNext', target: 'ES2022', types: ['node'] },
    ...{ strict: true, skipLibCheck: false, exactOptionalPropertyTypes: true, noUncheckedIndexedAccess: true },
    noEmit: true,
  };
  writeFileSync(join(project, 'tsconfig.json'), JSON.stringify({ compilerOptions, files: [file] }));
  const compile = (budget: string) => {
    writeFileSync(join(project, file), source(budget));
    return run(process.execPath, [join(root, 'node_modules/typescript/bin/tsc'), '-p', project], folder);
  };
  expect(compile('0.7')).toMatchObject({ code: 0, stdout: '', stderr: '' });
  expect(compile('true').stdout).toMatch(/error TS2322: Type 'true' /); // so types are not any
});

it('generates in the main thread', () => {
  const script = `import { loadModel } from 'elastiform';${generateFive}`;
  expect(runScript(folder, script)).toMatchObject({ code: 0, stdout: '1\n', stderr: '' });
});

it('generates in worker threads at once, one of them ended meanwhile', () => {
  writeFileSync(join(folder, 'worker.mjs'), `import { loadModel } from 'elastiform';${generateFive}`);
  const script = `import { Worker } from 'node:worker_threads';
    const end = (worker) => new Promise((done, fail) => worker.on('exit', done).on('error', fail));
    const [a, b, c] = [0, 1, 2].map(() => new Worker('./worker.mjs'));
    const ends = [end(a), end(b), end(c).catch(String)];
    setTimeout(() => c.terminate(), 30);
    const codes = await Promise.all(ends);
    console.log(codes.slice(0, 2).join());`;
  const { code, stdout, stderr } = runScript(folder, script);
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
  expect(stdout).toMatch(/^(1\n){2,3}0,0\n$/);
});

it.each([
  ['ends by itself with a model undisposed', '', 0],
  ['ends at process.exit() in the middle of a generation', 'process.exit(7);', 7],
  ['ends at an exception in the middle of a generation', "throw new Error('of the program');", 1],
])('a process %s', (_, end, expected) => {
  const script = `import { loadModel } from 'elastiform';
    const model = await loadModel(${model});
    const stream = model.generate('Call me', { maxTokens: ${end ? 2000 : 5} });
    for await (const chunk of stream) { ${end} }
    console.log('end');`;
  const { code, stdout, stderr } = runScript(folder, script);
  expect({ code, stdout }).toEqual({ code: expected, stdout: end ? '' : 'end\n' });
  expect(stderr).toMatch(expected === 1 ? /Error: of the program/ : /^$/);
});

const program = `import { loadModel } from 'elastiform';${generateFive}`;

it('a bundle that leaves the package outside runs', async () => {
  writeFileSync(join(folder, 'program.mjs'), program);
  const outfile = join(folder, 'outside.mjs');
  const options = { bundle: true, platform: 'node', format: 'esm', absWorkingDir: folder, logLevel: 'silent' } as const;
  await build({ ...options, entryPoints: ['program.mjs'], outfile, external: ['elastiform'] });
  expect(run(process.execPath, [outfile], folder)).toMatchObject({ code: 0, stdout: '1\n', stderr: '' });
});

it('a bundle of everything but the addon runs where ELASTIFORM_NATIVE_PATH names it, and says so elsewhere', async () => {
  writeFileSync(join(folder, 'program.mjs'), program);
  const outfile = join(folder, 'bundle/program.mjs');
  const options = { bundle: true, platform: 'node', format: 'esm', absWorkingDir: folder, logLevel: 'silent' } as const;
  const { warnings } = await build({ ...options, entryPoints: ['program.mjs'], outfile });
  expect(warnings).toEqual([]);
  const script = `const { addonPath } = await import('./node_modules/elastiform/dist/native/load.js');
    console.log(addonPath());`;
  const addon = runScript(folder, script).stdout.trim();
  cpSync(addon, join(folder, 'bundle/elastiform.node'));
  const bundled = (path: string) =>
    runScript(folder, "await import('./bundle/program.mjs');", 'run.mjs', {
      ...(path && { ELASTIFORM_NATIVE_PATH: path }),
    });
  expect(bundled('bundle/elastiform.node')).toMatchObject({ code: 0, stdout: '1\n', stderr: '' });
  const { code, stderr } = bundled('');
  expect(code).toBe(1);
  expect(stderr).toContain('AddonLoadError: [native] the elastiform addon could not be loaded');
});
