// Seeded random numbers (xoshiro128**), so that every machine benchmarks the same weights and tokens.

export function generator(seed) {
  const state = new Uint32Array(4);
  let mix = seed >>> 0;
  for (let i = 0; i < 4; i++) {
    mix = (mix + 0x9e3779b9) >>> 0;
    let z = Math.imul(mix ^ (mix >>> 16), 0x85ebca6b);
    z = Math.imul(z ^ (z >>> 13), 0xc2b2ae35);
    state[i] = z ^ (z >>> 16);
  }
  let [a, b, c, d] = state;
  /** Uniform in [0, 2^32). */
  return () => {
    const scrambled = Math.imul(b, 5);
    const result = Math.imul((scrambled << 7) | (scrambled >>> 25), 9) >>> 0;
    const shifted = b << 9;
    c ^= a;
    d ^= b;
    b ^= c;
    a ^= d;
    c ^= shifted;
    d = (d << 11) | (d >>> 21);
    return result;
  };
}

/** Fills `out` with values uniform in `center` +- `spread`. */
export function fill(out, next, center, spread) {
  const factor = (2 * spread) / 4294967296;
  const low = center - spread;
  for (let i = 0; i < out.length; i++) out[i] = low + factor * next();
}

/** `count` token ids below `vocab`. */
export function tokens(count, vocab, seed) {
  const next = generator(seed);
  return Int32Array.from({ length: count }, () => next() % vocab);
}
