// Measures how far the routed model is from the full one on fixed batches, at any capacities.
import { widthDims } from '../elastic/nested.js';
import type { ElasticPolicy } from '../elastic/policy.js';
import type { Program } from '../graph/index.js';
import { batchRun } from './batches.js';
import type { Batch } from './data.js';
import { capacityFeeds, type DistillModel, evalProgram, evenly, teacherProgram } from './steps.js';

export interface Divergence {
  /** Mean KL divergence from the full model, nats per token. */
  kl: number;
  /** Share of tokens whose most likely successor is the full model's. */
  agree: number;
}

/** Runs the full model once per batch, when first asked, and keeps its hidden states. */
export class DivergenceProbe implements Disposable {
  readonly tokens: number;
  private readonly program: Program;
  private readonly policy: ElasticPolicy;
  private hidden: Float32Array[] | null = null;

  constructor(
    private readonly model: DistillModel,
    private readonly batches: readonly Batch[],
  ) {
    this.policy = model.policy;
    this.tokens = batches.reduce((sum, batch) => sum + batch.ids.length, 0);
    this.program = evalProgram(model);
  }

  /**
   * @param capacities one per router, in the order of execution; rows are chosen by top-k
   * @param widths of `widthDims`; default all whole
   */
  async measure(
    capacities: readonly number[],
    signal?: AbortSignal,
    widths: Readonly<Record<string, number>> = widthDims(this.policy.nested, null, this.model.spec.ffn),
  ): Promise<Divergence> {
    this.hidden ??= await this.teach(signal);
    const total = { kl: 0, agree: 0 };
    const whole = evenly();
    for (const [i, batch] of this.batches.entries()) {
      const { dims, feeds } = batchRun(batch);
      const { outputs } = await this.program.run({
        dims: { ...dims, ...widths },
        feeds: {
          ...feeds,
          ...capacityFeeds(this.policy, dims.segments, (router) => capacities[router], whole),
          teacher: this.hidden[i],
          weight: new Float32Array(dims.rows).fill(1 / this.tokens),
        },
        signal,
      });
      total.kl += outputs.kl[0];
      total.agree += outputs.agree[0];
    }
    return total;
  }

  private async teach(signal?: AbortSignal): Promise<Float32Array[]> {
    using program = teacherProgram(this.model);
    const hidden: Float32Array[] = [];
    for (const batch of this.batches) {
      const { outputs } = await program.run({ ...batchRun(batch), signal });
      hidden.push(outputs.hidden as Float32Array);
    }
    return hidden;
  }

  [Symbol.dispose](): void {
    this.program.dispose();
  }
}
