// `elastiform pretrain`: trains a small model from scratch, or a model's weights further.
import { type PretrainConfig, pretrain } from '../distill/pretrain.js';
import { type Command, type FlagReader, UsageError } from './command.js';
import { type ConfigFile, isMapping } from './config.js';
import { dataSource } from './data.js';
import {
  readConfig,
  runTraining,
  sampleOption,
  trainingFlags,
  trainingOptions,
  trainingOutcome,
  widthFlags,
} from './training.js';

export const pretrainCommand: Command = {
  name: 'pretrain',
  summary: 'Train a small model from scratch, or the weights of one further, and write its directory. Ctrl-C saves.',
  positionals: '',
  flags: {
    ...trainingFlags,
    from: { type: 'string', value: 'DIR', help: 'model to train further, instead of a new one' },
    train: { type: 'string', value: 'all|ffn', help: 'with --from: weights to train (default: all)' },
    nested: { type: 'string', value: 'SHARE,...,1', help: 'train feed-forwards at these shares of their units' },
    ...widthFlags,
  },
  example: 'elastiform pretrain -c recipe.json --data books.txt --held-out 0.05 --steps 2000 --out models/mine',
  async run(context) {
    const config = await readConfig(context.flags);
    const { merged, overridden } = trainingOptions(context.flags, config, {
      data: (await dataSource(context, 'data')) ?? undefined,
      evalData: (await dataSource(context, 'eval-data')) ?? undefined,
      from: context.flags.string('from'),
      train: context.flags.choice('train', ['all', 'ffn']),
      nested: nestedFlag(context.flags, config),
      sample: sampleOption(context.flags),
    });
    for (const key of [...(merged.from === undefined ? ['model', 'tokenizer'] : []), 'data']) {
      if (merged[key] === undefined) throw new UsageError(`[cli] '${key}' is missing: give it in the --config file`);
    }
    return runTraining(context, 'pretrain', trainingOutcome, (hooks) => {
      const start = () => pretrain({ ...(merged as unknown as PretrainConfig), ...hooks });
      return config ? config.blame(overridden, start) : start();
    });
  },
};

/** Granularities of the flag, over those of the file; its other settings stay. */
function nestedFlag(flags: FlagReader, config: ConfigFile | null): Record<string, unknown> | undefined {
  const granularities = flags.numbers('nested', 'shares');
  if (!granularities) return undefined;
  const file = config?.content.nested;
  return { ...(isMapping(file) ? file : {}), granularities };
}
