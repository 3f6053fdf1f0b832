// What the times of a loaded model depend on besides the model.
import { cpus } from 'node:os';
import type { MeasuredOn } from '../elastic/profile.js';
import { type Engine, loadAddon } from '../native/index.js';

/** @param dtype storage of the weights */
export function measuredOn({ device, activations }: Engine, dtype: string): MeasuredOn {
  const { isa, threads, devices } = loadAddon().info();
  const processor = cpus()[0]?.model.trim() || process.arch;
  const name = device === 'cpu' ? processor : `${devices[device].description} beside ${processor}`;
  return { device, name, isa, threads, dtype, activations };
}
