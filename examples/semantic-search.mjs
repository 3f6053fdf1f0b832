// Which texts mean what a question asks, by vectors of an encoder:
//   node examples/semantic-search.mjs DIRECTORY [file with one text a line]
import { readFileSync } from 'node:fs';
import { loadModel } from 'elastiform';

const [dir, file] = process.argv.slice(2);
const texts = file
  ? readFileSync(file, 'utf8')
      .split('\n')
      .filter((line) => line !== '')
  : ['The dog barks at the owner.', 'A cat walks by the lake.', 'The owner was walking the dog.'];
const question = 'Which cat is by the lake?';

const model = await loadModel(dir);
console.log(`${model.info.architecture} for ${model.info.task}, ${model.info.layers} layers`);
const index = await model.embed(texts, { normalize: true });
const query = await model.embed(question, { normalize: true });
// Vectors of other weights, another pooling or other dims have another id, and must not be compared.
if (index.spaceId !== query.spaceId) throw new Error('vectors of two spaces');

const [asked] = query.vectors;
const ranked = texts.map((text, i) => ({
  text,
  score: index.vectors[i].reduce((sum, x, d) => sum + x * asked[d], 0),
}));
ranked.sort((a, b) => b.score - a.score);
console.log(question);
for (const { text, score } of ranked.slice(0, 3)) console.log(`  ${score.toFixed(3)}  ${text}`);
const { inputTokens, compute } = index.usage;
console.log(`${inputTokens} tokens, ${(compute.flops / 1e6).toFixed(2)} million floating-point operations`);

// A model with a classifier tells classes of texts, or of pairs of texts, too.
if (model.info.labels.length > 0) {
  for (const { label, score } of await model.classify(texts)) console.log(`  ${label} ${score.toFixed(3)}`);
}
await model.dispose();
