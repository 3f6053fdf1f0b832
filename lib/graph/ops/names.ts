// The names by which ops are told what to compute, in the order of the native code.

export const activations = ['none', 'gelu_tanh', 'gelu', 'silu', 'relu'] as const;
/** Name of an activation function: gelu_tanh is the tanh form, gelu the exact one. */
export type Act = (typeof activations)[number];

export const divergenceKinds = ['kl', 'reverse-kl', 'jsd'] as const;
/**
 * How far a student's distribution is from a teacher's p: `kl` KL(p || q), `reverse-kl` KL(q || p), `jsd` the generalised
 * Jensen-Shannon divergence.
 */
export type DivergenceKind = (typeof divergenceKinds)[number];
