// `elastiform classify`: the classes of texts.
import { type ExitRuleName, type ExitSetting, exitRules } from '../elastic/exits.js';
import { type Command, UsageError } from './command.js';
import { rowFlags, runRows } from './rows.js';
import { budgetForms, parseBudget } from './shared.js';

export const classifyCommand: Command = {
  name: 'classify',
  summary:
    'Tell the classes of texts or pairs of texts with an encoder that has a classifier. One line of JSON a text.',
  positionals: '<model> [text...]',
  flags: {
    budget: { type: 'string', short: 'b', value: budgetForms, help: 'what a text may cost (default: full)' },
    exit: {
      type: 'string',
      value: 'RULE:THRESHOLD[:LAYER]|own',
      help: `when texts leave before the last layer: ${exitRules.join(', ')}, and the first layer after which; own: as the model says`,
    },
    ...rowFlags,
  },
  example:
    'elastiform classify models/sst2 "A joy from start to end."\n  elastiform classify models/sst2 --data reviews.jsonl --bad-rows skip --out classes.jsonl\n  elastiform classify runs/sst2-exits --data reviews.jsonl --exit entropy:0.3',
  run(context) {
    const { flags, signal } = context;
    const [asked, rule] = [flags.string('budget'), flags.string('exit')];
    const budget = asked === undefined ? undefined : parseBudget(asked);
    const exit = rule === undefined ? undefined : parseExit(rule);
    return runRows(context, 'classify', async (model, inputs, packing) => {
      const options = { ...(budget !== undefined && { budget }), ...(exit !== undefined && { exit }) };
      const results = await model.classify(inputs, { ...options, ...packing, signal });
      return results.map(({ label, score, scores, truncated, windows, compute }) => {
        const { flops, flopsFull, ratio, exitLayer } = compute;
        const classes = Object.fromEntries(scores.map(({ label, score }) => [label, score]));
        const own = { flops, ratio, ...(exitLayer !== undefined && { exitLayer }) };
        return { line: { label, score, scores: classes, compute: own }, truncated, windows, flops, flopsFull };
      });
    });
  },
};

/** `entropy:0.3`, `patience:2:3`, `own`. */
function parseExit(text: string): ExitSetting {
  if (text === 'own') return true;
  const [rule, threshold, minLayer, ...more] = text.split(':');
  const numbers = [threshold, minLayer ?? '0'].every((part) => part && Number.isFinite(Number(part)));
  if (!exitRules.includes(rule as ExitRuleName) || !numbers || more.length > 0) {
    throw new UsageError(
      `[cli] --exit must be RULE:THRESHOLD or RULE:THRESHOLD:LAYER with a rule of ${exitRules.join(', ')}, or own, got '${text}'`,
    );
  }
  const first = minLayer === undefined ? {} : { minLayer: Number(minLayer) };
  return { rule: rule as ExitRuleName, threshold: Number(threshold), ...first };
}
