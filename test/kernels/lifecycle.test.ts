// Kernels: wrong arguments, disposal, aborts, memory, and what importing them does.
import { spawnSync } from 'node:child_process';
import { resolve } from 'node:path';
import { describe, expect, test, vi } from 'vitest';
import { type ExitOptions, type FeedForwardOptions, Kernels, type LinearOptions } from '../../lib/kernels/index.js';
import { loadAddon } from '../../lib/native/index.js';
import { floats } from './reference.js';

/** A small layer of its own kernels. */
function layer() {
  const kernels = new Kernels();
  const up = kernels.weight(floats(1, 6 * 4), [6, 4]);
  const down = kernels.weight(floats(2, 4 * 6), [4, 6]);
  const bias = kernels.weight(floats(3, 6), [6]);
  return { kernels, up, down, bias, x: floats(4, 3 * 4) };
}

const error = (name: string, message: RegExp) =>
  expect.objectContaining({ name, message: expect.stringMatching(message) });
const argument = (message: RegExp) => error('InvalidArgumentError', message);

describe('wrong arguments are typed errors that say what was expected and what came', () => {
  test('weights', () => {
    using kernels = new Kernels();
    const make = (data: unknown, shape: unknown, dtype?: unknown) => () =>
      kernels.weight(data as never, shape as never, dtype as never);
    expect(make(new Float32Array(5), [2, 3])).toThrow(
      argument(/^\[weight\] data of f32 \[2,3\] must be a Float32Array of 6, got Float32Array of 5$/),
    );
    expect(make([1, 2], [2])).toThrow(argument(/got Array of 2$/));
    expect(make(new Float32Array(2), [2], 'bf16')).toThrow(argument(/Uint16Array of 2/));
    expect(make(new Float32Array(2), [2], 'f64')).toThrow(argument(/f32, bf16 or f16, got f64/));
    for (const shape of [
      [],
      [1, 2, 1],
      [0, 2],
      [-2, -1],
      [1.5],
      [Number.NaN],
      ['2'],
      2,
      null,
      undefined,
      [2 ** 40, 2 ** 40],
    ]) {
      expect(make(new Float32Array(2), shape), String(shape)).toThrow(argument(/^\[weight\]/));
    }
    expect(() => new Kernels({ device: 'gpu' as never })).toThrow(argument(/device must be one of/));
    expect(() => new Kernels({ threads: 2 } as never)).toThrow(argument(/unknown option 'threads'; it takes device/));
  });

  test('arrays, rows and widths', async () => {
    const { kernels, up, down, bias, x } = layer();
    using _ = kernels;
    const linear = (input: unknown, w: unknown, options?: unknown) =>
      kernels.linear(input as Float32Array, w as typeof up, options as LinearOptions);
    for (const [input, w, options, message] of [
      [x.slice(1), up, {}, /^\[linear\] x must be a Float32Array of rows of 4 elements, got Float32Array of 11$/],
      [[1, 2, 3, 4], up, {}, /got Array of 4/],
      [new Float64Array(4), up, {}, /got Float64Array of 4/],
      [null, up, {}, /got null/],
      [x, x, {}, /w must be a Weight, made by kernels.weight\(data, shape\), got Float32Array of 12/],
      [x, bias, {}, /w must be a matrix/],
      [x, up, { bias: down }, /bias must be \[6\], got \[4,6\]/],
      [x, up, { act: 'swish' }, /act must be one of/],
      [x, up, { width: 0 }, /width must be an integer from 1 to 6, got 0/],
      [x, up, { width: 7 }, /width/],
      [x, up, { width: 1.5 }, /width/],
      [x, up, { rows: [0] }, /rows must be an Int32Array/],
      [x, up, { lora: { a: up, b: up } }, /lora\.b must be \[6,6\], got \[6,4\]/],
      [x, up, { lora: { a: down, b: up } }, /lora\.a must be/],
      [x, up, { lora: { a: up, b: up, rank: 3 } }, /unknown option 'rank'/],
      [x, up, { with: 3 }, /unknown option 'with'/],
      [x, up, null, /options must be an object/],
    ] as const) {
      await expect(linear(input, w, options), String(message)).rejects.toEqual(argument(message));
    }
    for (const rows of [[3], [-1], [1, 0], [1, 1], [2 ** 31 - 1]]) {
      const wrong = error('InvalidDataError', /rows/);
      await expect(linear(x, up, { rows: Int32Array.from(rows) }), String(rows)).rejects.toEqual(wrong);
      const options: FeedForwardOptions = { act: 'relu', rows: Int32Array.from(rows) };
      await expect(kernels.feedForward(x, { up, down }, options), String(rows)).rejects.toEqual(wrong);
    }
    const feed = (weights: object, options: object) =>
      kernels.feedForward(x, weights as never, { act: 'relu', ...options });
    await expect(feed({ up }, {})).rejects.toEqual(argument(/down must be a Weight/));
    await expect(feed({ up, down: up }, {})).rejects.toEqual(argument(/down must be \[4,6\], got \[6,4\]/));
    await expect(feed({ up, down, gateBias: bias }, {})).rejects.toEqual(argument(/gateBias needs gate/));
    await expect(feed({ up, down }, { residual: x.slice(4) })).rejects.toEqual(
      argument(/residual must be a Float32Array of 12/),
    );
    await expect(feed({ up, down }, { gates: new Float32Array(2) })).rejects.toEqual(
      argument(/gates must be a Float32Array of 3/),
    );
    await expect(feed({ up, down }, { act: undefined })).rejects.toEqual(argument(/act must be one of/));
    await expect(kernels.feedForward(x, { up, down }, undefined as never)).rejects.toEqual(
      argument(/options must be an object/),
    );
  });

  test('routing, divergence and exits', async () => {
    const { kernels, up, x } = layer();
    using _ = kernels;
    const z = floats(5, 4);
    for (const capacity of [-0.1, 1.1, Number.NaN, Float32Array.of(0.5, 0.5), '0.5', undefined]) {
      await expect(kernels.routeTopk(z, capacity as number), String(capacity)).rejects.toEqual(argument(/capacity/));
    }
    await expect(kernels.routeThreshold(z, Number.NaN)).rejects.toEqual(argument(/threshold must be a number/));
    for (const offsets of [[0], [0, 4, 5], [1, 4], [0, 3], [0, 3, 2, 4], [0, -1, 4]]) {
      const given = { offsets: Int32Array.from(offsets) };
      const wrong = expect.objectContaining({ message: expect.stringMatching(/offsets/) });
      await expect(kernels.routeTopk(z, 0.5, given), String(offsets)).rejects.toEqual(wrong);
    }
    await expect(kernels.routeTopk(z.fill(Number.NaN), 0.5)).rejects.toEqual(error('InvalidDataError', /NaN|number/));
    const divergence = (teacher: Float32Array, options: object) => kernels.divergence(x, teacher, up, options);
    await expect(divergence(x.slice(4), {})).rejects.toEqual(argument(/teacher must be a Float32Array of 12/));
    await expect(divergence(x, { kind: 'l2' })).rejects.toEqual(
      argument(/kind must be one of kl, reverse-kl, jsd, got l2/),
    );
    await expect(divergence(x, { kind: 'jsd', beta: 1 })).rejects.toEqual(
      argument(/beta must be between 0 and 1, got 1/),
    );
    await expect(divergence(x, { weights: x })).rejects.toEqual(argument(/weights must be a Float32Array of 3/));
    await expect(divergence(x, { teacherHead: kernels.weight(x, [3, 4]) })).rejects.toEqual(argument(/teacherHead/));
    const exit = (options: object) => kernels.exit(x, up, options as ExitOptions);
    await expect(exit({ rule: 'patience', threshold: 1 })).rejects.toEqual(
      argument(/rule must be entropy, margin or maxprob/),
    );
    await expect(exit({ rule: 'margin' })).rejects.toEqual(argument(/threshold must be a number, got undefined/));
    const single = kernels.exit(x, kernels.weight(floats(6, 4), [1, 4]), { rule: 'margin', threshold: 1 });
    await expect(single).rejects.toEqual(argument(/at least 2 outputs/));
  });

  test('no rows at all are no error', async () => {
    const { kernels, up, down } = layer();
    using _ = kernels;
    const none = new Float32Array(0);
    expect((await kernels.linear(none, up)).y).toHaveLength(0);
    expect((await kernels.feedForward(none, { up, down }, { act: 'relu' })).y).toHaveLength(0);
    expect((await kernels.routeTopk(none, 0.5)).rows).toHaveLength(0);
    expect(await kernels.divergence(none, none, up)).toMatchObject({ loss: 0, flops: 0 });
    expect((await kernels.exit(none, up, { rule: 'margin', threshold: 0 })).stay).toHaveLength(0);
  });
});

describe('lifetime', () => {
  test('disposal frees everything, is idempotent, and later calls are errors', async () => {
    const before = loadAddon().memory();
    const { kernels, up, down, bias, x } = layer();
    await kernels.linear(x, up, { bias });
    await kernels.feedForward(x, { up, down }, { act: 'relu' });
    expect(loadAddon().memory().programs).toBe(before.programs + 2);
    down.dispose();
    down.dispose();
    expect(loadAddon().memory().programs).toBe(before.programs + 1);
    await expect(kernels.linear(x, down)).rejects.toEqual(error('DisposedError', /^\[linear\] w was disposed/));
    kernels.dispose();
    kernels.dispose();
    expect(up.disposed && kernels.disposed).toBe(true);
    await expect(kernels.linear(x, up)).rejects.toEqual(
      error('DisposedError', /^\[linear\] the kernels were disposed/),
    );
    expect(() => kernels.weight(x, [3, 4])).toThrow(error('DisposedError', /^\[weight\]/));
    const { tensors, programs } = loadAddon().memory();
    expect({ tensors, programs }).toEqual({ tensors: before.tensors, programs: before.programs });
  });

  test('one program serves any number of rows and any width, and grows when more rows come', async () => {
    const { kernels, up } = layer();
    using _ = kernels;
    const { programs } = loadAddon().memory();
    for (const rows of [3, 1, 4, 9, 2, 100]) {
      for (const width of [2, 6]) await kernels.linear(floats(7, rows * 4), up, { width });
      expect(loadAddon().memory().programs).toBe(programs + 1);
    }
    await kernels.linear(floats(7, 4), up, { act: 'relu' });
    expect(loadAddon().memory().programs).toBe(programs + 2);
  });

  test('weights of other kernels are refused', async () => {
    const { kernels, up, x } = layer();
    using _ = kernels;
    using others = new Kernels();
    await expect(others.linear(x, up)).rejects.toEqual(argument(/w belongs to other kernels/));
  });

  test('calls under way end with the kernels, or with their signal', async () => {
    const { kernels, up, x } = layer();
    const reason = new Error('on purpose');
    await expect(kernels.linear(x, up, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
    const big = kernels.weight(floats(8, 1024 * 1024), [1024, 1024]);
    const pending = kernels.linear(floats(9, 256 * 1024), big);
    kernels.dispose();
    await expect(pending).rejects.toEqual(error('DisposedError', /./));
  });

  test('arrays given may be reused at once, those of the first call of all, too', async () => {
    vi.resetModules();
    const { Kernels: Fresh } = await import('../../lib/kernels/index.js');
    using kernels = new Fresh();
    const w = kernels.weight(floats(1, 6 * 4), [6, 4]);
    const x = floats(2, 3 * 4);
    const given = x.slice();
    const first = kernels.linear(given, w);
    given.fill(0);
    const wanted = await first;
    expect(wanted.y.some((y) => y !== 0)).toBe(true);
    given.set(x);
    const again = kernels.linear(given, w);
    given.fill(0);
    expect((await again).y).toEqual(wanted.y);
  });
});

test('importing loads no addon, starts nothing and keeps no process alive', () => {
  const entry = JSON.stringify(new URL(`file://${resolve(import.meta.dirname, '../../dist/kernels/index.js')}`).href);
  const script = `
    const state = () => [process.listenerCount('exit'), Object.keys(globalThis)];
    const before = state();
    const { ElastiformError, Kernels } = await import(${entry});
    console.log(JSON.stringify(before) === JSON.stringify(state()));
    try { new Kernels(); } catch (error) { console.log(error instanceof ElastiformError); }`;
  const child = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
    encoding: 'utf8',
    env: { ...process.env, ELASTIFORM_NATIVE_PATH: '/nowhere/elastiform.node' },
  });
  expect(child.stderr).toBe('');
  expect(child.stdout).toBe('true\ntrue\n');
});
