// Every op computed plainly in float64, by name: the reference that kernels and gradients are compared with.

/** A tensor of a reference run: row-major; integers are held as floats. */
export interface Value {
  readonly shape: readonly number[];
  readonly data: Float64Array;
}

export const f64 = (shape: readonly number[], data?: ArrayLike<number>): Value => ({
  shape,
  data: data ? Float64Array.from(data) : new Float64Array(shape.reduce((a, b) => a * b, 1)),
});

/** `sizes`: the shapes of the outputs; NaN for a size that the op produces. */
export type Reference = (
  inputs: (Value | null)[],
  attrs: readonly number[],
  sizes: readonly (readonly number[] | null)[],
) => (Value | null)[];

type Fn = (x: number) => number;

/** Of floats; no bucket of a divergence has less. */
const smallestNormal = 2 ** -126;

const sigmoid: Fn = (x) => 1 / (1 + Math.exp(-x));
const softplus: Fn = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

/** erf by the series with positive terms only. */
const erf: Fn = (x) => {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x;
  let sum = x;
  for (let n = 1; n < 300; ++n) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
};

const act: readonly Fn[] = [
  (x) => x,
  (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  (x) => x * sigmoid(x),
  (x) => Math.max(x, 0),
];

/** Calls with every row n of a segment s that counts, and what it weighs. */
function eachSegmentRow(
  offsets: Value,
  most: number,
  mean: number,
  of: (s: number, n: number, weight: number) => void,
): void {
  for (let s = 0; s + 1 < offsets.data.length; ++s) {
    const length = offsets.data[s + 1] - offsets.data[s];
    const counted = most > 0 ? Math.min(length, most) : length;
    for (let r = 0; r < counted; ++r) of(s, offsets.data[s] + r, mean === 1 ? 1 / counted : 1);
  }
}

const actGrad: readonly Fn[] = [
  () => 1,
  (x) => {
    const c = Math.sqrt(2 / Math.PI);
    const t = Math.tanh(c * (x + 0.044715 * x ** 3));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x);
  },
  (x) => 0.5 * (1 + erf(x / Math.SQRT2)) + (x * Math.exp((-x * x) / 2)) / Math.sqrt(2 * Math.PI),
  (x) => sigmoid(x) * (1 + x * (1 - sigmoid(x))),
  (x) => (x > 0 ? 1 : 0),
];

const map = (x: Value, fn: (value: number, i: number) => number): Value => ({ shape: x.shape, data: x.data.map(fn) });
/** `cap tanh(x / cap)`; x when cap is 0. */
const capped = (x: Value, cap: number): Value => (cap === 0 ? x : map(x, (v) => cap * Math.tanh(v / cap)));
/** The derivative of that by x, of the value z. */
const slopeOf = (z: number, cap: number): number => (cap === 0 ? 1 : 1 - (z / cap) ** 2);
const rowOf = (rows: Value | null, r: number): number => (rows ? rows.data[r] : r);
const count = (rows: Value | null, x: Value): number => (rows ? rows.data.length : x.shape[0]);

/** `y[m,n] = bias[n] + sum over k of x[rows[m],k] w[n,k]`, n below `width`, w possibly larger. */
function product(x: Value, w: Value, bias: Value | null, rows: Value | null, width: number): Value {
  const [m, k, stride] = [count(rows, x), x.shape[1], w.shape[1]];
  const y = f64([m, width]);
  for (let i = 0; i < m; ++i) {
    for (let n = 0; n < width; ++n) {
      let sum = bias ? bias.data[n] : 0;
      for (let j = 0; j < k; ++j) sum += x.data[rowOf(rows, i) * k + j] * w.data[n * stride + j];
      y.data[i * width + n] = sum;
    }
  }
  return y;
}

/** `y + u b^T`. */
const patched = (y: Value, u: Value | null, b: Value | null): Value => {
  if (!u || !b) return y;
  const low = product(u, b, null, null, y.shape[1]);
  return map(y, (v, i) => v + low.data[i]);
};

/** `dy w`, of which the first `width` columns. */
function transposed(dy: Value, w: Value, rows: Value | null, width: number): Value {
  const [m, n, stride] = [count(rows, dy), dy.shape[1], w.shape[1]];
  const dx = f64([m, width]);
  for (let i = 0; i < m; ++i) {
    for (let j = 0; j < n; ++j) {
      const d = dy.data[rowOf(rows, i) * n + j];
      for (let k = 0; k < width; ++k) dx.data[i * width + k] += d * w.data[j * stride + k];
    }
  }
  return dx;
}

/** Rows of x cut into `groups` parts, as rows of their own; rows of these that `rows` are. */
function grouped(x: Value, rows: Value | null, groups: number): [Value, Value | null] {
  const cut = { shape: [x.shape[0] * groups, x.shape[1] / groups], data: x.data };
  const parts = rows && Array.from(rows.data).flatMap((r) => Array.from({ length: groups }, (_, g) => r * groups + g));
  return [cut, parts && f64([parts.length], parts)];
}

function norm(x: Value, rows: Value | null, eps: number, centre: boolean) {
  const [m, d] = [count(rows, x), x.shape[1]];
  const mean = f64([m]);
  const rstd = f64([m]);
  for (let r = 0; r < m; ++r) {
    const row = x.data.subarray(rowOf(rows, r) * d, (rowOf(rows, r) + 1) * d);
    if (centre) mean.data[r] = row.reduce((a, b) => a + b, 0) / d;
    let square = 0;
    for (const value of row) square += (value - mean.data[r]) ** 2;
    rstd.data[r] = 1 / Math.sqrt(square / d + eps);
  }
  return { m, d, mean, rstd };
}

function normGrad(dy: Value, x: Value, weight: Value, mean: Value | null, rstd: Value, rows: Value | null) {
  const [m, d] = [count(rows, x), x.shape[1]];
  const dx = f64([m, d]);
  const dweight = f64([d]);
  const dbias = f64([d]);
  for (let r = 0; r < m; ++r) {
    const s = rstd.data[r];
    const hat = Array.from({ length: d }, (_, i) => (x.data[rowOf(rows, r) * d + i] - (mean ? mean.data[r] : 0)) * s);
    const g = hat.map((_, i) => dy.data[r * d + i] * weight.data[i]);
    const a = mean ? g.reduce((sum, v) => sum + v, 0) / d : 0;
    const b = g.reduce((sum, v, i) => sum + v * hat[i], 0) / d;
    for (let i = 0; i < d; ++i) {
      dx.data[r * d + i] = s * (g[i] - a - hat[i] * b);
      dweight.data[i] += dy.data[r * d + i] * hat[i];
      dbias.data[i] += dy.data[r * d + i];
    }
  }
  return { dx, dweight, dbias };
}

interface Heads {
  heads: number;
  kvHeads: number;
  dh: number;
}

const headsOf = (q: Value, heads: number, kvHeads: number): Heads => ({ heads, kvHeads, dh: q.shape[1] / heads });

/**
 * Probabilities of query row `i` of head `h` over key rows `from..to`, those before its window 0, their log-sum-exp, and the
 * derivatives of the capped scores.
 */
function scores(
  q: Value,
  k: Value,
  { heads, kvHeads, dh }: Heads,
  h: number,
  i: number,
  from: number,
  to: number,
  {
    scale,
    window,
    softcap,
    biasAt,
  }: { scale: number; window: number; softcap: number; biasAt?: (j: number) => number },
) {
  const kv = Math.floor(h / (heads / kvHeads));
  const s: number[] = [];
  for (let j = from; j < to; ++j) {
    let sum = 0;
    for (let d = 0; d < dh; ++d) sum += q.data[(i * heads + h) * dh + d] * k.data[(j * kvHeads + kv) * dh + d];
    const score = softcap > 0 ? softcap * Math.tanh((sum * scale) / softcap) : sum * scale + (biasAt?.(j) ?? 0);
    s.push(window > 0 && j < to - window ? Number.NEGATIVE_INFINITY : score);
  }
  const top = Math.max(...s);
  const lse = top + Math.log(s.reduce((sum, v) => sum + Math.exp(v - top), 0));
  const slope = s.map((v) => (softcap > 0 && Number.isFinite(v) ? 1 - (v / softcap) ** 2 : 1));
  return { kv, p: s.map((v) => Math.exp(v - lse)), lse, slope };
}

/** What is added to the score of a query of head `h` that stands at row `stand` and key row j. */
const biasOf = (bias: Value | null, h: number, stand: number) => (j: number) => {
  if (!bias) return 0;
  const reach = (bias.shape[1] - 1) / 2;
  return bias.data[h * bias.shape[1] + reach + Math.max(-reach, Math.min(reach, j - stand))];
};

function segments(offsets: Value): [number, number][] {
  return Array.from(offsets.data.slice(1), (end, s) => [offsets.data[s], end]);
}

/** Calls with the rows of every tile of a segment s in turn, and whether what is held is a decision of that tile. */
function eachTile(
  positions: Value,
  offsets: Value,
  held: Value | null,
  tile: number,
  of: (s: number, rows: number[], isHeld: boolean) => void,
): void {
  for (const [s, [from, to]] of segments(offsets).entries()) {
    const byTile = new Map<number, number[]>();
    for (let n = from; n < to; ++n) {
      const at = Math.floor(positions.data[n] / tile);
      byTile.set(at, [...(byTile.get(at) ?? []), n]);
    }
    const before = held ? held.data[s * held.shape[1] + held.shape[1] / 2 - 1] : -1;
    for (const [at, rows] of byTile) of(s, rows, before >= 0 && Math.floor(before / tile) === at);
  }
}

/** Per segment: its key rows `[from, to)` and its queries with the row each stands at. */
function queries(offsets: Value, rows: Value | null, rowOffsets: Value | null) {
  const parts = segments(rowOffsets ?? offsets);
  return segments(offsets).map(([from, to], s) => {
    const [first, last] = parts[s];
    const standing = Array.from({ length: last - first }, (_, i) => ({ i: first + i, row: rowOf(rows, first + i) }));
    return { from, to, standing };
  });
}

/** The row of the pools that is row `row` of a slot, pages having t rows. */
const poolRow = (pages: Value, t: number, slot: number, row: number): number =>
  pages.data[slot * pages.shape[1] + Math.floor(row / t)] * t + (row % t);

function logSoftmax(logits: ArrayLike<number>): number[] {
  const values = Array.from(logits);
  const top = Math.max(...values);
  const lse = top + Math.log(values.reduce((sum, v) => sum + Math.exp(v - top), 0));
  return values.map((v) => v - lse);
}

const argmax = (values: readonly number[]): number => values.indexOf(Math.max(...values));

function selected(offsets: Value, choose: (rows: number[], segment: number) => number[]): Value[] {
  const rows: number[] = [];
  const rowOffsets = [0];
  segments(offsets).forEach(([from, to], s) => {
    rows.push(
      ...choose(
        Array.from({ length: to - from }, (_, i) => from + i),
        s,
      ),
    );
    rowOffsets.push(rows.length);
  });
  return [f64([rows.length], rows), f64(offsets.shape, rowOffsets)];
}

/** Means over the features of the products of rows. */
function meanProducts(a: Value, b: Value): number[] {
  const [n, d] = a.shape;
  const means = new Array<number>(n).fill(0);
  a.data.forEach((v, i) => {
    means[Math.floor(i / d)] += (v * b.data[i]) / d;
  });
  return means;
}

/** Of every row the mean, the standard deviation, and what lies above the mean by `factor` of these. */
function cutoffs(x: Value, factor: number) {
  const mean = meanProducts(
    x,
    map(x, () => 1),
  );
  const centred = map(x, (v, i) => v - mean[Math.floor(i / x.shape[1])]);
  const deviation = meanProducts(centred, centred).map(Math.sqrt);
  return { mean, deviation, cut: mean.map((m, r) => m + factor * deviation[r]) };
}

/** The references by op name. Operands that an op writes to are changed in place. */
interface ExpertRowValue {
  weights: number[];
  chosen: Set<number>;
}

/** The softmax and the chosen experts of every row. */
function expertRows(z: Value, offsets: Value, share: Value, rule: number): ExpertRowValue[] {
  const count = z.shape[1];
  return Array.from({ length: z.shape[0] }, (_, n) => {
    const segment = offsets.data.findIndex((end) => end > n) - 1;
    const part = Math.fround(share.data[segment]);
    const scores = Array.from(z.data.subarray(n * count, (n + 1) * count));
    const top = Math.max(...scores);
    const powers = scores.map((score) => Math.exp(score - top));
    const total = powers.reduce((a, b) => a + b, 0);
    const weights = powers.map((power) => power / total);
    const order = scores.map((_, e) => e).sort((a, b) => scores[b] - scores[a] || a - b);
    let mass = 0;
    const chosen = order.filter((e, rank) => {
      const before = mass;
      mass += weights[e];
      return rule === 0 ? rank < Math.ceil(part * count - 1e-6) : before < part;
    });
    return { weights, chosen: new Set(chosen) };
  });
}

function expertGateValue({ weights, chosen }: ExpertRowValue, expert: number, mode: number): number {
  if (mode === 0) return 1;
  const among = mode === 2 ? [...chosen].reduce((sum, e) => sum + weights[e], 0) : 1;
  return (weights.length * weights[expert]) / among;
}

function balance(z: Value, rows: readonly ExpertRowValue[]): { loss: number; load: number[] } {
  const count = z.shape[1];
  const mean = (of: (row: ExpertRowValue, e: number) => number): number[] =>
    Array.from({ length: count }, (_, e) => rows.reduce((sum, row) => sum + of(row, e), 0) / rows.length);
  const load = mean(({ chosen }, e) => Number(chosen.has(e)));
  const weight = mean(({ weights }, e) => weights[e]);
  const product = load.reduce((sum, f, e) => sum + f * weight[e], 0);
  return { loss: count * product - load.reduce((a, b) => a + b, 0), load };
}

export const references: Readonly<Record<string, Reference>> = {
  embedding([table, ids]) {
    const d = table!.shape[1];
    return [
      f64(
        [ids!.data.length, d],
        Array.from(ids!.data).flatMap((id) => [...table!.data.subarray(id * d, (id + 1) * d)]),
      ),
    ];
  },
  embedding_grad([dy, ids], _, [size]) {
    const y = f64(size!);
    const d = size![1];
    ids!.data.forEach((id, r) => {
      for (let i = 0; i < d; ++i) y.data[id * d + i] += dy!.data[r * d + i];
    });
    return [y];
  },

  zeros: (_, __, [size]) => [f64(size!)],
  add: ([a, b]) => [map(a!, (v, i) => v + b!.data[i])],
  scale: ([x, s], [factor]) => [map(x!, (v) => v * factor * (s ? s.data[0] : 1))],
  activation: ([x], [kind]) => [map(x!, (v) => act[kind](v))],
  activation_grad: ([dy, x], [kind]) => [map(x!, (v, i) => dy!.data[i] * actGrad[kind](v))],
  softcap: ([x], [cap]) => [capped(x!, cap)],
  softcap_grad: ([dy, x], [cap]) => [map(x!, (v, i) => dy!.data[i] * (1 - Math.tanh(v / cap) ** 2))],
  gated_activation: ([g, u], [kind]) => [map(g!, (v, i) => act[kind](v) * u!.data[i])],
  gated_activation_grad: ([dy, g, u], [kind]) => [
    map(g!, (v, i) => dy!.data[i] * u!.data[i] * actGrad[kind](v)),
    map(g!, (v, i) => dy!.data[i] * act[kind](v)),
  ],

  gather_rows([x, rows]) {
    const d = x!.shape[1];
    const y = f64([rows!.data.length, d]);
    rows!.data.forEach((n, r) => {
      y.data.set(x!.data.subarray(n * d, (n + 1) * d), r * d);
    });
    return [y];
  },
  gather_ids: ([x, rows]) => [
    f64(
      rows!.shape,
      Array.from(rows!.data, (n) => x!.data[n]),
    ),
  ],
  scatter_add([acc, x, rows]) {
    const d = x!.shape[1];
    const y = f64(acc!.shape, acc!.data);
    rows!.data.forEach((n, r) => {
      for (let i = 0; i < d; ++i) y.data[n * d + i] += x!.data[r * d + i];
    });
    return [y];
  },
  add_rows([residual, x, rows, gate]) {
    const d = x!.shape[1];
    const y = f64(residual!.shape, residual!.data);
    for (let r = 0; r < x!.shape[0]; ++r) {
      for (let i = 0; i < d; ++i) y.data[rowOf(rows, r) * d + i] += (gate ? gate.data[r] : 1) * x!.data[r * d + i];
    }
    return [y];
  },
  add_rows_grad([dy, x, rows, gate], _, [size, gateSize]) {
    const d = size![1];
    const dx = f64(size!);
    const dgate = gateSize && f64(gateSize);
    for (let r = 0; r < size![0]; ++r) {
      for (let i = 0; i < d; ++i) {
        const value = dy!.data[rowOf(rows, r) * d + i];
        dx.data[r * d + i] = (gate ? gate.data[r] : 1) * value;
        if (dgate) dgate.data[r] += value * x!.data[r * d + i];
      }
    }
    return [dx, dgate];
  },
  sum_rows([x, rows, gate]) {
    const d = x!.shape[1];
    const y = f64([d]);
    for (let r = 0; r < count(rows, x!); ++r) {
      for (let i = 0; i < d; ++i) y.data[i] += (gate ? gate.data[r] : 1) * x!.data[rowOf(rows, r) * d + i];
    }
    return [y];
  },
  segment_sum([x, offsets], [most, mean], [size]) {
    const y = f64(size!);
    eachSegmentRow(offsets!, most, mean, (s, n, weight) => {
      for (let i = 0; i < size![1]; ++i) y.data[s * size![1] + i] += weight * x!.data[n * size![1] + i];
    });
    return [y];
  },
  segment_broadcast([x, offsets], [most, mean], [size]) {
    const y = f64(size!);
    eachSegmentRow(offsets!, most, mean, (s, n, weight) => {
      for (let i = 0; i < size![1]; ++i) y.data[n * size![1] + i] = weight * x!.data[s * size![1] + i];
    });
    return [y];
  },
  latch: ([x, held]) => [map(x!, (v, i) => (Number.isNaN(held!.data[i]) ? v : held!.data[i]))],
  dot: ([a, b]) => [f64([1], [a!.data.reduce((sum, v, i) => sum + v * b!.data[i], 0)])],

  rms_norm([x, weight, rows], [eps, offset]) {
    const groups = x!.shape[1] / weight!.shape[0];
    const [parts, partRows] = grouped(x!, rows, groups);
    const { m, d, rstd } = norm(parts, partRows, eps, false);
    const y = f64([m / groups, d * groups]);
    for (let r = 0; r < m; ++r) {
      for (let i = 0; i < d; ++i) {
        y.data[r * d + i] = x!.data[rowOf(partRows, r) * d + i] * rstd.data[r] * (offset + weight!.data[i]);
      }
    }
    return [y, f64([m / groups, groups], rstd.data)];
  },
  rms_norm_grad([dy, x, weight, rstd, rows], [offset]) {
    const groups = x!.shape[1] / weight!.shape[0];
    const [parts, partRows] = grouped(x!, rows, groups);
    const factors = map(weight!, (w) => offset + w);
    const { dx, dweight } = normGrad(grouped(dy!, null, groups)[0], parts, factors, null, rstd!, partRows);
    return [f64(dy!.shape, dx.data), dweight];
  },
  layer_norm([x, weight, bias, rows], [eps]) {
    const { m, d, mean, rstd } = norm(x!, rows, eps, true);
    const y = f64([m, d]);
    for (let r = 0; r < m; ++r) {
      for (let i = 0; i < d; ++i) {
        const hat = (x!.data[rowOf(rows, r) * d + i] - mean.data[r]) * rstd.data[r];
        y.data[r * d + i] = hat * weight!.data[i] + (bias ? bias.data[i] : 0);
      }
    }
    return [y, mean, rstd];
  },
  layer_norm_grad([dy, x, weight, mean, rstd, rows]) {
    const { dx, dweight, dbias } = normGrad(dy!, x!, weight!, mean, rstd!, rows);
    return [dx, dweight, dbias];
  },

  linear([x, w, bias, rows, u, b], [kind], [size]) {
    const pre = patched(product(x!, w!, bias, rows, size![1]), u, b);
    return [map(pre, (v) => act[kind](v)), pre];
  },
  linear_gated([x, wg, wu, bg, bu, rows, gateU, gateB, upU, upB], [kind], [size]) {
    const g = patched(product(x!, wg!, bg, rows, size![1]), gateU, gateB);
    const u = patched(product(x!, wu!, bu, rows, size![1]), upU, upB);
    return [map(g, (v, i) => act[kind](v) * u.data[i]), g, u];
  },
  linear_add([residual, x, w, bias, rows, gate, u, b]) {
    const d = residual!.shape[1];
    const update = patched(product(x!, w!, bias, null, d), u, b);
    const y = f64(residual!.shape, residual!.data);
    for (let r = 0; r < x!.shape[0]; ++r) {
      for (let i = 0; i < d; ++i) y.data[rowOf(rows, r) * d + i] += (gate ? gate.data[r] : 1) * update.data[r * d + i];
    }
    return [y];
  },
  linear_dx([dy, w, acc], _, [size]) {
    return [map(transposed(dy!, w!, null, size![1]), (v, i) => v + (acc ? acc.data[i] : 0))];
  },
  linear_add_grad([dy, x, w, bias, rows, gate], _, [size, gateSize]) {
    const k = size![1];
    const d = dy!.shape[1];
    const t = transposed(dy!, w!, rows, k);
    const dgate = gateSize && f64(gateSize);
    for (let r = 0; dgate && r < gateSize[0]; ++r) {
      for (let i = 0; i < k; ++i) dgate.data[r] += x!.data[r * k + i] * t.data[r * k + i];
      for (let i = 0; bias && i < d; ++i) dgate.data[r] += dy!.data[rowOf(rows, r) * d + i] * bias.data[i];
    }
    return [map(t, (v, i) => v * (gate ? gate.data[Math.floor(i / k)] : 1)), dgate];
  },
  linear_dw([dy, x, dyrows, xrows, gate], _, [size]) {
    const [n, k] = size!;
    const dw = f64([n, k]);
    for (let r = 0; r < count(dyrows, dy!); ++r) {
      for (let i = 0; i < n; ++i) {
        const d = (gate ? gate.data[r] : 1) * dy!.data[rowOf(dyrows, r) * n + i];
        for (let j = 0; j < k; ++j) dw.data[i * k + j] += d * x!.data[rowOf(xrows, r) * k + j];
      }
    }
    return [dw];
  },

  rope([x, positions, invFreq], [headDim, sign, magnitude]) {
    const y = f64(x!.shape, x!.data);
    const [rows, d] = x!.shape;
    const pairs = invFreq!.data.length;
    for (let r = 0; r < rows; ++r) {
      for (let head = 0; head < d; head += headDim) {
        for (let i = 0; i < pairs; ++i) {
          const angle = sign * positions!.data[r] * invFreq!.data[i];
          const at = r * d + head + i;
          const [a, b] = [x!.data[at], x!.data[at + pairs]];
          y.data[at] = magnitude * (a * Math.cos(angle) - b * Math.sin(angle));
          y.data[at + pairs] = magnitude * (b * Math.cos(angle) + a * Math.sin(angle));
        }
      }
    }
    return [y];
  },

  attention([q, k, v, offsets, rows, rowOffsets, bias], [heads, kvHeads, causal, scale, window, softcap]) {
    const layout = headsOf(q!, heads, kvHeads);
    const { dh } = layout;
    const y = f64(q!.shape);
    const lse = f64([q!.shape[0], heads]);
    for (const { from, to, standing } of queries(offsets!, rows, rowOffsets)) {
      for (const { i, row } of standing) {
        for (let h = 0; h < heads; ++h) {
          const s = scores(q!, k!, layout, h, i, from, causal ? row + 1 : to, {
            ...{ scale, window, softcap },
            biasAt: biasOf(bias ?? null, h, row),
          });
          lse.data[i * heads + h] = s.lse;
          s.p.forEach((p, j) => {
            for (let d = 0; d < dh; ++d) {
              y.data[(i * heads + h) * dh + d] += p * v!.data[((from + j) * kvHeads + s.kv) * dh + d];
            }
          });
        }
      }
    }
    return [y, lse];
  },
  attention_grad([dy, q, k, v, , , offsets, rows, rowOffsets, bias], [heads, kvHeads, causal, scale, window, softcap]) {
    const layout = headsOf(q!, heads, kvHeads);
    const { dh } = layout;
    const [dq, dk, dv] = [f64(q!.shape), f64(k!.shape), f64(v!.shape)];
    for (const { from, to, standing } of queries(offsets!, rows, rowOffsets)) {
      for (const { i, row } of standing) {
        for (let h = 0; h < heads; ++h) {
          const options = { scale, window, softcap, biasAt: biasOf(bias ?? null, h, row) };
          const { p, kv, slope } = scores(q!, k!, layout, h, i, from, causal ? row + 1 : to, options);
          const at = (i * heads + h) * dh;
          const dp = p.map((_, j) => {
            let sum = 0;
            for (let d = 0; d < dh; ++d) sum += dy!.data[at + d] * v!.data[((from + j) * kvHeads + kv) * dh + d];
            return sum;
          });
          const mean = p.reduce((sum, value, j) => sum + value * dp[j], 0);
          p.forEach((value, j) => {
            const ds = value * (dp[j] - mean) * slope[j] * scale;
            const other = ((from + j) * kvHeads + kv) * dh;
            for (let d = 0; d < dh; ++d) {
              dq.data[at + d] += ds * k!.data[other + d];
              dk.data[other + d] += ds * q!.data[at + d];
              dv.data[other + d] += value * dy!.data[at + d];
            }
          });
        }
      }
    }
    return [dq, dk, dv];
  },
  cache_append([k, v, offsets, slots, lengths, pages, poolK, poolV]) {
    const [, t, c] = poolK!.shape;
    slots!.data.forEach((slot, s) => {
      for (let row = offsets!.data[s]; row < offsets!.data[s + 1]; ++row) {
        const at = poolRow(pages!, t, slot, lengths!.data[slot]++) * c;
        poolK!.data.set(k!.data.subarray(row * c, (row + 1) * c), at);
        poolV!.data.set(v!.data.subarray(row * c, (row + 1) * c), at);
      }
    });
    return [];
  },
  attention_cached(
    [q, offsets, slots, lengths, pages, poolK, poolV, rows, rowOffsets, bias],
    [heads, kvHeads, scale, window, softcap],
  ) {
    const layout = headsOf(q!, heads, kvHeads);
    const { dh } = layout;
    const [, t, c] = poolK!.shape;
    const y = f64(q!.shape);
    queries(offsets!, rows, rowOffsets).forEach(({ to, standing }, s) => {
      const slot = slots!.data[s];
      const held = lengths!.data[slot];
      const [keys, values] = [poolK!, poolV!].map((pool) => {
        const rowsHeld = Array.from({ length: held }, (_, row) => {
          const at = poolRow(pages!, t, slot, row) * c;
          return [...pool.data.subarray(at, at + c)];
        });
        return f64([held, c], rowsHeld.flat());
      });
      for (const { i, row } of standing) {
        for (let h = 0; h < heads; ++h) {
          const { p, kv } = scores(q!, keys, layout, h, i, 0, held - (to - row) + 1, {
            ...{ scale, window, softcap },
            biasAt: biasOf(bias ?? null, h, held - (to - row)),
          });
          p.forEach((value, j) => {
            for (let d = 0; d < dh; ++d) {
              y.data[(i * heads + h) * dh + d] += value * values.data[(j * kvHeads + kv) * dh + d];
            }
          });
        }
      }
    });
    return [y];
  },

  page_copy([from, to, ...pools]) {
    from!.data.forEach((page, i) => {
      for (const pool of pools) {
        const size = pool!.shape[1] * pool!.shape[2];
        pool!.data.copyWithin(to!.data[i] * size, page * size, (page + 1) * size);
      }
    });
    return [];
  },

  scale_columns: ([x, w]) => [map(x!, (v, i) => v * w!.data[i % x!.shape[1]])],
  add_scaled([acc, x, c], [column, offset]) {
    const [d, columns] = [x!.shape[1], c!.shape[1]];
    return [map(acc!, (v, i) => v + (offset + c!.data[Math.floor(i / d) * columns + column]) * x!.data[i])];
  },
  add_scaled_grad([dy, x, c], [column, offset]) {
    const [d, columns] = [x!.shape[1], c!.shape[1]];
    const dc = f64(c!.shape);
    const dx = map(dy!, (v, i) => {
      const at = Math.floor(i / d) * columns + column;
      dc.data[at] += v * x!.data[i];
      return (offset + c!.data[at]) * v;
    });
    return [dx, dc];
  },
  rescale_rows([x, like], [floor]) {
    const d = x!.shape[1];
    const [own, wanted] = [meanProducts(x!, x!), meanProducts(like!, like!)];
    return [map(x!, (v, i) => v * Math.sqrt(wanted[Math.floor(i / d)] / Math.max(own[Math.floor(i / d)], floor)))];
  },
  rescale_rows_grad([dy, x, like], [floor]) {
    const d = x!.shape[1];
    const [own, wanted, inner] = [meanProducts(x!, x!), meanProducts(like!, like!), meanProducts(dy!, x!)];
    const square = own.map((v) => Math.max(v, floor));
    const dx = map(dy!, (v, i) => {
      const r = Math.floor(i / d);
      const pull = own[r] > floor ? inner[r] / square[r] : 0;
      return Math.sqrt(wanted[r] / square[r]) * (v - pull * x!.data[i]);
    });
    const dlike = map(like!, (v, i) => {
      const r = Math.floor(i / d);
      return wanted[r] > 0 ? (inner[r] * v) / Math.sqrt(square[r] * wanted[r]) : 0;
    });
    return [dx, dlike];
  },
  gaussian_topk([x], [factor]) {
    const { cut } = cutoffs(x!, factor);
    return [map(x!, (v, i) => Math.max(v - cut[Math.floor(i / x!.shape[1])], 0))];
  },
  gaussian_topk_grad([dy, x], [factor]) {
    const d = x!.shape[1];
    const { mean, deviation, cut } = cutoffs(x!, factor);
    const own = map(dy!, (v, i) => (x!.data[i] > cut[Math.floor(i / d)] ? v : 0));
    const above = mean.map((_, r) => own.data.subarray(r * d, (r + 1) * d).reduce((a, b) => a + b, 0) / d);
    const dx = map(own, (v, i) => {
      const r = Math.floor(i / d);
      const slope = deviation[r] > 0 ? (factor * (x!.data[i] - mean[r])) / deviation[r] : 0;
      return v - above[r] * (1 + slope);
    });
    return [dx];
  },

  route_topk([z, offsets, capacity]) {
    return selected(offsets!, (rows, s) => {
      const k = Math.min(rows.length, Math.max(0, Math.ceil(Math.fround(capacity!.data[s]) * rows.length - 1e-6)));
      const best = [...rows].sort((a, b) => z!.data[b] - z!.data[a] || a - b).slice(0, k);
      return best.sort((a, b) => a - b);
    });
  },
  route_threshold: ([z, offsets, threshold]) =>
    selected(offsets!, (rows, s) => rows.filter((r) => z!.data[r] > threshold!.data[s])),
  tile_scores([z, positions, offsets, held], [tile]) {
    const y = f64(z!.shape);
    const next = held && f64(held.shape, held.data);
    eachTile(positions!, offsets!, held, tile, (s, rows, isHeld) => {
      const e = z!.shape[1];
      const first = z!.data.slice(rows[0] * e, (rows[0] + 1) * e);
      const own = held?.data.slice(2 * s * (e + 1), (2 * s + 1) * (e + 1));
      for (const n of rows) y.data.set(isHeld ? own!.subarray(0, e) : first, n * e);
      if (!next || isHeld) return;
      next.data.copyWithin((2 * s + 1) * (e + 1), 2 * s * (e + 1), (2 * s + 1) * (e + 1));
      next.data.set([...first, positions!.data[rows[0]]], 2 * s * (e + 1));
    });
    return [y, next];
  },
  tile_scores_grad([dy, positions, offsets, held], [tile]) {
    const dz = f64(dy!.shape);
    const e = dy!.shape[1];
    eachTile(positions!, offsets!, held, tile, (_, rows, isHeld) => {
      if (isHeld) return;
      for (const n of rows) for (let i = 0; i < e; ++i) dz.data[rows[0] * e + i] += dy!.data[n * e + i];
    });
    return [dz];
  },
  expert_rows([z, offsets, share], [expert, rule]) {
    const all = expertRows(z!, offsets!, share!, rule);
    return selected(offsets!, (rows) => rows.filter((n) => all[n].chosen.has(expert)));
  },
  expert_gate([z, offsets, share, rows], [expert, rule, mode]) {
    const all = expertRows(z!, offsets!, share!, rule);
    return [
      f64(
        rows!.shape,
        Array.from(rows!.data, (n) => expertGateValue(all[n], expert, mode)),
      ),
    ];
  },
  expert_gate_grad([dg, z, offsets, share, rows], [expert, rule, mode]) {
    const all = expertRows(z!, offsets!, share!, rule);
    const dz = f64(z!.shape);
    const count = z!.shape[1];
    rows!.data.forEach((n, r) => {
      const { weights, chosen } = all[n];
      // d log gate / dz: of the softmax, or of the softmax over the chosen alone.
      const among = mode === 2 ? [...chosen].reduce((sum, e) => sum + weights[e], 0) : 1;
      for (let e = 0; e < count; ++e) {
        const other = mode === 2 && !chosen.has(e) ? 0 : weights[e] / among;
        dz.data[n * count + e] = dg!.data[r] * expertGateValue(all[n], expert, mode) * (Number(e === expert) - other);
      }
    });
    return [dz];
  },
  expert_credit([h, dh, z, offsets, share, weight, rows], [rule]) {
    const [units, count] = [h!.shape[1], z!.shape[1]];
    const all = expertRows(z!, offsets!, share!, rule);
    const rowOf = (r: number) => (rows ? rows.data[r] : r);
    const credits = all.map((_, r) => {
      const sums = Array<number>(count).fill(0);
      for (let u = 0; u < units; ++u) {
        const i = rowOf(r) * units + u;
        sums[Math.floor(u / (units / count))] += h!.data[i] * dh!.data[i];
      }
      return sums;
    });
    const dz = f64(z!.shape);
    for (const [from, to] of segments(offsets!)) {
      const size =
        credits
          .slice(from, to)
          .flat()
          .reduce((sum, a) => sum + Math.abs(a), 0) /
        ((to - from) * count);
      for (let r = from; r < to; ++r) {
        const scores = z!.data.subarray(r * count, (r + 1) * count);
        const chosen = (e: number) => all[r].chosen.has(e);
        const lowest = Math.min(...Array.from(scores).filter((_, e) => chosen(e)));
        const highest = Math.max(...Array.from(scores).filter((_, e) => !chosen(e)));
        const tau = (lowest + highest) / 2;
        const g = Array.from(scores, (s) => sigmoid(s - tau) * sigmoid(tau - s));
        const total = g.reduce((sum, value) => sum + value, 0);
        if (!Number.isFinite(tau) || !(size > 0) || !(total > 0)) continue;
        const mean = credits[r].reduce((sum, a, e) => sum + (a / size) * g[e], 0) / total;
        credits[r].forEach((a, e) => {
          dz.data[r * count + e] = weight!.data[rowOf(r)] * (a / size - mean) * g[e];
        });
      }
    }
    return [dz];
  },
  expert_balance: ([z, offsets, share], [rule]) => [
    f64([1], [balance(z!, expertRows(z!, offsets!, share!, rule)).loss]),
  ],
  expert_balance_grad([dloss, z, offsets, share], [rule]) {
    const all = expertRows(z!, offsets!, share!, rule);
    const { load } = balance(z!, all);
    const count = z!.shape[1];
    return [
      map(z!, (_, i) => {
        const { weights } = all[Math.floor(i / count)];
        const mean = weights.reduce((sum, w, e) => sum + w * load[e], 0);
        return ((dloss!.data[0] * count) / all.length) * weights[i % count] * (load[i % count] - mean);
      }),
    ];
  },
  gate([z, rows], [mode]) {
    return [
      f64(
        rows!.shape,
        Array.from(rows!.data, (n) => (mode === 0 ? 1 : mode * sigmoid(z!.data[n]))),
      ),
    ];
  },
  gate_grad([dg, z, rows], [mode]) {
    const dz = f64(z!.shape);
    rows!.data.forEach((n, r) => {
      const s = sigmoid(z!.data[n]);
      dz.data[n] = dg!.data[r] * (mode === 0 ? 1 - s : mode * s * (1 - s));
    });
    return [dz];
  },
  topk_bce([z, rows]) {
    const chosen = new Set(rows!.data);
    const sum = Array.from(z!.data, (v, i) => softplus(v) - (chosen.has(i) ? v : 0)).reduce((a, b) => a + b, 0);
    return [f64([1], [sum / z!.data.length])];
  },
  topk_bce_grad([dloss, z, rows]) {
    const chosen = new Set(rows!.data);
    return [map(z!, (v, i) => (dloss!.data[0] * (sigmoid(v) - (chosen.has(i) ? 1 : 0))) / z!.data.length)];
  },
  topk_credit([dy, before, after, z, offsets, rowOffsets, weight]) {
    const d = dy!.shape[1];
    const dz = f64(z!.shape);
    segments(offsets!).forEach(([from, to], s) => {
      const rows = Array.from({ length: to - from }, (_, i) => from + i);
      const k = rowOffsets!.data[s + 1] - rowOffsets!.data[s];
      if (k <= 0 || k >= rows.length) return;
      const a = rows.map((r) => {
        let sum = 0;
        for (let i = r * d; i < (r + 1) * d; ++i) sum += dy!.data[i] * (after!.data[i] - before!.data[i]);
        return sum;
      });
      const size = a.reduce((sum, value) => sum + Math.abs(value), 0) / rows.length;
      const order = rows.map((r) => z!.data[r]).sort((x, y) => y - x);
      const tau = (order[k - 1] + order[k]) / 2;
      const g = rows.map((r) => sigmoid(z!.data[r] - tau) * sigmoid(tau - z!.data[r]));
      const total = g.reduce((sum, value) => sum + value, 0);
      if (size === 0 || !(total > 0)) return;
      const mean = a.reduce((sum, value, i) => sum + (value / size) * g[i], 0) / total;
      rows.forEach((r, i) => {
        dz.data[r] = weight!.data[r] * (a[i] / size - mean) * g[i];
      });
    });
    return [dz];
  },

  divergence([hs, ht, w, weight, targets, wt], [kind, beta, softcap, teacherSoftcap]) {
    const [r, k] = hs!.shape;
    const v = w!.shape[0];
    const [row, dh, agree, ce] = [f64([r]), f64(hs!.shape), f64([r]), f64([r])];
    const student = capped(product(hs!, w!, null, null, v), softcap);
    const teacher = capped(product(ht!, wt ?? w!, null, null, v), teacherSoftcap);
    for (let i = 0; i < r; ++i) {
      const ls = logSoftmax(student.data.subarray(i * v, (i + 1) * v));
      const lt = logSoftmax(teacher.data.subarray(i * v, (i + 1) * v));
      agree.data[i] = argmax(ls) === argmax(lt) ? 1 : 0;
      if (targets && targets.data[i] >= 0) ce.data[i] = -ls[targets.data[i]];
      const sum = (f: (j: number) => number) => Array.from(ls, (_, j) => f(j)).reduce((a, b) => a + b, 0);
      const [p, q] = [Array.from(lt, Math.exp), Array.from(ls, Math.exp)];
      const lm = p.map((x, j) => Math.log(beta * x + (1 - beta) * q[j]));
      // The value, and its derivative by every logit of the student.
      const reverse = sum((j) => q[j] * (ls[j] - lt[j]));
      const fromMixture = sum((j) => q[j] * (ls[j] - lm[j]));
      row.data[i] = [
        sum((j) => p[j] * (lt[j] - ls[j])),
        reverse,
        beta * sum((j) => p[j] * (lt[j] - lm[j])) + (1 - beta) * fromMixture,
      ][kind];
      for (let j = 0; j < v; ++j) {
        const d = [q[j] - p[j], q[j] * (ls[j] - lt[j] - reverse), (1 - beta) * q[j] * (ls[j] - lm[j] - fromMixture)][
          kind
        ];
        const factor = weight!.data[i] * d * slopeOf(student.data[i * v + j], softcap);
        for (let c = 0; c < k; ++c) dh.data[i * k + c] += factor * w!.data[j * w!.shape[1] + c];
      }
    }
    const loss = row.data.reduce((sum, value, i) => sum + value * weight!.data[i], 0);
    return [f64([1], [loss]), row, dh, agree, targets && ce];
  },
  top_logits([h, w], [softcap], [size]) {
    const [r, t] = size!;
    const v = w!.shape[0];
    const [ids, logp, rest] = [f64([r, t]), f64([r, t]), f64([r])];
    const logits = capped(product(h!, w!, null, null, v), softcap);
    for (let i = 0; i < r; ++i) {
      const l = logSoftmax(logits.data.subarray(i * v, (i + 1) * v));
      const order = Array.from(l, (_, j) => j).sort((a, b) => l[b] - l[a] || a - b);
      const chosen = order.slice(0, t).sort((a, b) => a - b);
      ids.data.set(chosen, i * t);
      logp.data.set(
        chosen.map((j) => l[j]),
        i * t,
      );
      rest.data[i] = Math.log(
        Math.max(
          order.slice(t).reduce((sum, j) => sum + Math.exp(l[j]), 0),
          smallestNormal,
        ),
      );
    }
    return [ids, logp, rest];
  },
  topk_divergence([hs, w, ids, logp, rest, weight], [kind, softcap]) {
    const [r, k] = hs!.shape;
    const [v, t] = [w!.shape[0], ids!.shape[1]];
    const [row, dh] = [f64([r]), f64(hs!.shape)];
    const logits = capped(product(hs!, w!, null, null, v), softcap);
    for (let i = 0; i < r; ++i) {
      const l = logSoftmax(logits.data.subarray(i * v, (i + 1) * v));
      const own = Array.from(ids!.data.subarray(i * t, (i + 1) * t));
      const outside = Array.from(l, (_, j) => j).filter((j) => !own.includes(j));
      const restQ = outside.reduce((sum, j) => sum + Math.exp(l[j]), 0);
      const log = (x: number) => Math.max(x, Math.log(smallestNormal));
      const p = [...logp!.data.subarray(i * t, (i + 1) * t), rest!.data[i]].map(log);
      const q = [...own.map((j) => l[j]), Math.log(restQ)].map(log);
      const terms = p.map((lp, b) => (kind === 0 ? Math.exp(lp) * (lp - q[b]) : Math.exp(q[b]) * (q[b] - lp)));
      row.data[i] = terms.reduce((a, b) => a + b);
      const mass = p.reduce((sum, lp) => sum + Math.exp(lp), 0);
      for (let j = 0; j < v; ++j) {
        const b = own.includes(j) ? own.indexOf(j) : t;
        // d = probability of j times (mass - p / q of its bucket), or times (log q - log p - value).
        const d =
          Math.exp(l[j]) * (kind === 0 ? mass - Math.exp(p[b] - q[b]) : q[b] - p[b] - row.data[i]) * weight!.data[i];
        const slope = slopeOf(logits.data[i * v + j], softcap);
        for (let c = 0; c < k; ++c) dh.data[i * k + c] += d * slope * w!.data[j * w!.shape[1] + c];
      }
    }
    const loss = row.data.reduce((sum, value, i) => sum + value * weight!.data[i], 0);
    return [f64([1], [loss]), row, dh];
  },
  hidden_distance([x, y, weight], [kind]) {
    const [r, d] = x!.shape;
    const [row, dx] = [f64([r]), f64([r, d])];
    for (let i = 0; i < r; ++i) {
      const [a, b] = [x!, y!].map((v) => Array.from(v.data.subarray(i * d, (i + 1) * d)));
      const dot = (u: number[], v: number[]) => u.reduce((sum, value, j) => sum + value * v[j], 0);
      const [na, nb] = [Math.sqrt(dot(a, a)), Math.sqrt(dot(b, b))];
      const cosine = na * nb === 0 ? 0 : dot(a, b) / (na * nb);
      row.data[i] = kind === 0 ? dot(a, a) / d - (2 * dot(a, b)) / d + dot(b, b) / d : 1 - cosine;
      for (let j = 0; j < d; ++j) {
        const ofCosine = na * nb === 0 ? 0 : (cosine * a[j]) / (na * na) - b[j] / (na * nb);
        dx.data[i * d + j] = weight!.data[i] * (kind === 0 ? (2 / d) * (a[j] - b[j]) : ofCosine);
      }
    }
    const loss = row.data.reduce((sum, value, i) => sum + value * weight!.data[i], 0);
    return [f64([1], [loss]), row, dx];
  },
  cross_entropy([h, w, targets, weight], [softcap]) {
    const [r, k] = h!.shape;
    const v = w!.shape[0];
    const [row, dh, dw, correct] = [f64([r]), f64(h!.shape), f64([v, k]), f64([r])];
    const logits = capped(product(h!, w!, null, null, v), softcap);
    for (let i = 0; i < r; ++i) {
      const target = targets!.data[i];
      if (target < 0) continue;
      const l = logSoftmax(logits.data.subarray(i * v, (i + 1) * v));
      row.data[i] = -l[target];
      correct.data[i] = argmax(l) === target ? 1 : 0;
      for (let j = 0; j < v; ++j) {
        const slope = slopeOf(logits.data[i * v + j], softcap);
        const d = weight!.data[i] * slope * (Math.exp(l[j]) - (j === target ? 1 : 0));
        for (let c = 0; c < k; ++c) {
          dh.data[i * k + c] += d * w!.data[j * w!.shape[1] + c];
          dw.data[j * k + c] += d * h!.data[i * k + c];
        }
      }
    }
    const loss = row.data.reduce((sum, value, i) => sum + value * weight!.data[i], 0);
    return [f64([1], [loss]), row, dh, dw, correct];
  },

  accumulate([state, x], [offset, stride]) {
    const width = x!.shape.at(-1)!;
    x!.data.forEach((value, i) => {
      state!.data[offset + Math.floor(i / width) * stride + (i % width)] += value;
    });
    return [];
  },
  adamw([p, g, m, v, hyper], [decayCount]) {
    const [lr, beta1, beta2, eps, decay, clip, c1, c2] = hyper!.data;
    const norm = Math.hypot(...g!.data);
    if (Number.isFinite(norm)) {
      const factor = clip > 0 && norm > clip ? clip / norm : 1;
      g!.data.forEach((value, i) => {
        const grad = value * factor;
        m!.data[i] = beta1 * m!.data[i] + (1 - beta1) * grad;
        v!.data[i] = beta2 * v!.data[i] + (1 - beta2) * grad * grad;
        if (i < decayCount) p!.data[i] -= lr * decay * p!.data[i];
        p!.data[i] -= (lr * (m!.data[i] / c1)) / (Math.sqrt(v!.data[i] / c2) + eps);
      });
    }
    g!.data.fill(0);
    return [f64([1], [norm])];
  },

  /** Greedy rows only: how a random number becomes an id is tested by the frequencies it gives. */
  sample([logits]) {
    const [s, v] = logits!.shape;
    const rows = Array.from({ length: s }, (_, i) => logSoftmax(logits!.data.subarray(i * v, (i + 1) * v)));
    return [
      f64(
        [s],
        rows.map((row) => argmax(row)),
      ),
      f64(
        [s],
        rows.map((row) => Math.max(...row)),
      ),
    ];
  },
};
