// Row indices that are out of range, descending or repeated: every op that takes them answers with InvalidData.
import { describe, expect, test } from 'vitest';
import { Graph } from '../../lib/graph/graph.js';
import {
  gate,
  gatherIds,
  gatherRows,
  gradients,
  layerNorm,
  linear,
  linearAdd,
  linearDw,
  linearGated,
  type Node,
  Program,
  rmsNorm,
  scatterAdd,
  sumRows,
  topkBce,
} from '../../lib/graph/index.js';
import { Tensor } from '../../lib/native/index.js';
import { failure, testEngine } from './harness.js';

const [n, d] = [5, 4];

interface Nodes {
  x: Node;
  /** f32 [2, d]. */
  part: Node;
  z: Node;
  ids: Node;
  w: Node;
  gain: Node;
  rows: Node;
}

const builders: Record<string, (nodes: Nodes) => Node> = {
  gather_rows: ({ x, rows }) => gatherRows(x, rows),
  gather_ids: ({ ids, rows }) => gatherIds(ids, rows),
  scatter_add: ({ x, part, rows }) => scatterAdd(x, part, rows),
  sum_rows: ({ x, rows }) => sumRows(x, rows),
  rms_norm: ({ x, gain, rows }) => rmsNorm(x, gain, { eps: 1e-5, rows }),
  layer_norm: ({ x, gain, rows }) => layerNorm(x, gain, null, { eps: 1e-5, rows }),
  linear: ({ x, w, rows }) => linear(x, w, { rows }),
  linear_gated: ({ x, w, rows }) => linearGated(x, w, w, { act: 'silu', rows }),
  linear_add: ({ x, part, w, rows }) => linearAdd(x, part, w, { rows }),
  linear_dw: ({ x, part, rows }) => linearDw(x, part, { dyrows: rows }),
  'linear_dw, rows of x': ({ x, part, rows }) => linearDw(part, x, { xrows: rows }),
  gate: ({ z, rows }) => gate(z, rows, 1),
  topk_bce: ({ z, rows }) => topkBce(z, rows),
  // Gradients whose forward step does not run: only they see the rows.
  gate_grad: ({ z, rows }) => gradients(gate(z, rows, 1), [z], { seed: z.graph.feed('pair', 'f32', [2]) })[0],
  linear_add_grad: ({ x, part, w, rows }) => gradients(linearAdd(x, part, w, { rows }), [part], { seed: x })[0],
  topk_bce_grad: ({ z, rows }) => gradients(topkBce(z, rows), [z])[0],
};

describe.each(Object.entries(builders))('%s', (op, build) => {
  test.each([[[0, n]], [[-1, 0]], [[3, 1]], [[2, 2]], [[0, 0x7fffffff]], [[-0x80000000, 0]]])(
    'rows %j',
    async (rows) => {
      using w = Tensor.fromData('f32', [d, d], new Float32Array(d * d));
      using gain = Tensor.fromData('f32', [d], new Float32Array(d));
      const compile = (g: Graph) =>
        g.output(
          'y',
          build({
            x: g.feed('x', 'f32', [n, d]),
            part: g.feed('part', 'f32', [2, d]),
            z: g.feed('z', 'f32', [n, 1]),
            ids: g.feed('ids', 'i32', [n]),
            w: g.weight(w),
            gain: g.weight(gain),
            rows: g.feed('rows', 'i32', [2]),
          }),
        );
      const feeds = {
        x: new Float32Array(n * d),
        part: new Float32Array(2 * d),
        z: new Float32Array(n),
        ids: new Int32Array(n),
        ...(op === 'gate_grad' ? { pair: new Float32Array(2) } : {}),
      };
      const error = await failure(compile, { feeds: { ...feeds, rows: Int32Array.from(rows) } });
      expect(error).toMatchObject({ code: 'InvalidData' });
      expect(error.message).toContain(`[${op.split(',')[0]}]`);
      // The engine goes on.
      const g = new Graph();
      compile(g);
      using program = Program.compile(g, testEngine());
      await expect(program.run({ feeds: { ...feeds, rows: Int32Array.of(1, 4) } })).resolves.toBeDefined();
    },
  );
});

describe('linear_dw of other numbers of rows', () => {
  const product = (gathered: boolean) => (g: Graph) => {
    const [a, b, q] = ['A', 'B', 'Q'].map((name) => g.dim(name, 5));
    const xrows = gathered ? g.feed('xrows', 'i32', [q!]) : null;
    g.output('dw', linearDw(g.feed('dy', 'f32', [a!, 2]), g.feed('x', 'f32', [b!, 3]), { xrows }));
  };
  const run = (A: number, B: number, Q: number | null) => ({
    dims: { A, B, ...(Q ? { Q } : {}) },
    feeds: {
      dy: new Float32Array(A * 2).fill(1),
      x: new Float32Array(B * 3).fill(1),
      ...(Q ? { xrows: Int32Array.from({ length: Q }, (_, i) => i) } : {}),
    },
  });

  test.each([
    [4, 5, null, 'x must have 4 rows, got 5'],
    [5, 4, null, 'x must have 5 rows, got 4'],
    [4, 4, 3, 'xrows must have 4 rows, got 3'],
  ])('%d of dy, %d of x, gathered: %j', async (A, B, Q, says) => {
    const error = await failure(product(Q !== null), run(A, B, Q));
    expect(error).toMatchObject({ code: 'InvalidProgram' });
    expect(error.message).toContain(`[linear_dw] ${says}`);
  });

  test('as many, by dims of their own', async () => {
    const g = new Graph();
    product(false)(g);
    using program = Program.compile(g, testEngine());
    const { outputs } = await program.run(run(4, 4, null));
    expect([...outputs.dw!]).toEqual(Array(6).fill(4));
  });
});
