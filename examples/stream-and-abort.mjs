// Text as it comes, and two ways to end it early: leaving the loop, and a signal:
//   node examples/stream-and-abort.mjs [directory, default models/tiny]
import { fileURLToPath } from 'node:url';
import { loadModel } from 'elastiform';

const [dir = fileURLToPath(new URL('../models/tiny', import.meta.url))] = process.argv.slice(2);
const model = await loadModel(dir);

const stream = model.generate('Call me', { maxTokens: 200 });
let tokens = 0;
for await (const { text } of stream) {
  process.stdout.write(text);
  if (++tokens === 10) break; // the model stops working, too
}
console.log(`\nleft after ${tokens} tokens: ${await stream.finishReason}`);

const controller = new AbortController();
const aborted = model.generate('We the people', {
  maxTokens: 200,
  seed: 7,
  temperature: 0.8,
  signal: controller.signal,
});
tokens = 0;
for await (const { text } of aborted) {
  process.stdout.write(text);
  if (++tokens === 10) controller.abort(); // as a server does when its client goes away
}
// What was generated and what it cost are there all the same.
const { outputTokens, compute } = await aborted.usage;
console.log(`\n${await aborted.finishReason} after ${outputTokens} tokens, ${compute.flops} FLOPs`);
await model.dispose();
