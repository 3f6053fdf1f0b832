// `elastiform finetune`: trains an encoder on labelled texts, or an encoder-decoder model on pairs.
import { classMetrics, type Metric, numberMetrics } from '../distill/encoder/classifier.js';
import { type FinetuneConfig, finetune } from '../distill/encoder/finetune.js';
import { type Command, type FlagReader, UsageError } from './command.js';
import { type ConfigFile, isMapping } from './config.js';
import { readConfig, runTraining, trainingFlags, trainingOptions, trainingOutcome } from './training.js';

/** Flags of commands that train on labelled texts. */
export const exampleFlags = {
  ...trainingFlags,
  data: { type: 'string', value: 'FILE,...', help: '.tsv files (GLUE) or .jsonl files of labelled texts, or of pairs' },
  field: {
    type: 'string',
    value: 'NAME',
    help: 'column or field of the text (default: sentence in .tsv, text in .jsonl; of pairs: source)',
  },
  'pair-field': { type: 'string', value: 'NAME', help: 'that of a second text (default: none)' },
  'label-field': {
    type: 'string',
    value: 'NAME',
    help: 'that of the label, or of the target of a pair (default: label; target)',
  },
  columns: { type: 'string', value: 'NAME,...', help: 'columns of .tsv files whose first line does not name them' },
  'bad-rows': {
    type: 'string',
    value: 'stop|skip',
    help: 'at a bad row: stop, or leave it out and count it (default: stop)',
  },
  metric: {
    type: 'string',
    value: [...classMetrics, ...numberMetrics].join('|'),
    help: 'of held-out rows, decides which weights are kept (default: accuracy, or pearson)',
  },
} as const;

export const finetuneCommand: Command = {
  name: 'finetune',
  summary:
    'Train an encoder to tell classes of texts or numbers, or an encoder-decoder model to write targets, and write its directory. Ctrl-C saves.',
  positionals: '',
  flags: {
    ...exampleFlags,
    from: { type: 'string', value: 'DIR', help: 'model to start from, instead of a model in the --config file' },
    task: { type: 'string', value: 'classification|regression', help: 'what is told (default: classification)' },
    labels: { type: 'string', value: 'NAME,...', help: 'names of the classes by number (default: those of the data)' },
  },
  example:
    'elastiform finetune --from models/minilm --data train.tsv --eval-data dev.tsv --labels bad,good --steps 2000 --out models/sst2',
  async run(context) {
    const { flags } = context;
    const config = await readConfig(flags);
    const { merged, overridden } = trainingOptions(flags, config, {
      ...exampleOptions(flags, config),
      from: flags.string('from'),
      task: flags.choice('task', ['classification', 'regression']),
      labels: flags.list('labels'),
    });
    if (merged.data === undefined)
      throw new UsageError('[cli] data is missing: give --data or a --config file that has it');
    if (merged.from === undefined && merged.model === undefined)
      throw new UsageError('[cli] a model is missing: give --from, or model and tokenizer in the --config file');
    return runTraining(context, 'finetune', trainingOutcome, (hooks) => {
      const start = () => finetune({ ...(merged as unknown as FinetuneConfig), ...hooks });
      return config ? config.blame(overridden, start) : start();
    });
  },
};

/** Options of the API that `exampleFlags` give, beside those of all training. */
export function exampleOptions(flags: FlagReader, config: ConfigFile | null): Record<string, unknown> {
  return {
    data: exampleSource(flags, 'data', config),
    evalData: exampleSource(flags, 'eval-data', config),
    badRows: flags.choice('bad-rows', ['stop', 'skip']),
    metric: flags.choice<Metric>('metric', [...classMetrics, ...numberMetrics]),
  };
}

/** The files of a flag, or those of the configuration file, with the flags that say where texts and labels are. */
export function exampleSource(
  flags: FlagReader,
  flag: 'data' | 'eval-data',
  config: ConfigFile | null,
): object | undefined {
  const files = flags.list(flag);
  const fields = {
    field: flags.string('field'),
    pairField: flags.string('pair-field'),
    labelField: flags.string('label-field'),
    columns: flags.list('columns'),
  };
  const given = Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
  if (!files) {
    const own = config?.content[flag === 'data' ? 'data' : 'evalData'];
    return isMapping(own) && Object.keys(given).length > 0 ? { ...own, ...given } : undefined;
  }
  const kinds = new Set(
    files.map((file) => (file.endsWith('.tsv') ? 'tsv' : file.endsWith('.jsonl') ? 'jsonl' : file)),
  );
  const [kind] = kinds;
  if (kinds.size > 1 || (kind !== 'tsv' && kind !== 'jsonl'))
    throw new UsageError(`[cli] --${flag} must list .tsv files or .jsonl files, got '${files.join(',')}'`);
  if (kind === 'jsonl' && fields.columns) throw new UsageError('[cli] --columns is for .tsv files');
  return { kind, files, ...given };
}
