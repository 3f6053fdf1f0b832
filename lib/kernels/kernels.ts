// The elastic operations on typed arrays: routing, products over chosen rows and widths, divergence, exits.
import type { Graph, Node, Program, RunResult } from '../graph/index.js';
import { divergenceKinds } from '../graph/ops/names.js';
import { type DeviceName, DisposedError, Engine, InvalidArgumentError, type TypedArray } from '../native/index.js';
import { checkOptions } from '../native/options.js';
import { checkAct, describe, floats, rowsOf, selectedOf, widthOf } from './arguments.js';
import type {
  Cost,
  DivergenceOptions,
  DivergenceResult,
  ExitOptions,
  ExitResult,
  FeedForwardOptions,
  FeedForwardWeights,
  KernelOptions,
  LinearOptions,
  LinearResult,
  RouteOptions,
  RouteResult,
} from './types.js';
import { Weight, type WeightDtype } from './weight.js';

type GraphModule = typeof import('../graph/index.js');

/** Loaded at the first call: it is two thirds of the modules. */
let loaded: GraphModule | undefined;

interface Compiled {
  readonly program: Program;
  /** The bound of every dim. */
  readonly bounds: Readonly<Record<string, number>>;
  readonly weights: readonly Weight[];
}

interface Call {
  readonly api: string;
  /** What apart from weights and sizes makes the program another. */
  readonly variant: readonly unknown[];
  readonly weights: readonly (Weight | undefined)[];
  /** Sizes of this call by the name of their dim; memory is planned for a bound. */
  readonly sizes: Record<string, number>;
  /** Bounds of dims that are not the next power of two. */
  readonly limits?: Record<string, number>;
  readonly feeds: Record<string, TypedArray>;
  readonly signal?: AbortSignal;
  readonly build: (ops: GraphModule, graph: Graph, dim: (name: string) => ReturnType<Graph['dim']>) => void;
}

/**
 * Runs elastic operations on typed arrays. Owns an engine, its weights, and a compiled program for each kind of call and
 * set of weights, which serves any number of rows: dispose of it when done, or declare it with `using`.
 *
 * Calls run one after the other on the engine's own thread, never on the JavaScript one. Arrays that are given are copied
 * before the call returns its promise; those that come back are fresh. Wrong arguments reject with
 * {@link InvalidArgumentError}, indices out of range and scores that are not a number with {@link InvalidDataError}, calls
 * after `dispose()` with {@link DisposedError}.
 */
export class Kernels implements Disposable {
  /** Where calls run. */
  readonly device: DeviceName;
  readonly #engine: Engine;
  readonly #weights = new Set<Weight>();
  readonly #programs = new Map<string, Compiled>();

  /**
   * Loads the native addon and starts an engine.
   *
   * @throws DeviceUnavailableError with the reason and what to do.
   */
  constructor(options: KernelOptions = {}) {
    checkOptions('Kernels', options, ['device']);
    this.#engine = new Engine(options.device);
    this.device = this.#engine.device;
  }

  /** Whether `dispose()` was called. */
  get disposed(): boolean {
    return this.#engine.disposed;
  }

  /**
   * A matrix [outputs, inputs] or vector [outputs] for calls of this object, row by row.
   *
   * @throws InvalidArgumentError when data and shape do not fit, OutOfMemoryError.
   */
  weight(data: Float32Array, shape: readonly number[], dtype?: 'f32'): Weight;
  weight(data: Uint16Array, shape: readonly number[], dtype: 'bf16' | 'f16'): Weight;
  weight(data: Float32Array | Uint16Array, shape: readonly number[], dtype: WeightDtype = 'f32'): Weight {
    if (this.disposed) throw new DisposedError('[weight] the kernels were disposed');
    const weight = new Weight(data, shape, dtype, (gone) => this.#forget(gone));
    this.#weights.add(weight);
    return weight;
  }

  /**
   * Of every segment of T rows the `ceil(capacity T)` with the largest scores, ties to the lowest index: how rows are
   * chosen in training (Mixture-of-Depths, arXiv 2404.02258).
   *
   * @param z - f32 [N]: scores
   * @param capacity - share of rows from 0 to 1, one for all segments or f32 [S]
   */
  routeTopk(z: Float32Array, capacity: number | Float32Array, options: RouteOptions = {}): Promise<RouteResult> {
    return this.#route('routeTopk', z, 'capacity', capacity, options);
  }

  /**
   * The rows whose score is above a threshold: looks at every row alone, and so is causal.
   *
   * @param z - f32 [N]: scores
   * @param threshold - one for all segments or f32 [S]; minus infinity takes all rows
   */
  routeThreshold(z: Float32Array, threshold: number | Float32Array, options: RouteOptions = {}): Promise<RouteResult> {
    return this.#route('routeThreshold', z, 'threshold', threshold, options);
  }

  /**
   * `act(x[rows] w^T + (x[rows] a^T) b^T + bias)`; the correction is summed with the product, before bias and activation.
   *
   * @param x - f32 [M, K], row by row
   * @param w - [N, K]
   */
  async linear(x: Float32Array, w: Weight, options: LinearOptions = {}): Promise<LinearResult> {
    const api = 'linear';
    this.#alive(api);
    checkOptions(api, options, ['bias', 'act', 'rows', 'width', 'lora', 'signal']);
    const { bias, act = 'none', rows, lora, signal } = options;
    checkAct(api, act);
    const [outputs, inputs] = this.#matrix(api, 'w', w);
    this.#fits(api, 'bias', bias, [outputs]);
    if (lora !== undefined) {
      checkOptions(api, lora, ['a', 'b']);
      const [rank] = this.#matrix(api, 'lora.a', lora.a);
      this.#fits(api, 'lora.a', lora.a, [rank, inputs]);
      this.#matrix(api, 'lora.b', lora.b);
      this.#fits(api, 'lora.b', lora.b, [outputs, rank]);
    }
    const count = rowsOf(api, 'x', x, inputs);
    const selected = selectedOf(api, rows);
    const width = widthOf(api, options.width, outputs);
    if ((selected ?? count) === 0) return { y: new Float32Array(0), flops: 0, ms: 0 };
    const run = await this.#run({
      ...{ api, variant: [act, selected !== null], weights: [w, bias, lora?.a, lora?.b], signal },
      sizes: { rows: count, width, ...(selected !== null && { selected }) },
      limits: { width: outputs },
      feeds: { x, ...(rows && { rows }) },
      build({ linear }, graph, dim) {
        const input = graph.feed('x', 'f32', [dim('rows'), inputs]);
        const of = rows ? graph.feed('rows', 'i32', [dim('selected')]) : null;
        const patch = lora && {
          u: linear(input, graph.weight(lora.a.tensor), { rows: of }),
          b: graph.weight(lora.b.tensor),
        };
        const more = { bias: bias && graph.weight(bias.tensor), act, rows: of, width: dim('width'), patch };
        graph.output('y', linear(input, graph.weight(w.tensor), more));
      },
    });
    return { y: run.outputs.y as Float32Array, ...costOf(run) };
  }

  /**
   * A feed-forward layer on a prefix of its units and on some of its rows:
   * `y = residual; y[rows[r]] += gates[r] (h[r] down^T + downBias)` with h the units of row `rows[r]`. Rows that do not
   * enter keep the bits of the residual; a row that does gets those it gets when all enter.
   *
   * @param x - f32 [N, D], row by row: what the layer reads, already normalised
   * @returns `y`, f32 [N, D]
   */
  async feedForward(x: Float32Array, weights: FeedForwardWeights, options: FeedForwardOptions): Promise<LinearResult> {
    const api = 'feedForward';
    this.#alive(api);
    checkOptions(api, weights, ['gate', 'up', 'down', 'gateBias', 'upBias', 'downBias']);
    checkOptions(api, options, ['act', 'width', 'rows', 'gates', 'residual', 'signal']);
    const { gate, up, down, gateBias, upBias, downBias } = weights;
    const { act, rows, gates, residual, signal } = options;
    checkAct(api, act);
    const [units, features] = this.#matrix(api, 'up', up);
    this.#fits(api, 'gate', gate, [units, features]);
    this.#matrix(api, 'down', down);
    this.#fits(api, 'down', down, [features, units]);
    this.#fits(api, 'gateBias', gateBias, [units]);
    this.#fits(api, 'upBias', upBias, [units]);
    this.#fits(api, 'downBias', downBias, [features]);
    if (gateBias && !gate) throw new InvalidArgumentError('[feedForward] gateBias needs gate');
    const count = rowsOf(api, 'x', x, features);
    const selected = selectedOf(api, rows);
    const width = widthOf(api, options.width, units);
    if (residual !== undefined) floats(api, 'residual', residual, count * features);
    const entering = selected ?? count;
    if (gates !== undefined) floats(api, 'gates', gates, entering);
    if (entering === 0) return { y: residual?.slice() ?? new Float32Array(count * features), flops: 0, ms: 0 };
    const bound = [gate, up, down, gateBias, upBias, downBias];
    const run = await this.#run({
      ...{ api, variant: [act, selected !== null, !!gates, !!residual], weights: bound, signal },
      sizes: { rows: count, width, ...(selected !== null && { selected }) },
      limits: { width: units },
      feeds: { x, ...(rows && { rows }), ...(gates && { gates }), ...(residual && { residual }) },
      build({ linear, linearAdd, linearGated, zeros }, graph, dim) {
        const shape = [dim('rows'), features];
        const input = graph.feed('x', 'f32', shape);
        const of = rows ? graph.feed('rows', 'i32', [dim('selected')]) : null;
        const bias = (weight?: Weight) => weight && graph.weight(weight.tensor);
        const options = { act, rows: of, width: dim('width') };
        const w = graph.weight(up.tensor);
        const hidden = gate
          ? linearGated(input, graph.weight(gate.tensor), w, { ...options, bg: bias(gateBias), bu: bias(upBias) })
          : linear(input, w, { ...options, bias: bias(upBias) });
        const onto = residual ? graph.feed('residual', 'f32', shape) : zeros(graph, shape);
        const factor = gates ? graph.feed('gates', 'f32', [hidden.shape[0]]) : null;
        const y = linearAdd(onto, hidden, graph.weight(down.tensor), { bias: bias(downBias), rows: of, gate: factor });
        graph.output('y', y);
      },
    });
    return { y: run.outputs.y as Float32Array, ...costOf(run) };
  }

  /**
   * How far a student's next-token distributions are from a teacher's, and the gradient, a few rows at a time: logits of
   * all rows are never held. For a temperature, divide the hidden states of both by it: logits are linear in them.
   *
   * @param student - f32 [R, K]: hidden states that `head` multiplies
   * @param teacher - f32 [R, J]; J is K where there is no `teacherHead`
   * @param head - [V, K]
   */
  async divergence(
    student: Float32Array,
    teacher: Float32Array,
    head: Weight,
    options: DivergenceOptions = {},
  ): Promise<DivergenceResult> {
    const api = 'divergence';
    this.#alive(api);
    checkOptions(api, options, ['kind', 'beta', 'weights', 'teacherHead', 'gradient', 'signal']);
    const { kind = 'kl', beta = 0.5, teacherHead, gradient: wanted = true, signal } = options;
    if (!divergenceKinds.includes(kind)) {
      throw new InvalidArgumentError(`[${api}] kind must be one of ${divergenceKinds.join(', ')}, got ${String(kind)}`);
    }
    if (typeof beta !== 'number' || !(beta > 0 && beta < 1)) {
      throw new InvalidArgumentError(`[${api}] beta must be between 0 and 1, got ${String(beta)}`);
    }
    const [vocab, width] = this.#matrix(api, 'head', head);
    const teacherWidth = teacherHead ? this.#matrix(api, 'teacherHead', teacherHead)[1] : width;
    this.#fits(api, 'teacherHead', teacherHead, [vocab, teacherWidth]);
    const count = rowsOf(api, 'student', student, width);
    floats(api, 'teacher', teacher, count * teacherWidth);
    if (options.weights !== undefined) floats(api, 'weights', options.weights, count);
    const none = new Float32Array(0);
    if (count === 0) return { loss: 0, row: none, agree: none, gradient: wanted ? none : null, flops: 0, ms: 0 };
    const weights = options.weights ?? new Float32Array(count).fill(1 / count);
    const run = await this.#run({
      ...{ api, variant: [kind, beta, wanted], weights: [head, teacherHead], sizes: { rows: count }, signal },
      feeds: { student, teacher, weights },
      build({ divergence, gradients }, graph, dim) {
        const hs = graph.feed('student', 'f32', [dim('rows'), width]);
        const ht = graph.feed('teacher', 'f32', [dim('rows'), teacherWidth]);
        const weight = graph.feed('weights', 'f32', [dim('rows')]);
        const wt = teacherHead ? graph.weight(teacherHead.tensor) : null;
        const { loss, row, agree } = divergence(hs, ht, graph.weight(head.tensor), weight, { kind, beta, wt });
        for (const [name, node] of Object.entries({ loss, row, agree })) graph.output(name, node);
        if (wanted) graph.output('gradient', gradients(loss, [hs])[0]);
      },
    });
    const { loss, row, agree, gradient } = run.outputs as Record<string, Float32Array>;
    return { loss: loss[0], row, agree, gradient: gradient ?? null, ...costOf(run) };
  }

  /**
   * Which rows are sure enough to leave at an early exit, each judged alone. A row whose confidence is not a number stays.
   *
   * @param h - f32 [R, K]: hidden states that `head` multiplies, a few rows at a time
   * @param head - [V, K], V at least 2
   */
  async exit(h: Float32Array, head: Weight, options: ExitOptions): Promise<ExitResult> {
    const api = 'exit';
    this.#alive(api);
    checkOptions(api, options, ['rule', 'threshold', 'signal']);
    const { rule, threshold, signal } = options;
    if (!['entropy', 'margin', 'maxprob'].includes(rule)) {
      throw new InvalidArgumentError(`[${api}] rule must be entropy, margin or maxprob, got ${String(rule)}`);
    }
    if (typeof threshold !== 'number' || Number.isNaN(threshold)) {
      throw new InvalidArgumentError(`[${api}] threshold must be a number, got ${String(threshold)}`);
    }
    const [vocab, width] = this.#matrix(api, 'head', head);
    if (vocab < 2) throw new InvalidArgumentError(`[${api}] head must have at least 2 outputs, got ${vocab}`);
    const count = rowsOf(api, 'h', h, width);
    const none = new Int32Array(0);
    if (count === 0) return { confidence: new Float32Array(0), leave: none, stay: none, flops: 0, ms: 0 };
    const byEntropy = rule === 'entropy';
    const run = await this.#run({
      ...{ api, variant: [byEntropy], weights: [head], sizes: { rows: count }, feeds: { h }, signal },
      build({ divergence, topLogits, zeros }, graph, dim) {
        const rows = dim('rows');
        const hidden = graph.feed('h', 'f32', [rows, width]);
        const w = graph.weight(head.tensor);
        if (byEntropy) {
          // The divergence from the uniform distribution, which hidden states of 0 have, is log V less the entropy.
          const even: Node = zeros(graph, [rows, width]);
          const weight = graph.feed('weights', 'f32', [rows]);
          graph.output('row', divergence(even, hidden, w, weight).row);
        } else {
          graph.output('logp', topLogits(hidden, w, 2).logp);
        }
      },
      ...(byEntropy && { feeds: { h, weights: new Float32Array(count) } }),
    });
    const { row, logp } = run.outputs as Record<string, Float32Array>;
    const confidence = Float32Array.from({ length: count }, (_, r) => {
      if (byEntropy) return Math.max(0, Math.log(vocab) - row[r]);
      const pair = [logp[2 * r], logp[2 * r + 1]].map(Math.exp);
      return rule === 'maxprob' ? Math.max(...pair) : Math.abs(pair[0] - pair[1]);
    });
    const leaves = (value: number) => (byEntropy ? value < threshold : value > threshold);
    const all = Int32Array.from(confidence.keys());
    const leave = all.filter((r) => leaves(confidence[r]));
    const stay = all.filter((r) => !leaves(confidence[r]));
    return { confidence, leave, stay, ...costOf(run) };
  }

  /** Ends what runs (it rejects with DisposedError) and frees weights and programs; idempotent. */
  dispose(): void {
    this.#engine.dispose();
    for (const weight of this.#weights) weight.dispose();
    for (const { program } of this.#programs.values()) program.dispose();
    this.#programs.clear();
  }

  /** The same as `dispose()`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  async #route(
    api: 'routeTopk' | 'routeThreshold',
    z: Float32Array,
    name: 'capacity' | 'threshold',
    value: number | Float32Array,
    options: RouteOptions,
  ): Promise<RouteResult> {
    this.#alive(api);
    checkOptions(api, options, ['offsets', 'signal']);
    const count = rowsOf(api, 'z', z, 1);
    const { offsets = Int32Array.of(0, count), signal } = options;
    if (!(offsets instanceof Int32Array) || offsets.length < 2) {
      throw new InvalidArgumentError(`[${api}] offsets must be an Int32Array of at least 2, got ${describe(offsets)}`);
    }
    const segments = offsets.length - 1;
    const perSegment = typeof value === 'number' ? new Float32Array(segments).fill(value) : value;
    floats(api, name, perSegment, segments, 'a number or ');
    const valid = (v: number) => (name === 'capacity' ? v >= 0 && v <= 1 : !Number.isNaN(v));
    if (!perSegment.every(valid)) {
      throw new InvalidArgumentError(
        `[${api}] ${name} must be ${name === 'capacity' ? 'from 0 to 1' : 'a number'}, got ${perSegment.find((v) => !valid(v))}`,
      );
    }
    if (count === 0) return { rows: new Int32Array(0), offsets: new Int32Array(segments + 1), flops: 0, ms: 0 };
    const run = await this.#run({
      ...{ api, variant: [], weights: [], signal },
      sizes: { rows: count, segments, offsets: segments + 1 },
      limits: { offsets: planned(segments) + 1 },
      feeds: { z, offsets, [name]: perSegment },
      build({ routeThreshold, routeTopk }, graph, dim) {
        const scores = graph.feed('z', 'f32', [dim('rows'), 1]);
        const at = graph.feed('offsets', 'i32', [dim('offsets')]);
        const each = graph.feed(name, 'f32', [dim('segments')]);
        const routed = (api === 'routeTopk' ? routeTopk : routeThreshold)(scores, at, each);
        graph.output('chosen', routed.rows);
        graph.output('starts', routed.offsets);
      },
    });
    const { chosen, starts } = run.outputs as Record<string, Int32Array>;
    return { rows: chosen, offsets: starts, ...costOf(run) };
  }

  async #run({ api, variant, weights, sizes, limits = {}, feeds, signal, build }: Call): Promise<RunResult> {
    let given = feeds;
    if (!loaded) {
      given = structuredClone(feeds);
      loaded = await import('../graph/index.js');
    }
    const key = JSON.stringify([api, ...variant, ...weights.map((weight) => weight?.id ?? null)]);
    const known = this.#programs.get(key);
    let program = known?.program;
    if (!known || Object.entries(sizes).some(([name, size]) => size > known.bounds[name])) {
      const bound = (name: string, size: number) => Math.max(limits[name] ?? planned(size), known?.bounds[name] ?? 1);
      const bounds = Object.fromEntries(Object.entries(sizes).map(([name, size]) => [name, bound(name, size)]));
      const graph = new loaded.Graph();
      build(loaded, graph, (name) => graph.dim(name, bounds[name]));
      program = loaded.Program.compile(graph, this.#engine);
      // A run under way keeps what it needs.
      known?.program.dispose();
      const used = weights.filter((weight) => weight !== undefined);
      this.#programs.set(key, { program, bounds, weights: used });
    }
    return program!.run({ dims: sizes, feeds: given, ...(signal && { signal }) });
  }

  #forget(weight: Weight): void {
    this.#weights.delete(weight);
    for (const [key, { program, weights }] of this.#programs) {
      if (!weights.includes(weight)) continue;
      program.dispose();
      this.#programs.delete(key);
    }
  }

  #alive(api: string): void {
    if (this.disposed) throw new DisposedError(`[${api}] the kernels were disposed`);
  }

  /** The extents of a matrix that belongs to this object. */
  #matrix(api: string, name: string, weight: Weight): readonly number[] {
    this.#own(api, name, weight);
    if (weight.shape.length === 2) return weight.shape;
    throw new InvalidArgumentError(`[${api}] ${name} must be a matrix [outputs, inputs], got [${weight.shape}]`);
  }

  /** Throws unless a weight is absent or of this shape. */
  #fits(api: string, name: string, weight: Weight | undefined, shape: readonly number[]): void {
    if (weight === undefined) return;
    this.#own(api, name, weight);
    if (weight.shape.length === shape.length && weight.shape.every((extent, i) => extent === shape[i])) return;
    throw new InvalidArgumentError(`[${api}] ${name} must be [${shape}], got [${weight.shape}]`);
  }

  #own(api: string, name: string, weight: unknown): asserts weight is Weight {
    if (!(weight instanceof Weight)) {
      throw new InvalidArgumentError(
        `[${api}] ${name} must be a Weight, made by kernels.weight(data, shape), got ${describe(weight)}`,
      );
    }
    if (weight.disposed) throw new DisposedError(`[${api}] ${name} was disposed`);
    if (!this.#weights.has(weight)) {
      throw new InvalidArgumentError(`[${api}] ${name} belongs to other kernels: make it with this object's weight()`);
    }
  }
}

/** The next power of two: the size that memory is planned for. */
const planned = (size: number): number => Math.min(2 ** Math.ceil(Math.log2(size)), 0x7fffffff);

const costOf = ({ counters, ms }: RunResult): Cost => ({
  flops: Object.values(counters).reduce((sum, { flops }) => sum + flops, 0),
  ms,
});
