// The units of an encoder-decoder model's feed-forwards in order of importance, measured on pairs, for its nested feed-forwards.
import { writePermuted } from '../../elastic/elastify.js';
import type { UnitScores } from '../../elastic/nested.js';
import { crossEntropy, Graph, gatedActivation, gradients, type Node, Program, sumRows } from '../../graph/index.js';
import { type Stack, stacks } from '../../model/parts.js';
import { decodeTarget, encodeSource, unitsPerLayer } from '../../model/seq2seq.js';
import type { Seq2SeqSpec } from '../../model/seq2seq_spec.js';
import { bindSeq2Seq, type Seq2SeqTensors, seq2seqSlots } from '../../model/seq2seq_weights.js';
import { storedUnits } from '../../model/weights.js';
import type { Engine } from '../../native/index.js';
import { firstBatches } from '../batches.js';
import type { TrainConfig } from '../events.js';
import { contributions, orderOf } from '../rank.js';
import { type FrozenHead, frozenHead, headInput, pairInputs, pairRun } from './model.js';
import type { PairData } from './pairs.js';

/** Tokens of both sides that units are ranked on, at least, where the data has so many. */
const rankedTokens = 8192;

/**
 * Writes the model of a directory with the units of its feed-forwards in order of importance on some pairs to `out`: the same function, the
 * scores as `elastify` has them.
 *
 * @param weights of the model
 * @throws InvalidDataError when the model computes NaN.
 */
export async function writeOrdered(
  from: string,
  out: string,
  { spec, weights, scores, data, engine, batchTokens, onEvent }: RankedModel,
): Promise<void> {
  using head = frozenHead(weights.head);
  using program = squaresProgram(spec, weights, engine, scores, batchTokens, head);
  const sums = new Map<string, Float64Array>();
  const batches = firstBatches(data, batchTokens, rankedTokens, 0);
  for (const [done, batch] of batches.entries()) {
    await onEvent?.({ type: 'measure', what: 'importance', done, total: batches.length });
    const { outputs } = await program.run(pairRun(batch, 1));
    for (const [part, squares] of Object.entries(outputs)) {
      const sum = sums.get(part) ?? new Float64Array(squares.length);
      sums.set(
        part,
        sum.map((before, unit) => before + squares[unit]),
      );
    }
  }
  const orders = new Map<string, Uint32Array>();
  for (const stack of stacks) {
    for (let layer = 0; layer < spec[stack].layers; layer++) {
      const part = `${stack}.layers.${layer}`;
      const squares = sums.get(part)!;
      const importance = scores === 'taylor' ? squares : contributions(squares, weights[stack], layer);
      orders.set(part, orderOf('modular', from, part, importance));
    }
  }
  const units = storedUnits(spec.decoder, seq2seqSlots(spec, false));
  await writePermuted(from, out, units, ({ part }) => orders.get(part));
}

interface RankedModel extends Pick<TrainConfig, 'onEvent'> {
  readonly spec: Seq2SeqSpec;
  readonly weights: Seq2SeqTensors;
  readonly scores: UnitScores;
  readonly data: PairData;
  readonly engine: Engine;
  readonly batchTokens: number;
}

/** Sums of squares over rows, of units or of units times their gradient, f32 [ffn] each: outputs `encoder.layers.0`, ... */
function squaresProgram(
  spec: Seq2SeqSpec,
  tensors: Seq2SeqTensors,
  engine: Engine,
  scores: UnitScores,
  batchTokens: number,
  head: FrozenHead,
): Program {
  const graph = new Graph();
  const weights = bindSeq2Seq(graph, tensors);
  const { source, target, targets, weight } = pairInputs(graph, batchTokens);
  const read: Record<Stack, Node[]> = { encoder: [], decoder: [] };
  const features = encodeSource(graph, spec, weights, source, { units: read.encoder });
  const attended = { features, offsets: source.offsets };
  const x = decodeTarget(graph, spec, weights, target, attended, { units: read.decoder });
  const own = stacks.flatMap((stack) =>
    read[stack]
      // Of what a layer's last products read the feed-forward's is the last.
      .filter((_, i) => i % unitsPerLayer[stack] === unitsPerLayer[stack] - 1)
      .map((units, layer) => ({ part: `${stack}.layers.${layer}`, units })),
  );
  let values = own.map(({ units }) => units);
  if (scores === 'taylor') {
    const matrix = head.matrix(graph, weights.head.weight);
    const { loss } = crossEntropy(headInput(spec, x, head.biased), matrix, targets, weight);
    values = gradients(loss, values).map((gradient, i) => gatedActivation(values[i], gradient, 'none'));
  }
  for (const [i, { part }] of own.entries()) graph.output(part, sumRows(gatedActivation(values[i], values[i], 'none')));
  return Program.compile(graph, engine);
}
