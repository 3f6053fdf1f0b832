// Writes the benchmark model as an ONNX graph whose weights are the bytes of model.safetensors (external data).
//
// The graph is what onnxruntime's own transformer optimizer aims at: its fused operators (GroupQueryAttention with the
// KV cache updated in place, SkipLayerNormalization, FastGelu) are written directly, and only the last token's
// hidden state meets the vocabulary. One graph serves prefill and decode.
import fs from 'node:fs';
import path from 'node:path';
import { externalTensor, FLOAT, INT32, INT64, int64Tensor, node, onnxModel, valueInfo } from './protobuf.mjs';
import { openCheckpoint } from './safetensors.mjs';
import { SHAPE } from './shape.mjs';

/** Writes model.onnx beside model.safetensors in `dir`. */
export function writeOnnx(dir, shape = SHAPE) {
  const { layers, hidden, heads, headDim, vocab, context, eps } = shape;
  const checkpoint = openCheckpoint(dir);
  checkpoint.close();
  const microsoft = 'com.microsoft';
  const epsilon = new Float32Array([eps]);
  const parts = [];
  const add = (...args) => parts.push(node(...args));

  add('Gather', ['transformer.wte.weight', 'input_ids'], ['token_embedding']);
  add('Gather', ['transformer.wpe.weight', 'position_ids'], ['position_embedding']);
  add('Add', ['token_embedding', 'position_embedding'], ['x.0']);
  add('LayerNormalization', ['x.0', 'transformer.h.0.ln_1.weight', 'transformer.h.0.ln_1.bias'], ['h.0.normed1'], {
    epsilon,
  });
  // y = x + (branch + bias), normed = norm(y): one fused operator.
  const skipNorm = (branch, skip, norm, bias, normed, sum) =>
    add(
      'SkipLayerNormalization',
      [branch, skip, `${norm}.weight`, `${norm}.bias`, bias],
      [normed, '', '', sum],
      { epsilon },
      microsoft,
    );
  for (let i = 0; i < layers; i++) {
    const w = `transformer.h.${i}`;
    const h = `h.${i}`;
    add('Gemm', [`${h}.normed1`, `${w}.attn.c_attn.weight`, `${w}.attn.c_attn.bias`], [`${h}.qkv2d`]);
    add('Unsqueeze', [`${h}.qkv2d`, 'axis0'], [`${h}.qkv`]);
    add(
      'GroupQueryAttention',
      [`${h}.qkv`, '', '', `past_key.${i}`, `past_value.${i}`, 'seqlens_k', 'total_length'],
      [`${h}.mixed3d`, `present_key.${i}`, `present_value.${i}`],
      { num_heads: heads, kv_num_heads: heads },
      microsoft,
    );
    add('Squeeze', [`${h}.mixed3d`, 'axis0'], [`${h}.mixed`]);
    add('MatMul', [`${h}.mixed`, `${w}.attn.c_proj.weight`], [`${h}.attn`]);
    skipNorm(`${h}.attn`, `x.${i}`, `${w}.ln_2`, `${w}.attn.c_proj.bias`, `${h}.normed2`, `${h}.x`);
    add('MatMul', [`${h}.normed2`, `${w}.mlp.c_fc.weight`], [`${h}.up`]);
    add('FastGelu', [`${h}.up`, `${w}.mlp.c_fc.bias`], [`${h}.act`], {}, microsoft);
    if (i + 1 < layers) {
      add('MatMul', [`${h}.act`, `${w}.mlp.c_proj.weight`], [`${h}.mlp`]);
      const next = `transformer.h.${i + 1}.ln_1`;
      skipNorm(`${h}.mlp`, `${h}.x`, next, `${w}.mlp.c_proj.bias`, `h.${i + 1}.normed1`, `x.${i + 1}`);
    } else {
      add('MatMul', [`${h}.act`, `${w}.mlp.c_proj.weight`], [`${h}.mlp`]);
      add('Gather', [`${h}.mlp`, 'last'], ['mlp_last']);
      add('Gather', [`${h}.x`, 'last'], ['x_last']);
      add(
        'SkipLayerNormalization',
        ['mlp_last', 'x_last', 'transformer.ln_f.weight', 'transformer.ln_f.bias', `${w}.mlp.c_proj.bias`],
        ['final'],
        { epsilon },
        microsoft,
      );
    }
  }
  add('Gemm', ['final', 'transformer.wte.weight'], ['logits'], { transB: 1 });

  for (const [name, entry] of checkpoint.entries) parts.push(externalTensor(name, entry, 'model.safetensors'));
  parts.push(int64Tensor('axis0', [0], [1]), int64Tensor('last', [-1], [1]));
  parts.push(valueInfo(11, 'input_ids', INT64, ['S']), valueInfo(11, 'position_ids', INT64, ['S']));
  parts.push(valueInfo(11, 'seqlens_k', INT32, [1]), valueInfo(11, 'total_length', INT32, [1]));
  parts.push(valueInfo(12, 'logits', FLOAT, [1, vocab]));
  for (let i = 0; i < layers; i++) {
    for (const kind of ['key', 'value']) {
      parts.push(valueInfo(11, `past_${kind}.${i}`, FLOAT, [1, heads, context, headDim]));
      parts.push(valueInfo(12, `present_${kind}.${i}`, FLOAT, [1, heads, context, headDim]));
    }
  }
  const model = onnxModel(`gpt2 ${layers}x${hidden}`, parts);
  fs.writeFileSync(path.join(dir, 'model.onnx'), model);
}
