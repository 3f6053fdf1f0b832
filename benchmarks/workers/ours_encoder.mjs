// elastiform's encoder: vectors of token ids.
import { loadModel } from '../../dist/index.js';
import { loadAddon } from '../../dist/native/index.js';
import { encode, serve, batch as timed } from '../harness/serve.mjs';

let model;

const texts = (ids, length) =>
  Array.from({ length: ids.length / length }, (_, i) => ids.slice(i * length, (i + 1) * length));

await serve({
  async load({ dir, threads }) {
    model = await loadModel(dir, { dtype: 'f32', threads });
    const { version, isa, threads: used } = loadAddon().info();
    return { version, isa, threads: used };
  },
  async vectors({ ids, length }) {
    const { vectors } = await model.embed(texts(ids, length));
    return encode(Float32Array.from(vectors.flatMap((vector) => [...vector])));
  },
  async embed({ ids, length, batchMs }) {
    const inputs = texts(ids, length);
    return timed(batchMs, () => model.embed(inputs));
  },
});
