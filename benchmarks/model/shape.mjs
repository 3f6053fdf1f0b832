// The benchmark model: GPT-2 small's shape with twice its context, and the names and layouts of its Hugging Face checkpoints.

export const SEED = 20240613;

export const SHAPE = Object.freeze({
  layers: 12,
  hidden: 768,
  heads: 12,
  headDim: 64,
  ffn: 3072,
  vocab: 50257,
  context: 2048,
  eps: 1e-5,
});

/** Hugging Face config.json of the model. */
export function config(shape = SHAPE) {
  return {
    architectures: ['GPT2LMHeadModel'],
    model_type: 'gpt2',
    activation_function: 'gelu_new',
    n_layer: shape.layers,
    n_embd: shape.hidden,
    n_head: shape.heads,
    n_inner: shape.ffn,
    n_ctx: shape.context,
    n_positions: shape.context,
    vocab_size: shape.vocab,
    layer_norm_epsilon: shape.eps,
    bos_token_id: shape.vocab - 1,
    eos_token_id: shape.vocab - 1,
    attn_pdrop: 0,
    embd_pdrop: 0,
    resid_pdrop: 0,
    tie_word_embeddings: true,
    torch_dtype: 'float32',
  };
}

/**
 * Tensors in file order: name, shape, and the uniform distribution its values are drawn from (`center` +- `spread`).
 * GPT-2 stores linear weights as [in, out].
 */
export function tensors(shape = SHAPE) {
  const { layers, hidden, ffn, vocab, context } = shape;
  const weight = 0.02 * Math.sqrt(3); // standard deviation 0.02
  const projection = weight / Math.sqrt(2 * layers);
  const list = [
    { name: 'transformer.wte.weight', shape: [vocab, hidden], center: 0, spread: weight },
    { name: 'transformer.wpe.weight', shape: [context, hidden], center: 0, spread: weight / 2 },
  ];
  for (let i = 0; i < layers; i++) {
    const layer = `transformer.h.${i}`;
    for (const [part, dims, spread] of [
      ['attn.c_attn', [hidden, 3 * hidden], weight],
      ['attn.c_proj', [hidden, hidden], projection],
      ['mlp.c_fc', [hidden, ffn], weight],
      ['mlp.c_proj', [ffn, hidden], projection],
    ]) {
      list.push({ name: `${layer}.${part}.weight`, shape: dims, center: 0, spread });
      list.push({ name: `${layer}.${part}.bias`, shape: [dims[1]], center: 0, spread: weight });
    }
    for (const norm of [`${layer}.ln_1`, `${layer}.ln_2`]) {
      list.push({ name: `${norm}.weight`, shape: [hidden], center: 1, spread: weight });
      list.push({ name: `${norm}.bias`, shape: [hidden], center: 0, spread: weight });
    }
  }
  list.push({ name: 'transformer.ln_f.weight', shape: [hidden], center: 1, spread: weight });
  list.push({ name: 'transformer.ln_f.bias', shape: [hidden], center: 0, spread: weight });
  return list;
}
