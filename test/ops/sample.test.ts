// sample: greedy choice, and the frequencies of temperature, top-k and top-p.
import { expect, test } from 'vitest';
import { Graph } from '../../lib/graph/graph.js';
import { Program, sample } from '../../lib/graph/index.js';
import { Engine } from '../../lib/native/index.js';
import { type Case, cases, compare, failure, inputs, random, testEngine } from './harness.js';

cases(
  'sample',
  (
    [
      [1, 1],
      [3, 17],
      [5, 1000],
    ] as const
  ).map(([s, v]): Case => {
    const make = inputs(v);
    return {
      name: `greedy, ${s} rows of ${v}`,
      inputs: {
        logits: make.f32(['S', s], v),
        params: make.values(Array.from({ length: s }, () => [0, 0, 1, make.next()]).flat(), ['S', s], 4),
      },
      build: ({ logits, params }) => ({ ...sample(logits, params) }),
    };
  }),
);

/** Logits with ties, infinities and both zeros, flat and steep, and params of every kind. */
function anyDraws(seed: number, rows: number, vocabulary: number) {
  const next = random(seed);
  const pick = (values: readonly number[]) => values[Math.floor(next() * values.length)];
  const logits = new Float32Array(rows * vocabulary);
  const params = new Float32Array(rows * 4);
  for (let s = 0; s < rows; ++s) {
    const [spread, step, missing] = [pick([0, 1e-3, 1, 4, 30]), pick([0, 0, 0.125, 1]), pick([0, 0, 0.3, 0.99])];
    for (let i = 0; i < vocabulary; ++i) {
      const x = (next() + next() + next() - 1.5) * spread;
      const value = step ? Math.round(x / step) * step : x;
      logits[s * vocabulary + i] = i > 0 && next() < missing ? Number.NEGATIVE_INFINITY : value;
    }
    const topK = pick([0, 0, 1, 5, 40, 1000, vocabulary - 1, vocabulary]);
    const topP = pick([1, 1, 0.999, 0.9, 0.5, 0.3, 1e-9, 0]);
    const u = pick([0, 0.25, 0.5, 1 - 2 ** -24, next(), next(), next(), next()]);
    params.set([pick([1, 0.7, 2, 1e-3, 1e-30, 0]), topK, topP, u], s * 4);
  }
  return { logits, params };
}

test.each([
  [200, 1],
  [200, 7],
  [100, 129],
  [50, 3000],
  [20, 5000],
  [3, 70_000],
])('%i draws from %i tokens are those of the CPU', async (rows, vocabulary) => {
  const g = new Graph();
  const drawn = sample(g.feed('logits', 'f32', [rows, vocabulary]), g.feed('params', 'f32', [rows, 4]));
  g.output('ids', drawn.ids);
  g.output('logprob', drawn.logprob);
  const feeds = anyDraws(vocabulary, rows, vocabulary);
  using cpu = new Engine('cpu');
  const [here, there] = await Promise.all(
    [testEngine(), cpu].map(async (engine) => {
      using program = Program.compile(g, engine);
      return (await program.run({ feeds })).outputs;
    }),
  );
  expect([...here.ids]).toEqual([...there.ids]);
  compare(here.logprob, there.logprob, 1e-6, 'logprob');
});

/** Ids and log-probabilities of `draws` evenly spread random numbers, for each of some logits; devices draw as the CPU. */
async function draw(rows: readonly (readonly number[])[], draws: number, ...params: [number, number, number]) {
  const g = new Graph();
  const count = rows.length * draws;
  const { ids, logprob } = sample(
    g.feed('logits', 'f32', [count, rows[0].length]),
    g.feed('params', 'f32', [count, 4]),
  );
  g.output('ids', ids);
  g.output('logprob', logprob);
  using engine = new Engine('cpu');
  using program = Program.compile(g, engine);
  const each = Array.from({ length: draws }, (_, i) => i);
  const { outputs } = await program.run({
    feeds: {
      logits: Float32Array.from(rows.flatMap((logits) => each.flatMap(() => logits))),
      params: Float32Array.from(rows.flatMap(() => each.flatMap((i) => [...params, (i + 0.5) / draws]))),
    },
  });
  return rows.map((logits, r) => {
    const drawn = outputs.ids.subarray(r * draws, (r + 1) * draws);
    const counts = logits.map(() => 0);
    for (const id of drawn) counts[id]++;
    return { ids: drawn, logprob: outputs.logprob.subarray(r * draws, (r + 1) * draws), counts };
  });
}

/** Pearson's statistic of counts, whose mean is one less than the ids that can be and whose deviation is sqrt(2) of that. */
function requireFrequencies(counts: readonly number[], probabilities: readonly number[]): void {
  const draws = counts.reduce((a, b) => a + b, 0);
  let statistic = 0;
  for (const [id, p] of probabilities.entries()) {
    if (p === 0) expect(counts[id], `id ${id} is left out`).toBe(0);
    else statistic += (counts[id] - draws * p) ** 2 / (draws * p);
  }
  const freedom = probabilities.filter((p) => p > 0).length - 1;
  expect(statistic).toBeLessThanOrEqual(freedom + 4 * Math.sqrt(2 * freedom));
}

const softmax = (logits: readonly number[]): number[] => {
  const e = logits.map((v) => Math.exp(v - Math.max(...logits)));
  const sum = e.reduce((a, b) => a + b, 0);
  return e.map((v) => v / sum);
};

/** Softmax of `logits / temperature` over the ids that `keep` accepts. */
const expected = (logits: readonly number[], temperature: number, keep: (id: number) => boolean) =>
  softmax(logits.map((v, id) => (keep(id) ? v / temperature : Number.NEGATIVE_INFINITY)));

const logits = [0.5, 2, -1, 1.25, 0, -3, 1.75];
const draws = 4000;

test.each([
  ['temperature 1', 1, 0, 1, () => true],
  ['temperature 0.5', 0.5, 0, 1, () => true],
  ['temperature 2, top-k 3', 2, 3, 1, (id: number) => [1, 6, 3].includes(id)],
  // Probabilities, descending: 0.36 0.28 0.17 ...: the first two are not enough for 0.7.
  ['top-p 0.7', 1, 0, 0.7, (id: number) => [1, 6, 3].includes(id)],
  ['top-k 1', 1, 1, 1, (id: number) => id === 1],
  ['top-k past the vocabulary', 1, 100, 1, () => true],
] as const)('%s', async (_, temperature, topK, topP, keep) => {
  const [{ counts, ids, logprob }] = await draw([logits], draws, temperature, topK, topP);
  requireFrequencies(counts, expected(logits, temperature, keep));
  const p = softmax(logits);
  for (let i = 0; i < draws; i += 97) expect(logprob[i]).toBeCloseTo(Math.log(p[ids[i]]), 5);
});

test('as many tokens as a vocabulary has come as often as they should', async () => {
  const next = random(3);
  const many = Array.from({ length: 100 }, () => 2 * next());
  const [{ counts }] = await draw([many], 8000, 1, 0, 1);
  requireFrequencies(counts, softmax(many));
});

test('top-k keeps the lowest of equal logits', async () => {
  const equal = [0, 0, 1, 0, 2];
  const [{ counts }] = await draw([equal], draws, 1, 3, 1);
  requireFrequencies(
    counts,
    expected(equal, 1, (id) => [0, 2, 4].includes(id)),
  );
});

test('two distributions give the same token for a random number about as often as any two could', async () => {
  const next = random(5);
  const some = Array.from({ length: 200 }, () => 6 * next());
  const other = some.map((x) => x + 1.5 * (next() - 0.5));
  const [p, q] = [softmax(some), softmax(other)];
  const distance = p.reduce((sum, x, i) => sum + Math.abs(x - q[i]), 0) / 2;
  const [a, b] = await draw([some, other], draws, 1, 0, 1);
  const same = [...a.ids].filter((id, i) => id === b.ids[i]).length / draws;
  const noise = 4 * Math.sqrt(0.25 / draws);
  expect(distance).toBeGreaterThan(0.1);
  expect(same).toBeGreaterThan((1 - distance) / (1 + distance) - noise);
  expect(same).toBeLessThan(1 - distance + noise);
});

test('greedy takes the lowest of equal logits', async () => {
  const [{ ids }] = await draw([[1, 3, 3, 2]], 3, 0, 0, 1);
  expect([...ids]).toEqual([1, 1, 1]);
});

test('NaN logits and parameters out of range are InvalidData', async () => {
  const run = (values: number[], params: number[]) =>
    failure((g) => g.output('ids', sample(g.feed('l', 'f32', [1, 3]), g.feed('p', 'f32', [1, 4])).ids), {
      feeds: { l: Float32Array.from(values), p: Float32Array.from(params) },
    });
  expect(await run([1, Number.NaN, 2], [1, 0, 1, 0.5])).toMatchObject({ code: 'InvalidData' });
  expect(await run([1, 1, 2], [-1, 0, 1, 0.5])).toMatchObject({ code: 'InvalidData' });
  expect(await run([1, 1, 2], [1, 0, 1, Number.NaN])).toMatchObject({ code: 'InvalidData' });
});
