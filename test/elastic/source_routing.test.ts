// Routing of the tokens of sources: an encoder whose sub-layers some tokens skip, against its dense sub-layers one by one, to the bit.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { routerNodes } from '../../lib/elastic/rows.js';
import {
  type SourceCapacities,
  savedSourceFlops,
  sourceCapacities,
  sourceCapacityFeeds,
  sourceSelector,
} from '../../lib/elastic/source_routing.js';
import { Graph, type Node, Program } from '../../lib/graph/index.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { attentionBlock, type BlockContext, feedForwardBlock, norm } from '../../lib/model/blocks.js';
import { sourceFlops } from '../../lib/model/flops.js';
import { type Place, selectEverything } from '../../lib/model/select.js';
import { encodeSource } from '../../lib/model/seq2seq.js';
import { withLayers } from '../../lib/model/seq2seq_spec.js';
import { assembled, bindSeq2Seq, loadSeq2SeqWeights } from '../../lib/model/seq2seq_weights.js';
import { Engine, Tensor } from '../../lib/native/index.js';
import { deepSeq2Seq, someRouting, specOf } from '../infer/modules.js';
import { positionsOf, readSeq2SeqCases } from '../model/golden.js';

let engine: Engine;
beforeAll(() => {
  engine = new Engine();
});
afterAll(() => engine.dispose());

const parts = ['0', '1', '2', '3'];
const none = { encoder: [], decoder: [] };
const cases: [string, SourceCapacities][] = [
  ['some tokens everywhere', sourceCapacities(4, { attn: 0.5, mlp: 0.3 })],
  ['all, some or none', { attn: [1, 0.4, 0, 0.7], mlp: [0.1, 0, 1, 0.5] }],
  ['attention alone', sourceCapacities(4, { attn: 0.25 })],
];

describe.each(['bart', 'mbart', 't5-gated'])('%s', (name) => {
  const { sources } = readSeq2SeqCases(name);

  it.each(cases)(
    '%s: a row that enters gets the bits of a dense run, one that does not stays',
    async (_, capacities) => {
      const dir = await deepSeq2Seq(name);
      const spec = specOf(dir);
      using checkpoint = Checkpoint.open(dir);
      using loaded = loadSeq2SeqWeights(spec, checkpoint);
      const { routers } = someRouting(spec, none);
      const tensors = new Map(
        [...routers].map(([id, { weight, bias }]) => [
          id,
          {
            weight: Tensor.fromData('f32', [1, weight.length], weight),
            bias: Tensor.fromData('f32', [1], bias),
            values: { weight, bias },
          },
        ]),
      );
      const encode = async (some: readonly (readonly number[])[], shares: readonly SourceCapacities[]) => {
        const offsets = Int32Array.from([0, ...some.map((_, s) => some.slice(0, s + 1).flat().length)]);
        const rows = offsets.at(-1)!;
        const graph = new Graph();
        const feed = (kind: string, size: number) => graph.feed(kind, 'i32', [size]);
        const inputs = {
          ids: feed('ids', rows),
          positions: feed('positions', rows),
          offsets: feed('offsets', some.length + 1),
        };
        const weights = assembled(
          bindSeq2Seq(graph, loaded.weights),
          { encoder: new Map(), decoder: new Map() },
          {
            encoder: parts,
            decoder: parts,
          },
        );
        const selector = sourceSelector(graph, parts, shares[0], routerNodes(graph, tensors), some.length);
        graph.output('features', encodeSource(graph, spec, weights, inputs, { selector }));
        using program = Program.compile(graph, engine);
        const feeds = { ids: Int32Array.from(some.flat()), positions: positionsOf([...offsets]), offsets };
        const { outputs, counters } = await program.run({ feeds: { ...feeds, ...sourceCapacityFeeds(shares) } });
        const flops = Object.values(counters).reduce((sum, counter) => sum + counter.flops, 0);
        return { features: outputs.features as Float32Array, flops };
      };

      /** Sub-layer by sub-layer: all rows go through it, and of those that are not chosen the result is dropped. */
      const oracle = async (source: readonly number[]): Promise<Float32Array> => {
        const { hidden } = spec.encoder;
        const rows = source.length;
        const offsets = Int32Array.of(0, rows);
        const positions = positionsOf([0, rows]);
        const one = async (
          build: (context: BlockContext, x: Node) => Record<string, Node>,
          values: Float32Array | null,
        ) => {
          const graph = new Graph();
          const { encoder, embed } = bindSeq2Seq(graph, loaded.weights);
          const of = (kind: string, size: number) => graph.feed(kind, 'i32', [size]);
          const [ids, inputs] = [of('ids', rows), { positions: of('positions', rows), offsets: of('offsets', 2) }];
          const context = {
            graph,
            spec: spec.encoder,
            ...inputs,
            selector: selectEverything,
            bias: encoder.bias,
            keys: new Map(),
          };
          const weights = { embed, encoder: { ...encoder, layers: [], finalNorm: undefined } } as never;
          const x = values
            ? graph.feed('x', 'f32', [rows, hidden])
            : encodeSource(graph, spec, weights, { ids, ...inputs });
          for (const [output, node] of Object.entries(build(context, x))) graph.output(output, node);
          using program = Program.compile(graph, engine);
          const feeds = { positions, offsets, ids: Int32Array.from(source), ...(values && { x: values }) };
          const { outputs } = await program.run({ feeds });
          return outputs as Record<string, Float32Array>;
        };
        const layerOf = (context: BlockContext, i: number) =>
          bindSeq2Seq(context.graph, loaded.weights).encoder.layers[i];
        const post = spec.encoder.normPlace === 'post';
        let { x } = await one((_, x) => ({ x }), null);
        for (const i of parts.keys()) {
          for (const place of ['attn', 'mlp'] as Place[]) {
            const share = capacities[place][i];
            const { dense, read = x } = await one((context, x) => {
              const layer = layerOf(context, i);
              const before = place === 'attn' ? layer.norm1 : layer.norm2;
              const block = place === 'attn' ? attentionBlock : feedForwardBlock;
              return { dense: block(context, i, x, layer), ...(!post && { read: norm(spec.encoder, x, before) }) };
            }, x);
            const { weight, bias } = tensors.get(`encoder.layers.${i}.${place}.token`)!.values;
            const scores = Array.from({ length: rows }, (_, r) =>
              weight.reduce((sum, w, d) => sum + w * read[r * hidden + d], bias[0]),
            );
            const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b);
            const chosen = new Set(order.slice(0, Math.ceil(share * rows - 1e-6)));
            x = x.map((value, at) => (chosen.has(Math.floor(at / hidden)) ? dense[at] : value));
            if (!post) continue;
            const after = place === 'attn' ? 'norm1' : 'norm2';
            ({ x } = await one((context, y) => ({ x: norm(spec.encoder, y, layerOf(context, i)[after]) }), x));
          }
        }
        if (!spec.finalNorm) return x;
        const { y } = await one((context, z) => {
          const { finalNorm } = bindSeq2Seq(context.graph, loaded.weights).encoder;
          return { y: norm(spec.encoder, z, finalNorm!) };
        }, x);
        return y;
      };

      const alone: Float32Array[] = [];
      for (const source of sources) {
        const { features, flops } = await encode([source], [capacities]);
        expect(features).toEqual(await oracle(source));
        const keys = sourceFlops(withLayers(spec, { encoder: 0, decoder: 6 }), source.length);
        const whole = sourceFlops(spec, source.length) - keys;
        expect(flops).toBe(whole - savedSourceFlops(spec.encoder, capacities, source.length));
        expect(flops).toBeLessThan(0.9 * whole);
        alone.push(features);
      }
      // In company, of sources with other shares, too, each has the bits that it has alone.
      const other = { attn: capacities.attn.map((c) => (c > 0 && c < 1 ? 0.9 : c)), mlp: capacities.mlp };
      const all = await encode([...sources, sources[0]], [...sources.map(() => capacities), other]);
      expect(all.features.subarray(0, alone.flatMap((one) => [...one]).length)).toEqual(
        Float32Array.from(alone.flatMap((one) => [...one])),
      );
      for (const { weight, bias } of tensors.values()) {
        weight.dispose();
        bias.dispose();
      }
    },
  );
});
