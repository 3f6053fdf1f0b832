// Calibration of exits: levels cost and keep what they say, the best of all thresholds, and refuse what cannot be reached.
import { cpSync } from 'node:fs';
import { beforeAll, describe, expect, it } from 'vitest';
import { type CalibrateConfig, calibrateExits } from '../../lib/distill/encoder/exit_levels.js';
import { Random } from '../../lib/distill/random.js';
import type { ExitRuleName } from '../../lib/elastic/exits.js';
import { readElastic, writeLevels } from '../../lib/elastic/store.js';
import { loadModel } from '../../lib/infer/model.js';
import { shareOf } from '../../lib/infer/quality/statistics.js';
import { exitClassifier, layers } from '../infer/exits.js';
import { encoderDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';

const words = ['cat', 'dog', 'lake', 'saw', 'walked', 'owner', 'café', 'barks', 'unaffected', 'seldom', '42', '!'];
const random = new Random(5, 'texts');
const texts = Array.from({ length: 120 }, () =>
  Array.from({ length: 1 + random.below(9) }, () => words[random.below(words.length)]).join(' '),
);
let shared: string;
let data: { kind: 'examples'; examples: { text: string; label: string }[] };
/** Texts that are longer than the context. */
let long = 0;

beforeAll(async () => {
  shared = await exitClassifier();
  await using model = await loadModel(shared);
  const full = await model.classify(texts);
  long = full.filter(({ truncated }) => truncated > 0).length;
  // Every seventh label is wrong.
  data = {
    kind: 'examples',
    examples: texts.map((text, i) => ({ text, label: i % 7 === 0 ? String(i % 3) : full[i].label })),
  };
});

function copy(): string {
  const dir = temporaryDirectory();
  cpSync(shared, dir, { recursive: true });
  return dir;
}

/** Ratio, agreement, accuracy and exits that texts have in calls at a budget. */
async function measured(dir: string, budget: string | { spec: object }) {
  await using model = await loadModel(dir);
  const full = await model.classify(texts);
  const results = await model.classify(texts, { budget: budget as string });
  const sum = (of: (i: number) => number) => texts.reduce((total, _, i) => total + of(i), 0);
  const { examples } = data;
  const labels = model.info.labels;
  const right = (i: number) => [results[i].label, String(labels.indexOf(results[i].label))].includes(examples[i].label);
  return {
    ratio: sum((i) => results[i].compute.flops) / sum((i) => results[i].compute.flopsFull),
    agreement: sum((i) => (results[i].label === full[i].label ? 1 : 0)) / texts.length,
    accuracy: sum((i) => (right(i) ? 1 : 0)) / texts.length,
    left: Array.from(
      { length: layers },
      (_, l) => sum((i) => (results[i].compute.exitLayer === l ? 1 : 0)) / texts.length,
    ),
  };
}

describe.each<ExitRuleName>(['entropy', 'margin', 'maxprob'])('levels of %s', (rule) => {
  it('cost and keep what they say when they are called, and are the best that was asked for', async () => {
    const dir = copy();
    const { levels, accuracy } = await calibrateExits(dir, { data, rule, compute: [0.5, 0.8], quality: [0.6] });
    expect(levels.map(({ name }) => name).toSorted()).toEqual(['exit50', 'exit80', 'same60']);
    expect(levels.map(({ ratio }) => ratio)).toEqual(levels.map(({ ratio }) => ratio).toSorted((a, b) => b - a));
    expect(accuracy.value).toBeGreaterThan(0.8);
    for (const level of levels) {
      const found = await measured(dir, level.name);
      expect(found.ratio).toBeCloseTo(level.ratio, 4);
      expect(found.agreement).toBeCloseTo(level.agreement.value, 9);
      expect(found.accuracy).toBeCloseTo(level.accuracy.value, 9);
      expect(found.left).toEqual(level.left);
    }
    const by = (name: string) => levels.find((level) => level.name === name)!;
    expect(by('exit50').ratio).toBeLessThanOrEqual(0.5);
    expect(by('exit80').ratio).toBeLessThanOrEqual(0.8);
    expect(by('same60').agreement.low).toBeGreaterThanOrEqual(0.6);
    // No threshold of a fine grid is within the share and costs more, or keeps as much and costs less.
    const most = rule === 'entropy' ? Math.log(3) : 1;
    for (let i = 1; i < 20; i++) {
      const found = await measured(dir, { spec: { exit: { rule, threshold: (i / 20) * most } } });
      if (found.ratio <= 0.5) expect(found.ratio).toBeLessThanOrEqual(by('exit50').ratio + 0.02);
      if (shareOf(found.agreement * texts.length, texts.length).low >= 0.6)
        expect(found.ratio).toBeGreaterThanOrEqual(by('same60').ratio - 0.02);
    }
  });
});

it('levels are kept for budgets by name, share and quality; other levels stay, earlier ones of exits do not', async () => {
  const dir = copy();
  await writeLevels(dir, [
    { name: 'full', spec: {} },
    { name: 'old', spec: { exit: true }, flopsRatio: 0.4 },
  ]);
  const { levels } = await calibrateExits(dir, { data, compute: [0.75], minLayer: 1 });
  expect(levels[0].exit).toMatchObject({ rule: 'entropy', minLayer: 1 });
  expect(levels[0].left[0]).toBe(0);
  const saved = (await readElastic(dir))!.policy.levels;
  expect(saved.map(({ name }) => name)).toEqual(['full', 'exit75']);
  expect(saved[1]).toMatchObject({
    flopsRatio: levels[0].ratio,
    quality: { accuracy: { n: 120 }, top1_agreement: {} },
  });
  await using model = await loadModel(dir);
  const { compute } = (await model.classify('the cat', { budget: 0.75 }))[0];
  expect(compute).toMatchObject({ level: 'exit75', effective: { exit: levels[0].exit } });
  const least = levels[0].agreement.low;
  expect((await model.classify('the cat', { budget: { minQuality: least } }))[0].compute.level).toBe('exit75');
  expect((await model.classify('the cat', { budget: { minQuality: least + 0.001 } }))[0].compute.level).toBe('full');
});

it('patience is a whole number of exits', async () => {
  const { levels } = await calibrateExits(copy(), { data, rule: 'patience', compute: [0.95] });
  expect([1, 2, 3]).toContain(levels[0].exit.threshold);
});

it('leaves out bad rows when asked, and counts what was cut', async () => {
  const examples = [
    ...data.examples,
    { text: 'cat', label: 'awful' },
    { text: '', label: 'bad' },
    { text: 'the cat '.repeat(40), label: 'bad' },
  ];
  const config = { data: { kind: 'examples', examples }, compute: [0.9] } as const;
  await expect(calibrateExits(copy(), config)).rejects.toThrow('example 121 has an empty text');
  const { texts: count, bad, truncated } = await calibrateExits(copy(), { ...config, badRows: 'skip' });
  expect({ count, truncated }).toEqual({ count: 121, truncated: long + 1 });
  expect(bad.count).toBe(2);
  expect(bad.named.join()).toContain("example 120 has the label 'awful', which is none of the 3 that the head has");
});

it.each<[Partial<CalibrateConfig>, string]>([
  [{ compute: [0.001] }, 'compute 0.001 cannot be reached: these exits take at least 0.2'],
  [{ quality: [0.99] }, 'quality 0.99 cannot be shown on 120 texts: even if all agree the interval begins at 0.9690'],
  [{ compute: [1.5] }, 'compute must be shares in (0, 1), got [1.5]'],
  [{ compute: [0.5, 0.5] }, 'compute has a share twice: 0.5, 0.5'],
  [{ compute: [] }, 'there is nothing to calibrate to: give compute or quality'],
  [{ rule: 'luck' as never }, 'rule must be one of entropy, margin, maxprob, patience, got "luck"'],
  [{ minLayer: 4 }, 'has no exits after layer 4 or a later one'],
  [{ minLayer: -1 }, "minLayer must be a layer's id, got -1"],
  [{ colour: 1 } as never, "[calibrate] unknown option 'colour'"],
])('%j is refused, and nothing is written', async (config, message) => {
  const dir = copy();
  await expect(calibrateExits(dir, { data, ...config })).rejects.toThrow(message);
  expect((await readElastic(dir))!.policy.levels).toEqual([{ name: 'full', spec: {} }]);
});

it('a model without exits is refused, and an abort writes nothing', async () => {
  const plain = encoderDirectory('bert-classes');
  await expect(calibrateExits(plain, { data })).rejects.toThrow('has no exits at all');
  const dir = copy();
  await expect(calibrateExits(dir, { data, signal: AbortSignal.abort() })).rejects.toThrow('abort');
  expect((await readElastic(dir))!.policy.levels).toHaveLength(1);
});

it('intervals of shares are those of Wilson', () => {
  // Of n of n the lower end is n / (n + z^2).
  expect(shareOf(10, 10).low).toBeCloseTo(0.7225, 4);
  expect(shareOf(10, 10).high).toBeCloseTo(1, 12);
  expect(shareOf(5, 20)).toMatchObject({ value: 0.25 });
  expect(shareOf(5, 20).low).toBeCloseTo(0.1119, 4);
  expect(shareOf(5, 20).high).toBeCloseTo(0.4687, 4);
  expect(shareOf(0, 10).low).toBe(0);
});
