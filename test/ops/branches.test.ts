// Steps that a CUDA device runs side by side: which they are, and that nothing else changes by it.
import { afterEach, describe, expect, it } from 'vitest';
import { Random } from '../../lib/distill/random.js';
import {
  accumulate,
  add,
  expertRows,
  Graph,
  gatherRows,
  linear,
  linearAdd,
  type Node,
  Program,
  rmsNorm,
  routeTopk,
  scale,
  scatterAdd,
  sumRows,
  zeros,
} from '../../lib/graph/index.js';
import { Engine, InvalidArgumentError, InvalidDataError, loadAddon, Tensor } from '../../lib/native/index.js';
import { testEngine } from './harness.js';

// Kernels of different branches in any order that their recording allows.
process.env.ELASTIFORM_SIMT_SCHEDULE = 'random:5';

const { device } = testEngine();
/** The depth of a recording, where an emulated device counts it. */
const depthOf = (depth: number) => (device === 'simt' ? depth : 0);
const random = new Random(11, 'branches');
const values = (length: number) => Float32Array.from({ length }, () => 2 * random.uniform() - 1);
const weight = (...shape: number[]) => Tensor.fromData('f32', shape, values(shape.reduce((a, b) => a * b)));

type Run = Parameters<Program['run']>[0];

/** A run with so many branches, and what an emulated device did in it. */
async function runWith(branches: number | null, build: (graph: Graph) => void, run: Run) {
  if (branches === null) delete process.env.ELASTIFORM_CUDA_BRANCHES;
  else process.env.ELASTIFORM_CUDA_BRANCHES = `${branches}`;
  using engine = new Engine();
  const graph = new Graph();
  build(graph);
  using program = Program.compile(graph, engine);
  const before = loadAddon().emulatedWork();
  const { outputs, counters } = await program.run(run);
  const after = loadAddon().emulatedWork();
  return { outputs, counters, launches: after.launches - before.launches, depth: after.depth - before.depth };
}

describe.runIf(device !== 'cpu')('steps side by side', () => {
  afterEach(() => {
    delete process.env.ELASTIFORM_CUDA_BRANCHES;
  });

  it('are products of experts; what they add to a sum stays in order', async () => {
    const [experts, rows, hidden, units] = [12, 20, 16, 8];
    const weights = Array.from({ length: experts }, () => [weight(units, hidden), weight(hidden, units)]);
    const build = (graph: Graph) => {
      const x = graph.feed('x', 'f32', [rows, hidden]);
      const parts = weights.map(([up]) => linear(x, graph.weight(up)));
      let y: Node = x;
      weights.forEach(([, down], i) => {
        y = linearAdd(y, parts[i], graph.weight(down));
      });
      graph.output('y', y);
    };
    const run = { feeds: { x: values(rows * hidden) } };
    const chain = await runWith(1, build, run);
    expect(chain.depth).toBe(chain.launches);
    for (const [branches, rounds] of [
      [null, 2], // 8 and 4
      [3, 4],
      [8, 2],
    ] as const) {
      const beside = await runWith(branches, build, run);
      expect(beside.launches).toBe(chain.launches);
      expect(beside.depth, `${branches} branches`).toBe(depthOf(rounds + experts));
      expect({ ...beside, depth: 0 }).toEqual({ ...chain, depth: 0 });
    }
  });

  it('give what they give one after the other, in any program', async () => {
    const [hidden, units] = [16, 8];
    const weights = Array.from({ length: 3 }, () => [weight(units, hidden), weight(hidden, units)]);
    const gain = weight(hidden);
    let [saved, all] = [0, 0];
    for (let round = 0; round < 25; round++) {
      const start = new Random(round, 'program');
      const steps = 8 + Math.floor(30 * start.uniform());
      using sums = Tensor.alloc('f32', [64]);
      const build = (graph: Graph) => {
        const draw = new Random(round, 'steps');
        const below = (n: number) => Math.floor(n * draw.uniform());
        const latest = (list: Node[]) => list[list.length - 1 - below(Math.min(list.length, 4))];
        const [n, segments] = [graph.dim('rows', 40), graph.feed('offsets', 'i32', [2])];
        const wide: Node[] = [graph.feed('x', 'f32', [n, hidden])];
        const narrow: Node[] = [];
        const share = graph.feed('share', 'f32', [1]);
        const z = linear(wide[0], graph.weight(weights[0][0]));
        const routed = [0, 1, 2].map((i) => expertRows({ z, offsets: segments, share, rule: 'top-k' }, i).rows);
        const state = graph.state(sums);
        const step = (i: number) => {
          const at = below(3);
          switch (below(8)) {
            case 0:
              return wide.push(rmsNorm(latest(wide), graph.weight(gain), { eps: 1e-5 + i * 1e-6 }));
            case 1:
              return wide.push(add(latest(wide), latest(wide)));
            case 2:
              return wide.push(scale(latest(wide), 1 - i / 100));
            case 3: {
              const some = gatherRows(latest(wide), routed[at]);
              return wide.push(scatterAdd(latest(wide), scale(some, 0.5 + i / 100), routed[at]));
            }
            case 4:
              return accumulate(state, sumRows(latest(wide)), 16 * below(3) + below(2));
            case 5:
            case 6:
              if (narrow.length > 0) {
                return wide.push(linearAdd(latest(wide), latest(narrow), graph.weight(weights[at][1])));
              }
          }
          return narrow.push(linear(latest(wide), graph.weight(weights[at][0])));
        };
        for (let i = 0; i < steps; i++) graph.tag(`part ${below(3)}`, () => step(i));
        for (const [i, node] of wide.slice(-3).entries()) graph.output(`y${i}`, scale(node, 2 + i));
      };
      const count = 1 + Math.floor(40 * start.uniform());
      const run = {
        dims: { rows: count },
        feeds: { x: values(count * hidden), offsets: Int32Array.of(0, count), share: Float32Array.of(0.5) },
      };
      const results = [];
      for (const branches of [1, 8]) {
        sums.write(new Float32Array(64));
        results.push({ ...(await runWith(branches, build, run)), sums: sums.readFloat() });
      }
      const [chain, beside] = results;
      expect({ ...beside, depth: 0 }, `program ${round}`).toEqual({ ...chain, depth: 0 });
      expect(chain.depth).toBe(chain.launches);
      saved += chain.depth - beside.depth;
      all += chain.depth;
    }
    expect(saved).toBeGreaterThanOrEqual(all / 10);
  });

  it('report the fault of the first step, as if run one after the other', async () => {
    const build = (graph: Graph) => {
      const x = graph.feed('x', 'f32', [8, 4]);
      for (const i of [0, 1, 2]) graph.output(`y${i}`, gatherRows(x, graph.feed(`rows${i}`, 'i32', [2])));
    };
    const run = (...bad: number[]) =>
      runWith(null, build, {
        feeds: {
          x: values(32),
          ...Object.fromEntries([0, 1, 2].map((i) => [`rows${i}`, Int32Array.of(0, bad.includes(i) ? 20 + i : 7)])),
        },
      });
    await expect(run(1, 2)).rejects.toThrow(InvalidDataError);
    await expect(run(0, 1, 2)).rejects.toThrow(/step 0 .*got 20/);
    await expect(run(1, 2)).rejects.toThrow(/step 1 .*got 21/);
    await expect(run(2)).rejects.toThrow(/step 2 .*got 22/);
    await run();
  });

  it('trust indices that a step before them has checked', async () => {
    const build = (graph: Graph) => {
      const [x, rows] = [graph.feed('x', 'f32', [8, 4]), graph.feed('rows', 'i32', [2])];
      const scaled = [2, 3, 4, 5].map((factor) => scale(x, factor));
      for (const [i, y] of scaled.entries()) graph.output(`y${i}`, gatherRows(y, rows));
    };
    const run = (row: number) => runWith(null, build, { feeds: { x: values(32), rows: Int32Array.of(0, row) } });
    await expect(run(8)).rejects.toThrow(/rows\[1\].*got 8/);
    const { launches, depth } = await run(7);
    // Four scales; the check; its gather; three more.
    if (device === 'simt') expect({ launches, depth }).toEqual({ launches: 9, depth: 4 });
  });

  it('trust indices of experts, and come after what chooses them', async () => {
    const build = (graph: Graph) => {
      const [x, z] = [graph.feed('x', 'f32', [8, 4]), graph.feed('z', 'f32', [8, 3])];
      const [offsets, share] = [graph.feed('offsets', 'i32', [2]), graph.feed('share', 'f32', [1])];
      const chosen = [0, 1, 2].map((expert) => expertRows({ z, offsets, share, rule: 'top-k' }, expert).rows);
      for (const [i, rows] of chosen.entries()) graph.output(`y${i}`, gatherRows(x, rows));
    };
    const feeds = { x: values(32), z: values(24), offsets: Int32Array.of(0, 8), share: Float32Array.of(0.5) };
    const [chain, beside] = [await runWith(1, build, { feeds }), await runWith(8, build, { feeds })];
    expect(beside.outputs).toEqual(chain.outputs);
    // The check of offsets, three choices, then all gathers.
    if (device === 'simt') expect([chain.depth, beside.depth]).toEqual([7, 5]);
  });

  it('wait for a step that reads what their memory writes over', async () => {
    const [narrow, other, wide] = [weight(8, 16), weight(8, 16), weight(16, 16)];
    const build = (graph: Graph) => {
      const x = graph.feed('x', 'f32', [20, 16]);
      // Two temporaries beside each other, later the place of one.
      const [a, b] = [narrow, other].map((w) => linear(x, graph.weight(w)));
      const first = scale(a, 2);
      graph.output('first', first);
      graph.output('sum', add(first, b));
      graph.output('last', scale(linear(x, graph.weight(wide)), 2));
    };
    const run = { feeds: { x: values(320) } };
    const [chain, beside] = [await runWith(1, build, run), await runWith(8, build, run)];
    expect(beside.outputs).toEqual(chain.outputs);
    if (device === 'simt') expect([chain.depth, beside.depth]).toEqual([6, 5]); // the first two products
  });

  it('add to the same state in order', async () => {
    using sum = Tensor.alloc('f32', [4]);
    const build = (graph: Graph) => {
      for (let i = 0; i < 8; i++) accumulate(graph.state(sum), graph.feed(`x${i}`, 'f32', [4]), 0);
    };
    const feeds = Object.fromEntries(Array.from({ length: 8 }, (_, i) => [`x${i}`, values(4).map((x) => x * 10 ** i)]));
    const results = [];
    for (const branches of [1, 8]) {
      sum.write(new Float32Array(4));
      await runWith(branches, build, { feeds });
      results.push(sum.readFloat());
    }
    expect(results[1]).toEqual(results[0]);
  });

  it('have scratch memory one after the other', async () => {
    const build = (graph: Graph) => {
      for (let i = 0; i < 6; i++) graph.output(`y${i}`, sumRows(graph.feed(`x${i}`, 'f32', [500, 8])));
    };
    const feeds = Object.fromEntries(Array.from({ length: 6 }, (_, i) => [`x${i}`, values(4000)]));
    const [chain, beside] = [await runWith(1, build, { feeds }), await runWith(8, build, { feeds })];
    expect(beside.outputs).toEqual(chain.outputs);
    expect(beside.depth).toBe(chain.depth);
  });

  it('wait for a size that a step produces', async () => {
    const build = (graph: Graph) => {
      const [z, offsets] = [graph.feed('z', 'f32', [8, 1]), graph.feed('offsets', 'i32', [2])];
      const share = graph.feed('share', 'f32', [1]);
      // Which checks the offsets, so that the next one does not.
      graph.output('first', expertRows({ z, offsets, share, rule: 'top-k' }, 0).rows);
      const { rows } = routeTopk(z, offsets, share);
      for (const width of [1, 2, 3]) graph.output(`y${width}`, zeros(graph, [rows.shape[0], width]));
    };
    for (const capacity of [0.5, 1, 0.25]) {
      const { outputs } = await runWith(null, build, {
        feeds: { z: values(8), offsets: Int32Array.of(0, 8), share: Float32Array.of(capacity) },
      });
      for (const width of [1, 2, 3]) expect([...outputs[`y${width}`]]).toEqual(Array(8 * capacity * width).fill(0));
    }
  });

  it('are as many as a variable says, which must be a number of branches', async () => {
    for (const text of ['0', '9', 'many', '']) {
      process.env.ELASTIFORM_CUDA_BRANCHES = text;
      using engine = new Engine();
      const graph = new Graph();
      graph.output('y', scale(graph.feed('x', 'f32', [1]), 2));
      using program = Program.compile(graph, engine);
      const run = () => program.run({ feeds: { x: Float32Array.of(1) } });
      await expect(run()).rejects.toThrow(InvalidArgumentError);
      await expect(run()).rejects.toThrow(`ELASTIFORM_CUDA_BRANCHES must be 1 to 8, got ${text}`);
      delete process.env.ELASTIFORM_CUDA_BRANCHES;
      expect([...(await run()).outputs.y]).toEqual([2]);
    }
  });
});
