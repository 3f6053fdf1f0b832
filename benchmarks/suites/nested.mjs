// Nested feed-forwards: a slice against a model that was extracted at its width, and what changing the width between calls takes.
import fs from 'node:fs';
import path from 'node:path';
import { roundRobin, warmUp } from '../harness/measure.mjs';
import { milliseconds, number, table, target } from '../harness/report.mjs';

const WIDTH = 0.25;
const PROMPT = 512;
const LENGTH = 33;
// Of the shipped model, whose calls of one token are short enough for microseconds to show.
const SWITCHED = [0.5, 0.75];
const CALLS = 400;
// Texts that are generated at once, some of each width.
const COUNTS = [8, 32];
const MIXED = { prompt: 32, maxTokens: 32, widths: [0.25, 0.5, 0.75, 1] };

export async function nested({ start, threads, rounds, repeats, quick, cache, dir, log }) {
  const folder = path.join(cache, `nested-${process.pid}`);
  const tiny = path.join(import.meta.dirname, '../../models/tiny');
  const at = (name) => path.join(folder, name);
  const children = {};
  const join = async (name, args) => {
    children[name] = start(name, 'ours_nested.mjs');
    return children[name].ask('load', { threads, ...args });
  };
  fs.mkdirSync(folder, { recursive: true });
  try {
    log('nested: extracting');
    const writer = start('writer', 'ours_nested.mjs');
    await writer.ask('prepare', { dir, widths: [WIDTH], nested: at('nested'), extracted: at('extracted') });
    await writer.ask('prepare', { dir: tiny, widths: SWITCHED, nested: at('tiny') });
    await writer.stop();
    const maxContext = PROMPT + LENGTH;
    const libraries = {
      elastiform: await join('slice', { dir: at('nested'), width: WIDTH, maxContext }),
    };
    await join('extracted', { dir: at('extracted'), width: null, maxContext });
    await join('switching', { dir: at('tiny'), width: null, maxContext: 64 });

    const args = { prefill: { prompt: PROMPT }, decode: { prompt: 32, length: quick ? 3 : LENGTH } };
    const data = { width: WIDTH, prompt: PROMPT };
    for (const phase of ['prefill', 'decode']) {
      log(`nested: ${phase}`);
      const contestants = ['slice', 'extracted'].map((key) => ({
        ...{ key, child: children[key], command: phase, args: args[phase] },
      }));
      await warmUp(contestants);
      data[phase] = await roundRobin(contestants, { rounds, repeats });
    }
    log('nested: changing the width');
    const count = quick ? 8 : CALLS;
    const ways = { 'every call': 1, 'once halfway': count / 2 };
    const contestants = Object.entries(ways).map(([key, hold]) => ({
      ...{ key, child: children.switching, command: 'calls', args: { widths: SWITCHED, hold, count } },
    }));
    await warmUp(contestants);
    for (const { args } of contestants) {
      if (!(await children.switching.ask('calls', args)).same) throw new Error('changing the width allocates memory');
    }
    data.switching = await roundRobin(contestants, { rounds, repeats });

    log('nested: texts of several widths');
    data.mixed = { ...MIXED, ...(quick && { prompt: 8, maxTokens: 4 }), milliseconds: {} };
    const { milliseconds: mixed, ...setting } = data.mixed;
    for (const count of COUNTS) {
      const contestants = [true, false].map((together) => ({
        ...{ key: together ? 'at once' : 'width by width', child: children.slice, command: 'texts' },
        args: { ...setting, count, together },
      }));
      const ids = [];
      for (const { child, command, args } of contestants) ids.push((await child.ask(command, args)).ids.join());
      if (ids[0] !== ids[1]) throw new Error('texts beside others of other widths are not what they are alone');
      mixed[count] = await roundRobin(contestants, { rounds, repeats });
    }
    const gain = (count) => mixed[count]['width by width'].median / mixed[count]['at once'].median;

    const overhead = (phase) => data[phase].slice.median / data[phase].extracted.median;
    const microseconds = 1000 * (data.switching['every call'].median - data.switching['once halfway'].median);
    return {
      libraries,
      data: { ...data, microseconds },
      text: [
        table(
          [`a quarter of the feed-forward`, 'prefill of 512, ms', 'decode, ms per token'],
          ['slice', 'extracted'].map((key) => [key, milliseconds(data.prefill[key]), milliseconds(data.decode[key])]),
        ),
        table(
          [`calls of one token, models/tiny; the width changes`, 'ms per call'],
          Object.keys(ways).map((key) => [key, milliseconds(data.switching[key])]),
        ),
        `A change takes ${number(microseconds)} µs, and leaves no memory allocated.`,
        table(
          [`texts, of ${MIXED.widths.length} widths`, 'at once, ms/token', 'width by width, ms/token', 'times faster'],
          COUNTS.map((count) => [
            ...[count, milliseconds(mixed[count]['at once']), milliseconds(mixed[count]['width by width'])],
            number(gain(count), 2),
          ]),
        ),
      ].join('\n\n'),
      targets: [
        target('prefill of a slice over the extracted model', 1.03, overhead('prefill'), { most: true }),
        target('decode of a slice over the extracted model', 1.03, overhead('decode'), { most: true }),
        target('changing the width between calls', 50, microseconds, { most: true, unit: ' µs' }),
        target(`${COUNTS[0]} texts of ${MIXED.widths.length} widths at once over width by width`, 1.2, gain(COUNTS[0])),
      ],
    };
  } finally {
    for (const child of Object.values(children)) await child.stop();
    fs.rmSync(folder, { recursive: true, force: true });
  }
}
