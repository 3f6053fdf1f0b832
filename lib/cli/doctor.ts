// `elastiform doctor`: which binary is loaded, what it can use, and why not more.
import { totalmem } from 'node:os';
import { addonPath, loadAddon } from '../native/index.js';
import type { Command } from './command.js';
import { columns } from './progress.js';

export const doctor: Command = {
  name: 'doctor',
  summary: 'Show which native binary is loaded, which instructions it uses and whether a GPU can be used.',
  positionals: '',
  flags: {},
  example: 'elastiform doctor --json',
  async run({ json, print, printJson }) {
    const info = loadAddon().info();
    const report = {
      ...info,
      binary: addonPath(),
      node: process.version,
      platform: `${process.platform}-${process.arch}`,
      memoryBytes: totalmem(),
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
        ]).replaceAll(/ {2,}/g, '  '),
      );
    }
    return 0;
  },
};

/** One line for reports: processor instructions and threads. */
export function machineLine(): string {
  const { isa, threads, hardwareThreads } = loadAddon().info();
  return `${process.platform}-${process.arch}, ${isa}, ${threads} of ${hardwareThreads} threads, node ${process.version}`;
}
