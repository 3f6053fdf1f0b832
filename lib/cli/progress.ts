// Progress on stderr: one rewritten line on a terminal, a plain line every few seconds elsewhere.

export interface ProgressState {
  readonly done: number;
  readonly total: number;
  /** What is shown beside the bar, e.g. `loss 0.123`. */
  readonly facts: readonly string[];
}

export class Progress {
  readonly #label: string;
  readonly #stream: NodeJS.WriteStream;
  readonly #started = performance.now();
  #lastShown = Number.NEGATIVE_INFINITY;
  #drawn = false;

  constructor(label: string, stream: NodeJS.WriteStream = process.stderr) {
    this.#label = label;
    this.#stream = stream;
  }

  update(state: ProgressState): void {
    const now = performance.now();
    const terminal = this.#stream.isTTY === true;
    if (now - this.#lastShown < (terminal ? 100 : 5000)) return;
    this.#lastShown = now;
    this.#show(state, terminal);
  }

  /** Steps of a phase, as `onProgress` of the library tells them. */
  readonly phase = ({ phase, done, total }: { phase: string; done: number; total: number }): void =>
    this.update({ done, total, facts: [phase] });

  /** Shows the last state and ends the line. */
  finish(state?: ProgressState): void {
    if (state) this.#show(state, this.#stream.isTTY === true);
    if (this.#drawn) this.#stream.write('\n');
    this.#drawn = false;
  }

  #show(state: ProgressState, terminal: boolean): void {
    const seconds = (performance.now() - this.#started) / 1000;
    const share = state.total > 0 ? Math.min(1, state.done / state.total) : 0;
    const left = share > 0 && share < 1 ? [`ETA ${duration((seconds / share) * (1 - share))}`] : [];
    const text = [`${state.done}/${state.total}`, ...state.facts, duration(seconds), ...left].join('  ');
    if (!terminal) {
      this.#stream.write(`${this.#label} ${text}\n`);
      return;
    }
    const filled = Math.round(share * 24);
    const line = `${this.#label} ${'█'.repeat(filled)}${'░'.repeat(24 - filled)} ${text}`;
    const width = (this.#stream.columns ?? 80) - 1;
    this.#stream.write(`\r\x1b[2K${line.slice(0, width)}`);
    this.#drawn = true;
  }
}

/** `42s`, `3m07s`, `1h02m`. */
export function duration(seconds: number): string {
  const s = Math.round(seconds);
  const pad = (n: number): string => String(n).padStart(2, '0');
  if (s < 60) return `${s}s`;
  if (s < 3600) return `${Math.floor(s / 60)}m${pad(s % 60)}s`;
  return `${Math.floor(s / 3600)}h${pad(Math.floor(s / 60) % 60)}m`;
}

/** Text in columns, numbers to the right. */
export function columns(rows: readonly (readonly string[])[]): string {
  const widths = rows[0].map((_, c) => Math.max(...rows.map((row) => row[c].length)));
  return rows
    .map((row) =>
      row
        .map((cell, c) => (c === 0 ? cell.padEnd(widths[c]) : cell.padStart(widths[c])))
        .join('  ')
        .trimEnd(),
    )
    .map((line) => `${line}\n`)
    .join('');
}
