// onnxruntime-node on the benchmarks' encoder: vectors of token ids, into memory that is used again.
import { createRequire } from 'node:module';
import path from 'node:path';
import { encode, serve, batch as timed } from '../harness/serve.mjs';

const require = createRequire(import.meta.url);
const ort = require('onnxruntime-node');

let session;

const feedsOf = (ids, length) => {
  const dims = [ids.length / length, length];
  return {
    input_ids: new ort.Tensor('int32', Int32Array.from(ids), dims),
    segment_ids: new ort.Tensor('int32', new Int32Array(ids.length), dims),
  };
};

await serve({
  async load({ dir, file, threads }) {
    session = await ort.InferenceSession.create(path.join(dir, file), {
      intraOpNumThreads: threads,
      interOpNumThreads: 1,
      executionMode: 'sequential',
      graphOptimizationLevel: 'all',
    });
    return { version: require('onnxruntime-node/package.json').version, settings: `graph optimization all, ${file}` };
  },
  async vectors({ ids, length }) {
    return encode((await session.run(feedsOf(ids, length))).mean.data);
  },
  async embed({ ids, length, batchMs }) {
    const feeds = feedsOf(ids, length);
    return timed(batchMs, () => session.run(feeds));
  },
});
