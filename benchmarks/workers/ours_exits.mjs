// elastiform's exits: classes of texts by an encoder with random heads after its layers, at each of which as many texts leave.
import path from 'node:path';
import { writeExits } from '../../dist/elastic/elastify.js';
import { measureExit } from '../../dist/elastic/exits.js';
import { loadModel } from '../../dist/index.js';
import { loadAddon } from '../../dist/native/index.js';
import { serve, batch as timed } from '../harness/serve.mjs';
import { ENCODER, writeClassifier } from '../model/encoder.mjs';
import { fill, generator } from '../model/random.mjs';

const RULE = 'margin';

let model;
let texts;
let batch;

/** Thresholds of the exits after all layers but the last, such that at each an equal share of all texts leaves. */
async function thresholds(all) {
  const scores = [];
  for await (const part of model.encoder.exitScores(all, {})) for (const text of part) scores[text.index] = text.scores;
  let staying = scores.map((own) => own.map((values) => measureExit(RULE, values, null).value));
  const leaving = Math.floor(all.length / ENCODER.layers);
  return Array.from({ length: ENCODER.layers - 1 }, (_, exit) => {
    staying.sort((a, b) => b[exit] - a[exit]);
    const threshold = (staying[leaving - 1][exit] + staying[leaving][exit]) / 2;
    staying = staying.slice(leaving);
    return threshold;
  });
}

await serve({
  async load({ dir, threads, ids, length, ...settings }) {
    ({ batch } = settings);
    texts = Array.from({ length: ids.length / length }, (_, i) => ids.slice(i * length, (i + 1) * length));
    const { hidden, layers } = ENCODER;
    const base = path.join(dir, 'base');
    writeClassifier(base);
    const heads = Array.from({ length: layers - 1 }, (_, afterLayer) => {
      const weight = new Float32Array(2 * hidden);
      fill(weight, generator(500 + afterLayer), 0, 0.2);
      return { afterLayer, rule: RULE, threshold: 1, weight, bias: new Float32Array(2) };
    });
    await writeExits(path.join(dir, 'first'), base, heads);
    model = await loadModel(path.join(dir, 'first'), { threads });
    const chosen = await thresholds(texts);
    await model.dispose();
    const exits = heads.map((head, i) => ({ ...head, threshold: chosen[i] }));
    await writeExits(path.join(dir, 'exits'), base, exits);
    model = await loadModel(path.join(dir, 'exits'), { threads });
    const { version, isa, threads: used } = loadAddon().info();
    return { version, isa, threads: used };
  },
  /** FLOPs of all texts, and how many left after each layer. */
  async flops({ exit }) {
    const results = await model.classify(texts, { batch, ...(exit && { exit }) });
    const left = new Array(ENCODER.layers).fill(0);
    for (const { compute } of results) left[compute.exitLayer ?? ENCODER.layers - 1]++;
    return { flops: results.reduce((sum, { compute }) => sum + compute.flops, 0), left };
  },
  async classify({ exit, batchMs }) {
    return timed(batchMs, () => model.classify(texts, { batch, ...(exit && { exit }) }));
  },
});
