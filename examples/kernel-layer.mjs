// A routed feed-forward layer for a framework of your own, built on elastiform/kernels:
//   node examples/kernel-layer.mjs
import { Kernels } from 'elastiform/kernels';

/** A feed-forward layer with a router: each call says what share of the rows and of the units it may use. */
class ElasticFeedForward {
  /**
   * @param {Kernels} kernels
   * @param {{ features: number, units: number, random: () => number }} options
   */
  constructor(kernels, { features, units, random }) {
    /** @param {number} outputs @param {number} inputs @param {number} size */
    const matrix = (outputs, inputs, size) => {
      const data = Float32Array.from({ length: outputs * inputs }, () => (random() * 2 - 1) * size);
      return kernels.weight(data, [outputs, inputs]);
    };
    this.kernels = kernels;
    this.router = matrix(1, features, 1);
    this.weights = {
      gate: matrix(units, features, 0.2),
      up: matrix(units, features, 0.2),
      down: matrix(features, units, 0.2),
    };
    this.units = units;
  }

  /**
   * `x + gate * ffn(x)` for the rows that the router scores highest; the others pass unchanged.
   *
   * @param {Float32Array} x f32 [rows, features]
   * @param {{ rows?: number, width?: number, signal?: AbortSignal }} [share] of rows and of units, from 0 to 1
   */
  async forward(x, { rows: capacity = 1, width = 1, signal } = {}) {
    const scores = await this.kernels.linear(x, this.router, { signal });
    const { rows } = await this.kernels.routeTopk(scores.y, capacity, { signal });
    const { y, flops } = await this.kernels.feedForward(x, this.weights, {
      act: 'silu',
      residual: x,
      rows,
      gates: Float32Array.from(rows, (r) => 1 / (1 + Math.exp(-scores.y[r]))),
      width: Math.ceil(width * this.units),
      signal,
    });
    return { y, rows, flops: flops + scores.flops };
  }
}

// Numbers that are the same in every run.
let state = 1;
const random = () => {
  state = (state * 48271) % 2147483647;
  return state / 2147483647;
};

const [rows, features, vocab] = [64, 32, 100];
const kernels = new Kernels();
try {
  const layer = new ElasticFeedForward(kernels, { features, units: 128, random });
  const head = kernels.weight(
    Float32Array.from({ length: vocab * features }, () => random() * 4 - 2),
    [vocab, features],
  );
  const x = Float32Array.from({ length: rows * features }, () => random() * 2 - 1);

  const full = await layer.forward(x);
  console.log('share of rows, of units: rows run, share of FLOPs, KL to the full layer in nats');
  for (const share of [{}, { rows: 0.5 }, { width: 0.5 }, { rows: 0.25, width: 0.5 }]) {
    const { y, rows, flops } = await layer.forward(x, share);
    // `gradient` is what a framework's own backward pass would go on with.
    const { loss } = await kernels.divergence(y, full.y, head);
    const [ofRows, ofUnits] = [share.rows ?? 1, share.width ?? 1];
    console.log(`${ofRows}, ${ofUnits}: ${rows.length} rows, ${(flops / full.flops).toFixed(3)}, ${loss.toFixed(4)}`);
  }
  const { leave, stay } = await kernels.exit(full.y, head, { rule: 'margin', threshold: 0.1 });
  console.log(`at an exit here ${leave.length} rows would leave and ${stay.length} go on`);
} finally {
  kernels.dispose();
}
