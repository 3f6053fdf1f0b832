// What is measured on a GPU: the shapes of every group, and tiny ones that only prove that everything runs.

const llama = (rows, { layers, hidden, ffn, heads, kvHeads, vocab }) => ({
  rows,
  config: {
    model_type: 'llama',
    num_hidden_layers: layers,
    hidden_size: hidden,
    intermediate_size: ffn,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    vocab_size: vocab,
    max_position_embeddings: 131072,
    rms_norm_eps: 1e-5,
    rope_theta: 500000,
    tie_word_embeddings: true,
  },
});

export const FULL = {
  ceilings: { copyBytes: 2 ** 31, size: 8192 },
  // [k, n] of a Llama-3-8B layer: queries and output, keys and values, gate and up, down.
  gemm: {
    rows: 8192,
    few: 2,
    many: 6,
    products: { 'q, o': [4096, 4096], 'k, v': [4096, 1024], 'gate, up': [4096, 14336], down: [14336, 4096] },
  },
  'ffn large': { rows: 8192, hidden: 4096, ffn: 14336, gated: true, layers: 2, capacity: 0.5 },
  'ffn small': { rows: 8192, hidden: 768, ffn: 3072, gated: false, layers: 12, capacity: 0.5 },
  // Products of 512 rows by 384 columns: each alone would leave most of a GPU idle.
  blocks: { rows: 512, hidden: 768, ffn: 3072, gated: false, layers: 12, capacity: 0.5, blocks: 8 },
  slices: { rows: 8192, hidden: 4096, ffn: 14336, gated: true, layers: 2, shares: [0.25, 0.5, 0.75] },
  topk: { rows: 8192, capacity: 0.5, few: 2, many: 18 },
  attention: { rows: 8192, segments: [4, 1], heads: 32, kvHeads: 8, headDim: 128, few: 1, many: 3 },
  loss: { rows: 8192, hidden: 4096, vocab: 128256 },
  // Llama-3.2-1B: every layer routed in both places.
  step: {
    ...llama(8192, { layers: 16, hidden: 2048, ffn: 8192, heads: 32, kvHeads: 8, vocab: 128256 }),
    segments: 4,
    capacity: 0.5,
    lr: 1e-3,
  },
};

export const TINY = {
  ceilings: { copyBytes: 2 ** 16, size: 64 },
  gemm: { rows: 128, few: 1, many: 2, products: { 'q, o': [64, 64], down: [128, 64] } },
  'ffn large': { rows: 128, hidden: 64, ffn: 128, gated: true, layers: 1, capacity: 0.5 },
  'ffn small': { rows: 128, hidden: 64, ffn: 128, gated: false, layers: 2, capacity: 0.5 },
  blocks: { rows: 128, hidden: 64, ffn: 128, gated: false, layers: 2, capacity: 0.5, blocks: 4 },
  slices: { rows: 128, hidden: 64, ffn: 128, gated: true, layers: 1, shares: [0.5] },
  topk: { rows: 512, capacity: 0.5, few: 1, many: 3 },
  attention: { rows: 64, segments: [2, 1], heads: 2, kvHeads: 1, headDim: 64, few: 1, many: 2 },
  loss: { rows: 64, hidden: 64, vocab: 256 },
  step: {
    ...llama(64, { layers: 2, hidden: 64, ffn: 128, heads: 2, kvHeads: 1, vocab: 256 }),
    segments: 2,
    capacity: 0.5,
    lr: 1e-3,
  },
};

/** In the order they are measured: what matters most first, since time may run out. */
export const GROUPS = Object.keys(FULL);

/** Floating-point operations, a multiply and an add counting as two. */
export const flops = {
  product: (rows, [k, n]) => 2 * rows * k * n,
  ffn: ({ rows, hidden, ffn, gated }, share = 1) => 2 * rows * share * hidden * ffn * (gated ? 3 : 2),
  /** Causal: half of all pairs, and the diagonal. */
  attention({ rows, heads, headDim }, segments) {
    const length = rows / segments;
    return 4 * segments * heads * headDim * ((length * (length + 1)) / 2);
  },
  /** Teacher's and student's logits, and the gradient of the student's hidden states. */
  loss: ({ rows, hidden, vocab }) => 3 * 2 * rows * hidden * vocab,
};
