// Checks of caller-given options: unknown names and values out of range are typed errors.
import { InvalidArgumentError } from '../native/errors.js';

/** Throws InvalidArgumentError for a key that is not in `known`, or when `options` is no object. */
export function checkOptions(api: string, options: object, known: readonly string[]): void {
  if (typeof options !== 'object' || options === null) {
    throw new InvalidArgumentError(`[${api}] options must be an object, got ${String(options)}`);
  }
  for (const key of Object.keys(options)) {
    if (!known.includes(key)) {
      throw new InvalidArgumentError(`[${api}] unknown option '${key}'; it takes ${known.join(', ')}`);
    }
  }
}

/** Throws InvalidArgumentError unless `value` is absent or a number that `ok` accepts. */
export function checkNumber(
  api: string,
  name: string,
  value: unknown,
  ok: (value: number) => boolean,
  expected: string,
): void {
  if (value === undefined || (typeof value === 'number' && ok(value))) return;
  throw new InvalidArgumentError(`[${api}] ${name} must be ${expected}, got ${String(value)}`);
}

export const positiveInteger = (value: number): boolean => Number.isSafeInteger(value) && value >= 1;
export const naturalNumber = (value: number): boolean => Number.isSafeInteger(value) && value >= 0;
