// Reads fields of a config.json, with errors that name the file and the field.
import { InvalidFileError } from '../native/errors.js';

const MAX_INT = 1 << 24;
const MAX_LAYERS = 1 << 16;

/** Fields of a config.json that transformers 5 refuses when they are written as integers. */
export const floatFields: readonly string[] = [
  ...['rms_norm_eps', 'layer_norm_epsilon', 'initializer_range', 'attn_logit_softcapping', 'final_logit_softcapping'],
  ...['altup_coef_clip', 'activation_sparsity_pattern'],
];

/** Reads fields of a JSON object of a file; null counts as absent. */
export class Config {
  constructor(
    private readonly fields: Readonly<Record<string, unknown>>,
    private readonly file: string,
    private readonly path = '',
  ) {}

  /** @throws InvalidFileError when the file does not hold an object. */
  static of(json: unknown, file: string): Config {
    if (typeof json !== 'object' || json === null || Array.isArray(json)) {
      throw new InvalidFileError(`[config] ${file} is not a JSON object`);
    }
    return new Config(json as Record<string, unknown>, file);
  }

  error(field: string, expected: string, actual: unknown): InvalidFileError {
    const shown = JSON.stringify(actual)?.slice(0, 100);
    return new InvalidFileError(`[config] ${this.file}: ${this.path}${field} ${expected}, got ${shown}`);
  }

  names(): string[] {
    return Object.keys(this.fields);
  }

  value(field: string): unknown {
    return this.fields[field];
  }

  has(field: string): boolean {
    return Object.hasOwn(this.fields, field) && this.fields[field] !== null;
  }

  int(field: string, otherwise?: number, least = 1, most = MAX_INT): number {
    const value = this.#value(field, otherwise);
    if (!Number.isInteger(value) || (value as number) < least || (value as number) > most) {
      throw this.error(field, `must be an integer from ${least} to ${most}`, value);
    }
    return value as number;
  }

  /** A number of layers, each of which takes memory before a weight is looked for. */
  layers(field: string, otherwise?: number): number {
    return this.int(field, otherwise, 1, MAX_LAYERS);
  }

  /** Here null is a value of its own. */
  optionalInt(field: string, otherwise: number): number | null {
    return Object.hasOwn(this.fields, field) && this.fields[field] === null ? null : this.int(field, otherwise);
  }

  /** Here null is a value of its own; 0 as the default is none. */
  optionalPositive(field: string, otherwise: number): number | null {
    if (!Object.hasOwn(this.fields, field)) return otherwise;
    return this.fields[field] === null ? null : this.positive(field);
  }

  positive(field: string, otherwise?: number): number {
    const value = this.#value(field, otherwise);
    if (typeof value !== 'number' || !Number.isFinite(value) || value <= 0) {
      throw this.error(field, 'must be a positive number', value);
    }
    return value;
  }

  boolean(field: string, otherwise: boolean): boolean {
    const value = this.#value(field, otherwise);
    if (typeof value !== 'boolean') throw this.error(field, 'must be true or false', value);
    return value;
  }

  choice<T extends string>(field: string, choices: readonly T[], otherwise?: T): T {
    const value = this.#value(field, otherwise);
    if (!choices.includes(value as T)) throw this.error(field, `must be one of ${choices.join(', ')}`, value);
    return value as T;
  }

  /** A list of so many, or one number for all. */
  ints(field: string, count: number, otherwise: number): number[] {
    const value = this.#value(field, otherwise);
    if (!Array.isArray(value)) return new Array(count).fill(this.int(field, otherwise));
    if (value.length !== count || value.some((item) => !Number.isInteger(item) || item < 1 || item > MAX_INT)) {
      throw this.error(field, `must be an integer from 1 to ${MAX_INT} or a list of ${count}`, value);
    }
    return value;
  }

  /** A list of so many numbers from 0 to below 1, or one for all. */
  shares(field: string, count: number): number[] {
    const value = this.#value(field, undefined);
    const list: unknown[] = Array.isArray(value) ? value : new Array(count).fill(value);
    if (list.length !== count || list.some((item) => typeof item !== 'number' || !(item >= 0 && item < 1))) {
      throw this.error(field, `must be a number from 0 to below 1 or a list of ${count}`, value);
    }
    return list as number[];
  }

  /** A list of so many. */
  choices<T extends string>(field: string, choices: readonly T[], count: number): T[] {
    const value = this.#value(field, undefined);
    if (!Array.isArray(value) || value.length !== count || value.some((item) => !choices.includes(item))) {
      throw this.error(field, `must be a list of ${count}, each one of ${choices.join(', ')}`, value);
    }
    return value as T[];
  }

  mustBe(field: string, supported: unknown): void {
    const value = this.#value(field, supported);
    if (value !== supported) throw this.error(field, `must be ${supported}`, value);
  }

  /** An object inside this one; empty when absent. */
  section(field: string): Config {
    const value = this.#value(field, {});
    if (typeof value !== 'object' || Array.isArray(value)) throw this.error(field, 'must be an object', value);
    return new Config(value as Record<string, unknown>, this.file, `${this.path}${field}.`);
  }

  #value(field: string, otherwise: unknown): unknown {
    if (this.has(field)) return this.fields[field];
    if (otherwise === undefined) throw new InvalidFileError(`[config] ${this.file}: ${this.path}${field} is missing`);
    return otherwise;
  }
}
