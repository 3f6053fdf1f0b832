// Encoder-decoder models of several layers with modules that are copies of layers, and stock checkpoints made of such layers.
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type TrainedModules, writeModules } from '../../lib/elastic/elastify.js';
import { mergedLora } from '../../lib/elastic/lora.js';
import { type Modules, type Span, type Stack, spansOf } from '../../lib/elastic/modules.js';
import type { Nested } from '../../lib/elastic/nested.js';
import { type Level, type SourceTokens, sourceRouters } from '../../lib/elastic/policy.js';
import { manifestFile } from '../../lib/elastic/store.js';
import type { ElasticModel } from '../../lib/infer/model.js';
import type { GenerateOptions } from '../../lib/infer/types.js';
import { editJson, sha256File } from '../../lib/io/files.js';
import { toBf16 } from '../../lib/io/rounding.js';
import { Checkpoint, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { copyCheckpoint } from '../../lib/io/slices.js';
import { projections } from '../../lib/model/select.js';
import { type Seq2SeqSpec, seq2seqSpecFromConfig } from '../../lib/model/seq2seq_spec.js';
import { loadSeq2SeqWeights, seq2seqModuleSlots, seq2seqModules } from '../../lib/model/seq2seq_weights.js';
import { readSeq2SeqCases, seq2seqDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';

const readJson = (path: string) => JSON.parse(readFileSync(path, 'utf8'));
const layerName = /^((?:model\.)?(encoder|decoder)\.(?:layers|block)\.)(\d+)(\..*)$/;

export const specOf = (dir: string): Seq2SeqSpec => {
  const path = join(dir, 'config.json');
  return seq2seqSpecFromConfig(readJson(path), path);
};

type Layers = Readonly<Record<Stack, readonly number[]>>;

/** The tensors of a checkpoint whose stacks have these layers of it, in this order; others as they are. */
export function tensorsOf(dir: string, layers: Layers): Record<string, TensorData> {
  using checkpoint = Checkpoint.open(dir);
  const tensors: Record<string, TensorData> = {};
  for (const name of checkpoint.names()) {
    const tensor = checkpoint.tensor(name);
    const data = { dtype: tensor.dtype, shape: tensor.shape, data: tensor.read() };
    const [, prefix, stack, layer, rest] = layerName.exec(name) ?? [];
    const table = name.includes('relative_attention_bias');
    if (prefix === undefined || table) tensors[name] = data;
    else {
      for (const [i, from] of layers[stack as Stack].entries()) {
        if (from === Number(layer)) tensors[`${prefix}${i}${rest}`] = data;
      }
    }
  }
  return tensors;
}

/** Writes a checkpoint with these layers of another one, as a stock directory. */
export async function writeLayers(from: string, out: string, layers: Layers): Promise<string> {
  cpSync(from, out, { recursive: true });
  await writeSafetensors(join(out, 'model.safetensors'), tensorsOf(from, layers));
  const [encoder, decoder] = [layers.encoder.length, layers.decoder.length];
  const config = editJson(readFileSync(join(from, 'config.json'), 'utf8'), (fields) => ({
    ...fields,
    ...('num_layers' in fields && { num_layers: encoder, num_decoder_layers: decoder }),
    ...('encoder_layers' in fields && { encoder_layers: encoder, decoder_layers: decoder }),
    ...('num_hidden_layers' in fields && { num_hidden_layers: encoder }),
  }));
  writeFileSync(join(out, 'config.json'), config);
  return out;
}

/** Writes a checkpoint whose feed-forwards have the first units alone, as a stock directory. */
export async function writeNarrow(from: string, out: string, units: number): Promise<string> {
  cpSync(from, out, { recursive: true });
  using checkpoint = Checkpoint.open(from);
  const tensors = checkpoint.names().map((name): [string, TensorData] => {
    const tensor = checkpoint.tensor(name);
    const stored = { dtype: tensor.dtype, shape: tensor.shape, data: tensor.read() };
    if (/\.(fc1|wi|wi_0|wi_1)\.(weight|bias)$/.test(name)) {
      const inputs = tensor.shape[1] ?? 1;
      return [
        name,
        { ...stored, shape: [units, ...tensor.shape.slice(1)], data: stored.data.slice(0, units * inputs) },
      ];
    }
    if (!/\.(fc2|wo)\.weight$/.test(name)) return [name, stored];
    const [outputs, inputs] = tensor.shape;
    const data = stored.data.slice(0, outputs * units);
    for (let row = 0; row < outputs; row++)
      data.set(stored.data.subarray(row * inputs, row * inputs + units), row * units);
    return [name, { ...stored, shape: [outputs, units], data }];
  });
  await writeSafetensors(join(out, 'model.safetensors'), Object.fromEntries(tensors));
  const config = editJson(readFileSync(join(from, 'config.json'), 'utf8'), (fields) =>
    'd_ff' in fields ? { ...fields, d_ff: units } : { ...fields, encoder_ffn_dim: units, decoder_ffn_dim: units },
  );
  writeFileSync(join(out, 'config.json'), config);
  return out;
}

/** A golden model with more layers, all different, that ends its texts after 12 tokens. */
export async function deepSeq2Seq(
  name: string,
  { encoder, decoder }: Record<Stack, number> = { encoder: 4, decoder: 6 },
  dir = temporaryDirectory(),
): Promise<string> {
  const from = seq2seqDirectory(name);
  const spec = specOf(from);
  const repeated = (stack: Stack, count: number) => Array.from({ length: count }, (_, i) => i % spec[stack].layers);
  await writeLayers(from, dir, { encoder: repeated('encoder', encoder), decoder: repeated('decoder', decoder) });
  const path = join(dir, 'model.safetensors');
  const tensors = tensorsOf(dir, { encoder: [...Array(encoder).keys()], decoder: [...Array(decoder).keys()] });
  for (const [tensor, { data }] of Object.entries(tensors)) {
    const layer = Number(layerName.exec(tensor)?.[3] ?? 0);
    for (let i = 0; i < data.length; i++) data[i] *= 1 + 0.2 * Math.sin(layer * (i + 1));
  }
  await writeSafetensors(path, tensors);
  const { special } = readSeq2SeqCases(name);
  writeFileSync(join(dir, 'generation_config.json'), JSON.stringify({ ...special, max_length: 13 }));
  return dir;
}

/** The layer that the module of a span is a copy of. */
export const copied = (span: Span): number => span.last;

/** Weights of modules that are copies of layers. */
export function copiedModules(
  dir: string,
  modules: Modules,
  of: (span: Span) => number = copied,
): Map<string, Float32Array> {
  const spec = specOf(dir);
  using checkpoint = Checkpoint.open(dir);
  using loaded = loadSeq2SeqWeights(spec, checkpoint);
  return new Map(
    seq2seqModuleSlots(spec, modules).map(({ name }) => {
      const layer = name.replace(
        /\.modules\.(\d+)-(\d+)\./,
        (_, first, last) => `.layers.${of({ first: Number(first), last: Number(last) })}.`,
      );
      return [name, loaded.byName.get(layer)!.readFloat()];
    }),
  );
}

/** Modules of every granularity that divides a stack. */
export function allModules(spec: Seq2SeqSpec): Modules {
  const of = (stack: Stack) => {
    const { layers } = spec[stack];
    return spansOf(
      layers,
      [...Array(layers + 1).keys()].filter((size) => size > 1 && layers % size === 0),
    );
  };
  return { encoder: of('encoder'), decoder: of('decoder') };
}

/** Routers of tokens with different scores, for all layers and such modules of an encoder. */
export function someRouting(
  spec: Seq2SeqSpec,
  modules: Modules,
  capacity: SourceTokens['capacity'] = { attn: [0.3, 1], mlp: [0.3, 1] },
): NonNullable<TrainedModules['routing']> {
  const sourceTokens = { layers: spec.encoder.layers, capacity };
  const routers = sourceRouters({ sourceTokens, modules }).map(({ id }, router) => {
    const weight = Float32Array.from({ length: spec.encoder.hidden }, (_, i) => Math.sin((router + 2) * (i + 1)));
    return [id, { weight, bias: Float32Array.of(0.1 * router) }] as const;
  });
  return { capacity, routers: new Map(routers) };
}

/** An elastic directory with such modules over a deepened golden model. */
export async function modularDirectory(
  name: string,
  levels: readonly Level[] = [],
  stored: (base: string) => Promise<string> = async (base) => base,
  more: (base: string) => Pick<TrainedModules, 'nested' | 'lora' | 'routing'> = () => ({}),
): Promise<{ dir: string; base: string }> {
  const base = await stored(await deepSeq2Seq(name));
  const spec = allModules(specOf(base));
  const dir = temporaryDirectory();
  await writeModules(dir, base, { spec, weights: copiedModules(base, spec), ...more(base) }, levels);
  return { dir, base };
}

/** Feed-forwards of a deepened golden model that run at any width of so many units. */
export const nestedAt = (granularities: readonly number[], alignment: number): Nested => ({
  ...{ layers: [0, 1, 2, 3, 4, 5], granularities, alignment, scores: 'none' },
});

/** Corrections of all projections of a deepened golden model. */
export function correctionsOf(dir: string, rank = 2): NonNullable<TrainedModules['lora']> {
  const spec = specOf(dir);
  const targets = projections.filter((projection) => spec.decoder.gated || projection !== 'gate');
  const policy = { rank, targets, layers: [0, 1, 2, 3, 4, 5] };
  const wave = (size: number, phase: number) =>
    Float32Array.from({ length: size }, (_, i) => 0.15 * Math.sin(phase + 1.7 * i));
  const matrices = [...seq2seqModules(spec)].map(([id, { inputs, outputs }], i) => {
    return [id, { rank, a: wave(rank * inputs, i), b: wave(outputs * rank, i + 0.5) }] as const;
  });
  return { policy, matrices: new Map(matrices) };
}

/** Writes a checkpoint with such corrections merged into its layers. */
export async function writeMerged(
  from: string,
  out: string,
  { matrices }: Pick<NonNullable<TrainedModules['lora']>, 'matrices'>,
): Promise<string> {
  const { decoder } = specOf(from);
  const edit = mergedLora(decoder, matrices, seq2seqModules(specOf(from)));
  await copyCheckpoint(from, out, (name) => ({ edit: edit(name) }));
  for (const name of ['config.json', 'generation_config.json']) cpSync(join(from, name), join(out, name));
  return out;
}

/** The layers of the base that an assembly of copies comes to. */
export const layersOf = (assembly: Readonly<Record<Stack, readonly string[]>>): Layers => {
  const of = (stack: Stack) => assembly[stack].map((part) => Number(part.split('-').at(-1)));
  return { encoder: of('encoder'), decoder: of('decoder') };
};

/** The same checkpoint with its tensors in bf16. */
export async function halved(from: string): Promise<string> {
  const out = temporaryDirectory();
  cpSync(from, out, { recursive: true });
  using checkpoint = Checkpoint.open(from);
  const tensors = checkpoint.names().map((name): [string, TensorData] => {
    const tensor = checkpoint.tensor(name);
    return [name, { dtype: 'bf16', shape: tensor.shape, data: toBf16(tensor.readFloat()) }];
  });
  await writeSafetensors(join(out, 'model.safetensors'), Object.fromEntries(tensors));
  return out;
}

/** Lists the hash that a file has now. */
export async function sealed(dir: string, name: string): Promise<void> {
  const path = join(dir, manifestFile);
  const manifest = JSON.parse(readFileSync(path, 'utf8'));
  manifest.files[name] = await sha256File(join(dir, name));
  writeFileSync(path, JSON.stringify(manifest));
}

/** What a model writes for a source, the log-probabilities of it, and what it computed. */
export async function written(model: ElasticModel, source: readonly number[], options: GenerateOptions = {}) {
  const stream = model.generate(source, options);
  const logprobs: number[] = [];
  for await (const { logprob } of stream) logprobs.push(logprob);
  const [ids, { compute }] = [await stream.ids, await stream.usage];
  return { ids, logprobs, compute };
}
