// Rows that choose experts together: by the first of their tile that entered, in training, at inference and at random.
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { policyOf } from '../../lib/elastic/elastify.js';
import type { ElasticPolicy } from '../../lib/elastic/policy.js';
import { routerPlaces } from '../../lib/elastic/policy.js';
import {
  capacityFeed,
  decidedFeed,
  decidedOutput,
  enteredOutput,
  expertRowsOutput,
  inferenceSelector,
  noiseFeed,
  randomSelector,
  recordedExperts,
  recordedSelector,
  scoreFeed,
  thresholdFeed,
  trainingSelector,
} from '../../lib/elastic/rows.js';
import { heldWidth } from '../../lib/graph/index.js';
import { Engine, type TypedArray } from '../../lib/native/index.js';
import { goldenDirectory, readSpec } from '../model/golden.js';
import { random } from '../ops/harness.js';
import { runSelected, type Select } from './selected.js';

let engine: Engine;
beforeAll(() => {
  engine = new Engine();
});
afterAll(() => engine.dispose());

const directory = join(goldenDirectory, 'elastiformer-llama');
const spec = readSpec(directory);
const tile = 32;
/** Sequences by their first position and length: one that begins within a tile, one within a tile alone. */
const sequences = [
  [0, 70],
  [20, 50],
  [3, 16],
] as const;
const offsets = [0, 70, 120, 136];
const positions = sequences.flatMap(([first, length]) => Array.from({ length }, (_, i) => first + i));
const rows = positions.length;
const count = 4;

const policyWith = (tile?: number): ElasticPolicy => ({
  ...policyOf(
    { kind: 'elastiformer', tokens: { attn: 0.5, mlp: 0.5 }, heads: { group: 'head', tile }, blocks: { count, tile } },
    spec,
  ),
  base: { name: 'llama', weightsSha256: '', tokenizerSha256: null },
});
const policy = policyWith(tile);
const next = random(1);
const values = new Map(
  routerPlaces(policy).map(({ id, outputs }) => [
    id,
    Float32Array.from({ length: outputs * (spec.hidden + 1) }, () => 2 * next() - 1),
  ]),
);

/** Which of the rows entered the sub-layer of layer 0, and of these which chose each expert. */
async function run(select: Select, feeds: Record<string, TypedArray>) {
  const router = (id: string) => {
    const own = values.get(id)!;
    const outputs = own.length / (spec.hidden + 1);
    return { weight: own.subarray(outputs), bias: own.subarray(0, outputs) };
  };
  const ids = positions.map((_, i) => (i * 11 + 3) % 29);
  const recorded: Select = (graph, routers) => recordedExperts(graph, recordedSelector(graph, select(graph, routers)));
  const batch = { ids, positions, offsets };
  const { outputs } = await runSelected(engine, directory, policy, router, batch, recorded, feeds);
  const choices = (axis: 'heads' | 'blocks') => {
    const [place, id] =
      axis === 'heads' ? (['attn', 'layers.0.attn.heads'] as const) : (['mlp', 'layers.0.mlp.blocks'] as const);
    const entered = [...(outputs[enteredOutput(0, place)] as Int32Array)];
    const experts = Array.from({ length: count }, (_, e) => new Set(outputs[expertRowsOutput(id, e)] as Int32Array));
    const chosen = entered.map((_, n) => experts.map((rows) => rows.has(n)).join());
    return { entered, chosen };
  };
  return { outputs, choices };
}
type Choices = ReturnType<Awaited<ReturnType<typeof run>>['choices']>;

/** What every row that entered would choose by the first one of its tile. */
function together({ entered, chosen }: Choices): string[] {
  const tileOf = (n: number) => {
    const row = entered[n];
    return `${offsets.findLastIndex((start) => start <= row)} ${Math.floor(positions[row] / tile)}`;
  };
  return entered.map((_, n) => chosen[entered.findIndex((_, first) => tileOf(first) === tileOf(n))]);
}

const filled = (value: number) => new Float32Array(sequences.length).fill(value);
const feedsFor = (name: (id: string) => string, value: (axis: string) => number) =>
  Object.fromEntries(routerPlaces(policy).map(({ id, axis }) => [name(id), filled(value(axis))]));
const half = feedsFor(capacityFeed, () => 0.5);
const noise = Object.fromEntries(
  routerPlaces(policy).map(({ id, outputs }) => [
    noiseFeed(id),
    Float32Array.from({ length: rows * outputs }, () => 2 * next() - 1),
  ]),
);
const scores = Object.fromEntries(
  routerPlaces(policy).map(({ id, outputs }) => [
    scoreFeed(id),
    Float32Array.from({ length: rows * outputs }, () => next()),
  ]),
);
const nothing = Object.fromEntries(
  routerPlaces(policy).flatMap(({ id, outputs }) =>
    outputs > 1 ? [[decidedFeed(id), new Float32Array(sequences.length * heldWidth(outputs)).fill(Number.NaN)]] : [],
  ),
);
const ways: [
  string,
  (...args: [...Parameters<Select>, policy: ElasticPolicy]) => ReturnType<Select>,
  Record<string, TypedArray>,
][] = [
  ['training', (graph, routers, p) => trainingSelector(graph, p, routers, sequences.length), half],
  [
    'training with noise',
    (graph, routers, p) => trainingSelector(graph, p, routers, sequences.length, { explore: true }),
    { ...half, ...noise },
  ],
  [
    'inference',
    (graph, routers, p) => inferenceSelector(graph, p, routers, sequences.length),
    feedsFor(thresholdFeed, (axis) => (axis === 'heads' || axis === 'blocks' ? 0.5 : 0)),
  ],
  ['random', (graph, _, p) => randomSelector(graph, p, rows, sequences.length), { ...half, ...scores }],
];

describe.each(ways)('%s', (_, select, feeds) => {
  test('rows that enter choose as the first of their tile does by itself', async () => {
    const own = await run((graph, routers) => select(graph, routers, policyWith()), feeds);
    const tiled = await run((graph, routers) => select(graph, routers, policy), feeds);
    // Up to layer 0's attention both see the same.
    const [alone, heads] = [own.choices('heads'), tiled.choices('heads')];
    expect(heads.entered).toEqual(alone.entered);
    expect(heads.entered.length).toBeLessThan(rows);
    expect(heads.chosen).toEqual(together(alone));
    expect(heads.chosen).not.toEqual(alone.chosen);
    const blocks = tiled.choices('blocks');
    expect(blocks.chosen).toEqual(together(blocks));
    expect(new Set(blocks.chosen).size).toBeGreaterThan(1);
    // Sixteen rows of a tile read k experts, and by themselves more.
    const ofTile = ({ entered, chosen }: Choices) =>
      new Set(
        chosen
          .filter((_, n) => entered[n] >= offsets[2])
          .flatMap((c) => c.split(',').flatMap((v, e) => (v === 'true' ? [e] : []))),
      );
    expect(ofTile(heads).size).toBe(2);
    expect(ofTile(alone).size).toBeGreaterThan(2);
  });
});

test('what earlier runs decided holds, and goes on to later ones', async () => {
  const [, , [, , thresholds]] = ways;
  const resumed = (held: Record<string, TypedArray>) =>
    run((graph, routers) => inferenceSelector(graph, policy, routers, sequences.length, new Map(), { resumed: true }), {
      ...thresholds,
      ...held,
    });
  const { choices, outputs } = await resumed(nothing);
  const id = 'layers.0.attn.heads';
  const width = heldWidth(count);
  const decided = outputs[decidedOutput(id)] as Float32Array;
  const firstOf = (s: number, at: number) =>
    choices('heads').entered.find((row) => row >= offsets[s] && row < offsets[s + 1] && positions[row] >= at * tile)!;
  for (const [s, [last, before]] of [
    [2, 1],
    [2, 1],
    [0, null],
  ].entries()) {
    expect(decided[s * width + count]).toBe(positions[firstOf(s, last!)]);
    if (before === null) expect(decided[s * width + 2 * count + 1]).toBeNaN();
    else expect(decided[s * width + 2 * count + 1]).toBe(positions[firstOf(s, before)]);
  }
  // The second sequence begins where a tile goes on: held, the best expert is another one than it would choose.
  const { entered, chosen } = choices('heads');
  const own = chosen[entered.findIndex((row) => row >= offsets[1])].split(',');
  const held = new Float32Array(nothing[decidedFeed(id)]);
  held.set([...own.map((chosen) => (chosen === 'true' ? 0 : 1)), 18], width);
  const after = (await resumed({ ...nothing, [decidedFeed(id)]: held })).choices('heads');
  const other = own.map((chosen) => String(chosen === 'false')).join();
  for (const [n, row] of entered.entries()) {
    const inTile = row >= offsets[1] && row < offsets[2] && positions[row] < tile;
    expect(after.chosen[n]).toBe(inTile ? other : chosen[n]);
  }
});
