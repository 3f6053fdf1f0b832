// Encoders in training: losses and gradients of every parameter against transformers, with and without recomputing layers.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { classLoss, squaredLoss } from '../../lib/distill/encoder/score_losses.js';
import { Trainable } from '../../lib/distill/trainable.js';
import { Graph, Program } from '../../lib/graph/index.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { encoder, headLogits } from '../../lib/model/encoder.js';
import { encoderSpecFromConfig } from '../../lib/model/encoder_spec.js';
import { encoderByName, encoderSlots, loadEncoderWeights } from '../../lib/model/encoder_weights.js';
import { exportSlots, flattened, planOf } from '../../lib/model/weights.js';
import { Engine } from '../../lib/native/index.js';
import { encoderDirectory, largestDifference, positionsOf, readCases, readVectors } from '../model/golden.js';

let engine: Engine;
beforeAll(() => {
  engine = new Engine();
});
afterAll(() => engine.dispose());

describe.each(['bert-classes', 'roberta-classes', 'distilbert-score', 'bert-mlm'])('%s', (name) => {
  const directory = encoderDirectory(name);
  const vectors = readVectors(join(directory, 'gradients.safetensors'));
  const path = join(directory, 'config.json');
  const spec = encoderSpecFromConfig(JSON.parse(readFileSync(path, 'utf8')), path);
  const cases = readCases(name);

  it.each([false, true])(
    'has the loss and the gradients of transformers (recomputing layers: %s)',
    async (recompute) => {
      using checkpoint = Checkpoint.open(directory);
      using loaded = loadEncoderWeights(spec, checkpoint);
      const slots = encoderSlots(spec);
      using trainable = new Trainable(planOf(slots));
      trainable.params.write(flattened(trainable.plan, loaded.byName));

      const offsets = [0];
      for (const { ids } of cases) offsets.push(offsets.at(-1)! + ids.length);
      const count = offsets.at(-1)!;
      const tokens = spec.encoder.task === 'masked-lm';
      const regression = !tokens && spec.encoder.scores === 'none';
      const graph = new Graph();
      const node = (weight: string) => graph.state(trainable.view(weight), weight);
      const nodes = encoderByName(spec, node);
      const rows = graph.dim('rows', count);
      const feed = (name: string) => graph.feed(name, 'i32', [rows]);
      const inputs = {
        ids: feed('ids'),
        positions: feed('positions'),
        offsets: graph.feed('offsets', 'i32', [offsets.length]),
      };
      const types = spec.encoder.tokenTypes > 0 ? { types: feed('types') } : {};
      const x = encoder(graph, spec, nodes, { ...inputs, ...types }, undefined, { recompute });
      const scored = tokens ? rows : cases.length;
      const scores = headLogits(graph, spec, nodes, x, tokens ? null : graph.feed('first', 'i32', [scored]));
      const weight = graph.feed('weight', 'f32', [scored]);
      const { loss } = regression
        ? squaredLoss(scores, graph.feed('targets', 'f32', [scored, 1]), weight)
        : classLoss(graph, scores, graph.feed('targets', 'i32', [scored]), weight);
      graph.output('loss', loss);
      trainable.accumulateGradients(graph, loss, node);
      using program = Program.compile(graph, engine);

      // As scripts/golden/encoders.py has them.
      const ids = Int32Array.from(cases.flatMap(({ ids }) => ids));
      const width = tokens ? spec.vocab : spec.encoder.labels.length;
      const targets = tokens
        ? ids.map((id) => (id * 7 + 3) % width)
        : regression
          ? Float32Array.from(cases, (_, i) => i / 2 - 1)
          : Int32Array.from(cases, (_, i) => i % width);
      const { outputs } = await program.run({
        dims: { rows: count },
        feeds: {
          ...{ ids, positions: positionsOf(offsets), offsets: Int32Array.from(offsets), targets },
          weight: new Float32Array(targets.length).fill(1 / targets.length),
          ...(types.types && {
            types: Int32Array.from(
              cases.flatMap(({ types }) => types),
              (type) => Math.min(type, spec.encoder.tokenTypes - 1),
            ),
          }),
          ...(!tokens && { first: Int32Array.from(offsets.slice(0, -1)) }),
        },
      });
      expect(outputs.loss[0]).toBeCloseTo(vectors.loss[0], 4);
      const grads = exportSlots(spec, slots, trainable.grads.readFloat());
      const wanted = Object.keys(vectors).filter((key) => key.startsWith('grad.'));
      // Files from TensorFlow have other names of norms, which gradients have not.
      expect(Object.keys(grads).sort()).toEqual(wanted.map((key) => key.slice('grad.'.length)).sort());
      for (const key of wanted) {
        const scale = Math.max(...[...vectors[key]].map(Math.abs), 1e-3);
        const { data } = grads[key.slice('grad.'.length)];
        expect(largestDifference(data as Float32Array, vectors[key]) / scale, key).toBeLessThan(1e-3);
      }
    },
  );
});
