// Routers of whole sequences, and of whole blocks, in a decoder: exact at full budget, else the sub-layers they leave out.
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Granularity, type Target, targets } from '../../lib/elastic/axes.js';
import { policyOf } from '../../lib/elastic/elastify.js';
import { type ElasticPolicy, routerPlaces } from '../../lib/elastic/policy.js';
import {
  capacityFeed,
  decidedFeed,
  decidedOutput,
  droppedSelector,
  inferenceSelector,
  randomSelector,
  recordedSelector,
  type routerNodes,
  scoreFeed,
  spanFeed,
  thresholdFeed,
  trainingSelector,
} from '../../lib/elastic/rows.js';
import type { Graph } from '../../lib/graph/index.js';
import { type Selector, selectEverything } from '../../lib/model/select.js';
import { Engine, type TypedArray } from '../../lib/native/index.js';
import { goldenDirectory, positionsOf, readSpec } from '../model/golden.js';
import { runSelected, type Select } from './selected.js';

let engine: Engine;
beforeAll(() => {
  engine = new Engine();
});
afterAll(() => engine.dispose());

const directory = join(goldenDirectory, 'elastiformer-llama');
const spec = readSpec(directory);
const lengths = [7, 1, 12, 5];
const segments = lengths.length;
const tokens = lengths.flatMap((length, s) => Array.from({ length }, (_, i) => (s * 17 + i * (s + 3)) % spec.vocab));

type Build = (graph: Graph, routers: ReturnType<typeof routerNodes>, segments: number, rows: number) => Selector;

/** Runs some of the sequences, by default all. */
async function run(
  policy: ElasticPolicy,
  build: Build,
  feeds: Record<string, TypedArray> = {},
  only: readonly number[] = lengths.map((_, s) => s),
) {
  const starts = lengths.map((_, s) => lengths.slice(0, s).reduce((a, b) => a + b, 0));
  const ids = only.flatMap((s) => tokens.slice(starts[s], starts[s] + lengths[s]));
  const offsets = [0];
  for (const s of only) offsets.push(offsets.at(-1)! + lengths[s]);
  const router = (_: string, r: number) => ({
    weight: Float32Array.from({ length: spec.hidden }, (_, i) => Math.sin(i + r)),
    bias: Float32Array.of(0.1),
  });
  const select: Select = (graph, routers) => recordedSelector(graph, build(graph, routers, only.length, ids.length));
  const batch = { ids, positions: positionsOf(offsets), offsets };
  const result = await runSelected(engine, directory, policy, router, batch, select, feeds);
  return { ...result, logits: result.outputs.logits as Float32Array, offsets };
}

const policyFor = (target: Target, granularity: Granularity, layers: readonly number[] = [1]): ElasticPolicy => ({
  ...policyOf({ kind: 'router-tuning', target, granularity, layers }, spec),
  base: { name: 'llama', weightsSha256: '', tokenizerSha256: null },
});
const inference =
  (policy: ElasticPolicy): Build =>
  (graph, routers, segments) =>
    inferenceSelector(graph, policy, routers, segments);
const filled = (value: number, n = segments) => new Float32Array(n).fill(value);

/** The rows of sequence s. */
const rowsOf = ({ logits, offsets }: { logits: Float32Array; offsets: readonly number[] }, s: number) =>
  logits.slice(offsets[s] * spec.vocab, offsets[s + 1] * spec.vocab);

describe.each(targets)('%s of whole sequences', (target) => {
  const policy = policyFor(target, 'sequence', [0, 1]);
  const ids = routerPlaces(policy).map(({ id }) => id);
  const thresholds = (value: number, n = segments) =>
    Object.fromEntries(ids.map((id) => [thresholdFeed(id), filled(value, n)]));
  const training: Build = (graph, routers, segments) => trainingSelector(graph, policy, routers, segments);

  it('is the backbone bit for bit where all enter', async () => {
    const full = await run(policy, () => selectEverything);
    expect((await run(policy, inference(policy), thresholds(Number.NEGATIVE_INFINITY))).logits).toEqual(full.logits);
    const all = Object.fromEntries(ids.map((id) => [capacityFeed(id), Float32Array.of(1)]));
    const span = { [spanFeed]: Int32Array.of(0, segments) };
    expect((await run(policy, training, { ...all, ...span })).logits).toEqual(full.logits);
  });

  it('gives a sequence that enters nothing the bits of the model without these sub-layers', async () => {
    const places = target === 'block' ? (['attn', 'mlp'] as const) : [target];
    const dropped = new Set(ids.map((id) => id.replace('sequence', 'token')));
    const without = await run(policy, () => droppedSelector(dropped));
    const full = await run(policy, () => selectEverything);
    const fed = Object.fromEntries(ids.map((id) => [thresholdFeed(id), Float32Array.of(-9e9, 9e9, 9e9, -9e9)]));
    const mixed = await run(policy, inference(policy), fed);
    for (const s of [0, 3]) expect(rowsOf(mixed, s)).toEqual(rowsOf(full, s));
    for (const s of [1, 2]) expect(rowsOf(mixed, s)).toEqual(rowsOf(without, s));
    for (const place of places) expect(mixed.counters[`L1.${place}`].rows).toBe(lengths[0] + lengths[3]);
  });

  it('decides about each by itself, with the bits that it has alone', async () => {
    const together = await run(policy, inference(policy), thresholds(0.1));
    const entered = Object.keys(together.outputs).filter((name) => name.startsWith('entered'));
    expect(entered).toHaveLength(ids.length * (target === 'block' ? 2 : 1));
    for (const s of lengths.keys()) {
      const alone = await run(policy, inference(policy), thresholds(0.1, 1), [s]);
      expect(rowsOf(alone, 0)).toEqual(rowsOf(together, s));
      for (const name of entered) expect([0, lengths[s]]).toContain(alone.outputs[name].length);
    }
  });

  it('keeps to what was decided before', async () => {
    const resumed: Build = (graph, routers, segments) =>
      inferenceSelector(graph, policy, routers, segments, undefined, { resumed: true });
    const decided = (values: readonly number[]) =>
      Object.fromEntries(ids.map((id) => [decidedFeed(id), Float32Array.from(values)]));
    const first = await run(policy, resumed, { ...thresholds(0.1), ...decided(lengths.map(() => Number.NaN)) });
    expect(first.logits).toEqual((await run(policy, inference(policy), thresholds(0.1))).logits);
    const scores = ids.map((id) => first.outputs[decidedOutput(id)]);
    for (const all of scores) expect(new Set(all).size).toBe(segments);
    // Against the scores: those that were below enter, and the other way round.
    const flipped = ids.map((_, r) => Float32Array.from(scores[r], (score) => 0.2 - score));
    const fed = Object.fromEntries(ids.map((id, r) => [decidedFeed(id), flipped[r]]));
    const second = await run(policy, resumed, { ...thresholds(0.1), ...fed });
    ids.forEach((id, r) => {
      expect(second.outputs[decidedOutput(id)]).toEqual(flipped[r]);
      const name = `entered.${r}.${target === 'block' ? 'mlp' : target}`;
      expect(second.outputs[name].length + first.outputs[name].length).toBe(tokens.length);
    });
  });

  it('takes the sequences with the largest scores while training, as many as the capacity says', async () => {
    for (const [capacity, count] of [
      [0, 0],
      [0.125, 1],
      [0.5, 2],
    ]) {
      const fed = Object.fromEntries(ids.map((id) => [capacityFeed(id), Float32Array.of(capacity)]));
      const chosen = await run(policy, training, { ...fed, [spanFeed]: Int32Array.of(0, segments) });
      const all = new Set(chosen.outputs[`entered.0.${target === 'block' ? 'attn' : target}`]);
      const whole = lengths.filter((_, s) => all.has(chosen.offsets[s]));
      expect(whole).toHaveLength(count);
      expect(all.size).toBe(whole.reduce((a, b) => a + b, 0));
    }
  });

  it('lets those with a score above 0 in where scores stand in for the router', async () => {
    const random: Build = (graph, _, segments, rows) => randomSelector(graph, policy, rows, segments);
    const fed = Object.fromEntries(ids.map((id) => [scoreFeed(id), Float32Array.of(1, -1, -1, 1)]));
    const { counters } = await run(policy, random, fed);
    expect(counters[`L0.${target === 'mlp' ? 'mlp' : 'attn'}`].rows).toBe(lengths[0] + lengths[3]);
  });
});

describe('blocks of tokens', () => {
  const policy = policyFor('block', 'token');
  const [{ id }] = routerPlaces(policy);

  it('is the backbone where all enter, and enters both sub-layers with the same rows', async () => {
    const full = await run(policy, () => selectEverything);
    const at = (value: number) => run(policy, inference(policy), { [thresholdFeed(id)]: filled(value) });
    expect((await at(Number.NEGATIVE_INFINITY)).logits).toEqual(full.logits);
    const { outputs, counters } = await at(0.1);
    expect(outputs['entered.1.attn']).toEqual(outputs['entered.1.mlp']);
    expect(counters['L1.mlp'].rows).toBe(outputs['entered.1.attn'].length);
    expect(counters['L1.attn'].rows).toBeGreaterThan(0);
    expect(counters['L1.attn'].rows).toBeLessThan(tokens.length);
  });
});
