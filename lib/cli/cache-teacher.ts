// `elastiform cache-teacher`: writes a model's largest probabilities for data that is trained on.
import { cacheTeacher } from '../distill/cache.js';
import { type Command, UsageError } from './command.js';
import { dataFlags, dataSource } from './data.js';
import { Progress } from './progress.js';
import { loadFlags, loadOptions } from './shared.js';
import { trainingFlags } from './training.js';

const { threads: _, ...engineFlags } = loadFlags;

export const cacheTeacherCommand: Command = {
  name: 'cache-teacher',
  summary: 'Write what a model says of training data, for `distill --teacher-cache`. Run again, it continues.',
  positionals: '<model>',
  flags: {
    ...dataFlags,
    'held-out': { type: 'string', value: 'SHARE', help: 'share of --data that the training holds out' },
    'top-k': { type: 'string', value: 'K', help: 'probabilities kept of every token (default: 64)' },
    out: { type: 'string', short: 'o', value: 'DIR', help: 'directory to write (required)' },
    'batch-tokens': trainingFlags['batch-tokens'],
    'sequence-length': trainingFlags['sequence-length'],
    seed: { type: 'string', value: 'N', help: 'seed of the training, which chooses what is held out' },
    ...engineFlags,
  },
  example: 'elastiform cache-teacher models/tiny --data train.txt --held-out 0.05 --top-k 64 --out runs/teacher',
  async run(context) {
    const { flags, positionals, json, print, printJson } = context;
    const out = flags.required('out', 'the directory to write');
    const data = await dataSource(context, 'data');
    if (!data) throw new UsageError('[cli] the data is missing: give --data');
    const given = {
      heldOut: flags.number('held-out'),
      seed: flags.integer('seed'),
      batchTokens: flags.integer('batch-tokens', { min: 1 }),
      sequenceLength: flags.integer('sequence-length', { min: 2 }),
    };
    const progress = new Progress('cache-teacher');
    try {
      const result = await cacheTeacher({
        model: positionals[0],
        data,
        out,
        topK: flags.integer('top-k', { min: 1 }) ?? 64,
        ...Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)),
        ...loadOptions(context),
        onProgress: (done, total) => progress.update({ done, total, facts: ['tokens'] }),
      });
      progress.finish();
      if (json) printJson(result);
      else print(`${result.dir}: ${result.tokens} tokens in ${result.shards} files\n`);
    } finally {
      progress.finish();
    }
    return 0;
  },
};
