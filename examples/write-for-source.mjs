// What an encoder-decoder model writes for sources, all at a time, by one beam and by several:
//   node examples/write-for-source.mjs DIRECTORY "a text" "another" (or token ids: 5,9,14,2)
import { loadModel } from 'elastiform';

const [dir, ...given] = process.argv.slice(2);
const sources = given.map((source) => (/^\d+(,\d+)*$/.test(source) ? source.split(',').map(Number) : source));

const model = await loadModel(dir);
console.log(`${model.info.architecture}, ${model.info.layers} layers of the decoder`);
for (const beams of [1, 4]) {
  // They share runs, and each is written as if it were alone.
  const streams = sources.map((source) => model.generate(source, { beams, maxTokens: 12 }));
  for (const [i, stream] of streams.entries()) {
    const { outputTokens, compute } = await stream.usage;
    const written = typeof sources[i] === 'string' ? await stream.text : (await stream.ids).join();
    const cost = `${outputTokens} tokens, ${(compute.flops / 1e6).toFixed(2)} million FLOPs`;
    console.log(`beams ${beams}: ${given[i]} -> ${written} (${cost})`);
  }
}
await model.dispose();
