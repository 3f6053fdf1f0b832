// The typed errors of the package, and the translation of what the native addon throws.

export type ErrorCode =
  | 'InvalidArgument'
  | 'InvalidProgram'
  | 'InvalidFile'
  | 'InvalidData'
  | 'OutOfMemory'
  | 'Aborted'
  | 'Disposed'
  | 'Internal'
  /** The file system refused (lib/io). */
  | 'FileSystem'
  /** Training has no finite loss any more (lib/distill). */
  | 'Diverged';

/** Base of every error this package throws on purpose; `code` says which kind without `instanceof`. */
export class ElastiformError extends Error {
  readonly code: ErrorCode;

  constructor(code: ErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
    this.name = new.target.name;
  }
}

/** A value the caller gave is wrong. */
export class InvalidArgumentError extends ElastiformError {
  constructor(message: string, options?: ErrorOptions) {
    super('InvalidArgument', message, options);
  }
}

/** A program failed the native validation, or an op's attributes and sizes do not fit together. */
export class InvalidProgramError extends ElastiformError {
  constructor(message: string, options?: ErrorOptions) {
    super('InvalidProgram', message, options);
  }
}

/** A file is missing, truncated, corrupt or of an unknown kind. */
export class InvalidFileError extends ElastiformError {
  constructor(message: string, options?: ErrorOptions) {
    super('InvalidFile', message, options);
  }
}

/** Values met while running are wrong: a token id past the vocabulary, a score that is not a number. */
export class InvalidDataError extends ElastiformError {
  constructor(message: string, options?: ErrorOptions) {
    super('InvalidData', message, options);
  }
}

/** Native memory could not be allocated; the message says how much was asked for. */
export class OutOfMemoryError extends ElastiformError {
  constructor(message: string, options?: ErrorOptions) {
    super('OutOfMemory', message, options);
  }
}

/** The call was aborted where no `AbortSignal` gives a reason of its own. */
export class AbortError extends ElastiformError {
  constructor(message: string, options?: ErrorOptions) {
    super('Aborted', message, options);
    this.name = 'AbortError';
  }
}

/** Something was used after its `dispose()`. */
export class DisposedError extends ElastiformError {
  constructor(message: string, options?: ErrorOptions) {
    super('Disposed', message, options);
  }
}

/** A defect of this package. */
export class InternalError extends ElastiformError {
  constructor(message: string, options?: ErrorOptions) {
    super('Internal', message, options);
  }
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
