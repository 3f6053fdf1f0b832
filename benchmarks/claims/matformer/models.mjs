// The texts, and the models that are compared: nested ones, and one trained alone for every granularity, on the same batches.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { pretrain } from '../../../dist/index.js';

const root = join(import.meta.dirname, '../../..');

/** Shares of the units, and what the paper calls them. */
export const GRANULARITIES = [0.125, 0.25, 0.5, 1];
export const NAMES = ['S', 'M', 'L', 'XL'];
/** Units of the largest feed-forward. */
export const FFN = 512;

/** Every model: nested, with how it samples its widths, or alone, with its units. */
export const MODELS = {
  joint: { sample: { strategy: 'joint' } },
  ...Object.fromEntries(GRANULARITIES.map((share, i) => [NAMES[i], { width: share * FFN }])),
  random: { sample: { strategy: 'random' } },
  sandwich: { sample: { strategy: 'sandwich' } },
};

export const architecture = {
  model_type: 'llama',
  hidden_size: 96,
  num_hidden_layers: 4,
  num_attention_heads: 3,
  num_key_value_heads: 3,
  max_position_embeddings: 256,
  tie_word_embeddings: true,
};
export const VOCAB = 1024;

/** Paragraphs joined until each has at least `least` characters. */
const paragraphs = (text, least) => {
  const out = [];
  for (const part of text.split(/\n\s*\n/)) {
    if (out.length > 0 && out.at(-1).length < least) out[out.length - 1] += `\n\n${part}`;
    else out.push(part);
  }
  return out;
};
/** Texts by name: functions of the folder to keep things in that give documents to train on, and to hold out. */
export const TEXTS = {
  /** A quarter of the speeches and of the novel that models/tiny was trained on. */
  corpus(cache) {
    const dir = join(cache, 'corpus');
    const file = (part) => join(dir, `${part}.jsonl`);
    if (!existsSync(file('heldout'))) {
      const made = spawnSync(process.execPath, ['scripts/tiny-model/corpus.mjs', dir], { cwd: root, stdio: 'inherit' });
      if (made.status !== 0) throw new Error('claims: the corpus could not be written');
    }
    const [train, heldOut] = ['train', 'heldout'].map((part) =>
      readFileSync(file(part), 'utf8')
        .trimEnd()
        .split('\n')
        .map((line) => JSON.parse(line).text),
    );
    return { train: [...new Set(train)].filter((_, i) => i % 4 === 0), heldOut };
  },
  tinyshakespeare: () => split('tinyshakespeare/input.txt'),
  'wikitext-2': () => split('wikitext-2/valid.txt'),
};

/** A text of ELASTIFORM_DATA, of which every 15th stretch is held out. */
function split(file) {
  const path = join(process.env.ELASTIFORM_DATA ?? '', file);
  if (!existsSync(path)) throw new Error(`claims: ELASTIFORM_DATA has no ${file}`);
  const all = paragraphs(readFileSync(path, 'utf8'), 4000);
  const held = (_, i) => i % 15 === 7;
  return { train: all.filter((...at) => !held(...at)), heldOut: all.filter(held) };
}

/** At most `count` stretches of `characters` at most, from one word to the end of the stretch, spread evenly over all texts. */
export function excerpts(texts, count, characters) {
  const all = texts.flatMap((text) =>
    Array.from({ length: Math.floor(text.length / characters) }, (_, i) => {
      const piece = text.slice(i * characters, (i + 1) * characters);
      return piece.slice(piece.search(/\s/) + 1);
    }),
  );
  const some = Math.min(count, all.length);
  return Array.from({ length: some }, (_, i) => all[Math.floor((i * all.length) / some)]);
}

/**
 * Trains a model that is not there yet, or goes on where training stopped; all of a seed see the same batches.
 *
 * @param run the text's name and documents, steps, batchTokens, sequenceLength; cache, where models are kept
 * @returns its directory
 */
export async function trained(name, seed, { cache, text, texts, steps, batchTokens, sequenceLength, say }) {
  const { sample, width = FFN } = MODELS[name];
  const data = { kind: 'documents', documents: texts.train };
  const sizes = { batchTokens, sequenceLength };
  const tokenizer = join(cache, `tokenizer-${text}`);
  if (!existsSync(join(tokenizer, 'model.safetensors'))) {
    say(`${text}: training a tokenizer`);
    const model = { ...architecture, num_hidden_layers: 1, intermediate_size: 32 };
    await pretrain({ model, tokenizer: { vocabSize: VOCAB }, ...sizes, steps: 1, out: tokenizer, data });
  }
  const config = {
    model: { ...architecture, intermediate_size: width },
    ...{ steps, ...sizes, seed },
    optimizer: { lr: 4e-3, weightDecay: 0.1, warmup: Math.ceil(steps / 20) },
    ...(sample && { sample, nested: { granularities: GRANULARITIES } }),
  };
  const key = createHash('sha256')
    .update(JSON.stringify([config, text]))
    .digest('hex')
    .slice(0, 8);
  const out = join(cache, `${name}-${seed}-${key}`);
  if (!existsSync(join(out, 'model.safetensors'))) {
    const onEvent = (event) => {
      if (event.type !== 'step' || event.step % 50 !== 0) return;
      const { step, loss, tokensPerSecond } = event;
      say(
        `${name}, seed ${seed}: ${step} of ${steps}, loss ${loss.toFixed(3)}, ${tokensPerSecond.toFixed(0)} tokens/s`,
      );
    };
    await pretrain({ ...config, tokenizer, out, data, saveEvery: 100, keep: 1, onEvent });
  }
  return out;
}
