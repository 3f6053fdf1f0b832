// Modules of encoder-decoder models, the assemblies they make, and the orders in which assemblies become smaller (arXiv 2306.02379).
import {
  type Assembly,
  isModule,
  type Modules,
  partId,
  type Span,
  type Stack,
  spanOf,
  stacks,
} from '../model/parts.js';
import type { ElasticSpec } from './axes.js';
import { widthProblem } from './nested.js';
import type { ElasticPolicy } from './policy.js';
import { tokenCapacityProblem } from './source_routing.js';

export { type Assembly, type Modules, partId, type Span, type Stack, stacks };

/** How many layers the stacks of a model have. */
type Sizes = Readonly<Record<Stack, { readonly layers: number }>>;

/** Why layers cannot be cut into spans of a granularity, or null. */
export function granularityProblem(granularity: unknown, layers: number): string | null {
  const divides =
    Number.isInteger(granularity) && (granularity as number) > 1 && layers % (granularity as number) === 0;
  return divides ? null : `an integer above 1 that divides ${layers} layers`;
}

/** The spans of all granularities, the finest first: of granularity i every i layers, from the first on. */
export function spansOf(layers: number, granularities: readonly number[]): Span[] {
  return [...granularities]
    .sort((a, b) => a - b)
    .flatMap((size) =>
      Array.from({ length: layers / size }, (_, j) => ({ first: j * size, last: (j + 1) * size - 1 })),
    );
}

/** What is wrong with the span of a module for a stack of so many layers, or null. */
export function spanProblem({ first, last }: Span, layers: number): string | null {
  const size = last - first + 1;
  if (last < layers && first % size === 0 && granularityProblem(size, layers) === null) return null;
  return `of a span whose size divides ${layers} layers and its first layer, such as 0-${layers - 1}`;
}

/** The assembly that is the model itself. */
export const backboneOf = (sizes: Sizes): Assembly => {
  const parts = ({ layers }: { layers: number }) => Array.from({ length: layers }, (_, i) => String(i));
  return { encoder: parts(sizes.encoder), decoder: parts(sizes.decoder) };
};

/** As the command line takes it: `encoder=0,1,2-3;decoder=0-3`. */
export const assemblyText = (assembly: Assembly): string =>
  stacks.map((stack) => `${stack}=${assembly[stack].join(',')}`).join(';');

/** Settings as the command line takes them: `encoder=0,1;decoder=0-1;ffn=0.5;attn=0.5;mlp=1,0.5`. */
export const settingsText = ({ assembly, ffnWidth, tokenCapacity = {} }: ElasticSpec): string =>
  [
    ...(assembly ? [assemblyText(assembly)] : []),
    ...(ffnWidth === undefined ? [] : [`ffn=${ffnWidth}`]),
    ...Object.entries(tokenCapacity).map(([place, share]) => `${place}=${share}`),
  ].join(';');

/** Settings that an encoder-decoder model may have. */
export const settingNames: readonly string[] = ['assembly', 'ffnWidth', 'tokenCapacity'];

/** What is wrong with settings of an encoder-decoder model, beginning with the name of the setting, or null. */
export function settingsProblem(
  { assembly, ffnWidth, tokenCapacity }: { readonly [setting in keyof ElasticSpec]: unknown },
  sizes: Sizes & { readonly decoder: { readonly ffn: number } },
  { modules, nested, sourceTokens }: Pick<ElasticPolicy, 'modules' | 'nested' | 'sourceTokens'>,
): string | null {
  const problem = assembly === undefined ? null : assemblyProblem(assembly, sizes, modules);
  if (problem) return `assembly must be ${problem}`;
  const { encoder } = (assembly as Assembly | undefined) ?? backboneOf(sizes);
  const unrouted = tokenCapacityProblem(tokenCapacity, encoder.length, sourceTokens);
  if (unrouted) return unrouted;
  if (ffnWidth === undefined || ffnWidth === 1) return null;
  if (!nested) {
    return `ffnWidth must be absent: no feed-forward of this model is nested; \`elastiform modular --nested\` makes them so, got ${JSON.stringify(ffnWidth)}`;
  }
  if (Array.isArray(ffnWidth)) {
    return `ffnWidth must be one width: all parts of an encoder-decoder model have the same, got ${JSON.stringify(ffnWidth)}`;
  }
  const wrong = widthProblem(ffnWidth, nested, sizes.decoder.ffn);
  return wrong && `ffnWidth ${wrong}`;
}

/** What is wrong with an assembly for a model with `modules`, or null. */
export function assemblyProblem(assembly: unknown, sizes: Sizes, modules: Modules | undefined): string | null {
  if (!modules) return 'absent: the model has no modules; train them with `elastiform modular`';
  if (typeof assembly !== 'object' || assembly === null || Object.keys(assembly).sort().join() !== 'decoder,encoder') {
    return `{ encoder, decoder }, each a list of parts such as ['0', '1', '2-3'], got ${JSON.stringify(assembly)}`;
  }
  for (const stack of stacks) {
    const problem = stackProblem((assembly as Record<Stack, unknown>)[stack], sizes[stack].layers, modules[stack]);
    if (problem) return `parts that cover every layer once: ${stack} ${problem}`;
  }
  return null;
}

function stackProblem(parts: unknown, layers: number, modules: readonly Span[]): string | null {
  if (!Array.isArray(parts)) return `must be a list of parts, got ${JSON.stringify(parts)}`;
  const there = `there are the layers 0 to ${layers - 1} and the modules ${modules.map(partId).join(', ') || 'none'}`;
  let next = 0;
  for (const part of parts as unknown[]) {
    const span = spanOf(part);
    if (!span) return `has ${JSON.stringify(part)}, which names no part; ${there}`;
    const known = isModule(part as string) ? modules.some((module) => partId(module) === part) : span.last < layers;
    if (!known) return `has ${part}, which the model lacks; ${there}`;
    if (span.first < next) return `has an overlap: ${part} comes after layer ${next - 1} is covered; ${there}`;
    if (span.first > next) return `has a gap: ${gap(next, span.first - 1)} before ${part}; ${there}`;
    next = span.last + 1;
  }
  if (next < layers) return `has a gap: ${gap(next, layers - 1)} at its end; ${there}`;
  return null;
}

const gap = (first: number, last: number) =>
  first === last ? `layer ${first} is missing` : `layers ${first} to ${last} are missing`;

/**
 * Of every number of parts the best assembly of one stack, from all layers down: that of the finest modules, with the least sum of squares of the
 * layers that each saves. Of equal ones that whose modules stand higher.
 */
export function ladder(layers: number, modules: readonly Span[]): string[][] {
  type Stretch = { readonly cost: number; readonly parts: readonly string[] };
  // By the layer that a stretch up to the top begins at, the best one of every number of parts.
  const from: Map<number, Stretch>[] = Array.from({ length: layers + 1 }, () => new Map());
  from[layers].set(0, { cost: 0, parts: [] });
  for (let first = layers - 1; first >= 0; first--) {
    // The layer itself first: a module must be better to come lower.
    const parts = [{ first, last: first }, ...modules.filter((module) => module.first === first)];
    for (const span of parts) {
      const own = (span.last - first) ** 2;
      for (const [count, rest] of from[span.last + 1]) {
        const cost = own + rest.cost;
        if (cost >= (from[first].get(count + 1)?.cost ?? Number.POSITIVE_INFINITY)) continue;
        from[first].set(count + 1, { cost, parts: [partId(span), ...rest.parts] });
      }
    }
  }
  return [...from[0]].sort(([a], [b]) => b - a).map(([, { parts }]) => [...parts]);
}

/** In which order assemblies become smaller. */
export type Strategy = 'speed-first' | 'size-first';

/**
 * Assemblies from the whole model to the smallest, each stack of the finest modules that make its number of parts: coarser ones save nothing more.
 * `speed-first`: the decoder, which runs once for every token, becomes smaller, then the encoder, which runs once; `size-first`: the stack that
 * has most of its parts left gives up the next one.
 */
export function assemblyPath(sizes: Sizes, modules: Modules, strategy: Strategy): Assembly[] {
  const rungs = {
    encoder: ladder(sizes.encoder.layers, modules.encoder),
    decoder: ladder(sizes.decoder.layers, modules.decoder),
  };
  const at = { encoder: 0, decoder: 0 };
  const path: Assembly[] = [];
  for (;;) {
    path.push({ encoder: rungs.encoder[at.encoder], decoder: rungs.decoder[at.decoder] });
    const left = (stack: Stack) => rungs[stack][at[stack]].length / sizes[stack].layers;
    const open = (['decoder', 'encoder'] as const).filter((stack) => at[stack] + 1 < rungs[stack].length);
    if (open.length === 0) return path;
    const [next] = strategy === 'speed-first' ? open : open.sort((a, b) => left(b) - left(a));
    at[next]++;
  }
}
