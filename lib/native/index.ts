// The native layer: loader, tensors, programs, engine, errors.
export type {
  DeviceName,
  DType,
  NativeAddon,
  NativeInfo,
  NativeMemory,
  NativeRunResult,
  TypedArray,
} from './addon.js';
export {
  type Activations,
  activationTypes,
  CompiledProgram,
  type DeviceChoice,
  deviceChoices,
  Engine,
  resolveDevice,
} from './engine.js';
export * from './errors.js';
export { addonPath, loadAddon } from './load.js';
export { Mapping, Tensor } from './tensor.js';
