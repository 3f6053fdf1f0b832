/**
 * The elastic operations alone, on typed arrays, for authors of other frameworks.
 *
 * @module elastiform/kernels
 */
export type { Act, DivergenceKind } from '../graph/index.js';
export * from '../native/errors.js';
export type { DeviceChoice, DeviceName, DType } from '../native/index.js';
export { Kernels } from './kernels.js';
export type * from './types.js';
export type { Weight, WeightDtype } from './weight.js';
