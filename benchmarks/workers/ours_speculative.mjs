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

/** Milliseconds per token after the first, and acceptance, of texts decoded with each of these options in turns. */
async function decode(options, batchMs) {
  const { prompt, maxTokens } = setting;
  const sums = options.map(() => ({ ms: 0, acceptance: null }));
  const start = performance.now();
  let turns = 0;
  do {
    for (const [i, speculative] of options.entries()) {
      const stream = model.generate(prompt, { maxTokens, ...(speculative && { speculative }) });
      const ids = (await stream.ids).join();
      firstIds ??= ids;
      if (ids !== firstIds) throw new Error('drafts change the text');
      const { compute } = await stream.usage;
      sums[i].ms += compute.ms.decode / (maxTokens - 1);
      sums[i].acceptance = compute.speculative?.acceptance ?? null;
    }
    turns++;
  } while (performance.now() - start < batchMs);
  return sums.map(({ ms, acceptance }) => ({ ms: ms / turns, acceptance }));
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
  /** Milliseconds per token after the first, of plain decoding. */
  async plain({ batchMs }) {
    return { ms: (await decode([null], batchMs))[0].ms };
  },
  /**
   * Time of decoding with drafts over that of plain decoding, of texts that take turns: the machine's speed drifts more than they
   * differ. `count`: tokens drafted or 'auto'.
   */
  async ratio({ draft, count, batchMs }) {
    const [plain, drafted] = await decode([null, { draft: drafts[draft], tokens: count }], batchMs);
    return { ms: drafted.ms / plain.ms, acceptance: drafted.acceptance };
  },
});
