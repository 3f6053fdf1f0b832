// `elastiform inspect`: what is in a model directory.
import { axes, axisTraits, meanCapacity, specByAxis } from '../elastic/axes.js';
import { routedLayers } from '../elastic/policy.js';
import { loadModel } from '../infer/model.js';
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
    const { info, network } = model;
    using checkpoint = Checkpoint.open(dir);
    const stored = [...new Set(checkpoint.names().map((name) => checkpoint.info(name).dtype))].sort();
    const cacheBytes = info.layers * 2 * info.maxContext * info.kvHeads * network.spec.headDim * 4;
    const tokenizer = network.tokenizer && {
      vocab: network.tokenizer.vocabSize,
      bosId: network.tokenizer.bosId,
      eosId: network.tokenizer.eosId,
    };
    if (json) {
      printJson({ ...info, dir, stored, tokenizer, cacheBytes });
      return 0;
    }
    const state = !info.elastic ? 'no' : info.calibrated ? 'yes, trained' : 'yes, routers not trained yet';
    print(
      columns([
        ['architecture', `${info.architecture}: ${info.layers} layers, hidden ${info.hidden}, FFN ${info.ffn}`],
        ['attention', `${info.heads} heads of ${network.spec.headDim}, ${info.kvHeads} key/value heads`],
        ['parameters', `${info.parameters.toLocaleString('en-US')} stored as ${stored.join(', ')}`],
        ['vocabulary', `${info.vocab}${tokenizer ? '' : ', no tokenizer.json'}`],
        [
          'context',
          `${info.maxContext} of ${info.maxPositions} positions, ${(cacheBytes / 2 ** 20).toFixed(1)} MiB of cache`,
        ],
        ['elastic', `${state}${info.elastic ? `, ${info.routerParameters} router parameters` : ''}`],
      ]).replaceAll(/(?<=\S) {2,}/g, '  '),
    );
    if (info.levels.length > 0) {
      const { policy } = network;
      const routed = axes.filter((axis) => policy && routedLayers(policy, axis).length > 0);
      print('\n');
      print(
        columns([
          ['level', 'FLOPs', ...routed.map((axis) => axisTraits[axis].column)],
          ...info.levels.map((level) => [
            level.name,
            level.flopsRatio === undefined ? '' : percent(level.flopsRatio),
            ...routed.map((axis) => percent(meanCapacity(specByAxis(level.spec)[axis] ?? 1))),
          ]),
        ]),
      );
    }
    return 0;
  },
};
