// `elastiform elastify`: attaches untrained routers to a model.
import { elastify } from '../distill/rank.js';
import { granularities, targets } from '../elastic/axes.js';
import { headGroups, type Recipe } from '../elastic/elastify.js';
import { unitScores } from '../elastic/nested.js';
import { attentionKeys, gateModes } from '../elastic/policy.js';
import { readSpec } from '../model/directory.js';
import { projections } from '../model/select.js';
import { deviceChoices } from '../native/index.js';
import { type Command, type FlagReader, UsageError } from './command.js';
import { ConfigFile, isMapping } from './config.js';
import { dataFlags, dataSource } from './data.js';
import { Progress } from './progress.js';
import { loadFlags, parseCapacity, percent } from './shared.js';

/** Nested feed-forwards, but for how their units are ranked. */
export const nestingFlags = {
  nested: {
    type: 'string',
    value: 'SHARE,...,1',
    help: 'nested feed-forwards, which run at any width, with these shares of their units to train at',
  },
  alignment: { type: 'string', value: 'UNITS', help: 'widths are multiples of it (default: up to 64)' },
} as const;

/** Corrections of projections. */
export const loraFlags = {
  lora: { type: 'string', value: 'RANK', help: 'train corrections of this rank' },
  'lora-targets': { type: 'string', value: 'q,v,...', help: `projections to correct, of ${projections.join(', ')}` },
} as const;

export const elastifyCommand: Command = {
  name: 'elastify',
  summary: 'Attach routers to a pretrained model, or nest its feed-forwards, and write the plan that `distill` trains.',
  positionals: '<model>',
  flags: {
    out: { type: 'string', short: 'o', value: 'DIR', help: 'directory to write (required)' },
    recipe: { type: 'string', short: 'r', value: 'FILE', help: 'YAML file with the recipe; flags override it' },
    attn: { type: 'string', value: 'C|LOW:HIGH', help: 'share of tokens to train attention for (default: 0.3:1)' },
    mlp: { type: 'string', value: 'C|LOW:HIGH', help: 'share of tokens to train the FFN for (default: 0.3:1)' },
    target: {
      type: 'string',
      value: targets.join('|'),
      help: 'Router-Tuning: what sequences or tokens run or skip (default: attn)',
    },
    granularity: {
      type: 'string',
      value: granularities.join('|'),
      help: 'Router-Tuning: what is decided about (default: sequence)',
    },
    capacity: {
      type: 'string',
      value: 'C|LOW:HIGH',
      help: 'Router-Tuning: share of sequences or tokens to train for (default: 0.3:1)',
    },
    heads: {
      type: 'string',
      value: headGroups.join('|'),
      help: 'every token uses a share of the heads of attention: each by itself, or as groups that share keys',
    },
    'head-share': { type: 'string', value: 'C|LOW:HIGH', help: 'share of heads to train for (default: 0.3:1)' },
    blocks: { type: 'string', value: 'N', help: 'cut the FFN into N blocks, of which every token uses a share' },
    'block-share': { type: 'string', value: 'C|LOW:HIGH', help: 'share of blocks to train for (default: 0.3:1)' },
    ...nestingFlags,
    rank: {
      type: 'string',
      value: unitScores.join('|'),
      help: 'units by importance, measured on --data, the first in every width (default: none)',
    },
    ...dataFlags,
    device: { ...loadFlags.device, help: 'where to measure it (default: ELASTIFORM_DEVICE, else cpu)' },
    ...loraFlags,
    layers: {
      type: 'string',
      value: 'all|even|0,1,...',
      help: 'layers to route (default: all; of Router-Tuning half of them)',
    },
    keys: {
      type: 'string',
      value: attentionKeys.join('|'),
      help: 'rows that routed attention attends to (default: all; of Router-Tuning selected)',
    },
    gate: { type: 'string', value: 'MODE', help: `${gateModes.join(', ')} (default: straight-through)` },
  },
  example: 'elastiform elastify models/tiny --recipe examples/recipes/tokens.yaml --out runs/plan --mlp 0.3:1',
  async run(context) {
    const { flags, positionals, json, print, printJson, signal } = context;
    const out = flags.required('out', 'the directory to write');
    const file = flags.string('recipe');
    const config = file === undefined ? null : await ConfigFile.read(file, 'recipe');
    const given = recipeFlags(flags);
    const nested = nestedFlags(flags);
    const tuned = tuning.some((key) => given[key] !== undefined);
    const flagged = { kind: nested && !routes(given) ? 'matformer' : tuned ? 'router-tuning' : 'elastiformer' };
    const own: Readonly<Record<string, unknown>> = config?.content ?? flagged;
    const { recipe, overridden } = overlay(own, {
      ...given,
      ...(own.kind === 'matformer' && nested),
    });
    if (given['blocks.share'] !== undefined && (recipe.blocks as { count?: unknown } | null)?.count === undefined) {
      throw new UsageError('[cli] --block-share needs --blocks');
    }
    if (given['lora.targets'] !== undefined && (recipe.lora as { rank?: unknown } | null)?.rank === undefined) {
      throw new UsageError('[cli] --lora-targets needs --lora');
    }
    const recipes = [recipe, ...(nested && own.kind !== 'matformer' ? [{ kind: 'matformer', ...nested }] : [])];
    const calibration = await dataSource(context, 'data');
    const device = flags.choice('device', deviceChoices);
    const progress = new Progress('elastify');
    const write = () =>
      elastify(positionals[0], recipes as unknown as Recipe[], {
        ...{ out, signal, ...(calibration && { calibration }), ...(device && { device }) },
        onProgress: progress.phase,
      }).finally(() => progress.finish());
    const plan = await (config ? config.blame(overridden, write) : write());
    if (json) printJson(plan);
    else {
      for (const warning of plan.warnings) process.stderr.write(`warning: ${warning}\n`);
      print(
        plan.trainableParameters > 0
          ? `${plan.dir}: ${plan.trainableParameters} trainable parameters, ${percent(plan.trainableShare, 4)} of the model. Train them: elastiform distill ${plan.dir} --data FILE --steps N --out DIR\n`
          : `${plan.dir}: runs at any width. ${(await readSpec(plan.dir)).encoder ? `Try one: elastiform embed ${plan.dir} TEXT --budget 0.8` : `See what they are worth: elastiform eval ${plan.dir} --data FILE`}\n`,
      );
    }
    return 0;
  },
};

/** Settings that flags give, by their dotted path in a recipe. */
function recipeFlags(flags: FlagReader): Record<string, unknown> {
  const layers = flags.string('layers');
  return {
    'tokens.attn': parseCapacity(flags, 'attn'),
    'tokens.mlp': parseCapacity(flags, 'mlp'),
    target: flags.choice('target', targets),
    granularity: flags.choice('granularity', granularities),
    capacity: parseCapacity(flags, 'capacity'),
    'heads.group': flags.choice('heads', headGroups),
    'heads.share': parseCapacity(flags, 'head-share'),
    'blocks.count': flags.integer('blocks', { min: 2 }),
    'blocks.share': parseCapacity(flags, 'block-share'),
    'lora.rank': flags.integer('lora', { min: 1 }),
    'lora.targets': flags.list('lora-targets'),
    layers: layers === undefined || layers === 'all' || layers === 'even' ? layers : layerIds(layers),
    keys: flags.choice('keys', attentionKeys),
    gate: flags.choice('gate', gateModes),
  };
}

/** Settings of Router-Tuning alone. */
const tuning = ['target', 'granularity', 'capacity'];
const nestingOnly = ['layers', 'lora.rank', 'lora.targets'];
/** Whether flags ask for routing. */
const routes = (given: Readonly<Record<string, unknown>>): boolean =>
  Object.keys(given).some((key) => given[key] !== undefined && !nestingOnly.includes(key));

/** Settings of nested feed-forwards; null without the flag. */
export function nestedFlags(flags: FlagReader): Record<string, unknown> | null {
  const granularities = flags.numbers('nested', 'shares');
  const rest = { alignment: flags.integer('alignment', { min: 1 }), rank: flags.choice('rank', unitScores) };
  const given = Object.entries(rest).filter(([, value]) => value !== undefined);
  if (!granularities) {
    if (given.length > 0) throw new UsageError(`[cli] --${given[0][0]} needs --nested`);
    return null;
  }
  return { granularities, ...Object.fromEntries(given) };
}

/** A recipe with settings replaced, and the paths of those. A group that is no mapping stays as it is, to be refused. */
function overlay(content: Readonly<Record<string, unknown>>, settings: Readonly<Record<string, unknown>>) {
  const recipe: Record<string, unknown> = { ...content };
  const overridden = Object.keys(settings).filter((path) => settings[path] !== undefined);
  for (const path of overridden) {
    const [group, key] = path.split('.');
    const old = recipe[group];
    if (key === undefined) recipe[group] = settings[path];
    else if (old === undefined || isMapping(old)) recipe[group] = { ...(old ?? {}), [key]: settings[path] };
  }
  return { recipe, overridden };
}

function layerIds(text: string): number[] {
  return text.split(',').map((part) => {
    if (!/^\s*\d+\s*$/.test(part)) throw new UsageError(`[cli] --layers must be all, even or layer ids, got '${text}'`);
    return Number(part);
  });
}
