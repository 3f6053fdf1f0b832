// Every op that can meet a router's empty selection, given one: no rows are computed, and gradients are zeros.
import {
  activation,
  add,
  attention,
  crossEntropy,
  divergence,
  dot,
  embedding,
  gate,
  gatedActivation,
  gatherIds,
  gatherRows,
  layerNorm,
  linear,
  linearAdd,
  linearGated,
  type Node,
  rmsNorm,
  rope,
  routeThreshold,
  scale,
  scatterAdd,
  sumRows,
  topkBce,
} from '../../lib/graph/index.js';
import { type Case, cases, inputs } from './harness.js';

const [n, d] = [5, 8];

type Build = (nodes: Record<string, Node>, rows: Node, offsets: Node) => Record<string, Node>;

/** A case whose `rows` i32 [R] and `offsets` are what a threshold that no score passes selects: R = 0. */
function empty(name: string, build: Build, wrt?: readonly string[]): Case {
  const make = inputs(1);
  return {
    name,
    inputs: {
      x: make.f32(['N', n], d),
      z: make.f32(['N', n], 1),
      ids: make.ids(n, ['N', n]),
      segments: make.i32([0, 2, n], 3),
      threshold: make.values([100, Number.POSITIVE_INFINITY], 2),
      w: make.param(d, d),
      w2: make.param(d, d),
      b: make.param(d),
      freq: make.weight('f32', d / 2),
    },
    build: (nodes) => {
      const { rows, offsets } = routeThreshold(nodes.z, nodes.segments, nodes.threshold);
      return build(nodes, rows, offsets);
    },
    wrt,
  };
}

cases('no rows', [
  empty('elementwise', ({ x }, rows) => {
    const none = gatherRows(x, rows);
    return { y: add(scale(none, 2), activation(gatedActivation(none, none, 'silu'), 'gelu')) };
  }),
  empty('reductions', ({ x, z }, rows) => {
    const none = gatherRows(x, rows);
    const gates = gate(z, rows, 1);
    return { sum: sumRows(none), gated: sumRows(x, rows, gates), dot: dot(gates, gates) };
  }),
  empty('embedding', ({ x, w, ids }, rows) => ({ y: scatterAdd(x, embedding(w, gatherIds(ids, rows)), rows) }), ['w']),
  empty(
    'norms',
    ({ x, b }, rows) => {
      const normed = add(rmsNorm(x, b, { eps: 1e-5, rows }), layerNorm(x, b, b, { eps: 1e-5, rows }));
      return { y: scatterAdd(x, normed, rows) };
    },
    ['x', 'b'],
  ),
  empty('scatter_add of gathered rows', ({ x }, rows) => ({ y: scatterAdd(x, scale(gatherRows(x, rows), 2), rows) }), [
    'x',
  ]),
  empty('scatter_add', ({ x, w }, rows) => ({ y: scatterAdd(x, linear(x, w, { rows }), rows) }), ['x', 'w']),
  empty(
    'a gated FFN',
    ({ x, z, w, w2, b }, rows) => {
      const normed = rmsNorm(x, b, { eps: 1e-5, rows });
      const hidden = linearGated(normed, w, w2, { act: 'silu', bg: b, bu: b });
      return { y: linearAdd(x, hidden, w, { bias: b, rows, gate: gate(z, rows, 1) }) };
    },
    ['x', 'z', 'w', 'w2', 'b'],
  ),
  empty(
    'a plain FFN',
    ({ x, z, w, w2, b }, rows) => {
      const normed = layerNorm(x, b, b, { eps: 1e-5, rows });
      const hidden = linear(normed, w, { act: 'gelu_tanh', bias: b });
      return { y: linearAdd(x, hidden, w2, { rows, gate: gate(z, rows, 2) }) };
    },
    ['x', 'z', 'w', 'w2', 'b'],
  ),
  empty(
    'attention',
    ({ x, ids, w, w2, b, freq }, rows, offsets) => {
      const positions = gatherIds(ids, rows);
      const q = rope(linear(x, w, { rows }), positions, freq, { headDim: d });
      const y = attention(q, linear(x, w2, { rows }), linear(x, w, { rows, bias: b }), offsets, {
        heads: 1,
        kvHeads: 1,
        causal: true,
        scale: 1,
      });
      return { y: linearAdd(x, y, w2, { rows }) };
    },
    ['x', 'w', 'w2'],
  ),
  empty(
    'attention of no queries',
    ({ x, segments, w, w2, b }, rows, offsets) => {
      const [q, k, v] = [linear(x, w, { rows }), linear(x, w2), linear(x, w, { bias: b })];
      const selected = { rows, offsets };
      const y = attention(q, k, v, segments, { heads: 2, kvHeads: 2, causal: false, scale: 1, selected });
      return { y: linearAdd(x, y, w2, { rows }) };
    },
    ['x', 'w', 'w2', 'b'],
  ),
  empty('topk_bce', ({ z }, rows) => ({ loss: topkBce(z, rows) }), ['z']),
  empty(
    'losses',
    ({ x, z, w, ids }, rows) => {
      const none = linear(x, w, { rows });
      const [weight, targets] = [gate(z, rows, 1), gatherIds(ids, rows)];
      const ce = crossEntropy(none, w, targets, weight);
      const kl = divergence(none, none, w, weight, { targets });
      return { loss: ce.loss, kl: kl.loss, row: kl.row, agree: kl.agree, ce: kl.ce!, correct: ce.correct };
    },
    ['x', 'w'],
  ),
]);
