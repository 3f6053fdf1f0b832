// The generator matches its published test vectors and covers its range evenly.
import { expect, test } from 'vitest';
import { integer, philox, uniform } from '../../lib/infer/random.js';

test('philox 2x32-10 known answers', () => {
  expect(philox(0, 0, 0)).toEqual([0xff1dae59, 0x6cd10df2]);
  expect(philox(0xffffffff, 0xffffffff, 0xffffffff)).toEqual([0x2c3f628b, 0xab4fd7ad]);
  expect(philox(0x243f6a88, 0x85a308d3, 0x13198a2e)).toEqual([0xdd7ce038, 0xf62a4c12]);
});

test('uniform numbers fill [0, 1) evenly and are exact in f32', () => {
  const n = 20_000;
  let sum = 0;
  for (let i = 0; i < n; i++) {
    const u = uniform(7, i);
    expect(u).toBe(Math.fround(u));
    expect(u >= 0 && u < 1).toBe(true);
    sum += u;
  }
  // standard error of the mean: 1 / sqrt(12 n) = 0.002
  expect(Math.abs(sum / n - 0.5)).toBeLessThan(0.01);
});

test('integers stay below their limit and reach every value', () => {
  const seen = new Set<number>();
  for (let i = 0; i < 500; i++) seen.add(integer(3, i, 1, 7));
  expect([...seen].sort()).toEqual([0, 1, 2, 3, 4, 5, 6]);
});
