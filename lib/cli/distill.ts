// `elastiform distill`: trains the routers of a plan by self-distillation.
import { type DistillConfig, distill } from '../distill/distill.js';
import { type LossTerm, lossKinds } from '../distill/objectives.js';
import type { TeacherConfig } from '../distill/teacher.js';
import { activationTypes } from '../native/index.js';
import { type Command, type FlagReader, UsageError } from './command.js';
import { dataSource } from './data.js';
import { dtypes, loadFlags } from './shared.js';
import {
  readConfig,
  runTraining,
  sampleOption,
  trainingFlags,
  trainingOptions,
  trainingOutcome,
  widthFlags,
} from './training.js';

/** `kl=0.5` or `kl`. */
function lossTerm(text: string): LossTerm {
  const [kind, weight = '1', ...rest] = text.split('=');
  if (!lossKinds.includes(kind as LossTerm['kind']) || !(Number(weight) > 0) || rest.length > 0) {
    const known = lossKinds.join(', ');
    throw new UsageError(`[cli] --loss must list terms with positive weights, KIND=WEIGHT of ${known}; got '${text}'`);
  }
  return { kind, weight: Number(weight) } as LossTerm;
}

function teacherOf(flags: FlagReader): TeacherConfig | undefined {
  const [model, dir] = [flags.string('teacher'), flags.string('teacher-cache')];
  if (model !== undefined && dir !== undefined)
    throw new UsageError('[cli] give --teacher or --teacher-cache, not both');
  if (model !== undefined) return { kind: 'model', model };
  return dir === undefined ? undefined : { kind: 'cache', dir };
}

export const distillCommand: Command = {
  name: 'distill',
  summary: 'Train the routers of a plan so that the routed model imitates its own full self. Ctrl-C saves.',
  positionals: '[plan]',
  flags: {
    ...trainingFlags,
    loss: {
      type: 'string',
      value: 'TERM=W,...',
      help: 'terms and their weights, 1 if none is given: kl=1,topk-bce=0.1; see docs/distillation.md',
    },
    teacher: {
      type: 'string',
      value: 'DIR',
      help: 'another model of the same tokenizer (default: the full model itself)',
    },
    'teacher-cache': { type: 'string', value: 'DIR', help: 'what cache-teacher wrote for the same data' },
    dtype: { type: 'string', value: 'f32|bf16|f16', help: 'storage of the frozen weights while training' },
    activations: loadFlags.activations,
    ...widthFlags,
  },
  example: 'elastiform distill runs/plan -c examples/recipes/distill.yaml --data train.txt --steps 400 --out runs/tiny',
  async run(context) {
    const { flags, positionals } = context;
    const config = await readConfig(flags);
    const { merged, overridden } = trainingOptions(flags, config, {
      plan: positionals[0],
      data: (await dataSource(context, 'data')) ?? undefined,
      evalData: (await dataSource(context, 'eval-data')) ?? undefined,
      loss: flags.list('loss')?.map(lossTerm),
      teacher: teacherOf(flags),
      dtype: flags.choice('dtype', dtypes),
      activations: flags.choice('activations', activationTypes),
      sample: sampleOption(flags),
    });
    if (merged.plan === undefined)
      throw new UsageError('[cli] the plan to train is missing: elastiform distill <plan>');
    if (merged.data === undefined) throw new UsageError('[cli] the training data is missing: give --data');
    return runTraining(context, 'distill', trainingOutcome, (hooks) => {
      const start = () => distill({ ...(merged as unknown as DistillConfig), ...hooks });
      return config ? config.blame(overridden, start) : start();
    });
  },
};
