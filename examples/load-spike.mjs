// Survives a spike of requests by spending less on each: the longer the queue, the smaller the budget:
//   node examples/load-spike.mjs [directory, default runs/example]
import { loadModel } from 'elastiform';

const [dir = 'runs/example'] = process.argv.slice(2);
const model = await loadModel(dir);

/** What a request may spend while so many others wait. @param {number} waiting */
const budgetFor = (waiting) => (waiting <= 2 ? 'full' : waiting <= 5 ? 0.8 : 0.6);

/** @type {{ prompt: string, arrived: number }[]} */
const queue = [];
const arrive = (/** @type {string} */ prompt) => queue.push({ prompt, arrived: performance.now() });

/** Answers until nobody waits. */
async function work() {
  for (let request = queue.shift(); request; request = queue.shift()) {
    const waiting = queue.length;
    const budget = budgetFor(waiting);
    const stream = model.generate(request.prompt, { budget, maxTokens: 12 });
    const [text, { compute }] = await Promise.all([stream.text, stream.usage]);
    const seconds = ((performance.now() - request.arrived) / 1000).toFixed(2);
    const cost = `${compute.ratio.toFixed(2)} of the FLOPs`;
    console.log(`${waiting} waiting, budget ${budget}, ${cost}, answered after ${seconds} s: ${JSON.stringify(text)}`);
  }
}

console.log('one request');
arrive('Call me');
await work();

console.log('a spike of ten');
for (let i = 0; i < 10; i++) arrive(`Chapter ${i + 1}`);
await work();

console.log('calm again');
arrive('The end');
await work();
await model.dispose();
