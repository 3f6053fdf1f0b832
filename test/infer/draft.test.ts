// How many tokens are drafted, on a simulated clock: as fast as the best fixed number, and never much slower than plain.
import { describe, expect, test } from 'vitest';
import { DraftLength } from '../../lib/infer/engine/draft.js';
import { maxDraftTokens } from '../../lib/infer/programs.js';
import { uniform } from '../../lib/infer/random.js';

/** Milliseconds of a plain step, a drafted token and one more row to verify; the probability that a draft is accepted. */
interface Costs {
  plain: number;
  draft: number;
  row: number;
  acceptance: (token: number) => number;
  /** Times vary by this factor up and down. */
  noise?: number;
}

/** A text of so many tokens: how much faster than plain steps it came. Drafts so many tokens, or as `length` says. */
function speedup(costs: Costs, tokens: number, length: DraftLength | number, seed = 1): number {
  let draws = 0;
  const draw = () => uniform(seed, draws++);
  const { noise = 1 } = costs;
  const meanNoise = noise === 1 ? 1 : (noise - 1 / noise) / (2 * Math.log(noise));
  const timed = (ms: number) => (ms * noise ** (2 * draw() - 1)) / meanNoise;
  const auto = typeof length === 'number' ? null : length;
  auto?.begin();
  let clock = 0;
  for (let at = 0; at < tokens; ) {
    const drafted = Math.min(auto ? auto.next() : (length as number), tokens - at - 1);
    if (drafted === 0) {
      const ms = timed(costs.plain);
      auto?.plain(ms);
      clock += ms;
      at++;
      continue;
    }
    let accepted = 0;
    while (accepted < drafted && draw() < costs.acceptance(at + accepted)) accepted++;
    const draftMs = timed(drafted * costs.draft);
    const verifyMs = timed(costs.plain + drafted * costs.row);
    auto?.cycle({ drafted, accepted, draftMs, verifyMs });
    clock += draftMs + verifyMs;
    at += accepted + 1;
  }
  return (tokens * costs.plain) / clock;
}

const always = (p: number) => () => p;
const bestFixed = (costs: Costs, tokens: number) =>
  Math.max(...Array.from({ length: maxDraftTokens }, (_, i) => speedup(costs, tokens, i + 1)));

describe.each([1, 2, 3, 4, 5])('seed %i', (seed) => {
  test.each([
    ['cheap and good', { plain: 10, draft: 2.5, row: 0.2, acceptance: always(0.9) }],
    ['cheap and fair', { plain: 10, draft: 2, row: 0.2, acceptance: always(0.7) }],
    ['dear and nearly perfect', { plain: 10, draft: 6, row: 0.1, acceptance: always(0.98) }],
  ])('a draft that is %s gets the speed of the best fixed number', (_, costs) => {
    const best = bestFixed(costs, 4000);
    expect(best).toBeGreaterThan(1.15);
    const length = new DraftLength();
    speedup(costs, 256, length, seed);
    expect(speedup(costs, 4000, length, seed + 100)).toBeGreaterThan(0.93 * best);
  });

  test.each([
    ['never right', { plain: 10, draft: 5, row: 0.5, acceptance: always(0) }],
    ['right but as slow', { plain: 10, draft: 10, row: 0.5, acceptance: always(1) }],
    ['a coin', { plain: 10, draft: 5, row: 0.5, acceptance: always(0.45) }],
    ['never right, its rows dear', { plain: 10, draft: 8, row: 9, acceptance: always(0) }],
    ['good, then never right', { plain: 10, draft: 2, row: 0.2, acceptance: (at: number) => (at < 40 ? 0.9 : 0) }],
    ['never right, on a restless clock', { plain: 10, draft: 5, row: 0.5, acceptance: always(0), noise: 1.5 }],
  ])('a draft that is %s costs next to nothing', (_, costs) => {
    const length = new DraftLength();
    for (const call of [0, 1, 2]) {
      expect(speedup(costs, 256, length, seed + call), `call ${call}`).toBeGreaterThan('noise' in costs ? 0.97 : 0.98);
    }
  });

  test('a draft that was of no use is found out to be good', () => {
    const length = new DraftLength();
    const times = { plain: 10, draft: 2, row: 0.2 };
    speedup({ ...times, acceptance: always(0) }, 2000, length, seed);
    expect(speedup({ ...times, acceptance: always(0.9) }, 1000, length, seed)).toBeGreaterThan(1.5);
  });
});

test('the first step is plain, the second a probe of one token', () => {
  const length = new DraftLength();
  length.begin();
  expect(length.next()).toBe(0);
  length.plain(10);
  expect(length.next()).toBe(1);
});
