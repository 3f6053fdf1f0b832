// Engines on other devices than the CPU: what they share with it, what they refuse, and that they go on afterwards.
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { describe, expect, it } from 'vitest';
import {
  accumulate,
  add,
  expertRows,
  Graph,
  gatherRows,
  Program,
  routeThreshold,
  routeTopk,
  scale,
  zeros,
} from '../../lib/graph/index.js';
import {
  DeviceUnavailableError,
  Engine,
  InvalidArgumentError,
  InvalidDataError,
  loadAddon,
  OutOfMemoryError,
  Tensor,
} from '../../lib/native/index.js';

const { devices } = loadAddon().info();

const dist = pathToFileURL(join(import.meta.dirname, '../../dist')).href;

// Runs one program until its device is lost, then tries what a program may try.
const lossOfDevice = `
  const { accumulate, Graph, gatherRows, Program } = await import('${dist}/graph/index.js');
  const { Engine, loadAddon, Tensor } = await import('${dist}/native/index.js');
  const failure = (body) => body().then(() => 'no error', (error) => \`\${error.name}: \${error.message}\`);
  const state = Tensor.alloc('f32', [4]);
  const make = (device) => {
    const engine = new Engine(device);
    const graph = new Graph();
    const x = graph.feed('x', 'f32', [4, 1]);
    graph.output('y', gatherRows(x, graph.feed('rows', 'i32', [2])));
    if (device === 'simt') accumulate(graph.state(state), graph.feed('add', 'f32', [4]), 0);
    return Program.compile(graph, engine);
  };
  const feeds = { x: Float32Array.of(1, 2, 3, 4), rows: Int32Array.of(0, 2) };
  const run = async (program, more = {}) => [...(await program.run({ feeds: { ...feeds, ...more } })).outputs.y];
  const program = make('simt');
  const add = Float32Array.of(1, 1, 1, 1);
  const result = { before: await run(program, { add }) };
  do result.during = await failure(() => run(program, { add }));
  while (result.during === 'no error');
  result.after = await failure(() => run(program, { add }));
  result.state = await failure(async () => state.read());
  result.other = await failure(async () => new Engine('simt'));
  result.available = loadAddon().info().devices.simt.available;
  result.cpu = await run(make('cpu'));
  console.log(JSON.stringify(result));
`;

/** What the emulated device does in one run, its recording left out. */
async function workOf(program: Program, options: Parameters<Program['run']>[0]) {
  await program.run(options);
  const before = loadAddon().emulatedWork();
  await program.run(options);
  const after = loadAddon().emulatedWork();
  const changed = (key: keyof typeof after) => after[key] - before[key];
  return {
    launches: changed('launches'),
    uploads: changed('uploads'),
    uploadedBytes: changed('uploadedBytes'),
    downloads: changed('downloads'),
  };
}

describe('the choice of a device', () => {
  it('names what it takes, and why a device cannot be used', () => {
    expect(() => new Engine('tpu' as never)).toThrow(InvalidArgumentError);
    for (const name of ['cuda', 'simt'] as const) {
      if (devices[name].available) continue;
      expect(() => new Engine(name)).toThrow(DeviceUnavailableError);
      expect(() => new Engine(name)).toThrow(devices[name].description);
    }
    using engine = new Engine('auto');
    expect(engine.device).toBe(devices.cuda.available ? 'cuda' : 'cpu');
  });
});

describe.runIf(devices.simt.available)('an emulated device', () => {
  it('is refused where it is older than the kernels need, or cannot be described', () => {
    try {
      process.env.ELASTIFORM_SIMT_CAPABILITY = '75';
      expect(() => new Engine('simt')).toThrow(DeviceUnavailableError);
      expect(() => new Engine('simt')).toThrow(/compute capability 7\.5, .*: the kernels need 8\.0 or newer/);
      expect(loadAddon().info().devices.simt.available).toBe(false);
      process.env.ELASTIFORM_SIMT_CAPABILITY = 'new';
      expect(() => new Engine('simt')).toThrow(DeviceUnavailableError);
      expect(loadAddon().info().devices.simt.description).toContain('must be 75, 80 or 90, got new');
    } finally {
      delete process.env.ELASTIFORM_SIMT_CAPABILITY;
    }
    using engine = new Engine('simt');
    expect(engine.device).toBe('simt');
  });

  it('that is lost in the middle of a run is a typed error, for this process, and the CPU goes on', () => {
    // In a process of its own: it is for good.
    const { status, stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', lossOfDevice], {
      encoding: 'utf8',
      env: { ...process.env, ELASTIFORM_SIMT_LOST_AFTER: '50' },
    });
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
    const lost = expect.stringMatching(/^DeviceUnavailableError: \[.*the device is lost for this process.*restart/);
    expect(JSON.parse(stdout)).toEqual({
      before: [1, 3],
      during: lost,
      after: lost,
      state: lost,
      other: lost,
      available: false,
      cpu: [1, 3],
    });
  });

  it('takes states from the CPU and gives them back', async () => {
    using state = Tensor.alloc('f32', [4]);
    using cpu = new Engine('cpu');
    using simt = new Engine('simt');
    const compile = (engine: Engine) => {
      const graph = new Graph();
      accumulate(graph.state(state), graph.feed('x', 'f32', [3]), 1);
      return Program.compile(graph, engine);
    };
    using onCpu = compile(cpu);
    using onDevice = compile(simt);
    const feeds = { x: Float32Array.of(1, 2, 3) };
    await onDevice.run({ feeds });
    expect([...state.read()]).toEqual([0, 1, 2, 3]);
    await onCpu.run({ feeds });
    await onDevice.run({ feeds });
    await onDevice.run({ feeds });
    await onCpu.run({ feeds });
    expect([...state.readFloat()]).toEqual([0, 5, 10, 15]);
    state.write(Float32Array.of(9, 0, 0, 0));
    await onDevice.run({ feeds });
    expect([...state.read()]).toEqual([9, 1, 2, 3]);
  });

  it('runs one recording at any sizes, and counts that ops produce', async () => {
    using engine = new Engine('simt');
    const graph = new Graph();
    const rows = graph.dim('rows', 50);
    const z = graph.feed('z', 'f32', [rows, 1]);
    const segments = graph.feed('offsets', 'i32', [2]);
    const routed = routeThreshold(z, segments, graph.feed('threshold', 'f32', [1]));
    graph.output('chosen', gatherRows(z, routed.rows));
    graph.output('doubled', scale(z, 2));
    using program = Program.compile(graph, engine);
    for (const count of [7, 50, 1, 33]) {
      const values = Float32Array.from({ length: count }, (_, i) => (i * 37) % 11);
      const { outputs } = await program.run({
        dims: { rows: count },
        feeds: { z: values, offsets: Int32Array.of(0, count), threshold: Float32Array.of(4) },
      });
      expect([...outputs.chosen]).toEqual([...values].filter((value) => value > 4));
      expect([...outputs.doubled]).toEqual([...values].map((value) => 2 * value));
    }
  });

  it('selects rows in one launch, beside the check of their offsets', async () => {
    using engine = new Engine('simt');
    for (const kind of ['top-k', 'threshold', 'expert']) {
      const graph = new Graph();
      const experts = kind === 'expert' ? 4 : 1;
      const z = graph.feed('z', 'f32', [20_000, experts]);
      const offsets = graph.feed('offsets', 'i32', [3]);
      const share = graph.feed('share', 'f32', [2]);
      const route = kind === 'top-k' ? routeTopk : routeThreshold;
      const { rows } = experts > 1 ? expertRows({ z, offsets, share, rule: 'top-k' }, 2) : route(z, offsets, share);
      graph.output('rows', rows);
      using program = Program.compile(graph, engine);
      const feeds = {
        z: new Float32Array(20_000 * experts),
        offsets: Int32Array.of(0, 9000, 20_000),
        share: Float32Array.of(1, 0.5),
      };
      expect((await workOf(program, { feeds })).launches, kind).toBe(2);
    }
  });

  it('copies many feeds and outputs at once, and little of a large one that is nearly empty', async () => {
    using engine = new Engine('simt');
    const graph = new Graph();
    const n = graph.dim('n', 1 << 18);
    const large = graph.feed('large', 'f32', [n]);
    const feeds: Record<string, Float32Array> = {};
    const expected: Record<string, number[]> = {};
    for (let i = 0; i < 15; ++i) {
      const length = 1 + ((i * 5) % 11);
      feeds[`x${i}`] = Float32Array.from({ length }, (_, j) => i + j);
      expected[`y${i}`] = [...feeds[`x${i}`]].map((value) => 2 * value);
      graph.output(`y${i}`, scale(graph.feed(`x${i}`, 'f32', [length]), 2));
    }
    graph.output('doubled', scale(large, 2));
    using program = Program.compile(graph, engine);
    // Of the large feed's and the large output's MiB: all, all but a little, next to nothing.
    for (const [count, copies] of [
      [1 << 18, 1],
      [(1 << 18) - 9000, 1],
      [3, 2],
    ]) {
      feeds.large = Float32Array.from({ length: count }, (_, i) => i % 1000);
      const options = { dims: { n: count }, feeds };
      const work = await workOf(program, options);
      // The large output lies behind the others, so what it leaves free is never between two.
      expect([work.uploads, work.downloads], `${count} elements`).toEqual([copies, 1]);
      expect(work.uploadedBytes).toBeLessThan(4 * count + (1 << 16));
      const { outputs } = await program.run(options);
      for (const [name, values] of Object.entries(expected)) expect([...outputs[name]]).toEqual(values);
      expect(outputs.doubled.length).toBe(count);
      expect(outputs.doubled.every((value, i) => value === 2 * (i % 1000))).toBe(true);
    }
  });

  it('leaves states on the device between runs', async () => {
    using state = Tensor.alloc('f32', [4]);
    using engine = new Engine('simt');
    const graph = new Graph();
    accumulate(graph.state(state), graph.feed('x', 'f32', [3]), 1);
    using program = Program.compile(graph, engine);
    const feeds = { x: Float32Array.of(1, 2, 3) };
    // Copies of feeds and of the header alone.
    expect(await workOf(program, { feeds })).toMatchObject({ uploads: 1, downloads: 1 });
    expect([...state.read()]).toEqual([0, 2, 4, 6]);
    state.write(Float32Array.of(1, 0, 0, 0));
    await program.run({ feeds });
    expect([...state.read()]).toEqual([1, 1, 2, 3]);
  });

  it('copies what ops produce without asking how much, where its bound is small', async () => {
    using engine = new Engine('simt');
    for (const [bound, downloads] of [
      [50, 1],
      [20_000, 2],
    ]) {
      const graph = new Graph();
      const z = graph.feed('z', 'f32', [bound, 1]);
      const offsets = graph.feed('offsets', 'i32', [2]);
      graph.output('rows', routeThreshold(z, offsets, graph.feed('threshold', 'f32', [1])).rows);
      using program = Program.compile(graph, engine);
      const options = (threshold: number) => ({
        feeds: {
          z: Float32Array.from({ length: bound }, (_, i) => i),
          offsets: Int32Array.of(0, bound),
          threshold: Float32Array.of(threshold),
        },
      });
      expect(await workOf(program, options(bound - 3.5))).toMatchObject({ uploads: 1, downloads });
      const { outputs } = await program.run(options(bound - 3.5));
      expect([...outputs.rows]).toEqual([bound - 3, bound - 2, bound - 1]);
      expect((await program.run(options(bound))).outputs.rows).toHaveLength(0);
    }
  });

  it('goes on after faults, and after memory has run out', async () => {
    using engine = new Engine('simt');
    const graph = new Graph();
    graph.output('y', gatherRows(graph.feed('x', 'f32', [4, 1]), graph.feed('rows', 'i32', [2])));
    using program = Program.compile(graph, engine);
    const x = Float32Array.of(1, 2, 3, 4);
    const run = (...rows: number[]) => program.run({ feeds: { x, rows: Int32Array.from(rows) } });
    await expect(run(1, 7)).rejects.toThrow(InvalidDataError);

    const large = new Graph();
    const n = large.dim('n', 2 ** 30);
    const sum = add(zeros(large, [n, 60]), zeros(large, [n, 60]));
    large.output('y', gatherRows(sum, large.feed('rows', 'i32', [1])));
    using tooLarge = Program.compile(large, engine);
    const failed = tooLarge.run({ dims: { n: 1 }, feeds: { rows: Int32Array.of(0) } });
    await expect(failed).rejects.toThrow(OutOfMemoryError);
    await expect(failed).rejects.toThrow(/\d+ bytes/);

    const { outputs } = await run(0, 3);
    expect([...outputs.y]).toEqual([1, 4]);
  });

  it('rejects what is aborted, at the end of the run that is under way', async () => {
    using engine = new Engine('simt');
    const graph = new Graph();
    const n = graph.dim('n', 1 << 16);
    const x = graph.feed('x', 'f32', [n]);
    graph.output('y', scale(x, 2));
    using program = Program.compile(graph, engine);
    const run = (signal?: AbortSignal) =>
      program.run({ dims: { n: 1 << 16 }, feeds: { x: new Float32Array(1 << 16) }, signal });
    const controller = new AbortController();
    const both = Promise.allSettled([run(controller.signal), run(controller.signal)]);
    controller.abort(new Error('enough'));
    for (const { status, reason } of (await both) as PromiseRejectedResult[]) {
      expect(status).toBe('rejected');
      expect(reason.message).toBe('enough');
    }
    await expect(run()).resolves.toBeDefined();
  });

  it('frees what it held', async () => {
    const before = loadAddon().memory().deviceBytes;
    {
      using state = Tensor.alloc('f32', [1000]);
      using engine = new Engine('simt');
      const graph = new Graph();
      accumulate(graph.state(state), graph.feed('x', 'f32', [1000]), 0);
      using program = Program.compile(graph, engine);
      await program.run({ feeds: { x: new Float32Array(1000) } });
      expect(loadAddon().memory().deviceBytes).toBeGreaterThan(before + 8000);
    }
    expect(loadAddon().memory().deviceBytes).toBe(before);
  });
});
