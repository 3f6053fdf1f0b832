// Slim encoders (COST-EFF, arXiv 2210.15523, section 3.1): heads and units that are kept, embeddings of a lower rank, and the way back.
import { editJson } from '../io/files.js';
import { encoderSpecFromConfig, type Slim, slimKey, slimToJson } from './encoder_spec.js';
import { encoderSlots } from './encoder_weights.js';
import { type EncoderSpec, layerOf } from './spec.js';
import { planOf } from './weights.js';

/** An encoder as its config.json has it, and its weights, `[planOf(encoderSlots(spec)).size]`. */
export interface FlatEncoder {
  readonly spec: EncoderSpec;
  readonly config: string;
  readonly weights: Float32Array;
}

/** What is kept of every layer: ids of heads and of units, ascending. */
export interface Kept {
  readonly heads: readonly (readonly number[])[];
  readonly units: readonly (readonly number[])[];
}

/** The weights of an encoder by name. */
export function weightsOf({ spec, weights }: Pick<FlatEncoder, 'spec' | 'weights'>): Map<string, Float32Array> {
  const { parameters } = planOf(encoderSlots(spec));
  return new Map(parameters.map(({ name, offset, size }) => [name, weights.subarray(offset, offset + size)]));
}

/** What an encoder is now. */
export const slimOf = (spec: EncoderSpec): Slim => ({
  heads: spec.perLayer.map(({ heads }) => heads ?? spec.heads),
  ffn: spec.perLayer.map(({ ffn }) => ffn),
  rank: spec.encoder.embeddingRank,
});

function withSlim(config: string, slim: Slim | null): { spec: EncoderSpec; config: string } {
  const text = editJson(config, (json) => {
    const { [slimKey]: _, ...rest } = json;
    return slim ? { ...rest, [slimKey]: slimToJson(slim) } : rest;
  });
  return { spec: encoderSpecFromConfig(JSON.parse(text), 'config.json'), config: text };
}

/** An encoder of another specification with weights made by name. */
function rebuilt(
  config: string,
  slim: Slim | null,
  make: (name: string, shape: readonly number[]) => Float32Array,
): FlatEncoder {
  const next = withSlim(config, slim);
  const plan = planOf(encoderSlots(next.spec));
  const weights = new Float32Array(plan.size);
  for (const { name, offset, shape } of plan.parameters) weights.set(make(name, shape), offset);
  return { ...next, weights };
}

const layerPart = /^layers\.(\d+)\.(q|k|v|o|up|down)\.(weight|bias)$/;

/** Heads and units of each layer gathered from it, in the order of their ids; nothing else changes. */
export function keepParts(model: FlatEncoder, { heads, units }: Kept): FlatEncoder {
  const { spec, config } = model;
  const from = weightsOf(model);
  const slim: Slim = {
    heads: heads.map(({ length }) => length),
    ffn: units.map(({ length }) => length),
    rank: spec.encoder.embeddingRank,
  };
  return rebuilt(config, slim, (name) => {
    const values = from.get(name)!;
    const [, layer, part, kind] = layerPart.exec(name) ?? [];
    if (layer === undefined || (kind === 'bias' && (part === 'o' || part === 'down'))) return values;
    const feedForward = part === 'up' || part === 'down';
    const width = feedForward ? 1 : spec.headDim;
    const kept = (feedForward ? units : heads)[Number(layer)].flatMap((id) =>
      Array.from({ length: width }, (_, i) => id * width + i),
    );
    const columns = part === 'o' || part === 'down' ? values.length / spec.hidden : 0;
    return columns > 0
      ? gatherColumns(values, columns, kept)
      : gatherRows(values, kind === 'bias' ? 1 : spec.hidden, kept);
  });
}

function gatherRows(values: Float32Array, width: number, rows: readonly number[]): Float32Array {
  const out = new Float32Array(rows.length * width);
  for (const [r, row] of rows.entries()) out.set(values.subarray(row * width, (row + 1) * width), r * width);
  return out;
}

function gatherColumns(values: Float32Array, width: number, columns: readonly number[]): Float32Array {
  const rows = values.length / width;
  const out = new Float32Array(rows * columns.length);
  for (let r = 0; r < rows; r++) {
    for (const [c, column] of columns.entries()) out[r * columns.length + c] = values[r * width + column];
  }
  return out;
}

/**
 * Embeddings of a lower rank: of the matrix E [vocab, hidden] that stands for them, `E V` [vocab, rank] and V [hidden, rank], V being the
 * eigenvectors of E^T E with the largest eigenvalues. That is the truncated singular value decomposition: no other product of this
 * rank is nearer to E.
 */
export function withEmbeddingRank(model: FlatEncoder, rank: number): FlatEncoder {
  const { spec, config } = model;
  const { hidden, vocab } = spec;
  const from = weightsOf(model);
  const whole = wholeEmbeddings(model);
  const v = topEigenvectors(gram(whole, vocab, hidden), hidden, rank);
  const low = new Float32Array(vocab * rank);
  const row = new Float64Array(rank);
  for (let t = 0; t < vocab; t++) {
    row.fill(0);
    for (let d = 0; d < hidden; d++) {
      const value = whole[t * hidden + d];
      for (let r = 0; r < rank; r++) row[r] += value * v[d * rank + r];
    }
    low.set(row, t * rank);
  }
  const made = new Map([...from, ['embed', low], ['embedUp.weight', Float32Array.from(v)]]);
  return rebuilt(config, { ...slimOf(spec), rank }, (name) => made.get(name)!);
}

/** E [vocab, hidden], multiplied out where it is a product. */
function wholeEmbeddings(model: FlatEncoder): Float32Array {
  const { hidden, vocab, encoder } = model.spec;
  const weights = weightsOf(model);
  const stored = weights.get('embed')!;
  const { embeddingRank: rank } = encoder;
  if (rank === null) return stored;
  const up = weights.get('embedUp.weight')!;
  const whole = new Float32Array(vocab * hidden);
  for (let t = 0; t < vocab; t++) {
    for (let d = 0; d < hidden; d++) {
      let sum = 0;
      for (let r = 0; r < rank; r++) sum += stored[t * rank + r] * up[d * rank + r];
      whole[t * hidden + d] = sum;
    }
  }
  return whole;
}

/** `E^T E` of E [rows, d]: f64 [d, d]. */
function gram(e: Float32Array, rows: number, d: number): Float64Array {
  const g = new Float64Array(d * d);
  for (let r = 0; r < rows; r++) {
    const row = e.subarray(r * d, (r + 1) * d);
    for (let i = 0; i < d; i++) {
      const value = row[i];
      for (let j = i; j < d; j++) g[i * d + j] += value * row[j];
    }
  }
  for (let i = 0; i < d; i++) for (let j = 0; j < i; j++) g[i * d + j] = g[j * d + i];
  return g;
}

/** The eigenvectors of a symmetric matrix [d, d] with the largest eigenvalues, as columns: [d, count] (cyclic Jacobi rotations). */
function topEigenvectors(matrix: Float64Array, d: number, count: number): Float64Array {
  const a = matrix.slice();
  // Rows are the eigenvectors: rotations then go through memory in order.
  const v = new Float64Array(d * d);
  for (let i = 0; i < d; i++) v[i * d + i] = 1;
  const rotate = (m: Float64Array, p: number, q: number, c: number, s: number): void => {
    for (let k = 0; k < d; k++) {
      const [x, y] = [m[p * d + k], m[q * d + k]];
      m[p * d + k] = c * x - s * y;
      m[q * d + k] = s * x + c * y;
    }
  };
  const total = a.reduce((sum, x) => sum + x * x, 0);
  for (let sweep = 0; sweep < 40; sweep++) {
    let off = 0;
    for (let p = 0; p < d; p++) for (let q = p + 1; q < d; q++) off += a[p * d + q] ** 2;
    if (off <= 1e-22 * total) break;
    for (let p = 0; p < d; p++) {
      for (let q = p + 1; q < d; q++) {
        const x = a[p * d + q];
        if (x === 0) continue;
        const theta = (a[q * d + q] - a[p * d + p]) / (2 * x);
        const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1));
        const c = 1 / Math.sqrt(t * t + 1);
        const s = t * c;
        rotate(a, p, q, c, s);
        for (let k = 0; k < d; k++) {
          const [left, right] = [a[k * d + p], a[k * d + q]];
          a[k * d + p] = c * left - s * right;
          a[k * d + q] = s * left + c * right;
        }
        rotate(v, p, q, c, s);
      }
    }
  }
  const order = Array.from({ length: d }, (_, i) => i).sort((i, j) => a[j * d + j] - a[i * d + i]);
  const out = new Float64Array(d * count);
  for (let r = 0; r < count; r++) for (let k = 0; k < d; k++) out[k * count + r] = v[order[r] * d + k];
  return out;
}

/**
 * The same function as a stock checkpoint: embeddings multiplied out, units up to the widest layer's number, and all the heads that the
 * format knows, those that are gone being zeros.
 */
export function stockEncoder(model: FlatEncoder): FlatEncoder {
  const { spec } = model;
  const from = weightsOf(model);
  const widest = Math.max(...slimOf(spec).ffn);
  const field = spec.family === 'distilbert' ? 'hidden_dim' : 'intermediate_size';
  const config = editJson(model.config, (json) => ({ ...json, [field]: widest }));
  const whole = wholeEmbeddings(model);
  return rebuilt(config, null, (name, shape) => {
    if (name === 'embed') return whole;
    const values = from.get(name)!;
    const [, layer, part] = layerPart.exec(name) ?? [];
    if (layer === undefined) return values;
    const { heads, headDim, ffn } = layerOf(spec, Number(layer));
    const out = new Float32Array(shape.reduce((a, b) => a * b, 1));
    const inputs = part === 'down' ? ffn : part === 'o' ? heads * headDim : 0;
    // Rows that are gone come last; columns that are gone, last in every row.
    if (inputs === 0 || shape.length === 1) out.set(values);
    else for (let r = 0; r < shape[0]; r++) out.set(values.subarray(r * inputs, (r + 1) * inputs), r * shape[1]);
    return out;
  });
}
