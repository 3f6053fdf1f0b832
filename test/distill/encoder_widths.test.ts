// Widths of an encoder trained to share a space: slices come nearer to the whole, which stays what it was, and say so.
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { type DistillConfig, distill } from '../../lib/distill/distill.js';
import type { TrainEvent } from '../../lib/distill/events.js';
import { Random } from '../../lib/distill/random.js';
import { elastify, writeExits } from '../../lib/elastic/elastify.js';
import { readElastic } from '../../lib/elastic/store.js';
import { loadModel } from '../../lib/infer/model.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { heads } from '../infer/exits.js';
import { encoderDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';

const words = ['cat', 'dog', 'lake', 'saw', 'walked', 'owner', 'café', 'barks', 'unaffected', 'seldom', '42', 'the'];
const random = new Random(11, 'lines');
const line = () => Array.from({ length: 2 + random.below(6) }, () => words[random.below(words.length)]).join(' ');
const documents = Array.from({ length: 40 }, () => [line(), line(), '', line()].join('\n'));
const held = Array.from({ length: 30 }, line);
let plan: string;

beforeAll(async () => {
  plan = join(temporaryDirectory(), 'plan');
  await elastify(encoderDirectory('minilm'), { kind: 'matformer', granularities: [0.2, 0.5, 1] }, { out: plan });
});

const configOf = (more: Partial<DistillConfig> = {}): DistillConfig => ({
  plan,
  out: join(temporaryDirectory(), 'out'),
  data: { kind: 'documents', documents },
  device: 'cpu',
  steps: 40,
  batchTokens: 256,
  optimizer: { lr: 2e-3 },
  seed: 3,
  ...more,
});

/** Mean cosine distance of held-out vectors of a width from those that the plan's full model has. */
async function distance(dir: string, budget: string): Promise<number> {
  await using base = await loadModel(plan);
  await using model = await loadModel(dir);
  const [expected, found] = [(await base.embed(held)).vectors, (await model.embed(held, { budget })).vectors];
  const all = found.map((vector, i) => 1 - vector.reduce((sum, x, d) => sum + x * expected[i][d], 0));
  return all.reduce((a, b) => a + b, 0) / all.length;
}

describe('a trained encoder', () => {
  let dir: string;
  const events: TrainEvent[] = [];
  beforeAll(async () => {
    const config = configOf({
      evalData: { kind: 'documents', documents: held },
      evalEvery: 20,
      onEvent: (event) => void events.push(event),
    });
    ({ dir } = await distill(config));
  });

  it('has slices much nearer to the whole than before, and a whole that hardly moved', async () => {
    for (const width of ['ffn20', 'ffn50'])
      expect(await distance(dir, width), width).toBeLessThan(0.5 * (await distance(plan, width)));
    expect(await distance(dir, 'full')).toBeLessThan(0.2 * (await distance(plan, 'ffn20')));
    const measured = events.filter((event) => event.type === 'eval');
    expect(Object.keys(measured[0].levels)).toEqual(['ffn20', 'ffn50', 'full']);
    expect(measured[0].levels.full.distance).toBeLessThan(1e-6);
    expect(measured[0].levels.ffn20.distance).toBeCloseTo(await distance(plan, 'ffn20'), 4);
    expect(measured.at(-1)!.levels.ffn20.distance).toBeCloseTo(await distance(dir, 'ffn20'), 4);
  });

  it('says that its widths share a space, and is a sound directory', async () => {
    const { policy, warnings } = (await readElastic(dir))!;
    expect(warnings).toEqual([]);
    expect(policy.nested).toMatchObject({ trained: 'all', granularities: [0.2, 0.5, 1] });
    await using model = await loadModel(dir);
    await using before = await loadModel(plan);
    const full = (await model.embed('the cat')).spaceId;
    expect((await model.embed('the cat', { budget: 'ffn20' })).spaceId).toBe(full);
    expect((await model.embed('the cat', { budget: { spec: { ffnWidth: 0.4 } } })).spaceId).not.toBe(full);
    expect((await before.embed('the cat')).spaceId).not.toBe(full);
    expect(model.info.maxContext).toBe(16);
  });
});

it('the same config gives the same bits', async () => {
  const hashes = await Promise.all(
    [0, 1].map(async () => {
      const { dir } = await distill(configOf({ steps: 4, sample: { strategy: 'random' } }));
      using checkpoint = Checkpoint.open(dir);
      return checkpoint.sha256();
    }),
  );
  expect(hashes[0]).toBe(hashes[1]);
});

it.each<[Partial<DistillConfig>, string]>([
  [{ loss: [{ kind: 'kl', weight: 1 }] }, 'loss is for decoders'],
  [{ loraLr: 1e-3 }, 'loraLr is for decoders'],
  [{ sequenceLength: 17 }, 'sequenceLength must be at most the 16 tokens that the model takes, got 17'],
])('%j is refused', async (more, message) => {
  await expect(distill(configOf(more))).rejects.toThrow(`[distill] ${message}`);
});

it('an encoder without widths, or with exits, is refused', async () => {
  const exits = temporaryDirectory();
  await writeExits(exits, encoderDirectory('bert-classes'), heads([0], { rule: 'entropy', threshold: 0.5 }));
  await expect(distill(configOf({ plan: exits }))).rejects.toThrow('has no nested feed-forwards');
  const both = temporaryDirectory();
  const classes = join(temporaryDirectory(), 'nested');
  await elastify(encoderDirectory('bert-classes'), { kind: 'matformer', granularities: [0.5, 1] }, { out: classes });
  await writeExits(both, classes, heads([0], { rule: 'entropy', threshold: 0.5 }));
  await expect(distill(configOf({ plan: both }))).rejects.toThrow('train the widths first');
});
