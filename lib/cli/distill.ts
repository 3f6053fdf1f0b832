// `elastiform distill`: trains the routers of a plan by self-distillation.
import { type DistillConfig, distill } from '../distill/distill.js';
import { activationTypes } from '../native/index.js';
import { type Command, UsageError } from './command.js';
import { dataSource } from './data.js';
import { dtypes, loadFlags } from './shared.js';
import { readConfig, runTraining, trainingFlags, trainingOptions } from './training.js';

export const distillCommand: Command = {
  name: 'distill',
  summary: 'Train the routers of a plan so that the routed model imitates its own full self. Ctrl-C saves.',
  positionals: '[plan]',
  flags: {
    ...trainingFlags,
    dtype: { type: 'string', value: 'f32|bf16|f16', help: 'storage of the frozen weights while training' },
    activations: loadFlags.activations,
  },
  example: 'elastiform distill runs/plan -c examples/recipes/distill.yaml --data train.txt --steps 400 --out runs/tiny',
  async run(context) {
    const { flags, positionals } = context;
    const config = await readConfig(flags);
    const { merged, overridden } = trainingOptions(flags, config, {
      plan: positionals[0],
      data: (await dataSource(context, 'data')) ?? undefined,
      evalData: (await dataSource(context, 'eval-data')) ?? undefined,
      dtype: flags.choice('dtype', dtypes),
      activations: flags.choice('activations', activationTypes),
    });
    if (merged.plan === undefined)
      throw new UsageError('[cli] the plan to train is missing: elastiform distill <plan>');
    if (merged.data === undefined) throw new UsageError('[cli] the training data is missing: give --data');
    return runTraining(context, 'distill', (hooks) => {
      const start = () => distill({ ...(merged as unknown as DistillConfig), ...hooks });
      return config ? config.blame(overridden, start) : start();
    });
  },
};
