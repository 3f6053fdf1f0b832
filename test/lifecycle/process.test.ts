// How processes and worker threads with native work in flight end: exit codes, and nothing on stderr.
import { spawnSync } from 'node:child_process';
import { copyFileSync, cpSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { describe, expect, it, vi } from 'vitest';

vi.setConfig({ testTimeout: 120_000 });

const root = resolve(import.meta.dirname, '../..');
const native = JSON.stringify(new URL(`file://${resolve(root, 'dist/native/index.js')}`).href);

// A run of ten seconds or so on an engine, with the encoding written out: [N] feed, 6000 activations, [N] output.
const longRun = `
const { CompiledProgram, Engine } = await import(${native});
const steps = 6000, n = 1 << 22;
const tensors = [2, 0, 1, 0, -1, -1, -1], code = [];
for (let i = 1; i <= steps; i++) {
  tensors.push(i < steps ? 0 : 3, 0, 1, 0, -1, -1, -1);
  code.push(0, 0, 1, 1, 1, 0, i - 1, i);
}
const program = new CompiledProgram(
  Int32Array.from([0x454c4153, 1, 1, steps + 1, steps, 1, 1, n, ...tensors, ...code]), Float64Array.of(2), ['activation'], []);
const engine = new Engine();
const start = () => engine.run(program, Int32Array.of(n), [new Float32Array(n)]);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
`;

// glibc overwrites freed memory under MALLOC_PERTURB_, so that using it shows.
function run(script: string, env: Record<string, string> = {}) {
  const args = ['--input-type=module', '-e', script];
  const child = spawnSync(process.execPath, args, {
    encoding: 'utf8',
    timeout: 110_000,
    env: { ...process.env, MALLOC_PERTURB_: '165', ...env },
  });
  return { code: child.status, stdout: child.stdout, stderr: child.stderr, ended: Date.now() };
}

describe('a process ends cleanly', () => {
  it('after its work, with the engine undisposed', () => {
    const result = run(`
      ${longRun}
      console.log((await engine.run(program, Int32Array.of(1), [Float32Array.of(1)])).outputs[0].length);`);
    expect(result).toMatchObject({ code: 0, stdout: '1\n', stderr: '' });
  });

  it('with an idle engine: it does not keep the process alive', () => {
    expect(run(`${longRun} console.log('idle');`)).toMatchObject({ code: 0, stdout: 'idle\n', stderr: '' });
  });

  it('with a pending run: the process stays until it is done', () => {
    const result = run(`${longRun}
      engine.run(program, Int32Array.of(64), [new Float32Array(64)]).then(() => console.log('done'));`);
    expect(result).toMatchObject({ code: 0, stdout: 'done\n', stderr: '' });
  });

  it('at process.exit() in the middle of a run, without waiting for it', () => {
    const result = run(`${longRun} start(); await sleep(100); console.log(Date.now()); process.exit(0);`);
    expect(result).toMatchObject({ code: 0, stderr: '' });
    expect(result.ended - Number(result.stdout)).toBeLessThan(5000);
  });

  it('at an exception in the middle of a run: exit code 1, no native noise', () => {
    const result = run(`${longRun} start(); await sleep(100); throw new Error('on purpose');`);
    expect(result.code).toBe(1);
    expect(result.stderr).toContain('on purpose');
    expect(result.stderr).not.toMatch(/terminate|fatal|abort|segmentation|napi/i);
  });

  it('when disposed in the middle of a run', () => {
    const result = run(`${longRun}
      const pending = start(); await sleep(50); engine.dispose();
      await pending.catch((error) => console.log(error.name, error.code));`);
    expect(result).toMatchObject({ code: 0, stdout: 'DisposedError Disposed\n', stderr: '' });
  });

  // On the addon's own object: nothing in JavaScript refers to it but the run.
  it('when the engine is forgotten while it works', () => {
    const result = run(
      `import { setFlagsFromString } from 'node:v8';
       import { runInNewContext } from 'node:vm';
       setFlagsFromString('--expose-gc');
       const gc = runInNewContext('gc');
       ${longRun}
       const { loadAddon } = await import(${native});
       const n2 = 1 << 18;
       let own = new (loadAddon().Engine)('cpu');
       const { promise } = own.run(program.native, Int32Array.of(n2), [new Float32Array(n2)]);
       own = null;
       for (let i = 0; i < 20; i++) { gc(); await sleep(1); }
       console.log((await promise).outputs[0].length);
       for (let i = 0; i < 20; i++) { gc(); await sleep(1); }`,
    );
    expect(result).toMatchObject({ code: 0, stdout: '262144\n', stderr: '' });
  });
});

describe('worker threads', () => {
  // A module worker: the code is a data: URL, since what `eval: true` means depends on the flags of the process.
  const worker = `
    const { Worker } = await import('node:worker_threads');
    const source = ${JSON.stringify(`import { parentPort } from 'node:worker_threads'; ${longRun}`)};
    const spawn = (work) => new Worker(new URL('data:text/javascript,' + encodeURIComponent(source + work)));
    const once = (emitter, event) => new Promise((done) => emitter.once(event, done));
  `;

  it('20 terminated in the middle of a run, while the main thread computes', () => {
    const result = run(`${longRun} ${worker}
      const own = engine.run(program, Int32Array.of(64), [new Float32Array(64)]);
      for (let i = 0; i < 20; i++) {
        const thread = spawn("start().catch(() => {}); await sleep(5); parentPort.postMessage('running');");
        await once(thread, 'message');
        await thread.terminate();
      }
      console.log((await own).outputs[0].length);`);
    expect(result).toMatchObject({ code: 0, stdout: '64\n', stderr: '' });
  });

  it('process.exit() inside one, in the middle of a run', () => {
    const result = run(`${worker}
      const thread = spawn("start().catch(() => {}); await sleep(20); process.exit(3);");
      console.log(await once(thread, 'exit'));`);
    expect(result).toMatchObject({ code: 0, stdout: '3\n', stderr: '' });
  });

  it('the addon loaded in a worker only, which then ends: the pool still has its code', () => {
    const result = run(`${worker}
      import { readFileSync } from 'node:fs';
      for (let i = 0; i < 3; i++) {
        const thread = spawn("await engine.run(program, Int32Array.of(1 << 16), [new Float32Array(1 << 16)]);");
        await once(thread, 'exit');
        const mapped = process.platform !== 'linux' || readFileSync('/proc/self/maps', 'utf8').includes('elastiform.node');
        console.log(mapped);
      }`);
    expect(result).toMatchObject({ code: 0, stdout: 'true\ntrue\ntrue\n', stderr: '' });
  });

  it('several at once', () => {
    const result = run(`${worker}
      const threads = Array.from({ length: 4 }, () => spawn("await engine.run(program, Int32Array.of(256), [new Float32Array(256)]);"));
      console.log((await Promise.all(threads.map((thread) => once(thread, 'exit')))).join(' '));`);
    expect(result).toMatchObject({ code: 0, stdout: '0 0 0 0\n', stderr: '' });
  });
});

describe('loading', () => {
  it('does not happen at import', () => {
    const result = run(`await import(${native}); console.log('imported');`, { ELASTIFORM_NATIVE_PATH: '/nonexistent' });
    expect(result).toMatchObject({ code: 0, stdout: 'imported\n', stderr: '' });
  });

  it('takes what ELASTIFORM_NATIVE_PATH names', () => {
    const script = `const { loadAddon } = await import(${native}); console.log(typeof loadAddon().info().isa);`;
    const env = { ELASTIFORM_NATIVE_PATH: 'build/Release/elastiform.node' };
    expect(run(script, env)).toMatchObject({ code: 0, stdout: 'string\n' });
  });

  const failure = (env: Record<string, string>, module = native) =>
    run(
      `const { loadAddon } = await import(${module});
      try { loadAddon(); } catch ({ name, code, message, attempts }) {
        console.log(JSON.stringify({ name, code, message, attempts }));
      }`,
      env,
    );
  const aboutPlatform = new RegExp(`^\\[native\\] .* on ${process.platform}-${process.arch}.* with Node-API \\d+ `);

  it('says why what ELASTIFORM_NATIVE_PATH names does not load, and takes no other', () => {
    const broken = resolve(root, 'build/broken.node');
    writeFileSync(broken, 'no addon');
    for (const [path, reason] of [
      ['/nonexistent', /^no such file$/],
      [broken, /^(?!.*broken\.node).+/],
    ] as const) {
      const { code, stdout } = failure({ ELASTIFORM_NATIVE_PATH: path });
      expect(code).toBe(0);
      const error = JSON.parse(stdout);
      expect(error).toMatchObject({ name: 'AddonLoadError', code: 'AddonLoad' });
      expect(error.attempts).toEqual([{ path, reason: expect.stringMatching(reason) }]);
      expect(error.message).toMatch(aboutPlatform);
      expect(error.message).toContain(`  ${path}: ${error.attempts[0].reason}\nELASTIFORM_NATIVE_PATH names that file`);
    }
  });

  it('says what was tried, the platform and the command when there is no addon, and takes the first that loads', () => {
    // The package without its addon, in a folder whose name a shell would take apart.
    const bare = resolve(root, 'build/no addon');
    rmSync(bare, { recursive: true, force: true });
    cpSync(resolve(root, 'dist/native'), join(bare, 'dist/native'), { recursive: true });
    writeFileSync(join(bare, 'package.json'), '{ "type": "module" }');
    const module = JSON.stringify(pathToFileURL(join(bare, 'dist/native/index.js')).href);
    const built = join(bare, 'build/Release/elastiform.node');
    const folder = join(bare, `prebuilds/${process.platform}-${process.arch}`);
    const prebuilt = join(folder, process.platform === 'linux' ? 'elastiform.glibc.node' : 'elastiform.node');

    const { code, stdout } = failure({}, module);
    expect(code).toBe(0);
    const error = JSON.parse(stdout);
    expect(error).toMatchObject({ name: 'AddonLoadError', code: 'AddonLoad' });
    expect(error.attempts).toEqual([built, prebuilt].map((path) => ({ path, reason: 'no such file' })));
    expect(error.message).toMatch(aboutPlatform);
    expect(error.message).toContain(`  ${built}: no such file\n  ${prebuilt}: no such file\nBuild it`);
    expect(error.message).toContain(`: cd "${bare}" && npx cmake-js compile`);

    mkdirSync(join(bare, 'build/Release'), { recursive: true });
    writeFileSync(built, 'no addon');
    mkdirSync(folder, { recursive: true });
    copyFileSync(resolve(root, 'build/Release/elastiform.node'), prebuilt);
    const script = `const { addonPath, loadAddon } = await import(${module});
      console.log(typeof loadAddon().info().isa, addonPath());`;
    expect(run(script)).toMatchObject({ code: 0, stdout: `string ${prebuilt}\n`, stderr: '' });
  });

  it('honours ELASTIFORM_THREADS and ELASTIFORM_ISA', () => {
    const script = `const { loadAddon } = await import(${native});
      const { threads, isa } = loadAddon().info(); console.log(threads, isa);`;
    expect(run(script, { ELASTIFORM_THREADS: '1', ELASTIFORM_ISA: 'portable' }).stdout).toBe('1 portable\n');
  });
});
