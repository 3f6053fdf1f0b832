// elastiform's speculative decoding: texts of a random model whose drafts can be made good or useless.
import { policyOf } from '../../dist/elastic/elastify.js';
import { routerPlaces } from '../../dist/elastic/policy.js';
import { ElasticModel } from '../../dist/infer/model.js';
import { loadNetwork } from '../../dist/infer/network.js';
import { loadAddon, Tensor } from '../../dist/native/index.js';
import { serve } from '../harness/serve.mjs';
import { fill, generator, tokens } from '../model/random.mjs';

let model;
let setting;
let firstIds;
const drafts = {};

// What the first units of every feed-forward add outweighs all else, so a draft of this width is nearly the whole model and one
// of embeddings alone is nothing like it.
function weigh({ weights, spec }, width, rest) {
  const { hidden, ffn } = spec;
  for (const [i, layer] of weights.layers.entries()) {
    const values = new Float32Array(hidden * ffn);
    fill(values, generator(3000 + i), 0, 1);
    for (let j = 0; j < values.length; j++) if (j % ffn >= width * ffn) values[j] *= rest;
    layer.down = { ...layer.down, weight: Tensor.fromData('f32', [hidden, ffn], values) };
  }
}

await serve({
  /** `width`: share of the units in the good draft, whose others weigh `rest`. The useless draft is embeddings alone. */
  async load({ dir, threads, width, rest, prompt, length }) {
    const network = await loadNetwork(dir, { dtype: 'f32', threads, maxContext: prompt + length });
    const { spec } = network;
    weigh(network, width, rest);
    const recipes = [
      { kind: 'elastiformer', tokens: { attn: 0.5, mlp: 0.5 } },
      { kind: 'matformer', granularities: [width, 1] },
    ];
    const policy = policyOf(recipes, spec);
    const places = routerPlaces(policy);
    // Capacities are 0 and 1: no router runs, and none needs quantiles.
    const calibration = {
      ...{ path: [places.map(() => 1)], capacities: [1], points: 2, tokens: 1, sequenceLength: 64 },
      quantiles: new Map(places.map(({ id }) => [id, Float32Array.of(0, 1)])),
    };
    model = new ElasticModel({ ...network, policy: { ...policy, calibration }, endIds: new Set() });
    const none = new Array(spec.layers).fill(0);
    drafts.good = { spec: { ffnWidth: width } };
    drafts.useless = { spec: { tokenCapacity: { attn: none, mlp: none } } };
    setting = { prompt: [...tokens(prompt, spec.vocab, 7)], maxTokens: length };
    const { version, isa, threads: used } = loadAddon().info();
    return { version, isa, threads: used, draftRatio: model.resolve(drafts.good).flopsRatio };
  },
  /** Milliseconds per token after the first. `count`: tokens drafted, 'auto', or null for plain decoding. */
  async decode({ draft, count, batchMs }) {
    const { prompt, maxTokens } = setting;
    const speculative = count === null ? false : { draft: drafts[draft], tokens: count };
    const start = performance.now();
    let ms = 0;
    let calls = 0;
    let acceptance = null;
    do {
      const stream = model.generate(prompt, { maxTokens, speculative });
      const ids = (await stream.ids).join();
      firstIds ??= ids;
      if (ids !== firstIds) throw new Error('drafts change the text');
      const { compute } = await stream.usage;
      ms += compute.ms.decode / (maxTokens - 1);
      acceptance = compute.speculative?.acceptance ?? null;
      calls++;
    } while (performance.now() - start < batchMs);
    return { ms: ms / calls, calls, acceptance };
  },
});
