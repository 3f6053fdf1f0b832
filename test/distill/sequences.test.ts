// Router-Tuning of whole sequences: capacities are reached, and what is learnt is better than chance.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { Random } from '../../lib/distill/random.js';
import { drawn, evenly } from '../../lib/distill/steps.js';
import { evaluate } from '../../lib/infer/quality/evaluate.js';
import { distilledDirectories } from '../infer/fixture.js';
import { stories } from './tiny.js';

const events = (dir: string): Record<string, unknown>[] =>
  readFileSync(join(dir, 'metrics.jsonl'), 'utf8')
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));
/** Stories, and every other one with its letters in another order: it is not of the text that the model was trained on. */
const mixed = (count: number) =>
  stories(count).map((story, i) =>
    i % 2 ? [...story].sort((a, b) => ((a.charCodeAt(0) * 7) % 11) - ((b.charCodeAt(0) * 7) % 11)).join('') : story,
  );
/** No two alike: sequences of one score enter together. */
const different = stories(120).map((story, i) => `${i} ${story}`);

describe('a fixed capacity, by cross-entropy and with the capacity loss', async () => {
  const warnings: string[] = [];
  const { elastic } = await distilledDirectories([{ kind: 'router-tuning', layers: [1], capacity: 0.3 }], {
    data: { kind: 'documents', documents: different },
    onEvent: (event) => {
      if (event.type === 'warn') warnings.push(event.message);
    },
    loss: [
      { kind: 'cross-entropy', weight: 1 },
      { kind: 'capacity', weight: 5 },
    ],
    optimizer: { lr: 2e-2 },
    steps: 60,
    calibrationTokens: 4096,
  });

  test('mean sigmoids of routers come to it', () => {
    const off = events(elastic).flatMap(({ type, terms }) =>
      type === 'step' ? [(terms as Record<string, number>).capacity] : [],
    );
    expect(off[0]).toBeCloseTo(0.04, 3);
    expect(off.slice(-10).reduce((a, b) => a + b, 0) / 10).toBeLessThan(0.005);
  });

  test('calibrated thresholds let through about what is asked for', () => {
    expect(warnings).toEqual([]);
  });
});

test('sequences are chosen better than at random', async () => {
  const { elastic } = await distilledDirectories([{ kind: 'router-tuning', target: 'block', layers: [1] }], {
    data: { kind: 'documents', documents: mixed(120) },
    steps: 80,
    batchTokens: 512,
    optimizer: { lr: 2e-2 },
    calibrationTokens: 4096,
  });
  const { levels } = await evaluate(elastic, {
    data: mixed(200).slice(120),
    budgets: [{ spec: { sequenceCapacity: { block: 0.5 } } }],
    baselines: ['random'],
    sequenceLength: 48,
    speed: false,
  });
  expect(levels[1].routedAdvantage!.kl.low).toBeGreaterThan(0);
});

test('whole sequences of batches add up to what is wanted', () => {
  const [even, random] = [evenly(), drawn(new Random(1, 'test'))];
  const wanted = Array.from({ length: 400 }, (_, i) => 0.3 * (1 + (i % 4)));
  const total = (whole: typeof even) => wanted.reduce((sum, w) => sum + whole(0, w), 0);
  const sum = wanted.reduce((a, b) => a + b, 0);
  expect(Math.abs(total(even) - sum)).toBeLessThanOrEqual(1);
  expect(Math.abs(total(random) - sum)).toBeLessThan(40);
});
