// Trains a nested encoder so that the vectors of its slices are those of the whole: widths that share a space.
import { join } from 'node:path';
import { writeNested } from '../../elastic/elastify.js';
import { type Nested, nestedWidth } from '../../elastic/nested.js';
import { copyCompanions, type Elastic } from '../../elastic/store.js';
import { Graph, hiddenDistance, type Node, Program } from '../../graph/index.js';
import { writeCheckpoint } from '../../io/directory.js';
import { readJsonText } from '../../io/files.js';
import { Checkpoint } from '../../io/safetensors.js';
import { loadTokenizer } from '../../io/tokenizer.js';
import { encoder, type Pooling, pool } from '../../model/encoder.js';
import { encoderByName, encoderSlots, loadEncoderWeights } from '../../model/encoder_weights.js';
import { selectEverything } from '../../model/select.js';
import { readSentenceSettings } from '../../model/sentence_transformers.js';
import type { EncoderSpec } from '../../model/spec.js';
import { exportSlots, flattened, planOf } from '../../model/weights.js';
import { InvalidArgumentError } from '../../native/errors.js';
import { Engine, type Tensor } from '../../native/index.js';
import { trainingTexts, wholeEpoch } from '../batches.js';
import type { DistillConfig } from '../distill.js';
import type { TrainResult } from '../events.js';
import { Random } from '../random.js';
import { Trainable } from '../trainable.js';
import { resolveConfig, type Task, train, withLock } from '../trainer.js';
import { Widths } from '../widths.js';
import { textInputs, textRun } from './classifier.js';
import { BadRows, type ExampleBatch, ExampleData } from './examples.js';

/** Settings of `distill` that are for decoders. */
const forDecoders = ['loss', 'teacher', 'dtype', 'activations', 'calibrationTokens', 'loraLr'] as const;

/**
 * Trains all weights of a nested encoder but those of a head, at its granularities: the loss of a text is the cosine distance of the
 * pooled vector of each width from the vector that the model had when training began, summed over the widths of a step. Every line of the
 * data is a text.
 * Errors: those of `distill`.
 */
export async function distillEncoder(
  config: DistillConfig,
  { policy, dir }: Elastic,
  spec: EncoderSpec,
): Promise<TrainResult> {
  const fail = (what: string): never => {
    throw new InvalidArgumentError(`[distill] ${what}`);
  };
  for (const name of forDecoders) {
    if (config[name] !== undefined) fail(`${name} is for decoders, and ${dir} is an encoder`);
  }
  const { nested } = policy;
  if (!nested) return fail(`${dir} has no nested feed-forwards: make them with \`elastiform elastify --nested\``);
  if (policy.exits) fail(`the exits of ${dir} were trained for its weights: train the widths first`);
  const widths = Widths.of('distill', config.sample, nested, spec);
  const sentence = await readSentenceSettings(dir);
  const pooling = sentence?.pooling ?? 'mean';
  const longest = Math.min(sentence?.maxTokens ?? spec.maxPositions, spec.maxPositions);
  const sequenceLength = config.sequenceLength ?? Math.min(128, longest);
  if (sequenceLength > longest) {
    fail(`sequenceLength must be at most the ${longest} tokens that the model takes, got ${sequenceLength}`);
  }
  const tokenizer = await loadTokenizer(dir);
  const texts = await trainingTexts('distill', config);
  const encode = (documents: readonly string[]) =>
    ExampleData.encode(
      documents
        .flatMap((text) => text.split(/\r?\n/))
        .filter((line) => line.trim() !== '')
        .map((text, i) => ({ text, pair: undefined, label: '0', at: `text ${i}` })),
      tokenizer,
      sequenceLength,
      { kind: 'number' },
      new BadRows('distill', true),
    );
  const [data, evalData] = [encode(texts.train), texts.heldOut && encode(texts.heldOut)];
  const resolved = resolveConfig(config, data, { batchTokens: 2048, lr: 1e-4, weightDecay: 0.01 });
  return withLock(config.out, async () => {
    using checkpoint = Checkpoint.open(dir);
    using loaded = loadEncoderWeights(spec, checkpoint, { dtype: 'f32' });
    using engine = new Engine(config.device);
    const slots = encoderSlots(spec);
    const plan = planOf(slots.filter(({ name }) => !name.startsWith('head.')));
    using trainable = new Trainable(plan);
    trainable.params.write(flattened(plan, loaded.byName));
    const model: NestedEncoder = { spec, nested, pooling, engine, batchTokens: resolved.batchTokens };
    using teacher = teacherProgram(model, loaded.byName);
    using step = widthProgram(model, trainable, loaded.byName, {
      train: true,
      recompute: config.gradCheckpointing ?? false,
    });
    using measure = widthProgram(model, trainable, loaded.byName, { train: false, recompute: false });
    const runOf = (batch: ExampleBatch) => {
      const { dims, feeds } = textRun(batch, spec);
      return {
        dims,
        feeds: pooling === 'last' ? { ...feeds, first: batch.offsets.slice(1).map((end) => end - 1) } : feeds,
      };
    };
    const distances = async (
      program: Program,
      batch: ExampleBatch,
      at: typeof widths.all,
      total: number,
      signal?: AbortSignal,
    ) => {
      const { dims, feeds } = runOf(batch);
      const { vectors } = (await teacher.run({ dims, feeds, signal })).outputs;
      const found: Record<string, number> = {};
      for (const { name, dims: units, weight } of at) {
        const weights = new Float32Array(batch.examples.length).fill(weight / total);
        const { outputs } = await program.run({
          dims: { ...dims, ...units },
          feeds: { ...feeds, teacher: vectors, weight: weights },
          signal,
        });
        found[name] = outputs.loss[0];
      }
      return found;
    };
    const task: Task<ExampleBatch> = {
      api: 'distill',
      engine,
      trainable,
      data,
      identity: {
        ...{ method: 'vectors of widths', base: policy.base.weightsSha256, nested, widths: widths.identity, pooling },
        ...{ sequenceLength, evalData: evalData?.sha256() ?? null },
      },
      lossRows: ({ examples }) => examples.length,
      async micro(batch, { step: number, index, total, signal }) {
        const draw = new Random(resolved.seed, 'width', number * resolved.gradAccumulation + index);
        const found = await distances(step, batch, widths.draw(draw), total, signal);
        const loss = Object.values(found).reduce((sum, value) => sum + value, 0);
        return {
          loss,
          ...Object.fromEntries(Object.entries(found).map(([name, value]) => [`distance ${name}`, value])),
        };
      },
      ...(evalData && {
        async evaluate(signal?: AbortSignal) {
          const levels = Object.fromEntries(widths.all.map(({ name }) => [name, { distance: 0 }]));
          const each = widths.all.map((width) => ({ ...width, weight: 1 }));
          for (const batch of wholeEpoch(evalData, resolved.batchTokens)) {
            const found = await distances(measure, batch, each, evalData.count, signal);
            for (const [name, value] of Object.entries(found)) levels[name].distance += value;
          }
          const all = Object.values(levels);
          return { levels, metric: all.reduce((sum, { distance }) => sum + distance, 0) / all.length };
        },
      }),
    };
    const result = await train(task, resolved, config.out, config);
    if (result.stopped !== 'signal') {
      const trained = trainable.values();
      const all = planOf(slots);
      const flat = flattened(all, loaded.byName);
      for (const { name, offset } of all.parameters) flat.set(trained.get(name) ?? [], offset);
      await copyCompanions(dir, config.out);
      const { text } = await readJsonText(join(dir, 'config.json'));
      await writeCheckpoint(config.out, text, exportSlots(spec, slots, flat));
      const { searched: _, ...kept } = nested;
      await writeNested(config.out, spec, { ...kept, trained: 'all' }, policy.base.license);
    }
    return { dir: config.out, step: result.step, stopped: result.stopped, ...(result.best && { best: result.best }) };
  });
}

interface NestedEncoder {
  readonly spec: EncoderSpec;
  readonly nested: Nested;
  readonly pooling: Pooling;
  readonly engine: Engine;
  readonly batchTokens: number;
}

/** The vectors of a batch by weights that stay as they are: output `vectors` f32 [S, D]. */
function teacherProgram(
  { spec, pooling, engine, batchTokens }: NestedEncoder,
  byName: ReadonlyMap<string, Tensor>,
): Program {
  const graph = new Graph();
  const weights = encoderByName(spec, (name) => graph.weight(byName.get(name)!, name));
  const { inputs } = textInputs(graph, spec, batchTokens);
  graph.output('vectors', pool(graph, encoder(graph, spec, weights, inputs), inputs.offsets, inputs.first, pooling));
  return Program.compile(graph, engine);
}

/** The distance of a batch at a width from feed `teacher` f32 [S, D]: output `loss`. With `train` it adds the gradient. */
function widthProgram(
  { spec, nested, pooling, engine, batchTokens }: NestedEncoder,
  trainable: Trainable,
  byName: ReadonlyMap<string, Tensor>,
  { train, recompute }: { train: boolean; recompute: boolean },
): Program {
  const graph = new Graph();
  const own = new Set(trainable.plan.parameters.map(({ name }) => name));
  const node = (name: string): Node =>
    own.has(name) ? graph.state(trainable.view(name), name) : graph.weight(byName.get(name)!, name);
  const weights = encoderByName(spec, node);
  const { segments, inputs } = textInputs(graph, spec, batchTokens);
  const selector = { ...selectEverything, width: nestedWidth(graph, nested, spec.ffn) };
  const x = encoder(graph, spec, weights, inputs, selector, { recompute });
  const vectors = pool(graph, x, inputs.offsets, inputs.first, pooling);
  const teacher = graph.feed('teacher', 'f32', [segments, spec.hidden]);
  const { loss } = hiddenDistance(vectors, teacher, graph.feed('weight', 'f32', [segments]), 'cosine');
  graph.output('loss', loss);
  if (train) trainable.accumulateGradients(graph, loss, node);
  return Program.compile(graph, engine);
}
