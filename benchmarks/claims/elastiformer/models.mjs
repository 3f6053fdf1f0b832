// The models whose claims are measured, and the texts of each: to train on, to hold out, and of another domain.
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { pretrain } from '../../../dist/index.js';

const root = join(import.meta.dirname, '../../..');
const data = process.env.ELASTIFORM_DATA ?? '';

const paragraphs = (text, least = 200) => text.split(/\n\s*\n/).filter((part) => part.length >= least);
const lines = (file) =>
  readFileSync(file, 'utf8')
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => JSON.parse(line));
const problems = (file) => lines(file).map(({ question, answer }) => `${question}\n${answer}`);

/** Texts joined until each has at least `length` characters, so that sequences are long. */
function joined(texts, length) {
  const out = [];
  for (const text of texts) {
    if (out.length > 0 && out.at(-1).length < length) out[out.length - 1] += `\n\n${text}`;
    else out.push(text);
  }
  return out;
}

/**
 * name, directory, and texts. A model that needs a folder which is not there is left out, with a reason.
 *
 * @param cache where the model that is trained here is kept
 */
export async function findModels(names, cache, say) {
  const found = [];
  for (const name of names) {
    const model = await MODELS[name](cache, say);
    if (typeof model === 'string') say(`${name} is left out: ${model}`);
    else found.push({ name, ...model });
  }
  return found;
}

const MODELS = {
  tiny() {
    const dir = join(root, 'models/tiny');
    const read = (file) => joined(paragraphs(readFileSync(join(dir, file), 'utf8')), 1200);
    return {
      dir,
      title: 'models/tiny (1.7 M parameters, speeches and a novel)',
      train: read('train.txt'),
      heldOut: read('heldout.txt'),
      other: otherDomain(),
    };
  },
  stories() {
    const dir = join(data, 'stories260K-llama');
    if (!existsSync(join(dir, 'config.json'))) return 'ELASTIFORM_DATA has no stories260K-llama';
    const text = readFileSync(join(data, 'tinystories-sample/tinystories_197k.txt'), 'utf8');
    const all = joined(paragraphs(text, 1), 800);
    const cut = Math.floor(all.length * 0.75);
    return {
      dir,
      title: 'stories260K (0.26 M parameters, TinyStories)',
      train: all.slice(0, cut),
      heldOut: all.slice(cut),
      other: otherDomain(),
    };
  },
  async gsm8k(cache, say) {
    const files = ['train', 'test'].map((part) => join(data, 'gsm8k', `${part}.jsonl`));
    if (!files.every(existsSync)) return 'ELASTIFORM_DATA has no gsm8k';
    const [train, heldOut] = files.map((file) => joined(problems(file), 800));
    const dir = join(cache, 'gsm8k-model');
    if (!existsSync(join(dir, 'model.safetensors'))) {
      say('gsm8k: training a model on its texts (once)');
      await pretrain({ ...gsm8kModel, out: dir, data: { kind: 'documents', documents: train } });
    }
    return {
      dir,
      title: '12 layers trained for 300 steps on GSM8K here (1.4 M parameters)',
      train,
      heldOut: heldOut.slice(0, 150),
      other: otherDomain(),
    };
  },
};

export const MODEL_NAMES = Object.keys(MODELS);

/** Shakespeare: none of the models has seen it. */
function otherDomain() {
  const file = join(data, 'tinyshakespeare/input.txt');
  return existsSync(file) ? joined(paragraphs(readFileSync(file, 'utf8'), 50), 1200).slice(0, 400) : null;
}

/** Of many layers for what it has learnt: one that has layers to spare. */
const gsm8kModel = {
  model: {
    model_type: 'llama',
    hidden_size: 96,
    intermediate_size: 256,
    num_hidden_layers: 12,
    num_attention_heads: 6,
    num_key_value_heads: 3,
    max_position_embeddings: 512,
    tie_word_embeddings: true,
  },
  tokenizer: { vocabSize: 2048 },
  sequenceLength: 256,
  batchTokens: 2048,
  steps: 300,
  optimizer: { lr: 4e-3, weightDecay: 0.1, warmup: 30 },
  seed: 5,
  saveEvery: 100,
  keep: 1,
};
