// elastiform's encoder-decoder models: texts for sources of token ids, all at once.
import { loadModel } from '../../dist/index.js';
import { loadAddon } from '../../dist/native/index.js';
import { serve, batch as timed } from '../harness/serve.mjs';

let model;

const write = (sources, maxTokens, beams) =>
  Promise.all(sources.map((source) => model.generate(source, { maxTokens, beams, temperature: 0 }).ids));

await serve({
  async load({ dir, threads }) {
    model = await loadModel(dir, { dtype: 'f32', threads, maxContext: 256 });
    const { version, isa, threads: used } = loadAddon().info();
    return { version, isa, threads: used };
  },
  texts: ({ sources, maxTokens, beams }) => write(sources, maxTokens, beams),
  generate: ({ sources, maxTokens, beams, batchMs }) => timed(batchMs, () => write(sources, maxTokens, beams)),
});
