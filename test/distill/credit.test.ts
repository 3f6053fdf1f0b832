// Credit: the gradient of a router orders the experts and sequences that are left out as using them does.
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { targets } from '../../lib/elastic/axes.js';
import type { ElastiformerRecipe } from '../../lib/elastic/elastify.js';
import { goldenDirectory, readSpec } from '../model/golden.js';
import { trainStep } from './step.js';

const recipes: Partial<ElastiformerRecipe>[] = [
  { blocks: { count: 4 } },
  { heads: { group: 'head' } },
  { tokens: { attn: 1, mlp: 1 }, blocks: { count: 4 } },
];

it.each(['elastiformer-llama', 'elastiformer-gpt2'])('of experts of %s', async (name) => {
  const directory = join(goldenDirectory, name);
  let [pairs, agreeing] = [0, 0];
  const layers = Array.from({ length: readSpec(directory).layers }, (_, layer) => layer);
  for (const recipe of recipes.flatMap((of) => layers.map((layer) => ({ ...of, layers: [layer] })))) {
    const { plan } = await trainStep(directory, recipe);
    const { offset, size } = plan.parameters.findLast((parameter) => parameter.name.endsWith('.bias'))!;
    const experts = Array.from({ length: size }, (_, e) => e);
    // All rows use the same experts, of the highest scores.
    const step = (scores: readonly number[], used: number) => {
      const values = new Float32Array(plan.size);
      values.set(scores, offset);
      return trainStep(directory, recipe, values, used / size);
    };
    for (const one of experts) {
      const { gradient } = await step(
        experts.map((e) => Number(e === one)),
        1,
      );
      const others = experts.filter((e) => e !== one);
      const losses: number[] = [];
      for (const other of others) {
        const scores = experts.map((e) => (e === one ? 2 : Number(e === other)));
        losses.push((await step(scores, 2)).kl);
      }
      for (const [i, a] of others.entries()) {
        for (const [j, b] of others.entries()) {
          if (j >= i) continue;
          pairs++;
          agreeing += Number(gradient[offset + a] < gradient[offset + b] === losses[i] < losses[j]);
        }
      }
    }
  }
  expect(pairs).toBeGreaterThanOrEqual(30);
  expect(agreeing / pairs).toBeGreaterThan(0.9);
});

// What a sequence would lose shows while it is left out, so every one must be at some time.
it.each(['elastiformer-llama', 'elastiformer-gpt2'])('of sequences of %s', async (name) => {
  const directory = join(goldenDirectory, name);
  const { layers, hidden } = readSpec(directory);
  let [all, agreeing] = [0, 0];
  for (const target of targets) {
    for (let layer = 0; layer < layers; layer++) {
      const recipe = { kind: 'router-tuning', target, layers: [layer] } as const;
      const gradient = new Float64Array(hidden + 1);
      for (let explore = 0; explore < 6; explore++) {
        const step = await trainStep(directory, recipe, new Float32Array(hidden + 1), 0.5, { length: 3, explore });
        step.gradient.forEach((g, i) => {
          gradient[i] += g;
        });
      }
      const length = Math.hypot(...gradient);
      expect(length).toBeGreaterThan(0);
      // Half of the sequences enter: those that a step down the slope prefers, or those that a step up does.
      const after = async (sign: number) => {
        const values = Float32Array.from(gradient, (g) => (sign * g) / length);
        return (await trainStep(directory, recipe, values, 0.5, { length: 3 })).kl;
      };
      all++;
      agreeing += Number((await after(-1)) < (await after(1)));
    }
  }
  expect(all).toBeGreaterThanOrEqual(6);
  expect(agreeing / all).toBeGreaterThan(0.8);
});
