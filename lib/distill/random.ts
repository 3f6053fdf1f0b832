// Randomness of training: every draw follows from (seed, purpose, counter), so a resumed run needs no generator state.
import { createHash } from 'node:crypto';
import { philox } from '../infer/random.js';

/** A generator for one purpose at one point of a run: a stream of Philox numbers. */
export class Random {
  private readonly key: number;
  private readonly stream: number;
  private drawn = 0;

  constructor(seed: number, purpose: string, counter = 0) {
    const digest = createHash('sha256').update(`${seed}/${purpose}/${counter}`).digest();
    this.key = digest.readUInt32LE(0);
    this.stream = digest.readUInt32LE(4);
  }

  /** Uniform in [0, 1). */
  uniform(): number {
    return philox(this.drawn++, this.stream, this.key)[0] / 2 ** 32;
  }

  /** Uniform integer in [0, n). */
  below(n: number): number {
    return Math.floor(this.uniform() * n);
  }

  /** Standard normal (Box-Muller, one of the pair). */
  normal(): number {
    const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()));
    return radius * Math.cos(2 * Math.PI * this.uniform());
  }

  /** A permutation of 0..n-1 (Fisher-Yates). */
  permutation(n: number): Uint32Array {
    const order = new Uint32Array(n);
    for (let i = 0; i < n; i++) {
      const j = this.below(i + 1);
      order[i] = order[j];
      order[j] = i;
    }
    return order;
  }
}
