// Turns generated tokens into chunks of text, and says when a text has ended.
import type { TokenStream } from '../../io/tokenizer.js';
import type { GenerateChunk } from '../types.js';
import { StopFilter } from './stops.js';

export interface WriterOptions {
  /** Null: the model has no tokenizer. */
  readonly decoded: TokenStream | null;
  /** Texts before any of which the text ends. */
  readonly stop: readonly string[];
  /** Tokens that end a text. */
  readonly endIds: ReadonlySet<number>;
  readonly maxTokens: number;
  readonly emit: (chunk: GenerateChunk) => void;
}

/** The text of one generation. */
export class Writer {
  /** Tokens so far. */
  count = 0;
  /** It has ended by an end token or a stop text. */
  stopped = false;
  readonly #options: WriterOptions;
  readonly #filter: StopFilter;

  constructor(options: WriterOptions) {
    this.#options = options;
    this.#filter = new StopFilter(options.stop);
  }

  /** Writes a token; whether generation goes on after it. */
  take({ token, logprob }: { token: number; logprob: number }): boolean {
    const { decoded, endIds, maxTokens, emit } = this.#options;
    this.count++;
    const ended = endIds.has(token);
    const last = ended || this.count === maxTokens;
    const piece = ended ? '' : (decoded?.push(token) ?? '');
    const { text, stopped } = this.#filter.push(last ? piece + (decoded?.end() ?? '') : piece);
    emit({ text: last && !stopped ? text + this.#filter.end() : text, token, logprob });
    this.stopped = ended || stopped;
    return !(last || stopped);
  }
}
