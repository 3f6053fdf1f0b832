// `elastiform inspect`: what is in a model directory.
import { axes, axisTraits, meanCapacity, specByAxis } from '../elastic/axes.js';
import { exitText } from '../elastic/exits.js';
import { settingsText, stacks } from '../elastic/modules.js';
import { meanWidth } from '../elastic/nested.js';
import { type ElasticPolicy, routedLayers, type SourceTokens } from '../elastic/policy.js';
import { loadModel } from '../infer/model.js';
import type { Network } from '../infer/network.js';
import type { ModelInfo } from '../infer/types.js';
import { Checkpoint } from '../io/safetensors.js';
import type { Command } from './command.js';
import { columns } from './progress.js';
import { percent } from './shared.js';

export const inspect: Command = {
  name: 'inspect',
  summary: 'Show the architecture, size, tokenizer, routers and levels of a model directory.',
  positionals: '<model>',
  flags: {},
  example: 'elastiform inspect models/tiny',
  async run({ positionals, json, print, printJson, signal }) {
    const [dir] = positionals;
    await using model = await loadModel(dir, { signal });
    const { info, loaded } = model;
    using checkpoint = Checkpoint.open(dir);
    const stored = [...new Set(checkpoint.names().map((name) => checkpoint.info(name).dtype))].sort();
    const parameters = `${info.parameters.toLocaleString('en-US')} stored as ${stored.join(', ')}`;
    if ('settings' in loaded) {
      const { spec, settings, sourceTokenizer, tokenizer, policy } = loaded;
      const { encoder, decoder } = spec;
      const vocabOf = (side: typeof tokenizer) => side && { vocab: side.vocabSize };
      if (json) {
        const tokenizers = { source: vocabOf(sourceTokenizer), target: vocabOf(tokenizer) };
        const { beams, lengthPenalty, earlyStopping } = settings;
        printJson({
          ...info,
          dir,
          stored,
          encoderLayers: encoder.layers,
          tokenizers,
          beams,
          lengthPenalty,
          earlyStopping,
        });
        return 0;
      }
      const side = ({ layers, ffn, heads, headDim }: typeof decoder) =>
        `${layers} layers, FFN ${ffn}, ${heads} heads of ${headDim}`;
      const { modules } = info;
      const how = [
        sourceTokenizer ? '' : ', no tokenizer.json',
        tokenizer !== sourceTokenizer ? ', targets with a tokenizer of their own' : '',
      ];
      print(
        columns([
          ['architecture', `${info.architecture}, hidden ${info.hidden}`],
          ['task', info.task],
          ['encoder', side(encoder)],
          ['decoder', `${side(decoder)}, and as many that read the source`],
          ['parameters', parameters],
          ['vocabulary', `${info.vocab}${how.join('')}`],
          ['context', `${info.maxContext} of ${info.maxPositions} positions, for sources and for targets`],
          ...(modules ? stacks.map((stack) => [`modules, ${stack}`, modules[stack].join(', ') || 'none']) : []),
          ...(policy?.sourceTokens
            ? [
                [
                  'routers',
                  `${sourceText(policy.sourceTokens)}, ${info.routerParameters.toLocaleString('en-US')} parameters`,
                ],
              ]
            : []),
          ...elasticParts(policy).map((part) => ['elastic', part]),
          ...(policy?.lora ? [['corrections', `rank ${policy.lora.rank} of ${policy.lora.targets.join(', ')}`]] : []),
          ['search', settings.beams > 1 ? `${settings.beams} beams` : 'greedy'],
        ]).replaceAll(/(?<=\S) {2,}/g, '  '),
      );
      if (info.levels.length > 0) print(assemblyLevels(info));
      return 0;
    }
    if (!('routers' in loaded)) {
      const { pooling, normalize, tokenizer, policy } = loaded;
      if (json)
        printJson({ ...info, dir, stored, tokenizer: tokenizer && { vocab: tokenizer.vocabSize }, pooling, normalize });
      else {
        print(
          columns([
            ['architecture', `${info.architecture}: ${info.layers} layers, hidden ${info.hidden}, FFN ${info.ffn}`],
            ['task', [info.task, ...(info.labels.length > 0 ? [`classes ${info.labels.join(', ')}`] : [])].join(': ')],
            ['attention', `${info.heads} heads of ${loaded.spec.headDim}, both ways`],
            ['parameters', parameters],
            ['vocabulary', `${info.vocab}${tokenizer ? '' : ', no tokenizer.json'}`],
            ['context', `${info.maxContext} of ${info.maxPositions} positions`],
            ['vectors', `${pooling} of the features${normalize ? ', normalised' : ''}`],
            ['elastic', ['no', ...elasticParts(policy)].slice(policy ? 1 : 0).join(', ')],
          ]).replaceAll(/(?<=\S) {2,}/g, '  '),
        );
        print(levelTable(info, loaded));
      }
      return 0;
    }
    const network = loaded;
    const { headDim, perLayer } = network.spec;
    const cached = perLayer.filter(({ keysOf }) => keysOf === null).length;
    const cacheBytes = cached * 2 * info.maxContext * info.kvHeads * headDim * 4;
    const tokenizer = network.tokenizer && {
      vocab: network.tokenizer.vocabSize,
      bosId: network.tokenizer.bosId,
      eosId: network.tokenizer.eosId,
    };
    if (json) {
      printJson({ ...info, dir, stored, tokenizer, cacheBytes });
      return 0;
    }
    const { policy } = network;
    const routers = info.routerParameters > 0;
    const state = !info.elastic ? 'no' : policy!.calibration || !routers ? 'yes' : 'yes, routers not trained yet';
    const parts = [...(routers ? [`${info.routerParameters} router parameters`] : []), ...elasticParts(policy)];
    print(
      columns([
        ['architecture', `${info.architecture}: ${info.layers} layers, hidden ${info.hidden}, FFN ${info.ffn}`],
        ['attention', `${info.heads} heads of ${network.spec.headDim}, ${info.kvHeads} key/value heads`],
        ['parameters', parameters],
        ['vocabulary', `${info.vocab}${tokenizer ? '' : ', no tokenizer.json'}`],
        [
          'context',
          `${info.maxContext} of ${info.maxPositions} positions, ${(cacheBytes / 2 ** 20).toFixed(1)} MiB of cache`,
        ],
        ['elastic', [state, ...parts].join(', ')],
      ]).replaceAll(/(?<=\S) {2,}/g, '  '),
    );
    print(levelTable(info, network));
    return 0;
  },
};

/** The levels of a model with modules, after an empty line. */
function assemblyLevels({ levels }: ModelInfo): string {
  const rows = levels.map(({ name, spec }) => [name, settingsText(spec) || 'all layers']);
  return `\n${columns([['level', 'parts'], ...rows])}`;
}

/** Which tokens are routed in an encoder, and for which shares. */
const sourceText = ({ capacity }: SourceTokens): string => {
  const each = Object.entries(capacity).map(([place, [low, high]]) => `${place} (${percent(low)} to ${percent(high)})`);
  return `tokens of the encoder into ${each.join(', ')}`;
};

/** What is elastic besides routers. */
function elasticParts(policy: ElasticPolicy | null): string[] {
  const { nested, exits } = policy ?? {};
  return [
    ...(nested ? [`feed-forwards nested at ${nested.granularities.map((s) => percent(s)).join(', ')}`] : []),
    ...(exits ? [`exits after layers ${exits.map(({ afterLayer }) => afterLayer).join(', ')}`] : []),
  ];
}

/** The levels of a model, after an empty line; nothing where there are none. */
function levelTable({ levels }: ModelInfo, { policy, spec }: Pick<Network, 'policy' | 'spec'>): string {
  if (!policy || levels.length === 0) return '';
  const routed = axes.filter((axis) => routedLayers(policy, axis).length > 0);
  const title = [
    ...['level', 'FLOPs', ...routed.map((axis) => axisTraits[axis].column)],
    ...(policy.nested ? ['FFN width'] : []),
    ...(policy.exits ? ['exits'] : []),
  ];
  const rows = levels.map((level) => [
    level.name,
    level.flopsRatio === undefined ? '' : percent(level.flopsRatio),
    ...routed.map((axis) => percent(meanCapacity(specByAxis(level.spec)[axis] ?? 1))),
    ...(policy.nested ? [percent(meanWidth(level.spec, policy.nested, spec))] : []),
    ...(policy.exits ? [level.spec.exit ? exitText(level.spec.exit) : 'none'] : []),
  ]);
  return `\n${columns([title, ...rows])}`;
}
