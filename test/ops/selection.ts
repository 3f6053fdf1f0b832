// Attention of which some rows are queries: which rows those are, and a case beside attention of all rows.
import {
  type AttentionOptions,
  activation,
  attention,
  gatherRows,
  gradients,
  type Node,
  routeThreshold,
  scatterAdd,
} from '../../lib/graph/index.js';
import { type Case, inputs, offsetsOf } from './harness.js';

/** Whether row i of a segment is a query. */
export type Pick = (i: number, segment: number) => boolean;

export const picks: Record<string, Pick> = {
  'every third row': (i) => i % 3 === 1,
  'most rows': (i) => i % 5 !== 0,
  'every row': () => true,
  'one segment': (_, segment) => segment === 0,
  'no row': () => false,
};

/** Scores of the rows, and the threshold of every segment that those picked pass. */
export function scored(lengths: readonly number[], pick: Pick): { z: number[]; threshold: number[] } {
  const z = lengths.flatMap((length, s) => Array.from({ length }, (_, i) => (pick(i, s) ? 1 : -1)));
  return { z, threshold: lengths.map(() => 0) };
}

/** What may be stored like the activations between ops, as feeds, outputs and the residual stream may not. */
export const stored = (node: Node): Node => activation(node, 'none');

/** Attention of all rows and of every third, with the gradients of both. */
export function withSelection(
  name: string,
  lengths: readonly number[],
  dh: number,
  options: Omit<AttentionOptions, 'selected'>,
): Case {
  const { heads, kvHeads } = options;
  const n = lengths.reduce((a, b) => a + b, 0);
  const make = inputs(dh);
  const { z, threshold } = scored(lengths, picks['every third row']);
  return {
    name,
    inputs: {
      q: make.f32(['N', n], heads * dh),
      k: make.f32(['N', n], kvHeads * dh),
      v: make.f32(['N', n], kvHeads * dh),
      offsets: make.i32(offsetsOf(lengths), ['O', lengths.length + 1]),
      z: make.values(z, ['N', n], 1),
      threshold: make.values(threshold, ['S', lengths.length]),
    },
    build: ({ q, k, v, offsets, z, threshold }) => {
      const selected = routeThreshold(z, offsets, threshold);
      const some = attention(gatherRows(q, selected.rows), k, v, offsets, { ...options, selected });
      const [y, dy] = [attention(q, k, v, offsets, options), stored(scatterAdd(stored(q), some, selected.rows))];
      const [dq, dk, dv] = gradients(y, [q, k, v], { seed: dy });
      const [dqSome, dkSome, dvSome] = gradients(some, [q, k, v], { seed: gatherRows(q, selected.rows) });
      return { y, some, dq, dk, dv, dqSome, dkSome, dvSome };
    },
    narrowTolerance: 0.008,
  };
}
