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
      ['plain', null, null],
      ...[1, 2, 4, 8, 'auto'].map((count) => [`good, ${count}`, 'good', count]),
      ['useless, auto', 'useless', 'auto'],
    ].map(([key, draft, count]) => ({ key, child, command: 'decode', args: { draft, count } }));
    await warmUp(contestants);
    const acceptance = {};
    for (const { key, args } of contestants) {
      ({ acceptance: acceptance[key] } = await child.ask('decode', { ...args, batchMs: 0 }));
    }
    const times = await roundRobin(contestants, { rounds, repeats, batchMs: quick ? 0 : 1500 });
    const speedup = Object.fromEntries(contestants.map(({ key }) => [key, times.plain.median / times[key].median]));
    const text = table(
      ['draft, tokens', 'ms per token', 'speed-up', 'accepted'],
      contestants.map(({ key }) => [
        ...[key, milliseconds(times[key]), number(speedup[key], 2)],
        acceptance[key] === null ? '-' : `${number(100 * acceptance[key])} %`,
      ]),
    );
    return {
      libraries: { elastiform: facts },
      data: { ...SETTING, draftRatio, milliseconds: times, acceptance, speedup },
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
