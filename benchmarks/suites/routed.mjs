// Token routing at capacity 0.5 against our own dense code: the feed-forward layers alone, and the whole model.
import { roundRobin } from '../harness/measure.mjs';
import { milliseconds, number, table, target } from '../harness/report.mjs';

const ROWS = 512;

export async function routed({ start, threads, rounds, repeats, quick, dir, log }) {
  const child = start('elastiform', 'ours.mjs');
  try {
    const libraries = { elastiform: await child.ask('routed', { dir, threads, rows: ROWS }) };
    const data = { rows: ROWS, capacity: 0.5 };
    for (const what of ['ffn', 'model']) {
      log(`routed: ${what}`);
      const contestants = ['dense', 'routed'].map((mode) => ({
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
        speedup: times.dense.median / times.routed.median,
        flopsRatio: flops.dense / flops.routed,
      };
    }
    const names = { ffn: '12 feed-forward layers', model: 'whole model, both places' };
    const text = table(
      [`${ROWS} rows, capacity 0.5`, 'dense ms', 'routed ms', 'speed-up', 'fewer FLOPs'],
      Object.entries(names).map(([key, name]) => [
        name,
        milliseconds(data[key].milliseconds.dense),
        milliseconds(data[key].milliseconds.routed),
        number(data[key].speedup, 2),
        number(data[key].flopsRatio, 2),
      ]),
    );
    return {
      libraries,
      data,
      text,
      targets: [
        target('routed FFN at 0.5 over dense FFN', 1.85, data.ffn.speedup),
        target('routed model at 0.5 over dense prefill', 1.7, data.model.speedup),
      ],
    };
  } finally {
    await child.stop();
  }
}
