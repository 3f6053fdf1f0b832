// The check of options that callers give.
import { InvalidArgumentError } from './errors.js';

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
