// What the claims of modules are measured by: stock checkpoints of some layers, words written, and layers dropped and trained.
import { mkdirSync } from 'node:fs';
import os from 'node:os';
import { join } from 'node:path';
import { BadRows, readExamples } from '../../../dist/distill/encoder/examples.js';
import { encodePairs, lossRows } from '../../../dist/distill/seq2seq/finetune.js';
import { openSeq2Seq, writeSeq2Seq } from '../../../dist/distill/seq2seq/model.js';
import { replacing } from '../../../dist/distill/seq2seq/replacing.js';
import { resolveConfig, train, withLock } from '../../../dist/distill/trainer.js';
import { loadModel } from '../../../dist/index.js';
import { Checkpoint, openSafetensors } from '../../../dist/io/safetensors.js';
import { partId } from '../../../dist/model/parts.js';
import { seq2seqSpecFromConfig } from '../../../dist/model/seq2seq_spec.js';
import { loadSeq2SeqWeights, seq2seqSlots } from '../../../dist/model/seq2seq_weights.js';
import { planOf } from '../../../dist/model/weights.js';
import { Engine } from '../../../dist/native/index.js';

const stacks = ['encoder', 'decoder'];

/** The spans that `count` layers stand for, one after the other and as even as can be; each is kept as its last layer. */
export const evenSpans = (layers, count) =>
  Array.from({ length: count }, (_, i) => {
    const end = (n) => Math.round((n * layers) / count);
    return { first: end(i), last: end(i + 1) - 1 };
  });

/** Parts of spans; of none, all layers as they are. */
const partsOf = (spans, layers) =>
  spans.length > 0 ? spans.map(partId) : Array.from({ length: layers }, (_, i) => `${i}`);

/**
 * Writes a stock checkpoint whose layers are parts of a model: `2`, its layer, or others whose weights `modules` has by
 * `decoder.modules.2-3.`.
 */
export async function writeStock(base, out, assembly, modules = new Map()) {
  const model = await openSeq2Seq('claims', { from: base }, 0);
  const sizes = { encoder_layers: assembly.encoder.length, decoder_layers: assembly.decoder.length };
  const config = JSON.stringify({ ...JSON.parse(model.config), ...sizes }, null, 2);
  const spec = seq2seqSpecFromConfig(JSON.parse(config), base);
  const from = new Map(planOf(seq2seqSlots(model.spec, false)).parameters.map((p) => [p.name, p]));
  const plan = planOf(seq2seqSlots(spec, false));
  const weights = new Float32Array(plan.size);
  for (const { name, offset } of plan.parameters) {
    const [, stack, layer, rest] = /^(encoder|decoder)\.layers\.(\d+)(\..*)$/.exec(name) ?? [];
    const part = stack && assembly[stack][Number(layer)];
    const stored = from.get(stack ? `${stack}.layers.${part}${rest}` : name);
    const own = modules.get(`${stack}.modules.${part}${rest}`);
    weights.set(own ?? model.weights.subarray(stored.offset, stored.offset + stored.size), offset);
  }
  mkdirSync(out, { recursive: true });
  await writeSeq2Seq(out, { spec, ownHead: false, config }, weights, { from: base });
  return out;
}

/** Weights of the modules of a directory that `modular` wrote. */
export function modulesOf(dir) {
  const file = openSafetensors(join(dir, 'elastic_router.safetensors'));
  const weights = new Map(file.names().map((name) => [name, file.tensor(name).readFloat()]));
  file.dispose();
  return weights;
}

/** Trains the layers that are kept of a model, nothing else, with the losses of modules: layer dropping, distilled. */
export async function trainDropped({ from, out, spans, data, evalData, losses, onEvent, signal, ...config }) {
  const settings = { device: 'cpu', seed: 1, ...config };
  return withLock(out, async () => {
    const bad = new BadRows('claims', false);
    const model = await openSeq2Seq('claims', { from }, 0);
    const rows = { train: await readExamples(data, bad), heldOut: await readExamples(evalData, bad) };
    const pairs = await encodePairs('claims', settings, rows, model, bad);
    const resolved = resolveConfig(settings, pairs.data, { batchTokens: 4096, lr: 1e-3, weightDecay: 0.01 });
    const engine = new Engine('cpu');
    const checkpoint = Checkpoint.open(from);
    const loaded = loadSeq2SeqWeights(model.spec, checkpoint);
    const student = await replacing(model.spec, checkpoint, loaded.weights, spans, pairs.data, losses, {
      engine,
      batchTokens: resolved.batchTokens,
    });
    const assembly = Object.fromEntries(
      stacks.map((stack) => [stack, partsOf(spans[stack], model.spec[stack].layers)]),
    );
    const task = {
      ...{ api: 'modular', engine, trainable: student.trainable, data: pairs.data, lossRows },
      identity: { method: 'dropped', from: model.sha256, spans, losses },
      micro: (batch, { total, signal }) => student.run({ assembly }, batch, { weight: 1 / total, signal }),
      async evaluate() {
        const quality = await student.quality({ assembly }, pairs.evalData);
        return { levels: { dropped: { ...quality } }, metric: quality.loss };
      },
    };
    try {
      const { stopped, best } = await train(task, resolved, out, { onEvent, signal });
      return { stopped, loss: best?.metric ?? null, assembly, weights: student.trainable.values() };
    } finally {
      student[Symbol.dispose]();
      for (const owned of [loaded, checkpoint, engine]) owned[Symbol.dispose]();
    }
  });
}

/** Insertions, deletions and substitutions between two lists. */
export function editDistance(a, b) {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++)
      next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1));
    row = next;
  }
  return row[b.length];
}

/**
 * Writes words with a directory at a budget, greedily. A word is right where it is written as any of its pronunciations; its phoneme errors are those
 * towards the nearest one, over that one's length.
 *
 * @returns of every word whether it is right, its errors, and the phonemes of the nearest pronunciation
 */
export async function wordQuality(dir, words, budget = 'full') {
  const model = await loadModel(dir, { device: 'cpu' });
  const written = await Promise.all(
    words.map(({ text }) => model.generate(text, { beams: 1, maxTokens: 30, budget }).text),
  );
  await model.dispose();
  return words.map(({ labels }, i) => {
    const phonemes = written[i].split(' ').filter(Boolean);
    const all = labels.map((label) => {
      const right = label.split(' ');
      return { errors: editDistance(phonemes, right), phonemes: right.length };
    });
    const nearest = all.reduce((a, b) => (b.errors * a.phonemes < a.errors * b.phonemes ? b : a));
    return { right: nearest.errors === 0 ? 1 : 0, ...nearest };
  });
}

/** Milliseconds that all processors were busy, and this process of them. */
const busy = () => {
  const { user, system } = process.cpuUsage();
  const all = os.cpus().reduce((sum, { times }) => sum + times.user + times.nice + times.sys + times.irq, 0);
  return { all, own: (user + system) / 1000, at: performance.now() };
};

/**
 * Times of `generate` for sources one after the other, of each directory in turns with the first: the first one's time in its fastest
 * round over its own, of whole generations (`all`) and of a token (`token`), and its milliseconds for a source. `others` is the share of the processors'
 * time that other processes took meanwhile.
 */
export async function speedUps(dirs, sources, { rounds, maxTokens }) {
  const models = await Promise.all(dirs.map((dir) => loadModel(dir, { device: 'cpu' })));
  const round = async (model) => {
    let [all, decode, tokens] = [0, 0, 0];
    for (const source of sources) {
      const started = performance.now();
      const { compute, outputTokens } = await model.generate(source, { beams: 1, maxTokens }).usage;
      all += performance.now() - started;
      decode += compute.ms.decode;
      tokens += outputTokens;
    }
    return { all, token: decode / tokens };
  };
  const before = busy();
  try {
    const measured = [];
    for (const model of models) {
      await round(model);
      const rows = [];
      for (let r = 0; r < rounds; r++) rows.push({ full: await round(models[0]), own: await round(model) });
      // Other work only ever adds time.
      const least = (of, what) => Math.min(...rows.map((row) => row[of][what]));
      measured.push({
        all: least('full', 'all') / least('own', 'all'),
        token: least('full', 'token') / least('own', 'token'),
        ms: least('own', 'all') / sources.length,
      });
    }
    const after = busy();
    const own = after.own - before.own;
    const others = (after.all - before.all - own) / ((after.at - before.at) * os.cpus().length);
    return { measured, others };
  } finally {
    for (const model of models) await model.dispose();
  }
}

/** Writes a model from scratch, untrained, whose texts do not end. */
export async function writeRandom(out, model, tokenizer) {
  const start = { model: { decoder_start_token_id: 2, ...model }, tokenizer };
  const opened = await openSeq2Seq('claims', start, 1);
  const { eos_token_id: _, forced_eos_token_id: __, ...config } = JSON.parse(opened.config);
  mkdirSync(out, { recursive: true });
  await writeSeq2Seq(out, { ...opened, config: JSON.stringify(config, null, 2) }, opened.weights, start);
  return out;
}
