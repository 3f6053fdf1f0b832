// Attention inside packed segments, and over a key/value cache and what is appended to it; all rows are queries, or some.
import { InvalidArgumentError } from '../../native/errors.js';
import { formatShape, type Size } from '../dims.js';
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
  const [rows, rowOffsets] = checkOptions('attention', q, k.shape[1], options, k);
  const inputs = [q, k, v, offsets, rows, rowOffsets];
  return attentionOp.apply(inputs, [heads, kvHeads, causal ? 1 : 0, scale], { bind: { H: heads } })[0]!;
}

const cacheAppendOp = defineOp(
  'cache_append',
  'k:f32[N,C] v:f32[N,C] offsets:i32[O] lengths!:i32[S] cache_k!:f32[S,T,C] cache_v!:f32[S,T,C] ->',
);

/** Keys and values of S segments; all are state. */
export interface Cache {
  /** f32 [S, T, C] */
  readonly k: Node;
  readonly v: Node;
  /** Rows cached of every segment, i32 [S]. */
  readonly lengths: Node;
}

/**
 * Appends k and v, f32 [N, C], to the cache of every segment and counts them in its lengths: offsets i32 [S + 1] of the N
 * rows.
 *
 * @throws InvalidData at run when a cache would overflow, before anything is written.
 */
export function cacheAppend(k: Node, v: Node, offsets: Node, cache: Cache): void {
  cacheAppendOp.apply([k, v, offsets, cache.lengths, cache.k, cache.v]);
}

const attentionCachedOp = defineOp(
  'attention_cached',
  'q:f32[R,Q] offsets:i32[O] lengths:i32[S] cache_k:f32[S,T,C] cache_v:f32[S,T,C] rows?:i32[R] row_offsets?:i32[O] ' +
    '-> y:f32[R,Q]',
  ['heads', 'kv_heads', 'scale'],
);

/**
 * Causal attention over caches: q f32 [R, heads * dh], caches of C = kvHeads * dh, whose last rows are the N new ones,
 * offsets i32 [S + 1] of those. R is N unless `selected` says which new rows are queries. Returns f32 of q's shape.
 *
 * @throws InvalidArgumentError when shapes and heads do not fit; InvalidData at run when a cache holds fewer rows than
 * are new or a selected row lies outside its segment.
 */
export function attentionCached(q: Node, offsets: Node, cache: Cache, options: HeadOptions): Node {
  const { heads, kvHeads, scale } = options;
  const [rows, rowOffsets] = checkOptions('attention_cached', q, cache.k.shape[2], options);
  const inputs = [q, offsets, cache.lengths, cache.k, cache.v, rows, rowOffsets];
  return attentionCachedOp.apply(inputs, [heads, kvHeads, scale])[0]!;
}

/** Returns the operands rows and row_offsets. `k`: keys that must be as many as queries unless some are selected. */
function checkOptions(
  op: string,
  q: Node,
  kWidth: Size,
  { heads, kvHeads, selected }: HeadOptions,
  k?: Node,
): (Node | null)[] {
  const qWidth = q.shape[1];
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
      `[${op}] ${heads} heads and ${kvHeads} kv heads do not fit q:${formatShape(q.shape)} and keys of ${formatShape([kWidth])}`,
    );
  }
  if (k && !selected && q.shape[0] !== k.shape[0]) {
    throw new InvalidArgumentError(
      `[${op}] q and k must have the same rows unless some are selected, got q:${formatShape(q.shape)} ` +
        `k:${formatShape(k.shape)}`,
    );
  }
  return [selected?.rows ?? null, selected?.offsets ?? null];
}
