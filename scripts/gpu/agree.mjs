// Compares a device with the CPU on the tiny model: logits, and the gradients of a training step of its routers:
// node agree.mjs [--device cuda] [--tokens 128].
import fs from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { batchInputs, batchRun } from '../../dist/distill/batches.js';
import { capacityFeeds, routerPlan, trainProgram } from '../../dist/distill/steps.js';
import { Trainable } from '../../dist/distill/trainable.js';
import { policyOf } from '../../dist/elastic/elastify.js';
import { Graph, Program } from '../../dist/graph/index.js';
import { Checkpoint } from '../../dist/io/safetensors.js';
import { decoder, logits } from '../../dist/model/decoder.js';
import { specFromConfig } from '../../dist/model/spec.js';
import { bindWeights, loadWeights } from '../../dist/model/weights.js';
import { Engine } from '../../dist/native/index.js';

// Of the largest magnitude.
const TOLERANCE = { logits: 1e-4, gradients: 1e-3 };

const { values } = parseArgs({
  options: { device: { type: 'string', default: 'cuda' }, tokens: { type: 'string', default: '128' } },
});
const rows = Number(values.tokens);
const dir = path.join(import.meta.dirname, '../../models/tiny');
const configPath = path.join(dir, 'config.json');
const spec = specFromConfig(JSON.parse(fs.readFileSync(configPath, 'utf8')), configPath);
const checkpoint = Checkpoint.open(dir);

// Two sequences of ids that spread over the vocabulary.
const half = rows >> 1;
const batch = {
  ids: Int32Array.from({ length: rows }, (_, i) => (i * 7919 + 13) % spec.vocab),
  positions: Int32Array.from({ length: rows }, (_, i) => i % half),
  targets: new Int32Array(rows).fill(-1),
  offsets: Int32Array.of(0, half, rows),
};
const policy = policyOf({ kind: 'elastiformer', tokens: { attn: 0.5, mlp: 0.5 } }, spec);

/** Logits of all rows, and the loss and gradients of one step, on one engine. */
async function compute(engine) {
  const { weights } = loadWeights(spec, checkpoint, { dtype: 'f32' });
  const graph = new Graph();
  const { rows: _, segments: __, ...inputs } = batchInputs(graph, rows);
  const nodes = bindWeights(graph, weights);
  graph.output('logits', logits(graph, spec, nodes, decoder(graph, spec, nodes, inputs)));
  const forward = Program.compile(graph, engine);
  const { dims, feeds } = batchRun(batch);
  const result = { logits: (await forward.run({ dims, feeds })).outputs.logits };

  const trainable = new Trainable(routerPlan(policy));
  trainable.params.write(Float32Array.from({ length: trainable.plan.size }, (_, i) => 0.02 * Math.sin(0.7 * i)));
  const step = trainProgram({ spec, weights, policy, trainable, engine, batchTokens: rows }, { kl: 1, topkBce: 0 });
  const { outputs } = await step.run({
    dims,
    feeds: {
      ...feeds,
      ...capacityFeeds(policy, dims.segments, () => 0.5),
      weight: new Float32Array(rows).fill(1 / rows),
      share: Float32Array.of(1),
    },
  });
  result.loss = outputs.loss[0];
  result.gradients = trainable.grads.readFloat();
  for (const owned of [forward, step, trainable]) owned.dispose();
  return result;
}

const largest = (list) => list.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
/** NaN when anything is not finite, so that it never looks like agreement. */
function difference(a, b) {
  let most = 0;
  for (let i = 0; i < a.length; i++) {
    const d = Math.abs(a[i] - b[i]);
    if (!(d <= most)) most = d;
    if (Number.isNaN(most)) break;
  }
  return most / largest(b);
}

let failed = 0;
const cpu = new Engine('cpu');
const want = await compute(cpu);
cpu.dispose();
try {
  const engine = new Engine(values.device);
  const have = await compute(engine);
  engine.dispose();
  console.log(`${values.device}: loss ${have.loss}, on the CPU ${want.loss}`);
  const report = (text, off, most) => {
    console.log(`  ${text} differ by ${off.toExponential(1)} of the largest: ${off <= most ? 'agree' : 'DISAGREE'}`);
    if (!(off <= most)) failed++;
  };
  report('logits', difference(have.logits, want.logits), TOLERANCE.logits);
  report('gradients', difference(have.gradients, want.gradients), TOLERANCE.gradients);
} catch (error) {
  failed++;
  console.log(`${values.device}: ${error.message}`);
}
process.exitCode = failed ? 1 : 0;
