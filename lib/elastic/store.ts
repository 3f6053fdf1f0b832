// Elastic directories: a Hugging Face checkpoint plus routers, policy and a manifest of hashes, written last.

import { createHash } from 'node:crypto';
import { existsSync, readdirSync } from 'node:fs';
import { copyFile, link, mkdir, realpath, rename, rm, stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { FileSystemError, inFileSystem, readJson, sha256File, writeFileAtomic } from '../io/files.js';
import { adapterConfigFile, adapterWeightsFile, readPeft, writePeft } from '../io/peft.js';
import { openSafetensors, type TensorData, writeSafetensors } from '../io/safetensors.js';
import { type Architecture, modulesOf, readArchitecture } from '../model/directory.js';
import { seq2seqModuleSlots } from '../model/seq2seq_weights.js';
import { InvalidArgumentError, InvalidDataError, InvalidFileError } from '../native/errors.js';
import { modelCard } from './card.js';
import { policyFromJson, policyToJson } from './config.js';
import { exitId } from './exits.js';
import { type Lora, loraModules, loraOfModules } from './lora.js';
import {
  type ElasticPolicy,
  hasQuantiles,
  headIds,
  type Level,
  type Router,
  routerPlaces,
  sourceRouters,
} from './policy.js';

export const elasticConfigFile = 'elastic_config.json';
export const routerFile = 'elastic_router.safetensors';
export const manifestFile = 'elastic_manifest.json';
export const cardFile = 'README.md';
/** Element types that weights of modules are stored in. */
const moduleTypes = ['F32', 'BF16', 'F16'];
/** Holds the corrections of an elastic directory, as PEFT reads them. */
export const adapterDirectory = 'adapter';
const adapterFiles = [adapterConfigFile, adapterWeightsFile].map((name) => `${adapterDirectory}/${name}`);

const weightsFile = /^model(-\d+-of-\d+)?\.safetensors$|^model\.safetensors\.index\.json$/;
/** What a base checkpoint may bring along besides weights. */
const companions = new Set([
  ...['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'],
  ...['tokenizer_target.json', 'spiece.model', 'source.spm', 'target.spm'],
  ...[
    'added_tokens.json',
    'vocab.json',
    'vocab.txt',
    'merges.txt',
    'tokenizer.model',
    'chat_template.jinja',
    'LICENSE',
    'LICENSE.txt',
  ],
  ...['modules.json', 'sentence_bert_config.json', 'config_sentence_transformers.json'],
]);
/** Of a directory of sentence-transformers. */
const poolingFile = /^\w+_Pooling\/config\.json$/;

/** Routers, heads of exits and policy of an elastic directory. */
export interface Elastic {
  dir: string;
  policy: ElasticPolicy;
  /** By the ids of routers and exits. */
  routers: ReadonlyMap<string, Router>;
  /** Trained corrections of projections; null when there are none. */
  lora: Lora | null;
  /** Oddities that do not stop it from working, such as unknown keys. */
  warnings: readonly string[];
}

/** Files of a checkpoint that an elastic directory takes over, sorted. Throws InvalidFileError when there is no model. */
export function baseFiles(dir: string): string[] {
  let names: string[];
  try {
    names = readdirSync(dir);
  } catch (cause) {
    throw new InvalidFileError(`[elastic] ${dir} is not a readable directory`, { cause });
  }
  const pooling = names.map((name) => `${name}/config.json`).filter((name) => poolingFile.test(name));
  const files = [
    ...names.filter((name) => companions.has(name) || weightsFile.test(name)),
    ...pooling.filter((name) => existsSync(join(dir, name))),
  ].sort();
  if (!files.includes('config.json')) throw new InvalidFileError(`[elastic] ${dir} has no config.json`);
  if (!files.some((name) => name.endsWith('.safetensors')))
    throw new InvalidFileError(`[elastic] ${dir} has no model.safetensors and no shards of one`);
  return files;
}

/** Copies what a checkpoint has besides weights. */
export async function copyCompanions(from: string, out: string): Promise<void> {
  for (const name of baseFiles(from).filter((file) => !weightsFile.test(file))) {
    await inFileSystem('copy', join(from, name), async () => {
      await mkdir(dirname(join(out, name)), { recursive: true });
      await copyFile(join(from, name), join(out, name));
    });
  }
}

/** One hash for the weights: the file's own, or for shards the hash of their hashes in the order of their names. */
export function weightsSha256(sha256: Readonly<Record<string, string>>): string {
  const shards = Object.keys(sha256)
    .filter((name) => name.endsWith('.safetensors') && weightsFile.test(name))
    .sort();
  if (shards.length === 1) return sha256[shards[0]];
  return createHash('sha256')
    .update(shards.map((name) => sha256[name]).join(''))
    .digest('hex');
}

/** SHA-256 of each file, by name. */
export async function hashFiles(dir: string, names: readonly string[]): Promise<Record<string, string>> {
  const result: Record<string, string> = {};
  for (const name of names) result[name] = await sha256File(join(dir, name));
  return result;
}

/**
 * Reads and verifies an elastic directory; a plain Hugging Face directory gives null.
 * Errors: InvalidFileError when a file is missing or does not have the hash of the manifest, InvalidDataError when the
 * policy or a router is not what it must be. Every message names the file.
 */
export async function readElastic(dir: string): Promise<Elastic | null> {
  const configPath = join(dir, elasticConfigFile);
  const manifestPath = join(dir, manifestFile);
  if (!existsSync(configPath) && !existsSync(manifestPath)) return null;
  if (!existsSync(manifestPath)) {
    throw new InvalidFileError(
      `[elastic] ${dir} has ${elasticConfigFile} but no ${manifestFile}: it was never completed; write it again`,
    );
  }
  const warnings: string[] = [];
  const files = await readManifest(manifestPath, warnings);
  for (const name of [elasticConfigFile, routerFile, 'config.json', ...baseFiles(dir)]) {
    if (!(name in files)) throw new InvalidFileError(`[elastic] ${manifestPath} lists no hash of ${name}`);
  }
  for (const [name, expected] of Object.entries(files)) {
    const path = join(dir, name);
    if (!existsSync(path)) throw new InvalidFileError(`[elastic] ${path} is missing; ${manifestFile} lists it`);
    if ((await sha256File(path)) !== expected) {
      throw new InvalidFileError(
        `[elastic] ${path} does not have the SHA-256 listed in ${manifestFile}: it was changed or is damaged`,
      );
    }
  }
  const architecture = await readArchitecture(dir);
  const { spec, seq2seq } = architecture;
  const policy = policyFromJson(await readJson(configPath), configPath, spec, warnings, seq2seq);
  if (policy.base.weightsSha256 !== weightsSha256(files)) {
    throw new InvalidDataError(`[elastic] ${configPath}: base.weights_sha256 is not that of the weights beside it`);
  }
  const tokenizerSha256 = files['tokenizer.json'] ?? null;
  if (policy.base.tokenizerSha256 !== tokenizerSha256) {
    throw new InvalidDataError(`[elastic] ${configPath}: base.tokenizer_sha256 is not that of the tokenizer beside it`);
  }
  return {
    dir,
    warnings,
    lora: await readLora(dir, policy, architecture, files),
    ...readRouters(join(dir, routerFile), policy, architecture),
  };
}

async function readManifest(path: string, warnings: string[]): Promise<Record<string, string>> {
  const json = (await readJson(path)) as { manifest_version?: unknown; files?: unknown } | null;
  const bad = (what: string): never => {
    throw new InvalidDataError(`[elastic] ${path}: ${what}`);
  };
  if (typeof json !== 'object' || json === null) bad('must be an object');
  const { manifest_version: version, files, ...rest } = json!;
  if (version !== 1) bad(`manifest_version must be 1, got ${JSON.stringify(version)}`);
  if (typeof files !== 'object' || files === null) bad('files must be an object');
  for (const [name, hash] of Object.entries(files as object)) {
    if (
      !adapterFiles.includes(name) &&
      !poolingFile.test(name) &&
      (basename(name) !== name || name === '..' || name === '.')
    )
      bad(`${JSON.stringify(name)} is not a plain file name`);
    if (typeof hash !== 'string' || !/^[0-9a-f]{64}$/.test(hash)) bad(`the hash of ${name} is not a SHA-256`);
  }
  for (const key of Object.keys(rest)) {
    if (key !== 'tool' && key !== 'base') warnings.push(`${path}: unknown key ${key} is ignored`);
  }
  return files as Record<string, string>;
}

async function readLora(
  dir: string,
  { lora, calibration, nested, modules }: ElasticPolicy,
  architecture: Architecture,
  files: Readonly<Record<string, string>>,
): Promise<Lora | null> {
  // A plan has none yet.
  if (!lora || !(calibration || nested?.trained === 'lora' || modules)) return null;
  const missing = adapterFiles.find((name) => !(name in files));
  if (missing) throw new InvalidFileError(`[elastic] ${join(dir, manifestFile)} lists no hash of ${missing}`);
  const path = join(dir, adapterDirectory);
  return loraOfModules(architecture.spec, await readPeft(path), path, modulesOf(architecture));
}

function readRouters(
  file: string,
  policy: ElasticPolicy,
  { spec: { encoder }, seq2seq }: Architecture,
): { policy: ElasticPolicy; routers: Map<string, Router> } {
  const routers = new Map<string, Router>();
  const { calibration } = policy;
  const quantiles = new Map<string, Float32Array>();
  using opened = openSafetensors(file);
  const expected = new Set<string>();
  const load = (name: string, shape: readonly number[]): Float32Array => {
    expected.add(name);
    if (!opened.has(name)) throw new InvalidDataError(`[elastic] ${file}: tensor ${name} is missing`);
    const info = opened.info(name);
    if (info.dtype !== 'F32' || info.shape.join() !== shape.join()) {
      throw new InvalidDataError(`[elastic] ${file}: ${name} must be F32[${shape}], got ${info.dtype}[${info.shape}]`);
    }
    const data = opened.tensor(name).readFloat();
    if (!data.every(Number.isFinite))
      throw new InvalidDataError(`[elastic] ${file}: ${name} holds values that are not finite`);
    return data;
  };
  for (const { id, axis, outputs } of routerPlaces(policy)) {
    const bias = load(`${id}.bias`, [outputs]);
    routers.set(id, { weight: load(`${id}.weight`, [outputs, policy.hidden]), bias });
    if (!calibration || !hasQuantiles(policy, axis)) continue;
    const table = load(`${id}.quantiles`, [calibration.capacities.length, calibration.points]);
    for (let i = 1; i < table.length; i++) {
      if (i % calibration.points !== 0 && table[i] < table[i - 1]) {
        throw new InvalidDataError(`[elastic] ${file}: ${id}.quantiles must ascend within each row`);
      }
    }
    quantiles.set(id, table);
  }
  for (const { id, outputs } of sourceRouters(policy)) {
    const bias = load(`${id}.bias`, [outputs]);
    routers.set(id, { weight: load(`${id}.weight`, [outputs, policy.hidden]), bias });
  }
  for (const { afterLayer } of policy.exits ?? []) {
    const id = exitId(afterLayer);
    const classes = encoder!.labels.length;
    const bias = load(`${id}.bias`, [classes]);
    routers.set(id, { weight: load(`${id}.weight`, [classes, policy.hidden]), bias });
  }
  for (const { name, shape } of policy.modules ? seq2seqModuleSlots(seq2seq!, policy.modules) : []) {
    expected.add(name);
    if (!opened.has(name)) throw new InvalidDataError(`[elastic] ${file}: tensor ${name} is missing`);
    const info = opened.info(name);
    if (moduleTypes.includes(info.dtype) && info.shape.join() === shape.join()) continue;
    const types = moduleTypes.join(', ');
    throw new InvalidDataError(
      `[elastic] ${file}: ${name} must be [${shape}] of ${types}, got ${info.dtype}[${info.shape}]`,
    );
  }
  const extra = opened.names().find((name) => !expected.has(name));
  if (extra !== undefined)
    throw new InvalidDataError(`[elastic] ${file}: tensor ${extra} belongs to no router, exit or module`);
  return { policy: calibration ? { ...policy, calibration: { ...calibration, quantiles } } : policy, routers };
}

/**
 * Writes a whole elastic directory: the checkpoint's files are hard-linked from `base` (copied where links do not work),
 * then routers and modules, corrections, policy, model card and, last, the manifest. Until the manifest is there readElastic refuses the
 * directory, so a write that stops half-way is never mistaken for a model. `out` may be `base` itself.
 * Errors: FileSystemError when the file system refuses.
 */
export async function writeElastic(
  out: string,
  base: string,
  policy: ElasticPolicy,
  routers: ReadonlyMap<string, Router>,
  lora: Lora | null,
  modules: Readonly<Record<string, TensorData>> = {},
): Promise<void> {
  const names = baseFiles(base);
  // Takes longest, and so comes before anything is touched.
  const hashes = await hashFiles(base, names);
  await inFileSystem('create', out, () => mkdir(out, { recursive: true }));
  await rm(join(out, manifestFile), { force: true });
  if ((await realpath(out)) !== (await realpath(base))) {
    for (const name of names) await takeOver(join(base, name), join(out, name));
  }
  const tensors: Record<string, TensorData> = { ...modules };
  for (const id of headIds(policy)) {
    const { weight, bias } = routers.get(id)!;
    tensors[`${id}.weight`] = { dtype: 'f32', shape: [bias.length, policy.hidden], data: weight };
    tensors[`${id}.bias`] = { dtype: 'f32', shape: [bias.length], data: bias };
  }
  if (policy.calibration) {
    const { capacities, points, quantiles } = policy.calibration;
    for (const { id, axis } of routerPlaces(policy)) {
      if (!hasQuantiles(policy, axis)) continue;
      tensors[`${id}.quantiles`] = { dtype: 'f32', shape: [capacities.length, points], data: quantiles.get(id)! };
    }
  }
  await writeSafetensors(join(out, routerFile), tensors);
  const architecture = await readArchitecture(base);
  const adapter = join(out, adapterDirectory);
  if (lora) {
    const { spec, seq2seq } = architecture;
    await writePeft(adapter, loraModules(spec, lora, modulesOf(architecture)), {
      ...{ base: policy.base.name, rank: policy.lora!.rank, transposed: spec.family === 'gpt2' },
      task: seq2seq ? 'SEQ_2_SEQ_LM' : 'CAUSAL_LM',
    });
  } else await rm(adapter, { recursive: true, force: true });
  await writeFileAtomic(join(out, elasticConfigFile), `${JSON.stringify(policyToJson(policy), null, 2)}\n`);
  await writeFileAtomic(join(out, cardFile), modelCard(policy, architecture.spec.encoder?.task ?? null));
  const written = [elasticConfigFile, routerFile, cardFile, ...(lora ? adapterFiles : [])];
  const { name, revision, license } = policy.base;
  const manifest = {
    ...{ manifest_version: 1, tool: 'elastiform', base: { name, revision, license } },
    files: { ...hashes, ...(await hashFiles(out, written)) },
  };
  await writeFileAtomic(join(out, manifestFile), `${JSON.stringify(manifest, null, 2)}\n`);
}

/**
 * Replaces the named levels of an elastic directory, for instance to record measured quality, and what was searched.
 * Errors: those of readElastic and writeElastic; InvalidArgumentError when the directory is not elastic, InvalidDataError
 * when a level is not what it must be.
 */
export async function writeLevels(
  dir: string,
  levels: readonly Level[],
  searched?: readonly (readonly number[])[],
): Promise<void> {
  const elastic = await readElastic(dir);
  if (!elastic) throw new InvalidArgumentError(`[elastic] ${dir} is not an elastic directory`);
  const { nested } = elastic.policy;
  const policy = { ...elastic.policy, levels, ...(nested && searched && { nested: { ...nested, searched } }) };
  await checkReadable(dir, policy);
  await writeElastic(dir, dir, policy, elastic.routers, elastic.lora, await storedModules(dir, policy));
}

/** The weights of modules as they are stored, by the names of their slots; none without modules. */
export async function storedModules(dir: string, { modules }: ElasticPolicy): Promise<Record<string, TensorData>> {
  if (!modules) return {};
  const { seq2seq } = await readArchitecture(dir);
  using file = openSafetensors(join(dir, routerFile));
  return Object.fromEntries(
    seq2seqModuleSlots(seq2seq!, modules).map(({ name, shape }) => {
      const tensor = file.tensor(name);
      return [name, { dtype: tensor.dtype, shape, data: tensor.read() }];
    }),
  );
}

/** What could not be read again must not be written. */
export async function checkReadable(dir: string, policy: ElasticPolicy): Promise<void> {
  const json = JSON.parse(JSON.stringify(policyToJson(policy)));
  const { spec, seq2seq } = await readArchitecture(dir);
  policyFromJson(json, join(dir, elasticConfigFile), spec, [], seq2seq);
}

async function takeOver(from: string, to: string): Promise<void> {
  const source = await realpath(from);
  // Under a temporary name first: a file that is there already is replaced in one step.
  const partial = `${to}.partial`;
  try {
    await mkdir(dirname(to), { recursive: true });
    await rm(partial, { force: true });
    if (
      await stat(to).then(
        async (s) => s.ino === (await stat(source)).ino,
        () => false,
      )
    )
      return;
    await link(source, partial).catch(() => copyFile(source, partial));
    await rename(partial, to);
  } catch (cause) {
    await rm(partial, { force: true }).catch(() => {});
    throw new FileSystemError(`[elastic] cannot write ${to}: ${(cause as Error).message}`, cause);
  }
}
