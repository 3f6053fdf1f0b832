// Bootstrap intervals cover what they should and are reproducible.
import { expect, test } from 'vitest';
import { bootstrap, median } from '../../lib/infer/quality/statistics.js';
import { uniform } from '../../lib/infer/random.js';

const mean = (t: Readonly<Record<string, number>>): number => t.sum / t.n;

test('interval of a mean has the width theory gives and covers the truth about 95 % of the time', () => {
  const n = 200;
  let covered = 0;
  let width = 0;
  const trials = 60;
  for (let trial = 0; trial < trials; trial++) {
    const data = Array.from({ length: n }, (_, i) => ({ sum: uniform(trial, i), n: 1 }));
    const m = bootstrap(data, mean, trial);
    if (m.low <= 0.5 && m.high >= 0.5) covered++;
    width += (m.high - m.low) / trials;
  }
  // 2 x 1.96 x sqrt(1/12) / sqrt(200) = 0.080
  expect(width).toBeGreaterThan(0.072);
  expect(width).toBeLessThan(0.088);
  expect(covered).toBeGreaterThanOrEqual(52);
});

test('same seed, same interval; one sequence, no width', () => {
  const data = [1, 2, 3, 4].map((sum) => ({ sum, n: 2 }));
  expect(bootstrap(data, mean, 5)).toEqual(bootstrap(data, mean, 5));
  expect(bootstrap([{ sum: 3, n: 2 }], mean, 0)).toEqual({ value: 1.5, low: 1.5, high: 1.5 });
});

test('median', () => {
  expect(median([3, 1, 2])).toBe(2);
  expect(median([4, 1, 2, 3])).toBe(2.5);
});
