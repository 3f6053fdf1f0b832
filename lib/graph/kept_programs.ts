// Compiled programs that are kept while they are in use.
import type { Program } from './program.js';

/** Programs by what they compute, compiled when first needed; the one unused for longest makes room. */
export class KeptPrograms {
  readonly #most: number;
  // In the order of use.
  readonly #programs = new Map<string, Program>();

  /** @param most programs kept at a time: on a device each holds memory for its longest run */
  constructor(most: number) {
    this.#most = most;
  }

  get(key: string, compile: () => Program): Program {
    const program = this.#programs.get(key) ?? compile();
    this.#programs.delete(key);
    this.#programs.set(key, program);
    if (this.#programs.size > this.#most) {
      const [oldest] = this.#programs.keys();
      // A run under way keeps what it needs.
      this.#programs.get(oldest)!.dispose();
      this.#programs.delete(oldest);
    }
    return program;
  }

  dispose(): void {
    for (const program of this.#programs.values()) program.dispose();
    this.#programs.clear();
  }
}
