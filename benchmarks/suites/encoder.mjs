// Vectors of 32 texts of 128 tokens by an encoder of MiniLM-L6's shape, after checking that all compute the same ones.
import fs from 'node:fs';
import path from 'node:path';
import { decode, largestDifference } from '../harness/compare.mjs';
import { roundRobin, warmUp } from '../harness/measure.mjs';
import { milliseconds, number, table, target } from '../harness/report.mjs';
import { ATTENTIONS, ENCODER, writeEncoder } from '../model/encoder.mjs';
import { tokens } from '../model/random.mjs';

const BATCH = 32;
const LENGTH = 128;
const TOLERANCE = 1e-4;
// Of one turn; a call takes a fraction of it.
const TURN_MS = 1000;

export async function encoder({ start, peers, threads, rounds, repeats, quick, cache, log }) {
  const dir = path.join(cache, `encoder-${process.pid}`);
  const text = { ids: [...tokens(BATCH * LENGTH, ENCODER.vocab, 7)], length: LENGTH };
  const children = {};
  const libraries = {};
  const join = async (name, file, args) => {
    children[name] = start(name, file);
    libraries[name] = await children[name].ask('load', { dir, threads, ...args });
  };
  try {
    log('encoder: writing the model');
    writeEncoder(dir);
    await join('elastiform', 'ours_encoder.mjs', {});
    if (peers['onnxruntime-node'].file) {
      for (const [attention, file] of Object.entries(ATTENTIONS)) {
        await join(`onnxruntime-node, ${attention}`, 'onnxruntime_encoder.mjs', { file });
      }
    }
    log('encoder: comparing vectors');
    const vectors = {};
    for (const [name, child] of Object.entries(children)) vectors[name] = decode(await child.ask('vectors', text));
    const agreement = Object.fromEntries(
      Object.entries(vectors).map(([name, values]) => [name, largestDifference(values, vectors.elastiform)]),
    );
    for (const [name, difference] of Object.entries(agreement)) {
      if (!(difference <= TOLERANCE))
        throw new Error(`${name} computes something else: vectors differ by ${difference}`);
    }
    const contestants = Object.entries(children).map(([key, child]) => ({ key, child, command: 'embed', args: text }));
    log('encoder: warming up');
    await warmUp(contestants);
    log('encoder: timing');
    const times = await roundRobin(contestants, { rounds, repeats, batchMs: quick ? 0 : TURN_MS });
    const ratio = (name) => times[name].median / times.elastiform.median;
    const others = Object.keys(times).filter((name) => name !== 'elastiform');
    const rows = Object.entries(times).map(([name, time]) => [
      name,
      milliseconds(time),
      number((1000 * BATCH) / time.median, 0),
      number(ratio(name), 2),
      agreement[name].toExponential(1),
    ]);
    return {
      libraries,
      data: { model: ENCODER, batch: BATCH, length: LENGTH, agreement, times },
      text: table(
        [
          `${BATCH} texts of ${LENGTH} tokens`,
          'ms: median (range)',
          'texts/s',
          'its time / ours',
          'largest difference',
        ],
        rows,
      ),
      targets: [
        target(
          'vectors of an encoder over onnxruntime-node',
          1.2,
          others.length > 0 ? Math.min(...others.map(ratio)) : null,
        ),
      ],
    };
  } finally {
    for (const child of Object.values(children)) await child.stop();
    fs.rmSync(dir, { recursive: true, force: true });
  }
}
