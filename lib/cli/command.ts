// What every command shares: argument parsing, help, JSON output, errors and exit codes.
import { type ParseArgsConfig, parseArgs } from 'node:util';
import { ElastiformError, InvalidArgumentError } from '../native/errors.js';

export const exitCodes = { ok: 0, failed: 1, usage: 2, constraint: 3, interrupted: 130 } as const;

interface Flag {
  readonly type: 'string' | 'boolean';
  readonly short?: string;
  /** Placeholder and meaning, as shown by --help. */
  readonly value?: string;
  readonly help: string;
}

/** One command of the command line. */
export interface Command {
  readonly name: string;
  readonly summary: string;
  /** Positional arguments as shown in the usage line, e.g. `<model>`, or `<model> [text...]` for any number. */
  readonly positionals: string;
  readonly flags: Readonly<Record<string, Flag>>;
  readonly example: string;
  run(context: CommandContext): Promise<number>;
}

/** What a command is called with. */
export interface CommandContext {
  readonly flags: FlagReader;
  readonly positionals: readonly string[];
  readonly json: boolean;
  /** Aborted by the first Ctrl-C or SIGTERM; a second one ends the process at once. */
  readonly signal: AbortSignal;
  /** Prints the one JSON object of --json. */
  printJson(value: unknown): void;
  print(text: string): void;
}

/** A mistake in how a command was called: exit code 2. */
export class UsageError extends InvalidArgumentError {}

/** Reads flag values with types; every error names the flag. */
export class FlagReader {
  constructor(
    private readonly command: string,
    private readonly values: Readonly<Record<string, string | boolean | undefined>>,
  ) {}

  has(name: string): boolean {
    return this.values[name] !== undefined;
  }
  boolean(name: string): boolean {
    return this.values[name] === true;
  }
  string(name: string): string | undefined {
    const value = this.values[name];
    return typeof value === 'string' ? value : undefined;
  }
  /** A string without which the command does nothing; `purpose` says what it is. */
  required(name: string, purpose: string): string {
    const value = this.string(name);
    if (value === undefined) throw new UsageError(`[cli] ${this.command} needs --${name}, ${purpose}`);
    return value;
  }
  number(name: string, range: { min?: number; max?: number } = {}): number | undefined {
    const text = this.string(name);
    if (text === undefined) return undefined;
    const value = text.trim() === '' ? Number.NaN : Number(text);
    if (!Number.isFinite(value) || value < (range.min ?? -Infinity) || value > (range.max ?? Infinity)) {
      throw new UsageError(`[cli] --${name} must be a number${describe(range)}, got '${text}'`);
    }
    return value;
  }
  integer(name: string, range: { min?: number; max?: number } = {}): number | undefined {
    const value = this.number(name, range);
    if (value !== undefined && !Number.isSafeInteger(value)) {
      throw new UsageError(`[cli] --${name} must be an integer${describe(range)}, got '${this.string(name)}'`);
    }
    return value;
  }
  choice<T extends string>(name: string, choices: readonly T[]): T | undefined {
    const value = this.string(name);
    if (value !== undefined && !choices.includes(value as T)) {
      throw new UsageError(`[cli] --${name} must be one of ${choices.join(', ')}, got '${value}'`);
    }
    return value as T | undefined;
  }
  /** Comma-separated values. */
  list(name: string): string[] | undefined {
    const text = this.string(name);
    if (text === undefined) return undefined;
    const parts = text.split(',').map((part) => part.trim());
    if (parts.some((part) => part === '')) throw new UsageError(`[cli] --${name} has an empty entry: '${text}'`);
    return parts;
  }
  /** The same of numbers; `what` says which those of `fits` are. */
  numbers(name: string, what = 'numbers', fits: (value: number) => boolean = Number.isFinite): number[] | undefined {
    const values = this.list(name)?.map(Number);
    if (values && !values.every(fits)) {
      throw new UsageError(`[cli] --${name} must be ${what} separated by commas, got '${this.string(name)}'`);
    }
    return values;
  }
}

function describe(range: { min?: number; max?: number }): string {
  if (range.min !== undefined && range.max !== undefined) return ` from ${range.min} to ${range.max}`;
  if (range.min !== undefined) return ` of at least ${range.min}`;
  return range.max !== undefined ? ` of at most ${range.max}` : '';
}

const common: Readonly<Record<string, Flag>> = {
  json: { type: 'boolean', help: 'print one JSON object on stdout and nothing else' },
  help: { type: 'boolean', short: 'h', help: 'show this help' },
};

/** The text of `elastiform <command> --help`. */
export function helpText(command: Command): string {
  const flags = Object.entries({ ...command.flags, ...common }).map(([name, flag]) => {
    const left = `${flag.short ? `-${flag.short}, ` : ''}--${name}${flag.value ? ` ${flag.value}` : ''}`;
    return `  ${left.padEnd(28)} ${flag.help}`;
  });
  return [
    command.summary,
    '',
    `Usage: elastiform ${command.name}${command.positionals ? ` ${command.positionals}` : ''} [flags]`,
    '',
    'Flags:',
    ...flags,
    '',
    'Example:',
    `  ${command.example}`,
    '',
  ].join('\n');
}

/** Runs a command with its arguments; returns the exit code. Errors become one line on stderr. */
export async function runCommand(command: Command, args: readonly string[]): Promise<number> {
  let interrupts = 0;
  const controller = new AbortController();
  const interrupt = (): void => {
    interrupts++;
    if (interrupts > 1) process.exit(exitCodes.interrupted);
    controller.abort();
  };
  process.on('SIGINT', interrupt);
  process.on('SIGTERM', interrupt);
  try {
    const { values, positionals } = parse(command, args);
    if (values.help) {
      process.stdout.write(helpText(command));
      return exitCodes.ok;
    }
    return await command.run({
      flags: new FlagReader(command.name, values),
      positionals,
      json: values.json === true,
      signal: controller.signal,
      printJson: (value) => process.stdout.write(`${JSON.stringify(value, jsonValue)}\n`),
      print: (text) => process.stdout.write(text),
    });
  } catch (error) {
    if (controller.signal.aborted) {
      process.stderr.write('elastiform: interrupted\n');
      return exitCodes.interrupted;
    }
    reportError(error);
    return error instanceof UsageError ? exitCodes.usage : exitCodes.failed;
  } finally {
    process.off('SIGINT', interrupt);
    process.off('SIGTERM', interrupt);
  }
}

function parse(command: Command, args: readonly string[]) {
  const options: NonNullable<ParseArgsConfig['options']> = {};
  for (const [name, flag] of Object.entries({ ...command.flags, ...common })) {
    options[name] = { type: flag.type, ...(flag.short ? { short: flag.short } : {}) };
  }
  let parsed: { values: Record<string, string | boolean | undefined>; positionals: string[] };
  try {
    parsed = parseArgs({ args: [...args], options, allowPositionals: true }) as typeof parsed;
  } catch (cause) {
    // Node explains at length how to pass such a value as a positional; the first sentence says what is wrong.
    const reason = (cause as Error).message.split(/\.\s|\n/)[0];
    throw new UsageError(`[cli] ${reason}; see elastiform ${command.name} --help`, { cause });
  }
  const many = command.positionals.endsWith('...]');
  const most = many ? Number.POSITIVE_INFINITY : command.positionals === '' ? 0 : command.positionals.split(' ').length;
  const least = command.positionals.split(' ').filter((p) => p.startsWith('<')).length;
  const given = parsed.positionals.length;
  if (!parsed.values.help && (given < least || given > most)) {
    const wanted = most === 0 ? 'no arguments' : command.positionals;
    throw new UsageError(
      `[cli] ${command.name} takes ${wanted}, got ${given === 0 ? 'none' : parsed.positionals.join(' ')}`,
    );
  }
  return parsed;
}

/** One line, `elastiform: [where] message`; the stack only with ELASTIFORM_DEBUG=1. */
export function reportError(error: unknown): void {
  const message = error instanceof Error ? error.message : String(error);
  const kind = error instanceof ElastiformError || !(error instanceof Error) ? '' : `${error.name}: `;
  process.stderr.write(`elastiform: ${kind}${message.replaceAll(/\s*\n\s*/g, ' ')}\n`);
  if (process.env.ELASTIFORM_DEBUG === '1' && error instanceof Error) process.stderr.write(`${error.stack}\n`);
}

// Typed arrays as lists, numbers that JSON lacks as null.
function jsonValue(_key: string, value: unknown): unknown {
  if (ArrayBuffer.isView(value) && !(value instanceof DataView)) return Array.from(value as Float32Array);
  return value;
}
