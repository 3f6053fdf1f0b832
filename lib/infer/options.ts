// Checks of caller-given options: unknown names and values out of range are typed errors.
import { InvalidArgumentError } from '../native/errors.js';

export { checkOptions } from '../native/options.js';

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
