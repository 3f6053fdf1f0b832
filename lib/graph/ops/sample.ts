// Sampling of the next token.
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';

const sampleOp = defineOp('sample', 'logits:f32[S,V] params:f32[S,4] -> ids:i32[S] logprob:f32[S]');

/**
 * One token per row: logits f32 [S, V], params f32 [S, 4] = temperature (0: greedy), top-k (0: off), top-p (1: off),
 * a uniform number u in [0, 1). Rows that are alike mostly give the same id for the same u (docs/ops.md). Returns ids i32 [S] and their log-probability under the untempered softmax, f32 [S].
 */
export function sample(logits: Node, params: Node): { ids: Node; logprob: Node } {
  const [ids, logprob] = sampleOp.apply([logits, params]);
  return { ids: ids!, logprob: logprob! };
}
