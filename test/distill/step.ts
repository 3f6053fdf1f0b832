// One step of training a golden model, for gradients and counters.
import { batchRun } from '../../lib/distill/batches.js';
import { lossFeeds, resolveLosses } from '../../lib/distill/objectives.js';
import { trainablePlan } from '../../lib/distill/plan.js';
import { Random } from '../../lib/distill/random.js';
import { capacityFeeds, noiseFeeds, trainProgram } from '../../lib/distill/steps.js';
import { Trainable } from '../../lib/distill/trainable.js';
import { type ElastiformerRecipe, policyOf, type Recipe, type RouterTuningRecipe } from '../../lib/elastic/elastify.js';
import type { ElasticPolicy } from '../../lib/elastic/policy.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { loadWeights } from '../../lib/model/weights.js';
import { Engine } from '../../lib/native/index.js';
import { readSpec } from '../model/golden.js';

const rows = 24;
const batchOf = (length: number) => ({
  ids: Int32Array.from({ length: rows }, (_, i) => (i * 11 + 3) % 29),
  positions: Int32Array.from({ length: rows }, (_, i) => i % length),
  targets: new Int32Array(rows).fill(-1),
  offsets: Int32Array.from({ length: rows / length + 1 }, (_, s) => s * length),
});

/**
 * The KL of one step, and the gradient of the routers, which lie in `values`.
 *
 * @param length of the sequences
 * @param explore the seed of what is added to scores
 */
export async function trainStep(
  directory: string,
  recipe: Partial<ElastiformerRecipe> | RouterTuningRecipe,
  values?: Float32Array,
  capacity = 0.5,
  { length = 12, explore }: { length?: number; explore?: number } = {},
) {
  const batch = batchOf(length);
  const spec = readSpec(directory);
  const policy = policyOf({ kind: 'elastiformer', ...recipe } as Recipe, spec) as ElasticPolicy;
  using checkpoint = Checkpoint.open(directory);
  using loaded = loadWeights(spec, checkpoint);
  using engine = new Engine();
  using trainable = new Trainable(trainablePlan(policy, spec));
  const start = values ?? Float32Array.from({ length: trainable.plan.size }, (_, i) => 0.1 * Math.sin(1.7 * i));
  trainable.params.write(start);
  const model = { spec, weights: loaded.weights, policy, trainable, engine, batchTokens: 24 };
  const losses = resolveLosses([{ kind: 'kl', weight: 1 }], spec);
  using program = trainProgram(model, losses, { explore: explore !== undefined });
  const { dims, feeds } = batchRun(batch);
  const { outputs, counters } = await program.run({
    dims,
    feeds: {
      ...feeds,
      ...capacityFeeds(policy, dims.segments, () => capacity),
      ...(explore !== undefined && noiseFeeds(policy, dims, new Random(explore, 'noise'))),
      ...lossFeeds(losses, policy, batch, { step: 0, steps: 1, total: 24, capacity: () => capacity }),
    },
  });
  return { kl: outputs.kl[0], gradient: trainable.grads.readFloat(), start, counters, plan: trainable.plan };
}
