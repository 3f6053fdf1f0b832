// `elastiform modular`: trains modules that each stand for several layers of an encoder-decoder model.
import { type ModularConfig, type ModularResult, modular } from '../distill/seq2seq/modular.js';
import { settingsText } from '../elastic/modules.js';
import { unitScores } from '../elastic/nested.js';
import type { TrainCapacity } from '../elastic/recipes.js';
import { type Command, type FlagReader, UsageError } from './command.js';
import { loraFlags, nestedFlags, nestingFlags } from './elastify.js';
import { exampleFlags, exampleOptions } from './finetune.js';
import { parseCapacity } from './shared.js';
import { readConfig, requireSettings, runTraining, trainingOptions } from './training.js';

const { metric: _, 'pair-field': __, ...flags } = exampleFlags;

export const modularCommand: Command = {
  name: 'modular',
  summary:
    'Train modules of an encoder-decoder model, one layer for several, that assemblies of any speed are made of. Ctrl-C saves.',
  positionals: '',
  flags: {
    ...flags,
    from: { type: 'string', value: 'DIR', help: 'encoder-decoder model that does its task; `finetune` makes one' },
    granularities: { type: 'string', value: 'N,...', help: 'how many consecutive layers a module stands for' },
    ...nestingFlags,
    rank: {
      type: 'string',
      value: unitScores.join('|'),
      help: 'with --nested: units by importance, the first in every width (default: activation)',
    },
    ...loraFlags,
    attn: {
      type: 'string',
      value: 'C|LOW:HIGH',
      help: "train routers, too: share of a source's tokens that enter the encoder's attention",
    },
    mlp: { type: 'string', value: 'C|LOW:HIGH', help: 'the same of its feed-forwards' },
  },
  example:
    'elastiform modular --from models/phonemes --data words.tsv --held-out 0.02 --granularities 2,3,6 --steps 4000 --out run\n  elastiform modular --from models/phonemes --data words.tsv --granularities 2,3 --lora 8 --nested 0.5,1 --epochs 5 --out run',
  async run(context) {
    const { flags } = context;
    const config = await readConfig(flags);
    const { merged, overridden } = trainingOptions(flags, config, {
      ...exampleOptions(flags, config),
      from: flags.string('from'),
      granularities: flags.list('granularities')?.map(Number),
      nested: nestedFlags(flags) ?? undefined,
      lora: loraOption(flags),
      tokens: tokensOption(flags),
    });
    requireSettings(merged, { from: '--from', data: '--data', granularities: '--granularities' });
    return runTraining(context, 'modular', table, (hooks) => {
      const start = () => modular({ ...(merged as unknown as ModularConfig), ...hooks });
      return config ? config.blame(overridden, start) : start();
    });
  },
};

function tokensOption(flags: FlagReader): { attn?: TrainCapacity; mlp?: TrainCapacity } | undefined {
  const shares = Object.entries({ attn: parseCapacity(flags, 'attn'), mlp: parseCapacity(flags, 'mlp') });
  const given = shares.filter(([, share]) => share !== undefined);
  return given.length > 0 ? Object.fromEntries(given) : undefined;
}

function loraOption(flags: FlagReader): { rank: number; targets?: string[] } | undefined {
  const rank = flags.integer('lora', { min: 1 });
  const targets = flags.list('lora-targets');
  if (rank === undefined && targets) throw new UsageError('[cli] --lora-targets needs --lora');
  return rank === undefined ? undefined : { rank, ...(targets && { targets: [...targets] }) };
}

function table({ dir, step, stopped, assemblies = [] }: ModularResult): string {
  if (stopped === 'signal') return `${dir}: ${step} steps (interrupted and saved; run it again to continue)\n`;
  const cells = (layers: string, loss: string, kl: string, accuracy: string, parts: string) =>
    `${layers.padEnd(8)}${loss.padStart(8)}${kl.padStart(12)}${accuracy.padStart(10)}  ${parts}\n`;
  const rows = assemblies.map(({ loss, divergence, accuracy, ...settings }) => {
    const { encoder, decoder } = settings.assembly;
    const layers = `${encoder.length}+${decoder.length}`;
    return cells(layers, loss.toFixed(4), divergence.toFixed(4), accuracy.toFixed(4), settingsText(settings));
  });
  const head = rows.length > 0 ? cells('layers', 'loss', 'divergence', 'accuracy', '(of held-out tokens)') : '';
  return `${head}${rows.join('')}${dir}: ${step} steps\n`;
}
