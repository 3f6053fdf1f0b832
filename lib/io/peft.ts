// LoRA adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors.
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { InvalidDataError } from '../native/errors.js';
import { inFileSystem, readJson, writeFileAtomic } from './files.js';
import { openSafetensors, type TensorData, writeSafetensors } from './safetensors.js';

export const adapterConfigFile = 'adapter_config.json';
export const adapterWeightsFile = 'adapter_model.safetensors';

/** The correction `b a` of one linear module, with the scale in b: a [rank, inputs] and b [outputs, rank], row-major. */
export interface LoraMatrices {
  rank: number;
  a: Float32Array;
  b: Float32Array;
}

const prefix = 'base_model.model.';
const tensorName = /^base_model\.model\.(.+)\.lora_([AB])\.weight$/;

/**
 * Reads an adapter.
 *
 * @returns its matrices by the module of the base model that they correct, such as `model.layers.0.self_attn.q_proj`
 * @throws InvalidFileError when a file is missing; InvalidDataError when it is not a plain LoRA: another method, biases,
 * further modules, or matrices that do not fit together.
 */
export async function readPeft(dir: string): Promise<Map<string, LoraMatrices>> {
  const configPath = join(dir, adapterConfigFile);
  const config = (await readJson(configPath)) as Record<string, unknown> | null;
  const fail = (file: string, what: string): never => {
    throw new InvalidDataError(`[adapter] ${file}: ${what}`);
  };
  if (typeof config !== 'object' || config === null || Array.isArray(config)) fail(configPath, 'must be an object');
  const { peft_type: type, bias = 'none', use_dora: dora, modules_to_save: saved } = config!;
  if (type !== 'LORA') fail(configPath, `peft_type must be "LORA", got ${JSON.stringify(type)}`);
  if (bias !== 'none') fail(configPath, `bias must be "none", got ${JSON.stringify(bias)}`);
  if (dora) fail(configPath, 'use_dora is set; only plain LoRA is read');
  if (saved && (saved as unknown[]).length !== 0) {
    fail(configPath, `modules_to_save has ${JSON.stringify(saved)}; an adapter may hold LoRA matrices only`);
  }
  const alphaOf = alphas(config!, (what) => fail(configPath, what));

  const file = join(dir, adapterWeightsFile);
  using opened = openSafetensors(file);
  const modules = new Map<string, LoraMatrices>();
  const expected = new Set<string>();
  for (const name of opened.names()) {
    const match = tensorName.exec(name);
    if (!match) fail(file, `tensor ${name} is no LoRA matrix (base_model.model.<module>.lora_A.weight or lora_B)`);
    expected.add(match![1]);
  }
  for (const module of expected) {
    const [a, b] = (['A', 'B'] as const).map((letter) => {
      const name = `${prefix}${module}.lora_${letter}.weight`;
      if (!opened.has(name)) fail(file, `tensor ${name} is missing`);
      const { shape } = opened.info(name);
      if (shape.length !== 2) fail(file, `${name} must be a matrix, got [${shape}]`);
      const data = opened.tensor(name).readFloat();
      if (!data.every(Number.isFinite)) fail(file, `${name} holds values that are not finite`);
      return { shape, data };
    });
    const rank = a.shape[0];
    if (b.shape[1] !== rank) fail(file, `${module}: lora_A [${a.shape}] and lora_B [${b.shape}] differ in rank`);
    const scale = alphaOf(module) / (config!.use_rslora ? Math.sqrt(rank) : rank);
    modules.set(module, { rank, a: a.data, b: scale === 1 ? b.data : b.data.map((value) => value * scale) });
  }
  return modules;
}

// lora_alpha, or that of the first pattern of alpha_pattern that ends the module's name.
function alphas(config: Record<string, unknown>, fail: (what: string) => never): (module: string) => number {
  const check = (value: unknown, key: string): number => {
    if (typeof value !== 'number' || !Number.isFinite(value)) {
      fail(`${key} must be a number, got ${JSON.stringify(value)}`);
    }
    return value as number;
  };
  const alpha = check(config.lora_alpha, 'lora_alpha');
  const patterns = Object.entries((config.alpha_pattern ?? {}) as Record<string, unknown>).map(([pattern, value]) => {
    try {
      return { matches: new RegExp(`^(.*\\.)?(${pattern})$`), alpha: check(value, `alpha_pattern.${pattern}`) };
    } catch (error) {
      if (error instanceof InvalidDataError) throw error;
      return fail(`alpha_pattern has ${JSON.stringify(pattern)}, which is no regular expression`);
    }
  });
  return (module) => patterns.find(({ matches }) => matches.test(module))?.alpha ?? alpha;
}

/** What an adapter is made for. */
export interface PeftBase {
  base: string;
  rank: number;
  transposed: boolean;
  task?: 'CAUSAL_LM' | 'SEQ_2_SEQ_LM';
}

/**
 * Writes an adapter that `peft` loads over `base`.
 *
 * @param options.rank of most modules: PEFT lists the others
 * @param options.transposed the base stores its matrices [inputs, outputs] (GPT-2)
 * @param options.task what PEFT calls the base's; default a decoder's
 */
export async function writePeft(
  dir: string,
  modules: ReadonlyMap<string, LoraMatrices>,
  { base, rank, transposed, task = 'CAUSAL_LM' }: PeftBase,
): Promise<void> {
  await inFileSystem('create', dir, () => mkdir(dir, { recursive: true }));
  const tensors: Record<string, TensorData> = {};
  for (const [module, { rank: r, a, b }] of modules) {
    tensors[`${prefix}${module}.lora_A.weight`] = { dtype: 'f32', shape: [r, a.length / r], data: a };
    tensors[`${prefix}${module}.lora_B.weight`] = { dtype: 'f32', shape: [b.length / r, r], data: b };
  }
  const others = [...modules].filter(([, m]) => m.rank !== rank);
  const pattern = Object.fromEntries(others.map(([module, m]) => [module.replaceAll('.', '\\.'), m.rank]));
  const config = {
    peft_type: 'LORA',
    task_type: task,
    base_model_name_or_path: base,
    r: rank,
    // The scale alpha / r is 1: it is in lora_B.
    lora_alpha: rank,
    rank_pattern: pattern,
    alpha_pattern: pattern,
    target_modules: [...modules.keys()],
    bias: 'none',
    lora_dropout: 0,
    fan_in_fan_out: transposed,
    inference_mode: true,
  };
  await writeSafetensors(join(dir, adapterWeightsFile), tensors, { format: 'pt' });
  await writeFileAtomic(join(dir, adapterConfigFile), `${JSON.stringify(config, null, 2)}\n`);
}
