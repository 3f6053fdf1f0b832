// The decoder against transformers: logits, hidden states and gradients, with caches, with selected rows, and its counters.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { accumulate, crossEntropy, Graph, gradients, type Node, Program, stopGradient } from '../../lib/graph/index.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { decoder, finalNorm, logits, subLayerTag } from '../../lib/model/decoder.js';
import { forwardFlops } from '../../lib/model/flops.js';
import { places, type Selector, selectEverything } from '../../lib/model/select.js';
import type { ModelSpec } from '../../lib/model/spec.js';
import {
  bindWeights,
  type DecoderTensors,
  exportWeights,
  flattenWeights,
  loadWeights,
  parameterPlan,
  weightsByName,
} from '../../lib/model/weights.js';
import type { TypedArray } from '../../lib/native/addon.js';
import { Engine, Tensor } from '../../lib/native/index.js';
import { goldenDirectory, goldenNames, largestDifference, positionsOf, readSpec, readVectors } from './golden.js';

const data = process.env.ELASTIFORM_DATA;
const models = goldenNames('golden.safetensors');
const withGradients = models.filter((name) =>
  Object.keys(readVectors(join(goldenDirectory, name, 'golden.safetensors'))).some((key) => key.startsWith('grad.')),
);

let engine: Engine;
beforeAll(() => {
  engine = new Engine();
});
afterAll(() => engine.dispose());

interface Sequences {
  ids: TypedArray;
  offsets: TypedArray;
}

const feedsOf = ({ ids, offsets }: Sequences) => ({
  ids: Int32Array.from(ids),
  positions: positionsOf(offsets),
  offsets: Int32Array.from(offsets),
});

/** A graph with the inputs of a decoder, for at most `rows` rows. */
function inputs(rows: number, segments: number) {
  const graph = new Graph();
  const n = graph.dim('rows', rows);
  const feeds = {
    ids: graph.feed('ids', 'i32', [n]),
    positions: graph.feed('positions', 'i32', [n]),
    offsets: graph.feed('offsets', 'i32', [segments + 1]),
  };
  return { graph, feeds };
}

/** One forward pass. `select` makes a selector in the graph, with feeds of its own. */
async function forward(
  spec: ModelSpec,
  weights: DecoderTensors,
  sequences: Sequences,
  select: (graph: Graph) => Selector = () => selectEverything,
  more: Record<string, TypedArray> = {},
) {
  const { graph, feeds } = inputs(sequences.ids.length, sequences.offsets.length - 1);
  const nodes = bindWeights(graph, weights);
  const hidden = decoder(graph, spec, nodes, feeds, select(graph));
  graph.output('hidden', hidden);
  graph.output('logits', logits(graph, spec, nodes, hidden));
  using program = Program.compile(graph, engine);
  return program.run({ dims: { rows: sequences.ids.length }, feeds: { ...feedsOf(sequences), ...more } });
}

describe.each(models)('%s', (name) => {
  const directory = join(goldenDirectory, name);
  const golden = readVectors(join(directory, 'golden.safetensors'));
  const sequences = { ids: golden.ids, offsets: golden.offsets };
  const lengths = [...golden.offsets].slice(1).map((end, i) => end - golden.offsets[i]);
  const spec = readSpec(directory);
  using checkpoint = Checkpoint.open(directory);
  const { weights } = loadWeights(spec, checkpoint);

  it('has the logits and hidden states of transformers', async () => {
    const { outputs } = await forward(spec, weights, sequences);
    expect(largestDifference(outputs.hidden, golden.hidden)).toBeLessThan(1e-4);
    expect(largestDifference(outputs.logits, golden.logits)).toBeLessThan(1e-4);
  });

  it('counts what the formula says', async () => {
    const { counters } = await forward(spec, weights, sequences);
    const { perLayer, head, streams, total } = forwardFlops(spec, lengths);
    const between = Object.keys(counters).filter((tag) => tag.endsWith('streams'));
    expect(between.reduce((sum, tag) => sum + counters[tag].flops, 0)).toBe(streams);
    let sum = counters.head.flops + streams;
    for (let layer = 0; layer < spec.layers; layer++) {
      for (const place of places) {
        expect(counters[subLayerTag(layer, place)]).toEqual({ flops: perLayer[layer][place], rows: golden.ids.length });
        sum += counters[subLayerTag(layer, place)].flops;
      }
    }
    expect(counters.head.flops).toBe(head);
    expect(sum).toBe(total);
  });

  it('gives the same bits for all rows selected as for no selection', async () => {
    const full = await forward(spec, weights, sequences);
    for (const looks of [false, true]) {
      const everyRow = (graph: Graph): Selector => ({
        runs: () => true,
        rows: ({ normed, offsets }) => {
          if (looks) normed();
          return { rows: graph.feed('every', 'i32', [graph.dim('selected', golden.ids.length)]), offsets };
        },
      });
      const { graph, feeds } = inputs(golden.ids.length, lengths.length);
      const nodes = bindWeights(graph, weights);
      graph.output('logits', logits(graph, spec, nodes, decoder(graph, spec, nodes, feeds, everyRow(graph))));
      using program = Program.compile(graph, engine);
      const { outputs } = await program.run({
        dims: { rows: golden.ids.length, selected: golden.ids.length },
        feeds: { ...feedsOf(sequences), every: Int32Array.from(golden.ids, (_, i) => i) },
      });
      expect(outputs.logits).toEqual(full.outputs.logits);
    }
  });

  it('is the sum of the blocks of its feed-forward layers', async () => {
    const everyRow = Int32Array.from(golden.ids, (_, i) => i);
    const some = everyRow.filter((row) => row % 3 !== 1);
    const someOffsets = Int32Array.from(golden.offsets, (end) => some.filter((row) => row < end).length);
    const cut = (count: number, chosen: (block: number) => Int32Array, selected = false) => {
      const feeds: Record<string, TypedArray> = selected ? { some, someOffsets } : {};
      const select = (graph: Graph): Selector => ({
        runs: () => true,
        rows: ({ place }) =>
          selected && place === 'mlp'
            ? {
                rows: graph.feed('some', 'i32', [some.length]),
                offsets: graph.feed('someOffsets', 'i32', [someOffsets.length]),
              }
            : null,
        experts: ({ place, offsets }) =>
          place === 'attn'
            ? null
            : Array.from({ length: count }, (_, block) => {
                feeds[`block${block}`] = chosen(block);
                return { rows: graph.feed(`block${block}`, 'i32', [chosen(block).length]), offsets };
              }),
      });
      return forward(spec, weights, sequences, select, feeds);
    };
    const { perLayer } = forwardFlops(spec, lengths);
    if (spec.perLayer.some(({ gateCutoff }) => gateCutoff !== null)) {
      await expect(cut(2, () => everyRow)).rejects.toThrow('[model] the feed-forward of layer 0 cannot be cut');
      return;
    }
    for (const count of [1, 2, 4]) {
      const { outputs, counters } = await cut(count, () => everyRow);
      expect(largestDifference(outputs.logits, golden.logits)).toBeLessThan(1e-4);
      expect(counters[`L1.mlp/${count}`]).toEqual({ flops: perLayer[1].mlp, rows: count * golden.ids.length });
    }

    // One of two blocks gives the model whose other units have zero weights.
    const zeroed: Tensor[] = [];
    const firstHalf = (tensor: Tensor): Tensor => {
      const data = tensor.readFloat();
      data.fill(0, data.length / 2);
      zeroed.push(Tensor.fromData('f32', tensor.shape, data));
      return zeroed.at(-1)!;
    };
    const halved: DecoderTensors = {
      ...weights,
      layers: weights.layers.map((layer) => ({
        ...layer,
        up: { weight: firstHalf(layer.up.weight), ...(layer.up.bias && { bias: firstHalf(layer.up.bias) }) },
      })),
    };
    const wanted = await forward(spec, halved, sequences);
    // Only the first row of the last sequence chooses the other block.
    const last = golden.offsets.at(-2)!;
    const half = await cut(2, (block) => (block === 0 ? everyRow : Int32Array.of(last)));
    const before = last * spec.vocab;
    expect(
      largestDifference(half.outputs.logits.slice(0, before), wanted.outputs.logits.slice(0, before)),
    ).toBeLessThan(1e-4);
    expect(largestDifference(half.outputs.logits, wanted.outputs.logits)).toBeGreaterThan(1e-3);
    for (const tensor of zeroed) tensor.dispose();

    // Among rows that were selected, and all of those in every block.
    const tokens = await forward(
      spec,
      weights,
      sequences,
      (graph) => ({
        runs: () => true,
        rows: ({ place }) =>
          place === 'mlp'
            ? {
                rows: graph.feed('some', 'i32', [some.length]),
                offsets: graph.feed('someOffsets', 'i32', [someOffsets.length]),
              }
            : null,
      }),
      { some, someOffsets },
    );
    const both = await cut(2, () => everyRow.subarray(0, some.length), true);
    expect(largestDifference(both.outputs.logits, tokens.outputs.logits)).toBeLessThan(1e-4);
  });

  it('continues from caches', async () => {
    const segments = lengths.length;
    const width = spec.kvHeads * spec.headDim;
    const { graph, feeds } = inputs(golden.ids.length, segments);
    const tensors: Tensor[] = [];
    const state = (dtype: 'f32' | 'i32', shape: number[]) => {
      const tensor = Tensor.alloc(dtype, shape);
      tensors.push(tensor);
      return graph.state(tensor);
    };
    // Every segment is in the slot of its number, with one page.
    const own = (shape: number[]) => {
      const node = state('i32', shape);
      tensors.at(-1)!.write(Int32Array.from({ length: segments }, (_, s) => s));
      return node;
    };
    const [slots, pages] = [own([segments]), own([segments, 1])];
    const caches = Array.from({ length: spec.layers }, () => ({
      k: state('f32', [segments, 16, width]),
      v: state('f32', [segments, 16, width]),
      lengths: state('i32', [segments]),
      ...{ slots, pages },
    }));
    const nodes = bindWeights(graph, weights);
    graph.output(
      'logits',
      logits(graph, spec, nodes, decoder(graph, spec, nodes, { ...feeds, caches: (layer) => [caches[layer]] })),
    );
    using program = Program.compile(graph, engine);

    // Both sequences advance in steps of different sizes, the first by one row at its end.
    const vocab = golden.logits.length / golden.ids.length;
    const done = lengths.map(() => 0);
    for (const step of [
      [6, 2],
      [5, 0],
      [1, 2],
      [1, 1],
    ]) {
      const rows = step.flatMap((n, s) => Array.from({ length: n }, (_, i) => golden.offsets[s] + done[s] + i));
      const offsets = [0, ...step.map((_, s) => step.slice(0, s + 1).reduce((sum, n) => sum + n, 0))];
      const { outputs, counters } = await program.run({
        dims: { rows: rows.length },
        feeds: {
          ids: Int32Array.from(rows, (row) => golden.ids[row]),
          positions: Int32Array.from(rows, (row) => positionsOf(golden.offsets)[row]),
          offsets: Int32Array.from(offsets),
        },
      });
      const expected = rows.flatMap((row) => [...golden.logits.subarray(row * vocab, (row + 1) * vocab)]);
      expect(largestDifference(outputs.logits, expected)).toBeLessThan(1e-4);
      expect(counters['L0.attn'].flops).toBe(forwardFlops(spec, step, { cached: done }).perLayer[0].attn);
      step.forEach((n, s) => {
        done[s] += n;
      });
    }
    expect(done).toEqual(lengths);
    for (const tensor of tensors) tensor.dispose();
  });
});

describe('packed as narrower types', () => {
  it.each([
    ['bf16', 0.5],
    ['f16', 0.1],
  ] as const)('%s stays close', async (dtype, tolerance) => {
    const directory = join(goldenDirectory, 'llama-gqa');
    const golden = readVectors(join(directory, 'golden.safetensors'));
    const spec = readSpec(directory);
    using checkpoint = Checkpoint.open(directory);
    using loaded = loadWeights(spec, checkpoint, { dtype });
    const { outputs } = await forward(spec, loaded.weights, { ids: golden.ids, offsets: golden.offsets });
    const difference = largestDifference(outputs.logits, golden.logits);
    expect(difference).toBeGreaterThan(1e-4);
    expect(difference).toBeLessThan(tolerance);
  });
});

describe.each(goldenNames('routed-raw.safetensors'))('%s with rows given', (name) => {
  const directory = join(goldenDirectory, name);
  const spec = readSpec(directory);
  using checkpoint = Checkpoint.open(directory);
  const { weights } = loadWeights(spec, checkpoint);

  it.each(['straight-through', 'raw'])('has the logits of the reference, %s', async (mode) => {
    const golden = readVectors(join(directory, `routed-${mode}.safetensors`));
    const feeds: Record<string, TypedArray> = {};
    const select = (graph: Graph): Selector => ({
      runs: () => true,
      rows: ({ layer, place }) => {
        const id = `layers.${layer}.${place}.token`;
        const rows = Int32Array.from(golden[`rows.${id}`]);
        feeds[`${id}.rows`] = rows;
        feeds[`${id}.offsets`] = Int32Array.from(golden.offsets, (end) => rows.filter((row) => row < end).length);
        feeds[`${id}.gate`] = Float32Array.from(rows, (row) =>
          mode === 'raw' ? 1 / (1 + Math.exp(-golden[`z.${id}`][row])) : 1,
        );
        return {
          rows: graph.feed(`${id}.rows`, 'i32', [rows.length]),
          offsets: graph.feed(`${id}.offsets`, 'i32', [golden.offsets.length]),
          gate: () => graph.feed(`${id}.gate`, 'f32', [rows.length]),
        };
      },
    });
    const sequences = { ids: golden.ids, offsets: golden.offsets };
    const { outputs, counters } = await forward(spec, weights, sequences, select, feeds);
    expect(largestDifference(outputs.logits, golden['student.logits'])).toBeLessThan(1e-4);
    expect(counters['L0.mlp'].rows).toBe(golden['rows.layers.0.mlp.token'].length);
    const teacher = await forward(spec, weights, sequences);
    expect(largestDifference(teacher.outputs.logits, golden['teacher.logits'])).toBeLessThan(1e-4);
  });

  it('leaves sub-layers out that do not run', async () => {
    const golden = readVectors(join(directory, 'routed-raw.safetensors'));
    const dropped = (): Selector => ({ runs: (layer, place) => layer !== 1 || place !== 'attn', rows: () => null });
    const { counters } = await forward(spec, weights, { ids: golden.ids, offsets: golden.offsets }, dropped);
    expect(Object.keys(counters)).not.toContain('L1.attn');
    expect(counters['L1.mlp'].rows).toBe(golden.ids.length);
  });
});

describe.each(withGradients)('training all of %s', (name) => {
  const directory = join(goldenDirectory, name);
  const spec = readSpec(directory);
  const golden = readVectors(join(directory, 'golden.safetensors'));

  async function gradientsOf(recompute: boolean) {
    const plan = parameterPlan(spec);
    using checkpoint = Checkpoint.open(directory);
    using loaded = loadWeights(spec, checkpoint);
    using flat = Tensor.alloc('f32', [plan.size]);
    using sums = Tensor.alloc('f32', [plan.size]);
    flat.write(flattenWeights(spec, loaded));

    const { graph, feeds } = inputs(golden.ids.length, golden.offsets.length - 1);
    const offsetOf = new Map(plan.parameters.map((p) => [p.name, p.offset]));
    const nodes = new Map<string, Node>();
    const weights = weightsByName(spec, (weight, shape) => {
      nodes.set(weight, graph.state(flat.slice(offsetOf.get(weight)!, [...shape]), weight));
      return nodes.get(weight)!;
    });
    const x = decoder(graph, spec, weights, feeds, undefined, { recompute });
    const targets = graph.feed('targets', 'i32', feeds.ids.shape);
    const weight = graph.feed('weight', 'f32', feeds.ids.shape);
    const { loss } = crossEntropy(finalNorm(spec, weights, x), weights.head, targets, weight, spec.logitSoftcap);
    const wanted = plan.parameters.map((p) => nodes.get(p.name)!);
    const state = graph.state(sums);
    gradients(loss, wanted).forEach((gradient, i) => {
      accumulate(state, gradient, plan.parameters[i].offset);
    });
    graph.output('loss', loss);
    using program = Program.compile(graph, engine);

    const ends = new Set([...golden.offsets].slice(1));
    const next = Int32Array.from(golden.ids, (_, i) => (ends.has(i + 1) ? -1 : golden.ids[i + 1]));
    const predicted = next.filter((id) => id >= 0).length;
    const { outputs } = await program.run({
      dims: { rows: golden.ids.length },
      feeds: {
        ...feedsOf({ ids: golden.ids, offsets: golden.offsets }),
        targets: next,
        weight: Float32Array.from(next, (id) => (id < 0 ? 0 : 1 / predicted)),
      },
    });
    return { loss: outputs.loss[0], gradient: sums.readFloat() };
  }

  it('has the loss and every gradient of torch', async () => {
    const { loss, gradient } = await gradientsOf(false);
    expect(loss).toBeCloseTo(golden.loss[0], 4);
    const exported = exportWeights(spec, gradient);
    const keys = Object.keys(golden).filter((key) => key.startsWith('grad.'));
    expect(Object.keys(exported).sort()).toEqual(keys.map((key) => key.slice(5)).sort());
    for (const [tensor, { data: values }] of Object.entries(exported)) {
      expect(largestDifference(values, golden[`grad.${tensor}`]), tensor).toBeLessThan(1e-4);
    }
  });

  it('has the same bits when blocks are recomputed', async () => {
    expect(await gradientsOf(true)).toEqual(await gradientsOf(false));
  });
});

it('a teacher beside its student shares the weights and is counted apart', async () => {
  const directory = join(goldenDirectory, 'llama-gqa');
  const golden = readVectors(join(directory, 'golden.safetensors'));
  const spec = readSpec(directory);
  using checkpoint = Checkpoint.open(directory);
  using loaded = loadWeights(spec, checkpoint);
  const { graph, feeds } = inputs(golden.ids.length, golden.offsets.length - 1);
  const nodes = bindWeights(graph, loaded.weights);
  const teacher = decoder(graph, spec, nodes, feeds, undefined, { tagPrefix: 'teacher/' });
  const noAttention: Selector = { runs: (_, place) => place === 'mlp', rows: () => null };
  graph.output('teacher', logits(graph, spec, nodes, stopGradient(teacher), { tagPrefix: 'teacher/' }));
  graph.output('student', logits(graph, spec, nodes, decoder(graph, spec, nodes, feeds, noAttention)));
  using program = Program.compile(graph, engine);
  const { counters, outputs } = await program.run({
    dims: { rows: golden.ids.length },
    feeds: feedsOf({ ids: golden.ids, offsets: golden.offsets }),
  });
  expect(largestDifference(outputs.teacher, golden.logits)).toBeLessThan(1e-4);
  expect(counters['teacher/L1.mlp'].flops).toBe(counters['L1.mlp'].flops);
  expect(counters['teacher/L1.attn'].rows).toBe(golden.ids.length);
  expect(Object.keys(counters)).not.toContain('L1.attn');
});

describe.skipIf(!data)('real checkpoints', () => {
  const reference = (name: string) => JSON.parse(readFileSync(join(data as string, name, 'reference.json'), 'utf8'));

  it.each([
    ['stories260K-llama', 260_032],
    ['gpt2-nano-sort', 85_728],
  ])('%s has the logits of transformers', async (name, parameters) => {
    const directory = join(data as string, name);
    // Of the last row, or of all.
    const { input_ids: ids, last_logits: last, logits } = reference(name);
    const expected: number[] = last ?? logits.flat();
    const spec = readSpec(directory);
    using checkpoint = Checkpoint.open(directory);
    using loaded = loadWeights(spec, checkpoint);
    expect(parameterPlan(spec).size).toBe(parameters);
    const sequences = { ids: Int32Array.from(ids), offsets: Int32Array.of(0, ids.length) };
    const { outputs } = await forward(spec, loaded.weights, sequences);
    expect(expected).toHaveLength(last ? spec.vocab : ids.length * spec.vocab);
    expect(largestDifference(outputs.logits.slice(-expected.length), expected)).toBeLessThan(1e-4);
  });
});
