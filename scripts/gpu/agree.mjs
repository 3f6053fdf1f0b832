// Compares a device with the CPU on a small model of random weights: logits, and the gradients of a training step of its
// routers: node agree.mjs [--device cuda] [--tokens 128].
import { parseArgs } from 'node:util';
import { fill, generator } from '../../benchmarks/model/random.mjs';
import { batchInputs, batchRun } from '../../dist/distill/batches.js';
import { lossFeeds, resolveLosses } from '../../dist/distill/objectives.js';
import { trainablePlan } from '../../dist/distill/plan.js';
import { capacityFeeds, trainProgram } from '../../dist/distill/steps.js';
import { Trainable } from '../../dist/distill/trainable.js';
import { policyOf } from '../../dist/elastic/elastify.js';
import { Graph, Program } from '../../dist/graph/index.js';
import { decoder, logits } from '../../dist/model/decoder.js';
import { specFromConfig } from '../../dist/model/spec.js';
import { bindWeights, weightsByName } from '../../dist/model/weights.js';
import { Engine, Tensor } from '../../dist/native/index.js';

// Of the largest magnitude. bf16 has 8 significant bits, which eight layers add up; rows near a threshold then change
// sides, so that gradients can only be asked for their direction.
const TOLERANCE = { f32: { logits: 1e-4, gradients: 1e-3 }, bf16: { logits: 0.02, cosine: 0.97 } };

const { values } = parseArgs({
  options: { device: { type: 'string', default: 'cuda' }, tokens: { type: 'string', default: '128' } },
});
const rows = Number(values.tokens);
// Of the shape of models/tiny, which would be a twelfth of a bundle that is meant to be small.
const config = {
  ...{ model_type: 'llama', vocab_size: 2048, hidden_size: 128, intermediate_size: 352, num_hidden_layers: 8 },
  ...{ num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 512, tie_word_embeddings: true },
};
const spec = specFromConfig(config, 'agree.mjs');

// Two sequences of ids that spread over the vocabulary.
const half = rows >> 1;
const batch = {
  ids: Int32Array.from({ length: rows }, (_, i) => (i * 7919 + 13) % spec.vocab),
  positions: Int32Array.from({ length: rows }, (_, i) => i % half),
  targets: new Int32Array(rows).fill(-1),
  offsets: Int32Array.of(0, half, rows),
};
const policy = policyOf({ kind: 'elastiformer', tokens: { attn: 0.5, mlp: 0.5 } }, spec);

/** The same values at every call; matrices are packed as `dtype`. */
function randomWeights(dtype) {
  const next = generator(1);
  const tensors = [];
  const weights = weightsByName(spec, (_, shape) => {
    const values = new Float32Array(shape.reduce((product, n) => product * n, 1));
    fill(values, next, shape.length === 1 ? 1 : 0, 0.1);
    const tensor = Tensor.fromData('f32', shape, values);
    if (shape.length === 2) tensor.setPackAs(dtype);
    tensors.push(tensor);
    return tensor;
  });
  return { weights, tensors };
}

/** Logits of all rows, and the loss and gradients of one step, on an engine that then ends. */
async function compute(engine, dtype) {
  const { weights, tensors } = randomWeights(dtype);
  const graph = new Graph();
  const { rows: _, segments: __, ...inputs } = batchInputs(graph, rows);
  const nodes = bindWeights(graph, weights);
  graph.output('logits', logits(graph, spec, nodes, decoder(graph, spec, nodes, inputs)));
  const forward = Program.compile(graph, engine);
  const { dims, feeds } = batchRun(batch);
  const result = { logits: (await forward.run({ dims, feeds })).outputs.logits };

  const trainable = new Trainable(trainablePlan(policy, spec));
  trainable.params.write(Float32Array.from({ length: trainable.plan.size }, (_, i) => 0.02 * Math.sin(0.7 * i)));
  const losses = resolveLosses([{ kind: 'kl', weight: 1 }], spec);
  const step = trainProgram({ spec, weights, policy, trainable, engine, batchTokens: rows }, losses);
  const capacity = () => 0.5;
  const { outputs } = await step.run({
    dims,
    feeds: {
      ...feeds,
      ...capacityFeeds(policy, dims.segments, capacity),
      ...lossFeeds(losses, policy, batch, { step: 0, steps: 1, total: rows, capacity }),
    },
  });
  result.loss = outputs.loss[0];
  result.gradients = trainable.grads.readFloat();
  for (const owned of [forward, step, trainable, engine, ...tensors]) owned.dispose();
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

function cosine(a, b) {
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    ab += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  return ab / Math.sqrt(aa * bb);
}

let failed = 0;
function report(text, ok) {
  console.log(`  ${text}: ${ok ? 'agree' : 'DISAGREE'}`);
  if (!ok) failed++;
}
// Weights are stored as activations are: then bf16 is the way over tensor cores.
for (const dtype of ['f32', 'bf16']) {
  try {
    const want = await compute(new Engine('cpu'), dtype);
    const have = await compute(new Engine(values.device, { activations: dtype }), dtype);
    console.log(`${values.device}, weights and activations in ${dtype}: loss ${have.loss}, on the CPU ${want.loss}`);
    const { logits: most, gradients: mostGradients, cosine: least } = TOLERANCE[dtype];
    const off = difference(have.logits, want.logits);
    report(`logits differ by ${off.toExponential(1)} of the largest`, off <= most);
    const gradientsOff = difference(have.gradients, want.gradients);
    const angle = cosine(have.gradients, want.gradients);
    report(
      `gradients differ by ${gradientsOff.toExponential(1)} of the largest, cosine ${angle.toFixed(4)}`,
      mostGradients === undefined ? angle >= least : gradientsOff <= mostGradients,
    );
  } catch (error) {
    failed++;
    console.log(`${values.device}, ${dtype}: ${error.message}`);
  }
}
process.exitCode = failed ? 1 : 0;
