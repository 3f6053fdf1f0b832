// Programs and the engine: validation messages as JavaScript sees them, runs, aborts, disposal, memory.
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, describe, expect, it } from 'vitest';
import {
  AbortError,
  CompiledProgram,
  DisposedError,
  Engine,
  InvalidArgumentError,
  InvalidDataError,
  InvalidProgramError,
  loadAddon,
  Tensor,
} from '../../lib/native/index.js';
import { longProgram, ProgramWriter } from './writer.js';

const engine = new Engine();
afterAll(() => engine.dispose());
const memory = () => loadAddon().memory();
const noFeeds: Float32Array[] = [];
const sameBits = (a: ArrayBufferView, b: ArrayBufferView) =>
  Buffer.compare(Buffer.from(a.buffer as ArrayBuffer), Buffer.from(b.buffer as ArrayBuffer)) === 0;

describe('CompiledProgram', () => {
  const weight = Tensor.fromData('f32', [3, 2], Float32Array.from([1, 0, 0, 1, 1, 1]));
  afterAll(() => weight.dispose());

  it('runs with the sizes of each call', async () => {
    const w = new ProgramWriter();
    const m = w.set(4);
    const x = w.feed([m, w.constant(2)]);
    const y = w.output([m, w.constant(3)]);
    w.tags = 2;
    w.step('linear', [x, w.weight(weight), -1, -1, -1, -1], [y, -1], [0], 1);
    using program = w.compile();
    const one = await engine.run(program, Int32Array.from([1, 0, 0, 0, 0]), [Float32Array.from([3, 4])]);
    expect(one.outputs).toEqual([Float32Array.from([3, 4, 7])]);
    expect([...one.counters]).toEqual([0, 0, 12, 0]);
    expect([...one.dims]).toEqual([1, 2, 3, 3, 2]);
    expect(one.ms).toBeGreaterThan(0);
    const two = await engine.run(program, Int32Array.from([2, 0, 0, 0, 0]), [Float32Array.from([1, 2, 3, 4])]);
    expect(two.outputs).toEqual([Float32Array.from([1, 2, 3, 3, 4, 7])]);
  });

  it('names the step and op that is wrong', () => {
    const w = new ProgramWriter();
    const x = w.feed([w.constant(5), w.constant(4)]);
    w.step('linear', [x, w.weight(weight), -1, -1, -1, -1], [w.output([0, w.constant(3)]), -1], [0]);
    expect(() => w.compile()).toThrow(InvalidProgramError);
    expect(() => w.compile()).toThrow('[Program] step 0 (linear): w[1] must be at least K = 4, got 2');
  });

  it('refuses garbage', () => {
    const compile = (code: unknown, attributes: unknown, names: unknown, tensors: unknown[]) => () =>
      new CompiledProgram(code as Int32Array, attributes as Float64Array, names as string[], tensors as Tensor[]);
    const none = new Float64Array(0);
    expect(compile(new Int32Array(0), none, [], [])).toThrow('the code ends where magic should be');
    expect(compile(new Int32Array(6), none, [], [])).toThrow('does not start with the magic number');
    expect(compile([], none, [], [])).toThrow('[Program] code must be an Int32Array');
    expect(compile(new Int32Array(6), new Float32Array(1), [], [])).toThrow('attributes must be a Float64Array');
    expect(compile(new Int32Array(6), none, [1], [])).toThrow('an entry of opNames must be a string');
    expect(compile(new Int32Array(6), none, [], [{ native: {} }])).toThrow('an entry of tensors must be a Tensor');
    using gone = Tensor.alloc('f32', [1]);
    gone.dispose();
    expect(compile(new Int32Array(6), none, [], [gone])).toThrow(DisposedError);
  });

  it('throws typed errors for wrong dims and feeds, before anything runs', async () => {
    using program = longProgram(1, 8);
    const run = (n: number, feeds: unknown) => engine.run(program, Int32Array.from([n]), feeds as Float32Array[]);
    await expect(run(9, [new Float32Array(9)])).rejects.toThrow('[run] dim 0 must be in [1, 8], got 9');
    await expect(run(2, [new Float32Array(3)])).rejects.toThrow('[run] feed 0 must hold 2 elements, got 3');
    await expect(run(2, [new Int32Array(2)])).rejects.toThrow('[Engine.run] feed 0 must be a Float32Array');
    await expect(run(2, [])).rejects.toThrow('[Engine.run] 1 feeds wanted, got 0');
    await expect(run(2, [[1, 2]])).rejects.toThrow(InvalidArgumentError);
    await expect(engine.run(program, new Int32Array(0), noFeeds)).rejects.toThrow(InvalidArgumentError);
    await expect(engine.run({ native: {} } as CompiledProgram, new Int32Array(1), noFeeds)).rejects.toThrow(
      '[Engine.run] program must be a Program',
    );
  });

  it('reports bad data with the step it was met in, and goes on', async () => {
    const w = new ProgramWriter();
    const rows = w.set(4);
    const ids = w.feed([rows], 'i32');
    w.step('embedding', [w.weight(weight), ids], [w.output([rows, w.constant(2)])]);
    using program = w.compile();
    const run = (id: number) => engine.run(program, Int32Array.from([1, 0, 0, 0]), [Int32Array.of(id)]);
    await expect(run(3)).rejects.toThrow(InvalidDataError);
    await expect(run(3)).rejects.toThrow('[run] step 0 (embedding): [embedding] ids[0] must be in [0, 3), got 3');
    expect((await run(2)).outputs[0]).toEqual(Float32Array.from([1, 1]));
  });
});

describe('Engine', () => {
  const size = 1 << 20;
  const dims = Int32Array.of(size);
  const feed = new Float32Array(size).fill(0.5);

  it('aborts a long run long before its end, with the reason of the signal', async () => {
    using program = longProgram(20_000, size);
    const controller = new AbortController();
    const reason = new Error('enough');
    const run = engine.run(program, dims, [feed], { signal: controller.signal });
    await sleep(50);
    const start = performance.now();
    controller.abort(reason);
    await expect(run).rejects.toBe(reason);
    // The run would take ten seconds. Milliseconds are measured by the benchmarks: here other programs may be busy.
    expect(performance.now() - start).toBeLessThan(3000);
  });

  it('aborts a waiting run at once, and one that never started', async () => {
    using program = longProgram(20_000, size);
    const first = new AbortController();
    const second = new AbortController();
    const running = engine.run(program, dims, [feed], { signal: first.signal });
    const waiting = engine.run(program, dims, [feed], { signal: second.signal });
    second.abort();
    await expect(waiting).rejects.toThrow(expect.objectContaining({ name: 'AbortError' }));
    first.abort();
    await expect(running).rejects.toThrow(expect.objectContaining({ name: 'AbortError' }));
    await expect(engine.run(program, dims, [feed], { signal: AbortSignal.abort('no') })).rejects.toBe('no');
  });

  it('rejects with the reason until its promise has settled, even after its end', async () => {
    using program = longProgram(1, 4);
    const controller = new AbortController();
    const run = engine.run(program, Int32Array.of(4), [new Float32Array(4)], { signal: controller.signal });
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 100); // the run ends, nobody hears of it
    controller.abort('enough');
    await expect(run).rejects.toBe('enough');
  });

  it('leaves no listener on the signal', async () => {
    using program = longProgram(1, 4);
    const { signal } = new AbortController();
    let listeners = 0;
    const add = signal.addEventListener.bind(signal);
    const remove = signal.removeEventListener.bind(signal);
    signal.addEventListener = (...a: Parameters<typeof add>) => [listeners++, add(...a)][1] as undefined;
    signal.removeEventListener = (...a: Parameters<typeof remove>) => [listeners--, remove(...a)][1] as undefined;
    await engine.run(program, Int32Array.of(4), [new Float32Array(4)], { signal });
    await engine.run(program, Int32Array.of(9), [new Float32Array(4)], { signal }).catch(() => {});
    expect(listeners).toBe(0);
  });

  it('leaves the event loop free while it runs', async () => {
    using program = longProgram(600, size);
    let ticks = 0;
    const timer = setInterval(() => ticks++, 1);
    await engine.run(program, dims, [feed]);
    clearInterval(timer);
    // Computing on the JavaScript thread would leave one at most.
    expect(ticks).toBeGreaterThan(5);
  });

  it('keeps disposed tensors and programs alive for the run that uses them', async () => {
    const before = memory();
    const w = new ProgramWriter();
    const n = w.constant(size);
    const state = Tensor.fromData('f32', [size], feed);
    let x = w.weight(state);
    for (let i = 0; i < 20; i++) {
      const y = w.temp([n]);
      w.step('scale', [x, -1], [y], [1]);
      x = y;
    }
    w.step('scale', [x, -1], [w.output([n])], [2]);
    const program = w.compile();
    const run = engine.run(program, Int32Array.from(w.dims.filter((_, i) => i % 2)), []);
    state.dispose();
    program.dispose();
    expect(memory().heapBytes - before.heapBytes).toBe(4 * size);
    expect((await run).outputs[0][size - 1]).toBe(1);
    await sleep(0);
    expect(memory().heapBytes).toBe(before.heapBytes);
    await expect(engine.run(program, new Int32Array(2), [])).rejects.toThrow(DisposedError);
  });

  it('does not let a state be read or written under a run that writes it', async () => {
    using state = Tensor.alloc('f32', [4]);
    const w = new ProgramWriter();
    const x = w.feed([w.constant(4)]);
    w.step('accumulate', [w.weight(state), x], [], [0, 4]);
    using program = w.compile();
    const run = engine.run(program, new Int32Array(2), [Float32Array.of(1, 2, 3, 4)]);
    const pending = () => {
      try {
        state.read();
        return null;
      } catch (error) {
        return error;
      }
    };
    // The run may be over already; while it is not, reading fails.
    expect(pending()?.toString() ?? 'a pending run writes').toContain('a pending run writes');
    await run;
    expect([...state.read()]).toEqual([1, 2, 3, 4]);
    state.write(new Float32Array(4));
  });

  it('rejects what is pending when it is disposed', async () => {
    using program = longProgram(20_000, size);
    const local = new Engine();
    const runs = [local.run(program, dims, [feed]), local.run(program, dims, [feed])];
    const settled = Promise.allSettled(runs);
    await sleep(20);
    local.dispose();
    local.dispose();
    for (const result of await settled) {
      expect(result.status === 'rejected' && result.reason).toBeInstanceOf(DisposedError);
    }
    expect(local.disposed).toBe(true);
    await expect(local.run(program, dims, [feed])).rejects.toThrow('[Engine] used after dispose()');
  });

  it('runs on several engines at once', async () => {
    using program = longProgram(20, 1 << 16);
    const engines = Array.from({ length: 4 }, () => new Engine());
    const small = new Float32Array(1 << 16).fill(1);
    const results = await Promise.all(engines.map((e) => e.run(program, Int32Array.of(1 << 16), [small])));
    for (const { outputs } of results) expect(sameBits(outputs[0], results[0].outputs[0])).toBe(true);
    for (const e of engines) e.dispose();
  });

  it('computes the same bits with any number of threads', async () => {
    using program = longProgram(5, size);
    const { threads } = loadAddon().info();
    const run = async (count: number) => {
      loadAddon().setThreads(count);
      return (await engine.run(program, dims, [feed])).outputs[0];
    };
    const single = await run(1);
    expect(sameBits(await run(3), single)).toBe(true);
    loadAddon().setThreads(threads);
    expect(() => loadAddon().setThreads(0)).toThrow('[setThreads] threads must be an integer in [1, 256], got 0');
  });

  it('holds its memory constant over 1000 runs, and returns it', async () => {
    const before = memory();
    using program = longProgram(3, 4096);
    const local = new Engine();
    const small = new Float32Array(4096);
    await local.run(program, Int32Array.of(4096), [small]);
    const first = memory();
    for (let i = 0; i < 1000; i++)
      await local.run(program, Int32Array.of(1 + (i % 4096)), [small.subarray(0, 1 + (i % 4096))]);
    expect(memory()).toEqual(first);
    local.dispose();
    program.dispose();
    expect(memory()).toEqual(before);
  });

  it('gives AbortError where no signal has a reason', () => {
    expect(new AbortError('x')).toMatchObject({ name: 'AbortError', code: 'Aborted' });
  });
});

describe('info', () => {
  it('says what is in use', () => {
    const info = loadAddon().info();
    expect(info.isaAvailable).toContain(info.isa);
    expect(info.threads).toBeGreaterThan(0);
    expect(info.hardwareThreads).toBeGreaterThan(0);
    expect(info.devices.cpu).toEqual({ available: true, description: info.isa });
    for (const device of Object.values(info.devices)) expect(device.description).not.toBe('');
    expect(loadAddon().opNames().length).toBe(loadAddon().opSignatures().length);
    expect(loadAddon().opAttributes()[loadAddon().opNames().indexOf('linear')]).toEqual(['act']);
  });
});
