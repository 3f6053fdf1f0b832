// `elastiform embed`: vectors of texts.
import { poolings } from '../model/encoder.js';
import type { Command } from './command.js';
import { rowFlags, runRows } from './rows.js';
import { budgetForms, parseBudget } from './shared.js';

export const embedCommand: Command = {
  name: 'embed',
  summary: 'Make one vector of every text or pair of texts with an encoder. One line of JSON a text.',
  positionals: '<model> [text...]',
  flags: {
    budget: { type: 'string', short: 'b', value: budgetForms, help: 'what a text may cost (default: full)' },
    pooling: {
      type: 'string',
      value: poolings.join('|'),
      help: "how a vector is made of a text's tokens (default: as the model says, else mean)",
    },
    normalize: { type: 'boolean', help: 'vectors of length 1 (default: as the model says)' },
    dims: { type: 'string', value: 'N', help: 'only the first N features, for models trained so (default: all)' },
    ...rowFlags,
  },
  example:
    'elastiform embed models/minilm "How do I reset it?" "Where is the switch?"\n  elastiform embed models/minilm --data documents.txt --out vectors.jsonl',
  run(context) {
    const { flags, signal } = context;
    const pooling = flags.choice('pooling', poolings);
    const dims = flags.integer('dims', { min: 1 });
    const budget = flags.string('budget');
    const asked = {
      ...(budget !== undefined && { budget: parseBudget(budget) }),
      ...(pooling && { pooling }),
      ...(dims && { dims }),
      ...(flags.boolean('normalize') && { normalize: true }),
    };
    return runRows(context, 'embed', async (model, inputs, packing) => {
      const result = await model.embed(inputs, { ...asked, ...packing, signal });
      const { spaceId, truncated, windows, compute } = result;
      return result.vectors.map((vector, i) => {
        const { flops, flopsFull, ratio } = compute[i];
        const line = { vector: [...vector], spaceId, compute: { flops, ratio } };
        return { line, truncated: truncated[i], windows: windows[i], flops, flopsFull };
      });
    });
  },
};
