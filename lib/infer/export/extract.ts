// Extraction: a slice of a nested model, narrower and of fewer layers, as a checkpoint of its own, written as a stream and
// compared with the slice.
import { join } from 'node:path';
import { type Budget, budgetText, resolveBudget } from '../../elastic/budget.js';
import { sliceCard } from '../../elastic/card.js';
import { type Lora, LoraTensors, loraId, mergedLora } from '../../elastic/lora.js';
import { alignedWidth, type Nested, widthShares } from '../../elastic/nested.js';
import type { ElasticPolicy } from '../../elastic/policy.js';
import { plainPolicy } from '../../elastic/recipes.js';
import { copyCompanions, readElastic } from '../../elastic/store.js';
import { asFloats, editJson, newDirectory, readJsonText, writeFileAtomic } from '../../io/files.js';
import { copyCheckpoint, type Slice, type TensorPlan } from '../../io/slices.js';
import { floatFields } from '../../model/config.js';
import { projections } from '../../model/select.js';
import { fieldsOfLayers, keptLayers, specOfLayers } from '../../model/slices.js';
import { configWithWidths, type ModelSpec, specFromConfig } from '../../model/spec.js';
import { parameterPlan, storedLayer, storedParts, storedUnits } from '../../model/weights.js';
import { InvalidArgumentError, InvalidDataError } from '../../native/errors.js';
import { ElasticModel } from '../model.js';
import { loadNetwork, type Network } from '../network.js';
import { largestDifference, logitsOf, probeLogits } from './compared.js';

/** One width in all layers, or one for each. */
export type Layout = 'uniform' | 'per-layer';
export const layouts: readonly Layout[] = ['uniform', 'per-layer'];

/** Options of `extract`. */
export interface ExtractOptions {
  /** What to extract: a level, a share of the FLOPs or explicit widths. */
  budget: Budget;
  /**
   * `uniform`: one width in all layers, which any runtime of the architecture loads; widths that differ become their mean, rounded
   * to the alignment. `per-layer`: the widths as they are, which of stock architectures Gemma 3n has. Default: uniform where
   * layers are alike, else it must be given.
   */
  layout?: Layout;
  /**
   * Layers to leave out, by their numbers; those that stay are renumbered. The budget is of the model with all of them, whose
   * widths of these layers come to nothing. Default: none.
   */
  skipLayers?: readonly number[];
  /** New or empty directory for the checkpoint. */
  out: string;
  /** Load the result and compare its logits with the slice's; default true. That takes the memory of both. */
  verify?: boolean;
  /** Called as the work goes on: what is being done, and how many of its steps are. */
  onProgress?: (event: { phase: string; done: number; total: number }) => unknown;
  /** Stops the work; nothing is left behind. */
  signal?: AbortSignal;
}

/** What `extract` wrote. */
export interface ExtractResult {
  dir: string;
  layout: Layout;
  /** Layers of the model that stayed, in order. */
  layers: readonly number[];
  /** Units of the feed-forward of each of them. */
  widths: readonly number[];
  parameters: number;
  /** Of the weights. */
  bytes: number;
  /** Largest difference between logits of the result and of the slice; null when not compared. Without corrections it is 0. */
  largestDifference: number | null;
  /** What loads it. */
  loadsIn: readonly string[];
}

/** Corrections merged into weights of 16 bits are rounded; the largest logit may be off by so much of itself. */
const tolerance = 0.05;

/**
 * Writes a slice of a nested model as an ordinary Hugging Face checkpoint in the element types of the model, its corrections
 * merged in. Weights pass through a few MiB of memory. `out` appears complete or not at all.
 *
 * @throws InvalidArgumentError when the budget asks for more than widths, `out` is in use, or the layers to skip are not all the
 *   model's, are all that it has or own keys and values that a layer that stays uses; InvalidDataError when the result does not
 *   compute what the slice computes.
 */
export async function extract(model: string, options: ExtractOptions): Promise<ExtractResult> {
  const { budget, skipLayers = [], out, verify = true, onProgress, signal } = options;
  if (options.layout !== undefined && !layouts.includes(options.layout)) {
    throw new InvalidArgumentError(
      `[extract] layout must be one of ${layouts.join(', ')}, got ${String(options.layout)}`,
    );
  }
  const configPath = join(model, 'config.json');
  const { text: configText, json } = await readJsonText(configPath);
  const config = json as Record<string, unknown>;
  const spec = specFromConfig(config, configPath);
  const elastic = await readElastic(model);
  if (!elastic?.policy.nested) {
    throw new InvalidArgumentError(
      `[extract] ${model} has no nested feed-forwards; make it so with \`elastiform elastify --nested\``,
    );
  }
  const { nested } = elastic.policy;
  const layers = keptLayers(spec.perLayer, skipLayers);
  const ofAll = widthsOf(budget, spec, elastic.policy);
  const asked = layers.map((layer) => ofAll[layer]);
  const layout = layoutOf(options.layout, asked);
  const widths = layout === 'uniform' ? uniformWidths(asked, layers, nested, spec) : asked;
  const narrower = widths.some((units, i) => units !== spec.perLayer[layers[i]].ffn);
  const lora = narrower ? elastic.lora : null;

  return await newDirectory('extract', out, async (dir) => {
    const bytes = await copyCheckpoint(model, dir, planner(spec, layers, widths, lora), {
      signal,
      onProgress: (done, total) => onProgress?.({ phase: 'writing tensors', done, total }),
    });
    await copyCompanions(model, dir);
    const fields = Object.entries(skipLayers.length > 0 ? fieldsOfLayers(spec, config, layers, configPath) : {});
    const changed = Object.fromEntries(
      fields.map(([name, value]) => [name, floatFields.includes(name) ? asFloats(value) : value]),
    );
    const text = editJson(configText, (json) => configWithWidths(spec, { ...json, ...changed }, widths));
    await writeFileAtomic(join(dir, 'config.json'), `${text}\n`);
    const written = specFromConfig(JSON.parse(text), join(dir, 'config.json'));
    // Of one width, or of an architecture that has a width of every layer's own.
    const stock = !('per_layer_config' in JSON.parse(text));
    const skipped = [...skipLayers].sort((a, b) => a - b);
    await writeFileAtomic(
      join(dir, 'README.md'),
      sliceCard(elastic.policy.base, { widths, skipped, merged: lora !== null }),
    );
    const own = { ...nested, layers: nested.layers.flatMap((layer) => place(layers, layer)) };
    const slice: Budget = narrower ? { spec: { ffnWidth: widthShares(widths, own, spec.ffn) } } : 'full';
    const load = async (): Promise<ElasticModel> => {
      const network = await loadNetwork(model, { device: 'cpu', signal });
      const whole = layers.length === spec.layers;
      return new ElasticModel(whole ? network : ofLayers(network, layers, elastic.policy.base, own, lora));
    };
    const largestDifference = verify ? await compare(load, slice, dir, { exact: !lora, signal }) : null;
    const others = skipped.length === 0 || isRegular(spec);
    return {
      ...{ dir: out, layout, layers, widths, parameters: parameterPlan(written).size, bytes, largestDifference },
      loadsIn: [
        'elastiform',
        ...(stock ? ['transformers'] : []),
        ...(stock && others ? [`other runtimes that read ${String(config.model_type)} checkpoints`] : []),
      ],
    };
  });
}

/** Widths of all layers at a budget, which must take away nothing else. */
function widthsOf(budget: Budget, spec: ModelSpec, policy: ElasticPolicy): readonly number[] {
  const point = resolveBudget(budget, spec, policy);
  const routed = Object.keys(point.spec).filter((key) => key !== 'ffnWidth');
  if (routed.length > 0) {
    throw new InvalidArgumentError(
      `[extract] ${budgetText(budget)} routes (${routed.join(', ')}), which no other runtime does; name a width or a level of widths alone`,
    );
  }
  return point.widths ?? spec.perLayer.map(({ ffn }) => ffn);
}

/** The number that a layer of the model has among those that stay; none where it does not. */
const place = (layers: readonly number[], layer: number): number[] =>
  layers.includes(layer) ? [layers.indexOf(layer)] : [];

/**
 * Whether a layer is the same in any place. Where layers are of several types, some runtimes know them by their numbers alone, as
 * they know which layers of Gemma 3n are sparse or use keys of others.
 */
const isRegular = ({ perLayer: [first, ...rest], streams }: ModelSpec): boolean =>
  streams === null &&
  rest.every(({ window, rope }) => window === first.window && rope?.invFreq === first.rope?.invFreq);

const alike = (widths: readonly number[]): boolean => widths.every((units) => units === widths[0]);

function layoutOf(layout: Layout | undefined, widths: readonly number[]): Layout {
  if (layout || alike(widths)) return layout ?? 'uniform';
  throw new InvalidArgumentError(
    `[extract] the widths of layers differ (${widths.join(', ')}): choose the layout 'uniform', one width that stock transformers loads, or 'per-layer', exact, for elastiform`,
  );
}

function uniformWidths(
  widths: readonly number[],
  layers: readonly number[],
  nested: Nested,
  spec: ModelSpec,
): number[] {
  if (alike(widths)) return [...widths];
  if (!layers.every((layer) => nested.layers.includes(layer))) {
    throw new InvalidArgumentError(
      "[extract] the layout 'uniform' needs all layers nested: those that are not keep all their units; choose 'per-layer'",
    );
  }
  const mean = widths.reduce((sum, units) => sum + units, 0) / (widths.length * spec.ffn);
  return widths.map(() => alignedWidth(mean, nested, spec.ffn));
}

/** What becomes of every stored tensor: layers that do not stay are left out, units are cut, corrections added. */
function planner(
  spec: ModelSpec,
  layers: readonly number[],
  widths: readonly number[],
  lora: Lora | null,
): (name: string) => TensorPlan {
  const units = storedUnits(spec);
  const parts = layers.length < spec.layers ? storedParts(spec) : new Map<string, never>();
  const edit = lora && mergedLora(spec, lora);
  const sliceOf = (name: string, at: number): Slice | null => {
    const [stored, part] = [units.get(name), parts.get(name)];
    if (stored) return { axis: stored.axis, kept: widths[at] };
    if (!part) return null;
    const { axis, size } = part;
    const kept = layers.flatMap((layer) => Array.from({ length: size }, (_, i) => layer * size + i));
    return { axis, kept: Uint32Array.from(kept) };
  };
  return (name) => {
    const own = storedLayer(spec, name);
    const at = own ? layers.indexOf(own.layer) : -1;
    if (own && at < 0) return { name: null };
    const slice = sliceOf(name, at);
    return { ...(own && { name: own.renamed(at) }), ...(slice && { slice }), edit: edit?.(name) };
  };
}

/**
 * A loaded model of which some layers stay, in memory, with nothing elastic but nested feed-forwards and their corrections: what
 * an extracted checkpoint is compared with. It owns the model.
 *
 * @param nested of the layers that stay, by their new numbers
 */
function ofLayers(
  network: Network,
  layers: readonly number[],
  base: ElasticPolicy['base'],
  nested: Nested,
  corrections: Lora | null,
): Network {
  const { weights } = network;
  const spec = specOfLayers(network.spec, layers);
  const renumbered = layers.flatMap((layer, i) =>
    projections.flatMap((projection) => {
      const own = corrections?.get(loraId(layer, projection));
      return own ? [[loraId(i, projection), own] as const] : [];
    }),
  );
  const lora = corrections && new LoraTensors(new Map(renumbered));
  const dispose = (): void => {
    lora?.dispose();
    network.dispose();
  };
  return {
    ...network,
    ...{ spec, lora, dispose },
    weights: { ...weights, layers: layers.map((layer) => weights.layers[layer]) },
    policy: { ...plainPolicy(spec, { nested }), base },
    routers: new Map(),
  };
}

/** Largest difference of the logits of one sequence of ids. */
async function compare(
  load: () => Promise<ElasticModel>,
  slice: Budget,
  extracted: string,
  { exact, signal }: { exact: boolean; signal?: AbortSignal },
): Promise<number> {
  await using whole = await load();
  const sliced = await logitsOf(whole, { budget: slice, signal });
  const largest = largestDifference(sliced, await probeLogits(extracted, { signal }));
  const most = exact ? 0 : tolerance * sliced.reduce((size, value) => Math.max(size, Math.abs(value)), 0);
  if (!(largest <= most)) {
    throw new InvalidDataError(
      `[extract] logits of the extracted model differ from the slice's by ${largest}, more than ${most}: nothing was written`,
    );
  }
  return largest;
}
