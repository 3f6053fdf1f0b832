// How many tokens to draft: what acceptance and the clock say, never losing more than a little time.

import { maxDraftTokens } from '../programs.js';

/** Time that may be lost, as a share of what plain decoding takes. */
const slack = 0.02;
/** Acceptance before anything was drafted, and the drafted tokens that this belief is worth. */
const priorAcceptance = 0.7;
const priorTokens = 2;
/** Drafted tokens that count in a new text. */
const rememberedTokens = 4;
/** What a cycle leaves of the weight of earlier ones. */
const decay = 0.95;
/** Weight of a new time in the mean of times. */
const freshness = 0.15;
/** Cycles between two plain steps, whose time the others are compared with. */
const refreshEvery = 32;

export interface Cycle {
  drafted: number;
  accepted: number;
  draftMs: number;
  verifyMs: number;
}

/**
 * Chooses the number of tokens to draft that gives the most tokens per time, by the times of plain steps, drafts and
 * verifications and the share of drafted tokens that was accepted. Time lost to cycles that gave less than plain steps is
 * a debt: a cycle is only risked when what it can lose at worst is saved, or is within `slack` of the time that plain
 * steps took. So decoding goes back to plain steps by itself, and probes now and then.
 */
export class DraftLength {
  #plainMs = 0;
  /** Of one drafted token. */
  #draftMs = 0;
  /** Of one more row to verify. */
  #rowMs = 0;
  #accepted = priorAcceptance * priorTokens;
  #tried = priorTokens;
  /** Milliseconds saved and not lost again, and what plain steps earned since the last cycle. */
  #credit = 0;
  #earned = 0;
  #cycles = 0;

  /** A new text: what was saved in others may be risked for one cycle, what was lost is still owed. */
  begin(): void {
    const weight = Math.min(1, rememberedTokens / this.#tried);
    this.#accepted *= weight;
    this.#tried *= weight;
    this.#credit = Math.min(this.#credit, this.#worstLoss(this.#best() || 1));
  }

  /** Tokens to draft now; 0: take a plain step. */
  next(): number {
    if (this.#plainMs === 0) return 0;
    // The first probe is on the house: it tells what there is to lose.
    if (this.#draftMs === 0) return 1;
    if (++this.#cycles % refreshEvery === 0) return 0;
    let tokens = this.#best();
    if (tokens === 0) return this.#worstLoss(1) <= Math.min(this.#earned, this.#credit) ? 1 : 0;
    while (tokens > 0 && this.#worstLoss(tokens) > this.#credit) tokens--;
    return tokens;
  }

  /** A plain step took so long. */
  plain(ms: number): void {
    this.#plainMs = mean(this.#plainMs, ms);
    this.#credit += slack * ms;
    this.#earned += slack * ms;
  }

  cycle({ drafted, accepted, draftMs, verifyMs }: Cycle): void {
    this.#draftMs = mean(this.#draftMs, draftMs / drafted);
    this.#rowMs = mean(this.#rowMs, Math.max(0, verifyMs - this.#plainMs) / drafted);
    this.#accepted = decay * this.#accepted + accepted;
    this.#tried = decay * this.#tried + Math.min(accepted + 1, drafted);
    this.#earned = 0;
    this.#credit += (1 + slack) * (accepted + 1) * this.#plainMs - draftMs - verifyMs;
  }

  /** The most profitable number of tokens; 0 when none is. */
  #best(): number {
    const acceptance = this.#accepted / this.#tried;
    let best = { tokens: 0, rate: 1 / this.#plainMs };
    let expected = 1;
    let power = 1;
    for (let tokens = 1; tokens <= maxDraftTokens; tokens++) {
      power *= acceptance;
      expected += power;
      const rate = expected / (this.#plainMs + this.#worstLoss(tokens));
      if (rate > best.rate) best = { tokens, rate };
    }
    return best.tokens;
  }

  // When nothing is accepted a cycle still gives one token, as a plain step does.
  #worstLoss(tokens: number): number {
    return tokens * (this.#draftMs + this.#rowMs);
  }
}

// Of times so far and a new one, of which an outlier counts as four times the mean.
const mean = (old: number, ms: number): number => (old === 0 ? ms : old + freshness * (Math.min(ms, 4 * old) - old));
