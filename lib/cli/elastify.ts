// `elastiform elastify`: attaches untrained routers to a model.
import { type ElastiformerRecipe, elastify, type TrainCapacity } from '../elastic/elastify.js';
import { attentionKeys, gateModes } from '../elastic/policy.js';
import { type Projection, projections } from '../model/select.js';
import { type Command, type FlagReader, UsageError } from './command.js';
import { percent } from './shared.js';

export const elastifyCommand: Command = {
  name: 'elastify',
  summary: 'Attach routers to a pretrained model and write the plan that `distill` trains.',
  positionals: '<model>',
  flags: {
    out: { type: 'string', short: 'o', value: 'DIR', help: 'directory to write (required)' },
    attn: { type: 'string', value: 'C|LOW:HIGH', help: 'share of tokens to train attention for (default: 0.3:1)' },
    mlp: { type: 'string', value: 'C|LOW:HIGH', help: 'share of tokens to train the FFN for (default: 0.3:1)' },
    blocks: { type: 'string', value: 'N', help: 'cut the FFN into N blocks, of which every token uses a share' },
    'block-share': { type: 'string', value: 'C|LOW:HIGH', help: 'share of blocks to train for (default: 0.3:1)' },
    lora: { type: 'string', value: 'RANK', help: 'train corrections of this rank' },
    'lora-targets': { type: 'string', value: 'q,v,...', help: `projections to correct, of ${projections.join(', ')}` },
    layers: { type: 'string', value: 'all|even|0,1,...', help: 'layers to route (default: all)' },
    keys: {
      type: 'string',
      value: attentionKeys.join('|'),
      help: 'rows that routed attention attends to (default: all)',
    },
    gate: { type: 'string', value: 'MODE', help: `${gateModes.join(', ')} (default: straight-through)` },
  },
  example: 'elastiform elastify models/tiny --out runs/plan --mlp 0.3:1',
  async run({ flags, positionals, json, print, printJson }) {
    const out = flags.string('out');
    if (out === undefined) throw new UsageError('[cli] elastify needs --out, the directory to write');
    const attn = capacity(flags, 'attn');
    const mlp = capacity(flags, 'mlp');
    const count = flags.integer('blocks', { min: 2 });
    const share = capacity(flags, 'block-share');
    if (share !== undefined && count === undefined) throw new UsageError('[cli] --block-share needs --blocks');
    const rank = flags.integer('lora', { min: 1 });
    const targets = flags.string('lora-targets')?.split(',') as Projection[] | undefined;
    if (targets && rank === undefined) throw new UsageError('[cli] --lora-targets needs --lora');
    const layers = flags.string('layers');
    const keys = flags.choice('keys', attentionKeys);
    const gate = flags.choice('gate', gateModes);
    const recipe: ElastiformerRecipe = {
      kind: 'elastiformer',
      ...(attn !== undefined || mlp !== undefined
        ? { tokens: { ...(attn !== undefined && { attn }), ...(mlp !== undefined && { mlp }) } }
        : {}),
      ...(count === undefined ? {} : { blocks: { count, ...(share !== undefined && { share }) } }),
      ...(rank === undefined ? {} : { lora: { rank, ...(targets && { targets }) } }),
      ...(layers === undefined ? {} : { layers: layers === 'all' || layers === 'even' ? layers : layerIds(layers) }),
      ...(keys ? { keys } : {}),
      ...(gate ? { gate } : {}),
    };
    const plan = await elastify(positionals[0], recipe, { out });
    if (json) printJson(plan);
    else {
      for (const warning of plan.warnings) process.stderr.write(`warning: ${warning}\n`);
      print(
        `${plan.dir}: ${plan.trainableParameters} trainable parameters, ${percent(plan.trainableShare, 4)} of the model. Train them: elastiform distill ${plan.dir} --data FILE --steps N --out DIR\n`,
      );
    }
    return 0;
  },
};

function capacity(flags: FlagReader, name: string): TrainCapacity | undefined {
  const text = flags.string(name);
  if (text === undefined) return undefined;
  const parts = text.split(':').map((part) => (part.trim() === '' ? Number.NaN : Number(part)));
  if (parts.length > 2 || parts.some(Number.isNaN)) {
    throw new UsageError(`[cli] --${name} must be a share or LOW:HIGH, got '${text}'`);
  }
  return parts.length === 1 ? parts[0] : [parts[0], parts[1]];
}

function layerIds(text: string): number[] {
  return text.split(',').map((part) => {
    if (!/^\s*\d+\s*$/.test(part)) throw new UsageError(`[cli] --layers must be all, even or layer ids, got '${text}'`);
    return Number(part);
  });
}
