// Adds up what the kernels counted and reports it against the full model.
import { layerOfDim, sharedWidth } from '../elastic/nested.js';
import type { RunResult } from '../graph/index.js';
import type { Place } from '../model/select.js';
import type { ModelSpec } from '../model/spec.js';
import { InvalidDataError } from '../native/errors.js';

/** Of the tags that kernels count under, which sub-layer they are of, and of how many experts; null: of none. */
const subLayers = new Map<string, { layer: number; place: Place; experts: number } | null>();

function subLayerOf(tag: string) {
  let known = subLayers.get(tag);
  if (known === undefined) {
    const [, layer, place, experts = 1] = /^L(\d+)\.(attn|mlp)(?:\/(\d+))?$/.exec(tag) ?? [];
    known = place ? { layer: Number(layer), place: place as Place, experts: Number(experts) } : null;
    subLayers.set(tag, known);
  }
  return known;
}

/** Counters of several runs of one model. */
export class ComputeMeter {
  flops = 0;
  /** Rows that went through the model. */
  rows = 0;
  readonly #entered: Record<Place, Float64Array>;

  readonly #ffn: number;

  constructor({ layers, ffn }: Pick<ModelSpec, 'layers' | 'ffn'>) {
    this.#ffn = ffn;
    this.#entered = { attn: new Float64Array(layers), mlp: new Float64Array(layers) };
  }

  /** Adds a run over `rows` rows. Steps under a tag in `except` are left out of the FLOPs. */
  add({ counters, dims }: Pick<RunResult, 'counters' | 'dims'>, rows: number, except: readonly string[] = []): void {
    this.rows += rows;
    const units = new Map(Object.entries(dims).map(([name, size]) => [layerOfDim(name), size / this.#ffn]));
    for (const [tag, counter] of Object.entries(counters)) {
      if (!except.includes(tag)) this.flops += counter.flops;
      // A row counts once for every expert that it uses, of as many as the tag says, and for the share of units that run.
      const found = subLayerOf(tag);
      if (!found) continue;
      const { layer, place, experts } = found;
      const share = place === 'mlp' ? (units.get(layer) ?? (dims[sharedWidth] ?? this.#ffn) / this.#ffn) : 1;
      this.#entered[place][layer] += (share * counter.rows) / experts;
    }
  }

  /** Mean share of rows that entered each sub-layer, times the share of its experts or units that they used. */
  layersRun(): { attn: Float32Array; mlp: Float32Array } {
    const share = (entered: Float64Array): Float32Array =>
      Float32Array.from(entered, (n) => (this.rows > 0 ? n / this.rows : 0));
    return { attn: share(this.#entered.attn), mlp: share(this.#entered.mlp) };
  }
}

/** Throws InvalidDataError for NaN, which comes from the weights: no other input of the calls is a float. */
export function requireNumbers(api: string, values: Float32Array): void {
  if (values.includes(Number.NaN))
    throw new InvalidDataError(`[${api}] the model computes NaN: its weights are damaged`);
}
