// elastiform on a GPU: small programs built as models build them, timed by events on the device.
import { batchRun } from '../../dist/distill/batches.js';
import { lossFeeds, resolveLosses } from '../../dist/distill/objectives.js';
import { trainablePlan } from '../../dist/distill/plan.js';
import { capacityFeeds, trainProgram } from '../../dist/distill/steps.js';
import { Trainable } from '../../dist/distill/trainable.js';
import { policyOf } from '../../dist/elastic/elastify.js';
import { trainingSelector } from '../../dist/elastic/rows.js';
import {
  adamw,
  attention,
  divergence,
  Graph,
  gradients,
  linear,
  linearAdd,
  linearGated,
  Program,
  rmsNorm,
  routeTopk,
  sumRows,
} from '../../dist/graph/index.js';
import { feedForwardBlock } from '../../dist/model/blocks.js';
import { selectEverything } from '../../dist/model/select.js';
import { specFromConfig } from '../../dist/model/spec.js';
import { weightsByName } from '../../dist/model/weights.js';
import { Engine, loadAddon, Tensor } from '../../dist/native/index.js';
import { serve } from '../harness/serve.mjs';
import { fill, generator, tokens } from '../model/random.mjs';

const TURN_MS = 20; // of device time that a turn aims at
const EPS = 1e-5;

let settings;
let engine;
let cases = {};
let owned = [];
const own = (thing) => {
  owned.push(thing);
  return thing;
};

// ---- data: random, never zeros, which run faster than real values

const block = new Float32Array(1 << 20);
fill(block, generator(20240613), 0, 1);
const weightBits = Uint16Array.from(new Uint32Array(block.map((x) => x / 32).buffer), (bits) => bits >>> 16);
let starts = 0;

/** `length` values of the block, begun elsewhere at every call. */
function random(length, from = block) {
  const values = new from.constructor(length);
  let at = (starts++ * 7919) % from.length;
  for (let done = 0; done < length; ) {
    const part = from.subarray(at, Math.min(from.length, at + length - done));
    values.set(part, done);
    done += part.length;
    at = 0;
  }
  return values;
}
const size = (shape) => shape.reduce((product, n) => product * n, 1);
/** bf16, uniform in +-1/32, about what models begin with. */
const matrix = (...shape) => own(Tensor.fromData('bf16', shape, random(size(shape), weightBits)));
const ones = (n) => own(Tensor.fromData('f32', [n], new Float32Array(n).fill(1)));
/** Values that stay on the device between runs. */
function resident(...shape) {
  const tensor = own(Tensor.alloc('f32', shape));
  tensor.write(random(size(shape)));
  return tensor;
}

// ---- timing

const compile = (graph) => own(Program.compile(graph, engine));

/** Keeps row `row` of x from being left out, for next to nothing; x may stay bf16. */
const keep = (graph, name, x, row = 'kept') => graph.output(name, sumRows(x, graph.feed(row, 'i32', [1])));
const keptRows = (count) => Object.fromEntries(Array.from({ length: count }, (_, i) => [`kept${i}`, Int32Array.of(i)]));

/** Device milliseconds of `calls` runs, after one that is not counted when they are short. */
async function deviceTimes(program, run, calls, divide = 1) {
  if (calls > 1) await program.run(run);
  const samples = [];
  for (let i = 0; i < calls; i++) samples.push((await program.run(run)).deviceMs / divide);
  return samples;
}

const SLOW_MS = 100; // what takes longer runs once a turn, and needs no warm-up
const callsFor = (ms) => Math.max(ms > SLOW_MS ? 1 : 3, Math.min(50, Math.round(TURN_MS / Math.max(ms, 0.01))));

/** A case timed as a whole. */
async function timed(program, run, divide = 1) {
  await program.run(run);
  const { deviceMs } = await program.run(run);
  return { calls: callsFor(deviceMs), turn: (calls) => deviceTimes(program, run, calls, divide) };
}

/**
 * Time of one op: the difference of programs with `many` and with `few`, which are otherwise alike. `build(graph, i)`
 * returns the value of the i-th op, or null where it is an output already.
 */
async function slope(few, many, build, feeds = {}) {
  const program = (count) => {
    const graph = new Graph();
    const results = Array.from({ length: count }, (_, i) => build(graph, i));
    // As many consumers in both programs.
    for (let i = 0; i < many; i++) {
      if (results[i % count]) keep(graph, `y${i}`, results[i % count], `kept${i}`);
    }
    const given = [...graph.feeds.keys()];
    const all = { ...keptRows(many), ...feeds };
    return { program: compile(graph), run: { feeds: Object.fromEntries(given.map((name) => [name, all[name]])) } };
  };
  const [short, long] = [program(few), program(many)];
  for (const p of [short, long]) await p.program.run(p.run);
  const { deviceMs } = await long.program.run(long.run);
  return {
    calls: callsFor(2 * deviceMs),
    async turn(calls) {
      const samples = [];
      await short.program.run(short.run);
      for (let i = 0; i < calls; i++) {
        const times = [];
        for (const p of [short, long]) times.push((await p.program.run(p.run)).deviceMs);
        samples.push((times[1] - times[0]) / (many - few));
      }
      return samples;
    },
  };
}

/** A case whose programs are recorded without branches, whenever that is. */
async function inChain(make) {
  const chained = async (body) => {
    process.env.ELASTIFORM_CUDA_BRANCHES = '1';
    try {
      return await body();
    } finally {
      delete process.env.ELASTIFORM_CUDA_BRANCHES;
    }
  };
  const made = await chained(make);
  return { ...made, turn: (calls) => chained(() => made.turn(calls)) };
}

// ---- feed-forward layers, as blocks of a model

const ffnSpec = ({ hidden, ffn, gated, layers }) =>
  specFromConfig(
    gated
      ? {
          model_type: 'llama',
          num_hidden_layers: layers,
          hidden_size: hidden,
          intermediate_size: ffn,
          num_attention_heads: 1,
          vocab_size: 8,
          rms_norm_eps: EPS,
        }
      : { model_type: 'gpt2', n_layer: layers, n_embd: hidden, n_inner: ffn, n_head: 1, vocab_size: 8 },
    'benchmark',
  );

function ffnWeights(spec) {
  const affine = (out, input) => ({
    weight: matrix(out, input),
    ...(spec.mlpBias && { bias: own(Tensor.fromData('f32', [out], random(out))) }),
  });
  return Array.from({ length: spec.layers }, () => ({
    norm2: {
      weight: ones(spec.hidden),
      ...(spec.norm === 'layer' && { bias: own(Tensor.fromData('f32', [spec.hidden], random(spec.hidden))) }),
    },
    ...(spec.gated && { gate: affine(spec.ffn, spec.hidden) }),
    up: affine(spec.ffn, spec.hidden),
    down: affine(spec.hidden, spec.ffn),
  }));
}

const bind = (graph, value) => {
  if (value instanceof Tensor) return graph.weight(value);
  return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, bind(graph, part)]));
};

function ffnPrograms(shape) {
  const spec = ffnSpec(shape);
  const { rows, layers, hidden, capacity, blocks } = shape;
  const weights = ffnWeights(spec);
  const x = resident(rows, hidden);
  const places = blocks ? { blocks: { count: blocks, share: capacity } } : { tokens: { mlp: capacity } };
  const policy = policyOf({ kind: 'elastiformer', ...places }, spec);
  const choices = blocks ?? 1;
  const routers = Array.from({ length: layers }, () => ({
    weight: matrix(choices, hidden),
    bias: own(Tensor.fromData('f32', [choices], new Float32Array(choices))),
  }));
  const feeds = { positions: new Int32Array(rows), offsets: Int32Array.of(0, rows), kept: Int32Array.of(0) };
  const program = (select) => {
    const graph = new Graph();
    const context = {
      graph,
      spec,
      positions: graph.feed('positions', 'i32', [rows]),
      offsets: graph.feed('offsets', 'i32', [2]),
      selector: select(graph),
    };
    let y = graph.state(x);
    weights.forEach((layer, i) => {
      y = feedForwardBlock(context, i, y, bind(graph, layer));
    });
    keep(graph, 'y', y);
    return compile(graph);
  };
  const route = (graph) => trainingSelector(graph, policy, (id) => bind(graph, routers[Number(id.split('.')[1])]), 1);
  return {
    dense: { program: program(() => selectEverything), run: { feeds } },
    routed: { program: program(route), run: { feeds: { ...feeds, ...capacityFeeds(policy, 1, () => capacity) } } },
  };
}

// ---- groups: key -> a case with `turn`

const groups = {
  async gemm({ rows, few, many, products }, add) {
    for (const [name, [k, n]] of Object.entries(products)) {
      await add(name, async () => {
        const [x, scale] = [resident(rows, k), ones(k)];
        const w = Array.from({ length: many }, () => matrix(n, k));
        return slope(few, many, (graph, i) =>
          linear(rmsNorm(graph.state(x), graph.weight(scale), { eps: EPS }), graph.weight(w[i])),
        );
      });
    }
  },
  async 'ffn large'(shape, add) {
    const programs = ffnPrograms(shape);
    for (const [name, { program, run }] of Object.entries(programs)) {
      await add(name, () => timed(program, run, shape.layers));
    }
    return programs;
  },
  async 'ffn small'(shape, add) {
    const { routed } = await groups['ffn large'](shape, add);
    await add('cpu', () => cpuTime(routed));
  },
  async blocks(shape, add) {
    const { dense, routed } = ffnPrograms(shape);
    await add('dense', () => timed(dense.program, dense.run, shape.layers));
    await add('blocks', () => timed(routed.program, routed.run, shape.layers));
    const { routed: chain } = ffnPrograms(shape);
    await add('blocks in a chain', () => inChain(() => timed(chain.program, chain.run, shape.layers)));
  },
  async slices({ rows, hidden, ffn, layers, shares }, add) {
    const [x, scale] = [resident(rows, hidden), ones(hidden)];
    const layer = () => [matrix(ffn, hidden), matrix(ffn, hidden), matrix(hidden, ffn)];
    const weights = Array.from({ length: layers }, layer);
    for (const share of [1, ...shares]) {
      await add(`${share}`, async () => {
        const graph = new Graph();
        let y = graph.state(x);
        for (const tensors of weights) {
          const [gate, up, down] = tensors.map((tensor) => graph.weight(tensor));
          const normed = rmsNorm(y, graph.weight(scale), { eps: EPS });
          y = linearAdd(y, linearGated(normed, gate, up, { act: 'silu', width: Math.round(share * ffn) }), down);
        }
        keep(graph, 'y', y);
        return timed(compile(graph), { feeds: { kept: Int32Array.of(0) } }, layers);
      });
    }
  },
  async topk({ rows, capacity, few, many }, add) {
    await add('topk', async () => {
      const scores = Array.from({ length: many }, () => resident(rows, 1));
      const feeds = { offsets: Int32Array.of(0, rows), capacity: Float32Array.of(capacity) };
      return slope(
        few,
        many,
        (graph, i) => {
          const given = [graph.feed('offsets', 'i32', [2]), graph.feed('capacity', 'f32', [1])];
          graph.output(`offsets${i}`, routeTopk(graph.state(scores[i]), ...given).offsets);
          return null;
        },
        feeds,
      );
    });
  },
  async attention({ rows, segments, heads, kvHeads, headDim, few, many }, add) {
    const [q, k, v] = [heads, kvHeads, kvHeads].map((n) => [resident(rows, n * headDim), ones(n * headDim)]);
    for (const count of segments) {
      await add(`${count}x${rows / count}`, () => {
        const offsets = Int32Array.from({ length: count + 1 }, (_, i) => (i * rows) / count);
        return slope(
          few,
          many,
          (graph, i) => {
            // Scales that differ by nothing keep equal ops from being one.
            const scale = (1 + i * 2 ** -20) / Math.sqrt(headDim);
            const [a, b, c] = [q, k, v].map(([x, s]) => rmsNorm(graph.state(x), graph.weight(s), { eps: EPS }));
            const starts = graph.feed('offsets', 'i32', [count + 1]);
            return attention(a, b, c, starts, { heads, kvHeads, causal: true, scale });
          },
          { offsets },
        );
      });
    }
  },
  async loss({ rows, hidden, vocab }, add) {
    await add('loss', async () => {
      const [hs, ht, scale, head] = [
        resident(rows, hidden),
        resident(rows, hidden),
        ones(hidden),
        matrix(vocab, hidden),
      ];
      const graph = new Graph();
      const normed = (x) => rmsNorm(graph.state(x), graph.weight(scale), { eps: EPS });
      const [student, teacher] = [normed(hs), normed(ht)];
      const { loss } = divergence(student, teacher, graph.weight(head), graph.feed('weight', 'f32', [rows]));
      graph.output('loss', loss);
      const [dh] = gradients(loss, [student]);
      keep(graph, 'dh', dh);
      const before = loadAddon().memory().deviceBytes;
      const result = await timed(compile(graph), {
        feeds: { weight: new Float32Array(rows).fill(1 / rows), kept: Int32Array.of(0) },
      });
      // Beyond the head, and f32 values of both hidden states, normalised and not, and of the gradient.
      const given = 2 * vocab * hidden + 5 * 4 * rows * hidden;
      return { ...result, facts: { extraBytes: loadAddon().memory().deviceBytes - before - given } };
    });
  },
  async step(shape, add) {
    await add('step', async () => {
      const before = loadAddon().memory().deviceBytes;
      const spec = specFromConfig(shape.config, 'benchmark');
      const weights = weightsByName(spec, (_, dims) => (dims.length === 1 ? ones(dims[0]) : matrix(...dims)));
      const policy = policyOf(
        { kind: 'elastiformer', tokens: { attn: shape.capacity, mlp: shape.capacity }, keys: 'selected' },
        spec,
      );
      const trainable = own(new Trainable(trainablePlan(policy, spec)));
      // Routers that choose rows here and there; those of zeros would take the first.
      trainable.params.write(random(trainable.plan.size).map((value) => 0.02 * value));
      const { rows, segments } = shape;
      const model = { spec, weights, policy, trainable, engine, batchTokens: rows };
      const losses = resolveLosses([{ kind: 'kl', weight: 1 }], spec);
      const program = own(trainProgram(model, losses));
      const graph = new Graph();
      const [p, g, m, v] = ['params', 'grads', 'm', 'v'].map((name) => graph.state(trainable[name], name));
      graph.output('norm', adamw(p, g, m, v, graph.feed('hyper', 'f32', [8]), trainable.plan.decayCount));
      const update = compile(graph);
      const length = rows / segments;
      const sequences = {
        ids: tokens(rows, spec.vocab, 5),
        positions: Int32Array.from({ length: rows }, (_, i) => i % length),
        targets: new Int32Array(rows).fill(-1),
        offsets: Int32Array.from({ length: segments + 1 }, (_, i) => i * length),
      };
      const batch = batchRun(sequences);
      const capacity = () => shape.capacity;
      const feeds = {
        ...batch.feeds,
        ...capacityFeeds(policy, segments, capacity),
        ...lossFeeds(losses, policy, sequences, { step: 0, steps: 1, total: rows, capacity }),
      };
      const hyper = Float32Array.of(shape.lr, 0.9, 0.999, 1e-8, 0, 0, 0.1, 0.001);
      const facts = {};
      const step = async () => {
        const start = performance.now();
        const first = await program.run({ dims: batch.dims, feeds });
        const second = await update.run({ feeds: { hyper } });
        const ms = performance.now() - start;
        facts.deviceMs = first.deviceMs + second.deviceMs;
        facts.hostMs = first.hostMs + second.hostMs;
        facts.loss = first.outputs.loss[0];
        facts.flops = Object.values(first.counters).reduce((sum, counter) => sum + counter.flops, 0);
        return ms;
      };
      await step();
      const ms = await step();
      if (!Number.isFinite(facts.loss)) throw new Error(`the loss is ${facts.loss}`);
      facts.peakBytes = loadAddon().memory().deviceBytes - before;
      return {
        calls: callsFor(ms),
        facts,
        async turn(calls) {
          const samples = [];
          for (let i = 0; i < calls; i++) samples.push(await step());
          return samples;
        },
      };
    });
  },
};
/** Microseconds that a step costs the CPU: the call in JavaScript, and the engine's thread while it does not wait. */
async function cpuTime({ program, run }) {
  await program.run(run);
  return {
    calls: 50,
    unit: 'microseconds',
    async turn(calls) {
      const samples = [];
      for (let i = 0; i < calls; i++) {
        const start = performance.now();
        const running = program.run(run);
        const called = performance.now() - start;
        samples.push(1000 * (called + (await running).hostMs));
      }
      return samples;
    },
  };
}

function release() {
  for (const thing of owned.reverse()) thing.dispose();
  owned = [];
}

await serve({
  setup({ device }) {
    settings = { device };
    const { version, devices } = loadAddon().info();
    return { version, device: devices[device].description, activations: 'bf16' };
  },
  /** Prepares one or all cases of a group; key -> what is known of it, or why it does not run. */
  async group({ name, shape }) {
    // Engines keep memory for the largest program they have run: one for each group, or memory could not be told.
    engine?.dispose();
    engine = new Engine(settings.device, { activations: 'bf16' });
    const found = {};
    const add = async (key, make) => {
      try {
        cases[key] = await make();
        const { calls, facts = {}, unit = 'ms' } = cases[key];
        found[key] = { calls, facts, unit };
      } catch (error) {
        found[key] = { missing: error.message };
      }
    };
    await groups[name]?.(shape, add); // ceilings are the card's
    return found;
  },
  async turn({ key, calls }) {
    const samples = await cases[key].turn(calls ?? cases[key].calls);
    return { samples, facts: cases[key].facts ?? {} };
  },
  free() {
    cases = {};
    release();
    return true;
  },
});
