// Losses over the vocabulary hold some rows of logits at a time: their memory does not grow with the vocabulary.
import { expect, test } from 'vitest';
import {
  crossEntropy,
  divergence,
  Graph,
  gradients,
  type Node,
  Program,
  topkDivergence,
  topLogits,
} from '../../lib/graph/index.js';
import { Engine, loadAddon, Tensor } from '../../lib/native/index.js';

const MiB = 1 << 20;
const [rows, width] = [600, 4];

/** Bytes of arena and scratch that a loss and its gradient take, and bytes of the logits of all rows. */
async function measure(vocab: number, build: (h: Node, teacher: Node, w: Node, weight: Node, targets: Node) => Node) {
  const before = loadAddon().memory().arenaBytes;
  using engine = new Engine('cpu');
  using w = Tensor.fromData('f32', [vocab, width], new Float32Array(vocab * width).fill(0.01));
  const graph = new Graph();
  const h = graph.feed('h', 'f32', [rows, width]);
  const teacher = graph.feed('teacher', 'f32', [rows, width]);
  const weight = graph.feed('weight', 'f32', [rows]);
  const loss = build(h, teacher, graph.weight(w), weight, graph.feed('targets', 'i32', [rows]));
  graph.output('loss', loss);
  graph.output('dh', gradients(loss, [h])[0]);
  using program = Program.compile(graph, engine);
  const feeds = {
    h: new Float32Array(rows * width),
    teacher: new Float32Array(rows * width).fill(1),
    weight: new Float32Array(rows).fill(1),
    targets: new Int32Array(rows),
  };
  await program.run({ feeds });
  return { bytes: loadAddon().memory().arenaBytes - before, all: rows * vocab * 4, arena: program.arenaBytes };
}

test.each<[string, Parameters<typeof measure>[1]]>([
  ['kl', (h, t, w, weight) => divergence(h, t, w, weight).loss],
  ['reverse-kl', (h, t, w, weight) => divergence(h, t, w, weight, { kind: 'reverse-kl' }).loss],
  ['jsd, a head of the teacher', (h, t, w, weight) => divergence(h, t, w, weight, { kind: 'jsd', wt: w }).loss],
  ['kl of the 16 largest', (h, t, w, weight) => topkDivergence(h, w, topLogits(t, w, 16), weight).loss],
  ['cross-entropy', (h, _, w, weight, targets) => crossEntropy(h, w, targets, weight).loss],
])('%s', async (_, build) => {
  const small = await measure(60_000, build);
  const large = await measure(120_000, build);
  expect(large.arena).toBe(small.arena);
  expect(large.all).toBeGreaterThan(256 * MiB);
  for (const { bytes } of [small, large]) {
    expect(bytes).toBeGreaterThan(16 * MiB);
    // 32 MiB of logits, and what products pack of the gradient.
    expect(bytes).toBeLessThan(48 * MiB);
  }
});
