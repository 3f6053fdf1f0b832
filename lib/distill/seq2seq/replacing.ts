// Modules of an encoder-decoder model in training: assemblies run beside the whole model, which teaches them; modules learn, corrections of layers, and routers.

import { effectiveSettings, unitsAt } from '../../elastic/assemblies.js';
import type { ElasticSpec } from '../../elastic/axes.js';
import { initialLora, loraInputs, seq2seqLoraParameters, trainableCorrection } from '../../elastic/lora.js';
import { backboneOf } from '../../elastic/modules.js';
import { type Nested, oneWidth, sharedWidth } from '../../elastic/nested.js';
import { type ElasticPolicy, type SourceTokens, sourceRouterId, sourceRouters } from '../../elastic/policy.js';
import {
  routingOf,
  type SourceCapacities,
  sourceCapacities,
  sourceCapacityFeeds,
  sourceKey,
  sourceSelector,
} from '../../elastic/source_routing.js';
import {
  add,
  crossEntropy,
  divergence,
  dot,
  Graph,
  gatherRows,
  hiddenDistance,
  KeptPrograms,
  type Node,
  Program,
  scale,
  scatterAdd,
  zeros,
} from '../../graph/index.js';
import type { Checkpoint } from '../../io/safetensors.js';
import type { Change } from '../../model/decoder.js';
import { type Assembly, type Modules, type Stack, spanOf, stacks } from '../../model/parts.js';
import { type Place, selectEverything } from '../../model/select.js';
import { decodeTarget, encodeSource, type StackOptions, unitsPerLayer } from '../../model/seq2seq.js';
import type { Seq2SeqSpec } from '../../model/seq2seq_spec.js';
import {
  assembled,
  bindSeq2Seq,
  corrected,
  moduleWeights,
  type Seq2SeqNodes,
  type Seq2SeqTensors,
  seq2seqModuleSlots,
} from '../../model/seq2seq_weights.js';
import { planOf, storedValues } from '../../model/weights.js';
import type { Engine } from '../../native/index.js';
import { firstShare, wholeEpoch } from '../batches.js';
import { joinedPlans, routerSlots } from '../plan.js';
import { Random } from '../random.js';
import { credited, noiseFeeds } from '../steps.js';
import { Trainable } from '../trainable.js';
import { lossRows } from './finetune.js';
import { frozenHead, headInput, pairInputs, pairRun } from './model.js';
import type { PairBatch, PairData } from './pairs.js';

/** Factors of the parts of the loss; a part of factor 0 is not computed. */
export interface ModuleLosses {
  /** Cross-entropy of the targets, nats per token; default 1. */
  task?: number;
  /** KL of the next token from the whole model's, nats per token; default 1. */
  logits?: number;
  /**
   * Squared distance of the residual stream after each module from the whole model's after the last layer that it stands for, over that
   * stream's mean square; summed over modules; default 0.5.
   */
  hidden?: number;
  /** The same of what each head of the module's attention gives, to itself and to the source, before it is projected; default 0.2. */
  attention?: number;
}

/** What an assembly lost on a batch. */
export type ModuleTerms = Record<'loss' | keyof ModuleLosses, number>;

/** Assemblies of a model whose modules are trained. */
export interface Replacing extends Disposable {
  /**
   * Weights of all modules, by the names of `seq2seqModuleSlots`, corrections, by those of `seq2seqLoraParameters`, and routers, by those of
   * `routerSlots`.
   */
  readonly trainable: Trainable;
  /**
   * Adds the gradient of what learns at some settings to `trainable.grads`, every token of a target weighing `weight`. Shares of tokens are
   * those of `tokens`, not of the settings.
   */
  run(
    settings: ElasticSpec,
    batch: PairBatch,
    at: { weight: number; tokens?: RoutedSources; signal?: AbortSignal },
  ): Promise<ModuleTerms>;
  /** Cross-entropy of a target's token, nats, KL from the whole model's tokens, and the share of tokens that are the likeliest. */
  quality(settings: ElasticSpec, data: PairData, signal?: AbortSignal): Promise<AssemblyQuality>;
}

/** Shares of tokens that enter sub-layers of the encoder, the same in all its parts; default all. */
export type SourceShares = Readonly<Partial<Record<Place, number>>>;

/** How tokens are routed in training. */
export interface RoutedSources {
  /** Of every source of a batch; of all of them at the same places below 1. */
  readonly shares: (source: number) => SourceShares;
  /** Draws the noise that makes routers explore. */
  readonly random: Random;
}

/** Of the tokens of held-out targets, each after the right ones before it. */
export interface AssemblyQuality {
  /** Cross-entropy, nats per token. */
  loss: number;
  /** KL from the whole model, nats per token. */
  divergence: number;
  /** Share that comes first. */
  accuracy: number;
}

/** Programs of assemblies that are kept; one that is drawn after so many others is compiled again, to the same bits. */
const keptPrograms = 32;

/** What there is besides modules. */
export interface Composed {
  /** Corrections of the layers, which learn with the modules and are in use at all settings but the full ones. */
  readonly lora?: NonNullable<ElasticPolicy['lora']>;
  /** Feed-forwards run at the width of the settings. */
  readonly nested?: Nested;
  /** Routers of the encoder's layers and modules, which begin with zeros. */
  readonly sourceTokens?: SourceTokens;
}

/**
 * Modules begin as copies of the last layers of their spans: what their attention gives and what they leave behind then has the features of
 * what it is compared with. Corrections begin as nothing.
 *
 * @param weights of the whole model, which stays as it is
 * @param options.seed of the first factors of corrections
 * @param options.routerLrScale learning rate of routers over that of the rest
 */
export async function replacing(
  spec: Seq2SeqSpec,
  checkpoint: Checkpoint,
  weights: Seq2SeqTensors,
  modules: Modules,
  data: PairData,
  losses: Required<ModuleLosses>,
  {
    engine,
    batchTokens,
    recompute = false,
    seed = 0,
    routerLrScale = 1,
    ...composed
  }: { engine: Engine; batchTokens: number; recompute?: boolean; seed?: number; routerLrScale?: number } & Composed,
): Promise<Replacing> {
  const { lora, sourceTokens } = composed;
  const slots = seq2seqModuleSlots(spec, modules);
  const corrections = lora ? seq2seqLoraParameters(lora, spec) : [];
  const routers = sourceRouters({ sourceTokens, modules });
  const ofRouters = routers.flatMap(({ id, outputs }) => routerSlots(id, spec.encoder.hidden, outputs));
  const routerNames = new Set(ofRouters.map(({ name }) => name));
  const plan = joinedPlans([
    { plan: planOf([...slots, ...corrections]), lrScale: 1 },
    { plan: planOf(ofRouters), lrScale: routerLrScale },
  ]);
  const trainable = new Trainable(plan);
  const initial = new Float32Array(plan.size);
  const place = new Map(plan.parameters.map(({ name, offset }) => [name, offset]));
  for (const slot of slots) initial.set(storedValues(checkpoint, spec.decoder, slot)!, place.get(slot.name)!);
  const random = new Random(seed, 'lora');
  for (const parameter of corrections) {
    initial.set(
      initialLora(parameter, loraInputs(parameter), () => random.uniform()),
      place.get(parameter.name)!,
    );
  }
  trainable.params.write(initial);

  const head = frozenHead(weights.head);

  const squares = await meanSquares(spec, weights, data, { engine, batchTokens });
  const build = (
    assembly: Assembly,
    {
      full,
      narrow,
      train,
      capacities,
    }: { full: boolean; narrow: boolean; train: boolean; capacities: SourceCapacities },
  ) => {
    const graph = new Graph();
    const node = (name: string) => graph.state(trainable.view(name), name);
    const base = bindSeq2Seq(graph, weights);
    const own = moduleWeights(spec, modules, ({ name }) => node(name));
    const parted = assembled(base, own, assembly);
    const student = lora && !full ? corrected(parted, trainableCorrection(lora, node)) : parted;
    // At full width there is no dim, and what is alike is computed once for both.
    const width = narrow && { width: oneWidth(graph, spec.decoder.ffn) };
    const routerOf = (id: string) => ({ weight: node(`${id}.weight`), bias: node(`${id}.bias`) });
    const inputs = pairInputs(graph, batchTokens);
    const sourceWeight = graph.feed('sourceWeight', 'f32', [inputs.sourceRows]);
    const theirs = bothStacks(graph, spec, base, inputs);
    const { segments } = inputs.target;
    const rows = sourceSelector(graph, assembly.encoder, capacities, routerOf, segments, { explore: train });
    const { routed } = rows;
    const changes: Change[] = [];
    const mine = bothStacks(graph, spec, student, inputs, {
      encoder: { recompute, changes, selector: { ...rows, ...width } },
      decoder: { recompute, selector: { ...selectEverything, ...width } },
    });
    const parts: Node[] = [];
    const sum = (name: keyof ModuleLosses, nodes: readonly Node[]) => {
      if (nodes.length === 0) return;
      const total = nodes.reduce(add);
      graph.output(name, total);
      parts.push(scale(total, losses[name]));
    };
    const matrix = head.matrix(graph, base.head.weight);
    const [x, y] = [mine.x, theirs.x].map((states) => headInput(spec, states, head.biased));
    const { weight, targets } = inputs;
    graph.tag('head', () => {
      const task = crossEntropy(x, matrix, targets, weight);
      if (losses.task > 0 || !train) sum('task', [task.loss]);
      if (losses.logits > 0 || !train) sum('logits', [divergence(x, y, matrix, weight).loss]);
      if (!train) graph.output('accuracy', dot(task.correct, weight));
    });
    if (!train) return Program.compile(graph, engine);
    const hidden: Node[] = [];
    const attention: Node[] = [];
    graph.tag('distance', () => {
      for (const stack of stacks) {
        const rowWeight = stack === 'encoder' ? sourceWeight : weight;
        const distance = (a: Node, b: Node, square: number) =>
          scale(hiddenDistance(a, b, rowWeight, 'mse').loss, 1 / square);
        for (const [i, part] of assembly[stack].entries()) {
          if (!own[stack].has(part)) continue;
          const { last } = spanOf(part)!;
          if (losses.hidden > 0)
            hidden.push(
              distance(mine[stack].residuals[i], theirs[stack].residuals[last], squares[stack].residuals[last]),
            );
          for (let n = 0; losses.attention > 0 && n < unitsPerLayer[stack] - 1; n++) {
            const [at, taught] = [unitsPerLayer[stack] * i + n, unitsPerLayer[stack] * last + n];
            const pair = [mine[stack].units[at], theirs[stack].units[taught]] as const;
            const place = stack === 'encoder' ? routed.find((r) => r.layer === i && r.places[0] === 'attn') : undefined;
            const [ours, wanted] = place ? ofRows(pair, place.rows) : pair;
            attention.push(distance(ours, wanted, squares[stack].units[taught]));
          }
        }
      }
    });
    sum('hidden', hidden);
    sum('attention', attention);
    const loss = parts.reduce(add);
    const learn = stacks.flatMap((stack) =>
      assembly[stack].map((part) => `${stack}.${own[stack].has(part) ? 'modules' : 'layers'}.${part}.`),
    );
    trainable.accumulateGradients(
      graph,
      loss,
      node,
      (name) => !routerNames.has(name) && learn.some((prefix) => name.startsWith(prefix)),
    );
    if (routed.length === 0) return Program.compile(graph, engine);
    // What each row would add to a sub-layer is what it adds where all rows of the assembly enter everywhere.
    const dense: Change[] = [];
    encodeSource(graph, spec, student, inputs.source, {
      changes: dense,
      selector: { ...selectEverything, ...width },
    });
    credited(
      loss,
      { tokens: routed, experts: [] },
      changes,
      { changes: dense, units: [] },
      { spec: spec.encoder, layers: [] },
      { offsets: inputs.source.offsets, weight: sourceWeight },
      (router, credits) => {
        const { layer, places } = routed.find(({ id }) => id === router.id)!;
        const id = sourceRouterId(assembly.encoder[layer], places[0]);
        graph.tag('routers', () =>
          trainable.accumulateGradients(graph, credits, node, (name) => name.startsWith(`${id}.`)),
        );
      },
    );
    return Program.compile(graph, engine);
  };

  const programs = new KeptPrograms(keptPrograms);
  const programOf = (settings: ElasticSpec, train: boolean) => {
    const effective = effectiveSettings(settings, spec, composed);
    const { assembly = backboneOf(spec) } = effective;
    const full = Object.keys(effective).length === 0;
    const narrow = effective.ffnWidth !== undefined;
    const capacities = sourceCapacities(assembly.encoder.length, effective.tokenCapacity);
    const key = JSON.stringify([train, full, narrow, assembly.encoder, assembly.decoder, sourceKey(capacities)]);
    const dims: Record<string, number> = narrow ? { [sharedWidth]: unitsAt(effective, spec, composed) } : {};
    const program = programs.get(key, () => build(assembly, { full, narrow, train, capacities }));
    return { program, dims, capacities };
  };
  return {
    trainable,
    async run(settings, batch, { weight, tokens, signal }) {
      const own = programOf({ ...settings, tokenCapacity: tokens?.shares(0) }, true);
      const { dims, feeds } = moduleRun(batch, weight, own.dims);
      const sources = { rows: dims.sourceRows, segments: dims.segments };
      const { length } = own.capacities.attn;
      const routing = tokens && {
        ...sourceCapacityFeeds(
          Array.from({ length: dims.segments }, (_, source) => sourceCapacities(length, tokens.shares(source))),
        ),
        ...noiseFeeds(routingOf(own.capacities), sources, tokens.random),
      };
      const { outputs } = await own.program.run({ dims, feeds: { ...feeds, ...routing }, signal });
      const term = (name: keyof ModuleLosses) => outputs[name]?.[0] ?? 0;
      const terms = {
        task: term('task'),
        logits: term('logits'),
        hidden: term('hidden'),
        attention: term('attention'),
      };
      const { task, logits, hidden, attention } = terms;
      const loss = losses.task * task + losses.logits * logits + losses.hidden * hidden + losses.attention * attention;
      return { loss, ...terms };
    },
    async quality(settings, data, signal) {
      const { program, dims: width, capacities } = programOf(settings, false);
      const total = { loss: 0, divergence: 0, accuracy: 0 };
      let tokens = 0;
      for (const batch of wholeEpoch(data, batchTokens)) {
        const { dims, feeds } = moduleRun(batch, 1, width);
        const shares = sourceCapacityFeeds(new Array(dims.segments).fill(capacities));
        const { outputs } = await program.run({ dims, feeds: { ...feeds, ...shares }, signal });
        total.loss += outputs.task[0];
        total.divergence += outputs.logits[0];
        total.accuracy += outputs.accuracy[0];
        tokens += lossRows(batch);
      }
      return { loss: total.loss / tokens, divergence: total.divergence / tokens, accuracy: total.accuracy / tokens };
    },
    [Symbol.dispose]() {
      programs.dispose();
      trainable.dispose();
      head[Symbol.dispose]();
    },
  };
}

interface Taps<T> {
  /** The residual stream after each layer, [N, D]. */
  readonly residuals: T[];
  /** What the last products of each layer read, [N, heads * headDim] of attention. */
  readonly units: T[];
}

/** Runs both stacks: what the last layer of the decoder gives, and what there was on the way. */
function bothStacks(
  graph: Graph,
  spec: Seq2SeqSpec,
  weights: Seq2SeqNodes,
  { source, target }: Pick<ReturnType<typeof pairInputs>, 'source' | 'target'>,
  options: { readonly [stack in Stack]?: Omit<StackOptions, keyof Taps<Node>> } = {},
): { readonly x: Node } & Record<Stack, Taps<Node>> {
  const taps = { encoder: { residuals: [], units: [] }, decoder: { residuals: [], units: [] } };
  const features = encodeSource(graph, spec, weights, source, { ...taps.encoder, ...options.encoder });
  const attended = { features, offsets: source.offsets };
  const x = decodeTarget(graph, spec, weights, target, attended, { ...taps.decoder, ...options.decoder });
  return { x, ...taps };
}

/** Batches that mean squares are taken over. */
const squareBatches = 4;

/** Mean squares of the whole model's residual streams and units, by which distances are divided, over the first batches of the data. */
async function meanSquares(
  spec: Seq2SeqSpec,
  weights: Seq2SeqTensors,
  data: PairData,
  { engine, batchTokens }: { engine: Engine; batchTokens: number },
): Promise<Record<Stack, Taps<number>>> {
  const graph = new Graph();
  const inputs = pairInputs(graph, batchTokens);
  const sourceWeight = graph.feed('sourceWeight', 'f32', [inputs.sourceRows]);
  const all = bothStacks(graph, spec, bindSeq2Seq(graph, weights), inputs);
  const each = <T>(f: (node: Node, name: string, rowWeight: Node) => T): Record<Stack, Taps<T>> => {
    const of = (stack: Stack, kind: keyof Taps<T>) =>
      all[stack][kind].map((node, i) =>
        f(node, `${stack}.${kind}.${i}`, stack === 'encoder' ? sourceWeight : inputs.weight),
      );
    const both = (stack: Stack) => ({ residuals: of(stack, 'residuals'), units: of(stack, 'units') });
    return { encoder: both('encoder'), decoder: both('decoder') };
  };
  each((node, name, rowWeight) => {
    graph.output(name, hiddenDistance(node, zeros(graph, node.shape), rowWeight, 'mse').loss);
  });
  using program = Program.compile(graph, engine);
  const sums = new Map<string, number>();
  for (const batch of firstShare(data, batchTokens, squareBatches)) {
    const { outputs } = await program.run(moduleRun(batch, 1 / (lossRows(batch) * squareBatches)));
    for (const [name, values] of Object.entries(outputs)) sums.set(name, (sums.get(name) ?? 0) + values[0]);
  }
  // A stream of zeros has no scale: distances from it are as they are.
  return each((_, name) => sums.get(name) || 1);
}

/** The same rows [R, D] of several nodes among N, zeros elsewhere: those that entered, of `mine`, which has no others, and of `theirs` [N, D]. */
function ofRows([mine, theirs]: readonly [Node, Node], rows: Node): [Node, Node] {
  const spread = (x: Node) => scatterAdd(zeros(x.graph, theirs.shape), x, rows);
  return [spread(mine), spread(gatherRows(theirs, rows))];
}

/** Dims and feeds of a batch, and `more` dims; the rows of its sources weigh as much as its targets do together. */
function moduleRun(batch: PairBatch, weight: number, more: Readonly<Record<string, number>> = {}) {
  const { dims, feeds } = pairRun(batch, weight);
  const { length } = batch.source.ids;
  const sourceWeight = new Float32Array(length).fill((weight * lossRows(batch)) / length);
  return { dims: { ...dims, ...more }, feeds: { ...feeds, sourceWeight } };
}
