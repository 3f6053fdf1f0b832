// elastiform's generation engine: many texts of the benchmark model at once, or one after the other, and what keys take.
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
    };
    [texts, maxTokens] = [prompts, tokens];
    const { version, isa, threads: used } = loadAddon().info();
    return { version, isa, threads: used, settings: 'f32 weights, f32 keys and values' };
  },
  /** Milliseconds per token generated, prompts included. `together`: all texts at once. */
  async generate({ together }) {
    const start = performance.now();
    const ids = together ? await Promise.all(texts.map(generate)) : [];
    if (!together) for (const text of texts) ids.push(await generate(text));
    return { ms: (performance.now() - start) / (texts.length * maxTokens), ids };
  },
  /** Bytes of the keys and values of a text, with all layers' attention and with half of it. */
  async bytes({ prompt }) {
    const used = {};
    for (const [name, budget] of Object.entries(budgets)) {
      const state = await model.prefill(prompt, { budget });
      used[name] = model.load().kvCacheUsed;
      state.dispose();
    }
    return { ...used, left: model.load().kvCacheUsed };
  },
  /** Milliseconds per token after a long prompt, at a budget. */
  async decode({ prompt, budget, tokens }) {
    const stream = model.generate(prompt, { maxTokens: tokens + 1, budget: budgets[budget] });
    const { compute } = await stream.usage;
    return { ms: compute.ms.decode / tokens };
  },
});
