// Self-distillation steps of token routers: time and peak memory against torch eager; responsiveness of the event loop.
import path from 'node:path';
import { decode, largest, largestDifference } from '../harness/compare.mjs';
import { median, roundRobin, undisturbed } from '../harness/measure.mjs';
import { mebibytes, milliseconds, number, table, target } from '../harness/report.mjs';
import { tokens } from '../model/random.mjs';
import { SHAPE } from '../model/shape.mjs';

const ROWS = 512;
const LR = 1e-3;
const RECOMPUTING = 'elastiform, recomputing';
// By gates, which decide whether a step runs the full model's layers whoever the teacher is.
const CACHED = [
  ['raw', ['self', 'cache']],
  ['straight-through', ['self', 'model', 'cache']],
];
// Gradients of both implementations must be the same ones; relative to the largest.
const TOLERANCE = 1e-2;

export async function training(context) {
  const { peers, quick, log } = context;
  const libraries = {};
  const data = { rows: ROWS, places: 2 * SHAPE.layers };
  for (const capacity of quick ? [0.5] : [1, 0.5]) {
    log(`train: capacity ${capacity}`);
    data[`capacity ${capacity}`] = await atCapacity(context, capacity, libraries);
  }
  log('train: cached teacher');
  data.cached = await withCache(context, libraries);
  const cell = (capacity, kind) => data[`capacity ${capacity}`]?.[kind] ?? null;
  const half = data['capacity 0.5'];
  const rows = [1, 0.5].flatMap((capacity) => {
    const part = data[`capacity ${capacity}`];
    if (!part) return [];
    return Object.entries(part.milliseconds).map(([name, t]) => [
      capacity,
      name,
      milliseconds(t),
      mebibytes(part.memory[name].peak),
      number(t.median / part.milliseconds.elastiform.median, 2),
      number(part.memory[name].peak / part.memory.elastiform.peak, 2),
    ]);
  });
  const { eventLoop, abort } = half;
  const torchAllRows = data['capacity 1']?.fastestPeer ?? null;
  const againstAllRows = torchAllRows && torchAllRows / half.milliseconds.elastiform.median;
  const work = eventLoop.work ? `; the JavaScript thread itself works ${number(eventLoop.work)} ms of one at most` : '';
  const text = [
    table(
      ['capacity', 'library', 'ms/step: median (range)', 'peak RSS MiB', 'its time / ours', 'its memory / ours'],
      rows,
    ),
    peers.torch.file
      ? `Router gradients at capacity 0.5 differ from torch's by ${half.agreement.gradients.toExponential(1)} of the largest one.`
      : 'torch is missing: gradients were not compared.',
    table(
      ['capacity 0.5, gates', 'teacher on the fly', 'ms/step', 'ms/step with a cache', 'speed-up'],
      Object.entries(data.cached).flatMap(([gate, { milliseconds: times, speedup }]) =>
        Object.keys(speedup).map((teacher) => [
          gate,
          teacher === 'self' ? 'the full model' : 'another of its size',
          milliseconds(times[teacher]),
          milliseconds(times.cache),
          number(speedup[teacher], 2),
        ]),
      ),
    ),
    `While training, the largest gap between ticks of a 1 ms timer is ${number(eventLoop.largest)} ms (99th percentile ${number(eventLoop.p99)} ms, ${eventLoop.ticks} ticks${work}); abort answers after ${number(abort.largest)} ms at most, ${number(abort.median)} ms in the median of ${abort.trials}.`,
  ].join('\n\n');
  return {
    libraries,
    data,
    text,
    targets: [
      target('distillation step, all rows, over torch eager', 1.5, cell(1, 'speedup')),
      target('the same, recomputing layers, over torch eager', 1.5, cell(1, 'leanSpeedup')),
      target('peak memory of that step over torch eager', 0.5, cell(1, 'leanMemory'), { most: true }),
      target("distillation step at capacity 0.5 over torch eager's of all rows", 2, againstAllRows),
      target("distillation step at capacity 0.5 over torch eager's at 0.5", 2, cell(0.5, 'speedup')),
      target('step with a cached teacher over one on the fly, raw gates', 1.3, data.cached.raw.speedup.self),
      target('the same, straight-through gates', 1.3, data.cached['straight-through'].speedup.self),
      target('the same of another model as teacher', 1.3, data.cached['straight-through'].speedup.model),
      target('largest event loop gap while training', 20, eventLoop.largest, { most: true, unit: ' ms' }),
      target('largest abort latency', 100, abort.largest, { most: true, unit: ' ms' }),
    ],
  };
}

// Steps that compare with a cache of the teacher's 64 largest probabilities, against steps that run the teacher.
async function withCache({ start, threads, rounds, repeats, dir, cache }, libraries) {
  const result = {};
  for (const [gate, teachers] of CACHED) {
    const children = {};
    try {
      for (const teacher of teachers) {
        const name = `elastiform, gates ${gate}, teacher ${teacher}`;
        children[teacher] = start(name, 'ours_train.mjs', {});
        const scratch = path.join(cache, `train-${gate}-${teacher}-${process.pid}`);
        const args = { dir, threads, capacity: 0.5, lr: LR, rows: ROWS, gate, teacher, scratch };
        libraries[name] = await children[teacher].ask('train', args);
        await children[teacher].ask('step', {}); // warm-up
      }
      const contestants = Object.entries(children).map(([key, child]) => ({ key, child, command: 'step', args: {} }));
      const milliseconds = await roundRobin(contestants, { rounds, repeats });
      const speedup = (teacher) => milliseconds[teacher].median / milliseconds.cache.median;
      const others = teachers.filter((teacher) => teacher !== 'cache');
      result[gate] = { milliseconds, speedup: Object.fromEntries(others.map((t) => [t, speedup(t)])) };
    } finally {
      for (const child of Object.values(children)) await child.stop();
    }
  }
  return result;
}

async function atCapacity({ start, peers, threads, rounds, repeats, quick, dir, cache, log }, capacity, libraries) {
  const children = {};
  try {
    const args = { dir, threads, capacity, lr: LR, rows: ROWS };
    const join = async (name, file, options, more = {}) => {
      children[name] = start(name, file, options);
      libraries[name] = await children[name].ask('train', { ...args, ...more });
    };
    const ours = (name, more) =>
      join(name, 'ours_train.mjs', {}, { scratch: path.join(cache, `${path.basename(name)}-${process.pid}`), ...more });
    await ours('elastiform');
    if (capacity === 1) await ours(RECOMPUTING, { recompute: true });
    if (peers.torch.file) {
      await join('torch', peers.torch.file, peers.torch.plainOptions);
      await join('torch, memory kept', peers.torch.file, peers.torch.options);
    }
    const ids = [...tokens(ROWS, SHAPE.vocab, 9)];
    const results = {};
    const peakReset = {};
    for (const [name, child] of Object.entries(children)) {
      const { loss, gradients } = await child.ask('gradients', { ids });
      results[name] = { loss, gradients: decode(gradients) };
      peakReset[name] = await child.ask('resetPeak');
      await child.ask('step', { ids }); // warm-up
    }
    let agreement = null;
    if (results.torch && capacity < 1) {
      const [ours, theirs] = [results.elastiform, results.torch];
      agreement = {
        loss: [ours.loss, theirs.loss],
        gradients: largestDifference(ours.gradients, theirs.gradients) / largest(theirs.gradients),
      };
      if (!(agreement.gradients <= TOLERANCE)) {
        throw new Error(`router gradients differ from torch's by ${agreement.gradients} of the largest one`);
      }
    }
    const contestants = Object.entries(children).map(([key, child]) => ({
      key,
      child,
      command: 'step',
      args: { ids },
    }));
    const times = await roundRobin(contestants, { rounds, repeats });
    const memory = {};
    for (const [name, child] of Object.entries(children)) {
      memory[name] = { ...(await child.ask('memory')), sinceFirstStep: peakReset[name] };
    }
    // Each figure against the better of torch's two configurations: one is faster, one is leaner.
    const theirs = Object.keys(times).filter((name) => name.startsWith('torch'));
    const best = (of) => (theirs.length ? Math.min(...theirs.map(of)) : null);
    const fastest = best((name) => times[name].median);
    const leanest = best((name) => memory[name].peak);
    const result = {
      milliseconds: times,
      memory,
      agreement,
      fastestPeer: fastest,
      speedup: fastest && fastest / times.elastiform.median,
      ...(capacity === 1 && {
        leanSpeedup: fastest && fastest / times[RECOMPUTING].median,
        leanMemory: leanest && memory[RECOMPUTING].peak / leanest,
      }),
    };
    if (capacity < 1) {
      log('train: event loop and abort');
      for (const name of theirs) await children[name].stop();
      const seen = await undisturbed([children.elastiform.pid], repeats, () =>
        children.elastiform.ask('eventLoop', { steps: quick ? 2 : 10 }),
      );
      result.eventLoop = { ...seen.result, foreign: seen.foreign };
      const { latencies } = await children.elastiform.ask('abort', {
        ids,
        trials: quick ? 5 : 25,
        within: times.elastiform.median,
      });
      result.abort = {
        trials: latencies.length,
        median: median(latencies),
        largest: Math.max(...latencies),
        samples: latencies,
      };
    }
    return result;
  } finally {
    for (const child of Object.values(children)) await child.stop();
  }
}
