// Training checkpoints: written whole or not at all, verified when read, the oldest removed.
import { mkdir, readdir, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { inFileSystem, readJson, sha256File, syncDirectory, writeFileAtomic } from '../io/files.js';
import { openSafetensors, writeSafetensors } from '../io/safetensors.js';
import { InvalidDataError } from '../native/errors.js';
import type { Cursor } from './data.js';
import type { Trainable } from './trainable.js';

/** Everything besides tensors that a resumed run continues from. Random draws follow from the seed and the step. */
export interface TrainerState {
  version: 1;
  step: number;
  /** Optimizer updates applied: steps that were not skipped. */
  updates: number;
  cursor: Cursor;
  best: { step: number; metric: number } | null;
  /** Evaluations since the best one. */
  stale: number;
  /** Skipped steps in a row. */
  skipped: number;
  /** What decides the bits of the run; a resumed run must agree. */
  config: Record<string, unknown>;
}

const directory = (out: string): string => join(out, 'checkpoints');
const stepName = (step: number): string => `step-${String(step).padStart(6, '0')}`;
const stepOf = (name: string): number | null => (/^step-\d{6,}$/.test(name) ? Number(name.slice(5)) : null);

async function listSteps(out: string): Promise<number[]> {
  const names = await readdir(directory(out)).catch(() => [] as string[]);
  return names.flatMap((name) => stepOf(name) ?? []).sort((a, b) => a - b);
}

/** Writes a checkpoint and removes the oldest beyond `keep`, never the best. Returns its directory. */
export async function saveCheckpoint(
  out: string,
  trainable: Trainable,
  state: TrainerState,
  keep: number,
): Promise<string> {
  const parent = directory(out);
  const target = join(parent, stepName(state.step));
  const partial = `${target}.partial`;
  await rm(partial, { recursive: true, force: true });
  await inFileSystem('create', partial, () => mkdir(partial, { recursive: true }));
  const flat = (data: Float32Array) => ({ dtype: 'f32' as const, shape: [data.length], data });
  const files = {
    trainable: join(partial, 'trainable.safetensors'),
    optimizer: join(partial, 'optimizer.safetensors'),
  };
  try {
    const values = trainable.values();
    await writeSafetensors(
      files.trainable,
      Object.fromEntries(
        trainable.plan.parameters.map((p) => [
          p.name,
          { dtype: 'f32', shape: [...p.shape], data: values.get(p.name)! },
        ]),
      ),
    );
    await writeSafetensors(files.optimizer, {
      m: flat(trainable.m.readFloat()),
      v: flat(trainable.v.readFloat()),
    });
    const sha256 = { trainable: await sha256File(files.trainable), optimizer: await sha256File(files.optimizer) };
    await writeFileAtomic(join(partial, 'state.json'), `${JSON.stringify({ ...state, sha256 }, null, 2)}\n`);
    await syncDirectory(partial);
    await rm(target, { recursive: true, force: true });
    await rename(partial, target);
    await syncDirectory(parent);
  } catch (error) {
    await rm(partial, { recursive: true, force: true }).catch(() => {});
    throw error;
  }
  const steps = await listSteps(out);
  for (const step of steps.slice(0, Math.max(steps.length - keep, 0))) {
    if (step !== state.best?.step) await rm(join(parent, stepName(step)), { recursive: true, force: true });
  }
  return target;
}

/** Removes every checkpoint. */
export async function clearCheckpoints(out: string): Promise<void> {
  await rm(directory(out), { recursive: true, force: true });
}

/** The newest checkpoint's step, or null. */
export async function newestCheckpoint(out: string): Promise<number | null> {
  return (await listSteps(out)).at(-1) ?? null;
}

/**
 * Loads a checkpoint into the parameters and moments.
 * Errors: InvalidDataError when a file does not match its hash, a tensor its shape, or `config` the run's.
 */
export async function loadCheckpoint(
  out: string,
  step: number,
  trainable: Trainable,
  config: Record<string, unknown>,
): Promise<TrainerState> {
  const dir = join(directory(out), stepName(step));
  const { sha256, ...state } = (await readJson(join(dir, 'state.json'))) as TrainerState & {
    sha256: Record<'trainable' | 'optimizer', string>;
  };
  if (state.version !== 1) {
    throw new InvalidDataError(`[resume] ${dir}/state.json: version must be 1, got ${JSON.stringify(state.version)}`);
  }
  const now = JSON.parse(JSON.stringify(config)) as Record<string, unknown>;
  for (const key of new Set([...Object.keys(now), ...Object.keys(state.config)])) {
    const [was, is] = [JSON.stringify(state.config[key]), JSON.stringify(now[key])];
    if (was !== is) {
      throw new InvalidDataError(
        `[resume] ${dir} was made with ${key} = ${was}, this run has ${is}; use the same settings, another output directory, or resume: false to start anew`,
      );
    }
  }
  const load = async (name: 'trainable' | 'optimizer'): Promise<(tensor: string, size: number) => Float32Array> => {
    const file = join(dir, `${name}.safetensors`);
    if ((await sha256File(file)) !== sha256?.[name]) {
      throw new InvalidDataError(
        `[resume] ${file} does not match the hash in state.json: it was changed or is damaged; delete ${dir}`,
      );
    }
    const opened = openSafetensors(file);
    return (tensor, size) => {
      const data = opened.has(tensor) ? opened.tensor(tensor).readFloat() : new Float32Array(0);
      if (data.length !== size) {
        throw new InvalidDataError(`[resume] ${file}: tensor ${tensor} must have ${size} elements, got ${data.length}`);
      }
      return data;
    };
  };
  const parameters = await load('trainable');
  const params = new Float32Array(trainable.plan.size);
  for (const p of trainable.plan.parameters) params.set(parameters(p.name, p.size), p.offset);
  const moments = await load('optimizer');
  trainable.m.write(moments('m', trainable.plan.size));
  trainable.v.write(moments('v', trainable.plan.size));
  trainable.params.write(params);
  return state;
}
