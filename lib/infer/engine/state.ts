// A text that stays in the caches between calls, for what continues it, once or in several ways.
import { DisposedError, InvalidArgumentError } from '../../native/errors.js';
import type { GenerateOptions, GenerateStream, Usage } from '../types.js';
import { type Engine, generate, type Held } from './generate.js';

/**
 * A text that a model has read at a budget, made by `ElasticModel.prefill`. What is generated after it becomes part of it. Its
 * keys and values take memory until it is disposed of; forks share what they have in common.
 */
export class SequenceState implements Disposable {
  /** What reading the text took; of a fork, what it took there. */
  readonly usage: Usage;
  readonly #engine: Engine;
  readonly #held: Held;
  readonly #disposed = new AbortController();
  #generating = false;

  /** @internal Made by `prefill` and `fork`. */
  constructor(engine: Engine, held: Held, usage: Usage) {
    this.usage = usage;
    this.#held = held;
    this.#engine = { ...engine, closed: AbortSignal.any([engine.closed, this.#disposed.signal]) };
  }

  /** Its token ids: what was read and generated so far. */
  get ids(): readonly number[] {
    return [...this.#held.sequence.ids];
  }

  /**
   * Continues the text with `more`, a text or token ids, maybe empty, and generates what comes then, at the text's budget. Both
   * are part of it afterwards, up to where generation ended. A text is continued as it is: nothing such as BOS is put before it.
   *
   * @throws InvalidArgumentError: as `ElasticModel.generate`; it is generating; an option `budget` or `adapter`.
   * @throws DisposedError when it or its model was disposed.
   */
  generate(
    more: string | readonly number[],
    options: Omit<GenerateOptions, 'budget' | 'adapter'> = {},
  ): GenerateStream {
    this.#requireIdle('generate');
    const ended = () => {
      this.#generating = false;
      if (this.#disposed.signal.aborted) this.#held.sequence.release();
    };
    const stream = generate(this.#engine, more, options, { ...this.#held, ended });
    this.#generating = true;
    return stream;
  }

  /**
   * Another state of the same text that goes its own way; it shares the memory of what is there.
   *
   * @throws InvalidArgumentError while it is generating, DisposedError when it or its model was disposed.
   */
  fork(): SequenceState {
    this.#requireIdle('fork');
    const { sequence, budget } = this.#held;
    return new SequenceState(this.#engine, { sequence: sequence.fork(), budget }, this.usage);
  }

  /** Gives its memory back; idempotent. What it generates ends with reason 'abort'. */
  dispose(): void {
    if (this.#disposed.signal.aborted) return;
    this.#disposed.abort();
    if (!this.#generating) this.#held.sequence.release();
  }

  /** The same as `dispose()`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  #requireIdle(api: string): void {
    if (this.#disposed.signal.aborted) throw new DisposedError(`[${api}] the sequence was disposed`);
    if (this.#engine.closed.aborted) throw new DisposedError(`[${api}] the model was disposed`);
    if (this.#generating) {
      throw new InvalidArgumentError(`[${api}] the sequence is generating; wait for it, or fork it before`);
    }
  }
}
