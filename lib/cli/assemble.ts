// `elastiform assemble`: chooses layers and modules of a modular model, and writes them as a stock checkpoint.
import { settingsText } from '../elastic/modules.js';
import { type AssemblyCost, assemble } from '../infer/export/assemble.js';
import type { Command } from './command.js';
import { columns, Progress } from './progress.js';
import { loadFlags, loadOptions, percent } from './shared.js';

const { adapter: _, ...deviceFlags } = loadFlags;

export const assembleCommand: Command = {
  name: 'assemble',
  summary:
    'Choose layers and modules of an encoder-decoder model by speed, size, measured time or by name, show what they cost, and write them as a stock checkpoint.',
  positionals: '<model>',
  flags: {
    speedup: {
      type: 'string',
      value: 'X',
      help: 'expected to write one text so many times as fast; the decoder shrinks first',
    },
    size: { type: 'string', value: 'SHARE', help: 'at most this share of the parameters; both stacks shrink' },
    'latency-ms': { type: 'string', value: 'MS', help: 'at most so long, measured here; the decoder shrinks first' },
    encoder: { type: 'string', value: '0,1,2-3', help: 'parts by name (default: all layers)' },
    decoder: { type: 'string', value: '0-5', help: 'the same of the decoder' },
    width: { type: 'string', value: 'SHARE|UNITS', help: 'of nested feed-forwards (default: all units)' },
    attn: {
      type: 'string',
      value: 'SHARE',
      help: "of a source's tokens into the encoder's attention, for --save-level",
    },
    mlp: { type: 'string', value: 'SHARE', help: 'the same of its feed-forwards' },
    'source-tokens': { type: 'string', value: 'N', help: 'tokens that a typical generation reads (default: 64)' },
    'target-tokens': { type: 'string', value: 'N', help: 'tokens that it writes (default: 64)' },
    measure: { type: 'boolean', help: 'measure the time of every assembly of the path' },
    record: { type: 'boolean', help: 'measure, and keep the times in the model for budgets such as 20ms' },
    'save-level': { type: 'string', value: 'NAME', help: 'keep the chosen assembly in the model as a level' },
    out: { type: 'string', short: 'o', value: 'DIR', help: 'write the chosen assembly as a stock checkpoint' },
    ...deviceFlags,
  },
  example:
    'elastiform assemble runs/modular --speedup 2 --out runs/fast\n  elastiform assemble runs/modular --decoder 0-1,2-3,4-5 --save-level half\n  elastiform assemble runs/modular --latency-ms 20',
  async run(context) {
    const { flags, positionals, json, print, printJson } = context;
    const progress = new Progress('assemble');
    const shares = { attn: flags.number('attn', { min: 0, max: 1 }), mlp: flags.number('mlp', { min: 0, max: 1 }) };
    const given = Object.entries(shares).filter(([, share]) => share !== undefined);
    const wishes = {
      speedup: flags.number('speedup', { min: 1 }),
      size: flags.number('size', { min: 0, max: 1 }),
      latencyMs: flags.number('latency-ms', { min: 0 }),
      encoder: flags.list('encoder'),
      decoder: flags.list('decoder'),
      ffnWidth: flags.number('width', { min: 0 }),
      tokenCapacity: given.length > 0 ? Object.fromEntries(given) : undefined,
      sourceTokens: flags.integer('source-tokens', { min: 1 }),
      targetTokens: flags.integer('target-tokens', { min: 1 }),
      saveLevel: flags.string('save-level'),
      out: flags.string('out'),
    };
    const result = await assemble(positionals[0], {
      ...Object.fromEntries(Object.entries(wishes).filter(([, value]) => value !== undefined)),
      ...{ measure: flags.boolean('measure'), record: flags.boolean('record') },
      ...loadOptions(context),
      onProgress: progress.phase,
    }).finally(() => progress.finish());
    if (json) {
      printJson(result);
      return 0;
    }
    const { path, chosen, written } = result;
    const onPath = path.includes(chosen!);
    print(table(chosen && !onPath ? [...path, chosen] : path, chosen));
    if (chosen && flags.has('save-level')) print(`\nSaved as level ${flags.string('save-level')}\n`);
    if (written) {
      const { dir, bytes, texts, largestDifference, loadsIn } = written;
      const exact = 'and their logits are those of the assembly';
      const near = `are those of the assembly, and logits differ by at most ${largestDifference.toExponential(1)}, as corrections were merged`;
      print(
        `\n${dir}: ${(bytes / 2 ** 20).toFixed(1)} MiB; ${texts} of 3 greedy texts ${largestDifference === 0 ? exact : near}\nLoads in ${loadsIn.join(', ')}\n`,
      );
    } else if (chosen) {
      const { assembly, ffnWidth } = chosen;
      const budget = { assembly, ...(ffnWidth < 1 && { ffnWidth }), tokenCapacity: wishes.tokenCapacity };
      print(`\nRun it: elastiform generate ${positionals[0]} --prompt TEXT --budget '${settingsText(budget)}'\n`);
    }
    return 0;
  },
};

/** Assemblies with their costs; the chosen one is marked. */
function table(path: readonly AssemblyCost[], chosen: AssemblyCost | null): string {
  const timed = path.some(({ ms }) => ms !== null);
  const narrow = path.some(({ ffnWidth }) => ffnWidth < 1);
  const title = [
    '',
    'encoder',
    'decoder',
    ...(narrow ? ['FFN units'] : []),
    'parameters',
    'FLOPs',
    'expected',
    ...(timed ? ['ms', 'measured'] : []),
  ];
  const rows = path.map((cost) => {
    const { assembly, ffnWidth, parameters, flopsRatio, speedup, ms } = cost;
    const times = ms === null ? ['', ''] : [ms.toFixed(2), `${(path[0].ms! / ms).toFixed(2)}x`];
    return [
      cost === chosen ? '>' : '',
      ...[assembly.encoder.join(','), assembly.decoder.join(','), ...(narrow ? [percent(ffnWidth)] : [])],
      parameters.toLocaleString('en-US'),
      ...[percent(flopsRatio), `${speedup.toFixed(2)}x`, ...(timed ? times : [])],
    ];
  });
  return columns([title, ...rows]);
}
