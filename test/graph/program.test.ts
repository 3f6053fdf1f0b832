// Compiled programs: dims and feeds by name, errors that say what is wrong, memory, disposal, abort.
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Graph } from '../../lib/graph/graph.js';
import {
  activation,
  add,
  gradients,
  linear,
  linearAdd,
  Program,
  rmsNorm,
  scale,
  scatterAdd,
} from '../../lib/graph/index.js';
import { Engine, Tensor } from '../../lib/native/index.js';

let engine: Engine;
beforeAll(() => {
  engine = new Engine();
});
afterAll(() => engine.dispose());

function twice() {
  const g = new Graph();
  g.feed('unused', 'f32', [g.dim('other', 3)]);
  g.output('y', scale(g.feed('x', 'f32', [g.dim('N', 5), 2]), 2));
  return Program.compile(g, engine);
}

describe('run', () => {
  test('one program serves every size up to the bound', async () => {
    using program = twice();
    for (const n of [5, 1, 3]) {
      const x = Float32Array.from({ length: 2 * n }, (_, i) => i);
      const { outputs, dims, ms, hostMs, deviceMs } = await program.run({ dims: { N: n }, feeds: { x } });
      expect([...outputs.y]).toEqual([...x].map((v) => 2 * v));
      expect(dims).toEqual({ N: n });
      expect(ms).toBeGreaterThanOrEqual(hostMs);
      expect(hostMs).toBeGreaterThanOrEqual(0);
      if (engine.device === 'cpu') expect([hostMs, deviceMs]).toEqual([ms, 0]);
      else expect(deviceMs).toBeGreaterThan(0);
    }
  });

  test('runs asked for together are answered in order', async () => {
    using program = twice();
    const runs = [1, 2, 3, 4].map((v) => program.run({ dims: { N: 1 }, feeds: { x: Float32Array.of(v, v) } }));
    expect((await Promise.all(runs)).map(({ outputs }) => outputs.y[0])).toEqual([2, 4, 6, 8]);
  });

  test('feeds are copied: changing them afterwards changes nothing', async () => {
    using program = twice();
    const x = Float32Array.of(1, 2);
    const run = program.run({ dims: { N: 1 }, feeds: { x } });
    x.fill(9);
    expect([...(await run).outputs.y]).toEqual([2, 4]);
  });

  test('feeds and dims that no step needs may be given', async () => {
    using program = twice();
    const feeds = { x: new Float32Array(2), unused: new Float32Array(1) };
    await expect(program.run({ dims: { N: 1, other: 1 }, feeds })).resolves.toBeDefined();
  });

  test.each([
    [{ feeds: { x: new Float32Array(2) } }, '[run] dim N is missing'],
    [{ dims: { N: 6 }, feeds: { x: new Float32Array(12) } }, '[run] dim N must be an integer from 1 to 5, got 6'],
    [{ dims: { N: 0 }, feeds: { x: new Float32Array(0) } }, '[run] dim N must be an integer from 1 to 5, got 0'],
    [{ dims: { N: 1.5 }, feeds: { x: new Float32Array(3) } }, '[run] dim N must be an integer from 1 to 5, got 1.5'],
    [{ dims: { N: 1, M: 1 }, feeds: { x: new Float32Array(2) } }, '[run] there is no dim M; the graph has: other, N'],
    [{ dims: { N: 1 } }, '[run] feed x is missing'],
    [{ dims: { N: 1 }, feeds: { y: new Float32Array(2) } }, '[run] there is no feed y; the graph has: unused, x'],
    [
      { dims: { N: 2 }, feeds: { x: new Float32Array(2) } },
      '[run] feed x must be Float32Array of 4 ([2,2]), got Float32Array of 2',
    ],
    [
      { dims: { N: 1 }, feeds: { x: new Int32Array(2) } },
      '[run] feed x must be Float32Array of 2 ([1,2]), got Int32Array of 2',
    ],
  ])('%j', async (options, message) => {
    using program = twice();
    await expect(program.run(options)).rejects.toMatchObject({ code: 'InvalidArgument', message });
  });

  test('a disposed program says so', async () => {
    const program = twice();
    program.dispose();
    program.dispose();
    await expect(program.run()).rejects.toMatchObject({ code: 'Disposed' });
  });

  test('an aborted signal rejects with its reason', async () => {
    using program = twice();
    const run = program.run({
      dims: { N: 1 },
      feeds: { x: new Float32Array(2) },
      signal: AbortSignal.abort(new Error('why')),
    });
    await expect(run).rejects.toThrow('why');
  });
});

describe('memory', () => {
  test('a chain of any length needs two buffers', () => {
    const arena = (length: number) => {
      const g = new Graph();
      let x = activation(g.feed('x', 'f32', [1000]), 'silu');
      for (let i = 0; i < length; ++i) x = activation(x, 'silu');
      g.output('y', x);
      using program = Program.compile(g, engine);
      return program.arenaBytes;
    };
    expect(arena(50)).toBe(arena(3));
  });

  test('in-place steps never overwrite what is read later', async () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [3, 2]);
    const rows = g.feed('rows', 'i32', [1]);
    const a = scale(x, 2);
    const b = add(a, a);
    const c = scatterAdd(a, g.feed('one', 'f32', [1, 2]), rows);
    g.output('b', b);
    g.output('c', c);
    g.output('sum', add(add(b, c), add(a, x)));
    using program = Program.compile(g, engine);
    const feeds = { x: Float32Array.of(1, 2, 3, 4, 5, 6), rows: Int32Array.of(1), one: Float32Array.of(1, 1) };
    const { outputs } = await program.run({ feeds });
    expect([...outputs.b]).toEqual([4, 8, 12, 16, 20, 24]);
    expect([...outputs.c]).toEqual([2, 4, 7, 9, 10, 12]);
    expect([...outputs.sum]).toEqual([9, 18, 28, 37, 45, 54]);
  });

  test('checkpoints give the same bits in a smaller arena', async () => {
    const [rows, width, ffn, layers] = [32, 16, 128, 6];
    const random = (count: number, seed: number) =>
      Float32Array.from({ length: count }, (_, i) => Math.sin((i + 1) * (seed + 1)) / 4);
    const weights = Array.from({ length: layers }, (_, i) => ({
      norm: Tensor.fromData('f32', [width], random(width, i)),
      up: Tensor.fromData('f32', [ffn, width], random(ffn * width, i + 10)),
      down: Tensor.fromData('f32', [width, ffn], random(ffn * width, i + 20)),
    }));
    const build = async (checkpointed: boolean) => {
      const g = new Graph();
      const x = g.feed('x', 'f32', [rows, width]);
      let y = x;
      for (const { norm, up, down } of weights) {
        const input = y;
        const body = () => {
          const h = linear(rmsNorm(input, g.weight(norm), { eps: 1e-5 }), g.weight(up), { act: 'gelu' });
          return linearAdd(input, h, g.weight(down));
        };
        y = checkpointed ? g.checkpoint(body) : body();
      }
      g.output('dx', gradients(y, [x], { seed: g.feed('dy', 'f32', [rows, width]) })[0]);
      using program = Program.compile(g, engine);
      const feeds = { x: random(rows * width, 40), dy: random(rows * width, 41) };
      return { bytes: program.arenaBytes, dx: (await program.run({ feeds })).outputs.dx };
    };
    const [plain, again] = [await build(false), await build(true)];
    expect(again.dx).toEqual(plain.dx);
    expect(again.bytes).toBeLessThan(0.6 * plain.bytes);
    for (const { norm, up, down } of weights) for (const tensor of [norm, up, down]) tensor.dispose();
  });
});
