// Makes a model elastic, with the units of its feed-forwards in order of importance where a recipe asks for it.
import { join } from 'node:path';
import { type ElasticPlan, elastify as elastifyPlan, type Recipe, type UnitOrders } from '../elastic/elastify.js';
import type { Nested, UnitScores } from '../elastic/nested.js';
import { crossEntropy, Graph, gatedActivation, gradients, type Node, Program, sumRows } from '../graph/index.js';
import { readJson } from '../io/files.js';
import { Checkpoint } from '../io/safetensors.js';
import { loadTokenizer } from '../io/tokenizer.js';
import { decoder, finalNorm } from '../model/decoder.js';
import { selectEverything } from '../model/select.js';
import { type ModelSpec, specFromConfig } from '../model/spec.js';
import { bindWeights, type LoadedWeights, loadWeights } from '../model/weights.js';
import { InvalidDataError } from '../native/errors.js';
import { type DeviceChoice, Engine } from '../native/index.js';
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
  const configPath = join(dir, 'config.json');
  const spec = specFromConfig(await readJson(configPath), configPath);
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
    layers.map((layer, i) => {
      const importance = scores === 'taylor' ? sums[i] : contributions(sums[i], loaded, layer);
      if (!importance.every(Number.isFinite)) {
        throw new InvalidDataError(`[elastify] layer ${layer} computes NaN: check the weights of ${dir}`);
      }
      return [layer, Uint32Array.from(sums[i].keys()).sort((a, b) => importance[b] - importance[a] || a - b)];
    }),
  );
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
function contributions(squares: Float64Array, { weights }: LoadedWeights, layer: number): Float64Array {
  const down = weights.layers[layer].down.weight;
  const norms = new Float64Array(squares.length);
  for (const [i, value] of down.readFloat().entries()) norms[i % norms.length] += value * value;
  return squares.map((sum, unit) => Math.sqrt(sum * norms[unit]));
}
