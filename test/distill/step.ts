// One step of training a golden model, for gradients and counters.
import { batchRun } from '../../lib/distill/batches.js';
import { lossFeeds, resolveLosses } from '../../lib/distill/objectives.js';
import { trainablePlan } from '../../lib/distill/plan.js';
import { capacityFeeds, trainProgram } from '../../lib/distill/steps.js';
import { Trainable } from '../../lib/distill/trainable.js';
import { type ElastiformerRecipe, policyOf } from '../../lib/elastic/elastify.js';
import type { ElasticPolicy } from '../../lib/elastic/policy.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { loadWeights } from '../../lib/model/weights.js';
import { Engine } from '../../lib/native/index.js';
import { readSpec } from '../model/golden.js';

const batch = {
  ids: Int32Array.from({ length: 24 }, (_, i) => (i * 11 + 3) % 29),
  positions: Int32Array.from({ length: 24 }, (_, i) => i % 12),
  targets: new Int32Array(24).fill(-1),
  offsets: Int32Array.of(0, 12, 24),
};

/** The KL of one step, and the gradient of the routers, which lie in `values`. */
export async function trainStep(
  directory: string,
  recipe: Partial<ElastiformerRecipe>,
  values?: Float32Array,
  capacity = 0.5,
) {
  const spec = readSpec(directory);
  const policy = policyOf({ kind: 'elastiformer', ...recipe }, spec) as ElasticPolicy;
  using checkpoint = Checkpoint.open(directory);
  using loaded = loadWeights(spec, checkpoint);
  using engine = new Engine();
  using trainable = new Trainable(trainablePlan(policy, spec));
  const start = values ?? Float32Array.from({ length: trainable.plan.size }, (_, i) => 0.1 * Math.sin(1.7 * i));
  trainable.params.write(start);
  const model = { spec, weights: loaded.weights, policy, trainable, engine, batchTokens: 24 };
  const losses = resolveLosses([{ kind: 'kl', weight: 1 }], spec);
  using program = trainProgram(model, losses);
  const { dims, feeds } = batchRun(batch);
  const { outputs, counters } = await program.run({
    dims,
    feeds: {
      ...feeds,
      ...capacityFeeds(policy, dims.segments, () => capacity),
      ...lossFeeds(losses, policy, batch, { step: 0, steps: 1, total: 24, capacity: () => capacity }),
    },
  });
  return { kl: outputs.kl[0], gradient: trainable.grads.readFloat(), start, counters, plan: trainable.plan };
}
