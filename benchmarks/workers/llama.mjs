// node-llama-cpp (llama.cpp's CPU backend) on the benchmark model in F32.
import fs from 'node:fs';
import path from 'node:path';
import { getLlama, LlamaLogLevel } from 'node-llama-cpp';
import { encode, serve } from '../harness/serve.mjs';

let sequence;

// Evaluates `ids` and picks the greedy next token; with `probabilities`, returns log-probabilities by id instead.
async function evaluate(ids, probabilities = false) {
  const input = [...ids];
  input[ids.length - 1] = [ids[ids.length - 1], { generateNext: probabilities ? { probabilities } : { token: true } }];
  const outputs = await sequence.controlledEvaluate(input);
  if (!probabilities) return null;
  const map = outputs.at(-1).next.probabilities;
  const values = new Float32Array(map.size);
  for (const [id, p] of map) values[id] = Math.log(p);
  return values;
}

async function rewind(length) {
  const used = sequence.nextTokenIndex;
  if (used > length) await sequence.eraseContextTokenRanges([{ start: length, end: used }]);
}

await serve({
  async load({ dir, threads }) {
    const llama = await getLlama({ gpu: false, build: 'never', maxThreads: threads, logLevel: LlamaLogLevel.error });
    const model = await llama.loadModel({ modelPath: path.join(dir, 'model.gguf') });
    const context = await model.createContext({
      contextSize: 1024,
      batchSize: 512,
      threads: { ideal: threads, min: threads },
      flashAttention: true,
    });
    sequence = context.getSequence();
    const manifest = new URL('../node_modules/node-llama-cpp/package.json', import.meta.url);
    return {
      version: JSON.parse(fs.readFileSync(manifest, 'utf8')).version,
      settings: 'F32 weights, F16 KV cache, flash attention',
      system: llama.systemInfo.trim(),
    };
  },
  async logits({ prompt, next }) {
    await rewind(0);
    const prefill = encode(await evaluate(prompt, true));
    let last;
    for (const id of next) last = await evaluate([id], true);
    await rewind(prompt.length);
    return { prefill, decode: encode(last) };
  },
  async prefill({ prompt }) {
    await rewind(0);
    const start = performance.now();
    await evaluate(prompt);
    return { ms: performance.now() - start };
  },
  async decode({ prompt, next }) {
    if (sequence.nextTokenIndex !== prompt.length) throw new Error('the sequence must hold the prompt');
    const start = performance.now();
    for (const id of next) await evaluate([id]);
    const ms = (performance.now() - start) / next.length;
    await rewind(prompt.length);
    return { ms };
  },
});
