// Heads and blocks that tokens of a tile choose together: trained, and the same bits however a text is run.
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { distill } from '../../lib/distill/distill.js';
import type { TrainEvent } from '../../lib/distill/events.js';
import { pretrain } from '../../lib/distill/pretrain.js';
import type { ElasticSpec } from '../../lib/elastic/axes.js';
import { type ElastiformerRecipe, elastify } from '../../lib/elastic/elastify.js';
import { readElastic } from '../../lib/elastic/store.js';
import { type ElasticModel, loadModel } from '../../lib/infer/model.js';
import { evaluate } from '../../lib/infer/quality/evaluate.js';
import type { GenerateStream } from '../../lib/infer/types.js';
import { stories, temporaryDirectory, tinyConfig, tinyDistilling, tinyPretraining } from '../distill/tiny.js';

const tile = 32;
const at = (spec: ElasticSpec) => ({ spec });

const recipes: [string, Partial<ElastiformerRecipe>, ElasticSpec][] = [
  [
    'heads and blocks',
    { heads: { group: 'head', tile }, blocks: { count: 8, tile } },
    { headShare: 0.5, blockShare: 0.5 },
  ],
  [
    'heads and blocks of the tokens that enter',
    {
      tokens: { attn: [0.3, 1], mlp: [0.3, 1] },
      heads: { group: 'head', tile: 40 },
      blocks: { count: 8, gate: 'renormalised', tile },
    },
    { tokenCapacity: { attn: 0.5, mlp: 0.4 }, headShare: 0.5, blockShare: 0.5 },
  ],
  [
    'experts by mass, keys of selected heads',
    { heads: { keys: 'selected', tile }, blocks: { count: 8, rule: 'mass', tile } },
    { headShare: 0.5, blockShare: 0.5 },
  ],
];

describe.each(recipes)('%s', (_, recipe, spec) => {
  const out = join(temporaryDirectory(), 'run');
  const budget = at(spec);
  let trained: Awaited<ReturnType<typeof train>>;
  let model: ElasticModel;
  let text: number[];

  beforeAll(async () => {
    trained = await train(out, recipe);
    model = await loadModel(out);
    text = textOf(model, 90);
  });
  afterAll(() => model.dispose());

  test('learns, and is saved', async () => {
    const evals = trained.events.flatMap((e) => (e.type === 'eval' ? [e] : []));
    const mean = ({ levels }: (typeof evals)[number]) => Object.values(levels).reduce((sum, { kl }) => sum + kl, 0);
    expect(mean(evals.at(-1)!)).toBeLessThan(0.9 * mean(evals[0]));
    const { policy, warnings } = (await readElastic(out))!;
    expect(warnings).toEqual([]);
    expect(policy.heads!.tile).toBe(recipe.heads!.tile);
    expect(policy.blocks).toMatchObject({ count: 8, tile });
  });

  test('full budget is the backbone, bit for bit', async () => {
    await using plain = await loadModel(trained.backbone);
    const full = await plain.logits(text);
    for (const budget of ['full', 1, at({ headShare: 1, blockShare: 1 })] as const)
      expect(await model.logits(text, { budget })).toEqual(full);
    expect(await model.logits(text, { budget })).not.toEqual(full);
  });

  test('a text read at once, in chunks of any size or token by token goes on with the same bits', async () => {
    const options = { maxTokens: 6, temperature: 0 } as const;
    for (const length of [31, 32, 33, 75]) {
      const wanted = await logprobs(model.generate(text.slice(0, length), { ...options, budget }));
      for (const chunkRows of [1, 7, 20]) {
        await using small = await loadModel(out, { maxSequences: 1, maxBatchTokens: chunkRows + 1 });
        const stream = small.generate(text.slice(0, length), { ...options, budget });
        expect(await logprobs(stream), `${length} tokens in chunks of ${chunkRows}`).toEqual(wanted);
      }
      // The logits of whole texts choose the same tokens.
      const ids = [...text.slice(0, length)];
      for (const [token] of wanted) {
        const logits = (await model.logits(ids, { budget })).subarray(-model.info.vocab);
        expect(token).toBe(logits.indexOf(logits.reduce((a, b) => Math.max(a, b))));
        ids.push(token);
      }
    }
  });

  test('generations at once have the bits that they have alone, beside others at other budgets', async () => {
    const budgets = [budget, 'full', at({ headShare: 1, blockShare: [0.25, 0.5, 0.75] }), budget, 0.8] as const;
    const asked = [64, 20, 31, 33, 50].map((length, i) => {
      return [text.slice(i, length), { maxTokens: 40, temperature: 0.7, seed: i, budget: budgets[i] }] as const;
    });
    const alone = [];
    for (const request of asked) alone.push(await logprobs(model.generate(...request)));
    expect(await Promise.all(asked.map((request) => logprobs(model.generate(...request))))).toEqual(alone);
    const texts = asked.map(([ids]) => ids);
    const together = await model.score(texts, { budget: [...budgets] });
    for (const [i, ids] of texts.entries()) {
      const [own] = await model.score([ids], { budget: budgets[i] });
      expect(together[i].logprobs).toEqual(own.logprobs);
    }
  });

  test('what is decided about a tile stays with a text that is kept, and with its forks', async () => {
    const options = { maxTokens: 8, temperature: 0 } as const;
    for (const [read, then] of [
      [40, 20],
      [60, 12],
      [64, 3],
    ]) {
      using kept = await model.prefill(text.slice(0, read), { budget });
      using fork = kept.fork();
      const whole = await logprobs(model.generate(text.slice(0, read + then), { ...options, budget }));
      // One goes on into the next tile first.
      await kept.generate(text.slice(read + then, read + then + 25), options).ids;
      expect(await logprobs(fork.generate(text.slice(read, read + then), options))).toEqual(whole);
      const ids = fork.ids;
      const more = await logprobs(fork.generate(text.slice(0, 5), options));
      expect(more).toEqual(await logprobs(model.generate([...ids, ...text.slice(0, 5)], { ...options, budget })));
    }
  });

  test('as many experts are used as were asked for, by routers and at random', async () => {
    const { levels } = await evaluate(model, {
      data: stories(60).slice(0, 20),
      budgets: [budget],
      baselines: ['random'],
      speed: false,
    });
    const [routed, random] = levels;
    for (const place of ['attn', 'mlp'] as const)
      routed.layersRun[place].forEach((share, l) => {
        expect(Math.abs(random.layersRun[place][l] - share)).toBeLessThan(0.05);
      });
    expect(routed.ratio).toBeLessThan(0.85);
  });
});

/** Budgets, and cheaper ones that draft for them. */
const drafted: [string, Partial<ElastiformerRecipe>, [ElasticSpec, ElasticSpec][]][] = [
  [
    'heads and blocks',
    { heads: { group: 'head', tile }, blocks: { count: 8, tile } },
    [
      [
        { headShare: 0.75, blockShare: 0.75 },
        { headShare: 0.5, blockShare: 0.375 },
      ],
      [{ blockShare: 0.5 }, { blockShare: [0.5, 0, 0.25] }],
      [{}, { blockShare: 0.5 }],
    ],
  ],
  [
    'heads and blocks of the tokens that enter',
    {
      tokens: { attn: [0.1, 1], mlp: [0.1, 1] },
      heads: { group: 'head', tile },
      blocks: { count: 8, tile: 33 },
    },
    [
      [
        { tokenCapacity: { attn: 0.3, mlp: 0.1 }, headShare: 0.5, blockShare: 0.5 },
        { tokenCapacity: { attn: 0.2, mlp: 0.05 }, headShare: 0.5, blockShare: 0.5 },
      ],
      [
        { tokenCapacity: { attn: 0.6, mlp: 0.15 }, headShare: 0.5, blockShare: 0.5 },
        { tokenCapacity: { attn: 0.1, mlp: 0.4 }, headShare: 0.5, blockShare: 0.125 },
      ],
    ],
  ],
];

describe.each(drafted)('drafts of %s', (_, recipe, budgets) => {
  const out = join(temporaryDirectory(), 'run');
  let model: ElasticModel;
  beforeAll(async () => {
    await train(out, recipe);
    model = await loadModel(out);
  });
  afterAll(() => model.dispose());

  test.each(budgets)('leave the text of %j as it is, drafted at %j', async (spec, draft) => {
    let [all, accepted] = [0, 0];
    for (const length of [1, 14, 20, 30, 31, 32, 60, 66]) {
      const ids = textOf(model, length);
      const options = { maxTokens: 52, temperature: 1, seed: length, budget: at(spec) };
      const plain = await logprobs(model.generate(ids, options));
      for (const tokens of [3, 16]) {
        const stream = model.generate(ids, { ...options, speculative: { draft: at(draft), tokens } });
        expect(await logprobs(stream), `${length} tokens, ${tokens} drafted`).toEqual(plain);
        const { speculative } = (await stream.usage).compute;
        all += speculative!.drafted;
        accepted += speculative!.accepted;
      }
    }
    expect(accepted).toBeGreaterThan(0);
    expect(accepted).toBeLessThan(all);
  });

  test('a text that is kept goes on after its drafts as without them', async () => {
    const [[spec, draft]] = budgets;
    const options = { maxTokens: 9, temperature: 1, seed: 4 };
    const ids = textOf(model, 26);
    const continued = async (more: object) => {
      using kept = await model.prefill(ids, { budget: at(spec) });
      const all = [];
      for (let turn = 0; turn < 5; turn++)
        all.push(await logprobs(kept.generate(ids.slice(0, 4), { ...options, ...more })));
      return all;
    };
    expect(await continued({ speculative: { draft: at(draft), tokens: 16 } })).toEqual(await continued({}));
  });
});

/** A model of three tiles and more, trained to do with less. */
async function train(
  out: string,
  recipe: Partial<ElastiformerRecipe>,
): Promise<{ backbone: string; events: TrainEvent[] }> {
  const [backbone, plan] = ['model', 'plan'].map((name) => join(temporaryDirectory(), name));
  const events: TrainEvent[] = [];
  await pretrain(tinyPretraining(backbone, { model: { ...tinyConfig, max_position_embeddings: 128 } }));
  await elastify(backbone, { kind: 'elastiformer', ...recipe }, { out: plan });
  await distill(
    tinyDistilling(plan, out, {
      evalData: { kind: 'documents', documents: stories(140).slice(120) },
      ...{ evalEvery: 40, steps: 40, batchTokens: 256, sequenceLength: 96, optimizer: { lr: 2e-2 } },
      onEvent: (event) => void events.push(event),
    }),
  );
  return { backbone, events };
}

function textOf(model: ElasticModel, length: number): number[] {
  const ids = stories(12).flatMap((story) => model.network.tokenizer!.encode(` ${story}`));
  expect(ids.length).toBeGreaterThanOrEqual(length);
  return ids.slice(0, length);
}

async function logprobs(stream: GenerateStream): Promise<[number, number][]> {
  const all: [number, number][] = [];
  for await (const { token, logprob } of stream) all.push([token, logprob]);
  return all;
}
