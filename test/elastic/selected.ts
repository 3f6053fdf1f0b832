// Runs a golden checkpoint's decoder over packed segments, with routers and a selector.
import type { ElasticPolicy } from '../../lib/elastic/policy.js';
import { routerPlaces } from '../../lib/elastic/policy.js';
import { routerNodes } from '../../lib/elastic/rows.js';
import { Graph, Program } from '../../lib/graph/index.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { decoder, logits } from '../../lib/model/decoder.js';
import type { Selector } from '../../lib/model/select.js';
import { bindWeights, loadWeights } from '../../lib/model/weights.js';
import { type Engine, Tensor, type TypedArray } from '../../lib/native/index.js';
import { readSpec } from '../model/golden.js';

export type Select = (graph: Graph, routers: ReturnType<typeof routerNodes>) => Selector;

export interface Segments {
  ids: ArrayLike<number>;
  positions: ArrayLike<number>;
  offsets: ArrayLike<number>;
}

/**
 * Outputs, `logits` among them, and counters.
 *
 * @param router weight [outputs, hidden] and bias [outputs] of the router `id`, which is number `index`
 */
export async function runSelected(
  engine: Engine,
  directory: string,
  policy: ElasticPolicy,
  router: (id: string, index: number) => { weight: TypedArray; bias: TypedArray },
  { ids, positions, offsets }: Segments,
  select: Select,
  feeds: Record<string, TypedArray> = {},
) {
  const spec = readSpec(directory);
  using checkpoint = Checkpoint.open(directory);
  using loaded = loadWeights(spec, checkpoint);
  const tensors = new Map(
    routerPlaces(policy).map(({ id, outputs }, index) => {
      const { weight, bias } = router(id, index);
      return [
        id,
        {
          weight: Tensor.fromData('f32', [outputs, spec.hidden], weight),
          bias: Tensor.fromData('f32', [outputs], bias),
        },
      ];
    }),
  );
  const graph = new Graph();
  const weights = bindWeights(graph, loaded.weights);
  const inputs = {
    ids: graph.feed('ids', 'i32', [ids.length]),
    positions: graph.feed('positions', 'i32', [ids.length]),
    offsets: graph.feed('offsets', 'i32', [offsets.length]),
  };
  const selector = select(graph, routerNodes(graph, tensors));
  graph.output('logits', logits(graph, spec, weights, decoder(graph, spec, weights, inputs, selector)));
  using program = Program.compile(graph, engine);
  const batch = { ids: Int32Array.from(ids), positions: Int32Array.from(positions), offsets: Int32Array.from(offsets) };
  const result = await program.run({ feeds: { ...batch, ...feeds } });
  for (const { weight, bias } of tensors.values()) {
    weight.dispose();
    bias.dispose();
  }
  return result;
}
