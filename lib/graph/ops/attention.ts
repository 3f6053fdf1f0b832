// Attention inside packed segments, and attention that appends to a key/value cache; all rows are queries, or some.
import { InvalidArgumentError } from '../../native/errors.js';
import { formatShape } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';
import type { Routed } from './routing.js';

const attentionOp = defineOp(
  'attention',
  'q:f32[R,Q] k:f32[N,C] v:f32[N,C] offsets:i32[O] rows?:i32[R] row_offsets?:i32[O] -> y:f32[R,Q] lse?:f32[R,H]',
  ['heads', 'kv_heads', 'causal', 'scale'],
  {
    gradient({ inputs: [q, k, v, offsets, rows, rowOffsets], outputs: [y, lse], attrs, dy, add }) {
      const [dq, dk, dv] = attentionGradOp.apply([dy, q, k, v, y, lse, offsets, rows, rowOffsets], attrs);
      add(0, dq!);
      add(1, dk!);
      add(2, dv!);
    },
  },
);

const attentionGradOp = defineOp(
  'attention_grad',
  'dy:f32[R,Q] q:f32[R,Q] k:f32[N,C] v:f32[N,C] y:f32[R,Q] lse:f32[R,H] offsets:i32[O] rows?:i32[R] ' +
    'row_offsets?:i32[O] -> dq:f32[R,Q] dk:f32[N,C] dv:f32[N,C]',
  ['heads', 'kv_heads', 'causal', 'scale'],
);

export interface HeadOptions {
  heads: number;
  kvHeads: number;
  /** Factor of the scores before the softmax. */
  scale: number;
  /** The rows of k and v that are queries; row i of q stands at `selected.rows[i]`. Default: all of them. */
  selected?: Routed;
}

export interface AttentionOptions extends HeadOptions {
  causal: boolean;
}

/**
 * Softmax attention of every query over the rows of its own segment (causal: up to the row it stands at): q f32
 * [R, heads * dh], k and v f32 [N, kvHeads * dh], offsets i32 [segments + 1] of the N rows. R is N unless `selected`
 * says which rows are queries. What a query gets does not depend on the others, to the bit. Returns f32 of q's shape.
 *
 * @throws InvalidArgumentError when shapes and heads do not fit; InvalidData at run when a selected row lies outside
 * its segment.
 */
export function attention(q: Node, k: Node, v: Node, offsets: Node, options: AttentionOptions): Node {
  const { heads, kvHeads, causal, scale } = options;
  const [rows, rowOffsets] = checkOptions('attention', q, k, options);
  const inputs = [q, k, v, offsets, rows, rowOffsets];
  return attentionOp.apply(inputs, [heads, kvHeads, causal ? 1 : 0, scale], { bind: { H: heads } })[0]!;
}

const attentionCachedOp = defineOp(
  'attention_cached',
  'q:f32[R,Q] k:f32[N,C] v:f32[N,C] offsets:i32[O] lengths!:i32[S] cache_k!:f32[S,T,C] cache_v!:f32[S,T,C] ' +
    'rows?:i32[R] row_offsets?:i32[O] -> y:f32[R,Q]',
  ['heads', 'kv_heads', 'scale'],
);

/**
 * Appends k and v to the cache of every segment, attends causally to all that is cached, and advances `lengths`: q f32
 * [R, heads * dh], k and v f32 [N, kvHeads * dh], offsets i32 [S + 1] of the N rows, state lengths i32 [S] and caches
 * f32 [S, T, kvHeads * dh]. R is N unless `selected` says which new rows are queries; all N are cached. Returns f32 of
 * q's shape.
 *
 * @throws InvalidArgumentError when shapes and heads do not fit; InvalidData at run when a cache is full or a selected
 * row lies outside its segment, before anything is written.
 */
export function attentionCached(
  q: Node,
  k: Node,
  v: Node,
  offsets: Node,
  lengths: Node,
  cacheK: Node,
  cacheV: Node,
  options: HeadOptions,
): Node {
  const { heads, kvHeads, scale } = options;
  const [rows, rowOffsets] = checkOptions('attention_cached', q, k, options);
  const inputs = [q, k, v, offsets, lengths, cacheK, cacheV, rows, rowOffsets];
  return attentionCachedOp.apply(inputs, [heads, kvHeads, scale])[0]!;
}

/** Returns the operands rows and row_offsets. */
function checkOptions(op: string, q: Node, k: Node, { heads, kvHeads, selected }: HeadOptions): (Node | null)[] {
  const [qWidth, kWidth] = [q.shape[1], k.shape[1]];
  const ok =
    typeof qWidth === 'number' &&
    typeof kWidth === 'number' &&
    heads > 0 &&
    kvHeads > 0 &&
    heads % kvHeads === 0 &&
    qWidth % heads === 0 &&
    qWidth * kvHeads === kWidth * heads;
  if (!ok) {
    throw new InvalidArgumentError(
      `[${op}] ${heads} heads and ${kvHeads} kv heads do not fit q:${formatShape(q.shape)} k:${formatShape(k.shape)}`,
    );
  }
  if (!selected && q.shape[0] !== k.shape[0]) {
    throw new InvalidArgumentError(
      `[${op}] q and k must have the same rows unless some are selected, got q:${formatShape(q.shape)} ` +
        `k:${formatShape(k.shape)}`,
    );
  }
  return [selected?.rows ?? null, selected?.offsets ?? null];
}
