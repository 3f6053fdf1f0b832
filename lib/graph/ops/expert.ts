// Experts (attention heads, blocks of a feed-forward layer): by whose scores rows of a tile choose, which rows choose one, its
// gates, and the balance of loads.
import { InvalidArgumentError } from '../../native/errors.js';
import { boundOf } from '../dims.js';
import type { Node } from '../graph.js';
import { defineOp } from '../op.js';
import { type Routed, routed } from './routing.js';

/**
 * How a share becomes a number of experts: `top-k`, the `ceil(share * E)` with the largest scores; `mass`, those with the
 * largest scores until their softmax reaches the share (XMoE, arXiv 2403.18926). Ties go to the lowest index.
 */
export type ExpertRule = 'top-k' | 'mass';
export const expertRules: readonly ExpertRule[] = ['top-k', 'mass'];

/**
 * The value of a gate, w being the softmax of a row's E scores: `straight-through` 1, with the gradient of log w;
 * `softmax` E w; `renormalised` E w / (sum of w over the chosen).
 */
export type ExpertGate = 'straight-through' | 'softmax' | 'renormalised';
export const expertGates: readonly ExpertGate[] = ['straight-through', 'softmax', 'renormalised'];

/** What rows choose by: scores f32 [N, E], segments i32 [S + 1] of the N rows, share in [0, 1] of every segment f32 [S]. */
export interface ExpertScores {
  z: Node;
  offsets: Node;
  share: Node;
  rule: ExpertRule;
}

const operands = ({ z, offsets, share }: ExpertScores): [Node, ...Node[]] => [z, offsets, share];

function ruleCode(op: string, rule: ExpertRule): number {
  if (expertRules.includes(rule)) return expertRules.indexOf(rule);
  throw new InvalidArgumentError(`[${op}] rule must be one of ${expertRules.join(', ')}, got ${rule}`);
}

function checkExpert(op: string, { z }: ExpertScores, expert: number): void {
  const count = boundOf(z.shape[1]);
  if (Number.isInteger(expert) && expert >= 0 && expert < count) return;
  throw new InvalidArgumentError(`[${op}] expert must be an integer in [0, ${count}), got ${expert}`);
}

const tileScoresOp = defineOp(
  'tile_scores',
  'z:f32[N,E] positions:i32[N] offsets:i32[O] held?:f32[S,H] -> y:f32[N,E] next?:f32[S,H]',
  ['tile'],
  {
    constant: ['held'],
    gradient({ inputs: [, positions, offsets, held], attrs, dy, add }) {
      add(0, tileScoresGradOp.apply([dy, positions, offsets, held], attrs)[0]!);
    },
  },
);

const tileScoresGradOp = defineOp(
  'tile_scores_grad',
  'dy:f32[N,E] positions:i32[N] offsets:i32[O] held?:f32[S,H] -> dz:f32[N,E]',
  ['tile'],
);

/** Values of what `tileScores` holds of a segment: two decisions, each E scores and a position; the newest first. */
export const heldWidth = (experts: number): number => 2 * (experts + 1);

/** Scores by which rows of a tile choose together. */
export interface TileScores {
  /** f32 [N, E] */
  y: Node;
  /** The last two decisions of every segment after its rows, f32 [S, heldWidth(E)]; null where none are held. */
  next: Node | null;
}

/**
 * For every row the scores of the first one of its segment that is in the same tile: [0, tile), [tile, 2 tile), ... of its
 * positions. No row sees one that comes after it.
 *
 * @param z f32 [N, E]
 * @param positions i32 [N], ascending within a segment
 * @param offsets i32 [S + 1], segments of the N rows
 * @param held decisions of earlier runs, f32 [S, heldWidth(E)]: scores of a row and its position, negative or NaN where there
 *   is none. The newest, where it is of the same tile, holds instead. Errors of the run: InvalidData where z is NaN, where positions do
 *   not ascend, and of 2^24 and more.
 */
export function tileScores(
  z: Node,
  positions: Node,
  offsets: Node,
  tile: number,
  held: Node | null = null,
): TileScores {
  const alone = { without: ['next'], bind: { S: 0, H: 0 } };
  const [y, next] = tileScoresOp.apply([z, positions, offsets, held], [tile], held ? {} : alone);
  return { y: y!, next };
}

const expertRowsOp = defineOp(
  'expert_rows',
  'z:f32[N,E] offsets:i32[O] share:f32[S] -> rows:i32[+R] row_offsets:i32[O]',
  ['expert', 'rule'],
);

/** The rows that choose an expert. NaN in z is InvalidData. */
export function expertRows(scores: ExpertScores, expert: number): Routed {
  checkExpert('expert_rows', scores, expert);
  const attrs = [expert, ruleCode('expert_rows', scores.rule)];
  return routed(expertRowsOp, operands(scores), attrs);
}

const expertGateOp = defineOp(
  'expert_gate',
  'z:f32[N,E] offsets:i32[O] share:f32[S] rows:i32[R] -> g:f32[R]',
  ['expert', 'rule', 'mode'],
  {
    constant: ['share'],
    gradient({ inputs: [z, offsets, share, rows], attrs, dy, add }) {
      add(0, expertGateGradOp.apply([dy, z, offsets, share, rows], attrs)[0]!);
    },
  },
);

const expertGateGradOp = defineOp(
  'expert_gate_grad',
  'dg:f32[R] z:f32[N,E] offsets:i32[O] share:f32[S] rows:i32[R] -> dz:f32[N,E]',
  ['expert', 'rule', 'mode'],
);

/** Gates of an expert for `rows`, i32 [R], which chose it: f32 [R]. */
export function expertGate(scores: ExpertScores, expert: number, rows: Node, mode: ExpertGate): Node {
  checkExpert('expert_gate', scores, expert);
  if (!expertGates.includes(mode)) {
    throw new InvalidArgumentError(`[expert_gate] mode must be one of ${expertGates.join(', ')}, got ${mode}`);
  }
  const attrs = [expert, ruleCode('expert_gate', scores.rule), expertGates.indexOf(mode)];
  return expertGateOp.apply([...operands(scores), rows], attrs)[0]!;
}

const expertCreditOp = defineOp(
  'expert_credit',
  'h:f32[N,U] dh:f32[N,U] z:f32[R|N,E] offsets:i32[O] share:f32[S] weight:f32[N] rows?:i32[R] -> dz:f32[R|N,E]',
  ['rule'],
);

/**
 * Straight-through estimate of the gradient of scores through the choice of experts itself. The sum of `h dh` over an
 * expert's units is the first-order change of the loss when a row uses it; scaled to a mean magnitude of 1 per segment, it
 * is the slope with which a soft top-k, a sigmoid around the threshold between the experts a row uses and the others, moves
 * the row's scores: what one expert gains the others lose. Rows that use none or all of their experts get zeros.
 *
 * @param h f32 [N, U], what the sub-layer's last product reads; its experts are equal parts of the U units.
 * @param dh f32 [N, U], gradient of the loss with respect to it.
 * @param scores of the rows that entered the sub-layer, z f32 [R, E]; of all N without `rows`.
 * @param weight f32 [N], factor of every row's gradient.
 * @param rows which rows entered, i32 [R].
 * @returns f32 [R, E]; no gradient flows through it.
 */
export function expertCredit(
  h: Node,
  dh: Node,
  { z, offsets, share, rule }: ExpertScores,
  weight: Node,
  rows: Node | null = null,
): Node {
  const inputs = [h, dh, z, offsets, share, weight, rows];
  return expertCreditOp.apply(inputs, [ruleCode('expert_credit', rule)])[0]!;
}

const expertBalanceOp = defineOp('expert_balance', 'z:f32[N,E] offsets:i32[O] share:f32[S] -> loss:f32[1]', ['rule'], {
  constant: ['share'],
  gradient({ inputs: [z, offsets, share], attrs, dy, add }) {
    add(0, expertBalanceGradOp.apply([dy, z, offsets, share], attrs)[0]!);
  },
});

const expertBalanceGradOp = defineOp(
  'expert_balance_grad',
  'dloss:f32[1] z:f32[N,E] offsets:i32[O] share:f32[S] -> dz:f32[N,E]',
  ['rule'],
);

/**
 * `E sum over e of f_e P_e - sum over e of f_e`, f_e being the share of rows that choose expert e, which is taken as
 * constant, and P_e the mean of its softmax: 0 when loads are equal (Switch Transformers, arXiv 2101.03961). f32 [1].
 */
export function expertBalance(scores: ExpertScores): Node {
  return expertBalanceOp.apply(operands(scores), [ruleCode('expert_balance', scores.rule)])[0]!;
}
