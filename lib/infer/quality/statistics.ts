// Means over sequences with bootstrap intervals.
import { integer } from '../random.js';

/** A measured value with its 95 % interval. */
export interface Measured {
  value: number;
  low: number;
  high: number;
}

const resamples = 1000;
/** Sequences are drawn from this stream of the seed, so that every method is resampled alike (paired intervals). */
const bootstrapStream = 0xb007;

/** Sums over one sequence, by name. */
export type Sums = Readonly<Record<string, number>>;

/**
 * The value of `statistic` over the sum of all sequences, and the 2.5 % and 97.5 % points of its distribution when
 * whole sequences are drawn with replacement (percentile bootstrap): tokens of one text are not independent.
 */
export function bootstrap(sequences: readonly Sums[], statistic: (total: Sums) => number, seed: number): Measured {
  const names = Object.keys(sequences[0] ?? {});
  const total = (pick: (i: number) => number): number => {
    const sums: Record<string, number> = {};
    for (const name of names) sums[name] = 0;
    for (let i = 0; i < sequences.length; i++) {
      const sequence = sequences[pick(i)];
      for (const name of names) sums[name] += sequence[name];
    }
    return statistic(sums);
  };
  const values = Float64Array.from({ length: resamples }, (_, r) =>
    total((i) => integer(seed, r * sequences.length + i, bootstrapStream, sequences.length)),
  ).sort();
  return {
    value: total((i) => i),
    low: values[Math.floor(resamples * 0.025)],
    high: values[Math.ceil(resamples * 0.975) - 1],
  };
}

/** A share of n draws with its 95 % Wilson interval, which is right for shares near 1, too. */
export function shareOf(hits: number, n: number): Measured {
  const z = 1.959964;
  const value = hits / n;
  const [center, spread] = [value + z ** 2 / (2 * n), z * Math.sqrt((value * (1 - value)) / n + (z / (2 * n)) ** 2)];
  const scale = 1 + z ** 2 / n;
  return { value, low: Math.max(0, (center - spread) / scale), high: Math.min(1, (center + spread) / scale) };
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
