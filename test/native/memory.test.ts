// A device with little memory: what an engine keeps for later goes before a run fails, and a failed run harms none after it.
import { expect, test } from 'vitest';
import { Graph, linear, Program, scale } from '../../lib/graph/index.js';
import { Engine, loadAddon, OutOfMemoryError, Tensor } from '../../lib/native/index.js';

const MiB = 1 << 20;
process.env.ELASTIFORM_SIMT_MEMORY = String(8 * MiB);

test.runIf(loadAddon().info().devices.simt.available)('memory is freed before a run fails', async () => {
  using engine = new Engine('simt');
  const large = new Graph();
  const n = large.dim('n', MiB);
  large.output('y', scale(large.feed('x', 'f32', [n]), 2)); // x and y: 8 MiB at most
  const half = new Graph();
  half.output('y', scale(half.feed('x', 'f32', [half.dim('n', MiB / 2)]), 2)); // 4 MiB
  const product = (rows: number) => {
    const graph = new Graph();
    const weight = Tensor.fromData('f32', [rows, 1024], new Float32Array(rows * 1024).fill(1));
    graph.output('y', linear(graph.feed('x', 'f32', [1, 1024]), graph.weight(weight)));
    return { program: Program.compile(graph, engine), weight };
  };
  const run = async (program: Program, n: number) =>
    (await program.run({ dims: { n }, feeds: { x: new Float32Array(n).fill(3) } })).outputs.y;
  const ones = { feeds: { x: new Float32Array(1024).fill(1) } };

  using first = Program.compile(half, engine);
  expect((await run(first, 5))[4]).toBe(6);
  // 6 MiB of weights fit only where the 4 MiB of the first program were.
  const fits = product(1536);
  expect((await fits.program.run(ones)).outputs.y[1535]).toBe(1024);

  const failed = product(2304).program.run(ones);
  await expect(failed).rejects.toThrow(OutOfMemoryError);
  await expect(failed).rejects.toThrow(/no memory for \d+ bytes: \d+ of 8388608 are free/);
  using tooLarge = Program.compile(large, engine);
  await expect(run(tooLarge, 1)).rejects.toThrow(OutOfMemoryError);

  fits.program.dispose();
  fits.weight.dispose();
  expect((await run(first, 7))[6]).toBe(6);
});
