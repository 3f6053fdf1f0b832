// What the native binary can use on this machine.
import type { NativeInfo } from '../native/addon.js';
import { loadAddon } from '../native/index.js';

/**
 * Version, instruction set, threads, and whether a GPU can be used or why not.
 * @throws AddonLoadError that lists what was tried when no binary can be loaded.
 */
export function getRuntime(): NativeInfo {
  return loadAddon().info();
}
