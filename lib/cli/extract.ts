// `elastiform extract`: a slice of a nested model as a checkpoint of its own.

import { extract, layouts } from '../infer/export/extract.js';
import { exportSlim, isSlim } from '../infer/export/slim.js';
import { type Command, UsageError } from './command.js';
import { Progress } from './progress.js';
import { parseLevel } from './shared.js';

export const extractCommand: Command = {
  name: 'extract',
  summary:
    'Write a slice of a nested model, or a slim encoder, as a stock checkpoint, and compare it with what it was made of.',
  positionals: '<model>',
  flags: {
    level: { type: 'string', value: 'NAME|SHARE', help: 'level to extract, or the share of the FLOPs it may cost' },
    width: { type: 'string', value: 'W[,W...]', help: 'share of the units or a number of them, one or one per layer' },
    layout: {
      type: 'string',
      value: layouts.join('|'),
      help: 'one width, which stock transformers loads, or the widths as they are, for elastiform',
    },
    'skip-layers': { type: 'string', value: 'L[,L-L...]', help: 'layers to leave out, by their numbers, from 0' },
    'no-verify': { type: 'boolean', help: 'do not load the result to compare its logits' },
    out: { type: 'string', short: 'o', value: 'DIR', help: 'new directory to write (required)' },
  },
  example:
    'elastiform extract runs/nested --level ffn50 --layout uniform --out runs/half\n  elastiform extract runs/nested --width 0.5 --skip-layers 20-24,30 --out runs/shallow\n  elastiform extract runs/slim/model --out runs/stock',
  async run({ flags, positionals, json, print, printJson, signal }) {
    const out = flags.required('out', 'the directory to write');
    const level = flags.string('level');
    const widths = flags.numbers('width');
    const ffnWidth = widths?.length === 1 ? widths[0] : widths;
    const skipLayers = layerRanges(flags.string('skip-layers'));
    if (level === undefined && ffnWidth === undefined && !skipLayers && (await isSlim(positionals[0]))) {
      const result = await exportSlim(positionals[0], { out, verify: !flags.boolean('no-verify'), signal });
      if (json) printJson(result);
      else {
        const { dir, parameters, slimParameters, ffn, padded, largestDifference } = result;
        const compared =
          largestDifference === null ? 'not compared' : `differ from the slim model's by ${largestDifference}`;
        print(
          `${dir}: feed-forwards of ${ffn} units, ${parameters.toLocaleString('en-US')} parameters (slim: ${slimParameters.toLocaleString('en-US')}), ${padded.heads} heads and ${padded.units} units of zeros; its logits ${compared}\n`,
        );
      }
      return 0;
    }
    if ((level === undefined) === (ffnWidth === undefined)) {
      throw new UsageError('[cli] extract needs --level or --width, one of them; a slim encoder needs neither');
    }
    const layout = flags.choice('layout', layouts);
    const progress = new Progress('extract');
    const result = await extract(positionals[0], {
      ...{ budget: level === undefined ? { spec: { ffnWidth } } : parseLevel(level), out, signal },
      ...(layout && { layout }),
      ...(skipLayers && { skipLayers }),
      verify: !flags.boolean('no-verify'),
      onProgress: progress.phase,
    }).finally(() => progress.finish());
    if (json) printJson(result);
    else {
      const { dir, layers, widths, parameters, bytes, largestDifference } = result;
      const units = new Set(widths).size === 1 ? `${widths[0]}` : widths.join(', ');
      const compared = largestDifference === null ? 'not compared' : `differ from the slice's by ${largestDifference}`;
      print(
        `${dir}: ${layers.length} layers, ${result.layout}, feed-forwards of ${units} units, ${parameters.toLocaleString('en-US')} parameters, ${(bytes / 2 ** 20).toFixed(1)} MiB; its logits ${compared}\nLoads in ${result.loadsIn.join(', ')}\n`,
      );
    }
    return 0;
  },
};

/** `20-24,30` */
function layerRanges(text: string | undefined): number[] | undefined {
  return text?.split(',').flatMap((part) => {
    const [, first, last = first] = /^\s*(\d{1,5})(?:-(\d{1,5}))?\s*$/.exec(part) ?? [];
    if (first === undefined || Number(last) < Number(first)) {
      throw new UsageError(`[cli] --skip-layers must be numbers of layers and ranges such as 20-24,30, got '${text}'`);
    }
    return Array.from({ length: Number(last) - Number(first) + 1 }, (_, i) => Number(first) + i);
  });
}
