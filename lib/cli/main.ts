#!/usr/bin/env node
// The `elastiform` command: picks a command and runs it.
import { readFileSync } from 'node:fs';
import { type Command, exitCodes, reportError, runCommand, UsageError } from './command.js';

// Commands are imported when they are called: help and errors come at once.
const commands: Readonly<Record<string, { summary: string; load: () => Promise<Command> }>> = {
  doctor: {
    summary: 'show which binary is loaded and what it can use',
    load: async () => (await import('./doctor.js')).doctor,
  },
  inspect: { summary: 'show what is in a model directory', load: async () => (await import('./inspect.js')).inspect },
  elastify: { summary: 'attach routers to a model', load: async () => (await import('./elastify.js')).elastifyCommand },
  distill: {
    summary: 'train the routers by self-distillation',
    load: async () => (await import('./distill.js')).distillCommand,
  },
  'cache-teacher': {
    summary: 'write what a model says of training data',
    load: async () => (await import('./cache-teacher.js')).cacheTeacherCommand,
  },
  eval: { summary: 'measure quality and speed at budgets', load: async () => (await import('./eval.js')).evalCommand },
  generate: { summary: 'generate text at a budget', load: async () => (await import('./generate.js')).generateCommand },
  classify: {
    summary: 'tell the classes of texts with an encoder',
    load: async () => (await import('./classify.js')).classifyCommand,
  },
  embed: {
    summary: 'make vectors of texts with an encoder',
    load: async () => (await import('./embed.js')).embedCommand,
  },
  calibrate: {
    summary: 'choose thresholds of exits by what they cost or keep',
    load: async () => (await import('./calibrate.js')).calibrateCommand,
  },
  report: {
    summary: 'write a page of quality, compute, time, routers and texts',
    load: async () => (await import('./report.js')).reportCommand,
  },
  merge: {
    summary: 'merge a LoRA adapter into a stock checkpoint',
    load: async () => (await import('./merge.js')).mergeCommand,
  },
  profile: {
    summary: 'time the levels of a model on this device',
    load: async () => (await import('./profile.js')).profileCommand,
  },
  search: {
    summary: 'search widths of a nested model within a constraint',
    load: async () => (await import('./search.js')).searchCommand,
  },
  extract: {
    summary: 'write a slice of a nested model as a stock checkpoint',
    load: async () => (await import('./extract.js')).extractCommand,
  },
  assemble: {
    summary: 'choose layers and modules of an encoder-decoder model',
    load: async () => (await import('./assemble.js')).assembleCommand,
  },
  demo: {
    summary: 'make a small model elastic and write a report',
    load: async () => (await import('./demo.js')).demo,
  },
  pretrain: {
    summary: 'train a small model from scratch',
    load: async () => (await import('./pretrain.js')).pretrainCommand,
  },
  finetune: {
    summary: 'train an encoder on labelled texts, or an encoder-decoder model on pairs',
    load: async () => (await import('./finetune.js')).finetuneCommand,
  },
  modular: {
    summary: 'train modules that stand for several layers of an encoder-decoder model',
    load: async () => (await import('./modular.js')).modularCommand,
  },
  'cost-eff': {
    summary: 'give a classifier exits and make it slim',
    load: async () => (await import('./cost-eff.js')).costEffCommand,
  },
};

async function main(args: readonly string[]): Promise<number> {
  const [name, ...rest] = args;
  if (name === undefined || name === '--help' || name === '-h' || name === 'help') {
    process.stdout.write(overview());
    return name === undefined ? exitCodes.usage : exitCodes.ok;
  }
  if (name === '--version') {
    const file = new URL('../../package.json', import.meta.url);
    process.stdout.write(`${(JSON.parse(readFileSync(file, 'utf8')) as { version: string }).version}\n`);
    return exitCodes.ok;
  }
  if (!Object.hasOwn(commands, name)) {
    reportError(new UsageError(`[cli] unknown command '${name}'; see elastiform --help`));
    return exitCodes.usage;
  }
  return runCommand(await commands[name].load(), rest);
}

function overview(): string {
  return [
    'Make a pretrained transformer elastic: choose its cost on every call.',
    '',
    'Usage: elastiform <command> [arguments] [flags]',
    '',
    ...Object.entries(commands).map(([name, command]) => `  ${name.padEnd(14)} ${command.summary}`),
    '',
    'elastiform <command> --help shows its flags and an example.',
    'Exit codes: 0 ok, 1 failed, 2 bad usage, 3 constraint not met, 130 interrupted and saved.',
    '',
  ].join('\n');
}

// A reader that closes the pipe early (`| head`) is no error.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error;
  process.exit(exitCodes.ok);
});

try {
  process.exitCode = await main(process.argv.slice(2));
} catch (error) {
  reportError(error);
  process.exitCode = exitCodes.failed;
}
