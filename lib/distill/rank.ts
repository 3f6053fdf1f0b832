// Makes a model elastic, with the units of its feed-forwards in order of importance where a recipe asks for it.
import { type ElasticPlan, elastify as elastifyPlan, type Recipe, type UnitOrders } from '../elastic/elastify.js';
import type { Nested, UnitScores } from '../elastic/nested.js';
import {
  crossEntropy,
  type Dim,
  Graph,
  gatedActivation,
  gradients,
  type Node,
  Program,
  sumRows,
} from '../graph/index.js';
import type { EncoderNetwork } from '../infer/encoder/network.js';
import { embeddingFeeds, encodeRow, type Row, rowOffsets } from '../infer/encoder/rows.js';
import { loadModel } from '../infer/model.js';
import { Checkpoint } from '../io/safetensors.js';
import { loadTokenizer } from '../io/tokenizer.js';
import { decoder, finalNorm } from '../model/decoder.js';
import { readSpec } from '../model/directory.js';
import { encoder } from '../model/encoder.js';
import { bindEncoder } from '../model/encoder_weights.js';
import { selectEverything } from '../model/select.js';
import type { ModelSpec } from '../model/spec.js';
import { bindWeights, type LayerWeights, type LoadedWeights, loadWeights } from '../model/weights.js';
import { InvalidArgumentError, InvalidDataError } from '../native/errors.js';
import { type DeviceChoice, Engine, type Tensor } from '../native/index.js';
import { batchInputs, firstBatches } from './batches.js';
import { type DataSource, readDocuments, TokenData } from './data.js';
import { lossRun } from './pretrain.js';

/** Options of `elastify`. */
export interface ElastifyOptions {
  /** Directory to write. */
  out: string;
  /** Text on which units are ranked; needed where the recipe's `rank` is not 'none'. */
  calibration?: DataSource;
  /** Tokens of it to measure; default 8192. */
  calibrationTokens?: number;
  /** Where that runs; default: `ELASTIFORM_DEVICE`, else the CPU. */
  device?: DeviceChoice;
  /** Called as units are ranked: what is being done, and how many of its steps are. */
  onProgress?: (event: { phase: string; done: number; total: number }) => unknown;
  /** Stops ranking; the promise rejects with the signal's reason. */
  signal?: AbortSignal;
}

const batchTokens = 1024;

/**
 * Makes a pretrained model elastic by a recipe, or several of different kinds, and writes the plan that `distill` trains.
 *
 * @throws InvalidArgumentError for a bad recipe or missing calibration text, InvalidFileError for a bad checkpoint,
 * FileSystemError from the disk.
 */
export function elastify(
  model: string,
  recipe: Recipe | readonly Recipe[],
  options: ElastifyOptions,
): Promise<ElasticPlan> {
  const { out, calibration } = options;
  const order = calibration && ((nested: Nested) => rankUnits(model, nested, calibration, options));
  return elastifyPlan(model, recipe, { out, order });
}

/**
 * The order of the units of some layers, the most important first, equal ones as they were. `activation`: root mean square of a
 * unit over tokens, times the norm of its column of the down projection, which is what it adds to the residual stream; `taylor`:
 * mean square of unit times gradient of the cross-entropy, the first-order change when it is left out (arXiv 1906.10771).
 * Errors: InvalidDataError when the model computes NaN.
 */
async function rankUnits(
  dir: string,
  { scores, layers }: Nested,
  calibration: DataSource,
  { calibrationTokens = 8192, device, onProgress, signal }: ElastifyOptions,
): Promise<UnitOrders> {
  const spec = await readSpec(dir);
  if (spec.encoder) {
    return rankEncoderUnits(dir, { scores, layers }, calibration, { calibrationTokens, device, onProgress, signal });
  }
  const tokenizer = await loadTokenizer(dir);
  const data = TokenData.tokenise(await readDocuments(calibration), tokenizer, Math.min(512, spec.maxPositions));
  using checkpoint = Checkpoint.open(dir);
  using loaded = loadWeights(spec, checkpoint);
  using engine = new Engine(device, { weights: loaded.dtype });
  using program = squaresProgram(spec, loaded, engine, scores);
  const sums = layers.map(() => new Float64Array(spec.ffn));
  const batches = firstBatches(data, batchTokens, calibrationTokens, 0);
  for (const [done, batch] of batches.entries()) {
    await onProgress?.({ phase: 'ranking units', done, total: batches.length });
    const { outputs } = await program.run({ ...lossRun(batch, 1), signal });
    for (const [i, layer] of layers.entries()) {
      const own = outputs[`layer ${layer}`] as Float32Array;
      for (let unit = 0; unit < spec.ffn; unit++) sums[i][unit] += own[unit];
    }
  }
  return new Map(
    layers.map((layer, i) => [
      layer,
      orderOf(
        'elastify',
        dir,
        `layer ${layer}`,
        scores === 'taylor' ? sums[i] : contributions(sums[i], loaded.weights, layer),
      ),
    ]),
  );
}

/** Units of a part of the model in `dir`, the most important first. */
export function orderOf(api: string, dir: string, part: string, importance: Float64Array): Uint32Array {
  if (!importance.every(Number.isFinite)) {
    throw new InvalidDataError(`[${api}] ${part} computes NaN: check the weights of ${dir}`);
  }
  return Uint32Array.from(importance.keys()).sort((a, b) => importance[b] - importance[a] || a - b);
}

/** The same of an encoder, which reads every line of the texts by itself. It has no loss, so units are ranked by activations. */
async function rankEncoderUnits(
  dir: string,
  { scores, layers }: Pick<Nested, 'scores' | 'layers'>,
  calibration: DataSource,
  { calibrationTokens, device, onProgress, signal }: Omit<ElastifyOptions, 'out'> & { calibrationTokens: number },
): Promise<UnitOrders> {
  if (scores === 'taylor') {
    throw new InvalidArgumentError(`[elastify] rank 'taylor' needs a loss, and ${dir} is an encoder: use 'activation'`);
  }
  const lines = (await readDocuments(calibration)).flatMap((text) => text.split(/\r?\n/));
  await using model = await loadModel(dir, { ...(device && { device }), ...(signal && { signal }) });
  const { network } = model.encoder;
  const { spec, weights } = network;
  const rows: Row[] = [];
  let tokens = 0;
  for (const line of lines) {
    if (line.trim() === '') continue;
    const row = encodeRow(network, 'elastify', line, rows.length);
    rows.push(row);
    tokens += row.ids.length;
    if (tokens >= calibrationTokens) break;
  }
  using program = encoderSquaresProgram(network);
  const sums = layers.map(() => new Float64Array(spec.ffn));
  let [start, done] = [0, 0];
  while (start < rows.length) {
    await onProgress?.({ phase: 'ranking units', done: Math.min(done, tokens), total: tokens });
    let end = start + 1;
    let count = rows[start].ids.length;
    while (end < rows.length && count + rows[end].ids.length <= batchTokens) count += rows[end++].ids.length;
    const batch = rows.slice(start, end);
    const feeds = { ...embeddingFeeds(batch, spec.encoder.tokenTypes), offsets: rowOffsets(batch) };
    const { outputs } = await program.run({ dims: { rows: count, offsets: batch.length + 1 }, feeds, signal });
    for (const [i, layer] of layers.entries()) {
      const own = outputs[`layer ${layer}`] as Float32Array;
      for (let unit = 0; unit < spec.ffn; unit++) sums[i][unit] += own[unit];
    }
    [start, done] = [end, done + count];
  }
  return new Map(
    layers.map((layer, i) => [
      layer,
      orderOf('elastify', dir, `layer ${layer}`, contributions(sums[i], weights, layer)),
    ]),
  );
}

/** Sums of squares over rows of all units of an encoder, f32 [ffn] each: outputs `layer 0`, `layer 1`, ... */
function encoderSquaresProgram({ spec, weights, engine, maxContext }: EncoderNetwork): Program {
  const graph = new Graph();
  const rows = graph.dim('rows', Math.max(batchTokens, maxContext));
  const feed = (name: string, size: Dim) => graph.feed(name, 'i32', [size]);
  const inputs = {
    ...{ ids: feed('ids', rows), positions: feed('positions', rows) },
    ...(spec.encoder.tokenTypes > 0 && { types: feed('types', rows) }),
    offsets: feed('offsets', graph.dim('offsets', batchTokens + 1)),
  };
  const units: Node[] = [];
  encoder(graph, spec, bindEncoder(graph, weights), inputs, selectEverything, { units });
  // Every layer's attention comes before its feed-forward.
  for (const [layer, value] of units.filter((_, i) => i % 2 === 1).entries()) {
    graph.output(`layer ${layer}`, sumRows(gatedActivation(value, value, 'none')));
  }
  return Program.compile(graph, engine);
}

/** Sums of squares over rows, of units or of units times their gradient, f32 [ffn] each: outputs `layer 0`, `layer 1`, ... */
function squaresProgram(spec: ModelSpec, loaded: LoadedWeights, engine: Engine, scores: UnitScores): Program {
  const graph = new Graph();
  const weights = bindWeights(graph, loaded.weights);
  const { rows, segments: _, ...inputs } = batchInputs(graph, batchTokens);
  const inputsOfLast: Node[] = [];
  const x = decoder(graph, spec, weights, inputs, selectEverything, { units: inputsOfLast });
  // Every layer's attention comes before its feed-forward.
  const units = inputsOfLast.filter((_, i) => i % 2 === 1);
  const weight = graph.feed('weight', 'f32', [rows]);
  const targets = graph.feed('targets', 'i32', [rows]);
  let values: readonly Node[] = units;
  if (scores === 'taylor') {
    const { loss } = crossEntropy(finalNorm(spec, weights, x), weights.head, targets, weight);
    values = gradients(loss, units).map((gradient, layer) => gatedActivation(units[layer], gradient, 'none'));
  }
  values.forEach((value, layer) => {
    graph.output(`layer ${layer}`, sumRows(gatedActivation(value, value, 'none')));
  });
  return Program.compile(graph, engine);
}

/** Square roots of sums of squares times the norms of the columns of a layer's down projection. */
export function contributions(
  squares: Float64Array,
  weights: { readonly layers: readonly Pick<LayerWeights<Tensor>, 'down'>[] },
  layer: number,
): Float64Array {
  const down = weights.layers[layer].down.weight;
  const norms = new Float64Array(squares.length);
  for (const [i, value] of down.readFloat().entries()) norms[i % norms.length] += value * value;
  return squares.map((sum, unit) => Math.sqrt(sum * norms[unit]));
}
