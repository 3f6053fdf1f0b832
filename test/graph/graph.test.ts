// Nodes, dims, common subexpressions, tags and checkpoints of a graph; no addon.
import { describe, expect, test } from 'vitest';
import { Graph } from '../../lib/graph/graph.js';
import {
  accumulate,
  activation,
  add,
  gate,
  gatherRows,
  linear,
  routeTopk,
  scale,
  stopGradient,
  zeros,
} from '../../lib/graph/index.js';
import { fakeTensor } from '../ops/harness.js';

describe('dims and leaves', () => {
  test('a dim is its name and bound', () => {
    const g = new Graph();
    const rows = g.dim('rows', 10);
    expect(g.dim('rows', 10)).toBe(rows);
    expect(() => g.dim('rows', 11)).toThrow('[dim] rows has the bound 10, got 11');
    for (const bound of [0, -1, 1.5, Number.NaN, 2 ** 31])
      expect(() => g.dim('n', bound)).toThrow('[dim] the bound of n');
  });

  test('a feed is its name, dtype and shape', () => {
    const g = new Graph();
    const rows = g.dim('rows', 10);
    const x = g.feed('x', 'f32', [rows, 3]);
    expect(g.feed('x', 'f32', [rows, 3])).toBe(x);
    expect(() => g.feed('x', 'i32', [rows, 3])).toThrow('[feed] x is f32[rows<=10,3], got i32[rows<=10,3]');
    expect(() => g.feed('y', 'f32', [])).toThrow('rank');
    expect(() => g.feed('y', 'f32', [new Graph().dim('rows', 10)])).toThrow('no dim of this graph');
  });

  test('a tensor is one node, as a weight or as state', () => {
    const g = new Graph();
    const tensor = fakeTensor('f32', [2, 3], true);
    expect(g.state(tensor)).toBe(g.state(tensor));
    expect(() => g.weight(tensor)).toThrow('already bound as state');
    expect(() => g.state(fakeTensor('f32', [2], false), 'w')).toThrow('[state] w is read-only');
  });

  test('nodes of two graphs do not mix', () => {
    const [a, b] = [new Graph(), new Graph()];
    expect(() => add(a.feed('x', 'f32', [2]), b.feed('x', 'f32', [2]))).toThrow(
      '[add] operand x belongs to another graph',
    );
  });

  test('an output is computed by an op, once per name', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [2]);
    expect(() => g.output('y', x)).toThrow('[output] y is not computed by an op');
    g.output('y', add(x, x));
    expect(() => g.output('y', add(x, x))).toThrow('[output] y is already an output');
  });
});

describe('common subexpressions', () => {
  test('equal pure steps are one', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [2, 3]);
    expect(activation(x, 'silu')).toBe(activation(x, 'silu'));
    expect(activation(x, 'silu')).not.toBe(activation(x, 'relu'));
    expect(scale(x, 2)).not.toBe(scale(x, 3));
    expect(zeros(g, [2, 3])).toBe(zeros(g, [2, 3]));
    expect(zeros(g, [2, 3])).not.toBe(zeros(g, [3, 2]));
    expect(g.constant([1, 2], [2])).toBe(g.constant([1, 2], [2]));
  });

  test('routing the same scores twice gives the same rows and the same dim', () => {
    const g = new Graph();
    const [z, offsets, c] = [g.feed('z', 'f32', [9, 1]), g.feed('o', 'i32', [2]), g.feed('c', 'f32', [1])];
    const [a, b] = [routeTopk(z, offsets, c), routeTopk(z, offsets, c)];
    expect(a.rows).toBe(b.rows);
    const other = g.tag('L1', () => routeTopk(z, offsets, g.feed('c2', 'f32', [1])));
    expect([a.rows.shape[0], other.rows.shape[0]]).toMatchObject([
      { kind: 'produced', name: 'rows', bound: 9 },
      { kind: 'produced', name: 'L1.rows', bound: 9 },
    ]);
    expect(() => add(gate(z, a.rows, 1), gate(z, other.rows, 1))).toThrow('[add] operands must have one shape');
  });

  test('effects are never merged, and separate what reads state', () => {
    const g = new Graph();
    const state = g.state(fakeTensor('f32', [6], true));
    const x = g.feed('x', 'f32', [6]);
    const before = add(state, x);
    const plain = add(x, x);
    accumulate(state, x, 0);
    accumulate(state, x, 0);
    expect(g.steps.filter((step) => step.op === 'accumulate')).toHaveLength(2);
    expect(add(state, x)).not.toBe(before);
    expect(add(x, x)).toBe(plain);
  });

  test('stopGradient shares the value but not the gradient', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [2, 3]);
    const [direct, stopped] = [activation(x, 'silu'), activation(stopGradient(x), 'silu')];
    expect(stopped).not.toBe(direct);
    expect(g.resolve(stopped)).toBe(direct);
    expect(stopGradient(x)).toBe(stopGradient(x));
  });

  test('scale folds constants', () => {
    const g = new Graph();
    const [x, s] = [g.feed('x', 'f32', [1]), g.constant([3], [1])];
    expect(scale(x, 1)).toBe(x);
    expect(scale(x, 2, s)).toBe(scale(x, 6));
    expect(scale(s, 2)).toBe(g.constant([6], [1]));
    expect(scale(s, 2, x)).toBe(scale(x, 6));
  });
});

describe('tags and checkpoints', () => {
  test('the innermost tag counts, and ends with its call', () => {
    const g = new Graph();
    const x = g.feed('x', 'f32', [2, 2]);
    g.tag('outer', () => {
      scale(x, 2);
      g.tag('inner', () => scale(x, 3));
      scale(x, 4);
    });
    scale(x, 5);
    expect(g.steps.map((step) => step.tag)).toEqual(['outer', 'inner', 'outer', '']);
    expect(() =>
      g.tag('failing', () => {
        throw new Error('x');
      }),
    ).toThrow();
    expect(g.currentTag).toBe('');
  });

  test('a checkpoint marks its steps; effects have no place in it', () => {
    const g = new Graph();
    const state = g.state(fakeTensor('f32', [6], true));
    const x = g.feed('x', 'f32', [6]);
    const y = g.checkpoint(() => scale(scale(x, 2), 3));
    expect(g.steps.every((step) => step.checkpoint?.result === y)).toBe(true);
    const effect = () =>
      g.checkpoint(() => {
        accumulate(state, x, 0);
        return x;
      });
    expect(effect).toThrow('[accumulate] writes state and so cannot be recomputed');
    expect(scale(x, 9).step?.checkpoint).toBe(null);
  });
});

describe('shape rules', () => {
  test('rows decide the rows of the result', () => {
    const g = new Graph();
    const [n, r] = [g.dim('N', 9), g.dim('R', 9)];
    const x = g.feed('x', 'f32', [n, 4]);
    const w = g.weight(fakeTensor('bf16', [6, 8], false));
    const rows = g.feed('rows', 'i32', [r]);
    expect(linear(x, w).shape).toEqual([n, 6]);
    expect(linear(x, w, { rows, width: 3 }).shape).toEqual([r, 3]);
    expect(gatherRows(x, rows).shape).toEqual([r, 4]);
    expect(() => linear(x, w, { width: 7 })).toThrow('[linear] N is 7 in the options, more than w:bf16[6,8] has');
    expect(() => linear(x, g.feed('i', 'i32', [6, 8]))).toThrow('[linear] w must be f32, bf16 or f16, got w:i32[6,8]');
    expect(() => scale(x, Number.NaN)).toThrow('[scale] factor must be a finite number, got NaN');
  });
});
