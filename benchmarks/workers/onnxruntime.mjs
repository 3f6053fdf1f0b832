// onnxruntime-node on the benchmark model: fused graph, caller-owned KV cache that the session updates in place.
import { createRequire } from 'node:module';
import path from 'node:path';
import { encode, serve } from '../harness/serve.mjs';
import { SHAPE } from '../model/shape.mjs';

const require = createRequire(import.meta.url);
const ort = require('onnxruntime-node');

let session;
let cacheIn;
let outputs;
let logits;

const int32 = (value) => new ort.Tensor('int32', Int32Array.of(value), [1]);

async function step(ids, start) {
  const count = ids.length;
  const feeds = {
    ...cacheIn,
    input_ids: new ort.Tensor('int64', BigInt64Array.from(ids, BigInt), [count]),
    position_ids: new ort.Tensor(
      'int64',
      BigInt64Array.from(ids, (_, i) => BigInt(start + i)),
      [count],
    ),
    seqlens_k: int32(start + count - 1),
    total_length: int32(start + count),
  };
  await session.run(feeds, outputs);
}

await serve({
  async load({ dir, threads }) {
    session = await ort.InferenceSession.create(path.join(dir, 'model.onnx'), {
      intraOpNumThreads: threads,
      interOpNumThreads: 1,
      executionMode: 'sequential',
      graphOptimizationLevel: 'all',
    });
    const { layers, heads, context, headDim, vocab } = SHAPE;
    cacheIn = {};
    outputs = {};
    for (let i = 0; i < layers; i++) {
      for (const kind of ['key', 'value']) {
        // The same memory as input and output: new rows are appended, nothing is copied.
        const tensor = new ort.Tensor('float32', new Float32Array(heads * context * headDim), [
          1,
          heads,
          context,
          headDim,
        ]);
        cacheIn[`past_${kind}.${i}`] = tensor;
        outputs[`present_${kind}.${i}`] = tensor;
      }
    }
    logits = new Float32Array(vocab);
    outputs.logits = new ort.Tensor('float32', logits, [1, vocab]);
    return { version: require('onnxruntime-node/package.json').version, settings: 'graph optimization all, KV shared' };
  },
  async logits({ prompt, next }) {
    await step(prompt, 0);
    const prefill = encode(logits);
    for (const [i, id] of next.entries()) await step([id], prompt.length + i);
    return { prefill, decode: encode(logits) };
  },
  async prefill({ prompt }) {
    const start = performance.now();
    await step(prompt, 0);
    return { ms: performance.now() - start };
  },
  async decode({ prompt, next }) {
    const start = performance.now();
    for (const [i, id] of next.entries()) await step([id], prompt.length + i);
    return { ms: (performance.now() - start) / next.length };
  },
});
