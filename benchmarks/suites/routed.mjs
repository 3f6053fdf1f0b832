// Routing of tokens, heads and blocks at capacity 0.5 against our own dense code: the layers of one kind alone, and the whole
// model; few rows of a sequence that choose blocks together or each by itself; what routers themselves cost; texts at different
// budgets in one run against one after the other.
import { roundRobin } from '../harness/measure.mjs';
import { milliseconds, number, table, target } from '../harness/report.mjs';

const ROWS = 512;
/** Of one sequence, as drafts are verified. */
const FEW = 16;

export async function routed({ start, threads, rounds, repeats, quick, dir, log }) {
  const child = start('elastiform', 'ours.mjs');
  try {
    const libraries = { elastiform: await child.ask('routed', { dir, threads, rows: ROWS, few: FEW }) };
    const data = { rows: ROWS, fewRows: FEW, capacity: 0.5 };
    for (const [what, modes] of [
      ['ffn', ['dense', 'routed', 'blocks', 'many blocks']],
      ['few', ['dense', 'many blocks', 'many blocks, tiles']],
      ['attention', ['dense', 'heads']],
      ['model', ['dense', 'routed', 'routed, all keys', 'heads', 'blocks', 'routers']],
    ]) {
      log(`routed: ${what}`);
      const contestants = modes.map((mode) => ({
        key: mode,
        child,
        command: 'routedRun',
        args: { what, mode },
      }));
      const flops = {};
      for (const c of contestants) flops[c.key] = (await child.ask('routedRun', { ...c.args, batchMs: 0 })).flops;
      const times = await roundRobin(contestants, { rounds, repeats, batchMs: quick ? 0 : 500 });
      data[what] = {
        milliseconds: times,
        flops,
        speedup: Object.fromEntries(modes.slice(1).map((mode) => [mode, times.dense.median / times[mode].median])),
        flopsRatio: Object.fromEntries(modes.slice(1).map((mode) => [mode, flops.dense / flops[mode]])),
      };
    }
    log('routed: mixed budgets');
    const mixed = { texts: 8, length: 64, capacities: [1, 0.8, 0.6, 0.4] };
    const ratios = await child.ask('mixed', mixed);
    const mixedTimes = await roundRobin(
      ['together', 'alone'].map((mode) => ({ key: mode, child, command: 'mixedRun', args: { mode } })),
      { rounds, repeats, batchMs: quick ? 0 : 500 },
    );
    const speedup = mixedTimes.alone.median / mixedTimes.together.median;
    data.mixed = { ...mixed, milliseconds: mixedTimes, ratios, speedup };
    const overhead = 1 / data.model.speedup.routers;
    const saved = (what, mode) => (1 - 1 / data[what].speedup[mode]) / (1 - 1 / data[what].flopsRatio[mode]);
    const rows = [
      ['12 feed-forward layers', 'ffn', 'routed'],
      ['the same, half of 8 blocks of every token', 'ffn', 'blocks'],
      ['the same, half of 16 blocks of every token', 'ffn', 'many blocks'],
      ['12 attention layers, half the heads of every token', 'attention', 'heads'],
      ['whole model, both places', 'model', 'routed'],
      ['the same, rows left out still are keys', 'model', 'routed, all keys'],
      ['half the heads of every token', 'model', 'heads'],
      ['half of 8 FFN blocks of every token', 'model', 'blocks'],
    ];
    const text = table(
      [`${ROWS} rows, capacity 0.5`, 'dense ms', 'routed ms', 'speed-up', 'fewer FLOPs', 'time saved / FLOPs saved'],
      rows.map(([name, what, mode]) => [
        name,
        milliseconds(data[what].milliseconds.dense),
        milliseconds(data[what].milliseconds[mode]),
        number(data[what].speedup[mode], 2),
        number(data[what].flopsRatio[mode], 2),
        number(saved(what, mode), 2),
      ]),
    );
    const fewText = table(
      [`${FEW} rows of one sequence, 12 feed-forward layers, half of 16 blocks`, 'ms', 'speed-up', 'fewer FLOPs'],
      [
        ['dense', 'dense'],
        ['every row chooses by itself', 'many blocks'],
        ['rows of a tile choose together', 'many blocks, tiles'],
      ].map(([name, mode]) => [
        name,
        milliseconds(data.few.milliseconds[mode]),
        number(data.few.speedup[mode] ?? 1, 2),
        number(data.few.flopsRatio[mode] ?? 1, 2),
      ]),
    );
    const routersText = `With a router in every place that lets all rows in, the model takes ${number(overhead, 3)} times as long as without.`;
    const mixedText = table(
      [
        `${mixed.texts} texts of ${mixed.length} tokens, ${mixed.capacities.length} budgets`,
        'ms',
        'share of full FLOPs',
      ],
      [
        ['one after the other', milliseconds(mixedTimes.alone), number(ratios.alone, 3)],
        ['in one call', milliseconds(mixedTimes.together), number(ratios.together, 3)],
        ['speed-up', number(speedup, 2), ''],
      ],
    );
    return {
      libraries,
      data,
      text: `${text}\n\n${fewText}\n\n${routersText}\n\n${mixedText}`,
      targets: [
        target('routed FFN at 0.5 over dense FFN', 1.85, data.ffn.speedup.routed),
        target('routed model at 0.5 over dense prefill', 1.7, data.model.speedup.routed),
        target('time saved over FLOPs saved, half of 8 FFN blocks', 0.85, saved('ffn', 'blocks')),
        target('time saved over FLOPs saved, half of the heads', 0.85, saved('attention', 'heads')),
        target('time with routers that let all in over time without', 1.02, overhead, { most: true }),
      ],
    };
  } finally {
    await child.stop();
  }
}
