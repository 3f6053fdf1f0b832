// A loaded encoder-decoder model: mapped weights, tokenizers of sources and targets and settings of generation on one engine.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { flopsAt, unitsAt } from '../../elastic/assemblies.js';
import type { ElasticSpec } from '../../elastic/axes.js';
import { LoraTensors } from '../../elastic/lora.js';
import { assemblyText, backboneOf } from '../../elastic/modules.js';
import { oneWidth, sharedWidth } from '../../elastic/nested.js';
import type { ElasticPolicy } from '../../elastic/policy.js';
import { type MeasuredOn, Profiles } from '../../elastic/profile.js';
import { routerNodes } from '../../elastic/rows.js';
import { type SourceCapacities, sourceCapacities, sourceSelector } from '../../elastic/source_routing.js';
import { readElastic, routerFile } from '../../elastic/store.js';
import type { Dim, Graph } from '../../graph/index.js';
import { readJson } from '../../io/files.js';
import { Checkpoint, openSafetensors } from '../../io/safetensors.js';
import { loadTokenizer, type Tokenizer } from '../../io/tokenizer.js';
import { Config } from '../../model/config.js';
import type { Seq2SeqFlops } from '../../model/flops.js';
import type { Stack } from '../../model/parts.js';
import { type Selector, selectEverything } from '../../model/select.js';
import { type Seq2SeqSpec, seq2seqSpecFromConfig } from '../../model/seq2seq_spec.js';
import {
  assembled,
  bindSeq2Seq,
  corrected,
  loadSeq2SeqWeights,
  type ModuleWeights,
  moduleWeights,
  type Seq2SeqNodes,
  type Seq2SeqTensors,
} from '../../model/seq2seq_weights.js';
import { InvalidArgumentError } from '../../native/errors.js';
import { Engine, loadAddon, type Tensor } from '../../native/index.js';
import { measuredOn } from '../machine.js';
import {
  checkContext,
  defaultContext,
  defaultSequences,
  type ModelStart,
  type RouterTensors,
  routerTensors,
} from '../network.js';
import { owning } from '../owning.js';
import type { LoadOptions } from '../types.js';
import { type WritingSettings, writingSettings } from './writing.js';

/** Tokenizer of targets, where it is not that of sources. */
export const targetTokenizer = 'tokenizer_target.json';

export interface Seq2SeqNetwork {
  readonly dir: string;
  readonly spec: Seq2SeqSpec;
  readonly engine: Engine;
  readonly weights: Seq2SeqTensors;
  /** Of modules; none in a plain model. */
  readonly modules: ModuleWeights<Tensor>;
  /** Of the encoder's tokens, by their ids; none in a plain model. */
  readonly routers: ReadonlyMap<string, RouterTensors>;
  readonly policy: ElasticPolicy | null;
  /** Corrections of its own layers, in use at every budget but the full one. */
  readonly lora: LoraTensors | null;
  /** Of the model, and of its modules. */
  readonly weightBytes: number;
  /** What was measured of its assemblies, here or on other machines. */
  readonly profiles: Profiles;
  /** What times measured now depend on. */
  measuredOn(): MeasuredOn;
  readonly settings: WritingSettings;
  /** Of sources, and of targets. */
  readonly sourceTokenizer: Tokenizer | null;
  readonly tokenizer: Tokenizer | null;
  /** Tokens of a source, and tokens of a target. */
  readonly maxContext: number;
  /** Texts that are written at a time, every beam one. */
  readonly maxSequences: number;
  /** Rows that the caches of targets hold in all, and those of sources. */
  readonly cacheRows: number;
  dispose(): void;
}

/** What runs of a model: all of it, or an assembly of parts, of which some of their units. */
export interface Assembled {
  /** Equal ones run together: in the decoder, and if `sourceKey` of their capacities is equal, too, in the encoder. */
  readonly key: string;
  /** Equal ones have one program of each kind, which takes the values of dims at each run. */
  readonly program: string;
  /** Of the encoder's tokens. */
  readonly capacities: SourceCapacities;
  readonly dims: Readonly<Record<string, number>>;
  /** The weights of a program, and what is selected in its stacks, if it reads so many sources. */
  bind(graph: Graph): Seq2SeqNodes;
  select(graph: Graph, sources: Dim): Readonly<Record<Stack, Selector>>;
  readonly flops: Seq2SeqFlops;
}

/** @param settings of an operating point; none: the whole model */
export function assembledOf(network: Seq2SeqNetwork, settings: ElasticSpec): Assembled {
  const { spec, weights, modules, routers, policy, lora } = network;
  const { ffn } = spec.decoder;
  const full = Object.keys(settings).length === 0;
  const assembly = settings.assembly ?? backboneOf(spec);
  const capacities = sourceCapacities(assembly.encoder.length, settings.tokenCapacity);
  const { tokenCapacity: _, ...others } = settings;
  const program = full ? 'full' : assemblyText(assembly);
  return {
    key: `${program} ${JSON.stringify(others)}`,
    ...{ program, capacities },
    dims: policy?.nested ? { [sharedWidth]: unitsAt(settings, spec, policy) } : {},
    bind(graph) {
      if (full) return bindSeq2Seq(graph, weights);
      const nodes = bindSeq2Seq(graph, assembled(weights, modules, assembly));
      return lora ? corrected(nodes, lora.whole(graph)) : nodes;
    },
    select(graph, sources) {
      const width = policy?.nested ? { width: oneWidth(graph, ffn) } : {};
      const rows = sourceSelector(graph, assembly.encoder, capacities, routerNodes(graph, routers), sources);
      return { encoder: { ...rows, ...width }, decoder: { ...selectEverything, ...width } };
    },
    flops: flopsAt(spec, settings, policy),
  };
}

/** Bytes of the default caches. */
const defaultBytes = 2 ** 30;

/**
 * Maps the directory of an encoder-decoder model. Errors: InvalidFileError naming the file and what is wrong with it,
 * InvalidArgumentError for an option that such models have not or a value out of range, AbortError.
 */
export async function loadSeq2Seq(
  dir: string,
  options: LoadOptions,
  { config, configPath, progress }: ModelStart,
): Promise<Seq2SeqNetwork> {
  for (const name of ['adapter', 'adapters', 'maxLevel', 'maxBatchTokens'] as const) {
    if (options[name] !== undefined) {
      throw new InvalidArgumentError(`[loadModel] ${name} is for decoders, and ${dir} is an encoder-decoder model`);
    }
  }
  const spec = seq2seqSpecFromConfig(config, configPath);
  checkContext(spec.decoder, options);
  const generationPath = join(dir, 'generation_config.json');
  const own = existsSync(generationPath);
  const settings = writingSettings(
    own ? await readJson(generationPath) : config,
    own ? generationPath : configPath,
    Config.of(config, configPath),
    spec.decoder.vocab,
  );
  const elastic = await readElastic(dir);
  const maxContext = options.maxContext ?? Math.min(spec.context, defaultContext);
  const maxSequences = options.maxSequences ?? Math.max(defaultSequences, settings.beams);
  const { layers, kvHeads, headDim } = spec.decoder;
  const rowBytes = 2 * layers * kvHeads * headDim * Float32Array.BYTES_PER_ELEMENT;
  const all = maxSequences * maxContext;
  const asked = options.kvCacheBytes ?? Math.max(defaultBytes, 2 * settings.beams * maxContext * rowBytes);
  const cacheRows = Math.min(all, Math.floor(asked / (2 * rowBytes)));

  progress(1);
  return owning(async (own, dispose) => {
    const checkpoint = own(Checkpoint.open(dir));
    const loaded = own(loadSeq2SeqWeights(spec, checkpoint, options.dtype ? { dtype: options.dtype } : {}));
    const none = { weights: { encoder: new Map(), decoder: new Map() }, bytes: 0 };
    const modules = elastic ? own(loadModules(dir, spec, elastic.policy, options.dtype)) : none;
    const lora = elastic?.lora ? own(new LoraTensors(elastic.lora)) : null;
    const routers = new Map(
      [...(elastic?.routers ?? [])].map(([id, router]) => [id, routerTensors(router, spec.encoder.hidden, own)]),
    );
    progress(2);
    const has = (name: string) => existsSync(join(dir, name));
    const sourceTokenizer = has('tokenizer.json') ? await loadTokenizer(dir) : null;
    const tokenizer = has(targetTokenizer) ? await loadTokenizer(dir, targetTokenizer) : sourceTokenizer;
    progress(3);
    if (options.threads !== undefined) loadAddon().setThreads(options.threads);
    const engine = own(new Engine(options.device, { activations: options.activations, weights: loaded.dtype }));
    return {
      ...{ dir, spec, engine, weights: loaded.weights, modules: modules.weights, routers, lora },
      policy: elastic?.policy ?? null,
      ...{ weightBytes: loaded.bytes + modules.bytes, settings },
      profiles: await Profiles.read(dir, elastic?.policy.base.weightsSha256, `elastiform assemble ${dir} --record`),
      measuredOn: () => measuredOn(engine, loaded.dtype),
      ...{ sourceTokenizer, tokenizer, maxContext, maxSequences, cacheRows, dispose },
    };
  });
}

/** Maps the modules of an elastic directory that readElastic has checked. */
function loadModules(
  dir: string,
  spec: Seq2SeqSpec,
  { modules }: ElasticPolicy,
  dtype: LoadOptions['dtype'],
): { weights: ModuleWeights<Tensor>; bytes: number; dispose(): void } {
  const file = openSafetensors(join(dir, routerFile));
  try {
    let bytes = 0;
    const weights = moduleWeights(spec, modules!, ({ name, shape }) => {
      const { begin, end } = file.info(name);
      bytes += end - begin;
      const tensor = file.tensor(name);
      if (dtype !== undefined && shape.length === 2) tensor.setPackAs(dtype);
      return tensor;
    });
    return { weights, bytes, dispose: () => file.dispose() };
  } catch (error) {
    file.dispose();
    throw error;
  }
}
