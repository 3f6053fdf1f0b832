// `elastiform cost-eff`: gives a fine-tuned classifier exits and makes it slim.
import { type CostEffConfig, type CostEffModel, type CostEffResult, costEff } from '../distill/encoder/cost_eff.js';
import type { Command } from './command.js';
import { isMapping } from './config.js';
import { exampleFlags, exampleOptions } from './finetune.js';
import { readConfig, requireSettings, runTraining, trainingOptions } from './training.js';

const { steps: _, lr: __, ...flags } = exampleFlags;

export const costEffCommand: Command = {
  name: 'cost-eff',
  summary:
    'Give a fine-tuned classifier an exit after every layer and make it slim, in stages (COST-EFF). Ctrl-C saves; the same command goes on.',
  positionals: '',
  flags: {
    ...flags,
    from: { type: 'string', value: 'DIR', help: 'classifier to start from; `finetune` makes one' },
    heads: { type: 'string', value: 'N', help: 'heads of attention that are left in a layer' },
    ffn: { type: 'string', value: 'N', help: 'units of the feed-forward that are left in a layer' },
    rank: { type: 'string', value: 'N', help: 'rank of the embeddings of tokens (default: they stay whole)' },
    allocation: {
      type: 'string',
      value: 'uniform|importance',
      help: 'as many in every layer, or on average, the most important ones (default: uniform)',
    },
    calibration: {
      type: 'string',
      value: 'exits|classifier',
      help: 'importance by the losses of all exits, or of the classifier (default: exits)',
    },
  },
  example:
    'elastiform cost-eff --from models/sst2 --data train.tsv --eval-data dev.tsv --heads 2 --ffn 512 --rank 128 --out models/sst2-slim',
  async run(context) {
    const { flags } = context;
    const config = await readConfig(flags);
    const { merged, overridden } = trainingOptions(flags, config, {
      ...exampleOptions(flags, config),
      from: flags.string('from'),
      allocation: flags.choice('allocation', ['uniform', 'importance']),
      calibration: flags.choice('calibration', ['exits', 'classifier']),
    });
    const sizes = Object.fromEntries(
      (['heads', 'ffn', 'rank'] as const).flatMap((name) => {
        const value = flags.integer(name, { min: 1 });
        return value === undefined ? [] : [[name, value]];
      }),
    );
    if (Object.keys(sizes).length > 0) merged.target = { ...(isMapping(merged.target) ? merged.target : {}), ...sizes };
    requireSettings(merged, { from: '--from', data: '--data', target: '--heads and --ffn' });
    return runTraining(context, 'cost-eff', table, (hooks) => {
      const start = () => costEff({ ...(merged as unknown as CostEffConfig), ...hooks });
      return config ? config.blame([...overridden, 'target'], start) : start();
    });
  },
};

function table({ dir, stopped, metric, full, assistant, slim }: CostEffResult): string {
  if (stopped === 'signal' || !full || !assistant || !slim)
    return `${dir}: interrupted and saved; run it again to continue\n`;
  const inner = assistant.quality.length - 1;
  const row = (name: string, { parameters, flops, quality }: CostEffModel) =>
    [
      name.padEnd(14),
      parameters.toLocaleString('en-US').padStart(13),
      (flops / 1e6).toFixed(1).padStart(9),
      quality.map((value) => value.toFixed(4).padStart(8)).join(''),
    ].join('');
  const layers = Array.from({ length: inner + 1 }, (_, i) => (i < inner ? `exit ${i}` : 'all').padStart(8)).join('');
  return [
    `${''.padEnd(14)}${'parameters'.padStart(13)}${'MFLOPs'.padStart(9)}${layers}   (${metric}, held-out texts)`,
    row('as it was', { ...full, quality: [...new Array<number>(inner).fill(Number.NaN), full.quality] }).replaceAll(
      '     NaN',
      '       -',
    ),
    row('with exits', assistant),
    row('slim', slim),
    `${dir}/model: slim, with exits; ${dir}/assistant: all of the width, with exits`,
    '',
  ].join('\n');
}
