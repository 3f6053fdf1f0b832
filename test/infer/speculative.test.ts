// Speculative decoding: the text of plain decoding to the bit, whatever drafts; what it reports; what it refuses.
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest';
import type { ElasticSpec } from '../../lib/elastic/axes.js';
import type { Budget } from '../../lib/elastic/budget.js';
import { elastify } from '../../lib/elastic/elastify.js';
import { Program } from '../../lib/graph/index.js';
import { type ElasticModel, loadModel } from '../../lib/infer/model.js';
import type { GenerateChunk, GenerateOptions, GenerateStream, SpeculativeOptions } from '../../lib/infer/types.js';
import { InvalidArgumentError } from '../../lib/native/errors.js';
import { temporaryDirectory, tinyModel } from '../distill/tiny.js';
import { elasticDirectories } from './fixture.js';

const attn = [0.3, 1] as const;
const at = (spec: ElasticSpec): Budget => ({ spec });

async function outcome(stream: GenerateStream) {
  const chunks: GenerateChunk[] = [];
  for await (const chunk of stream) chunks.push(chunk);
  const { compute, outputTokens } = await stream.usage;
  return { chunks, outputTokens, reason: await stream.finishReason, compute };
}

/** Decodes plainly and with drafts, and expects the same chunks, text, ids and log-probabilities, for the same reason. */
async function requireSame(
  model: ElasticModel,
  prompt: string | readonly number[],
  options: GenerateOptions,
  speculative: SpeculativeOptions,
) {
  const plain = await outcome(model.generate(prompt, options));
  const drafted = await outcome(model.generate(prompt, { ...options, speculative }));
  expect(drafted.chunks).toEqual(plain.chunks);
  expect(drafted.reason).toBe(plain.reason);
  expect(drafted.outputTokens).toBe(plain.outputTokens);
  expect(plain.compute.speculative).toBeUndefined();
  return { plain: plain.compute, compute: drafted.compute, report: drafted.compute.speculative! };
}

describe('with keys of all rows', () => {
  let model: ElasticModel;
  beforeAll(async () => {
    model = await loadModel(
      (await elasticDirectories({ tokens: { attn, mlp: attn }, heads: {}, blocks: { count: 4 } })).elastic,
    );
  });
  afterAll(() => model.dispose());

  const tokensOf = { tokenCapacity: { attn: 0.6, mlp: 0.5 } };
  const pairs: [Budget, Budget][] = [
    ['full', at(tokensOf)],
    ['full', at({ tokenCapacity: { attn: [0, 0.5, 1], mlp: [0.5, 0, 1] }, blockShare: 0.5 })],
    [at({ tokenCapacity: { attn: [0.8, 0, 1] } }), at({ tokenCapacity: { attn: [0, 0, 0.5], mlp: 0.4 } })],
    [at({ headShare: 0.5 }), at({ headShare: 0.5, ...tokensOf })],
  ];

  test.each(pairs)('the text of %j drafted at %j', async (budget, draft) => {
    let drafted = 0;
    let accepted = 0;
    for (const tokens of [1, 3, 16, 'auto'] as const) {
      for (const sampling of [{}, { temperature: 1.2, seed: 5 }, { temperature: 0.8, topK: 20, topP: 0.95, seed: 6 }]) {
        // To the end of the context.
        const { report } = await requireSame(model, 'The fox', { budget, ...sampling }, { draft, tokens });
        drafted += report.drafted;
        accepted += report.accepted;
      }
    }
    expect(accepted).toBeGreaterThan(0);
    expect(accepted).toBeLessThan(drafted);
  });

  test('generations at once, plain and with drafts of all lengths, do not disturb each other', async () => {
    const asked: GenerateOptions[] = [1, 2, 5, undefined, 'auto' as const].map((tokens, i) => ({
      ...{ temperature: 1, seed: i, maxTokens: 24 },
      ...(tokens && { speculative: { draft: at(tokensOf), tokens } }),
    }));
    const together = await Promise.all(asked.map((options) => model.generate('The hen', options).ids));
    for (const [i, { speculative: _, ...plain }] of asked.entries()) {
      expect(together[i]).toEqual(await model.generate('The hen', plain).ids);
    }
  });

  test('stops, limits and long prompts mean what they do without drafts', async () => {
    const draft = at(tokensOf);
    const free = await model.generate('The', { maxTokens: 30, temperature: 1, seed: 1 }).text;
    for (const stop of [free.slice(8, 12), free.slice(3, 5)]) {
      const options = { maxTokens: 30, temperature: 1, seed: 1, stop: [stop] };
      await requireSame(model, 'The', options, { draft, tokens: 5 });
    }
    for (const maxTokens of [1, 2, 3, 7]) {
      const { report } = await requireSame(model, 'The', { maxTokens }, { draft, tokens: 4 });
      expect(report.drafted === 0).toBe(maxTokens <= 2);
    }
    const ids = model.network.tokenizer!.encode('The cat saw the dog by the lake. The owl met the hen by the hill.');
    const long = Array.from({ length: model.info.maxContext - 2 }, (_, i) => ids[i % ids.length]);
    await requireSame(model, long, {}, { draft, tokens: 8 });
  });

  test('a text that ends by itself ends there', async () => {
    let ended = 0;
    for (let seed = 0; seed < 12; seed++) {
      const options = { temperature: 1, seed };
      await requireSame(model, 'The cat saw the dog by the lake.', options, { draft: at(tokensOf), tokens: 6 });
      ended += (await model.generate('The cat saw the dog by the lake.', options).finishReason) === 'stop' ? 1 : 0;
    }
    expect(ended).toBeGreaterThan(0);
  });

  test('reports what was drafted, what of it was kept, and all that was computed', async () => {
    const draft = at(tokensOf);
    const options = { maxTokens: 25 };
    const { plain, compute, report } = await requireSame(model, 'The pig', options, { draft, tokens: 4 });
    expect(report.acceptance).toBe(report.accepted / report.drafted);
    expect(report.effective).toEqual(tokensOf);
    expect(report.level).toBeNull();
    expect(compute.flopsFull).toBe(plain.flopsFull);
    expect(compute.ratio).toBe(compute.flops / compute.flopsFull);
    // What was verified for nothing and the drafts come on top of what plain decoding computes.
    expect(report.flops).toBeGreaterThan(0);
    expect(compute.flops - report.flops).toBeGreaterThan(plain.flops);
    // Every cycle verifies the drafted tokens and the one before them, and keeps the accepted and one more.
    const perToken = plain.flops / (model.network.tokenizer!.encode('The pig').length + 24);
    const rejected = report.drafted - report.accepted;
    expect((compute.flops - report.flops - plain.flops) / (rejected * perToken)).toBeCloseTo(1, 0);
    expect(report.flops / (report.drafted * perToken)).toBeLessThan(1);
    for (const share of [...compute.layersRun.attn, ...compute.layersRun.mlp]) {
      expect(share).toBeGreaterThan(0);
      expect(share).toBeLessThan(1);
    }
  });

  test('sampled texts are distributed as the budget says', async () => {
    const prompt = model.network.tokenizer!.encode('The');
    const [topK, temperature, length] = [3, 1.5, 3];
    // Probabilities of all texts, from the logits.
    const expected = new Map<string, number>();
    const extend = async (text: readonly number[], probability: number): Promise<void> => {
      if (text.length === length) return void expected.set(text.join(), probability);
      const logits = await model.logits([...prompt, ...text]);
      const last = logits.subarray(-model.info.vocab);
      const best = [...last.keys()].sort((a, b) => last[b] - last[a] || a - b).slice(0, topK);
      const weights = best.map((id) => Math.exp((last[id] - last[best[0]]) / temperature));
      const sum = weights.reduce((a, b) => a + b, 0);
      for (const [i, id] of best.entries()) await extend([...text, id], (probability * weights[i]) / sum);
    };
    await extend([], 1);

    const draws = 1500;
    const counts = new Map<string, number>();
    let [drafted, accepted] = [0, 0];
    const speculative = { draft: at(tokensOf), tokens: 2 };
    for (let seed = 0; seed < draws; seed++) {
      const stream = model.generate(prompt, { temperature, topK, seed, maxTokens: length, speculative });
      const text = (await stream.ids).join();
      counts.set(text, (counts.get(text) ?? 0) + 1);
      const report = (await stream.usage).compute.speculative!;
      drafted += report.drafted;
      accepted += report.accepted;
    }
    expect(accepted).toBeGreaterThan(0.05 * drafted);
    expect(accepted).toBeLessThan(0.95 * drafted);
    for (const text of counts.keys()) expect(expected.has(text), text).toBe(true);
    let statistic = 0;
    let rare = { count: 0, mean: 0 };
    let classes = 0;
    for (const [text, p] of expected) {
      const [count, mean] = [counts.get(text) ?? 0, p * draws];
      if (mean < 5) rare = { count: rare.count + count, mean: rare.mean + mean };
      else {
        statistic += (count - mean) ** 2 / mean;
        classes++;
      }
    }
    if (rare.mean > 0) statistic += (rare.count - rare.mean) ** 2 / Math.max(rare.mean, 1);
    // Pearson's statistic: its mean is the degrees of freedom, its variance twice that.
    expect(classes).toBeGreaterThan(5);
    expect(statistic).toBeLessThan(classes + 4 * Math.sqrt(2 * classes));
  });

  test('an aborted generation keeps what it has and leaves nothing behind', async () => {
    const controller = new AbortController();
    const speculative = { draft: at(tokensOf), tokens: 4 };
    const stream = model.generate('The', { temperature: 2, seed: 3, signal: controller.signal, speculative });
    for await (const _ of stream) controller.abort();
    expect(await stream.finishReason).toBe('abort');
    const ids = await stream.ids;
    const whole = await model.generate('The', { temperature: 2, seed: 3 }).ids;
    expect(ids).toEqual(whole.slice(0, ids.length));
    await requireSame(model, 'The dog', {}, { draft: at(tokensOf), tokens: 4 });
  });

  test('drafts that cannot be are typed errors at once', () => {
    const bad = (options: object, message: RegExp): void => {
      expect(() => model.generate('a', options)).toThrow(InvalidArgumentError);
      expect(() => model.generate('a', options)).toThrow(message);
    };
    const draft = at(tokensOf);
    bad({ speculative: {} }, /speculative.draft must be a budget/);
    bad({ speculative: true }, /options must be an object/);
    bad({ speculative: { draft, tokns: 1 } }, /unknown option 'tokns'/);
    for (const tokens of [0, 17, 1.5, 'many'])
      bad({ speculative: { draft, tokens } }, /'auto' or an integer from 1 to 16/);
    bad({ speculative: { draft: 'p12' } }, /no level is named 'p12'/);
    bad({ speculative: { draft: 'full' } }, /must cost less than the budget: full takes 1.000/);
    bad(
      { budget: draft, speculative: { draft: at({ tokenCapacity: { mlp: 0.9 } }) } },
      /must cost less than the budget/,
    );
    bad({ speculative: { draft: at({ headShare: 0.5 }) } }, /layer 0 is not cut at the budget and is cut into 2 heads/);
    bad(
      {
        budget: at({ tokenCapacity: { attn: [1, 0, 1] } }),
        speculative: { draft: at({ tokenCapacity: { attn: [0, 0.1, 0], mlp: 0.1 } }) },
      },
      /runs attention in layer 1, where the budget has no keys/,
    );
  });
});

describe('with nested feed-forwards', () => {
  let model: ElasticModel;
  beforeAll(async () => {
    const out = join(temporaryDirectory(), 'nested');
    await elastify(
      await tinyModel(join(temporaryDirectory(), 'backbone')),
      { kind: 'matformer', granularities },
      { out },
    );
    model = await loadModel(out);
  });
  afterAll(() => model.dispose());

  const granularities = [0.25, 0.5, 1];
  const pairs: [Budget, Budget][] = [
    ['full', 'ffn25'],
    ['full', 0.8],
    [at({ ffnWidth: [0.5, 0.5, 1] }), at({ ffnWidth: [0.25, 0.5, 0.5] })],
  ];

  test.each(pairs)('the text of %j drafted at %j', async (budget, draft) => {
    let [drafted, accepted] = [0, 0];
    for (const tokens of [1, 4, 16, 'auto'] as const) {
      for (const sampling of [{}, { temperature: 1, seed: 2 }]) {
        const { report } = await requireSame(model, 'The hen', { budget, ...sampling }, { draft, tokens });
        drafted += report.drafted;
        accepted += report.accepted;
        expect(report.level).toBe(typeof draft === 'string' ? draft : null);
      }
    }
    expect(accepted).toBeGreaterThan(0);
    expect(accepted).toBeLessThan(drafted);
  });

  test('plain steps, drafts and verification at all widths take one program', async () => {
    const compile = vi.spyOn(Program, 'compile');
    try {
      await using fresh = await loadModel(model.network.dir);
      const counts: number[] = [];
      for (const draft of ['ffn25', 'ffn50', 0.8]) {
        await fresh.generate('The', { maxTokens: 8, speculative: { draft, tokens: 2 } }).ids;
        counts.push(compile.mock.calls.length);
      }
      expect(counts).toEqual([1, 1, 1]);
    } finally {
      compile.mockRestore();
    }
  });

  test('a wider draft is refused', () => {
    const [budget, draft] = [at({ ffnWidth: 0.25 }), at({ ffnWidth: 0.5 })];
    expect(() => model.generate('a', { budget, speculative: { draft } })).toThrow(/must cost less than the budget/);
  });
});

describe('with keys of selected rows', () => {
  let model: ElasticModel;
  beforeAll(async () => {
    const recipe = { tokens: { attn, mlp: attn }, keys: 'selected', heads: { keys: 'selected' } } as const;
    model = await loadModel((await elasticDirectories(recipe)).elastic);
  });
  afterAll(() => model.dispose());

  test('a draft may cache fewer rows than the budget', async () => {
    const draft = at({ tokenCapacity: { attn: 0.5, mlp: [0.5, 1, 0.5] } });
    const { report } = await requireSame(model, 'The owl', { temperature: 1, seed: 2 }, { draft, tokens: 3 });
    expect(report.drafted).toBeGreaterThan(report.accepted);
  });

  test.each([{ tokenCapacity: { attn: [1, 0.9, 1] } }, { headShare: [1, 0.5, 1] }])(
    'a budget that does is refused: %j',
    (spec) => {
      const draft = at({ tokenCapacity: { mlp: 0.3 } });
      const run = () => model.generate('a', { budget: at(spec), speculative: { draft } });
      expect(run).toThrow(InvalidArgumentError);
      expect(run).toThrow(/only keys that its routers chose in layer 1/);
    },
  );
});
