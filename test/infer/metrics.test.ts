// Metrics of classes and numbers, against values worked out by hand, and those that scikit-learn and SciPy document.
import { describe, expect, it } from 'vitest';
import { accuracy, confusion, f1, matthews, pearson } from '../../lib/infer/quality/metrics.js';

describe('of two classes', () => {
  // 3 true positives, 1 false negative, 2 false positives, 4 true negatives.
  const counts = confusion([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0, 0, 0], 2);

  it('has its counts', () => {
    expect(counts).toEqual([
      [4, 2],
      [1, 3],
    ]);
  });
  it('has accuracy 7/10, F1 of the second class 6/9, Matthews (3 4 - 2 1) / sqrt(5 4 6 5)', () => {
    expect(accuracy(counts)).toBeCloseTo(0.7, 12);
    expect(f1(counts)).toBeCloseTo(6 / 9, 12);
    expect(matthews(counts)).toBeCloseTo(10 / Math.sqrt(600), 12);
  });
  it('has the coefficient in the documentation of scikit-learn', () => {
    // matthews_corrcoef([+1, +1, +1, -1], [+1, -1, +1, +1])
    expect(matthews(confusion([1, 1, 1, 0], [1, 0, 1, 1], 2))).toBeCloseTo(-0.3333333, 6);
  });
});

describe('of three classes', () => {
  // f1_score([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], average='macro') is 0.26666... in the documentation of scikit-learn.
  const counts = confusion([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], 3);

  it('has the macro F1 of scikit-learn', () => {
    expect(f1(counts)).toBeCloseTo(0.8 / 3, 12);
    expect(accuracy(counts)).toBeCloseTo(2 / 6, 12);
  });
  it("has Gorodkin's coefficient", () => {
    // c = 2, s = 6, told [3, 2, 1], right [2, 2, 2]: (2 6 - 12) / ... = 0
    expect(matthews(counts)).toBe(0);
    // c = 4, s = 5, told [2, 1, 2], right [2, 2, 1]: (20 - 8) / sqrt((25 - 9) (25 - 9)) = 0.75
    expect(matthews(confusion([0, 0, 1, 1, 2], [0, 0, 1, 2, 2], 3))).toBeCloseTo(12 / 16, 12);
  });
});

it('a class that never is and was never told counts 0; all of one class have no correlation', () => {
  expect(f1(confusion([0, 0], [0, 0], 2))).toBe(0);
  expect(matthews(confusion([0, 1], [1, 1], 2))).toBe(0);
  expect(accuracy(confusion([], [], 2))).toBe(0);
});

it("has Pearson's correlation", () => {
  // pearsonr([1, 2, 3, 4, 5], [10, 9, 2.5, 6, 4]) in the documentation of SciPy.
  expect(pearson([1, 2, 3, 4, 5], [10, 9, 2.5, 6, 4])).toBeCloseTo(-0.7426106572325057, 12);
  expect(pearson([1, 2, 3], [2, 4, 6])).toBeCloseTo(1, 12);
  expect(pearson([1, 2, 3], [5, 5, 5])).toBe(0);
});
