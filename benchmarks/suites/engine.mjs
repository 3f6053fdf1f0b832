// Many texts generated at once against one after the other and against node-llama-cpp; keys and values, and times of a long text,
// when half of the layers run no attention.
import { roundRobin, warmUp } from '../harness/measure.mjs';
import { milliseconds, number, table, target } from '../harness/report.mjs';
import { tokens } from '../model/random.mjs';
import { SHAPE } from '../model/shape.mjs';

// One by one a few of the texts will do: they are alike, and times are per token.
const SETTING = { texts: 32, alone: 4, prompt: 32, tokens: 32, context: SHAPE.context, decoded: 16 };
const QUICK = { texts: 4, prompt: 8, tokens: 4, context: 100 };
// Texts part where two tokens are about as likely: rounding, and the other's F16 cache, decide then.
const LEAST_AGREEMENT = 0.9;

export async function engine({ start, peers, threads, rounds, repeats, quick, dir, log }) {
  const { texts, alone, prompt, context, decoded, ...setting } = quick ? { ...SETTING, ...QUICK } : SETTING;
  const prompts = Array.from({ length: texts }, (_, i) => [...tokens(prompt, SHAPE.vocab, 100 + i)]);
  const long = [...tokens(context - decoded - 2, SHAPE.vocab, 99)];
  const children = {};
  try {
    const libraries = {};
    const join = async (name, file) => {
      log(`engine: loading ${name}`);
      children[name] = start(name, file);
      libraries[name] = await children[name].ask('load', { dir, threads, prompts, tokens: setting.tokens, context });
    };
    await join('elastiform', 'ours_engine.mjs');
    if (!peers['node-llama-cpp'].missing) await join('node-llama-cpp', 'llama_engine.mjs');
    const names = Object.keys(children);
    const contestants = names.flatMap((name) =>
      [true, false].map((together) => ({
        key: `${name}, ${together ? 'together' : 'one by one'}`,
        ...{ child: children[name], command: 'generate', args: { together, alone } },
      })),
    );

    log('engine: comparing texts');
    const ids = {};
    for (const { key, child, args } of contestants) ({ ids: ids[key] } = await child.ask('generate', args));
    const ours = ids['elastiform, together'];
    if (ours.slice(0, alone).join() !== ids['elastiform, one by one'].join())
      throw new Error('together the texts are others than alone');
    const agreement = Object.fromEntries(
      Object.entries(ids).map(([key, theirs]) => {
        const firsts = theirs.filter((text, i) => text[0] === ours[i][0]).length / theirs.length;
        if (firsts < LEAST_AGREEMENT)
          throw new Error(`${key} computes something else: ${firsts} of first tokens agree`);
        return [key, firsts];
      }),
    );

    log('engine: generating');
    const times = await roundRobin(contestants, { rounds, repeats });
    log('engine: half the attention');
    const bytes = await children.elastiform.ask('keep', { prompt: long });
    if (bytes.nobody !== 0) throw new Error(`${bytes.nobody} bytes of keys and values belong to nobody`);
    const half = {};
    for (const [command, args] of Object.entries({ read: { prompt: long }, decode: { tokens: decoded } })) {
      const budgets = ['full', 'half', 'no'].map((budget) => ({
        key: budget,
        ...{ child: children.elastiform, command, args: { ...args, budget } },
      }));
      await warmUp(budgets);
      half[command] = await roundRobin(budgets, { rounds, repeats });
    }
    const saved = ({ full, half, no }) => ({
      attention: (full.median - no.median) / full.median, // share of the time
      left: (half.median - no.median) / (full.median - no.median), // of attention's time
      faster: full.median / half.median,
    });
    const skipped = { read: saved(half.read), decode: saved(half.decode) };

    const over = (name) => {
      const [theirs, own] = [times[name], times['elastiform, together']];
      return theirs ? theirs.median / own.median : null;
    };
    const rows = Object.entries(times).map(([key, t]) => [
      ...[key, milliseconds(t), number(1000 / t.median, 1), number(over(key), 2)],
      number(agreement[key], 2),
    ]);
    const text = [
      table(
        [`${texts} texts`, 'ms/token: median (range)', 'tokens/s', 'its time / ours together', 'same first tokens'],
        rows,
      ),
      table(
        [
          `a text of ${long.length}`,
          'reading it, ms: median (range)',
          'ms/token after it: median (range)',
          'bytes of keys and values',
        ],
        Object.keys(half.read).map((budget) => [
          `${budget} attention`,
          ...[milliseconds(half.read[budget]), milliseconds(half.decode[budget]), bytes[budget]],
        ]),
      ),
      table(
        ['half of the attention', 'share of the time that attention takes', 'of it is left', 'times faster'],
        Object.entries(skipped).map(([what, x]) => [
          what === 'read' ? 'reading' : 'decoding',
          ...[number(x.attention, 2), number(x.left, 3), number(x.faster, 2)],
        ]),
      ),
    ].join('\n\n');
    return {
      libraries,
      data: {
        texts,
        alone,
        prompt,
        context,
        decoded,
        ...setting,
        milliseconds: times,
        agreement,
        bytes,
        half,
        skipped,
      },
      text,
      targets: [
        target(`${texts} texts together over one by one`, 3, over('elastiform, one by one')),
        target(`${texts} texts over node-llama-cpp's, together`, 1.3, over('node-llama-cpp, together')),
        target('keys and values with half of the attention over all', 0.525, bytes.half / bytes.full, { most: true }),
        ...Object.entries({ reading: skipped.read, decoding: skipped.decode }).flatMap(([what, { left, faster }]) => [
          target(`${what} ${long.length} tokens: time of half of the attention over all of it`, 0.525, left, {
            most: true,
          }),
          target(`${what} ${long.length} tokens with half of the attention over all`, 1.2, faster),
        ]),
      ],
    };
  } finally {
    for (const child of Object.values(children)) await child.stop();
  }
}
