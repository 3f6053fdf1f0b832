// Selectors in a decoder: exact at full budget, the rows they should take below it, mixed budgets in one batch.
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { policyOf } from '../../lib/elastic/elastify.js';
import type { ElasticPolicy } from '../../lib/elastic/policy.js';
import { routerPlaces } from '../../lib/elastic/policy.js';
import {
  capacityFeed,
  droppedSelector,
  inferenceSelector,
  randomSelector,
  type routerNodes,
  scoreFeed,
  thresholdFeed,
  trainingSelector,
} from '../../lib/elastic/rows.js';
import type { Graph } from '../../lib/graph/index.js';
import { selectEverything } from '../../lib/model/select.js';
import { Engine, type TypedArray } from '../../lib/native/index.js';
import { goldenDirectory, positionsOf, readSpec, readVectors } from '../model/golden.js';
import { runSelected, type Select } from './selected.js';

let engine: Engine;
beforeAll(() => {
  engine = new Engine();
});
afterAll(() => engine.dispose());

describe.each([
  ['llama', 'all'],
  ['llama', 'selected'],
  ['gpt2', 'all'],
] as const)('%s, keys of %s rows', (family, keys) => {
  const directory = join(goldenDirectory, `elastiformer-${family}`);
  const spec = readSpec(directory);
  const vectors = readVectors(join(directory, 'routed-straight-through-all.safetensors'));
  const policy: ElasticPolicy = {
    ...policyOf({ kind: 'elastiformer', keys }, spec),
    base: { name: family, weightsSha256: '', tokenizerSha256: null },
  };
  const rows = vectors.ids.length;
  const segments = vectors.offsets.length - 1;
  const ids = routerPlaces(policy).map((r) => r.id);
  const filled = (value: number, n = segments) => new Float32Array(n).fill(value);
  const capacities = (value: number | Float32Array) =>
    Object.fromEntries(ids.map((id) => [capacityFeed(id), typeof value === 'number' ? filled(value) : value]));
  const thresholds = (value: number) => Object.fromEntries(ids.map((id) => [thresholdFeed(id), filled(value)]));

  /** Logits and counters with a selector; `z` are the routers' logits when it is the training one. */
  const run = (select: Select, feeds: Record<string, TypedArray> = {}) => {
    const router = (id: string) => ({ weight: vectors[`router.${id}.weight`], bias: vectors[`router.${id}.bias`] });
    const batch = { ids: vectors.ids, positions: positionsOf(vectors.offsets), offsets: vectors.offsets };
    return runSelected(engine, directory, policy, router, batch, select, feeds);
  };
  const training = (graph: Graph, routers: ReturnType<typeof routerNodes>) =>
    trainingSelector(graph, policy, routers, segments);
  const inference = (graph: Graph, routers: ReturnType<typeof routerNodes>) =>
    inferenceSelector(graph, policy, routers, segments);
  const random = (graph: Graph) => randomSelector(graph, policy, rows, segments);
  const rowsRun = (counters: Record<string, { rows: number }>) =>
    routerPlaces(policy).map(({ layer, place }) => counters[`L${layer}.${place}`]?.rows ?? 0);

  it('is the backbone bit for bit when every row passes', async () => {
    const full = (await run(() => selectEverything)).outputs.logits;
    expect((await run(training, capacities(1))).outputs.logits).toEqual(full);
    expect((await run(inference, thresholds(Number.NEGATIVE_INFINITY))).outputs.logits).toEqual(full);
    expect((await run(() => droppedSelector(new Set()))).outputs.logits).toEqual(full);
  });

  it('takes ceil(capacity T) rows of every sequence, each at its own capacity', async () => {
    const lengths = Array.from({ length: segments }, (_, s) => vectors.offsets[s + 1] - vectors.offsets[s]);
    const wanted = Float32Array.from({ length: segments }, (_, s) => [0.25, 1, 0.5][s % 3]);
    const expected = lengths.reduce((sum, length, s) => sum + Math.ceil(wanted[s] * length - 1e-6), 0);
    const { counters } = await run(training, capacities(wanted));
    expect(rowsRun(counters)).toEqual(ids.map(() => expected));
  });

  it('runs the random baseline at the same rows, and leaves dropped sub-layers out', async () => {
    const scores = Object.fromEntries(
      ids.map((id, i) => [scoreFeed(id), Float32Array.from({ length: rows }, (_, r) => Math.sin(r * 12.9 + i))]),
    );
    const routed = await run(training, capacities(0.5));
    const baseline = await run(random, { ...capacities(0.5), ...scores });
    expect(rowsRun(baseline.counters)).toEqual(rowsRun(routed.counters));
    expect(baseline.outputs.logits).not.toEqual(routed.outputs.logits);
    const dropped = await run(() => droppedSelector(new Set([ids[1], ids[2]])));
    expect(rowsRun(dropped.counters)).toEqual(ids.map((_, i) => (i === 1 || i === 2 ? 0 : rows)));
  });

  it('needs no router where all rows pass or none, for the same result', async () => {
    const known = new Map(ids.map((id, i) => [id, [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, 0.1][i % 3]]));
    const fed = Object.fromEntries([...known].map(([id, t]) => [thresholdFeed(id), filled(t)]));
    const open = await run(inference, fed);
    const finite = [...known].filter(([, t]) => Number.isFinite(t)).map(([id]) => thresholdFeed(id));
    const decided = await run(
      (graph, routers) => inferenceSelector(graph, policy, routers, segments, known),
      Object.fromEntries(finite.map((name) => [name, fed[name]])),
    );
    expect(decided.outputs.logits).toEqual(open.outputs.logits);
    expect(rowsRun(decided.counters)).toEqual(rowsRun(open.counters));
    const absent = routerPlaces(policy).filter((_, i) => i % 3 === 0);
    for (const { layer, place } of absent) expect(decided.counters[`L${layer}.${place}`]).toBeUndefined();
  });

  it('lets nothing through above every score, and then only embeds', async () => {
    const { counters } = await run(inference, thresholds(1e9));
    expect(rowsRun(counters)).toEqual(ids.map(() => 0));
  });
});
