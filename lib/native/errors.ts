// The typed errors of the package, and the translation of what the native addon throws.

export type ErrorCode =
  | 'InvalidArgument'
  | 'InvalidProgram'
  | 'InvalidFile'
  | 'InvalidData'
  | 'OutOfMemory'
  | 'Aborted'
  | 'Disposed'
  | 'DeviceUnavailable'
  | 'Internal'
  /** The file system refused (lib/io). */
  | 'FileSystem'
  /** Training has no finite loss any more (lib/distill). */
  | 'Diverged';

/** Base of every error this package throws on purpose; `code` says which kind without `instanceof`. */
export abstract class ElastiformError extends Error {
  abstract readonly code: ErrorCode;

  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** A value the caller gave is wrong. */
export class InvalidArgumentError extends ElastiformError {
  readonly code = 'InvalidArgument';
}

/** A program failed the native validation, or an op's attributes and sizes do not fit together. */
export class InvalidProgramError extends ElastiformError {
  readonly code = 'InvalidProgram';
}

/** A file is missing, truncated, corrupt or of an unknown kind. */
export class InvalidFileError extends ElastiformError {
  readonly code = 'InvalidFile';
}

/** Values met while running are wrong: a token id past the vocabulary, a score that is not a number. */
export class InvalidDataError extends ElastiformError {
  readonly code = 'InvalidData';
}

/** Native memory could not be allocated; the message says how much was asked for. */
export class OutOfMemoryError extends ElastiformError {
  readonly code = 'OutOfMemory';
}

/** The call was aborted where no `AbortSignal` gives a reason of its own. */
export class AbortError extends ElastiformError {
  readonly code = 'Aborted';
}

/** Something was used after its `dispose()`. */
export class DisposedError extends ElastiformError {
  readonly code = 'Disposed';
}

/** The device asked for does not exist on this machine, or this build cannot use it; the message says why. */
export class DeviceUnavailableError extends ElastiformError {
  readonly code = 'DeviceUnavailable';
}

/** A defect of this package. */
export class InternalError extends ElastiformError {
  readonly code = 'Internal';
}

/** Codes that the addon throws. */
type NativeCode = Exclude<ErrorCode, 'FileSystem' | 'Diverged'>;

const classes: Record<NativeCode, new (message: string, options?: ErrorOptions) => ElastiformError> = {
  InvalidArgument: InvalidArgumentError,
  InvalidProgram: InvalidProgramError,
  InvalidFile: InvalidFileError,
  InvalidData: InvalidDataError,
  OutOfMemory: OutOfMemoryError,
  Aborted: AbortError,
  Disposed: DisposedError,
  DeviceUnavailable: DeviceUnavailableError,
  Internal: InternalError,
};

/** The typed error for what the addon threw; anything without a known `code` comes back as it is. */
export function fromNative(error: unknown): unknown {
  if (!(error instanceof Error) || error instanceof ElastiformError) return error;
  const code = (error as { code?: unknown }).code;
  if (typeof code !== 'string' || !Object.hasOwn(classes, code)) return error;
  return new classes[code as NativeCode](error.message);
}

/** Calls into the addon; what it throws comes out typed. */
export function wrapNative<T>(call: () => T): T {
  try {
    return call();
  } catch (error) {
    throw fromNative(error);
  }
}
