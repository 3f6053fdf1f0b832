// Continuous batching: sequences in common runs have the bits that each has alone, whatever runs beside them, and leave
// no page behind; limits, queues, deadlines and kept sequences.
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest';
import { Random } from '../../lib/distill/random.js';
import type { Budget } from '../../lib/elastic/budget.js';
import { elastify } from '../../lib/elastic/elastify.js';
import { type Lora, loraModules } from '../../lib/elastic/lora.js';
import { Program } from '../../lib/graph/index.js';
import type { SequenceState } from '../../lib/infer/engine/state.js';
import { type ElasticModel, loadModel } from '../../lib/infer/model.js';
import type { GenerateChunk, GenerateOptions, GenerateStream, LoadOptions } from '../../lib/infer/types.js';
import { writePeft } from '../../lib/io/peft.js';
import { storedModules } from '../../lib/model/weights.js';
import { DisposedError, InvalidArgumentError, OutOfMemoryError } from '../../lib/native/errors.js';
import { temporaryDirectory, tinyModel } from '../distill/tiny.js';
import { goldenDirectory, readSpec } from '../model/golden.js';
import { elasticDirectories } from './fixture.js';

const share = (tokenCapacity: object): Budget => ({ spec: { tokenCapacity } as object });

async function outcome(stream: GenerateStream) {
  const chunks: GenerateChunk[] = [];
  for await (const chunk of stream) chunks.push(chunk);
  const { compute, ...counts } = await stream.usage;
  return { chunks, counts, reason: await stream.finishReason, compute };
}

interface Asked {
  prompt: number[];
  options: GenerateOptions;
  /** Chunks after which it is aborted. */
  abortAfter: number;
}

async function ask(model: ElasticModel, { prompt, options, abortAfter }: Asked) {
  const controller = new AbortController();
  const stream = model.generate(prompt, { ...options, signal: controller.signal });
  let seen = 0;
  for await (const _ of stream) if (++seen === abortAfter) controller.abort();
  return outcome(stream);
}

const attn = [0.3, 1] as const;
const nested = async (): Promise<string> => {
  const out = join(temporaryDirectory(), 'nested');
  const backbone = await tinyModel(join(temporaryDirectory(), 'backbone'));
  return (await elastify(backbone, { kind: 'matformer', granularities: [0.25, 0.5, 1] }, { out })).dir;
};

/** Adapters 'a' and 'b' for a model, random, for different projections. */
async function adaptersFor(dir: string): Promise<Record<string, string>> {
  const spec = readSpec(dir);
  const random = new Random(7, 'adapters');
  const made: Record<string, string> = {};
  for (const [name, rank, projections] of [
    ['a', 2, /q$|v$|down$/],
    ['b', 3, /q$|k$|o$|gate$|up$/],
  ] as const) {
    const values = (size: number) => Float32Array.from({ length: size }, () => random.uniform() - 0.5);
    const stored = [...storedModules(spec)].filter(([id]) => projections.test(id));
    const lora: Lora = new Map(
      stored.map(([id, { inputs, outputs }]) => [id, { rank, a: values(rank * inputs), b: values(outputs * rank) }]),
    );
    made[name] = join(temporaryDirectory(), name);
    await writePeft(made[name], loraModules(spec, lora), { base: dir, rank, transposed: spec.family === 'gpt2' });
  }
  return made;
}

type Adapted = typeof adaptersFor | null;
const cut = [
  ...['full' as const, share({ attn: 0.6, mlp: 0.5 }), share({ attn: [0, 0.5, 1], mlp: [0.5, 0, 1] })],
  { spec: { headShare: 0.5, blockShare: [0.25, 1, 0.5] } },
];
const everywhere = { tokens: { attn, mlp: attn }, heads: {}, blocks: { count: 4 } };

const models: [string, () => Promise<string>, Budget[], Budget | null, Adapted][] = [
  [
    'tokens, heads and blocks, keys of all rows',
    async () => (await elasticDirectories(everywhere)).elastic,
    [...cut, share({ attn: [0, 0, 0] })],
    share({ attn: [0, 0.5, 0.5], mlp: 0.3 }),
    null,
  ],
  [
    'tokens, heads and blocks, with adapters',
    async () => (await elasticDirectories({ ...everywhere, keys: 'selected' })).elastic,
    cut,
    null,
    adaptersFor,
  ],
  [
    'tokens and heads, keys of selected rows',
    async () => {
      const recipe = { tokens: { attn, mlp: attn }, keys: 'selected', heads: { keys: 'selected' } } as const;
      return (await elasticDirectories(recipe)).elastic;
    },
    [
      'full',
      share({ attn: 0.6 }),
      share({ attn: [0, 0.5, 1], mlp: [0.5, 0, 1] }),
      { spec: { headShare: 0.5, tokenCapacity: { attn: [0.7, 0, 1] } } },
    ],
    null,
    null,
  ],
  [
    'tokens and corrections',
    async () => (await elasticDirectories({ lora: { rank: 2, targets: ['q', 'k', 'o', 'up'] } })).elastic,
    ['full', 0.8, share({ attn: [0, 1, 0.4], mlp: [1, 0.6, 0] })],
    0.7,
    null,
  ],
  ['widths and adapters', nested, ['full', 'ffn25', { spec: { ffnWidth: [0.5, 0.25, 1] } }], 'ffn25', adaptersFor],
  [
    'widths, tokens and corrections, with more widths than share a run',
    async () => {
      const routed = { tokens: { attn, mlp: attn }, lora: { rank: 2, targets: ['q', 'gate', 'down'] } } as const;
      const recipe = { kind: 'matformer', granularities: [0.25, 0.5, 1], alignment: 8 } as const;
      return (await elasticDirectories(routed, recipe)).elastic;
    },
    [
      ...['full' as const, 0.7, share({ attn: 0.6, mlp: [0.5, 0, 0.7] })],
      { spec: { ffnWidth: 0.25 } },
      { spec: { ffnWidth: [0.5, 1, 0.25], tokenCapacity: { mlp: 0.6 } } },
      ...[0.375, 0.625, 0.75].map((ffnWidth) => ({ spec: { ffnWidth, tokenCapacity: { mlp: [0.8, 1, 0.3] } } })),
    ],
    { spec: { ffnWidth: 0.25, tokenCapacity: { mlp: 0.6 } } },
    null,
  ],
  [
    'widths with norms behind sub-layers and approximate GELU, and adapters',
    async () => {
      const out = join(temporaryDirectory(), 'gemma3');
      const recipe = { kind: 'matformer', granularities: [0.25, 0.5, 1] } as const;
      return (await elastify(join(goldenDirectory, 'gemma3'), recipe, { out })).dir;
    },
    ['full', 'ffn25', 'ffn50', { spec: { ffnWidth: 0.75 } }],
    'ffn25',
    adaptersFor,
  ],
];

describe.each(models)('%s', (_, make, budgets, draft, adapted) => {
  let dir: string;
  let model: ElasticModel;
  beforeAll(async () => {
    dir = await make();
    // Little of everything, so that sequences wait, chunks are many, and pages run out.
    const adapters = adapted && { adapters: await adapted(dir) };
    model = await loadModel(dir, { maxSequences: 5, maxBatchTokens: 12, kvCacheBytes: 120_000, ...adapters });
  });
  afterAll(() => model.dispose());

  const below = (random: Random, n: number) => Math.floor(random.uniform() * n);
  const anyAdapter = (random: Random): { adapter?: string } => {
    const { adapters } = model.info;
    const adapter = adapters.length > 0 ? [undefined, ...adapters][below(random, adapters.length + 1)] : undefined;
    return adapter === undefined ? {} : { adapter };
  };
  // How corrections' two products divide their cost is not the same for every projection.
  const inexact = () => (model.network.adapters ? 5e-3 : model.network.lora ? 1e-3 : 0);
  const requests = (count: number, seed: number): Asked[] => {
    const random = new Random(seed, 'requests');
    return Array.from({ length: count }, () => {
      const prompt = Array.from({ length: 1 + below(random, 40) }, () => below(random, model.info.vocab));
      const budget = budgets[below(random, budgets.length)];
      const sampling = below(random, 2) ? { temperature: 1.2, seed: below(random, 100), topK: below(random, 30) } : {};
      const speculative =
        draft && budget === 'full' && below(random, 2) ? { draft, tokens: 1 + below(random, 16) } : false;
      const abortAfter = below(random, 4) === 0 ? 1 + below(random, 4) : 0;
      return {
        prompt,
        options: {
          ...{ budget, ...anyAdapter(random), ...sampling, maxTokens: 1 + below(random, 16) },
          ...(speculative && { speculative }),
        },
        abortAfter,
      };
    });
  };

  test('random mixes of sequences have the bits of each alone', async () => {
    const asked = requests(24, 1);
    const together = await Promise.all(asked.map((request) => ask(model, request)));
    expect(model.load()).toMatchObject({ running: 0, waiting: 0, kvCacheUsed: 0 });
    for (const [i, request] of asked.entries()) {
      const alone = await outcome(model.generate(request.prompt, request.options));
      const { chunks, reason, compute, counts } = together[i];
      const got = chunks.map(({ token, logprob }) => [token, logprob]);
      const all = alone.chunks.map(({ token, logprob }) => [token, logprob]);
      expect(got).toEqual(reason === 'abort' ? all.slice(0, got.length) : all);
      if (reason === 'abort') continue;
      expect([reason, counts, chunks]).toEqual([alone.reason, alone.counts, alone.chunks]);
      // The same rows enter everywhere; routers that others need may come on top.
      expect(compute.layersRun).toEqual(alone.compute.layersRun);
      expect(compute.flopsFull).toBe(alone.compute.flopsFull);
      expect(compute.flops).toBeGreaterThanOrEqual(alone.compute.flops * (1 - inexact()));
      expect(compute.flops).toBeLessThan(1.1 * alone.compute.flops);
    }
  });

  test('sequences of one budget cost in common runs what each costs alone', async () => {
    for (const budget of budgets) {
      const asked = requests(6, 2).map(({ prompt, options }) => ({
        prompt,
        options: { ...options, budget, speculative: false as const },
      }));
      const together = await Promise.all(asked.map(({ prompt, options }) => outcome(model.generate(prompt, options))));
      for (const [i, { prompt, options }] of asked.entries()) {
        const { compute } = await outcome(model.generate(prompt, options));
        const off = Math.abs(together[i].compute.flops / compute.flops - 1);
        expect(off).toBeLessThanOrEqual(inexact());
      }
    }
  });

  test('forks of a kept sequence go their own ways with the bits of whole prompts', async () => {
    const random = new Random(3, 'forks');
    const ids = (count: number) => Array.from({ length: count }, () => below(random, model.info.vocab));
    for (const budget of budgets) {
      const prefix = ids(3 + below(random, 28));
      const mores = [ids(0), ids(5), ids(1 + below(random, 20))];
      const adapter = anyAdapter(random);
      using kept = await model.prefill(prefix, { budget, ...adapter });
      const options = (i: number): GenerateOptions => ({ maxTokens: 6, temperature: 1, seed: i });
      const forks = mores.map(() => kept.fork());
      const together = await Promise.all(forks.map((fork, i) => outcome(fork.generate(mores[i], options(i)))));
      for (const [i, more] of mores.entries()) {
        using fork = forks[i];
        const alone = await outcome(model.generate([...prefix, ...more], { ...options(i), ...adapter, budget }));
        // What a word decodes to depends on the text before it, which is the same.
        expect(together[i].chunks).toEqual(alone.chunks);
        expect(together[i].counts.cachedTokens).toBe(prefix.length - 1);
        const text = [...prefix, ...more, ...alone.chunks.map(({ token }) => token)];
        expect(fork.ids).toEqual(text);
        // And on, from where generation ended.
        const next = await outcome(fork.generate([7], options(9)));
        const whole = await outcome(model.generate([...text, 7], { ...options(9), ...adapter, budget }));
        expect(next.chunks).toEqual(whole.chunks);
      }
      expect(kept.ids).toEqual(prefix);
    }
    expect(model.load().kvCacheUsed).toBe(0);
  });
});

describe.each(['mistral-window', 'gemma3'])('%s, whose windows texts outgrow', (name) => {
  let dir: string;
  beforeAll(async () => {
    const plain = join(temporaryDirectory(), name);
    cpSync(join(goldenDirectory, name), plain, { recursive: true });
    const path = join(plain, 'config.json');
    const config = JSON.parse(readFileSync(path, 'utf8'));
    writeFileSync(path, JSON.stringify({ ...config, max_position_embeddings: 1024 }));
    const out = join(temporaryDirectory(), 'nested');
    ({ dir } = await elastify(plain, { kind: 'matformer', granularities: [0.5, 1] }, { out }));
  });
  /** Pages of a whole text of so many rows, where those behind windows are used again or are not. */
  const pagesOf = ({ network: { spec, limits } }: ElasticModel, rows: number, again: boolean): number => {
    const most = (window: number) => Math.ceil((window + limits.chunkRows + 17) / 16) + 1;
    const all = Math.ceil(rows / 16);
    const each = spec.perLayer.map(({ window }) => (again && window > 0 ? Math.min(all, most(window)) : all));
    return each.reduce((sum, pages) => sum + pages, 0);
  };
  const bytesOf = ({ network: { spec } }: ElasticModel, pages: number) =>
    pages * 2 * 16 * spec.kvHeads * spec.headDim * Float32Array.BYTES_PER_ELEMENT;

  test('pages behind windows are used again: the same bits in less memory, also drafted and forked', async () => {
    await using roomy = await loadModel(dir, { maxContext: 400 });
    await using model = await loadModel(dir, { maxContext: 400, maxSequences: 4, maxBatchTokens: 24 });
    expect(model.network.limits.chunkRows).toBe(20);
    // Chunks as long as the context leave nothing to use again.
    expect(roomy.network.limits.chunkRows).toBe(400);
    const random = new Random(11, 'windows');
    const below = (n: number) => Math.floor(random.uniform() * n);
    const ids = (count: number) => Array.from({ length: count }, () => below(model.info.vocab));
    const asked = [300, 40, 170, 5].map((length, i) => ({
      prompt: ids(length),
      options: { maxTokens: i === 2 ? 200 : 90, temperature: 1, seed: i },
    }));
    const speculative = { draft: 'ffn50', tokens: 16 };
    const alone = [];
    for (const { prompt, options } of asked) alone.push((await outcome(roomy.generate(prompt, options))).chunks);
    const together = await Promise.all(
      asked.map(async ({ prompt, options }, i) => {
        const drafts = i % 2 === 0 ? { speculative } : {};
        return (await outcome(model.generate(prompt, { ...options, ...drafts }))).chunks;
      }),
    );
    expect(together).toEqual(alone);

    const [{ prompt, options }] = asked;
    const used = async (of: ElasticModel) => {
      for await (const _ of of.generate(prompt, options)) return of.load().kvCacheUsed;
    };
    const rows = prompt.length + options.maxTokens - 1;
    expect(await used(roomy)).toBe(bytesOf(roomy, pagesOf(roomy, rows, false)));
    expect(await used(model)).toBe(bytesOf(model, pagesOf(model, rows, true)));
    expect(pagesOf(model, rows, true)).toBeLessThan(0.7 * pagesOf(model, rows, false));

    // Forks go on behind a text that has used its pages again, and over pages that they have in common.
    using kept = await model.prefill(prompt.slice(0, 250));
    const forks = [kept.fork(), kept.fork(), kept];
    const mores = [ids(3), ids(100), ids(40)];
    const more = await Promise.all(
      forks.map((fork, i) => outcome(fork.generate(mores[i], { ...options, maxTokens: 30 }))),
    );
    for (const [i, own] of mores.entries()) {
      const text = [...prompt.slice(0, 250), ...own];
      const whole = await outcome(roomy.generate(text, { ...options, maxTokens: 30 }));
      expect(more[i].chunks).toEqual(whole.chunks);
    }
    for (const fork of forks) fork.dispose();
    expect(model.load()).toMatchObject({ running: 0, kvCacheUsed: 0 });
  });

  test('one whole context fits what is set aside by default, and no less', async () => {
    const options = { maxContext: 400, maxSequences: 1, maxBatchTokens: 21 };
    await using model = await loadModel(dir, options);
    const { kvCacheBytes } = model.load();
    expect(kvCacheBytes).toBe(bytesOf(model, pagesOf(model, 400, true)));
    expect((await model.generate([1, 2], { maxTokens: 398 }).ids).length).toBeGreaterThan(0);
    await using small = await loadModel(dir, { ...options, kvCacheBytes: kvCacheBytes - 1 });
    expect(() => small.generate([1, 2], { maxTokens: 399 })).toThrow(/400 tokens need/);
  });
});

describe('a plain model', () => {
  const dir = join(goldenDirectory, 'llama-gqa');
  const load = (options: LoadOptions) => loadModel(dir, options);
  /** Bytes of a page. */
  const pageOf = ({ network: { spec } }: ElasticModel) => 2 * 16 * spec.kvHeads * spec.headDim * 4;

  test('many short sequences of several widths, cancelled, forked and continued at random, leave no page behind', async () => {
    const out = join(temporaryDirectory(), 'widths');
    await elastify(dir, { kind: 'matformer', granularities: [0.25, 0.5, 1] }, { out });
    await using model = await loadModel(out, { maxSequences: 16, kvCacheBytes: 1 << 19 });
    const widths: Budget[] = [...['full', 'ffn50', 'ffn25'], { spec: { ffnWidth: [0.5, 1] } }];
    const random = new Random(5, 'soak');
    const below = (n: number) => Math.floor(random.uniform() * n);
    const prompt = () => Array.from({ length: 1 + below(30) }, () => below(model.info.vocab));
    const one = async (): Promise<void> => {
      const controller = new AbortController();
      const options = { maxTokens: 1 + below(8), temperature: 1, seed: below(99), signal: controller.signal };
      const cancel = below(3);
      const budget = widths[below(widths.length)];
      if (below(4) > 0) {
        const stream = model.generate(prompt(), { ...options, budget });
        if (cancel === 0) setTimeout(() => controller.abort(), below(20));
        for await (const _ of stream) if (cancel === 1) break;
        return void (await stream.usage);
      }
      const kept = await model.prefill(prompt(), { budget });
      const forks: SequenceState[] = [kept, kept.fork(), kept.fork()];
      const streams = forks.map((fork) => fork.generate(prompt().slice(0, 8), options));
      if (cancel === 0) controller.abort();
      if (cancel === 1) forks[below(3)].dispose();
      await Promise.all(streams.map(({ usage }) => usage));
      for (const fork of forks) fork.dispose();
    };
    const total = 670;
    let started = 0;
    const worker = async () => {
      while (started++ < total) await one();
    };
    await Promise.all(Array.from({ length: 32 }, worker));
    expect(model.load()).toMatchObject({ running: 0, waiting: 0, kvCacheUsed: 0 });
  });

  test('sequences share runs', async () => {
    await using model = await load({});
    const run = vi.spyOn(Program.prototype, 'run');
    try {
      const prompts = Array.from({ length: 8 }, (_, i) => [3 + i, 5, 7]);
      await Promise.all(prompts.map((prompt) => model.generate(prompt, { maxTokens: 8 }).ids));
      expect(run.mock.calls.length).toBe(8);
    } finally {
      run.mockRestore();
    }
  });

  test('prompts are read in chunks between which others go on', async () => {
    await using model = await load({ maxSequences: 3, maxBatchTokens: 11 });
    const order: string[] = [];
    const follow = async (name: string, prompt: number[], maxTokens: number) => {
      for await (const _ of model.generate(prompt, { maxTokens })) order.push(name);
    };
    const long = Array.from({ length: 50 }, (_, i) => i % 40);
    // Chunks of 8: 7 for each long prompt. The short one has a token at every run but the first of each.
    await Promise.all([follow('a', long, 1), follow('b', long, 1), follow('short', [1], 20)]);
    expect(order.slice(0, 10)).toEqual(new Array(10).fill('short'));
    expect(order.indexOf('a')).toBeLessThan(order.indexOf('b'));
    expect(order.filter((name) => name === 'short')).toHaveLength(20);
  });

  test('what can never fit is refused at once and says what it needs', async () => {
    const usual = await load({});
    const page = pageOf(usual);
    const { layers } = usual.info;
    await usual.dispose();
    await using model = await load({ kvCacheBytes: (4 * layers - 1) * page + 1 });
    expect(() => model.generate([1, 2, 3], { maxTokens: 60 })).toThrow(InvalidArgumentError);
    expect(() => model.generate([1, 2, 3], { maxTokens: 60 })).toThrow(
      `62 tokens need ${4 * layers * page} bytes of keys and values, and kvCacheBytes leaves ${(4 * layers - 1) * page}`,
    );
    await expect(model.prefill(new Array(64).fill(1))).rejects.toThrow(/63 tokens need/);
    expect((await model.generate([1, 2, 3], { maxTokens: 5 }).ids).length).toBeGreaterThan(0);
  });

  test('more sequences than fit wait their turn', async () => {
    await using model = await load({ maxSequences: 2 });
    const streams = Array.from({ length: 5 }, (_, i) => model.generate([i + 1], { maxTokens: 4 }));
    let ended = 0;
    const order = await Promise.all(streams.map(async ({ usage }) => [(await usage).compute.ms, ended++] as const));
    expect(order.map(([, at]) => at)).toEqual([0, 1, 2, 3, 4]);
    for (const [{ queue, prefill, decode, total }] of order) {
      expect(Math.abs(queue + prefill + decode - total)).toBeLessThan(1e-6);
    }
    expect(order[4][0].queue).toBeGreaterThan(order[0][0].prefill);
  });

  test('kept sequences take room until they are disposed of; what then cannot run says so', async () => {
    await using model = await load({ kvCacheBytes: 100_000 });
    const kept: SequenceState[] = [];
    for (;;) {
      const state = await model.prefill(new Array(32).fill(1)).catch((error) => error);
      if (!(state instanceof Error)) {
        kept.push(state);
        continue;
      }
      expect(state).toBeInstanceOf(OutOfMemoryError);
      expect(state.message).toMatch(/^\[generate\] 31 tokens need \d+ bytes of keys and values more than are free/);
      break;
    }
    expect(kept.length).toBeGreaterThan(0);
    await expect(model.generate(new Array(32).fill(1), { maxTokens: 1 }).ids).rejects.toThrow(OutOfMemoryError);
    // Forks take nothing.
    const used = model.load().kvCacheUsed;
    kept.push(kept[0].fork());
    expect(model.load().kvCacheUsed).toBe(used);
    for (const state of kept) state.dispose();
    expect(model.load().kvCacheUsed).toBe(0);
    expect((await model.generate(new Array(32).fill(1), { maxTokens: 1 }).ids).length).toBe(1);
  });

  test('a deadline ends a generation, running or waiting', async () => {
    await using model = await load({ maxSequences: 1 });
    const options = { maxTokens: 60, temperature: 3 };
    const [first, second] = [0, 1].map((seed) => model.generate([1], { ...options, seed, deadlineMs: 1 }));
    expect(await second.finishReason).toBe('deadline');
    expect(await second.ids).toEqual([]);
    expect((await second.usage).compute).toMatchObject({ flops: 0, flopsFull: 0 });
    expect(['deadline', 'length', 'stop']).toContain(await first.finishReason);
    const unhurried = model.generate([1], { maxTokens: 3, deadlineMs: 2 ** 31 - 1 });
    expect((await unhurried.ids).length).toBeGreaterThan(0);
    expect(await unhurried.finishReason).not.toBe('deadline');
    for (const deadlineMs of [0, -1, Number.NaN, 2 ** 31]) {
      expect(() => model.generate([1], { deadlineMs })).toThrow(/deadlineMs must be milliseconds in \(0, 2\^31\)/);
    }
  });

  test('a kept sequence knows its state', async () => {
    await using model = await load({});
    const kept = await model.prefill([3, 5, 7]);
    expect(kept.usage).toMatchObject({ inputTokens: 3, cachedTokens: 0, outputTokens: 0 });
    expect(kept.usage.compute.ratio).toBe(1);
    const stream = kept.generate([9], { maxTokens: 4 });
    expect(() => kept.generate([1])).toThrow(/the sequence is generating/);
    expect(() => kept.fork()).toThrow(/the sequence is generating/);
    expect(() => kept.generate([1], { budget: 'full' } as object)).toThrow(/the sequence is generating/);
    await stream.text.catch(() => {});
    expect(() => kept.generate([1], { budget: 'full' } as object)).toThrow(/unknown option 'budget'/);
    expect(() => kept.generate([model.info.vocab])).toThrow(/prompt token 0 must be an id/);
    expect(() => kept.generate(new Array(60).fill(1))).toThrow(/the prompt has \d+ tokens and the context holds 64/);
    const ids = kept.ids;
    expect(ids.slice(0, 4)).toEqual([3, 5, 7, 9]);
    expect(ids).toEqual([3, 5, 7, 9, ...(await stream.ids)]);
    // Nothing is kept of what was waiting.
    expect(await kept.generate([1, 2], { signal: AbortSignal.abort() }).finishReason).toBe('abort');
    expect(kept.ids).toEqual(ids);

    const running = kept.generate([1], { temperature: 4, seed: 1 });
    kept.dispose();
    kept.dispose();
    expect(await running.finishReason).toBe('abort');
    expect(model.load().kvCacheUsed).toBe(0);
    expect(() => kept.fork()).toThrow(DisposedError);
    expect(() => kept.generate([1])).toThrow(DisposedError);

    await expect(model.prefill([3], { budgt: 1 } as object)).rejects.toThrow(/unknown option 'budgt'/);
    await expect(model.prefill([3, 4], { signal: AbortSignal.abort(new Error('enough')) })).rejects.toThrow('enough');
    const late = await model.prefill([3]);
    const reading = model.prefill([3, 4, 5]);
    await model.dispose();
    await expect(reading).rejects.toThrow(DisposedError);
    expect(() => late.fork()).toThrow(/the model was disposed/);
    expect(() => late.generate([1])).toThrow(DisposedError);
    await expect(model.prefill([3])).rejects.toThrow(DisposedError);
  });

  test('limits are checked', async () => {
    for (const name of ['maxSequences', 'maxBatchTokens', 'kvCacheBytes']) {
      for (const value of [0, 1.5, -1, 'x'])
        await expect(load({ [name]: value })).rejects.toThrow(`${name} must be a positive integer`);
    }
    await expect(load({ maxSequences: 8, maxBatchTokens: 8 })).rejects.toThrow(/maxBatchTokens must be more than/);
    await using model = await load({ maxBatchTokens: 5 });
    expect(model.network.limits).toMatchObject({ maxSequences: 4, chunkRows: 1 });
    const prompts = [[1, 2, 3], [4], [5, 6]];
    const together = await Promise.all(prompts.map((prompt) => model.generate(prompt, { maxTokens: 4 }).ids));
    await using usual = await load({});
    for (const [i, prompt] of prompts.entries())
      expect(together[i]).toEqual(await usual.generate(prompt, { maxTokens: 4 }).ids);
  });
});
