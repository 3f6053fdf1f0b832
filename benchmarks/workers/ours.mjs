// elastiform itself: products, prefill, decode and routed programs, built by the same code that `generate` runs.
import { capacityFeeds } from '../../dist/distill/steps.js';
import { policyOf } from '../../dist/elastic/elastify.js';
import { routerPlaces } from '../../dist/elastic/policy.js';
import { trainingSelector } from '../../dist/elastic/rows.js';
import { Graph, gatherRows, linear, linearAdd, Program } from '../../dist/graph/index.js';
import { defaultCacheBytes, KeyValueCache } from '../../dist/infer/engine/cache.js';
import { Scheduler } from '../../dist/infer/engine/scheduler.js';
import { Generation, Sequence } from '../../dist/infer/engine/sequence.js';
import { ElasticModel } from '../../dist/infer/model.js';
import { loadNetwork } from '../../dist/infer/network.js';
import { compilePrefill } from '../../dist/infer/programs.js';
import { attentionBlock, feedForwardBlock } from '../../dist/model/blocks.js';
import { decoder, finalNorm } from '../../dist/model/decoder.js';
import { selectEverything } from '../../dist/model/select.js';
import { bindWeights } from '../../dist/model/weights.js';
import { Engine, loadAddon, Tensor } from '../../dist/native/index.js';
import { batch, encode, serve } from '../harness/serve.mjs';
import { fill, generator, tokens } from '../model/random.mjs';

const facts = () => {
  const { version, isa, threads } = loadAddon().info();
  return { version, isa, threads };
};
const random = (length, seed, spread = 0.03) => {
  const values = new Float32Array(length);
  fill(values, generator(seed), 0, spread);
  return values;
};
const dense = { full: true, thresholds: new Map() };
const greedy = Float32Array.of(0, 0, 1, 0); // temperature, top-k, top-p, random number
const range = (start, count) => Int32Array.from({ length: count }, (_, i) => start + i);

// ---- products ----

let engine;
const products = [];

// A program over `copies` weights, so that they come from memory; of every result one row is kept alive.
function productProgram(copies, seed, build) {
  const graph = new Graph();
  const kept = graph.feed('kept', 'i32', [1]);
  for (let i = 0; i < copies; i++) graph.output(`y${i}`, gatherRows(build(graph, i, seed + i), kept));
  return Program.compile(graph, engine);
}

const weight = (shape, seed) => Tensor.fromData('f32', shape, random(shape[0] * shape[1], seed));

async function runProduct({ program, feeds, copies }, batchMs) {
  let inside = 0;
  const { calls } = await batch(batchMs, async () => {
    inside += (await program.run({ feeds })).ms;
  });
  return { ms: inside / calls / copies, calls };
}

// ---- inference ----

let network;
let scheduler;

function stepFeeds(ids, start) {
  return {
    dims: { rows: ids.length },
    feeds: {
      ids: Int32Array.from(ids),
      positions: range(start, ids.length),
      offsets: Int32Array.of(0, ids.length),
      slots: Int32Array.of(0),
      last: Int32Array.of(ids.length - 1),
    },
  };
}

// The tokens of a prompt and those after it, run as `generate` runs them: milliseconds of each part.
async function timeText(prompt, next) {
  const { signal } = new AbortController();
  const sequence = new Sequence(scheduler, { point: dense, adapter: 0 });
  await sequence.admit(prompt.length + next.length, signal);
  sequence.ids.push(...prompt, ...next);
  const options = { temperature: 0, topK: 0, topP: 1, seed: 0, given: prompt.length, signal };
  const generation = new Generation(network, sequence, options);
  const times = [performance.now()];
  for (let rows = prompt.length; rows <= sequence.ids.length; rows++) {
    await generation.read(rows);
    if (rows === prompt.length) times.push(performance.now());
  }
  times.push(performance.now());
  sequence.leave();
  sequence.release();
  return { prefill: times[1] - times[0], decode: times[2] - times[1] };
}

// ---- routing ----

const routed = {};

const policyAt = (recipe) => policyOf({ kind: 'elastiformer', ...recipe }, network.spec);
const TOKENS = { attn: 0.5, mlp: 0.5 };
const BLOCKS = { count: 8, share: 0.5 };
const MANY_BLOCKS = { count: 16, share: 0.5 };
const TILED_BLOCKS = { ...MANY_BLOCKS, tile: 32 };
const HEADS = { group: 'head', share: 0.5 };

// Top-k selection in every layer at the given places; routers are random, so that the rows chosen are spread out.
function routeAll(graph, segments, policy) {
  const known = new Map();
  const outputsOf = new Map(routerPlaces(policy).map(({ id, outputs }) => [id, outputs]));
  const routers = (id) => {
    if (!known.has(id)) {
      const outputs = outputsOf.get(id);
      known.set(id, {
        weight: graph.weight(weight([outputs, network.spec.hidden], 1000 + known.size)),
        bias: graph.weight(Tensor.fromData('f32', [outputs], new Float32Array(outputs))),
      });
    }
    return known.get(id);
  };
  return trainingSelector(graph, policy, routers, segments);
}

// A model with random routers at every place. Their scores over normalised rows are spread like a logistic distribution of
// this scale, near enough for thresholds; what share they let through is counted, not assumed.
function withRouters(scale) {
  const policy = policyAt({ tokens: TOKENS });
  const places = routerPlaces(policy);
  const routers = places.map(({ id }, i) => [
    id,
    { weight: weight([1, network.spec.hidden], 2000 + i), bias: Tensor.fromData('f32', [1], new Float32Array(1)) },
  ]);
  const points = 65;
  const quantiles = Float32Array.from({ length: points }, (_, j) => {
    const q = (j + 0.5) / points;
    return scale * Math.log(q / (1 - q));
  });
  const calibration = {
    ...{ path: [places.map(() => 1), places.map(() => 0)], capacities: [1], points, tokens: 1, sequenceLength: 64 },
    quantiles: new Map(places.map(({ id }) => [id, quantiles])),
  };
  return new ElasticModel({ ...network, policy: { ...policy, calibration }, routers: new Map(routers) });
}

await serve({
  // Products x[m,k] w[n,k]^T of `shapes`, prefixes of a feed-forward layer's width, and low-rank patches: a product
  // without, with, and with the patch added by a second product.
  products({ threads, shapes, copies, slices, patches }) {
    loadAddon().setThreads(threads);
    engine = new Engine();
    for (const [m, k, n] of shapes) {
      const program = productProgram(copies, 1, (graph, i, seed) =>
        linear(graph.feed('x', 'f32', [m, k]), graph.weight(weight([n, k], seed), `w${i}`)),
      );
      products.push({ program, copies, feeds: { x: random(m * k, 99, 1), kept: Int32Array.of(0) } });
    }
    const { rows, hidden, ffn, widths } = slices;
    const up = Array.from({ length: copies }, (_, i) => weight([ffn, hidden], 1 + i));
    const down = Array.from({ length: copies }, (_, i) => weight([hidden, ffn], 51 + i));
    const x = random(rows * hidden, 98, 1);
    for (const width of widths) {
      const upProgram = productProgram(copies, 0, (graph, i) =>
        linear(graph.feed('x', 'f32', [rows, hidden]), graph.weight(up[i]), { width, act: 'gelu_tanh' }),
      );
      products.push({ program: upProgram, copies, feeds: { x, kept: Int32Array.of(0) } });
      const downProgram = productProgram(copies, 0, (graph, i) =>
        linearAdd(graph.feed('x', 'f32', [rows, hidden]), graph.feed('h', 'f32', [rows, width]), graph.weight(down[i])),
      );
      products.push({
        program: downProgram,
        copies,
        feeds: { x, h: random(rows * width, 97, 1), kept: Int32Array.of(0) },
      });
    }
    const { rank } = patches;
    for (const [m, k, n] of patches.shapes) {
      const weights = Array.from({ length: copies }, (_, i) => weight([n, k], 1 + i));
      const bs = Array.from({ length: copies }, () => Tensor.alloc('f32', [n, rank]));
      for (const b of bs) b.write(random(n * rank, 2));
      for (const way of patches.ways) {
        const program = productProgram(copies, 0, (graph, i) => {
          const x = graph.feed('x', 'f32', [m, k]);
          const patch = { u: graph.feed('u', 'f32', [m, rank]), b: graph.state(bs[i]) };
          if (way === 'patch') return linear(x, graph.weight(weights[i]), { patch });
          const y = linear(x, graph.weight(weights[i]));
          return way === 'second product' ? linearAdd(y, patch.u, patch.b) : y;
        });
        const u = way === 'none' ? {} : { u: random(m * rank, 95, 1) };
        products.push({ program, copies, feeds: { x: random(m * k, 99, 1), ...u, kept: Int32Array.of(0) } });
      }
    }
    return facts();
  },
  product: ({ index, batchMs }) => runProduct(products[index], batchMs),

  async load({ dir, threads, dtype }) {
    network = await loadNetwork(dir, { dtype, threads, maxContext: 1024 });
    scheduler = new Scheduler(network);
    return { ...facts(), settings: `${dtype} weights, KV cache, next token sampled natively` };
  },
  async logits({ prompt, next }) {
    const cache = new KeyValueCache(network, 1, defaultCacheBytes(network, 1));
    const keys = cache.open(dense);
    await cache.reserve(keys, prompt.length + next.length);
    cache.bind(keys);
    cache.sync();
    const graph = new Graph();
    const rows = graph.dim('rows', prompt.length);
    const weights = bindWeights(graph, network.weights);
    const inputs = {
      ids: graph.feed('ids', 'i32', [rows]),
      positions: graph.feed('positions', 'i32', [rows]),
      offsets: graph.feed('offsets', 'i32', [2]),
      caches: cache.caches(graph, graph.feed('slots', 'i32', [1])),
    };
    const x = decoder(graph, network.spec, weights, inputs);
    graph.output('logits', linear(finalNorm(network.spec, weights, x, graph.feed('last', 'i32', [1])), weights.head));
    const program = Program.compile(graph, network.engine);
    const prefill = (await program.run(stepFeeds(prompt, 0))).outputs.logits;
    let last;
    for (const [i, id] of next.entries()) last = (await program.run(stepFeeds([id], prompt.length + i))).outputs.logits;
    program.dispose();
    cache.dispose();
    return { prefill: encode(prefill), decode: encode(last) };
  },
  prefill: async ({ prompt }) => ({ ms: (await timeText(prompt, [])).prefill }),
  decode: async ({ prompt, next }) => ({ ms: (await timeText(prompt, next)).decode / next.length }),

  // Whole model, and layers of one kind alone, dense and with every layer routed; feed-forwards of `few` rows of one sequence.
  async routed({ dir, threads, rows, few }) {
    network = await loadNetwork(dir, { dtype: 'f32', threads, maxContext: 1024 });
    const { spec } = network;
    const offsets = Int32Array.of(0, rows);
    const model = {
      ids: tokens(rows, spec.vocab, 5),
      positions: range(0, rows),
      offsets,
      last: Int32Array.of(rows - 1),
      sampling: greedy,
    };
    const dims = { rows, segments: 1, offsets: 2 };
    const whole = (select) => compilePrefill(network, { rows, segments: 1 }, select);
    const wholeRouted = (recipe, capacity = 0.5) => {
      const policy = policyAt(recipe);
      return {
        program: whole((graph, _, segments) => routeAll(graph, segments, policy)),
        dims,
        feeds: { ...model, ...capacityFeeds(policy, 1, () => capacity) },
      };
    };
    routed.model = {
      dense: { program: whole(() => selectEverything), dims, feeds: model },
      routed: wholeRouted({ tokens: TOKENS, keys: 'selected' }),
      'routed, all keys': wholeRouted({ tokens: TOKENS }),
      routers: wholeRouted({ tokens: TOKENS }, 1),
      heads: wholeRouted({ heads: HEADS }),
      blocks: wholeRouted({ blocks: BLOCKS }),
    };
    const layersOnly = (block, rows, select) => {
      const graph = new Graph();
      const weights = bindWeights(graph, network.weights);
      const context = {
        graph,
        spec,
        positions: graph.feed('positions', 'i32', [rows]),
        offsets: graph.feed('offsets', 'i32', [2]),
        selector: select(graph),
        keys: new Map(),
      };
      let x = graph.feed('x', 'f32', [rows, spec.hidden]);
      weights.layers.forEach((layer, i) => {
        x = block(context, i, x, layer);
      });
      graph.output('kept', gatherRows(x, graph.feed('kept', 'i32', [1])));
      return Program.compile(graph, network.engine);
    };
    // Layers of one kind, with routers by a recipe or without.
    const layers = (block, rows, recipe) => {
      const policy = recipe && policyAt(recipe);
      return {
        program: layersOnly(block, rows, (graph) => (policy ? routeAll(graph, 1, policy) : selectEverything)),
        dims: {},
        feeds: {
          ...{ x: random(rows * spec.hidden, 96, 1), positions: range(0, rows) },
          ...{ offsets: Int32Array.of(0, rows), kept: Int32Array.of(0) },
          ...(policy && capacityFeeds(policy, 1, () => 0.5)),
        },
      };
    };
    routed.ffn = {
      dense: layers(feedForwardBlock, rows),
      routed: layers(feedForwardBlock, rows, { tokens: { mlp: 0.5 } }),
      blocks: layers(feedForwardBlock, rows, { blocks: BLOCKS }),
      'many blocks': layers(feedForwardBlock, rows, { blocks: MANY_BLOCKS }),
    };
    routed.few = {
      dense: layers(feedForwardBlock, few),
      'many blocks': layers(feedForwardBlock, few, { blocks: MANY_BLOCKS }),
      'many blocks, tiles': layers(feedForwardBlock, few, { blocks: TILED_BLOCKS }),
    };
    routed.attention = {
      dense: layers(attentionBlock, rows),
      heads: layers(attentionBlock, rows, { heads: HEADS }),
    };
    return facts();
  },
  // Texts at different budgets, scored in one call or one after the other.
  async mixed({ texts, length, capacities }) {
    const model = withRouters(0.45);
    const inputs = Array.from({ length: texts }, (_, i) => [...tokens(length, network.spec.vocab, 50 + i)]);
    const budgets = inputs.map((_, i) => {
      const share = capacities[i % capacities.length];
      return share === 1 ? 'full' : { spec: { tokenCapacity: { attn: share, mlp: share } } };
    });
    const score = {
      together: () => model.score(inputs, { budget: budgets }),
      alone: async () => {
        const results = [];
        for (const [i, ids] of inputs.entries()) results.push(...(await model.score([ids], { budget: budgets[i] })));
        return results;
      },
    };
    routed.mixed = score;
    const [together, alone] = [await score.together(), await score.alone()];
    for (const [i, { logprobs }] of together.entries()) {
      if (logprobs.some((p, t) => !Object.is(p, alone[i].logprobs[t])))
        throw new Error('a mixed batch changes results');
    }
    const mean = (results) => results.reduce((sum, r) => sum + r.usage.compute.ratio, 0) / texts;
    return { together: mean(together), alone: mean(alone) };
  },
  mixedRun: ({ mode, batchMs }) => batch(batchMs, routed.mixed[mode]),
  async routedRun({ what, mode, batchMs }) {
    const { program, dims, feeds } = routed[what][mode];
    let counters;
    const result = await batch(batchMs, async () => {
      ({ counters } = await program.run({ dims, feeds }));
    });
    const flops = Object.values(counters).reduce((sum, c) => sum + c.flops, 0);
    return { ...result, flops };
  },
});
