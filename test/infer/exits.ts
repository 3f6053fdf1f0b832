// A classifier of several layers with random weights, and random heads for its exits.
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Random } from '../../lib/distill/random.js';
import { writeExits } from '../../lib/elastic/elastify.js';
import type { Exit, ExitHead } from '../../lib/elastic/exits.js';
import { openSafetensors, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { encoderDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';

export const hidden = 24;
export const classes = 3;
export const layers = 5;

/** The model `bert-classes` of test/golden with so many other layers, the same ones whatever their number. */
export async function deepClassifier(out = temporaryDirectory(), count = layers): Promise<string> {
  const golden = encoderDirectory('bert-classes');
  cpSync(golden, out, { recursive: true });
  editConfig(out, { num_hidden_layers: count });
  using file = openSafetensors(join(golden, 'model.safetensors'));
  const tensors: Record<string, TensorData> = {};
  for (const name of file.names().filter((name) => !name.includes('.layer.1.'))) {
    const { shape } = file.info(name);
    const stored = file.tensor(name).readFloat();
    const data = name.endsWith('LayerNorm.weight') ? stored.map((x) => 1 + x) : stored;
    tensors[name] = { dtype: 'f32', shape: [...shape], data };
    for (let layer = 0; layer < count && name.includes('.layer.0.'); layer++) {
      const own = name.replace('.layer.0.', `.layer.${layer}.`);
      const random = new Random(7, own);
      // What the first token gathers is much of it, and of many tokens, and so differs from text to text.
      const scale = /query|key|bias/.test(name) ? 0.15 : /attention/.test(name) ? 1 : 0.1;
      const values = name.includes('LayerNorm') ? data : data.map(() => scale * random.normal());
      tensors[own] = { dtype: 'f32', shape: [...shape], data: values };
    }
  }
  await writeSafetensors(join(out, 'model.safetensors'), tensors);
  return out;
}

/** Writes other values into a directory's config.json. */
export function editConfig(dir: string, change: object): void {
  const path = join(dir, 'config.json');
  writeFileSync(path, JSON.stringify({ ...JSON.parse(readFileSync(path, 'utf8')), ...change }));
}

/** Random heads after some layers, all of one rule. */
export function heads(after: readonly number[], rule: Omit<Exit, 'afterLayer'>, seed = 1): ExitHead[] {
  const random = new Random(seed, 'heads');
  const values = (count: number, scale: number) => Float32Array.from({ length: count }, () => scale * random.normal());
  return after.map((afterLayer) => ({
    ...{ afterLayer, ...rule, weight: values(classes * hidden, 0.6), bias: values(classes, 0.2) },
  }));
}

/** An elastic directory of `deepClassifier` with heads after all layers but the last. */
export async function exitClassifier(
  rule: Omit<Exit, 'afterLayer'> = { rule: 'entropy', threshold: 0.5 },
): Promise<string> {
  const out = temporaryDirectory();
  const base = await deepClassifier();
  await writeExits(out, base, heads([0, 1, 2, 3], rule));
  return out;
}
