// Beam search: which texts go on, which have ended, and when the best one is found, as transformers decides it.
import type { EarlyStopping } from './writing.js';

export interface BeamOptions {
  readonly beams: number;
  /** The sum of log-probabilities is divided by the number of tokens to this power. */
  readonly lengthPenalty: number;
  readonly earlyStopping: EarlyStopping;
  readonly maxTokens: number;
  readonly endIds: ReadonlySet<number>;
}

/** Tokens written after the start of a target, the log-probability of each, and the score of all. */
export interface Hypothesis {
  readonly tokens: readonly number[];
  readonly logprobs: readonly number[];
  /** The sum of the log-probabilities; of one that ended, after the length penalty. */
  readonly score: number;
}

/** A score that is as good as none. */
const none = -1e9;

interface Candidate {
  readonly parent: number;
  readonly token: number;
  readonly score: number;
}

/**
 * One search, after `_beam_search` of transformers 5: of the likeliest continuations of all beams, as many as beams and twice that,
 * those that end are kept apart if they are among the first, and the best of the others go on. Scores are f32, as there.
 */
export class BeamSearch {
  /** Those that go on, the best first. At the beginning all are empty, and only the first counts. */
  running: readonly Hypothesis[];
  done = false;
  readonly #options: BeamOptions;
  #ended: readonly Hypothesis[] = [];
  #hopeful = true;

  constructor(options: BeamOptions) {
    this.#options = options;
    this.running = Array.from({ length: options.beams }, (_, i) => ({
      tokens: [],
      logprobs: [],
      score: i > 0 ? none : 0,
    }));
  }

  /** The best text that has ended. */
  get best(): Hypothesis {
    return this.#ended[0];
  }

  /**
   * Continues every running hypothesis by one token.
   *
   * @param scores of the next token after each, log-probabilities with what is forbidden at minus infinity, f32 [vocab]
   * @param logprobs under the model's own distribution, f32 [vocab]
   * @returns which of the hypotheses before each of the running ones continues
   */
  advance(scores: readonly Float32Array[], logprobs: readonly Float32Array[]): number[] {
    const { beams, lengthPenalty, earlyStopping, maxTokens, endIds } = this.#options;
    const length = this.running[0].tokens.length + 1;
    const kept = this.#likeliest(scores, beams * Math.max(2, 1 + endIds.size));
    const ends = ({ token }: Candidate) => endIds.has(token) || length === maxTokens;
    const continued = ({ parent, token, score }: Candidate): Hypothesis => {
      const before = this.running[parent];
      return { tokens: [...before.tokens, token], logprobs: [...before.logprobs, logprobs[parent][token]], score };
    };
    const full = this.#ended.length === beams;
    const going = kept
      .map((candidate) => ({
        candidate,
        score: ends(candidate) ? Math.fround(candidate.score + none) : candidate.score,
      }))
      .sort((a, b) => b.score - a.score || 0)
      .slice(0, beams);
    if (this.#hopeful && !(full && earlyStopping === true)) {
      const ended = kept.slice(0, beams).flatMap((candidate) => {
        const score = Math.fround(candidate.score / length ** lengthPenalty);
        return ends(candidate) && score > none ? [{ ...continued(candidate), score }] : [];
      });
      this.#ended = [...this.#ended, ...ended].sort((a, b) => b.score - a.score || 0).slice(0, beams);
    }
    this.running = going.map(({ candidate, score }) => ({ ...continued(candidate), score }));
    const worst = this.#ended.length === beams ? this.#ended[beams - 1].score : none;
    const hoped = earlyStopping === 'never' && lengthPenalty > 0 ? maxTokens : length;
    this.#hopeful &&= this.running[0].score / hoped ** lengthPenalty > worst;
    const complete = this.#ended.length === beams && earlyStopping === true;
    this.done = !this.#hopeful || complete || kept.every(ends);
    return going.map(({ candidate }) => candidate.parent);
  }

  /** Of all tokens after all hypotheses the best, best first; of equal ones those first that come first. */
  #likeliest(scores: readonly Float32Array[], count: number): Candidate[] {
    const best: Candidate[] = [];
    for (const [parent, row] of scores.entries()) {
      const { score: before } = this.running[parent];
      for (let token = 0; token < row.length; token++) {
        const score = Math.fround(row[token] + before);
        if (best.length === count && !(score > best[count - 1].score)) continue;
        let at = best.length;
        while (at > 0 && score > best[at - 1].score) at--;
        best.splice(at, 0, { parent, token, score });
        if (best.length > count) best.pop();
      }
    }
    return best;
  }
}
