// The encoder of the benchmarks: MiniLM-L6's shape with random weights, as a Hugging Face directory and as ONNX graphs.
//
// The graphs are those that onnxruntime's transformer optimizer aims at, with its fused operators: EmbedLayerNormalization,
// SkipLayerNormalization, BiasGelu, and attention in both of its forms (one product for queries, keys and values, or three);
// matrices are stored as its products read them fastest. No mask: all sequences are as long.
import fs from 'node:fs';
import path from 'node:path';
import { externalTensor, FLOAT, INT32, int64Tensor, node, onnxModel, valueInfo } from './protobuf.mjs';
import { openCheckpoint, writeCheckpoint } from './safetensors.mjs';

export const ENCODER = Object.freeze({
  layers: 6,
  hidden: 384,
  heads: 12,
  ffn: 1536,
  vocab: 30522,
  positions: 512,
  types: 2,
  eps: 1e-12,
});

/** Names of the ONNX graphs, by how they attend. */
export const ATTENTIONS = { Attention: 'attention.onnx', MultiHeadAttention: 'multihead.onnx' };

const config = ({ layers, hidden, heads, ffn, vocab, positions, types, eps }) => ({
  architectures: ['BertModel'],
  model_type: 'bert',
  hidden_act: 'gelu',
  num_hidden_layers: layers,
  hidden_size: hidden,
  num_attention_heads: heads,
  intermediate_size: ffn,
  vocab_size: vocab,
  max_position_embeddings: positions,
  type_vocab_size: types,
  layer_norm_eps: eps,
});

function tensors({ layers, hidden, ffn, vocab, positions, types }) {
  const spread = 0.05 * Math.sqrt(3);
  const list = [];
  const add = (name, ...shape) => list.push({ name, shape, center: 0, spread });
  const norm = (name) => {
    list.push({ name: `${name}.weight`, shape: [hidden], center: 1, spread });
    add(`${name}.bias`, hidden);
  };
  const linear = (name, out, input) => {
    add(`${name}.weight`, out, input);
    add(`${name}.bias`, out);
  };
  add('embeddings.word_embeddings.weight', vocab, hidden);
  add('embeddings.position_embeddings.weight', positions, hidden);
  add('embeddings.token_type_embeddings.weight', types, hidden);
  norm('embeddings.LayerNorm');
  for (let i = 0; i < layers; i++) {
    const at = `encoder.layer.${i}`;
    for (const name of ['query', 'key', 'value']) linear(`${at}.attention.self.${name}`, hidden, hidden);
    linear(`${at}.attention.output.dense`, hidden, hidden);
    norm(`${at}.attention.output.LayerNorm`);
    linear(`${at}.intermediate.dense`, ffn, hidden);
    linear(`${at}.output.dense`, hidden, ffn);
    norm(`${at}.output.LayerNorm`);
  }
  return list;
}

/** Writes config.json and model.safetensors of the same encoder with a classifier of two classes. */
export function writeClassifier(dir, shape = ENCODER) {
  const { hidden } = shape;
  const spread = 0.05 * Math.sqrt(3);
  const head = [
    ['bert.pooler.dense', hidden],
    ['classifier', 2],
  ].flatMap(([name, out]) => [
    { name: `${name}.weight`, shape: [out, hidden], center: 0, spread },
    { name: `${name}.bias`, shape: [out], center: 0, spread },
  ]);
  const body = tensors(shape).map((tensor) => ({ ...tensor, name: `bert.${tensor.name}` }));
  writeCheckpoint(dir, [...body, ...head], { ...config(shape), architectures: ['BertForSequenceClassification'] });
}

/** [out, in] to [in, out]. */
function transposed(values, [out, input]) {
  const result = new Float32Array(values.length);
  for (let o = 0; o < out; o++) for (let i = 0; i < input; i++) result[i * out + o] = values[o * input + i];
  return result;
}

/** Matrices [in, out] of one height, side by side. */
function sideBySide(matrices, rows) {
  const widths = matrices.map((matrix) => matrix.length / rows);
  const width = widths.reduce((a, b) => a + b, 0);
  const result = new Float32Array(rows * width);
  for (let r = 0; r < rows; r++) {
    let at = r * width;
    for (const [m, matrix] of matrices.entries()) {
      result.set(matrix.subarray(r * widths[m], (r + 1) * widths[m]), at);
      at += widths[m];
    }
  }
  return result;
}

/** Writes config.json, model.safetensors and both graphs, whose output `mean` is the mean of the features, [batch, hidden]. */
export function writeEncoder(dir, shape = ENCODER) {
  writeCheckpoint(dir, tensors(shape), config(shape));
  const checkpoint = openCheckpoint(dir);
  try {
    for (const [attention, file] of Object.entries(ATTENTIONS)) writeGraph(dir, shape, checkpoint, attention, file);
  } finally {
    checkpoint.close();
  }
}

function writeGraph(dir, { layers, hidden, heads, eps }, checkpoint, attention, file) {
  const data = file.replace('.onnx', '.bin');
  const out = fs.openSync(path.join(dir, data), 'w');
  const parts = [];
  let offset = 0;
  const tensor = (name, values, dims) => {
    const bytes = Buffer.from(values.buffer, values.byteOffset, values.byteLength);
    for (let at = 0; at < bytes.length; ) at += fs.writeSync(out, bytes, at, bytes.length - at);
    parts.push(externalTensor(name, { shape: dims, offset, bytes: bytes.length }, data));
    offset += bytes.length;
    return name;
  };
  const copy = (name) => tensor(name, checkpoint.read(name), checkpoint.entries.get(name).shape);
  const matrix = (name) => transposed(checkpoint.read(name), checkpoint.entries.get(name).shape);
  const right = (name) => tensor(name, matrix(name), checkpoint.entries.get(name).shape.toReversed());
  const add = (op, inputs, output, attributes = {}, domain = 'com.microsoft') => {
    const [first] = [output].flat();
    parts.push(node(op, inputs, [output].flat(), attributes, domain));
    return first;
  };
  const product = (x, name, output) => add('MatMul', [x, right(name)], output, {}, '');
  const epsilon = new Float32Array([eps]);
  const after = (branch, skip, norm, bias, output) =>
    add('SkipLayerNormalization', [branch, skip, copy(`${norm}.weight`), copy(`${norm}.bias`), copy(bias)], output, {
      epsilon,
    });
  try {
    const tables = ['word', 'position', 'token_type'].map((name) => copy(`embeddings.${name}_embeddings.weight`));
    const norm = ['weight', 'bias'].map((name) => copy(`embeddings.LayerNorm.${name}`));
    let x = add('EmbedLayerNormalization', ['input_ids', 'segment_ids', ...tables, ...norm], ['x', 'no_mask'], {
      epsilon,
    });
    for (let i = 0; i < layers; i++) {
      const at = `encoder.layer.${i}`;
      const names = ['query', 'key', 'value'].map((name) => `${at}.attention.self.${name}`);
      const biases = sideBySide(
        names.map((name) => checkpoint.read(`${name}.bias`)),
        1,
      );
      const bias = tensor(`${at}.qkv.bias`, biases, [3 * hidden]);
      let mixed;
      if (attention === 'Attention') {
        const all = sideBySide(
          names.map((name) => matrix(`${name}.weight`)),
          hidden,
        );
        const weight = tensor(`${at}.qkv.weight`, all, [hidden, 3 * hidden]);
        mixed = add('Attention', [x, weight, bias], `${at}.mixed`, { num_heads: heads });
      } else {
        const qkv = names.map((name) => product(x, `${name}.weight`, `${name}.y`));
        mixed = add('MultiHeadAttention', [...qkv, bias], `${at}.mixed`, { num_heads: heads });
      }
      const o = product(mixed, `${at}.attention.output.dense.weight`, `${at}.o`);
      x = after(o, x, `${at}.attention.output.LayerNorm`, `${at}.attention.output.dense.bias`, `${at}.x1`);
      const up = product(x, `${at}.intermediate.dense.weight`, `${at}.up`);
      const units = add('BiasGelu', [up, copy(`${at}.intermediate.dense.bias`)], `${at}.units`);
      const down = product(units, `${at}.output.dense.weight`, `${at}.down`);
      x = after(down, x, `${at}.output.LayerNorm`, `${at}.output.dense.bias`, `${at}.x2`);
    }
    parts.push(int64Tensor('axis1', [1], [1]));
    add('ReduceMean', [x, 'axis1'], 'mean', { keepdims: 0 }, '');
    parts.push(valueInfo(11, 'input_ids', INT32, ['B', 'T']), valueInfo(11, 'segment_ids', INT32, ['B', 'T']));
    parts.push(valueInfo(12, 'mean', FLOAT, ['B', hidden]));
    fs.writeFileSync(path.join(dir, file), onnxModel(`bert ${layers}x${hidden}`, parts));
  } finally {
    fs.closeSync(out);
  }
}
