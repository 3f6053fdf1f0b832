// `elastiform calibrate`: thresholds of exits for what calls may cost or must reach.
import { type CalibrateConfig, calibrateExits } from '../distill/encoder/exit_levels.js';
import { exitRules, exitText } from '../elastic/exits.js';
import type { Measured } from '../infer/quality/statistics.js';
import { deviceChoices } from '../native/index.js';
import { type Command, exitCodes, UsageError } from './command.js';
import { exampleFlags, exampleSource } from './finetune.js';
import { columns, Progress } from './progress.js';
import { loadFlags, percent } from './shared.js';

const { data, field, 'pair-field': pairField, 'label-field': labelField, columns: columnNames } = exampleFlags;

export const calibrateCommand: Command = {
  name: 'calibrate',
  summary: 'Choose thresholds of exits on held-out texts, by what they cost or keep, and keep them as levels.',
  positionals: '<model>',
  flags: {
    ...{ data, field, 'pair-field': pairField, 'label-field': labelField, columns: columnNames },
    'bad-rows': exampleFlags['bad-rows'],
    compute: { type: 'string', value: 'SHARE,...', help: 'levels within these shares of the full FLOPs' },
    quality: {
      type: 'string',
      value: 'SHARE,...',
      help: "levels whose class is the full model's for these shares of texts (default: 0.98 without --compute)",
    },
    rule: { type: 'string', value: exitRules.join('|'), help: 'what decides at exits (default: entropy)' },
    'min-layer': { type: 'string', value: 'N', help: 'use no exit after an earlier layer (default: 0)' },
    device: loadFlags.device,
    threads: loadFlags.threads,
  },
  example: 'elastiform calibrate runs/sst2-exits --data dev.tsv --compute 0.5,0.75 --quality 0.98',
  async run({ flags, positionals, json, print, printJson, signal }) {
    const share = (value: number) => value > 0 && value < 1;
    const source = exampleSource(flags, 'data', null);
    if (!source) throw new UsageError('[cli] data is missing: give --data');
    const given = {
      compute: flags.numbers('compute', 'shares in (0, 1)', share),
      quality: flags.numbers('quality', 'shares in (0, 1)', share),
      rule: flags.choice('rule', exitRules),
      minLayer: flags.integer('min-layer', { min: 0 }),
      badRows: flags.choice('bad-rows', ['stop', 'skip']),
      device: flags.choice('device', deviceChoices),
      threads: flags.integer('threads', { min: 1 }),
    };
    const progress = new Progress('calibrate');
    const result = await calibrateExits(positionals[0], {
      ...Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)),
      ...{ data: source as CalibrateConfig['data'], signal, onProgress: progress.phase },
    }).finally(() => progress.finish());
    const { bad, truncated, texts, accuracy, levels } = result;
    if (json) {
      printJson(result);
      return exitCodes.ok;
    }
    const interval = ({ value, low, high }: Measured) => `${percent(value)} (${percent(low)} to ${percent(high)})`;
    print(
      columns([
        ['level', 'rule', 'FLOPs', 'as the full model', 'right', 'left in the first half'],
        ['full', '', percent(1), percent(1), interval(accuracy), ''],
        ...levels.map(({ name, exit, ratio, agreement, accuracy, left }) => [
          ...[name, exitText(exit), percent(ratio), interval(agreement), interval(accuracy)],
          percent(left.slice(0, Math.ceil(left.length / 2)).reduce((a, b) => a + b, 0)),
        ]),
      ]),
    );
    print(`\n${texts} texts; the levels are kept in ${result.dir}\n`);
    if (truncated > 0)
      process.stderr.write(`${truncated} of ${texts} texts are longer than the context and were cut\n`);
    if (bad.count > 0) {
      const more = bad.count > bad.named.length ? ', ...' : '';
      process.stderr.write(`${bad.count} bad rows left out: ${bad.named.join(', ')}${more}\n`);
    }
    return exitCodes.ok;
  },
};
