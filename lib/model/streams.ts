// Several residual streams: AltUp (arXiv 2301.13310), and what Gemma 3n has beside it: LAuReL (arXiv 2411.07501) and embeddings
// that every layer has for itself.
import type { Node } from '../graph/graph.js';
import {
  activation,
  add,
  addScaled,
  embedding,
  gatedActivation,
  linear,
  rescaleRows,
  scale,
  scaleColumns,
  softcap,
} from '../graph/index.js';
import { type BlockContext, norm } from './blocks.js';
import type { Affine, DecoderNodes, LayerWeights } from './weights.js';

/** The least mean square that a stream is scaled by. */
const floor = 1e-5;

/** The residual streams of a decoder while it is built. The first goes through the sub-layers. */
export class Streams {
  #streams: Node[];
  readonly #context: BlockContext;
  readonly #weights: DecoderNodes;
  readonly #ids: Node;
  readonly #embedded: Node;

  /** @param embedded scaled embeddings of the tokens `ids`, f32 [N, D] */
  constructor(context: BlockContext, weights: DecoderNodes, ids: Node, embedded: Node) {
    this.#context = context;
    this.#weights = weights;
    this.#ids = ids;
    this.#embedded = embedded;
    const others = weights.streams!.expand.map(({ weight }) => rescaleRows(linear(embedded, weight), embedded, floor));
    this.#streams = [embedded, ...others];
  }

  /** Adds to every stream what a layer expects of it. Returns the first. */
  predict({ streams: weights }: LayerWeights<Node>): Node {
    const before = this.#streams;
    const coefficients = linear(this.#modalities(before[0], weights!), weights!.prediction.weight);
    this.#streams = before.map((stream, j) =>
      before.reduce((sum, other, i) => addScaled(sum, other, coefficients, j * before.length + i), stream),
    );
    return this.#streams[0];
  }

  /** What attention gave, f32 [N, D], with LAuReL's product of its normalised input. */
  withLaurel(attended: Node, { norm1, streams: weights }: LayerWeights<Node>): Node {
    const { spec } = this.#context;
    const { laurelA, laurelB, laurelNorm } = weights!;
    const x = norm(spec, this.#streams[0], norm1);
    const low = norm(spec, linear(linear(x, laurelA.weight), laurelB.weight), laurelNorm);
    return scale(add(attended, add(x, low)), Math.SQRT1_2);
  }

  /** Corrects all streams by what the layer made of the first, f32 [N, D], and adds the layer's own embeddings to the others. */
  correct(activated: Node, { streams }: LayerWeights<Node>): Node {
    const { spec } = this.#context;
    const weights = streams!;
    const coefficients = linear(this.#modalities(activated, weights), weights.correction.weight);
    const innovation = add(activated, scale(this.#streams[0], -1));
    const corrected = this.#streams.map((stream, i) => addScaled(stream, innovation, coefficients, i, 1));
    const first = spec.streams!.scaled ? scaleColumns(corrected[0], weights.scale.weight) : corrected[0];
    const gate = activation(linear(first, weights.inputGate.weight), spec.act);
    const own = gatedActivation(gate, this.#ownEmbedding(weights), 'none');
    const more = norm(spec, linear(own, weights.inputUp.weight), weights.inputNorm);
    this.#streams = corrected.map((stream, i) => (i === 0 ? stream : add(stream, more)));
    return this.#streams[0];
  }

  /** All streams as one, the mean of those with the magnitude of the first: f32 [N, D]. */
  join(): Node {
    const [first, ...others] = this.#streams;
    const joined = others.map((stream, i) =>
      rescaleRows(linear(stream, this.#weights.streams!.join[i].weight), first, floor),
    );
    return scale(
      joined.reduce((sum, stream) => add(sum, stream), first),
      1 / (others.length + 1),
    );
  }

  // Between -1 and 1, f32 [N, streams].
  #modalities(x: Node, { routerNorm, router }: { routerNorm: Affine<Node>; router: Affine<Node> }): Node {
    const { spec } = this.#context;
    return softcap(linear(scale(norm(spec, x, routerNorm), 1 / spec.hidden), router.weight), 1);
  }

  // The token's embedding for this layer and a projection of its usual one: f32 [N, P].
  #ownEmbedding({ embed, projection }: { embed: Affine<Node>; projection: Affine<Node> }): Node {
    const { spec } = this.#context;
    const projected = scale(linear(this.#embedded, projection.weight), 1 / Math.sqrt(spec.hidden));
    const own = scale(embedding(embed.weight, this.#ids), Math.sqrt(spec.streams!.perLayerWidth));
    return scale(add(norm(spec, projected, this.#weights.streams!.projectionNorm), own), Math.SQRT1_2);
  }
}

/** The tag under which what surrounds the sub-layers of a layer is counted. */
export const streamsTag = (layer: number): string => `L${layer}.streams`;
