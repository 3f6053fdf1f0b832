// `elastiform profile`: times of a model's levels on this device, kept in its directory.
import { routerPlaces } from '../elastic/policy.js';
import { writeProfile } from '../elastic/profile.js';
import { loadModel } from '../infer/model.js';
import { isEncoder, profile } from '../infer/profile.js';
import { type Command, UsageError } from './command.js';
import { dataFlags, documentsOf } from './data.js';
import { columns, Progress } from './progress.js';
import { loadFlags, loadOptions } from './shared.js';

export const profileCommand: Command = {
  name: 'profile',
  summary:
    'Time prompts and tokens, or texts of an encoder, at every level on this device; kept in the model for budgets.',
  positionals: '<model>',
  flags: {
    context: { type: 'string', value: 'N,...', help: 'lengths in tokens (default: 16,128,512, as the context holds)' },
    batch: { type: 'string', value: 'N,...', help: 'numbers of prompts to time in one run, besides one alone' },
    ...dataFlags,
    ...loadFlags,
  },
  example: 'elastiform profile runs/nested --context 16,128 --batch 4',
  async run(context) {
    const { flags, positionals, json, print, printJson, signal } = context;
    const [lengths, batches] = ['context', 'batch'].map((name) =>
      flags.numbers(name, 'positive integers', (n) => Number.isSafeInteger(n) && n > 0),
    );
    const documents = await documentsOf(context, 'data');
    await using model = await loadModel(positionals[0], loadOptions(context));
    const encodes = isEncoder(model);
    const { policy, tokenizer, spec, dir } = encodes ? model.encoder.network : model.network;
    if (!policy)
      throw new UsageError(`[cli] ${dir} has one level, the full model: there is nothing to choose by times`);
    if (!documents && (routerPlaces(policy).length > 0 || policy.exits)) {
      throw new UsageError('[cli] what routers let in, and texts that leave at exits, depend on the text: give --data');
    }
    // Without them times do not depend on the text. An encoder's has special tokens at its ends.
    const texts = documents && encodes ? [documents.join(' ')] : documents;
    const ids = texts?.flatMap((text) => tokenizer!.encode(text)) ?? [Math.min(1, spec.vocab - 1)];
    const progress = new Progress('profile');
    const times = await profile(model, {
      ...{ ids, signal, ...(lengths && { lengths }), ...(batches && { batches }) },
      onProgress: progress.phase,
    }).finally(() => progress.finish());
    const path = await writeProfile(dir, times);
    if (json) printJson({ ...times, path });
    else {
      const ms = (list: readonly number[]) => list.map((t) => t.toFixed(2));
      const { levels, batches: together = [] } = times;
      print(
        columns([
          ['level', 'prompts', 'milliseconds', ...times.lengths.map((n) => `${n} tokens`)],
          ...levels.flatMap(({ level, prefillMs, decodeMs }) => [
            [level, '1', decodeMs ? 'prompt' : 'text', ...ms(prefillMs)],
            ...(decodeMs ? [[level, '1', 'next token', ...ms(decodeMs)]] : []),
            ...together
              .filter((b) => b.level === level)
              .map((b) => [level, `${b.batch}`, 'prompts', ...ms(b.prefillMs)]),
          ]),
        ]),
      );
      print(`\nRecorded ${path}\n`);
    }
    return 0;
  },
};
