// Adds up what the kernels counted and reports it against the full model.
import type { RunResult } from '../graph/index.js';
import type { Place } from '../model/select.js';

/** Counters of several runs of one model. */
export class ComputeMeter {
  flops = 0;
  /** Rows that went through the model. */
  rows = 0;
  readonly #entered: Record<Place, Float64Array>;

  constructor(layers: number) {
    this.#entered = { attn: new Float64Array(layers), mlp: new Float64Array(layers) };
  }

  /** Adds a run over `rows` rows. Steps under a tag in `except` are left out of the FLOPs. */
  add(result: Pick<RunResult, 'counters'>, rows: number, except: readonly string[] = []): void {
    this.rows += rows;
    for (const [tag, counter] of Object.entries(result.counters)) {
      if (!except.includes(tag)) this.flops += counter.flops;
      // A row counts once for every expert that it uses, of as many as the tag says.
      const found = /^L(\d+)\.(attn|mlp)(?:\/(\d+))?$/.exec(tag);
      if (!found) continue;
      const [, layer, place, experts = 1] = found;
      this.#entered[place as Place][Number(layer)] += counter.rows / Number(experts);
    }
  }

  /** Mean share of rows that entered each sub-layer, times the share of its experts that they used. */
  layersRun(): { attn: Float32Array; mlp: Float32Array } {
    const share = (entered: Float64Array): Float32Array =>
      Float32Array.from(entered, (n) => (this.rows > 0 ? n / this.rows : 0));
    return { attn: share(this.#entered.attn), mlp: share(this.#entered.mlp) };
  }
}
