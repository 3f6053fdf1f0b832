// What exits save of an encoder's time, beside what they save of its FLOPs: as many texts leave after every layer.
import fs from 'node:fs';
import path from 'node:path';
import { roundRobin, warmUp } from '../harness/measure.mjs';
import { milliseconds, number, table, target } from '../harness/report.mjs';
import { ENCODER } from '../model/encoder.mjs';
import { tokens } from '../model/random.mjs';

const SETTING = { texts: 192, length: 64, batch: 64 };
const QUICK = { texts: 24, length: 8, batch: 8 };

export async function exits({ start, threads, rounds, repeats, quick, cache, log }) {
  const setting = quick ? QUICK : SETTING;
  const { texts, length, batch } = setting;
  const dir = path.join(cache, `exits-${process.pid}`);
  fs.mkdirSync(dir, { recursive: true });
  const child = start('elastiform', 'ours_exits.mjs');
  try {
    log('exits: writing the model');
    const ids = [...tokens(texts * length, ENCODER.vocab, 11)];
    const facts = await child.ask('load', { dir, threads, ids, length, batch });
    const contestants = [false, true].map((exit) => ({
      key: exit ? 'exits' : 'all layers',
      ...{ child, command: 'classify', args: { exit } },
    }));
    await warmUp(contestants);
    const counted = {};
    for (const { key, args } of contestants) counted[key] = await child.ask('flops', args);
    log('exits: timing');
    const times = await roundRobin(contestants, { rounds, repeats, batchMs: quick ? 0 : 1000 });
    const saved = {
      flops: 1 - counted.exits.flops / counted['all layers'].flops,
      time: 1 - times.exits.median / times['all layers'].median,
    };
    return {
      libraries: { elastiform: facts },
      data: { model: ENCODER, ...setting, counted, times, saved },
      text: table(
        [
          `${texts} texts of ${length} tokens, ${batch} at a time`,
          'ms: median (range)',
          'GFLOP',
          'left after layer 0, 1, ...',
        ],
        Object.entries(times).map(([key, time]) => [
          ...[key, milliseconds(time), number(counted[key].flops / 1e9, 1), counted[key].left.join(', ')],
        ]),
      ),
      targets: [target('time that exits save over FLOPs that they save', 0.85, saved.time / saved.flops)],
    };
  } finally {
    await child.stop();
    fs.rmSync(dir, { recursive: true, force: true });
  }
}
