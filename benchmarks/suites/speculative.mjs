// Speculative decoding against plain decoding, in one process: a good draft with a quarter of every feed-forward, by numbers of
// drafted tokens, and a useless one, which 'auto' has to leave alone.
import { roundRobin, warmUp } from '../harness/measure.mjs';
import { milliseconds, number, table, target } from '../harness/report.mjs';

const SETTING = { width: 0.25, rest: 0.01, prompt: 32, length: 97 };

export async function speculative({ start, threads, rounds, repeats, quick, dir, log }) {
  const child = start('elastiform', 'ours_speculative.mjs');
  try {
    const { draftRatio, ...facts } = await child.ask('load', { dir, threads, ...SETTING });
    log('speculative: decode');
    const contestants = [
      ...[1, 2, 4, 8, 'auto'].map((count) => [`good, ${count}`, 'good', count]),
      ['useless, auto', 'useless', 'auto'],
    ].map(([key, draft, count]) => ({ key, child, command: 'ratio', args: { draft, count } }));
    await warmUp(contestants);
    const acceptance = {};
    for (const { key, args } of contestants) {
      ({ acceptance: acceptance[key] } = await child.ask('ratio', { ...args, batchMs: 0 }));
    }
    const batchMs = quick ? 0 : 3000;
    const { plain } = await roundRobin([{ key: 'plain', child, command: 'plain', args: {} }], {
      rounds,
      repeats,
      batchMs,
    });
    const times = await roundRobin(contestants, { rounds, repeats, batchMs });
    const speedup = Object.fromEntries(contestants.map(({ key }) => [key, 1 / times[key].median]));
    const text = [
      table(
        ['draft, tokens', 'its time over plain decoding: median (range)', 'speed-up', 'accepted'],
        contestants.map(({ key }) => [
          ...[key, `${number(times[key].median, 3)} (${number(times[key].min, 3)} to ${number(times[key].max, 3)})`],
          ...[number(speedup[key], 2), acceptance[key] === null ? '-' : `${number(100 * acceptance[key])} %`],
        ]),
      ),
      `Plain decoding takes ${milliseconds(plain)} ms a token.`,
    ].join('\n\n');
    return {
      libraries: { elastiform: facts },
      data: { ...SETTING, draftRatio, plain, ratios: times, acceptance, speedup },
      text,
      targets: [
        target('speculative decoding, a quarter of the FFN drafting, over plain', 1.15, speedup['good, auto']),
        target('speculative decoding with a useless draft over plain', 0.98, speedup['useless, auto']),
      ],
    };
  } finally {
    await child.stop();
  }
}
