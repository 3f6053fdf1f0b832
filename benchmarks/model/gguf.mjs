// Writes the benchmark model as a GGUF file (F32) for llama.cpp, with a synthetic byte-level vocabulary.
import fs from 'node:fs';
import path from 'node:path';
import { openCheckpoint } from './safetensors.mjs';
import { SHAPE } from './shape.mjs';

const ALIGNMENT = 32;
const TYPE = { u32: 4, i32: 5, f32: 6, string: 8, array: 9 };
const GGML_F32 = 0;

const u32 = (v) => {
  const b = Buffer.alloc(4);
  b.writeUInt32LE(v);
  return b;
};
const u64 = (v) => {
  const b = Buffer.alloc(8);
  b.writeBigUInt64LE(BigInt(v));
  return b;
};
const f32 = (v) => {
  const b = Buffer.alloc(4);
  b.writeFloatLE(v);
  return b;
};
const string = (v) => {
  const b = Buffer.from(v);
  return Buffer.concat([u64(b.length), b]);
};
const encode = { u32, i32: u32, f32, string };
const entry = (key, type, value) => Buffer.concat([string(key), u32(TYPE[type]), encode[type](value)]);
const arrayEntry = (key, type, values) =>
  Buffer.concat([string(key), u32(TYPE.array), u32(TYPE[type]), u64(values.length), ...values.map(encode[type])]);

// GPT-2's printable stand-ins for the 256 bytes.
function byteTokens() {
  const printable = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
  let extra = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCodePoint(printable(b) ? b : extra++));
}

function vocabulary(size) {
  const bytes = byteTokens();
  const merges = [];
  const tokens = [...bytes];
  for (let i = 0; tokens.length < size - 1; i++) {
    // Pairs of bytes have a merge; later tokens only need to be distinct.
    if (i < 65536) {
      const [a, b] = [bytes[i >> 8], bytes[i & 255]];
      tokens.push(a + b);
      merges.push(`${a} ${b}`);
    } else {
      tokens.push(`token${i}`);
    }
  }
  tokens.push('<|endoftext|>');
  return { tokens, merges, types: tokens.map((_, i) => (i === size - 1 ? 3 : 1)) };
}

function transpose(values, rows, columns) {
  const out = new Float32Array(values.length);
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) out[c * rows + r] = values[r * columns + c];
  return out;
}

/** Writes model.gguf into `dir` from its model.safetensors. */
export function writeGguf(dir, shape = SHAPE) {
  const checkpoint = openCheckpoint(dir);
  const list = [];
  const add = (name, source, transposed = false) => {
    const dims = checkpoint.entries.get(source).shape;
    // GGUF lists the fastest dimension first; llama.cpp wants linear weights as [out, in].
    const extents = transposed ? dims : [...dims].reverse();
    list.push({ name, source, dims, transposed, extents, bytes: checkpoint.entries.get(source).bytes });
  };
  add('token_embd.weight', 'transformer.wte.weight');
  add('position_embd.weight', 'transformer.wpe.weight');
  for (let i = 0; i < shape.layers; i++) {
    const from = `transformer.h.${i}`;
    for (const [to, part, linear] of [
      ['attn_norm', 'ln_1', false],
      ['attn_qkv', 'attn.c_attn', true],
      ['attn_output', 'attn.c_proj', true],
      ['ffn_norm', 'ln_2', false],
      ['ffn_up', 'mlp.c_fc', true],
      ['ffn_down', 'mlp.c_proj', true],
    ]) {
      add(`blk.${i}.${to}.weight`, `${from}.${part}.weight`, linear);
      add(`blk.${i}.${to}.bias`, `${from}.${part}.bias`);
    }
  }
  add('output_norm.weight', 'transformer.ln_f.weight');
  add('output_norm.bias', 'transformer.ln_f.bias');

  const vocab = vocabulary(shape.vocab);
  const metadata = [
    entry('general.architecture', 'string', 'gpt2'),
    entry('general.name', 'string', 'benchmark'),
    entry('general.alignment', 'u32', ALIGNMENT),
    entry('general.file_type', 'u32', 0),
    entry('gpt2.block_count', 'u32', shape.layers),
    entry('gpt2.context_length', 'u32', shape.context),
    entry('gpt2.embedding_length', 'u32', shape.hidden),
    entry('gpt2.feed_forward_length', 'u32', shape.ffn),
    entry('gpt2.attention.head_count', 'u32', shape.heads),
    entry('gpt2.attention.layer_norm_epsilon', 'f32', shape.eps),
    entry('tokenizer.ggml.model', 'string', 'gpt2'),
    entry('tokenizer.ggml.pre', 'string', 'gpt-2'),
    arrayEntry('tokenizer.ggml.tokens', 'string', vocab.tokens),
    arrayEntry('tokenizer.ggml.token_type', 'i32', vocab.types),
    arrayEntry('tokenizer.ggml.merges', 'string', vocab.merges),
    entry('tokenizer.ggml.bos_token_id', 'u32', shape.vocab - 1),
    entry('tokenizer.ggml.eos_token_id', 'u32', shape.vocab - 1),
  ];
  let offset = 0;
  const infos = list.map((t) => {
    const info = Buffer.concat([
      string(t.name),
      u32(t.extents.length),
      ...t.extents.map(u64),
      u32(GGML_F32),
      u64(offset),
    ]);
    offset += Math.ceil(t.bytes / ALIGNMENT) * ALIGNMENT;
    return info;
  });
  const header = Buffer.concat([
    Buffer.from('GGUF'),
    u32(3),
    u64(list.length),
    u64(metadata.length),
    ...metadata,
    ...infos,
  ]);

  const file = fs.openSync(path.join(dir, 'model.gguf'), 'w');
  try {
    let at = 0;
    const write = (bytes) => {
      for (let done = 0; done < bytes.length; ) done += fs.writeSync(file, bytes, done, bytes.length - done, at + done);
      at += bytes.length;
    };
    const pad = () => write(Buffer.alloc((ALIGNMENT - (at % ALIGNMENT)) % ALIGNMENT));
    write(header);
    pad();
    for (const t of list) {
      const values = checkpoint.read(t.source);
      write(new Uint8Array((t.transposed ? transpose(values, t.dims[0], t.dims[1]) : values).buffer));
      pad();
    }
  } finally {
    fs.closeSync(file);
    checkpoint.close();
  }
}
