// A counter-based random generator: number `index` of stream `seed` is the same on every machine, in any order.

/** Largest seed, exclusive. */
export const seedLimit = 2 ** 32;

/**
 * Philox-2x32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): two 32-bit words
 * from a 64-bit counter and a 32-bit key.
 */
export function philox(low: number, high: number, key: number): [number, number] {
  let c0 = low >>> 0;
  let c1 = high >>> 0;
  let k = key >>> 0;
  for (let round = 0; round < 10; round++) {
    const product = Math.imul(c0, 0xd256d193) >>> 0;
    const carry = mulHigh(c0, 0xd256d193);
    c0 = (carry ^ k ^ c1) >>> 0;
    c1 = product;
    k = (k + 0x9e3779b9) >>> 0;
  }
  return [c0, c1];
}

/** In [0, 1), a multiple of 2^-24: exact in f32 and never rounded to 1. */
export function uniform(seed: number, index: number, stream = 0): number {
  return (philox(index, stream, seed)[0] >>> 8) / 2 ** 24;
}

/** An integer in [0, limit), limit <= 2^21; the bias is below 2^-32. */
export function integer(seed: number, index: number, stream: number, limit: number): number {
  const [a, b] = philox(index, stream, seed);
  return Math.floor((((a >>> 0) * 2 ** 21 + (b >>> 11)) / 2 ** 53) * limit);
}

function mulHigh(a: number, b: number): number {
  const aLow = a & 0xffff;
  const aHigh = a >>> 16;
  const bLow = b & 0xffff;
  const bHigh = b >>> 16;
  const middle = aHigh * bLow + ((aLow * bLow) >>> 16);
  const cross = aLow * bHigh + (middle & 0xffff);
  // every partial sum stays below 2^33, so doubles hold them exactly
  return (aHigh * bHigh + Math.floor(middle / 65536) + Math.floor(cross / 65536)) >>> 0;
}
