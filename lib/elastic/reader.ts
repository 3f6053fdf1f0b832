// Reads parts of a JSON file of an elastic directory; every error names the file and the key.
import { InvalidDataError } from '../native/errors.js';

export type Json = Record<string, unknown>;

export class Reader {
  constructor(
    readonly file: string,
    readonly warnings: string[],
  ) {}

  fail(key: string, expected: string, got: unknown): never {
    throw new InvalidDataError(
      `[elastic] ${this.file}: ${key || 'the file'} must be ${expected}, got ${JSON.stringify(got)}`,
    );
  }
  object(value: unknown, key: string): Json {
    if (typeof value !== 'object' || value === null || Array.isArray(value)) this.fail(key, 'an object', value);
    return value as Json;
  }
  string(value: unknown, key: string): string {
    if (typeof value !== 'string') this.fail(key, 'a string', value);
    return value as string;
  }
  numbers(value: unknown, key: string): number[] {
    if (!Array.isArray(value) || value.some((v) => typeof v !== 'number')) this.fail(key, 'a list of numbers', value);
    return value as number[];
  }
  known(object: Json, prefix: string, keys: readonly string[]): void {
    for (const key of Object.keys(object)) {
      if (!keys.includes(key)) this.warnings.push(`${this.file}: unknown key ${prefix}${key} is ignored`);
    }
  }
}
