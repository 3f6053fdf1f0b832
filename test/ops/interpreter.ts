// Runs a graph in float64 by the references of its ops: no addon, no lowering.
import type { Dim } from '../../lib/graph/dims.js';
import type { Graph, Node } from '../../lib/graph/graph.js';
import type { Tensor } from '../../lib/native/index.js';
import { f64, type Reference, references, type Value } from './reference.js';

export interface Environment {
  dims: Record<string, number>;
  feeds: Record<string, Value>;
  /** Contents of bound tensors; those of state are changed by the run. */
  tensors: Map<Tensor, Value>;
  /** References to use in place of the usual ones, by op name. */
  override?: Record<string, Reference>;
}

/** Computes every node of the graph, in the order of its steps. */
export function interpret(graph: Graph, env: Environment): (node: Node) => Value {
  const sizes = new Map<Dim, number>();
  for (const [name, dim] of graph.dims) sizes.set(dim, env.dims[name]);
  const values = new Map<Node, Value>();
  const value = (node: Node): Value => {
    if (node.leaf?.kind === 'alias') return value(node.leaf.of);
    if (node.leaf?.kind === 'feed') return env.feeds[node.name];
    if (node.leaf?.kind === 'constant') return f64(node.shape as number[], node.leaf.values);
    if (node.leaf) return env.tensors.get(node.leaf.tensor) as Value;
    return values.get(node) as Value;
  };
  for (const step of graph.steps) {
    const shapes = step.outputs.map(
      (node) => node?.shape.map((size) => (typeof size === 'number' ? size : (sizes.get(size) ?? Number.NaN))) ?? null,
    );
    const reference = env.override?.[step.op] ?? references[step.op];
    const outputs = reference(
      step.inputs.map((node) => node && value(node)),
      step.attrs,
      shapes,
    );
    step.outputs.forEach((node, i) => {
      const output = outputs[i];
      if (!node || !output) return;
      values.set(node, output);
      node.shape.forEach((size, axis) => {
        if (typeof size !== 'number' && size.kind === 'produced') sizes.set(size, output.shape[axis]);
      });
    });
  }
  return value;
}
