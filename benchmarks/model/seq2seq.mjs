// The encoder-decoder model of the benchmarks: the shape of OPUS-MT's translators with random weights, as a Hugging Face directory.
import fs from 'node:fs';
import path from 'node:path';
import { writeCheckpoint } from './safetensors.mjs';

export const SEQ2SEQ = Object.freeze({ layers: 6, hidden: 512, heads: 8, ffn: 2048, vocab: 58101, positions: 512 });

const config = ({ layers, hidden, heads, ffn, vocab, positions }) => ({
  architectures: ['MarianMTModel'],
  model_type: 'marian',
  is_encoder_decoder: true,
  activation_function: 'swish',
  d_model: hidden,
  ...{ encoder_layers: layers, decoder_layers: layers, encoder_ffn_dim: ffn, decoder_ffn_dim: ffn },
  ...{ encoder_attention_heads: heads, decoder_attention_heads: heads },
  vocab_size: vocab,
  max_position_embeddings: positions,
  scale_embedding: true,
  static_position_embeddings: true,
});

/** Texts end at token 0, which random weights hardly choose. */
const generation = ({ vocab }) => ({
  ...{ decoder_start_token_id: vocab - 1, pad_token_id: vocab - 1, eos_token_id: 0, num_beams: 1 },
});

function tensors({ layers, hidden, ffn, vocab }) {
  const spread = 0.05 * Math.sqrt(3);
  const list = [];
  const add = (name, ...shape) => list.push({ name: `model.${name}`, shape, center: 0, spread });
  const linear = (name, out, input) => {
    add(`${name}.weight`, out, input);
    add(`${name}.bias`, out);
  };
  const norm = (name) => {
    list.push({ name: `model.${name}.weight`, shape: [hidden], center: 1, spread });
    add(`${name}.bias`, hidden);
  };
  const attention = (name) => {
    for (const part of ['q_proj', 'k_proj', 'v_proj', 'out_proj']) linear(`${name}.${part}`, hidden, hidden);
    norm(`${name}_layer_norm`);
  };
  add('shared.weight', vocab, hidden);
  for (const stack of ['encoder', 'decoder']) {
    for (let i = 0; i < layers; i++) {
      const at = `${stack}.layers.${i}`;
      attention(`${at}.self_attn`);
      if (stack === 'decoder') attention(`${at}.encoder_attn`);
      linear(`${at}.fc1`, ffn, hidden);
      linear(`${at}.fc2`, hidden, ffn);
      norm(`${at}.final_layer_norm`);
    }
  }
  return list;
}

/** Writes config.json, generation_config.json and model.safetensors. */
export function writeSeq2Seq(dir, shape = SEQ2SEQ) {
  writeCheckpoint(dir, tensors(shape), config(shape));
  fs.writeFileSync(path.join(dir, 'generation_config.json'), JSON.stringify(generation(shape)));
}
