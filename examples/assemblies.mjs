// What an encoder-decoder model with modules writes at several sizes, all at a time from the same weights:
//   node examples/assemblies.mjs DIRECTORY "a text" (or token ids: 5,9,14,2)
import { assemble, loadModel } from 'elastiform';

const [dir, given] = process.argv.slice(2);
const source = /^\d+(,\d+)*$/.test(given) ? given.split(',').map(Number) : given;

// From the whole model to the smallest; every other one.
const { path } = await assemble(dir);
const costs = path.filter((_, i) => i % 2 === 0);

const model = await loadModel(dir);
const streams = costs.map(({ assembly }) => model.generate(source, { budget: { spec: { assembly } }, maxTokens: 12 }));
for (const [i, stream] of streams.entries()) {
  const { assembly, speedup } = costs[i];
  const { compute } = await stream.usage;
  const written = typeof source === 'string' ? await stream.text : (await stream.ids).join();
  const parts = `encoder ${assembly.encoder.join()}, decoder ${assembly.decoder.join()}`;
  console.log(`${parts}: ${written} (${compute.ratio.toFixed(2)} of the FLOPs, ${speedup.toFixed(1)} times as fast)`);
}
await model.dispose();
