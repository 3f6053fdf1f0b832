// Writes the benchmark model as a Hugging Face directory (config.json, model.safetensors), and reads its tensors back.
import fs from 'node:fs';
import path from 'node:path';
import { fill, generator } from './random.mjs';
import { config, SEED, SHAPE, tensors } from './shape.mjs';

const count = (shape) => shape.reduce((a, b) => a * b, 1);

/** Writes the directory of a model of these tensors: by default the benchmark model's. */
export function writeCheckpoint(dir, list = tensors(SHAPE), json = config(SHAPE), seed = SEED) {
  fs.mkdirSync(dir, { recursive: true });
  const header = { __metadata__: { format: 'pt' } };
  let end = 0;
  for (const t of list) {
    const begin = end;
    end += 4 * count(t.shape);
    header[t.name] = { dtype: 'F32', shape: t.shape, data_offsets: [begin, end] };
  }
  const text = Buffer.from(JSON.stringify(header));
  const padded = Buffer.alloc(Math.ceil((text.length + 8) / 4096) * 4096 - 8, ' ');
  text.copy(padded);
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(padded.length));

  const file = fs.openSync(path.join(dir, 'model.safetensors'), 'w');
  try {
    fs.writeSync(file, size);
    fs.writeSync(file, padded);
    const next = generator(seed);
    for (const t of list) {
      const values = new Float32Array(count(t.shape));
      fill(values, next, t.center, t.spread);
      writeAll(file, new Uint8Array(values.buffer));
    }
  } finally {
    fs.closeSync(file);
  }
  fs.writeFileSync(path.join(dir, 'config.json'), `${JSON.stringify(json, null, 2)}\n`);
}

function writeAll(file, bytes) {
  for (let at = 0; at < bytes.length; ) at += fs.writeSync(file, bytes, at, Math.min(bytes.length - at, 1 << 28));
}

/** Opens a safetensors file: `entries` (name -> shape, file offset and length in bytes) and `read(name)`. */
export function openCheckpoint(dir) {
  const name = path.join(dir, 'model.safetensors');
  const file = fs.openSync(name, 'r');
  const size = Buffer.alloc(8);
  fs.readSync(file, size, 0, 8, 0);
  const length = Number(size.readBigUInt64LE());
  const json = Buffer.alloc(length);
  fs.readSync(file, json, 0, length, 8);
  const entries = new Map();
  for (const [key, value] of Object.entries(JSON.parse(json.toString()))) {
    if (key === '__metadata__') continue;
    const [begin, end] = value.data_offsets;
    entries.set(key, { shape: value.shape, offset: 8 + length + begin, bytes: end - begin });
  }
  return {
    entries,
    read(key) {
      const entry = entries.get(key);
      const values = new Float32Array(entry.bytes / 4);
      const bytes = new Uint8Array(values.buffer);
      for (let at = 0; at < bytes.length; ) {
        const wanted = Math.min(bytes.length - at, 1 << 28);
        const got = fs.readSync(file, bytes, at, wanted, entry.offset + at);
        if (got === 0) throw new Error(`${name} is truncated at ${key}`);
        at += got;
      }
      return values;
    },
    close: () => fs.closeSync(file),
  };
}
