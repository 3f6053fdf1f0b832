// elastiform's generation engine: many texts of the benchmark model at once, or one after the other, and a long text whose
// attention runs in all layers, in half of them or in none.
import { policyOf } from '../../dist/elastic/elastify.js';
import { routerPlaces } from '../../dist/elastic/policy.js';
import { ElasticModel } from '../../dist/infer/model.js';
import { loadNetwork } from '../../dist/infer/network.js';
import { loadAddon } from '../../dist/native/index.js';
import { serve } from '../harness/serve.mjs';

let model;
let texts;
let maxTokens;
let budgets;
let states; // of the long text, at each budget

const generate = async (prompt) => [...(await model.generate(prompt, { maxTokens }).ids)];

await serve({
  async load({ dir, threads, prompts, tokens, context }) {
    const maxContext = Math.max(context, prompts[0].length + tokens);
    const network = await loadNetwork(dir, { dtype: 'f32', threads, maxContext, maxSequences: prompts.length });
    const { spec } = network;
    const policy = policyOf([{ kind: 'elastiformer', tokens: { attn: 0.5, mlp: 0.5 } }], spec);
    const places = routerPlaces(policy);
    // Capacities are 0 and 1: no router runs, and none needs quantiles.
    const calibration = {
      ...{ path: [places.map(() => 1)], capacities: [1], points: 2, tokens: 1, sequenceLength: 64 },
      quantiles: new Map(places.map(({ id }) => [id, Float32Array.of(0, 1)])),
    };
    model = new ElasticModel({ ...network, policy: { ...policy, calibration }, endIds: new Set() });
    const all = new Array(spec.layers).fill(1);
    budgets = {
      full: 'full',
      half: { spec: { tokenCapacity: { attn: all.map((_, layer) => layer % 2), mlp: all } } },
      no: { spec: { tokenCapacity: { attn: all.map(() => 0), mlp: all } } },
    };
    [texts, maxTokens] = [prompts, tokens];
    const { version, isa, threads: used } = loadAddon().info();
    return { version, isa, threads: used, settings: 'f32 weights, f32 keys and values' };
  },
  /** Milliseconds per token generated, prompts included. `together`: all texts at once; else the first `alone` one by one. */
  async generate({ together, alone }) {
    const chosen = together ? texts : texts.slice(0, alone);
    const start = performance.now();
    const ids = together ? await Promise.all(chosen.map(generate)) : [];
    if (!together) for (const text of chosen) ids.push(await generate(text));
    return { ms: (performance.now() - start) / (chosen.length * maxTokens), ids };
  },
  /** Reads a text at every budget and keeps it; bytes of its keys and values, and of nobody's before. */
  async keep({ prompt }) {
    states = {};
    const bytes = { nobody: model.load().kvCacheUsed };
    for (const [name, budget] of Object.entries(budgets)) {
      const before = model.load().kvCacheUsed;
      states[name] = await model.prefill(prompt, { budget });
      bytes[name] = model.load().kvCacheUsed - before;
    }
    return bytes;
  },
  /** Milliseconds that reading a text takes. */
  async read({ prompt, budget }) {
    const start = performance.now();
    (await model.prefill(prompt, { budget: budgets[budget] })).dispose();
    return { ms: performance.now() - start };
  },
  /** Milliseconds per token after the kept text. */
  async decode({ budget, tokens }) {
    const state = states[budget].fork();
    const { compute } = await state.generate([1], { maxTokens: tokens + 1 }).usage;
    state.dispose();
    return { ms: compute.ms.decode / tokens };
  },
});
