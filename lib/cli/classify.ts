// `elastiform classify`: the classes of texts.
import type { Command } from './command.js';
import { rowFlags, runRows } from './rows.js';

export const classifyCommand: Command = {
  name: 'classify',
  summary:
    'Tell the classes of texts or pairs of texts with an encoder that has a classifier. One line of JSON a text.',
  positionals: '<model> [text...]',
  flags: rowFlags,
  example:
    'elastiform classify models/sst2 "A joy from start to end."\n  elastiform classify models/sst2 --data reviews.jsonl --bad-rows skip --out classes.jsonl',
  run: (context) =>
    runRows(context, 'classify', async (model, inputs, batch) => {
      const results = await model.classify(inputs, { ...(batch && { batch }), signal: context.signal });
      return results.map(({ label, score, scores, truncated, compute }) => ({
        line: { label, score, scores: Object.fromEntries(scores.map(({ label, score }) => [label, score])) },
        truncated,
        flops: compute.flops,
      }));
    }),
};
