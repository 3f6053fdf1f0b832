// Extraction: a slice of a nested model as a checkpoint of its own, written as a stream and compared with the slice.
import { join } from 'node:path';
import { type Budget, budgetText, resolveBudget } from '../../elastic/budget.js';
import { sliceCard } from '../../elastic/card.js';
import { type Lora, mergedLora } from '../../elastic/lora.js';
import { alignedWidth, meanWidth, type Nested, widthShares } from '../../elastic/nested.js';
import type { ElasticPolicy } from '../../elastic/policy.js';
import { copyCompanions, readElastic } from '../../elastic/store.js';
import { editJson, newDirectory, readJsonText, writeFileAtomic } from '../../io/files.js';
import { copyCheckpoint, type TensorPlan } from '../../io/slices.js';
import { configWithWidths, type ModelSpec, specFromConfig } from '../../model/spec.js';
import { parameterPlan, storedUnits } from '../../model/weights.js';
import { InvalidArgumentError, InvalidDataError } from '../../native/errors.js';
import { largestDifference, probeLogits } from './compared.js';

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
  /** Units of every layer's feed-forward. */
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
 * @throws InvalidArgumentError when the budget asks for more than widths or `out` is in use, InvalidDataError when the result
 *   does not compute what the slice computes.
 */
export async function extract(model: string, options: ExtractOptions): Promise<ExtractResult> {
  const { budget, out, verify = true, onProgress, signal } = options;
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
  const asked = widthsOf(budget, spec, elastic.policy);
  const layout = layoutOf(options.layout, asked);
  const widths = layout === 'uniform' ? uniformWidths(asked, nested, spec) : asked;
  const lora = elastic.lora && widths.some((units, layer) => units !== spec.perLayer[layer].ffn) ? elastic.lora : null;

  return await newDirectory('extract', out, async (dir) => {
    const bytes = await copyCheckpoint(model, dir, planner(spec, widths, lora), {
      signal,
      onProgress: (done, total) => onProgress?.({ phase: 'writing tensors', done, total }),
    });
    await copyCompanions(model, dir);
    const text = editJson(configText, (json) => configWithWidths(spec, json, widths));
    await writeFileAtomic(join(dir, 'config.json'), `${text}\n`);
    const written = specFromConfig(JSON.parse(text), join(dir, 'config.json'));
    // An architecture that has a width of every layer's own loads in what knows it.
    const stock = layout === 'uniform' || Array.isArray(JSON.parse(text).intermediate_size);
    await writeFileAtomic(join(dir, 'README.md'), sliceCard(elastic.policy.base, widths, lora !== null));
    const slice = { spec: { ffnWidth: widthShares(widths, nested, spec.ffn) } };
    const largestDifference = verify ? await compare(model, slice, dir, { exact: !lora, signal }) : null;
    return {
      ...{ dir: out, layout, widths, parameters: parameterPlan(written).size, bytes, largestDifference },
      loadsIn: stock
        ? ['elastiform', 'transformers', `other runtimes that read ${String(config.model_type)} checkpoints`]
        : ['elastiform'],
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

const alike = (widths: readonly number[]): boolean => widths.every((units) => units === widths[0]);

function layoutOf(layout: Layout | undefined, widths: readonly number[]): Layout {
  if (layout || alike(widths)) return layout ?? 'uniform';
  throw new InvalidArgumentError(
    `[extract] the widths of layers differ (${widths.join(', ')}): choose the layout 'uniform', one width that stock transformers loads, or 'per-layer', exact, for elastiform`,
  );
}

function uniformWidths(widths: readonly number[], nested: Nested, spec: ModelSpec): number[] {
  if (alike(widths)) return [...widths];
  if (nested.layers.length < spec.layers) {
    throw new InvalidArgumentError(
      "[extract] the layout 'uniform' needs all layers nested: those that are not keep all their units; choose 'per-layer'",
    );
  }
  const mean = meanWidth({ ffnWidth: widthShares(widths, nested, spec.ffn) }, nested, spec);
  return widths.map(() => alignedWidth(mean, nested, spec.ffn));
}

/** What becomes of every stored tensor: units are cut, corrections added. */
function planner(spec: ModelSpec, widths: readonly number[], lora: Lora | null): (name: string) => TensorPlan {
  const units = storedUnits(spec);
  const edit = lora && mergedLora(spec, lora);
  return (name) => {
    const stored = units.get(name);
    return {
      ...(stored && { slice: { axis: stored.axis, kept: widths[stored.layer] } }),
      edit: edit?.(name),
    };
  };
}

/** Largest difference of the logits of one sequence of ids. */
async function compare(
  model: string,
  slice: Budget,
  extracted: string,
  { exact, signal }: { exact: boolean; signal?: AbortSignal },
): Promise<number> {
  const sliced = await probeLogits(model, { budget: slice, signal });
  const largest = largestDifference(sliced, await probeLogits(extracted, { signal }));
  const most = exact ? 0 : tolerance * sliced.reduce((size, value) => Math.max(size, Math.abs(value)), 0);
  if (!(largest <= most)) {
    throw new InvalidDataError(
      `[extract] logits of the extracted model differ from the slice's by ${largest}, more than ${most}: nothing was written`,
    );
  }
  return largest;
}
