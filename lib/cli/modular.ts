// `elastiform modular`: trains modules that each stand for several layers of an encoder-decoder model.
import { type ModularConfig, type ModularResult, modular } from '../distill/seq2seq/modular.js';
import { assemblyText } from '../elastic/modules.js';
import type { Command } from './command.js';
import { exampleFlags, exampleOptions } from './finetune.js';
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
  },
  example:
    'elastiform modular --from models/phonemes --data words.tsv --held-out 0.02 --granularities 2,3,6 --steps 4000 --out run',
  async run(context) {
    const { flags } = context;
    const config = await readConfig(flags);
    const { merged, overridden } = trainingOptions(flags, config, {
      ...exampleOptions(flags, config),
      from: flags.string('from'),
      granularities: flags.list('granularities')?.map(Number),
    });
    requireSettings(merged, { from: '--from', data: '--data', granularities: '--granularities' });
    return runTraining(context, 'modular', table, (hooks) => {
      const start = () => modular({ ...(merged as unknown as ModularConfig), ...hooks });
      return config ? config.blame(overridden, start) : start();
    });
  },
};

function table({ dir, step, stopped, assemblies = [] }: ModularResult): string {
  if (stopped === 'signal') return `${dir}: ${step} steps (interrupted and saved; run it again to continue)\n`;
  const cells = (layers: string, loss: string, kl: string, accuracy: string, parts: string) =>
    `${layers.padEnd(8)}${loss.padStart(8)}${kl.padStart(12)}${accuracy.padStart(10)}  ${parts}\n`;
  const rows = assemblies.map(({ assembly, loss, divergence, accuracy }) => {
    const layers = `${assembly.encoder.length}+${assembly.decoder.length}`;
    return cells(layers, loss.toFixed(4), divergence.toFixed(4), accuracy.toFixed(4), assemblyText(assembly));
  });
  const head = rows.length > 0 ? cells('layers', 'loss', 'divergence', 'accuracy', '(of held-out tokens)') : '';
  return `${head}${rows.join('')}${dir}: ${step} steps\n`;
}
