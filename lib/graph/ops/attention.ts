// Attention inside packed segments, and attention that appends to a key/value cache.
import { InvalidArgumentError } from '../../native/errors.js';
import { formatShape } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';

const attentionOp = defineOp(
  'attention',
  'q:f32[R,Q] k:f32[R,C] v:f32[R,C] offsets:i32[O] -> y:f32[R,Q] lse?:f32[R,H]',
  ['heads', 'kv_heads', 'causal', 'scale'],
  {
    gradient({ inputs: [q, k, v, offsets], outputs: [y, lse], attrs, dy, add }) {
      const [dq, dk, dv] = attentionGradOp.apply([dy, q, k, v, y, lse, offsets], attrs);
      add(0, dq!);
      add(1, dk!);
      add(2, dv!);
    },
  },
);

const attentionGradOp = defineOp(
  'attention_grad',
  'dy:f32[R,Q] q:f32[R,Q] k:f32[R,C] v:f32[R,C] y:f32[R,Q] lse:f32[R,H] offsets:i32[O] -> dq:f32[R,Q] ' +
    'dk:f32[R,C] dv:f32[R,C]',
  ['heads', 'kv_heads', 'causal', 'scale'],
);

export interface HeadOptions {
  heads: number;
  kvHeads: number;
  /** Factor of the scores before the softmax. */
  scale: number;
}

export interface AttentionOptions extends HeadOptions {
  causal: boolean;
}

/**
 * Softmax attention of every row over the rows of its own segment: q f32 [R, heads * dh], k and v f32
 * [R, kvHeads * dh], offsets i32 [segments + 1]. Returns f32 of q's shape.
 */
export function attention(q: Node, k: Node, v: Node, offsets: Node, options: AttentionOptions): Node {
  const { heads, kvHeads, causal, scale } = options;
  checkHeads('attention', q, k, options);
  return attentionOp.apply([q, k, v, offsets], [heads, kvHeads, causal ? 1 : 0, scale], { bind: { H: heads } })[0]!;
}

const attentionCachedOp = defineOp(
  'attention_cached',
  'q:f32[R,Q] k:f32[R,C] v:f32[R,C] offsets:i32[O] lengths!:i32[S] cache_k!:f32[S,T,C] cache_v!:f32[S,T,C] -> ' +
    'y:f32[R,Q]',
  ['heads', 'kv_heads', 'scale'],
);

/**
 * Appends k and v to the cache of every segment, attends causally to all that is cached, and advances `lengths`: q f32
 * [R, heads * dh], k and v f32 [R, kvHeads * dh], offsets i32 [S + 1], state lengths i32 [S] and caches f32
 * [S, T, kvHeads * dh]. Returns f32 of q's shape.
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
  checkHeads('attention_cached', q, k, options);
  return attentionCachedOp.apply([q, k, v, offsets, lengths, cacheK, cacheV], [heads, kvHeads, scale])[0]!;
}

function checkHeads(op: string, q: Node, k: Node, { heads, kvHeads }: HeadOptions): void {
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
}
