// What a micro-batch of modules' training runs: an assembly, a width, and shares of the source's tokens, each drawn.
import { ladder } from '../../elastic/modules.js';
import type { Nested } from '../../elastic/nested.js';
import type { SourceTokens } from '../../elastic/policy.js';
import { type Assembly, type Modules, partId, type Stack } from '../../model/parts.js';
import type { Random } from '../random.js';
import type { RoutedSources, SourceShares } from './replacing.js';

/** How often assemblies of the end leave the encoder whole. */
const wholeEncoders = 1 / 2;

/**
 * The assembly of a micro-batch, `progress` being the share of the steps that are done.
 *
 * Up to the share `full` of the steps spans of the finest granularity are replaced, then those of coarser ones as well: each stack is walked from
 * its first layer on, a granularity is drawn among those that may begin there, and its module taken with a probability that rises from `start`
 * to 1, else its layers. One of three assemblies leaves the encoder whole.
 *
 * From then on assemblies are like those that are chosen in the end, made of the finest modules: a number of parts is drawn for each stack, the
 * more often the more layers it saves, as what stands for more has more to learn; half of them leave the encoder whole, as those do that
 * are made for speed.
 */
export function drawAssembly(
  spec: Record<Stack, { readonly layers: number }>,
  modules: Modules,
  { progress, replace, random }: { progress: number; replace: { start: number; full: number }; random: Random },
): Assembly {
  const { start, full } = replace;
  if (progress >= full) {
    const whole = random.uniform() < wholeEncoders;
    const draw = (stack: Stack): string[] => {
      const { layers } = spec[stack];
      const chances = ladder(layers, modules[stack]).flatMap((parts) =>
        Array.from({ length: layers - parts.length }, () => parts),
      );
      return chances.length > 0 ? chances[random.below(chances.length)] : numbered(layers);
    };
    const assembly = { encoder: whole ? numbered(spec.encoder.layers) : draw('encoder'), decoder: draw('decoder') };
    // Without a module there is nothing to learn.
    return hasModules(assembly) ? assembly : { ...assembly, encoder: draw('encoder') };
  }
  const rate = start + (1 - start) * (progress / full);
  const sizes = [...new Set([...modules.encoder, ...modules.decoder].map(sizeOf))].sort((a, b) => a - b);
  const allowed = sizes.slice(0, 1 + Math.floor((progress / full) * sizes.length));
  const walk = (stack: Stack, rate: number): string[] => {
    const parts: string[] = [];
    for (let at = 0; at < spec[stack].layers; ) {
      const spans = modules[stack].filter((span) => span.first === at && allowed.includes(sizeOf(span)));
      const span = spans.length > 0 ? spans[random.below(spans.length)] : { first: at, last: at };
      if (random.uniform() < rate) parts.push(partId(span));
      else parts.push(...numbered(spec[stack].layers).slice(span.first, span.last + 1));
      at = span.last + 1;
    }
    return parts;
  };
  const wholeEncoder = random.uniform() < 1 / 3;
  const assembly = { encoder: walk('encoder', wholeEncoder ? 0 : rate), decoder: walk('decoder', rate) };
  return hasModules(assembly) ? assembly : { encoder: walk('encoder', 1), decoder: walk('decoder', 1) };
}

const hasModules = ({ encoder, decoder }: Assembly): boolean =>
  [...encoder, ...decoder].some((part) => part.includes('-'));

/** All layers of a stack, as parts. */
const numbered = (layers: number): string[] => Array.from({ length: layers }, (_, i) => `${i}`);

const sizeOf = ({ first, last }: { first: number; last: number }): number => last - first + 1;

/** How often a micro-batch runs all units, and of the others how often it runs all layers, if they have corrections. */
const wholeWidths = 2 / 3;
const allLayers = 1 / 3;

/**
 * What a micro-batch has of settings beside its assembly, or in place of it: nothing where all units run. Most assemblies will be run whole, and
 * narrower ones learn by the same modules. All layers, narrower, have nothing to learn but corrections.
 */
export function drawWidth(
  { granularities }: Pick<Nested, 'granularities'>,
  corrections: boolean,
  random: Random,
): { ffnWidth?: number; assembly?: undefined } {
  if (random.uniform() < wholeWidths) return {};
  const ffnWidth = granularities[random.below(granularities.length - 1)];
  return corrections && random.uniform() < allLayers ? { ffnWidth, assembly: undefined } : { ffnWidth };
}

/** How often tokens are routed, and how often that is in all layers. */
const routedTokens = 1 / 2;
const routedLayers = 1 / 4;

/** What a micro-batch of so many sources has of routing; none: all tokens enter everywhere. Shares are drawn for each source, one point for both places. */
export function drawSources(
  routing: SourceTokens,
  random: Random,
  sources: number,
): { tokens: RoutedSources; whole: boolean } | undefined {
  if (random.uniform() >= routedTokens) return undefined;
  const whole = random.uniform() < routedLayers;
  const drawn = Array.from({ length: sources }, () => sharesAt(routing, random.uniform()));
  return { whole, tokens: { shares: (source) => drawn[source], random } };
}

/** The shares of tokens at a point from 0, the low ends of the ranges, to 1, the high ones. */
export const sharesAt = ({ capacity }: SourceTokens, at: number): SourceShares =>
  Object.fromEntries(Object.entries(capacity).map(([place, [low, high]]) => [place, low + (high - low) * at]));
