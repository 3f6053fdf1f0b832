// The gradient transform: what it emits, what it leaves out, and its numbers on whole blocks in float64.
import { describe, expect, test } from 'vitest';
import { Graph, type Node } from '../../lib/graph/graph.js';
import {
  accumulate,
  add,
  attention,
  attentionCached,
  crossEntropy,
  divergence,
  dot,
  embedding,
  gate,
  gatherIds,
  gradients,
  linear,
  linearAdd,
  linearGated,
  rmsNorm,
  rope,
  routeTopk,
  scale,
  stopGradient,
  topkBce,
} from '../../lib/graph/index.js';
import { lower } from '../../lib/graph/lowering.js';
import { type Case, checkGradients, fakeTensor, inputs } from '../ops/harness.js';
import { interpret } from '../ops/interpreter.js';
import { f64 } from '../ops/reference.js';

const state = (g: Graph, ...shape: number[]): Node => g.state(fakeTensor('f32', shape, true));
const weight = (g: Graph, ...shape: number[]): Node => g.weight(fakeTensor('f32', shape, false));

/** Ops of a graph that survive lowering. */
function liveOps(g: Graph): string[] {
  const { code, opNames } = lower(g);
  const [, , dims, tensors, steps] = code;
  let at = 6 + 2 * dims + 7 * tensors;
  return Array.from({ length: steps }, () => {
    const name = opNames[code[at]];
    at += 6 + code[at + 2] + code[at + 3];
    return name;
  });
}

describe('structure', () => {
  test('frozen weights get no gradient product', () => {
    const g = new Graph();
    const [x, w1, w2] = [g.feed('x', 'f32', [3, 4]), weight(g, 5, 4), weight(g, 2, 5)];
    const z = linear(linear(x, w1, { act: 'silu' }), w2);
    const [dx] = gradients(z, [x], { seed: g.feed('dz', 'f32', [3, 2]) });
    g.output('dx', dx);
    expect(liveOps(g)).toEqual(['linear', 'linear_dx', 'activation_grad', 'linear_dx']);
    expect(g.steps.some((step) => step.op === 'linear_dw')).toBe(false);
  });

  test('what lies before every wrt is not walked', () => {
    const g = new Graph();
    const x = linear(g.feed('x', 'f32', [3, 4]), weight(g, 4, 4));
    const w = state(g, 2, 4);
    gradients(linear(x, w), [w], { seed: g.feed('dy', 'f32', [3, 2]) });
    expect(g.steps.map((step) => step.op)).toEqual(['linear', 'linear', 'linear_dw']);
  });

  test('one loss of one: no scaling of what the loss op gives', () => {
    const g = new Graph();
    const h = g.feed('h', 'f32', [3, 4]);
    const { loss } = divergence(h, g.feed('t', 'f32', [3, 4]), weight(g, 9, 4), g.feed('weight', 'f32', [3]));
    const [dh] = gradients(loss, [h]);
    expect(dh).toBe(loss.step?.outputs[2]);
    expect(gradients(scale(loss, 0.5), [h])[0].step).toMatchObject({ op: 'scale', inputs: [dh, null], attrs: [0.5] });
  });

  test('projections of one input accumulate in the products', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [3, 4]);
    const [q, k, v] = [1, 2, 3].map(() => linear(x, weight(g, 4, 4)));
    const y = attention(q, k, v, g.feed('o', 'i32', [2]), { heads: 1, kvHeads: 1, causal: true, scale: 1 });
    gradients(y, [x], { seed: g.feed('dy', 'f32', [3, 4]) });
    const ops = g.steps.slice(4).map((step) => step.op);
    expect(ops).toEqual(['attention_grad', 'linear_dx', 'linear_dx', 'linear_dx']);
  });

  test('a gathered operand gets its rows scattered onto the dense gradient', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [5, 4]);
    const rows = g.feed('rows', 'i32', [2]);
    const normed = rmsNorm(x, weight(g, 4), { eps: 1e-5, rows });
    const y = linearAdd(x, linear(normed, weight(g, 6, 4)), weight(g, 4, 6), { rows });
    const dy = g.feed('dy', 'f32', [5, 4]);
    const [dx] = gradients(y, [x], { seed: dy });
    expect(dx.step?.op).toBe('scatter_add');
    expect(dx.step?.inputs[0]).toBe(dy);
    expect(g.steps.filter((step) => step.op === 'zeros')).toEqual([]);
  });

  test('backward steps carry the tag of their forward step', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [3, 4]);
    const y = g.tag('L0.mlp', () => linear(x, weight(g, 4, 4), { act: 'relu' }));
    const z = linear(y, weight(g, 4, 4));
    gradients(z, [x], { seed: g.feed('dz', 'f32', [3, 4]) });
    expect(g.steps.map((step) => [step.op, step.tag])).toEqual([
      ['linear', 'L0.mlp'],
      ['linear', ''],
      ['linear_dx', 'grad'],
      ['activation_grad', 'L0.mlp/grad'],
      ['linear_dx', 'L0.mlp/grad'],
    ]);
  });

  test('a gradient is handed over as soon as it is complete', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [3, 4]);
    const [w1, w2, unused] = [state(g, 4, 4), state(g, 4, 4), state(g, 7)];
    const sums = state(g, 64);
    const y = linear(linear(x, w1), w2);
    const order: number[] = [];
    const found = gradients(y, [w1, w2, unused], {
      seed: g.feed('dy', 'f32', [3, 4]),
      onGradient(i, gradient) {
        order.push(i);
        accumulate(sums, gradient, 16 * i);
      },
    });
    expect(order).toEqual([1, 0, 2]);
    expect(g.steps.slice(2).map((step) => step.op)).toEqual([
      'linear_dw',
      'linear_dx',
      'accumulate',
      'linear_dw',
      'accumulate',
      'zeros',
      'accumulate',
    ]);
    expect(found[2].shape).toEqual([7]);
  });

  test('stopGradient stops', () => {
    const g = new Graph();
    const [x, w] = [g.feed('x', 'f32', [3, 4]), state(g, 1, 4)];
    const z = linear(stopGradient(x), w);
    const rows = g.feed('rows', 'i32', [2]);
    const [dx, dw] = gradients(topkBce(z, rows), [x, w]);
    expect(dx.step?.op).toBe('zeros');
    expect(dw.step?.op).toBe('linear_dw');
  });

  test('dead optional outputs and dead gradients cost nothing', () => {
    const g = new Graph();
    const [x, gain, w] = [g.feed('x', 'f32', [3, 4]), weight(g, 4), weight(g, 4, 4)];
    const y = linear(rmsNorm(x, gain, { eps: 1e-5 }), w, { act: 'gelu' });
    gradients(y, [x], { seed: g.feed('dy', 'f32', [3, 4]) });
    g.output('y', y);
    expect(liveOps(g)).toEqual(['rms_norm', 'linear']);
  });
});

describe('checkpoints', () => {
  function block(checkpointed: boolean) {
    const g = new Graph();
    const x = g.feed('x', 'f32', [3, 4]);
    const [w1, w2] = [weight(g, 8, 4), weight(g, 4, 8)];
    const body = () =>
      g.tag('L0', () => linearAdd(x, linear(rmsNorm(x, weight(g, 4), { eps: 1e-5 }), w1, { act: 'silu' }), w2));
    const y = checkpointed ? g.checkpoint(body) : body();
    const [dx] = gradients(y, [x], { seed: g.feed('dy', 'f32', [3, 4]) });
    g.output('y', y);
    g.output('dx', dx);
    return g;
  }

  test('steps are run again, apart from the originals, where their values are needed', () => {
    const backward = ['linear_add_grad', 'activation_grad', 'linear_dx', 'rms_norm_grad', 'add'];
    expect(liveOps(block(false))).toEqual(['rms_norm', 'linear', 'linear_add', ...backward]);
    const ops = liveOps(block(true));
    // The last product is not repeated: its result is kept.
    expect(ops.filter((op) => op === 'linear')).toHaveLength(2);
    expect(ops.filter((op) => op === 'rms_norm')).toHaveLength(2);
    expect(ops.filter((op) => op === 'linear_add')).toHaveLength(1);
    const g = block(true);
    const copies = g.steps.filter((step) => step.index > 2 && ['linear', 'rms_norm'].includes(step.op));
    expect(copies.map((step) => step.tag)).toEqual(['L0/grad', 'L0/grad']);
    expect(copies.map((step) => step.canonical === step)).toEqual([true, true]);
  });

  test('routing inside is kept, not repeated', () => {
    const g = new Graph();
    const [x, router, w] = [g.feed('x', 'f32', [9, 4]), state(g, 1, 4), weight(g, 4, 4)];
    const y = g.checkpoint(() => {
      const z = linear(x, router);
      const { rows } = routeTopk(z, g.feed('o', 'i32', [2]), g.feed('c', 'f32', [1]));
      return linearAdd(x, linear(x, w, { rows, act: 'relu' }), w, { rows, gate: gate(z, rows, 0) });
    });
    gradients(y, [router], { seed: g.feed('dy', 'f32', [9, 4]) });
    expect(g.steps.filter((step) => step.op === 'route_topk')).toHaveLength(1);
    expect(g.producers.size).toBe(1);
  });

  test('the numbers are those without', () => {
    const make = inputs(3);
    const data = { x: make.f32(3, 4).data, dy: make.f32(3, 4).data };
    const [plain, again] = [false, true].map((checkpointed) => {
      const g = block(checkpointed);
      const tensors = new Map(
        g.steps
          .flatMap((step) => step.inputs)
          .flatMap((node) => (node?.leaf?.kind === 'weight' ? [node.leaf.tensor] : []))
          .map((tensor) => [tensor, f64(tensor.shape, inputs(9).f32(...tensor.shape).data)] as const),
      );
      const feeds = { x: f64([3, 4], data.x), dy: f64([3, 4], data.dy) };
      const value = interpret(g, { dims: {}, feeds, tensors });
      return [...g.outputs.values()].map((node) => [...value(node).data]);
    });
    expect(again).toEqual(plain);
  });
});

describe('errors', () => {
  test('the loss is one number', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [2]);
    expect(() => gradients(x, [x])).toThrow('[gradients] the loss must be f32[1], got f32[2]');
    expect(() => gradients(dot(x, x), [g.feed('i', 'i32', [2])])).toThrow('only f32 nodes have a gradient');
    expect(() => gradients(dot(x, x), [new Graph().feed('x', 'f32', [2])])).toThrow('another graph');
  });

  test('an op without gradient says so, only when one reaches it', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [2, 4]);
    const [lengths, slots] = [[1], [1]].map((shape) => g.state(fakeTensor('i32', shape, true)));
    const pages = g.state(fakeTensor('i32', [1, 1], true));
    const cache = { lengths, slots, pages, k: state(g, 1, 8, 4), v: state(g, 1, 8, 4) };
    const y = attentionCached(x, g.feed('o', 'i32', [2]), cache, { heads: 1, kvHeads: 1, scale: 1 });
    const w = state(g, 2, 4);
    const z = linear(y, w);
    const seed = g.feed('dz', 'f32', [2, 2]);
    expect(gradients(z, [w], { seed })[0].step?.op).toBe('linear_dw');
    expect(() => gradients(z, [x], { seed })).toThrow('[attention_cached] no gradient flows through its output y');
  });

  test('only the loss of a loss op carries a gradient', () => {
    const g = new Graph();
    const h = g.feed('h', 'f32', [3, 4]);
    const { row } = crossEntropy(h, weight(g, 9, 4), g.feed('t', 'i32', [3]), g.feed('weight', 'f32', [3]));
    expect(() => gradients(dot(row, row), [h])).toThrow('[cross_entropy] no gradient flows through its output row');
  });

  test('state that was overwritten since it was read is not differentiated', () => {
    const g = new Graph();
    const [x, w] = [g.feed('x', 'f32', [4]), state(g, 4)];
    const y = dot(x, w);
    accumulate(w, x, 0);
    expect(() => gradients(y, [x])).toThrow('was overwritten by accumulate after dot read it');
  });
});

/** A whole routed transformer block, from ids to the loss: every path of the residual stream, dense and sparse. */
function model(checkpointed: boolean): Case {
  const make = inputs(21);
  const [n, d, dh, ffn, v] = [11, 8, 4, 12, 13];
  return {
    name: 'block',
    inputs: {
      ids: make.ids(v, n),
      positions: make.i32([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5], n),
      offsets: make.i32([0, 5, n], 3),
      capacity: make.values([0.6, 0.5], 2),
      targets: make.i32([1, 2, 3, 4, -1, 6, 7, 8, 9, 10, -1], n),
      weight: make.f32(n),
      table: make.param(v, d),
      freq: make.weight('f32', dh / 2),
      norm1: make.param(d),
      norm2: make.param(d),
      q: make.param(d, d),
      k: make.param(dh, d),
      v: make.param(dh, d),
      o: make.param(d, d),
      router: make.param(1, d),
      up: make.param(ffn, d),
      gateProj: make.param(ffn, d),
      down: make.param(d, ffn),
    },
    build: (m) => {
      const g = m.table.graph;
      const region = (body: () => Node) => (checkpointed ? g.checkpoint(body) : body());
      const x0 = embedding(m.table, m.ids);
      const losses: Node[] = [];
      const x1 = region(() => {
        const z = linear(rmsNorm(x0, m.norm1, { eps: 1e-5 }), m.router);
        const { rows, offsets } = routeTopk(z, m.offsets, m.capacity);
        losses.push(topkBce(z, rows));
        const h = rmsNorm(x0, m.norm1, { eps: 1e-5, rows });
        const positions = gatherIds(m.positions, rows);
        const q = rope(linear(h, m.q), positions, m.freq, { headDim: dh });
        const k = rope(linear(h, m.k), positions, m.freq, { headDim: dh });
        const options = { heads: 2, kvHeads: 1, causal: true, scale: 0.5 };
        const y = attention(q, k, linear(h, m.v), offsets, options);
        return linearAdd(x0, y, m.o, { rows, gate: gate(z, rows, 1) });
      });
      const x2 = region(() => {
        const h = rmsNorm(x1, m.norm2, { eps: 1e-5 });
        return linearAdd(x1, linearGated(h, m.gateProj, m.up, { act: 'silu' }), m.down);
      });
      const { loss } = crossEntropy(x2, m.table, m.targets, m.weight);
      return { loss: add(loss, scale(losses[0], 0.3)) };
    },
    wrt: ['table', 'norm1', 'norm2', 'q', 'k', 'v', 'o', 'router', 'up', 'gateProj', 'down'],
  };
}

describe('a routed transformer block', () => {
  test.each([false, true])('gradients are finite differences (checkpoints: %s)', (checkpointed) => {
    checkGradients(model(checkpointed), 1e-6, 6);
  });
});
