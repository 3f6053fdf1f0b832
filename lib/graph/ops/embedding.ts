// Embedding tables.
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';

const embeddingOp = defineOp('embedding', 'table:w[V,D] ids:i32[R] -> y:f32[R,D]', [], {
  gradient({ inputs: [table, ids], dy, needs, add }) {
    if (needs(0)) add(0, embeddingGradOp.apply([dy, ids], [], { bind: { V: table!.shape[0] } })[0]!);
  },
});

const embeddingGradOp = defineOp('embedding_grad', 'dy:f32[R,D] ids:i32[R] -> dtable:f32[V,D]');

/** `y[r] = table[ids[r]]`: table [V, D], ids i32 [R] below V. Returns f32 [R, D]. */
export function embedding(table: Node, ids: Node): Node {
  return embeddingOp.apply([table, ids])[0]!;
}
