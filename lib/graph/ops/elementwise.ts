// Elementwise ops: zeros, add, scale, soft cap, activation and gated activation.
import { InvalidArgumentError } from '../../native/errors.js';
import type { Shape } from '../dims.js';
import type { Graph, Node } from '../graph.js';
import { defineOp } from '../op.js';
import { type Act, activations } from './names.js';
import { dot } from './rows.js';

/** The number of an activation function. */
export function actCode(op: string, act: Act): number {
  const code = activations.indexOf(act);
  if (code < 0) throw new InvalidArgumentError(`[${op}] act must be one of ${activations.join(', ')}, got ${act}`);
  return code;
}

const zerosOp = defineOp('zeros', '-> y:f32[*X]');

/** Zeros of a shape. */
export function zeros(graph: Graph, shape: Shape): Node {
  return zerosOp.apply([], [], { graph, whole: shape })[0]!;
}

const addOp = defineOp('add', 'a:f32[*X] b:f32[*X] -> y:f32[*X]', [], {
  gradient({ dy, add }) {
    add(0, dy);
    add(1, dy);
  },
});

/** `a + b`, of one shape. */
export function add(a: Node, b: Node): Node {
  return addOp.apply([a, b])[0]!;
}

const scaleOp = defineOp('scale', 'x:f32[*X] s?:f32[1] -> y:f32[*X]', ['factor'], {
  gradient({ inputs: [x, s], attrs: [factor], dy, needs, add }) {
    add(0, scale(dy, factor, s));
    if (needs(1)) {
      if (x!.shape.length !== 1) throw new InvalidArgumentError('[scale] the gradient of s needs x of rank 1');
      add(1, scale(dot(dy, x!), factor));
    }
  },
});

/**
 * `x * factor * s`, s f32 [1]. Constants are folded: a constant s becomes part of the factor, a constant x gives a
 * constant, and a factor of 1 without s gives x itself.
 */
export function scale(x: Node, factor: number, s: Node | null = null): Node {
  if (s?.leaf?.kind === 'constant') return scale(x, factor * s.leaf.values[0]);
  if (!s && factor === 1) return x;
  if (x.leaf?.kind === 'constant' && (!s || x.leaf.values.length === 1)) {
    const values = [...x.leaf.values];
    if (s) return scale(s, factor * values[0]);
    return x.graph.constant(
      values.map((value) => value * factor),
      x.shape as number[],
    );
  }
  return scaleOp.apply([x, s], [factor])[0]!;
}

const activationOp = defineOp('activation', 'x:f32[*X] -> y:f32[*X]', ['act'], {
  gradient({ inputs: [x], attrs: [act], dy, add }) {
    add(0, activationGradOp.apply([dy, x], [act])[0]!);
  },
});

const activationGradOp = defineOp('activation_grad', 'dy:f32[*X] x:f32[*X] -> dx:f32[*X]', ['act']);

/** `act(x)`. */
export function activation(x: Node, act: Act): Node {
  return activationOp.apply([x], [actCode('activation', act)])[0]!;
}

/** `dy * act'(x)`. */
export function activationGrad(dy: Node, x: Node, act: Act): Node {
  return activationGradOp.apply([dy, x], [actCode('activation_grad', act)])[0]!;
}

const softcapOp = defineOp('softcap', 'x:f32[*X] -> y:f32[*X]', ['cap'], {
  gradient({ inputs: [x], attrs, dy, add }) {
    add(0, softcapGradOp.apply([dy, x], attrs)[0]!);
  },
});

const softcapGradOp = defineOp('softcap_grad', 'dy:f32[*X] x:f32[*X] -> dx:f32[*X]', ['cap']);

/** `cap tanh(x / cap)`, x itself when cap is 0. */
export function softcap(x: Node, cap: number): Node {
  return cap === 0 ? x : softcapOp.apply([x], [cap])[0]!;
}

const gatedActivationOp = defineOp('gated_activation', 'g:f32[*X] u:f32[*X] -> y:f32[*X]', ['act'], {
  gradient({ inputs: [g, u], attrs: [act], dy, add }) {
    const { dg, du } = gatedActivationGrad(dy, g!, u!, activations[act]);
    add(0, dg);
    add(1, du);
  },
});

const gatedActivationGradOp = defineOp(
  'gated_activation_grad',
  'dy:f32[*X] g:f32[*X] u:f32[*X] -> dg:f32[*X] du:f32[*X]',
  ['act'],
);

/** `act(g) * u`. */
export function gatedActivation(g: Node, u: Node, act: Act): Node {
  return gatedActivationOp.apply([g, u], [actCode('gated_activation', act)])[0]!;
}

/** `dg = dy * u * act'(g)`, `du = dy * act(g)`. */
export function gatedActivationGrad(dy: Node, g: Node, u: Node, act: Act): { dg: Node; du: Node } {
  const [dg, du] = gatedActivationGradOp.apply([dy, g, u], [actCode('gated_activation_grad', act)]);
  return { dg: dg!, du: du! };
}
