// Small encoder-decoder models to train, and a task for them: words in letters, and the same letters the other way round.
import { cpSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Random } from '../../lib/distill/random.js';
import { openSafetensors, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';

const letters = [...'abcdefgh'];
const vocabulary = ['<s>', '<pad>', '</s>', '<unk>', ...letters];

/** Writes a tokenizer of letters between spaces, whose texts end with `</s>`. */
export function writeLetters(dir: string): string {
  mkdirSync(dir, { recursive: true });
  const special = vocabulary.slice(0, 4).map((content, id) => ({
    ...{ id, content, special: true, single_word: false, lstrip: false, rstrip: false, normalized: false },
  }));
  const end = { SpecialToken: { id: '</s>', type_id: 0 } };
  const tokenizer = {
    version: '1.0',
    added_tokens: special,
    pre_tokenizer: { type: 'WhitespaceSplit' },
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ Sequence: { id: 'A', type_id: 0 } }, end],
      pair: [{ Sequence: { id: 'A', type_id: 0 } }, end, { Sequence: { id: 'B', type_id: 0 } }, end],
      special_tokens: { '</s>': { id: '</s>', ids: [2], tokens: ['</s>'] } },
    },
    model: {
      type: 'WordLevel',
      vocab: Object.fromEntries(vocabulary.map((word, id) => [word, id])),
      unk_token: '<unk>',
    },
  };
  writeFileSync(join(dir, 'tokenizer.json'), JSON.stringify(tokenizer));
  writeFileSync(
    join(dir, 'tokenizer_config.json'),
    JSON.stringify({
      tokenizer_class: 'PreTrainedTokenizerFast',
      bos_token: '<s>',
      eos_token: '</s>',
      pad_token: '<pad>',
    }),
  );
  return dir;
}

/** Words of 2 to 5 letters and the same reversed. */
export function reversals(count: number, seed: number): { text: string; label: string }[] {
  const random = new Random(seed, 'words');
  return Array.from({ length: count }, () => {
    const word = Array.from({ length: 2 + random.below(4) }, () => letters[random.below(letters.length)]);
    return { text: word.join(' '), label: word.toReversed().join(' ') };
  });
}

/** A small model of 4 layers on both sides. */
export const smallModel = (more: Record<string, unknown> = {}): Record<string, unknown> => ({
  ...{ model_type: 'mbart', d_model: 32, encoder_ffn_dim: 64, decoder_ffn_dim: 64, max_position_embeddings: 16 },
  ...{ encoder_layers: 4, decoder_layers: 4, encoder_attention_heads: 2, decoder_attention_heads: 2 },
  ...{ scale_embedding: true, bos_token_id: 0, pad_token_id: 1, ...more },
});

/** The model of a directory with a head without bias, and with a tokenizer, which golden models lack. */
export async function zeroBiased(from: string, dir: string): Promise<string> {
  cpSync(from, dir, { recursive: true });
  writeLetters(dir);
  using file = openSafetensors(join(from, 'model.safetensors'));
  const tensors = file.names().map((tensor): [string, TensorData] => {
    const values = file.tensor(tensor);
    const data = tensor === 'final_logits_bias' ? new Float32Array(values.size) : values.readFloat();
    return [tensor, { dtype: 'f32', shape: [...values.shape], data }];
  });
  await writeSafetensors(join(dir, 'model.safetensors'), Object.fromEntries(tensors));
  return dir;
}
