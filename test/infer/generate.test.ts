// Generation: cached decoding equals the full forward pass, streams, stops, aborts, and reports the compute it used.
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type ElasticModel, loadModel } from '../../lib/infer/model.js';
import type { GenerateChunk, GenerateOptions } from '../../lib/infer/types.js';
import { InvalidArgumentError } from '../../lib/native/errors.js';
import { goldenDirectory, goldenNames } from '../model/golden.js';
import { elasticDirectories } from './fixture.js';

const argmax = (values: Float32Array): number => values.reduce((best, v, i) => (v > values[best] ? i : best), 0);

/** Greedy decoding by running the whole sequence for every token. */
async function greedy(
  model: ElasticModel,
  prompt: readonly number[],
  tokens: number,
  budget?: number,
): Promise<number[]> {
  const ids = [...prompt];
  const { vocab } = model.info;
  for (let i = 0; i < tokens; i++) {
    const logits = await model.logits(ids, budget === undefined ? {} : { budget });
    ids.push(argmax(logits.subarray((ids.length - 1) * vocab)));
    if (model.network.endIds.has(ids.at(-1)!)) break;
  }
  return ids.slice(prompt.length);
}

describe.each(goldenNames('golden.safetensors'))('%s', (name) => {
  test('greedy generation with caches takes the tokens of the full forward pass', async () => {
    // In f32, where a row has the same bits whatever rows are beside it, on every device.
    await using model = await loadModel(join(goldenDirectory, name), { activations: 'f32' });
    const prompt = [3, 5, 7, 11].map((id) => id % model.info.vocab);
    const stream = model.generate(prompt, { maxTokens: 8 });
    expect(await stream.ids).toEqual(await greedy(model, prompt, 8));
    const { compute, outputTokens } = await stream.usage;
    expect(compute.ratio).toBe(1);
    expect(compute.flops).toBe(compute.flopsFull);
    expect(outputTokens).toBe((await stream.ids).length);
  });
});

describe('an elastic model', () => {
  let model: ElasticModel;
  let backbone: ElasticModel;
  beforeAll(async () => {
    const directories = await elasticDirectories();
    model = await loadModel(directories.elastic);
    backbone = await loadModel(directories.backbone);
  });
  afterAll(async () => {
    await model.dispose();
    await backbone.dispose();
  });

  test('full budget is the backbone, bit for bit', async () => {
    const ids = model.network.tokenizer!.encode('The cat saw the dog by the lake.');
    expect(await model.logits(ids, { budget: 1 })).toEqual(await backbone.logits(ids));
    const [a, b] = [model.generate(ids, { budget: 'full' }), backbone.generate(ids)];
    expect(await a.ids).toEqual(await b.ids);
  });

  test('texts at several budgets at once have the bits of each alone', async () => {
    const { tokenizer } = model.network;
    const prompts = ['The cat saw', 'The pig hid the owl by the wood. The', 'A', 'The dog'].map((text) =>
      tokenizer!.encode(text),
    );
    const options = (i: number): GenerateOptions => ({ budget: (['full', 0.6, 0.8, 0.6] as const)[i], maxTokens: 5 });
    const chunks = async (stream: AsyncIterable<GenerateChunk>) => {
      const all: GenerateChunk[] = [];
      for await (const chunk of stream) all.push(chunk);
      return all;
    };
    const together = await Promise.all(prompts.map((ids, i) => chunks(model.generate(ids, options(i)))));
    for (const [i, ids] of prompts.entries())
      expect(together[i]).toEqual(await chunks(model.generate(ids, options(i))));
  });

  test('less budget is less compute', async () => {
    const ratios: number[] = [];
    for (const budget of [1, 0.8, 0.6]) {
      const [{ usage }] = await model.score(['The pig hid the owl by the wood. The cat met the dog by the hill.'], {
        budget,
      });
      ratios.push(usage.compute.ratio);
    }
    expect(ratios[0]).toBe(1);
    expect(ratios[1]).toBeLessThan(1);
    expect(ratios[2]).toBeLessThan(ratios[1]);
  });

  test('scores are the log-probabilities of the logits', async () => {
    const ids = model.network.tokenizer!.encode('The owl led the pig by the barn.');
    const [{ logprobs, tokens }] = await model.score([ids], { budget: 0.7 });
    const logits = await model.logits(ids, { budget: 0.7 });
    expect(tokens).toEqual(ids);
    expect(logprobs[0]).toBeNaN();
    for (let i = 1; i < ids.length; i++) {
      const row = logits.subarray((i - 1) * model.info.vocab, i * model.info.vocab);
      const most = Math.max(...row);
      const logSum = most + Math.log(row.reduce((s, v) => s + Math.exp(v - most), 0));
      expect(Math.abs(logprobs[i] - (row[ids[i]] - logSum))).toBeLessThan(1e-4);
    }
  });

  test('the same seed gives the same text, another seed another one', async () => {
    const sample = (seed: number) => model.generate('The', { temperature: 1.5, seed, maxTokens: 24 }).ids;
    const [a, b, c] = await Promise.all([sample(7), sample(7), sample(8)]);
    expect(a).toEqual(b);
    expect(a).not.toEqual(c);
  });

  test('top-k 1 and a tiny top-p are greedy at any temperature', async () => {
    const best = await model.generate('The dog', { maxTokens: 10 }).ids;
    expect(await model.generate('The dog', { maxTokens: 10, temperature: 5, topK: 1, seed: 3 }).ids).toEqual(best);
    expect(await model.generate('The dog', { maxTokens: 10, temperature: 5, topP: 1e-6, seed: 3 }).ids).toEqual(best);
  });

  test('chunks, text and ids agree, during generation and after it', async () => {
    const stream = model.generate('The hen', { maxTokens: 16 });
    const chunks: GenerateChunk[] = [];
    for await (const chunk of stream) chunks.push(chunk);
    expect(chunks.map((c) => c.text).join('')).toBe(await stream.text);
    expect(chunks.map((c) => c.token)).toEqual(await stream.ids);
    expect(chunks.every((c) => c.logprob <= 0)).toBe(true);
    const again: GenerateChunk[] = [];
    for await (const chunk of stream) again.push(chunk);
    expect(again).toEqual(chunks);
  });

  test('a stop string ends the text before it', async () => {
    const free = await model.generate('The', { maxTokens: 30, temperature: 1, seed: 1 }).text;
    const stop = free.slice(8, 12);
    const stream = model.generate('The', { maxTokens: 30, temperature: 1, seed: 1, stop: [stop] });
    let streamed = '';
    for await (const chunk of stream) streamed += chunk.text;
    expect(streamed).toBe(free.slice(0, free.indexOf(stop)));
    expect(await stream.finishReason).toBe('stop');
  });

  test('leaving the loop ends generation', async () => {
    const stream = model.generate('The', { maxTokens: 60, temperature: 2, seed: 5 });
    for await (const _ of stream) break;
    expect(await stream.finishReason).not.toBe('length');
    expect((await stream.ids).length).toBeLessThan(60);
  });

  test('an aborted generation keeps what it has', async () => {
    const controller = new AbortController();
    const stream = model.generate([5], { temperature: 3, seed: 9, signal: controller.signal });
    let seen = 0;
    for await (const _ of stream) if (++seen === 2) controller.abort();
    expect(await stream.finishReason).toBe('abort');
    expect((await stream.ids).length).toBe(seen);
    const before = model.generate('The', { signal: AbortSignal.abort() });
    expect(await before.finishReason).toBe('abort');
    expect(await before.ids).toEqual([]);
  });

  test('generations at once do not disturb each other', async () => {
    const prompts = ['The cat', 'The owl met', 'The pig hid the', 'The'];
    const alone: (readonly number[])[] = [];
    for (const prompt of prompts) alone.push(await model.generate(prompt, { budget: 0.7, maxTokens: 12 }).ids);
    const together = await Promise.all(prompts.map((p) => model.generate(p, { budget: 0.7, maxTokens: 12 }).ids));
    expect(together).toEqual(alone);
  });

  test('drafts at a cheaper budget change no bit of a text', async () => {
    const options = { maxTokens: 12, temperature: 0.8, seed: 4 };
    const chunks = async (more: GenerateOptions) => {
      const all: GenerateChunk[] = [];
      const stream = model.generate('The owl', { ...options, ...more });
      for await (const chunk of stream) all.push(chunk);
      return { all, report: (await stream.usage).compute.speculative };
    };
    const drafted = await chunks({ speculative: { draft: 0.7, tokens: 3 } });
    expect(drafted.all).toEqual((await chunks({})).all);
    expect(drafted.report!.accepted).toBeGreaterThan(0);
  });

  test('an empty prompt starts a text', async () => {
    const { startId } = model.network;
    expect(await model.generate('', { maxTokens: 5 }).ids).toEqual(
      await model.generate([startId!], { maxTokens: 5 }).ids,
    );
  });

  test('what cannot be served is a typed error at once', () => {
    const { vocab, maxContext } = model.info;
    const bad = (run: () => unknown, message: RegExp): void => {
      expect(run).toThrow(InvalidArgumentError);
      expect(run).toThrow(message);
    };
    bad(() => model.generate([1, vocab]), /prompt token 1 must be an id from 0 to/);
    bad(() => model.generate([1.5]), /prompt token 0/);
    bad(() => model.generate(new Array(maxContext + 1).fill(1)), /context holds/);
    bad(() => model.generate('a', { tempature: 1 } as object), /unknown option 'tempature'/);
    bad(() => model.generate('a', { temperature: -1 }), /temperature/);
    bad(() => model.generate('a', { maxTokens: 0 }), /maxTokens/);
    bad(() => model.generate('a', { topP: 0 }), /topP/);
    bad(() => model.generate('a', { stop: [''] }), /stop/);
    bad(() => model.generate('a', { seed: -1 }), /seed/);
    bad(() => model.generate('a', { budget: 2 }), /budget must be in/);
    bad(() => model.generate('a', { budget: 'p12' }), /no level is named 'p12'/);
    bad(() => model.generate('a', { budget: { spec: { tokenCapacity: { attn: 0 } } } }), /capacity|tokenCapacity/);
    bad(() => backbone.generate('a', { budget: 0.5 }), /has none/);
  });
});

describe.each(['all', 'selected'] as const)('with keys of %s rows', (keys) => {
  let model: ElasticModel;
  beforeAll(async () => {
    model = await loadModel((await elasticDirectories({ keys })).elastic);
  });
  afterAll(() => model.dispose());

  // The budget is resolved for the length of the call, so explicit capacities are compared.
  test.each([{ attn: 0.6, mlp: 0.5 }, { attn: [0, 1, 0.4], mlp: [1, 0.6, 0] }, { attn: [0.5, 0, 1] }])(
    'a routed generation takes the tokens of the routed forward pass and counts less compute: %j',
    async (capacity) => {
      const prompt = model.network.tokenizer!.encode('The fox fed the hen by');
      const spec = { tokenCapacity: capacity };
      const stream = model.generate(prompt, { budget: { spec }, maxTokens: 12 });
      const { compute } = await stream.usage;
      const ids = [...prompt];
      for (const id of await stream.ids) {
        const logits = await model.logits(ids, { budget: { spec } });
        const row = logits.subarray((ids.length - 1) * model.info.vocab);
        // Other row counts may round differently: the token taken is the best up to that.
        expect(row[argmax(row)] - row[id]).toBeLessThan(1e-4);
        ids.push(id);
      }
      expect(compute.ratio).toBeLessThan(1);
      expect(compute.effective).toEqual(spec);
      for (const place of ['attn', 'mlp'] as const) {
        const shares = [capacity[place] ?? 1].flat();
        compute.layersRun[place].forEach((share, layer) => {
          const asked = shares[layer] ?? shares[0];
          if (asked === 0 || asked === 1) expect(share).toBe(asked);
          else expect(share).toBeGreaterThanOrEqual(0);
          expect(share).toBeLessThanOrEqual(1);
        });
      }
    },
  );
});

test('a disposed model ends its generations and refuses new ones', async () => {
  const model = await loadModel(join(goldenDirectory, 'llama-gqa'));
  const stream = model.generate([3], { temperature: 4, seed: 1, maxTokens: 60 });
  await model.dispose();
  await model.dispose();
  expect(await stream.finishReason).toBe('abort');
  expect(() => model.generate([3])).toThrow(/disposed/);
});

test('options and files of loadModel are checked', async () => {
  const dir = join(goldenDirectory, 'llama-gqa');
  await expect(loadModel('/nowhere/at/all')).rejects.toThrow(/does not exist/);
  await expect(loadModel(dir, { dtype: 'f64' } as object)).rejects.toThrow(/dtype/);
  await expect(loadModel(dir, { quant: 4 } as object)).rejects.toThrow(/unknown option 'quant'/);
  await expect(loadModel(dir, { maxContext: 1000 })).rejects.toThrow(/at most 64/);
  await expect(loadModel(dir, { signal: AbortSignal.abort() })).rejects.toThrow();
});
