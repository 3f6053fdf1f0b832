// Texts of one call, each at its own budget; every one gets the bits it gets alone:
//   node examples/mixed-budgets.mjs [directory, default runs/example]
import { loadModel } from 'elastiform';

const [dir = 'runs/example'] = process.argv.slice(2);
const model = await loadModel(dir);
const texts = ['Call me Ishmael.', 'The state of the Union is good.', 'It was a dark night at sea.'];
const budget = ['full', 0.8, { spec: { tokenCapacity: { mlp: 0.5 } } }];

const together = await model.score(texts, { budget });
for (const [i, { tokens, logprobs, usage }] of together.entries()) {
  const mean = logprobs.slice(1).reduce((a, b) => a + b) / (tokens.length - 1);
  const { ratio } = usage.compute;
  console.log(
    `${JSON.stringify(budget[i])}: ${ratio.toFixed(3)} of the FLOPs, ${mean.toFixed(3)} nats per token: ${texts[i]}`,
  );
}

const [alone] = await model.score([texts[1]], { budget: budget[1] });
const same = alone.logprobs.every((logprob, t) => Object.is(logprob, together[1].logprobs[t]));
console.log(`the second text alone has ${same ? 'the same' : 'other'} bits`);
await model.dispose();
