// Families with norms of outputs, capped scores and windows: made elastic in every way, trained, and run at budgets.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { distill } from '../../lib/distill/distill.js';
import { pretrain } from '../../lib/distill/pretrain.js';
import type { Budget } from '../../lib/elastic/budget.js';
import { flopsRatio } from '../../lib/elastic/cost.js';
import { type ElastiformerRecipe, elastify } from '../../lib/elastic/elastify.js';
import { extract } from '../../lib/infer/export/extract.js';
import { loadModel } from '../../lib/infer/model.js';
import { evaluate } from '../../lib/infer/quality/evaluate.js';
import { projections } from '../../lib/model/select.js';
import { checkGreedy, stories, temporaryDirectory, tinyConfig, tinyDistilling, tinyPretraining } from './tiny.js';

const own = { head_dim: 16, query_pre_attn_scalar: 12, sliding_window: 6 };
const gemma2 = { ...tinyConfig, ...own, model_type: 'gemma2', attn_logit_softcapping: 4, final_logit_softcapping: 8 };
const gemma3 = {
  ...tinyConfig,
  ...own,
  model_type: 'gemma3_text',
  sliding_window_pattern: 3,
  rope_local_base_freq: 100,
};

/** Two layers that use keys and values of others, sparse feed-forwards, three residual streams. */
const gemma3n = {
  ...{ ...tinyConfig, ...own, model_type: 'gemma3n_text', vocab_size: 300, vocab_size_per_layer_input: 300 },
  ...{ num_hidden_layers: 4, num_kv_shared_layers: 2, activation_sparsity_pattern: [0.5, 0, 0.3, 0] },
  layer_types: ['sliding_attention', 'full_attention', 'sliding_attention', 'full_attention'],
  ...{ altup_num_inputs: 3, laurel_rank: 4, hidden_size_per_layer_input: 8 },
};

const cases: [string, Record<string, unknown>, Partial<ElastiformerRecipe>, Budget[]][] = [
  [
    'gemma2: tokens, heads, blocks and corrections',
    gemma2,
    {
      tokens: { attn: [0.4, 1], mlp: [0.4, 1] },
      heads: { group: 'head' },
      blocks: { count: 4 },
      lora: { rank: 1 },
    },
    [
      { spec: { tokenCapacity: { attn: 0.6, mlp: 0.7 } } },
      { spec: { headShare: 0.5, blockShare: 0.5 } },
      { spec: { headShare: [0.5, 1, 0.5], blockShare: [1, 0.5, 0.5], tokenCapacity: { attn: [0.5, 1, 0], mlp: 0.5 } } },
    ],
  ],
  [
    'gemma3: tokens, gates of which are not 1, with keys of their own',
    gemma3,
    { tokens: { attn: [0.4, 1], mlp: [0.4, 1] }, keys: 'selected', gate: 'raw' },
    [{ spec: { tokenCapacity: { attn: 0.6, mlp: 0.5 } } }, { spec: { tokenCapacity: { attn: [0, 1, 0.5] } } }],
  ],
  [
    'gemma3n: tokens of feed-forwards, and corrections',
    gemma3n,
    { tokens: { mlp: [0.4, 1] }, lora: { rank: 1, targets: ['q', 'k', 'v', 'o', 'gate', 'up', 'down'] } },
    [{ spec: { tokenCapacity: { mlp: 0.6 } } }, { spec: { tokenCapacity: { mlp: [0.5, 1, 0, 0.3] } } }],
  ],
];

describe.each(cases)('%s', (_, config, recipe, budgets) => {
  test('is the backbone at the full budget, and at others what each text gives alone', async () => {
    const root = temporaryDirectory();
    const [backbone, plan, out] = ['backbone', 'plan', 'run'].map((name) => join(root, name));
    await pretrain(tinyPretraining(backbone, { model: config, steps: 40 }));
    const caps = readFileSync(join(backbone, 'config.json'), 'utf8').match(/"\w+_softcapping": .*\d/g);
    if (config === gemma2) expect(caps).toEqual(['"attn_logit_softcapping": 4.0', '"final_logit_softcapping": 8.0']);
    await elastify(backbone, { kind: 'elastiformer', ...recipe }, { out: plan });
    await distill(tinyDistilling(plan, out, { steps: 20 }));
    await using model = await loadModel(out);
    await using plain = await loadModel(backbone);
    expect(model.info.architecture).toBe(config.model_type);
    const texts = [stories(4)[3], 'The owl', 'The pig hid the owl by the wood. The hen saw the fox.'];
    const ids = texts.map((text) => model.network.tokenizer!.encode(text));
    expect(ids[0].length).toBeGreaterThan(2 * own.sliding_window);
    expect(await model.logits(ids[0])).toEqual(await plain.logits(ids[0]));
    for (const budget of ['full', ...budgets]) {
      const together = await model.score(texts, { budget });
      for (const [i, text] of texts.entries()) {
        const [alone] = await model.score([text], { budget });
        expect(together[i].logprobs).toEqual(alone.logprobs);
        const off = Math.abs(together[i].usage.compute.flops / alone.usage.compute.flops - 1);
        expect(off).toBeLessThanOrEqual(recipe.lora ? 1e-3 : 0);
        expect(alone.usage.compute.ratio <= 1).toBe(true);
      }
      const { flops, flopsFull, ratio } = await checkGreedy(model, ids[0], budget);
      expect(ratio).toBeCloseTo(flops / flopsFull, 12);
      if (budget === 'full') expect(flops).toBe(flopsFull);
      else expect(ratio).toBeLessThan(1);
    }
  });
});

test('gemma3n: corrections of nested feed-forwards are trained, and merged into a slice', async () => {
  const root = temporaryDirectory();
  const [backbone, plan, run, slice] = ['backbone', 'plan', 'run', 'slice'].map((name) => join(root, name));
  await pretrain(tinyPretraining(backbone, { model: gemma3n, steps: 20 }));
  await elastify(
    backbone,
    { kind: 'matformer', granularities: [0.5, 1], lora: { rank: 2, targets: [...projections] } },
    { out: plan },
  );
  await distill(tinyDistilling(plan, run, { steps: 20 }));
  const { largestDifference, widths } = await extract(run, { budget: 'ffn50', out: slice });
  expect(widths).toEqual([32, 32, 32, 32]);
  expect(largestDifference).toBeGreaterThan(0);
  expect(largestDifference).toBeLessThan(1e-3);
  await using model = await loadModel(run);
  const { spec, policy } = model.network;
  const ids = model.network.tokenizer!.encode(stories(4)[3]);
  const [{ usage }] = await model.score([ids], { budget: 'ffn50' });
  expect(usage.compute.ratio).toBeCloseTo(flopsRatio(spec, policy!, [], ids.length, widths), 6);
  const kl = async (dir: string) => {
    const { levels } = await evaluate(dir, { data: stories(20), budgets: ['ffn50'], speed: false });
    return levels[0].kl.value;
  };
  expect(await kl(run)).toBeLessThan(0.8 * (await kl(plan)));
});
