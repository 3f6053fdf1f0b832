// `elastiform doctor`: which binary is loaded, what it can use, and why not more.
import { totalmem } from 'node:os';
import { addonPath, type DeviceName, deviceChoices, Engine, loadAddon, resolveDevice } from '../native/index.js';
import type { Command } from './command.js';
import { columns } from './progress.js';
import { loadFlags } from './shared.js';

export const doctor: Command = {
  name: 'doctor',
  summary: 'Show which native binary is loaded, which instructions it uses, and which device would run.',
  positionals: '',
  flags: {
    device: { ...loadFlags.device, help: 'device to ask about; an error where it cannot be used (default: auto)' },
  },
  example: 'elastiform doctor --device cuda',
  async run({ flags, json, print, printJson }) {
    const info = loadAddon().info();
    const asked = flags.choice('device', deviceChoices) ?? 'auto';
    const used = resolveDevice(asked, '--device');
    const report = {
      ...info,
      binary: addonPath(),
      node: process.version,
      platform: `${process.platform}-${process.arch}`,
      memoryBytes: totalmem(),
      /** What a command with this `--device` would run on. */
      device: { asked, used, why: reason(asked, used) },
    };
    if (json) printJson(report);
    else {
      print(
        columns([
          ['elastiform', info.version],
          ['binary', report.binary],
          ['node', `${report.node} on ${report.platform}`],
          ['instructions', `${info.isa} (available: ${info.isaAvailable.join(', ')})`],
          ['threads', `${info.threads} of ${info.hardwareThreads}`],
          ['memory', `${(report.memoryBytes / 2 ** 30).toFixed(1)} GiB`],
          ['CUDA', `${info.devices.cuda.available ? '' : 'not used: '}${info.devices.cuda.description}`],
          ['emulated CUDA', `${info.devices.simt.available ? '' : 'not used: '}${info.devices.simt.description}`],
          [`--device ${asked}`, `${used}: ${report.device.why}`],
        ]).replaceAll(/ {2,}/g, '  '),
      );
    }
    new Engine(used).dispose();
    return 0;
  },
};

/** Why it is that device, and what to do where another one may have been meant. */
function reason(asked: string, used: DeviceName): string {
  const { cuda, [used]: own } = loadAddon().info().devices;
  if (!own.available) return `cannot be used: ${own.description}`;
  if (asked === 'auto' && used === 'cpu') return `CUDA cannot be used: ${cuda.description}`;
  const standard = process.env.ELASTIFORM_DEVICE || 'cpu';
  const how = `commands without --device run on ${standard}; ELASTIFORM_DEVICE=${asked} changes that`;
  return standard === asked || standard === used ? own.description : `${own.description}; ${how}`;
}

/** One line for reports: processor instructions and threads. */
export function machineLine(): string {
  const { isa, threads, hardwareThreads } = loadAddon().info();
  return `${process.platform}-${process.arch}, ${isa}, ${threads} of ${hardwareThreads} threads, node ${process.version}`;
}
