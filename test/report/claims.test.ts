// benchmarks/claims/matformer: what is reckoned from predictions, and the table of claims.
import { expect, test } from 'vitest';

const part = (name: string) => import(new URL(`../../benchmarks/claims/matformer/${name}.mjs`, import.meta.url).href);
const [{ compared, draftedBy }, { resultsOf }, { reportOf }] = await Promise.all(
  ['measure', 'results', 'report'].map(part),
);

test('distributions are compared with the reference, tokens with the next', () => {
  const logits = (...rows: number[][]) => Float32Array.from(rows.flat(), Math.log);
  // Two predictions of three tokens; those after the last token have no target. Probabilities need not be normalised.
  const own = logits([0.5, 0.25, 0.25], [0.1, 0.3, 0.6], [1, 1, 1]);
  const reference = logits([0.25, 0.5, 0.25], [2, 6, 12], [3, 1, 1]);
  const sums = compared(own, reference, [0, 1, 2], 3);
  expect(sums).toMatchObject({ n: 2, agree: 1 });
  expect(sums.ce).toBeCloseTo(-Math.log(0.25) - Math.log(0.6), 6);
  expect(sums.kl).toBeCloseTo(0.25 * Math.log(0.5) + 0.5 * Math.log(2), 6);
  expect(sums.overlap).toBeCloseTo(0.75 + 1, 6);
});

test('drafts are accepted up to the first wrong one, and the next run begins behind the corrected token', () => {
  const right = [false, true, true, false, true, true, true, true, false];
  // Runs at tokens 1 (two accepted, the third corrected), 4 (three accepted, one given by the run), 8 (the last, no draft).
  expect(draftedBy(right, 3)).toEqual({ drafted: 6, accepted: 5, cycles: 3, tokens: 9 });
  for (const count of [1, 2, 4, 16]) {
    const { accepted, cycles, tokens } = draftedBy(right, count);
    expect(accepted + cycles).toBe(tokens - 1);
  }
  expect(draftedBy([true], 4)).toEqual({ drafted: 0, accepted: 0, cycles: 0, tokens: 1 });
});

/** Two seeds of families whose every sequence has the same mean loss at each point. */
function families(slice: readonly number[], alone: readonly number[], drift = [0, 0]) {
  const sequences = (loss: number, agree: number) =>
    [10, 30, 20].map((n) => ({ n, ce: n * loss, kl: n * (1 - agree), agree: n * agree, overlap: n * agree }));
  return drift.map((d) => ({
    joint: {
      points: slice.map((loss, i) => ({
        widths: [i],
        parameters: i,
        sequences: sequences(loss + d, i / (slice.length - 1)),
      })),
      shared: [{ drafted: 7, accepted: 7, cycles: 2, tokens: 10 }],
      drafts: [{ drafted: 8, accepted: 6, cycles: 3, tokens: 10 }],
    },
    alone: {
      points: alone.map((loss, i) => ({ widths: null, parameters: 100 * i, sequences: sequences(loss, 0.2) })),
      drafts: [{ drafted: 8, accepted: 2, cycles: 7, tokens: 10 }],
    },
  }));
}
const settings = {
  ...{ steps: 400, batchTokens: 1024, sequenceLength: 128, draftTokens: 4, generated: 64, text: 'corpus', seeds: 2 },
  ...{ vocab: 1024, hidden: 96, layers: 2, ffn: 512 },
};
const facts = { machine: { cpu: 'a machine' }, sequences: 3, prompts: 1 };
const verdicts = (results: unknown) =>
  Object.fromEntries(
    reportOf({ settings, results, ...facts }).claims.map((c: { claim: string; held: string }) => [
      c.claim.replace(/.*(on average|Mix'n'Match|S is no worse|greedy drafts|caches of XL).*/, '$1'),
      c.held,
    ]),
  );

test('slices are compared with models trained alone, and points with the line between granularities', () => {
  // Two layers: every second point of the ladder is a granularity.
  const results = resultsOf(families([4, 3.4, 3, 2.4, 2, 1.6, 1], [4, 2.5, 2, 1], [0.1, -0.1]));
  const { average, granularities, mix } = results;
  // M is 20 % worse than alone, the others are equal once the seeds are added.
  expect(granularities.map((g: { relative: { value: number } }) => g.relative.value)).toEqual(
    [0, 0.2, 0, 0].map((x) => expect.closeTo(x, 9)),
  );
  expect(granularities[1].relative.seeds).toEqual([3.1, 2.9].map((x) => expect.closeTo(x / 2.5 - 1, 9)));
  expect(average.value).toBeCloseTo(0.05, 9);
  expect(mix.map((m: { aboveLine: { value: number } }) => m.aboveLine.value)).toEqual(
    [-0.1, -0.1, 0.1].map((x) => expect.closeTo(x, 9)),
  );
  expect(verdicts(results)).toMatchObject({
    'on average': 'not held',
    "Mix'n'Match": 'not held',
    'greedy drafts': 'held',
    'caches of XL': 'held',
  });
});

test('the table says what held, and shows every point', () => {
  const results = resultsOf(families([4, 3.4, 3, 2.4, 2, 1.4, 1], [4.1, 3.1, 2.1, 1.1]));
  expect(verdicts(results)).toMatchObject({
    'on average': 'held',
    "Mix'n'Match": 'held',
    'S is no worse': 'held',
    'greedy drafts': 'held',
    'caches of XL': 'held',
  });
  const { markdown } = reportOf({ settings, results, ...facts });
  expect(markdown).toContain('| XL | 512 | 300 | 1.0000 [1.0000, 1.0000] | 1.1000 [1.1000, 1.1000] | -9.09 %');
  expect(results.spread.value).toBeCloseTo(3 / 4.1, 9);
  expect(markdown).toContain(
    '75.0 % [75.0 %, 75.0 %] of drafted tokens, 3.00 [3.00, 3.00] tokens for a run of XL; alone',
  );
  expect(markdown).toContain(
    'alone 25.0 % [25.0 %, 25.0 %] of drafted tokens, 1.29 [1.29, 1.29] tokens for a run of XL',
  );
  expect(markdown.match(/^\| \d \|/gm)).toHaveLength(3);
});
