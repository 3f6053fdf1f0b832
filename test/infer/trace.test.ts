// A trace shows the choices that generation made, with the exact text of every token.
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { ElasticSpec } from '../../lib/elastic/axes.js';
import { type ElasticModel, loadModel } from '../../lib/infer/model.js';
import type { ElasticTrace } from '../../lib/infer/trace.js';
import { DisposedError, InvalidArgumentError } from '../../lib/native/errors.js';
import { elasticDirectories } from './fixture.js';

const prompt = 'The pig hid the owl by the';
let model: ElasticModel;
let plan: string;
beforeAll(async () => {
  const made = await elasticDirectories();
  plan = made.plan;
  model = await loadModel(made.elastic);
});
afterAll(() => model.dispose());

/** Share of tokens that entered, per layer. */
const shares = ({ tokens, layers }: ElasticTrace, bits: Uint8Array): number[] =>
  Array.from({ length: layers }, (_, layer) => {
    const entered = tokens.filter((_, t) => bits[t * layers + layer] === 1).length;
    return entered / tokens.length;
  });

test.each([0.8, 0.6])('the tokens that entered while a text was generated at %d', async (budget) => {
  const stream = model.generate(prompt, { budget, maxTokens: 24, temperature: 1, seed: 3 });
  const ids = [...model.network.tokenizer!.encode(prompt), ...(await stream.ids)];
  const { layersRun } = (await stream.usage).compute;
  // The last token generated was not run, and the budget is resolved for a length: that of the rows run.
  const trace = await model.trace(ids.slice(0, -1), { budget: { spec: (await stream.usage).compute.effective } });
  for (const place of ['attn', 'mlp'] as const) {
    shares(trace, trace[place]).forEach((share, l) => {
      expect(share).toBeCloseTo(layersRun[place][l], 6);
    });
  }
  const all = [...trace.attn, ...trace.mlp];
  expect(all).toContain(0);
  expect(all).toContain(1);
  trace.depth.forEach((depth, t) => {
    const layers = Array.from({ length: trace.layers }, (_, l) => t * trace.layers + l);
    expect(depth).toBe(layers.filter((i) => trace.attn[i] || trace.mlp[i]).length);
  });
});

test('tokens joined are the text, also where a character takes several', async () => {
  for (const text of [prompt, 'naïve — 🦉 <b> & "x"\n\tend', '', '🦉'.slice(0, 1)]) {
    const trace = await model.trace(text, { budget: 0.7 });
    const { tokenizer } = model.network;
    const ids = text === '' ? [model.network.startId!] : tokenizer!.encode(text);
    expect(trace.tokens).toHaveLength(ids.length);
    expect(trace.tokens.join('')).toBe(tokenizer!.decode(ids));
  }
});

test('everything runs at full budget, nothing where the capacity is 0', async () => {
  const full = await model.trace(prompt);
  expect(new Set([...full.attn, ...full.mlp])).toEqual(new Set([1]));
  expect(new Set(full.depth)).toEqual(new Set([model.info.layers]));

  const spec = { tokenCapacity: { attn: [1, 0, 0.5], mlp: [0, 0, 1] } };
  const trace = await model.trace(prompt, { budget: { spec } });
  expect(shares(trace, trace.mlp)).toEqual([0, 0, 1]);
  expect(shares(trace, trace.attn).slice(0, 2)).toEqual([1, 0]);

  const fixed = await model.trace(prompt, { budget: { spec: { tokenCapacity: { attn: [1, 0, 1], mlp: [0, 0, 1] } } } });
  expect(shares(fixed, fixed.attn)).toEqual([1, 0, 1]);
});

test('blocks of an FFN that every token uses count by their share', async () => {
  const { elastic } = await elasticDirectories({ tokens: { mlp: [0.3, 1] }, blocks: { count: 4 } });
  await using cut = await loadModel(elastic);
  const run = async (spec: ElasticSpec) => {
    const stream = cut.generate(prompt, { budget: { spec }, maxTokens: 12, seed: 1 });
    const ids = [...cut.network.tokenizer!.encode(prompt), ...(await stream.ids)].slice(0, -1);
    const { layersRun } = (await stream.usage).compute;
    const trace = await cut.trace(ids, { budget: { spec } });
    shares(trace, trace.mlp).forEach((share, l) => {
      expect(share * trace.blockShare[l]).toBeCloseTo(layersRun.mlp[l], 6);
    });
    return trace;
  };
  const both = await run({ tokenCapacity: { mlp: 0.6 }, blockShare: [0.5, 0.6, 1] });
  expect([...both.blockShare]).toEqual([0.5, 0.75, 1]);
  const blocksOnly = await run({ blockShare: [0.25, 1, 0] });
  expect(shares(blocksOnly, blocksOnly.mlp)).toEqual([1, 1, 0]);
  // A sub-layer that no token enters, or of which no block is used, runs neither of its routers.
  const neither = await run({ tokenCapacity: { mlp: [0, 0.5, 0.5] }, blockShare: [0.5, 0, 0.5] });
  expect(shares(neither, neither.mlp).slice(0, 2)).toEqual([0, 0]);
});

test('as JSON it is base64', async () => {
  const trace = await model.trace(prompt, { budget: 0.6 });
  const json = JSON.parse(JSON.stringify(trace));
  expect(json).toMatchObject({ tokens: trace.tokens, layers: trace.layers });
  for (const key of ['attn', 'mlp', 'depth'] as const)
    expect(new Uint8Array(Buffer.from(json[key], 'base64'))).toEqual(trace[key]);
});

test('what cannot be traced is an error that says why', async () => {
  await expect(model.trace([1e6])).rejects.toThrow(InvalidArgumentError);
  await expect(model.trace(prompt, { budgets: 1 } as object)).rejects.toThrow("[trace] unknown option 'budgets'");
  await expect(model.trace(new Array(1000).fill(5))).rejects.toThrow('do not fit the context');
  const untrained = await loadModel(plan);
  await expect(untrained.trace(prompt, { budget: 0.5 })).rejects.toThrow('never trained');
  await untrained.dispose();
  await expect(untrained.trace(prompt)).rejects.toThrow(DisposedError);
});
