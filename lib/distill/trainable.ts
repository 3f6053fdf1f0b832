// Trainable parameters as one flat f32 tensor, with its gradient and optimizer moments; parameters are views of it.
import { accumulate, type Graph, gradients, type Node } from '../graph/index.js';
import type { ParameterPlan } from '../model/weights.js';
import { Tensor } from '../native/index.js';

export class Trainable implements Disposable {
  readonly params: Tensor;
  /** Zero between steps: the optimizer clears it. */
  readonly grads: Tensor;
  readonly m: Tensor;
  readonly v: Tensor;
  private readonly views = new Map<string, Tensor>();

  constructor(readonly plan: ParameterPlan) {
    const flat = () => Tensor.alloc('f32', [plan.size]);
    this.params = flat();
    this.grads = flat();
    this.m = flat();
    this.v = flat();
  }

  /** The parameter as a tensor that shares memory with `params`; the same object at every call. */
  view(name: string): Tensor {
    let view = this.views.get(name);
    if (!view) {
      const { offset, shape } = this.plan.parameters.find((p) => p.name === name)!;
      view = this.params.slice(offset, [...shape]);
      this.views.set(name, view);
    }
    return view;
  }

  /** Emits `grads += d loss / d parameter` for every parameter that `learns`; `node` gives the node the loss was built with. */
  accumulateGradients(
    graph: Graph,
    loss: Node,
    node: (name: string) => Node,
    learns: (name: string) => boolean = () => true,
  ): void {
    const grads = graph.state(this.grads, 'grads');
    const parameters = this.plan.parameters.filter(({ name }) => learns(name));
    gradients(
      loss,
      parameters.map((p) => node(p.name)),
      {
        // Rows of a prefix of the columns are as far apart as those of the whole.
        onGradient: (i, gradient) => accumulate(grads, gradient, parameters[i].offset, parameters[i].shape.at(-1)),
      },
    );
  }

  /** A copy of every parameter's values. */
  values(): Map<string, Float32Array> {
    const flat = this.params.readFloat();
    return new Map(this.plan.parameters.map((p) => [p.name, flat.slice(p.offset, p.offset + p.size)]));
  }

  dispose(): void {
    for (const view of this.views.values()) view.dispose();
    for (const tensor of [this.params, this.grads, this.m, this.v]) tensor.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}
