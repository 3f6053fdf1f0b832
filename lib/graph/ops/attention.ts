// Attention inside packed segments, and over a key/value cache and what is appended to it; all rows are queries, or some.
import { InvalidArgumentError } from '../../native/errors.js';
import { formatShape, type Size } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';
import type { Routed } from './routing.js';

const attentionOp = defineOp(
  'attention',
  'q:f32[R,Q] k:f32[N,C] v:f32[N,C] offsets:i32[O] rows?:i32[R] row_offsets?:i32[O] bias?:f32[H,E] -> y:f32[R,Q] ' +
    'lse?:f32[R,H]',
  ['heads', 'kv_heads', 'causal', 'scale', 'window', 'softcap'],
  {
    gradient({ inputs: [q, k, v, offsets, rows, rowOffsets, bias], outputs: [y, lse], attrs, dy, add }) {
      const [dq, dk, dv] = attentionGradOp.apply([dy, q, k, v, y, lse, offsets, rows, rowOffsets, bias], attrs);
      add(0, dq!);
      add(1, dk!);
      add(2, dv!);
    },
  },
);

const attentionGradOp = defineOp(
  'attention_grad',
  'dy:f32[R,Q] q:f32[R,Q] k:f32[N,C] v:f32[N,C] y:f32[R,Q] lse:f32[R,H] offsets:i32[O] rows?:i32[R] ' +
    'row_offsets?:i32[O] bias?:f32[H,E] -> dq:f32[R,Q] dk:f32[N,C] dv:f32[N,C]',
  ['heads', 'kv_heads', 'causal', 'scale', 'window', 'softcap'],
);

export interface HeadOptions {
  heads: number;
  kvHeads: number;
  /** Factor of the scores before the softmax. */
  scale: number;
  /** Keys that a query sees at most, the last ones up to the row it stands at; 0, the default: all of them. Causal. */
  window?: number;
  /** c > 0: scores s become c tanh(s / c). Default 0: they do not. */
  softcap?: number;
  /**
   * Added to scaled scores by the distance from a query's row to a key's, f32 [heads, 2 m + 1]: distance d, at most m and at least
   * -m, has column m + d. Not with `softcap`; it gets no gradient (T5, arXiv 1910.10683, section 2.1).
   */
  bias?: Node;
  /** The rows of k and v that are queries; row i of q stands at `selected.rows[i]`. Default: all of them. */
  selected?: Routed;
}

export interface AttentionOptions extends HeadOptions {
  causal: boolean;
  /**
   * Cross-attention: the rows of q are of other sequences, i32 [segments + 1] of them, and see all keys of the segment of the
   * same number. Not causal.
   */
  queries?: Node;
}

/**
 * Softmax attention of every query over the rows of its own segment (causal: up to the row it stands at): q f32
 * [R, heads * dh], k and v f32 [N, kvHeads * dh], offsets i32 [segments + 1] of the N rows. R is N unless `selected`
 * says which rows are queries, or `queries` how many of other sequences. What a query gets does not depend on the others, to the
 * bit. Returns f32 of q's shape.
 *
 * @throws InvalidArgumentError when shapes and heads do not fit; InvalidData at run when a selected row lies outside
 * its segment, or a segment has queries of another sequence and no keys.
 */
export function attention(q: Node, k: Node, v: Node, offsets: Node, options: AttentionOptions): Node {
  const { heads, kvHeads, causal, scale, window = 0, softcap = 0 } = options;
  if (options.queries && (causal || options.selected || options.bias)) {
    throw new InvalidArgumentError(
      '[attention] queries of other sequences must see all keys, and have no place among them: neither causal nor selected nor with a bias',
    );
  }
  const [rows, selected] = checkOptions('attention', q, k.shape[1], options, options.queries ? undefined : k);
  const rowOffsets = options.queries ?? selected;
  const inputs = [q, k, v, offsets, rows, rowOffsets, options.bias ?? null];
  const attributes = [heads, kvHeads, causal ? 1 : 0, scale, window, softcap];
  return attentionOp.apply(inputs, attributes, { bind: { H: heads } })[0]!;
}

const cacheAppendOp = defineOp(
  'cache_append',
  'k:f32[N,C] v:f32[N,C] offsets:i32[O] slots:i32[S] lengths!:i32[Z] pages:i32[Z,B] pool_k!:f32[P,T,C] ' +
    'pool_v!:f32[P,T,C] ->',
);

/**
 * Keys and values of sequences in Z slots, in pages of T rows: row t of slot z is row t % T of page `pages[z, t / T]` of the
 * pools. All but `slots` are state. Any number of caches may share pools; no two slots append to one page.
 */
export interface Cache {
  /** The pool of keys, f32 [P, T, C]. */
  readonly k: Node;
  /** That of values, likewise. */
  readonly v: Node;
  /** Rows held in every slot, i32 [Z]. */
  readonly lengths: Node;
  /** Pages of every slot in the order of rows, i32 [Z, B]. What lies behind the rows held may be anything, -1 say. */
  readonly pages: Node;
  /** The slot of every segment of a run, i32 [S], each another. */
  readonly slots: Node;
}

/**
 * Appends k and v, f32 [N, C], to the slot of every segment and counts them in its lengths: offsets i32 [S + 1] of the N
 * rows.
 *
 * @throws InvalidData at run, before anything is written, when slots are not as they must be, a slot would hold more than
 * B T rows, or a new row has no page of the pools.
 */
export function cacheAppend(k: Node, v: Node, offsets: Node, cache: Cache): void {
  cacheAppendOp.apply([k, v, offsets, cache.slots, cache.lengths, cache.pages, cache.k, cache.v]);
}

const attentionCachedOp = defineOp(
  'attention_cached',
  'q:f32[R,Q] offsets:i32[O] slots:i32[S] lengths:i32[Z] pages:i32[Z,B] pool_k:f32[P,T,C] pool_v:f32[P,T,C] ' +
    'rows?:i32[R] row_offsets?:i32[O] bias?:f32[H,E] -> y:f32[R,Q]',
  ['heads', 'kv_heads', 'scale', 'window', 'softcap'],
);

/**
 * Causal attention over caches: q f32 [R, heads * dh], pools of C = kvHeads * dh; the last rows of the segments' slots are the
 * N new ones, offsets i32 [S + 1] of those. R is N unless `selected` says which new rows are queries. What a query gets
 * does not depend on the others nor on pages and their size, to the bit. Returns f32 of q's shape.
 *
 * @throws InvalidArgumentError when shapes and heads do not fit; InvalidData at run when slots are not as they must be, one
 * holds fewer rows than are new, a row that it holds has no page of the pools, or a selected row lies outside its segment.
 */
export function attentionCached(q: Node, offsets: Node, cache: Cache, options: HeadOptions): Node {
  const { heads, kvHeads, scale, window = 0, softcap = 0 } = options;
  const [rows, rowOffsets] = checkOptions('attention_cached', q, cache.k.shape[2], options);
  const inputs = [
    q,
    offsets,
    cache.slots,
    cache.lengths,
    cache.pages,
    cache.k,
    cache.v,
    rows,
    rowOffsets,
    options.bias ?? null,
  ];
  return attentionCachedOp.apply(inputs, [heads, kvHeads, scale, window, softcap])[0]!;
}

const pageCopyOp = defineOp('page_copy', 'from:i32[M] to:i32[M] pool_k!:f32[P,T,C] pool_v!:f32[P,T,C] ->');

/**
 * Copies pages `from`, i32 [M], of the pools to pages `to`, i32 [M]: a sequence that shares a page that is not full needs one
 * of its own to append to.
 *
 * @throws InvalidData at run, before anything is written, when a page is not of the pools, or one is copied to that is
 * copied to once more or from.
 */
export function pageCopy(from: Node, to: Node, { k, v }: Pick<Cache, 'k' | 'v'>): void {
  pageCopyOp.apply([from, to, k, v]);
}

/** Returns the operands rows and row_offsets. `k`: keys that must be as many as queries unless some are selected. */
function checkOptions(
  op: string,
  q: Node,
  kWidth: Size,
  { heads, kvHeads, selected, bias, softcap = 0 }: HeadOptions,
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
  const columns = bias?.shape[1];
  if (bias && (bias.shape[0] !== heads || typeof columns !== 'number' || columns % 2 !== 1 || softcap > 0)) {
    throw new InvalidArgumentError(
      `[${op}] a bias must be [${heads}, an odd number] and without a softcap, got ${formatShape(bias.shape)}`,
    );
  }
  return [selected?.rows ?? null, selected?.offsets ?? null];
}
