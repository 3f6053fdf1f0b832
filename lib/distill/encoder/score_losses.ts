// Losses of scores, f32 [S, C] of S texts: against classes, against another model's scores, against numbers.
import { crossEntropy, divergence, type Graph, hiddenDistance, type Node } from '../../graph/index.js';
import { InvalidArgumentError } from '../../native/errors.js';

/** A loss and, of classes, which of the S texts are right: f32 [S], 1 or 0. */
export interface ScoreLoss {
  /** f32 [1]: the sum over texts, each with its weight. */
  readonly loss: Node;
  readonly correct?: Node;
}

// The ops of losses multiply with a head a few rows at a time; scores that have their bias already go through the identity.
function identity(graph: Graph, scores: Node): Node {
  const count = scores.shape[1];
  if (typeof count !== 'number') throw new InvalidArgumentError('[loss] the number of classes must be constant');
  return graph.constant(
    Array.from({ length: count * count }, (_, i) => (i % (count + 1) === 0 ? 1 : 0)),
    [count, count],
  );
}

/** Cross-entropy of classes, nats: targets i32 [S], -1: none; weight f32 [S]. */
export function classLoss(graph: Graph, scores: Node, targets: Node, weight: Node): ScoreLoss {
  const { loss, correct } = crossEntropy(scores, identity(graph, scores), targets, weight);
  return { loss, correct };
}

/**
 * KL from the distribution of a teacher's scores, f32 [S, C], nats: cross-entropy with the teacher's probabilities at temperature 1,
 * less their entropy, which has no gradient.
 */
export const softClassLoss = (graph: Graph, scores: Node, teacher: Node, weight: Node): ScoreLoss => ({
  loss: divergence(scores, teacher, identity(graph, scores), weight).loss,
});

/** Squared difference of one score from a number: scores and targets f32 [S, 1]. */
export const squaredLoss = (scores: Node, targets: Node, weight: Node): ScoreLoss => ({
  loss: hiddenDistance(scores, targets, weight, 'mse').loss,
});
