// Quality of classes and of numbers told by a model: accuracy, F1, Matthews' correlation, Pearson's correlation.

/** How often class i was told to be class j: counts [C][C], rows being what is right. */
export function confusion(right: ArrayLike<number>, told: ArrayLike<number>, classes: number): number[][] {
  const counts = Array.from({ length: classes }, () => new Array<number>(classes).fill(0));
  for (let i = 0; i < right.length; i++) counts[right[i]][told[i]]++;
  return counts;
}

const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);
const toldOf = (counts: readonly (readonly number[])[], j: number): number => sum(counts.map((row) => row[j]));

/** The share that is right; of nothing 0. */
export function accuracy(counts: readonly (readonly number[])[]): number {
  const all = sum(counts.map(sum));
  return all > 0 ? sum(counts.map((row, i) => row[i])) / all : 0;
}

/**
 * F1, `2 true / (told + right)`: of two classes that of the second, of more the mean over classes (macro). A class that neither is
 * nor was told counts 0, as in scikit-learn.
 */
export function f1(counts: readonly (readonly number[])[]): number {
  const of = (i: number): number => {
    const both = toldOf(counts, i) + sum(counts[i]);
    return both > 0 ? (2 * counts[i][i]) / both : 0;
  };
  return counts.length === 2 ? of(1) : sum(counts.map((_, i) => of(i))) / counts.length;
}

/**
 * Matthews' correlation coefficient, from -1 to 1, of any number of classes (Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006):
 * `(c s - sum t p) / sqrt((s^2 - sum p^2)(s^2 - sum t^2))`, c right ones of s, t of each class right and p told. 0 where all are, or
 * were told to be, of one class.
 */
export function matthews(counts: readonly (readonly number[])[]): number {
  const right = counts.map(sum);
  const told = counts.map((_, j) => toldOf(counts, j));
  const all = sum(right);
  const hit = sum(counts.map((row, i) => row[i]));
  const spread = (of: readonly number[]): number => all * all - sum(of.map((n) => n * n));
  const scale = Math.sqrt(spread(right) * spread(told));
  return scale > 0 ? (hit * all - sum(right.map((n, i) => n * told[i]))) / scale : 0;
}

/** Pearson's correlation of two lists of numbers, from -1 to 1; 0 where one of them does not vary. */
export function pearson(a: ArrayLike<number>, b: ArrayLike<number>): number {
  const mean = (x: ArrayLike<number>): number => sum(Array.from(x)) / x.length;
  const [meanA, meanB] = [mean(a), mean(b)];
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    const [da, db] = [a[i] - meanA, b[i] - meanB];
    ab += da * db;
    aa += da * da;
    bb += db * db;
  }
  const scale = Math.sqrt(aa * bb);
  return scale > 0 ? ab / scale : 0;
}
