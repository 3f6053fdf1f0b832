// The encoding of programs: layout, dead code, order; no addon.
import { describe, expect, test } from 'vitest';
import { Graph, type Node } from '../../lib/graph/graph.js';
import {
  accumulate,
  activation,
  add,
  dot,
  gatherRows,
  linear,
  rmsNorm,
  routeThreshold,
  scale,
  scatterAdd,
  stopGradient,
  topkBce,
  zeros,
} from '../../lib/graph/index.js';
import { type Lowered, lower } from '../../lib/graph/lowering.js';
import { fakeTensor } from '../ops/harness.js';

function decode({ code, attrs, opNames, tags }: Lowered) {
  const [magic, version, nDims, nTensors, nSteps, nTags] = code;
  let at = 6;
  const take = (n: number) => {
    at += n;
    return [...code.slice(at - n, at)];
  };
  const dims = Array.from({ length: nDims }, () => take(2));
  const tensors = Array.from({ length: nTensors }, () => take(7));
  const steps = Array.from({ length: nSteps }, () => {
    const [op, tag, nIn, nOut, nAttr, attrStart] = take(6);
    return {
      op: opNames[op],
      tag: tags[tag],
      in: take(nIn),
      out: take(nOut),
      attrs: [...attrs.slice(attrStart, attrStart + nAttr)],
    };
  });
  expect(at).toBe(code.length);
  expect([magic, version, nTags]).toEqual([0x454c4153, 1, tags.length]);
  return { dims, tensors, steps };
}

test('the layout, word for word', () => {
  const g = new Graph();
  const [n, r] = [g.dim('N', 9), g.dim('R', 7)];
  const x = g.feed('x', 'f32', [n, 4]);
  const rows = g.feed('rows', 'i32', [r]);
  const w = fakeTensor('bf16', [6, 4], false);
  const y = g.tag('L0', () => linear(x, g.weight(w), { rows, act: 'relu' }));
  g.output('y', y);
  const lowered = lower(g);
  expect([...lowered.code]).toEqual([
    ...[0x454c4153, 1, 4, 4, 1, 1],
    ...[1, 9, 0, 4, 0, 6, 1, 7],
    ...[2, 0, 2, 0, 1, -1, -1],
    ...[1, 1, 2, 2, 1, -1, -1],
    ...[2, 3, 1, 3, -1, -1, -1],
    ...[3, 0, 2, 3, 2, -1, -1],
    ...[0, 0, 6, 2, 1, 0, 0, 1, -1, 2, -1, -1, 3, -1],
  ]);
  expect([...lowered.attrs]).toEqual([4]);
  expect(lowered).toMatchObject({ opNames: ['linear'], tensors: [w], feeds: [x, rows], tags: ['L0'] });
  expect(lowered.outputs).toEqual([{ name: 'y', position: 0 }]);
  expect(lowered.dims).toEqual([n, null, null, r]);
});

describe('what is left out', () => {
  test('steps that reach nothing, and their feeds and dims', () => {
    const g = new Graph();
    const [x, unused] = [g.feed('x', 'f32', [3]), g.feed('unused', 'f32', [g.dim('N', 5)])];
    scale(unused, 2);
    g.output('y', scale(x, 3));
    const lowered = lower(g);
    expect(decode(lowered).steps).toHaveLength(1);
    expect(lowered.feeds).toEqual([x]);
    expect(lowered.dims.filter(Boolean)).toEqual([]);
  });

  test('optional outputs that nobody reads', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [3, 4]);
    const y = rmsNorm(x, g.weight(fakeTensor('f32', [4], false)), { eps: 1e-5 });
    g.output('y', y);
    expect(decode(lower(g)).steps[0].out).toEqual([2, -1]);
    g.output('rstd', y.step!.outputs[1] as Node);
    expect(decode(lower(g)).steps[0].out).toEqual([2, 3]);
  });

  test('not what has an effect', () => {
    const g = new Graph();
    const sums = g.state(fakeTensor('f32', [8], true));
    accumulate(sums, scale(g.feed('x', 'f32', [4]), 2), 0);
    accumulate(sums, scale(g.feed('x', 'f32', [4]), 3), 4);
    expect(decode(lower(g)).steps.map((step) => [step.op, ...step.attrs])).toEqual([
      ['scale', 2],
      ['accumulate', 0, 4],
      ['scale', 3],
      ['accumulate', 4, 4],
    ]);
  });

  test('a graph of nothing is an error', () => {
    const g = new Graph();
    scale(g.feed('x', 'f32', [4]), 2);
    expect(() => lower(g)).toThrow('[compile] the graph has no outputs and no effects');
  });
});

describe('what is shared', () => {
  test('stopGradient is its operand, and what equals another step is run once', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [3, 1]);
    const rows = g.feed('rows', 'i32', [1]);
    g.output('a', activation(x, 'silu'));
    g.output('loss', topkBce(activation(stopGradient(x), 'silu'), rows));
    const { steps } = decode(lower(g));
    expect(steps.map((step) => step.op)).toEqual(['activation', 'topk_bce']);
    expect(steps[1].in[0]).toBe(steps[0].out[0]);
  });

  test('one node under two names is one output tensor', () => {
    const g = new Graph();
    const y = scale(g.feed('x', 'f32', [3]), 2);
    g.output('a', y);
    g.output('b', y);
    expect(lower(g).outputs).toEqual([
      { name: 'a', position: 0 },
      { name: 'b', position: 0 },
    ]);
  });

  test('constants are bound tensors', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [2]);
    g.output('y', dot(x, g.constant([3, 4], [2])));
    expect(lower(g).tensors).toEqual([{ values: Float32Array.of(3, 4), shape: [2] }]);
  });
});

test('outputs are numbered by their tensors, not by their names', () => {
  const g = new Graph();
  const x = g.feed('x', 'f32', [3]);
  const [a, b] = [scale(x, 2), scale(x, 3)];
  g.output('b', b);
  g.output('a', a);
  expect(lower(g).outputs).toEqual([
    { name: 'b', position: 1 },
    { name: 'a', position: 0 },
  ]);
});

test('a produced dim keeps the step that produces it', () => {
  const g = new Graph();
  const [z, offsets] = [g.feed('z', 'f32', [9, 1]), g.feed('o', 'i32', [2])];
  const { rows } = routeThreshold(z, offsets, g.feed('t', 'f32', [1]));
  const [r] = rows.shape;
  g.output('y', add(zeros(g, [r, 3]), zeros(g, [r, 3])));
  const { dims, steps } = decode(lower(g));
  expect(steps.map((step) => step.op)).toEqual(['route_threshold', 'zeros', 'add']);
  expect(dims).toContainEqual([2, 9]);
});

test('operands come before what reads them', () => {
  const g = new Graph();
  const x = g.feed('x', 'f32', [9, 4]);
  const rows = g.feed('rows', 'i32', [3]);
  let y = x;
  for (let i = 1; i < 20; ++i) y = scatterAdd(y, gatherRows(scale(y, i + 1), rows), rows);
  g.output('y', y);
  const { steps, tensors } = decode(lower(g));
  const ready = new Set(tensors.flatMap(([kind], i) => (kind === 1 || kind === 2 ? [i] : [])));
  for (const step of steps) {
    for (const operand of step.in) expect(operand < 0 || ready.has(operand)).toBe(true);
    for (const result of step.out) ready.add(result);
  }
});
