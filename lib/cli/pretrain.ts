// `elastiform pretrain`: trains a small model from scratch.
import { type PretrainConfig, pretrain } from '../distill/pretrain.js';
import { type Command, UsageError } from './command.js';
import { dataSource } from './data.js';
import { readConfig, runTraining, trainingFlags, trainingOptions } from './training.js';

export const pretrainCommand: Command = {
  name: 'pretrain',
  summary: 'Train every weight of a small model from scratch and write a Hugging Face directory. Ctrl-C saves.',
  positionals: '',
  flags: trainingFlags,
  example: 'elastiform pretrain -c recipe.json --data books.txt --held-out 0.05 --steps 2000 --out models/mine',
  async run(context) {
    const config = await readConfig(context.flags);
    const { merged, overridden } = trainingOptions(context.flags, config, {
      data: (await dataSource(context, 'data')) ?? undefined,
      evalData: (await dataSource(context, 'eval-data')) ?? undefined,
    });
    for (const key of ['model', 'tokenizer', 'data'] as const) {
      if (merged[key] === undefined) throw new UsageError(`[cli] '${key}' is missing: give it in the --config file`);
    }
    return runTraining(context, 'pretrain', (hooks) => {
      const start = () => pretrain({ ...(merged as unknown as PretrainConfig), ...hooks });
      return config ? config.blame(overridden, start) : start();
    });
  },
};
