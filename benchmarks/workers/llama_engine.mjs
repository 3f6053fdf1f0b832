// node-llama-cpp (llama.cpp's CPU backend) on the benchmark model in F32: many texts in the sequences of one context, whose
// evaluations it puts together.
import fs from 'node:fs';
import path from 'node:path';
import { getLlama, LlamaLogLevel } from 'node-llama-cpp';
import { serve } from '../harness/serve.mjs';

let sequences;
let texts;
let maxTokens;

async function generate(sequence, prompt) {
  await sequence.clearHistory();
  const ids = [];
  let input = prompt;
  while (ids.length < maxTokens) {
    const last = [input.at(-1), { generateNext: { token: true, options: { temperature: 0 } } }];
    const outputs = await sequence.controlledEvaluate([...input.slice(0, -1), last]);
    ids.push(outputs.at(-1).next.token);
    input = ids.slice(-1);
  }
  return ids;
}

await serve({
  async load({ dir, threads, prompts, tokens }) {
    const llama = await getLlama({ gpu: false, build: 'never', maxThreads: threads, logLevel: LlamaLogLevel.error });
    const model = await llama.loadModel({ modelPath: path.join(dir, 'model.gguf') });
    const context = await model.createContext({
      contextSize: prompts[0].length + tokens,
      sequences: prompts.length,
      batchSize: 512,
      threads: { ideal: threads, min: threads },
      flashAttention: true,
    });
    sequences = prompts.map(() => context.getSequence());
    [texts, maxTokens] = [prompts, tokens];
    const manifest = new URL('../node_modules/node-llama-cpp/package.json', import.meta.url);
    return {
      version: JSON.parse(fs.readFileSync(manifest, 'utf8')).version,
      settings: `F32 weights, F16 KV cache, flash attention, ${prompts.length} sequences of a context`,
      system: llama.systemInfo.trim(),
    };
  },
  /** As ours_engine.mjs. */
  async generate({ together, alone }) {
    const chosen = together ? texts : texts.slice(0, alone);
    const start = performance.now();
    const ids = together ? await Promise.all(chosen.map((text, i) => generate(sequences[i], text))) : [];
    if (!together) for (const [i, text] of chosen.entries()) ids.push(await generate(sequences[i], text));
    return { ms: (performance.now() - start) / (chosen.length * maxTokens), ids };
  },
});
