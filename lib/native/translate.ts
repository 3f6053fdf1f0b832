// The translation of what the native addon throws into typed errors.
import {
  AbortError,
  DeviceUnavailableError,
  DisposedError,
  ElastiformError,
  type ErrorCode,
  InternalError,
  InvalidArgumentError,
  InvalidDataError,
  InvalidFileError,
  InvalidProgramError,
  OutOfMemoryError,
} from './errors.js';

/** Codes that the addon throws. */
type NativeCode = Exclude<ErrorCode, 'AddonLoad' | 'FileSystem' | 'Diverged' | 'Infeasible'>;

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
