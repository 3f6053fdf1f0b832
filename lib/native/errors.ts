// The typed errors of the package.

/** What kind of error it is; one for each class. */
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
  /** No native addon loads (lib/native/load.ts). */
  | 'AddonLoad'
  /** The file system refused (lib/io). */
  | 'FileSystem'
  /** Training has no finite loss any more (lib/distill). */
  | 'Diverged'
  | 'Infeasible';

/** Base of every error this package throws on purpose; `code` says which kind without `instanceof`. */
export abstract class ElastiformError extends Error {
  /** Which kind of error it is. */
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

/** A file that the native addon was looked for in, and why it is not the one. */
export interface LoadAttempt {
  readonly path: string;
  readonly reason: string;
}

/** The native addon is missing or does not load; the message has every attempt and the command that builds it. */
export class AddonLoadError extends ElastiformError {
  readonly code = 'AddonLoad';

  constructor(
    message: string,
    readonly attempts: readonly LoadAttempt[],
  ) {
    super(message);
  }
}
