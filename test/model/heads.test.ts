// Attention cut into experts, against a masked sum over heads in float64: who is a query of which head, and who is a key.
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Graph, linear, type Node, Program, rope } from '../../lib/graph/index.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { embed, norm } from '../../lib/model/blocks.js';
import { decoder } from '../../lib/model/decoder.js';
import { attentionFlops, keyValueFlops } from '../../lib/model/flops.js';
import type { Selector } from '../../lib/model/select.js';
import { layerOf } from '../../lib/model/spec.js';
import { type Affine, bindWeights, loadWeights } from '../../lib/model/weights.js';
import { Engine, Tensor } from '../../lib/native/index.js';
import { interpret } from '../ops/interpreter.js';
import { f64, type Value } from '../ops/reference.js';
import { goldenDirectory, largestDifference, positionsOf, readSpec, readVectors } from './golden.js';

let engine: Engine;
beforeAll(() => {
  engine = new Engine();
});
afterAll(() => engine.dispose());

/** Whose keys a query of an expert sees: of all rows, of rows that entered, of rows that chose the expert. */
type KeyRule = 'all' | 'entered' | 'own';

describe.each(['llama-gqa', 'llama-biased', 'gpt2', 'mistral'])('%s', (name) => {
  const directory = join(goldenDirectory, name);
  const spec = readSpec(directory);
  const { heads, kvHeads, headDim, hidden } = spec;
  const golden = readVectors(join(directory, 'golden.safetensors'));
  const n = golden.ids.length;
  const ends = [...golden.offsets];
  const segments = ends.length - 1;
  const segmentOf = (row: number) => ends.findIndex((end, s) => s > 0 && row < end) - 1;
  using checkpoint = Checkpoint.open(directory);
  const { weights } = loadWeights(spec, checkpoint);
  const positions = positionsOf(golden.offsets);

  const enters = (row: number) => row % 4 !== 1;
  const chooses = (row: number, expert: number) => (row * 7 + expert * 5 + Math.floor(row / 3)) % 3 !== 0;
  const factor = (row: number, expert: number) => 0.5 + ((row * 3 + expert) % 5) / 4;
  const token = (row: number) => 1 + (row % 3) / 2;

  /** The residual stream after the first layer's attention, [n, hidden]. */
  function reference(count: number, keys: KeyRule, routed: boolean): Float64Array {
    const graph = new Graph();
    const feeds = { ids: graph.feed('ids', 'i32', [n]), positions: graph.feed('positions', 'i32', [n]) };
    const nodes = bindWeights(graph, weights);
    const layer = nodes.layers[0];
    const residual = embed(spec, nodes, feeds.ids, feeds.positions);
    const x = norm(spec, residual, layer.norm1);
    const project = ({ weight, bias }: Affine<Node>) => linear(x, weight, { bias });
    const turn = (y: Node) => {
      const turned = spec.perLayer[0].rope;
      if (!turned) return y;
      const { invFreq } = turned;
      return rope(y, feeds.positions, graph.constant([...invFreq], [invFreq.length]), { headDim });
    };
    const wanted = [residual, turn(project(layer.q)), turn(project(layer.k!)), project(layer.v!)];
    const tensors = new Map<Tensor, Value>();
    for (const step of graph.steps) {
      for (const node of step.inputs) {
        const leaf = node?.leaf;
        if (leaf?.kind !== 'weight') continue;
        tensors.set(leaf.tensor, f64(leaf.tensor.shape, leaf.tensor.readFloat()));
      }
    }
    const value = interpret(graph, {
      dims: {},
      feeds: { ids: f64([n], golden.ids), positions: f64([n], positions) },
      tensors,
    });
    const [y, q, k, v] = wanted.map((node) => value(node).data);
    const [wo, bo] = [weights.layers[0].o.weight.readFloat(), weights.layers[0].o.bias?.readFloat()];
    const result = Float64Array.from(y);
    for (let i = 0; i < n; i++) {
      if (routed && !enters(i)) continue;
      const gate = routed ? token(i) : 1;
      for (let d = 0; d < hidden; d++) result[i * hidden + d] += gate * (bo?.[d] ?? 0);
      for (let h = 0; h < heads; h++) {
        const expert = Math.floor((h * count) / heads);
        if (!chooses(i, expert)) continue;
        const kv = Math.floor((h * kvHeads) / heads);
        const seen = Array.from({ length: i + 1 }, (_, j) => j).filter(
          (j) =>
            segmentOf(j) === segmentOf(i) &&
            (keys === 'all' || !routed || enters(j)) &&
            (keys !== 'own' || chooses(j, expert)),
        );
        const scores = seen.map((j) => {
          let sum = 0;
          for (let d = 0; d < headDim; d++) {
            sum += q[(i * heads + h) * headDim + d] * k[(j * kvHeads + kv) * headDim + d];
          }
          return Math.exp(sum / Math.sqrt(headDim));
        });
        const total = scores.reduce((a, b) => a + b, 0);
        for (let d = 0; d < headDim; d++) {
          const mixed = seen.reduce((sum, j, at) => sum + scores[at] * v[(j * kvHeads + kv) * headDim + d], 0) / total;
          for (let o = 0; o < hidden; o++) {
            result[i * hidden + o] += gate * factor(i, expert) * mixed * wo[o * heads * headDim + h * headDim + d];
          }
        }
      }
    }
    return result;
  }

  /** The same by the model, for some rows of each sequence after those in the caches. */
  function program(count: number, keys: KeyRule, routed: boolean, cached: boolean) {
    const graph = new Graph();
    const rows = graph.dim('rows', n);
    const feeds = {
      ids: graph.feed('ids', 'i32', [rows]),
      positions: graph.feed('positions', 'i32', [rows]),
      offsets: graph.feed('offsets', 'i32', [segments + 1]),
    };
    const chosen = (key: string, feed: string) => ({
      rows: graph.feed(feed, 'i32', [graph.dim(key, n)]),
      offsets: graph.feed(`${feed}.offsets`, 'i32', [segments + 1]),
    });
    const selector: Selector = {
      runs: (layer, place) => layer === 0 && place === 'attn',
      rows: () =>
        routed
          ? {
              ...chosen('entered', 'entered'),
              allKeys: keys === 'all',
              gate: () => graph.feed('token', 'f32', [graph.dim('entered', n)]),
            }
          : null,
      experts: () =>
        Array.from({ length: count }, (_, e) => ({
          ...chosen(`expert${e}`, `expert${e}`),
          gate: graph.feed(`gate${e}`, 'f32', [graph.dim(`expert${e}`, n)]),
          ownKeys: keys === 'own',
        })),
    };
    // Gates of tokens are asked for by rows: those of the rows that chose an expert, and of all that entered for the bias.
    const gates = new Map<Node, string>();
    const select: Selector = {
      ...selector,
      rows(s) {
        const selection = selector.rows(s);
        return (
          selection && {
            ...selection,
            gate(at) {
              const known = gates.get(at) ?? (at === selection.rows ? 'token' : `token${gates.size}`);
              gates.set(at, known);
              return graph.feed(known, 'f32', at.shape);
            },
          }
        );
      },
    };
    const tensors: Tensor[] = [];
    const state = (dtype: 'f32' | 'i32', shape: number[]) => {
      tensors.push(Tensor.alloc(dtype, shape));
      return graph.state(tensors.at(-1)!);
    };
    const nodes = bindWeights(graph, weights);
    // Every segment is in the slot of its number, with one page.
    const own = (shape: number[]) => {
      const node = state('i32', shape);
      tensors.at(-1)!.write(Int32Array.from({ length: segments }, (_, s) => s));
      return node;
    };
    const caches = (_: number, parts: number) =>
      Array.from({ length: parts }, () => ({
        k: state('f32', [segments, n, (kvHeads * headDim) / parts]),
        v: state('f32', [segments, n, (kvHeads * headDim) / parts]),
        lengths: state('i32', [segments]),
        slots: own([segments]),
        pages: own([segments, 1]),
      }));
    const parts: ReturnType<typeof caches>[] = [];
    const once = (layer: number, count: number) => {
      parts[0] ??= caches(layer, count);
      return parts[0];
    };
    graph.output('y', decoder(graph, spec, nodes, { ...feeds, ...(cached && { caches: once }) }, select));
    const compiled = Program.compile(graph, engine);
    return { compiled, gates: [...gates.values()], tensors };
  }

  const cases = (
    [
      ['all', false],
      ['own', false],
      ['all', true],
      ['entered', true],
      ['own', true],
    ] as const
  ).flatMap(([keys, routed]) => {
    const counts = keys === 'own' ? [kvHeads] : [...new Set([heads, kvHeads])];
    return counts.filter((count) => count > 1).map((count) => ({ keys, routed, count }));
  });

  it.each(cases)('%o is the masked sum of heads, at once and through caches', async ({ keys, routed, count }) => {
    const wanted = reference(count, keys, routed);
    for (const cached of [false, true]) {
      const { compiled, gates, tensors } = program(count, keys, routed, cached);
      const done = new Array<number>(segments).fill(0);
      const chunks = cached ? [0.5, 1] : [1];
      for (const share of chunks) {
        const rows: number[] = [];
        const offsets = [0];
        for (let s = 0; s < segments; s++) {
          const upTo = Math.floor((ends[s + 1] - ends[s]) * share);
          for (let i = done[s]; i < upTo; i++) rows.push(ends[s] + i);
          done[s] = upTo;
          offsets.push(rows.length);
        }
        const entered = rows.map((row, at) => ({ row, at })).filter(({ row }) => !routed || enters(row));
        const countsOf = (list: readonly number[]) =>
          Int32Array.from(offsets, (end) => list.filter((at) => at < end).length);
        const feeds: Record<string, Int32Array | Float32Array> = {
          ids: Int32Array.from(rows, (row) => golden.ids[row]),
          positions: Int32Array.from(rows, (row) => positions[row]),
          offsets: Int32Array.from(offsets),
        };
        const dims: Record<string, number> = { rows: rows.length };
        if (routed) {
          feeds.entered = Int32Array.from(entered, ({ at }) => at);
          feeds['entered.offsets'] = countsOf(entered.map(({ at }) => at));
          dims.entered = entered.length;
        }
        for (let e = 0; e < count; e++) {
          const chose = entered.map((r, index) => ({ ...r, index })).filter(({ row }) => chooses(row, e));
          feeds[`expert${e}`] = Int32Array.from(chose, ({ index }) => index);
          feeds[`expert${e}.offsets`] = countsOf(chose.map(({ at }) => at));
          feeds[`gate${e}`] = Float32Array.from(chose, ({ row }) => factor(row, e));
          dims[`expert${e}`] = chose.length;
          if (gates[e]) feeds[gates[e]] = Float32Array.from(chose, ({ row }) => token(row));
        }
        if (gates.includes('token')) feeds.token = Float32Array.from(entered, ({ row }) => token(row));
        const { outputs, counters } = await compiled.run({ dims, feeds });
        const want = rows.flatMap((row) => [...wanted.subarray(row * hidden, (row + 1) * hidden)]);
        expect(largestDifference(outputs.y, want), `cached ${cached}`).toBeLessThan(2e-5);
        const chosen = rows
          .filter((row) => !routed || enters(row))
          .map((row) => {
            return Array.from({ length: count }, (_, e) => e).filter((e) => chooses(row, e)).length;
          });
        expect(counters[`L0.attn/${count}`].rows).toBe(chosen.reduce((a, b) => a + b, 0));
        if (!cached && !routed && keys === 'all') {
          // Keys and values of all rows, and a part of the rest for every row and expert.
          const lengths = ends.slice(1).map((end, s) => end - ends[s]);
          const kv = keyValueFlops(spec, n);
          expect(counters['L0.attn'].flops).toBe(kv);
          expect(counters[`L0.attn/${count}`].flops).toBeLessThan(attentionFlops(layerOf(spec, 0), lengths) - kv);
        }
      }
      compiled.dispose();
      for (const tensor of tensors) tensor.dispose();
    }
  });
});
