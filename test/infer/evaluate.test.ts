// Evaluation: quality against direct computation, compute that is counted, baselines at equal compute.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type ElasticModel, loadModel } from '../../lib/infer/model.js';
import { type EvalLevel, evaluate } from '../../lib/infer/quality/evaluate.js';
import { stories } from '../distill/tiny.js';
import { data, elasticDirectories } from './fixture.js';

describe('a tiny elastic model', () => {
  let model: ElasticModel;
  const held = stories(40).slice(20);
  beforeAll(async () => {
    model = await loadModel((await elasticDirectories()).elastic);
  });
  afterAll(() => model.dispose());

  test('perplexity and bits per byte are those of scored texts', async () => {
    const report = await evaluate(model, { data: held, speed: false });
    const scored = await model.score(held);
    const nats = -scored.reduce((sum, s) => sum + s.logprobs.slice(1).reduce((a, b) => a + b, 0), 0);
    const tokens = scored.reduce((sum, s) => sum + s.tokens.length - 1, 0);
    const [full] = report.levels;
    expect(report.tokens).toBe(tokens);
    expect(full.perplexity.value).toBeCloseTo(Math.exp(nats / tokens), 3);
    const bytes = held.reduce((sum, text) => sum + Buffer.byteLength(text), 0);
    expect(full.bitsPerByte!.value).toBeCloseTo(nats / Math.LN2 / bytes, 4);
    expect(full).toMatchObject({ method: 'full', ratio: 1, share: 1, kl: { value: 0 }, agreement: { value: 1 } });
    expect(full.perplexity.low).toBeLessThan(full.perplexity.value);
    expect(full.perplexity.high).toBeGreaterThan(full.perplexity.value);
  });

  test('KL and agreement are those of the logits', async () => {
    const spec = { tokenCapacity: { attn: 0.6, mlp: 0.6 } };
    const text = held.find((t) => t.length > 60)!;
    const report = await evaluate(model, { data: [text], budgets: [{ spec }], speed: false });
    const ids = model.network.tokenizer!.encode(text);
    const [p, q] = [await model.logits(ids), await model.logits(ids, { budget: { spec } })];
    const { vocab } = model.info;
    let kl = 0;
    let agree = 0;
    for (let row = 0; row + 1 < ids.length; row++) {
      const normal = (all: Float32Array): number[] => {
        const logits = [...all.subarray(row * vocab, (row + 1) * vocab)];
        const most = Math.max(...logits);
        const log = most + Math.log(logits.reduce((s, v) => s + Math.exp(v - most), 0));
        return logits.map((v) => v - log);
      };
      const [lp, lq] = [normal(p), normal(q)];
      kl += lp.reduce((s, v, i) => s + Math.exp(v) * (v - lq[i]), 0);
      agree += lp.indexOf(Math.max(...lp)) === lq.indexOf(Math.max(...lq)) ? 1 : 0;
    }
    // The last token is not fed here, and routing is causal, so rows before it are the same.
    expect(report.levels[0].kl.value).toBeCloseTo(kl / (ids.length - 1), 3);
    expect(report.levels[0].agreement.value).toBeCloseTo(agree / (ids.length - 1), 6);
  });

  test('the ratio of perplexities compares the same sequences', async () => {
    const budgets = ['full', { spec: { tokenCapacity: { attn: 0.6, mlp: 0.6 } } }];
    const { levels } = await evaluate(model, { data: held, budgets, baselines: ['random', 'drop'], speed: false });
    const [full, ...others] = levels;
    expect(full.perplexityRatio).toEqual({ value: 1, low: 1, high: 1 });
    expect(others.map(({ method }) => method)).toEqual(['routed', 'random', 'drop']);
    for (const { perplexity, perplexityRatio: ratio, method } of others) {
      // the share of 'drop' is a mixture of two models
      expect(ratio.value).toBeCloseTo(perplexity.value / full.perplexity.value, method === 'drop' ? 6 : 10);
      expect(ratio.low).toBeLessThan(ratio.value);
      expect(ratio.high).toBeGreaterThan(ratio.value);
    }
  });

  test('documents cut into sequences predict every token but the first exactly once', async () => {
    const text = held.join(' ');
    const tokens = model.network.tokenizer!.encode(text).length - 1;
    for (const sequenceLength of [7, 32, 64]) {
      const report = await evaluate(model, { data: [text], sequenceLength, batchTokens: 100, speed: false });
      expect(report.tokens).toBe(tokens);
      expect(report.sequences).toBe(Math.ceil(tokens / sequenceLength));
    }
  });

  test('baselines run at the compute of the routed model, and the same seed gives the same report', async () => {
    const options = {
      data: held,
      budgets: ['full', 0.8, 0.6],
      baselines: ['random', 'drop'],
      seed: 3,
      speed: false,
    } as const;
    const report = await evaluate(model, options);
    expect(report.levels.map((l) => l.method)).toEqual([
      'full',
      'routed',
      'random',
      'drop',
      'routed',
      'random',
      'drop',
    ]);
    for (const at of [1, 4]) {
      const [routed, random, drop] = report.levels.slice(at, at + 3);
      expect(routed.ratio).toBeLessThan(1);
      expect(routed.kl.value).toBeGreaterThan(0);
      // Top-k rounds up in every sequence, and these are short.
      expect(Math.abs(random.ratio - routed.ratio)).toBeLessThan(0.06);
      expect(Math.abs(drop.ratio - routed.ratio)).toBeLessThan(0.005);
      const dropped = new Set(drop.dropped);
      const shares = (l: EvalLevel) => [...l.layersRun.attn].map((attn, i) => [attn, l.layersRun.mlp[i]]);
      expect(dropped.size).toBeGreaterThan(0);
      // Two static choices share the sequences: what the larger one has too runs in full, the rest in part or not at all.
      const parts = shares(drop).map((pair, i) =>
        pair.map((share, p) => (dropped.has(`layers.${i}.${['attn', 'mlp'][p]}.token`) ? share : 1 - share)),
      );
      expect(parts.flat().filter((part) => part !== 0).length).toBeLessThanOrEqual(1);
      expect(Math.max(...parts.flat())).toBeLessThan(1);
      for (const baseline of [random, drop]) {
        const { kl, agreement } = baseline.routedAdvantage!;
        expect(kl.value).toBeCloseTo(baseline.kl.value - routed.kl.value, 6);
        expect(agreement.value).toBeCloseTo(routed.agreement.value - baseline.agreement.value, 6);
        expect(kl.low).toBeLessThanOrEqual(kl.value);
        expect(kl.high).toBeGreaterThanOrEqual(kl.value);
      }
    }
    expect(await evaluate(model, options)).toEqual(report);
  });

  test('speed is measured', async () => {
    const report = await evaluate(model, { data: held, budgets: ['full', 0.7] });
    for (const level of report.levels) {
      expect(level.tokensPerSecond).toBeGreaterThan(0);
      expect(level.timeRatio).toBeGreaterThan(0);
      if (level.method === 'full') expect(level.timeRatio).toBe(1);
    }
  });

  test('bad input is a typed error', async () => {
    await expect(evaluate(model, { data: [] })).rejects.toThrow(/no text to predict/);
    await expect(evaluate(model, { data: [''] })).rejects.toThrow(/no text to predict/);
    await expect(evaluate(model, { data: [{ ids: [1, 2, 99999] }] })).rejects.toThrow(/token id 99999/);
    await expect(evaluate(model, { data: held, budgets: [] })).rejects.toThrow(/budgets/);
    await expect(evaluate(model, { data: held, budgets: [0.01] })).rejects.toThrow(/cannot be reached/);
    await expect(evaluate(model, { data: held, baselines: ['best'] } as never)).rejects.toThrow(/baselines/);
    await expect(evaluate(model, { data: held, tokens: 4 } as never)).rejects.toThrow(/unknown option 'tokens'/);
    await expect(evaluate(model, { data: held, sequenceLength: 4096 })).rejects.toThrow(/longer than the context/);
    await expect(evaluate(model, { data: held, signal: AbortSignal.abort() })).rejects.toThrow();
  });
});

test.skipIf(!data)('stories260K: the known perplexity on the first 20k tokens of TinyStories', async () => {
  const text = readFileSync(join(data!, 'tinystories-sample', 'tinystories_197k.txt'), 'utf8');
  const report = await evaluate(join(data!, 'stories260K-llama'), { data: [text], limit: 20_000, speed: false });
  const { perplexity } = report.levels[0];
  expect(perplexity.value).toBeGreaterThan(4.4);
  expect(perplexity.value).toBeLessThan(4.6);
});
