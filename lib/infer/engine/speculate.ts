// Speculative decoding: a cheaper budget of the same weights drafts tokens on the common caches, the call's budget verifies
// them in one run (arXiv 2302.01318; with shared weights and caches, MatFormer, arXiv 2310.07707).
//
// A draft is accepted when it is the token that the call's budget samples at that place with that place's random number.
// So the text is the one that plain decoding gives, to the bit, greedy or sampled, whatever drafts and however many tokens:
// drafter-invariant speculative decoding (arXiv 2408.07978), which needs a sampler that lets two distributions that are
// alike choose alike (docs/ops.md, `sample`).

import { ofSequences } from '../../elastic/axes.js';
import { type Budget, budgetText, type OperatingPoint } from '../../elastic/budget.js';
import { routerPlaces } from '../../elastic/policy.js';
import { cachedKeys } from '../../elastic/rows.js';
import { InvalidArgumentError } from '../../native/errors.js';
import type { Network } from '../network.js';
import { checkNumber, checkOptions, positiveInteger } from '../options.js';
import { maxDraftTokens } from '../programs.js';
import type { SpeculativeOptions, SpeculativeReport } from '../types.js';
import { DraftLength } from './draft.js';
import type { SampledToken } from './scheduler.js';
import type { Generation } from './sequence.js';

/** A checked request. */
export interface Draft {
  readonly point: OperatingPoint;
  readonly tokens: number | 'auto';
  /** Which requests can learn from each other. */
  readonly key: string;
}

/**
 * @param resolve the operating point of a budget for this call
 * @throws InvalidArgumentError for unknown options and values out of range, a draft that is not cheaper than `point`, and
 * one whose caches cannot be those of `point`.
 */
export function checkSpeculative(
  network: Network,
  options: false | SpeculativeOptions | undefined,
  budget: Budget,
  point: OperatingPoint,
  resolve: (budget: Budget) => OperatingPoint,
): Draft | null {
  if (options === undefined || options === false) return null;
  checkOptions('generate', options, ['draft', 'tokens']);
  const { draft, tokens = 'auto' } = options;
  if (draft === undefined) {
    throw new InvalidArgumentError("[generate] speculative.draft must be a budget that costs less than the call's own");
  }
  if (tokens !== 'auto') {
    const inRange = (value: number) => positiveInteger(value) && value <= maxDraftTokens;
    checkNumber('generate', 'speculative.tokens', tokens, inRange, `'auto' or an integer from 1 to ${maxDraftTokens}`);
  }
  const drafting = withinKeys(network, point, resolve(draft));
  if (drafting.flopsRatio >= point.flopsRatio) {
    throw new InvalidArgumentError(
      `[generate] speculative.draft must cost less than the budget: ${budgetText(draft)} takes ${drafting.flopsRatio.toFixed(3)} of the full FLOPs, ${budgetText(budget)} ${point.flopsRatio.toFixed(3)}`,
    );
  }
  const conflict = cacheConflict(network, point, drafting);
  if (conflict) {
    throw new InvalidArgumentError(
      `[generate] speculative: ${budgetText(draft)} cannot draft for ${budgetText(budget)}: ${conflict}`,
    );
  }
  return { point: drafting, tokens, key: JSON.stringify([budget, draft]) };
}

/** The draft, whose sequences enter no attention that they skip at the budget: there are no keys to attend to. */
function withinKeys({ policy }: Network, point: OperatingPoint, draft: OperatingPoint): OperatingPoint {
  if (!policy || draft.full) return draft;
  const thresholds = new Map(draft.thresholds);
  for (const { id, axis, place } of routerPlaces(policy)) {
    const least = point.thresholds.get(id);
    if (ofSequences(axis) && place === 'attn' && least !== undefined)
      thresholds.set(id, Math.max(least, thresholds.get(id)!));
  }
  return { ...draft, thresholds };
}

/** Why the caches of a budget cannot be shared with a draft, or null. */
function cacheConflict({ spec, policy }: Network, point: OperatingPoint, draft: OperatingPoint): string | null {
  if (!policy) return null;
  const keysOf = ({ thresholds }: OperatingPoint, layer: number) => cachedKeys(policy, thresholds, layer, spec.kvHeads);
  for (let layer = 0; layer < spec.layers; layer++) {
    const [verified, drafted] = [keysOf(point, layer), keysOf(draft, layer)];
    if (verified && !verified.everyRowOrNone) {
      return `the budget keeps only keys that its routers chose in layer ${layer} (keys: 'selected'), and how many of rejected tokens those are is not known; take a budget that routes no keys there, as 'full'`;
    }
    if (!drafted) continue;
    if (!verified) return `the draft runs attention in layer ${layer}, where the budget has no keys`;
    if (drafted.parts !== verified.parts) {
      const cut = (parts: number) => (parts === 1 ? 'is not cut' : `is cut into ${parts} heads`);
      return `the cache of layer ${layer} ${cut(verified.parts)} at the budget and ${cut(drafted.parts)} in the draft; route heads in both or in neither`;
    }
  }
  return null;
}

/** Decodes several tokens at a time for one sequence. */
export class Speculation {
  readonly #generation: Generation;
  readonly #point: OperatingPoint;
  readonly #draft: Draft;
  readonly #endIds: ReadonlySet<number>;
  /** Null where the number of tokens is given. */
  readonly #length: DraftLength | null;
  #drafted = 0;
  #accepted = 0;
  #flops = 0;

  /** @param learnt what others with the same budgets learnt */
  constructor(
    generation: Generation,
    learnt: Map<string, DraftLength>,
    { point, draft, endIds }: { point: OperatingPoint; draft: Draft; endIds: ReadonlySet<number> },
  ) {
    this.#generation = generation;
    this.#point = point;
    this.#draft = draft;
    this.#endIds = endIds;
    this.#length = draft.tokens === 'auto' ? (learnt.get(draft.key) ?? new DraftLength()) : null;
    if (!this.#length) return;
    learnt.set(draft.key, this.#length);
    this.#length.begin();
  }

  /** What comes after `token`, which is not in the caches yet: one to `most` tokens. */
  async advance(token: number, most: number): Promise<SampledToken[]> {
    const wanted = this.#draft.tokens === 'auto' ? this.#length!.next() : this.#draft.tokens;
    const tokens = Math.min(wanted, most - 1, this.#generation.mostRows - 1);
    return tokens > 0 ? this.#cycle(token, tokens) : [await this.#plain(token)];
  }

  get report(): SpeculativeReport {
    const { level, spec } = this.#draft.point;
    return {
      drafted: this.#drafted,
      accepted: this.#accepted,
      acceptance: this.#drafted === 0 ? null : this.#accepted / this.#drafted,
      level,
      effective: spec,
      flops: this.#flops,
    };
  }

  async #plain(token: number): Promise<SampledToken> {
    const { coldRuns } = this.#generation;
    const started = performance.now();
    const next = await this.#generation.append(Int32Array.of(token), this.#point);
    if (this.#generation.coldRuns === coldRuns) this.#length?.plain(performance.now() - started);
    return next;
  }

  async #cycle(token: number, most: number): Promise<SampledToken[]> {
    const generation = this.#generation;
    const { coldRuns } = generation;
    const { flops } = generation.meter;
    // The rows of drafted tokens give way to those that the call's budget computes, and only what it confirms is kept.
    const rows = generation.length;
    let kept = rows;
    try {
      const started = performance.now();
      const ids = [token];
      while (ids.length <= most && !(ids.length > 1 && this.#endIds.has(ids.at(-1)!))) {
        ids.push((await generation.append(Int32Array.of(ids.at(-1)!), this.#draft.point)).token);
      }
      generation.truncate(rows);
      const drafted = ids.length - 1;
      this.#flops += generation.meter.flops - flops;
      const verifying = performance.now();
      const sampled = await generation.verify(Int32Array.from(ids), this.#point);
      const wrong = sampled.findIndex((next, i) => next.token !== ids[i + 1]);
      // After the last drafted token there is nothing to compare with.
      const accepted = wrong < 0 ? drafted : wrong;
      kept = rows + accepted + 1;
      const ended = performance.now();

      this.#drafted += drafted;
      this.#accepted += accepted;
      if (generation.coldRuns === coldRuns) {
        this.#length?.cycle({ drafted, accepted, draftMs: verifying - started, verifyMs: ended - verifying });
      }
      return sampled.slice(0, accepted + 1);
    } finally {
      generation.truncate(kept);
    }
  }
}
