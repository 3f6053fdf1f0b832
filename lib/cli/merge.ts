// `elastiform merge`: an ordinary checkpoint of a model with its adapter merged in.
import { mergeAdapter } from '../infer/export/merge.js';
import type { Command } from './command.js';

export const mergeCommand: Command = {
  name: 'merge',
  summary: 'Write a stock checkpoint of a model with a LoRA adapter merged into its weights.',
  positionals: '<model>',
  flags: {
    adapter: { type: 'string', value: 'DIR', help: 'adapter in PEFT format (default: that of the elastic model)' },
    out: { type: 'string', short: 'o', value: 'DIR', help: 'new directory to write (required)' },
  },
  example: 'elastiform merge runs/tiny --out runs/merged',
  async run({ flags, positionals, json, print, printJson, signal }) {
    const out = flags.required('out', 'the directory to write');
    const adapter = flags.string('adapter');
    const result = await mergeAdapter(positionals[0], { out, signal, ...(adapter !== undefined && { adapter }) });
    if (json) printJson(result);
    else {
      print(
        `${result.dir}: ${result.modules} modules merged; its logits differ from weights and adapter apart by at most ${result.largestDifference.toExponential(1)}\n`,
      );
    }
    return 0;
  },
};
