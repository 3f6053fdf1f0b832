// Exits at inference: texts leave where rules computed by hand say, alone or in company, and cost what their layers cost.
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import type { ExitHead, ExitRule, ExitRuleName, ExitSetting } from '../../lib/elastic/exits.js';
import { writeLevels } from '../../lib/elastic/store.js';
import { loadModel } from '../../lib/infer/model.js';
import type { ClassifyResult, TextInput } from '../../lib/infer/types.js';
import { encoderFlops } from '../../lib/model/flops.js';
import type { EncoderSpec } from '../../lib/model/spec.js';
import { loadAddon } from '../../lib/native/index.js';
import { readCases } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';
import { classes, deepClassifier, exitClassifier, heads, hidden, layers } from './exits.js';

const inputs: TextInput[] = readCases('bert-classes').map(({ texts: [a, b] }) =>
  b === undefined ? a : ([a, b] as const),
);
const labels = ['bad', 'fair', 'good'];
const exits: readonly ExitHead[] = heads([0, 1, 2, 3], { rule: 'entropy', threshold: 0.5 });
let dir: string;
/** Softmax of every exit's head for every text, [texts][exits][classes], from features of shallower models. */
let p: number[][][];
/** The backbone's scores of every text. */
let backbone: ClassifyResult[];

const softmax = (logits: readonly number[]): number[] => {
  const exp = logits.map(Math.exp);
  const sum = exp.reduce((a, b) => a + b);
  return exp.map((e) => e / sum);
};

beforeAll(async () => {
  dir = await exitClassifier();
  p = inputs.map(() => []);
  for (const { afterLayer, weight, bias } of exits) {
    await using shallow = await loadModel(await deepClassifier(temporaryDirectory(), afterLayer + 1));
    for (const [i, input] of inputs.entries()) {
      const h = (await shallow.features(input)).subarray(0, hidden);
      const scores = Array.from({ length: classes }, (_, c) =>
        h.reduce((sum, x, d) => sum + Math.tanh(x) * weight[c * hidden + d], bias[c]),
      );
      p[i].push(softmax(scores));
    }
  }
  await using plain = await loadModel(await deepClassifier());
  backbone = await plain.classify(inputs);
});

/** The exit, by its place in the list, at which a text leaves by a rule; null: none. */
function expected(text: number, { rule, threshold, minLayer = 0 }: ExitRule): number | null {
  let agreed = 0;
  const usable = exits.flatMap(({ afterLayer }, e) => (afterLayer >= minLayer ? [e] : []));
  for (const [k, e] of usable.entries()) {
    const own = p[text][e];
    const sorted = own.toSorted((a, b) => b - a);
    const best = (of: number) => p[text][of].indexOf(Math.max(...p[text][of]));
    agreed = k > 0 && best(e) === best(usable[k - 1]) ? agreed + 1 : 0;
    const leaves = {
      entropy: -own.reduce((sum, x) => sum + x * Math.log(x), 0) < threshold,
      margin: sorted[0] - sorted[1] > threshold,
      maxprob: sorted[0] > threshold,
      patience: agreed >= threshold,
    };
    if (leaves[rule]) return e;
  }
  return null;
}

/** What decides about an exit is not so near to the threshold that rounding matters. */
const thresholds: Record<ExitRuleName, number[]> = {
  entropy: [0.2, 0.5, 0.8, 1.2],
  margin: [0.1, 0.4, 0.7, 0.9],
  maxprob: [0.35, 0.5, 0.7, 0.9],
  patience: [1, 2, 3],
};
const rules = (Object.keys(thresholds) as ExitRuleName[]).flatMap((rule) =>
  thresholds[rule].flatMap((threshold) => [
    { rule, threshold },
    { rule, threshold, minLayer: 1 },
  ]),
);

/** What does not depend on time. */
const lasting = ({ compute, ...result }: ClassifyResult) => ({
  ...result,
  compute: { ...compute, ms: null, tokensPerSecond: null },
});

it('texts leave where the rules say, with the scores of that exit, whatever the rule', async () => {
  await using model = await loadModel(dir);
  const left = new Map<ExitRuleName, Set<number | null>>();
  for (const exit of rules) {
    if (exit.rule === 'patience' && exit.threshold === 3 && exit.minLayer === 1) continue;
    const results = await model.classify(inputs, { exit });
    for (const [i, { label, scores, compute }] of results.entries()) {
      const at = expected(i, exit);
      left.set(exit.rule, (left.get(exit.rule) ?? new Set()).add(at));
      const layer = at === null ? layers - 1 : exits[at].afterLayer;
      expect(compute.exitLayer, `${JSON.stringify(exit)}, text ${i}`).toBe(layer);
      expect(compute.effective).toEqual({ exit });
      expect([...compute.layersRun.attn]).toEqual(Array.from({ length: layers }, (_, l) => (l <= layer ? 1 : 0)));
      if (at === null) expect({ label, scores }).toEqual({ label: backbone[i].label, scores: backbone[i].scores });
      else for (const { label, score } of scores) expect(score).toBeCloseTo(p[i][at][labels.indexOf(label)], 4);
    }
  }
  // Every rule let texts leave at different exits.
  for (const rule of Object.keys(thresholds) as ExitRuleName[]) expect(left.get(rule)!.size, rule).toBeGreaterThan(2);
});

it('every text has the result and the FLOPs that it has alone, bit for bit, in any company', async () => {
  await using model = await loadModel(dir);
  const alone = new Map<string, unknown>();
  const of = async (i: number, exit: ExitSetting) => {
    const key = JSON.stringify([i, exit]);
    if (!alone.has(key)) alone.set(key, lasting((await model.classify([inputs[i]], { exit, batch: 1 }))[0]));
    return alone.get(key);
  };
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.nat(inputs.length - 1), { minLength: 1, maxLength: 40 }),
      fc.integer({ min: 1, max: 16 }),
      fc.constantFrom<ExitSetting>(true, ...rules),
      async (texts, batch, exit) => {
        const together = await model.classify(
          texts.map((i) => inputs[i]),
          { exit, batch },
        );
        for (const [k, i] of texts.entries()) expect(lasting(together[k])).toEqual(await of(i, exit));
      },
    ),
    { numRuns: 60, seed: 3 },
  );
});

it('costs the layers and heads that ran', async () => {
  await using model = await loadModel(dir);
  const spec = model.loaded.spec as EncoderSpec;
  const results = await model.classify(inputs, { exit: { rule: 'maxprob', threshold: 0.785 } });
  for (const [i, { compute }] of results.entries()) {
    const length = readCases('bert-classes')[i].ids.length;
    const last = compute.exitLayer!;
    const whole = last === layers - 1;
    const head = 2 * hidden * classes;
    const dense = encoderFlops(spec, [length], whole ? 'head' : 'none', { to: last + 1 });
    // Rounded in each stage, where texts share what was counted.
    expect(Math.abs(compute.flops - dense - head * Math.min(last + 1, exits.length))).toBeLessThanOrEqual(layers);
    expect(compute.flopsFull).toBe(encoderFlops(spec, [length], 'head'));
    expect(compute.ratio).toBe(compute.flops / compute.flopsFull);
  }
  expect(new Set(results.map(({ compute }) => compute.exitLayer)).size).toBeGreaterThan(2);
});

describe('what no text can leave by', () => {
  const warnings: (Error & { code?: string })[] = [];
  const keep = (warning: Error) => warnings.push(warning);
  const warned = async () => {
    await new Promise(setImmediate);
    return warnings.filter(({ code }) => code === 'ExitsDisabled').length;
  };

  it('is the backbone to the bit, in results and FLOPs, and warned of once', async () => {
    process.on('warning', keep);
    try {
      await using model = await loadModel(dir);
      for (const exit of [
        { rule: 'entropy', threshold: 0 },
        { rule: 'entropy', threshold: -0.3 },
        { rule: 'maxprob', threshold: 1 },
        { rule: 'patience', threshold: 4 },
        { rule: 'margin', threshold: 0.1, minLayer: 4 },
      ] as const) {
        const results = await model.classify(inputs, { exit });
        for (const [i, { compute, ...result }] of results.entries()) {
          const { compute: full, ...whole } = backbone[i];
          expect(result).toEqual(whole);
          expect(compute).toMatchObject({ flops: full.flops, ratio: 1, exitLayer: layers - 1 });
        }
      }
      expect(await warned()).toBe(1);
      expect(warnings[0].message).toContain('no text can leave at an exit by {"rule":"entropy","threshold":0}');
      // Exits by which texts may leave, though none does, change no bit and are no mistake.
      const rare = await model.classify(inputs, { exit: { rule: 'entropy', threshold: 1e-30 } });
      expect(rare.map(({ scores }) => scores)).toEqual(backbone.map(({ scores }) => scores));
      expect(rare[0].compute.ratio).toBeGreaterThan(1);
      const full = await model.classify(inputs);
      expect(full.map(lasting)).toEqual(backbone.map(lasting));
      expect(full[0].compute.exitLayer).toBeUndefined();
      expect(await warned()).toBe(1);
    } finally {
      process.off('warning', keep);
    }
  });
});

it('a level and a budget are its rules', async () => {
  const own = await exitClassifier();
  const quality = (value: number) => ({ top1_agreement: { value, lo: value - 0.01, hi: value + 0.01, n: 500 } });
  const deep = { rule: 'maxprob', threshold: 0.8 } as const;
  const fast = { rule: 'margin', threshold: 0.3, minLayer: 1 } as const;
  await writeLevels(own, [
    { name: 'full', spec: {} },
    { name: 'deep', spec: { exit: deep }, flopsRatio: 0.85, quality: quality(0.97) },
    { name: 'fast', spec: { exit: fast }, flopsRatio: 0.5, quality: quality(0.8) },
  ]);
  await using model = await loadModel(own);
  expect(model.info).toMatchObject({ elastic: true, calibrated: true, routerParameters: 0 });
  expect(model.info.levels.map(({ name }) => name)).toEqual(['full', 'deep', 'fast']);
  const by = async (exit: ExitRule) => (await model.classify(inputs, { exit })).map(({ scores }) => scores);
  for (const [budget, exit, level] of [
    ['deep', deep, 'deep'],
    ['fast', fast, 'fast'],
    [0.9, deep, 'deep'],
    [0.6, fast, 'fast'],
    [{ minQuality: 0.95 }, deep, 'deep'],
    [{ spec: { exit: fast } }, fast, null],
  ] as const) {
    const results = await model.classify(inputs, { budget });
    expect(results.map(({ scores }) => scores)).toEqual(await by(exit));
    expect(results[0].compute).toMatchObject({ requested: budget, level, effective: { exit } });
  }
  // A rule of the call comes before that of its budget.
  const [over] = await model.classify(inputs, { budget: 'deep', exit: fast });
  expect(over.compute).toMatchObject({ requested: 'deep', level: null, effective: { exit: fast } });
  await expect(model.classify('a', { budget: 0.4 })).rejects.toThrow(
    'budget 0.4 cannot be reached: the cheapest level, fast, takes 0.500 of the FLOPs',
  );
  await expect(model.embed('a', { budget: 'deep' })).rejects.toThrow('leaves at exits, and those are for classify');
  await expect(model.classify('a', { budget: 'none' })).rejects.toThrow("no level is named 'none'");
});

it.each<[unknown, string]>([
  [{ rule: 'entropy' }, 'exit must be of a threshold of entropy that is a finite number, got undefined'],
  [
    { rule: 'entropy', threshold: Number.NaN },
    'exit must be of a threshold of entropy that is a finite number, got NaN',
  ],
  [
    { rule: 'patience', threshold: 0 },
    'exit must be of a threshold of patience that is a positive integer, of exits, got 0',
  ],
  [{ rule: 'luck', threshold: 1 }, 'exit must be of a rule among entropy, margin, maxprob, patience, got "luck"'],
  [{ rule: 'margin', threshold: 0.5, minLayer: 0.5 }, "exit must be of a minLayer that is a layer's id, got 0.5"],
  [{ rule: 'margin', threshold: 0.5, layer: 1 }, 'exit must be { rule, threshold, minLayer }, got layer'],
  [false, 'exit must be true or { rule, threshold }, got false'],
  [null, 'exit must be true or { rule, threshold }, got null'],
])('%j is refused', async (exit, message) => {
  await using model = await loadModel(dir);
  await expect(model.classify('a', { exit: exit as never })).rejects.toThrow(`[classify] ${message}`);
  const level = { name: 'a', spec: { exit: exit as never } };
  await expect(model.classify('a', { budget: { spec: level.spec } })).rejects.toThrow(message.slice(5, 20));
});

describe('a model', () => {
  it('ends between two exits when it is aborted, and goes on afterwards', async () => {
    await using model = await loadModel(dir);
    const texts = new Array(200).fill(inputs[6]);
    const exit = { rule: 'entropy', threshold: 1e-30 } as const;
    const controller = new AbortController();
    const running = model.classify(texts, { exit, signal: controller.signal });
    setTimeout(() => controller.abort(), 1);
    await expect(running).rejects.toThrow('abort');
    expect((await model.classify(inputs, { exit })).map(({ label }) => label)).toEqual(
      backbone.map(({ label }) => label),
    );
  });

  it('frees its heads and programs', async () => {
    const before = loadAddon().memory();
    const model = await loadModel(dir);
    await model.classify(inputs, { exit: true });
    await model.dispose();
    expect(loadAddon().memory()).toEqual(before);
  });

  it('that is damaged is refused, and leaves no memory behind', async () => {
    const own = await exitClassifier();
    writeFileSync(join(own, 'elastic_config.json'), '{}');
    const before = loadAddon().memory();
    await expect(loadModel(own)).rejects.toMatchObject({ code: 'InvalidFile' });
    expect(loadAddon().memory()).toEqual(before);
  });
});

it('windows of a text leave one by one, each as it does alone', async () => {
  await using model = await loadModel(dir);
  const text = [...inputs, ...inputs.toReversed()].flat().join(' ');
  const asked = { exit: { rule: 'margin', threshold: 0.7 } } as const;
  const [result] = await model.classify([text], { ...asked, windows: { overlap: 6 } });
  const { network } = model.encoder;
  const cut = network.tokenizer!.encodeWindows(text, { maxTokens: network.maxContext, overlap: 6 });
  const each = await model.classify(
    cut.map(({ ids }) => ids),
    asked,
  );
  const left = each.map(({ compute }) => compute.exitLayer!);
  expect(new Set(left).size).toBeGreaterThan(1);
  expect(result.windows).toBe(cut.length);
  expect(result.compute.exitLayer).toBe(Math.max(...left));
  expect(result.compute.flops).toBe(each.reduce((sum, { compute }) => sum + compute.flops, 0));
  const tokens = cut.reduce((sum, { ids }) => sum + ids.length, 0);
  const ran = (layer: number) => cut.reduce((sum, { ids }, w) => sum + (left[w] >= layer ? ids.length / tokens : 0), 0);
  for (const [layer, share] of result.compute.layersRun.attn.entries()) expect(share).toBeCloseTo(ran(layer), 5);
});
