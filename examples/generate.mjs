// One model, one prompt, three budgets:
//   node examples/generate.mjs [directory, default runs/example]
import { loadModel } from 'elastiform';

const [dir = 'runs/example'] = process.argv.slice(2);
const model = await loadModel(dir);
console.log(`levels: ${model.info.levels.map(({ name }) => name).join(', ')}`);

// A level, a share of the full model's FLOPs, or `full`. docs/budgets.md has the others.
for (const budget of ['full', 0.8, 'p60']) {
  const { flopsRatio, why } = model.resolve(budget, { length: 40 });
  console.log(`\n${budget}: about ${flopsRatio.toFixed(2)} of the FLOPs (${why})`);
  const stream = model.generate('It was a dark', { budget, maxTokens: 24 });
  for await (const { text } of stream) process.stdout.write(text);
  const { outputTokens, compute } = await stream.usage;
  console.log(`\n${outputTokens} tokens at ${compute.ratio.toFixed(3)} of the full model's FLOPs, counted`);
}
await model.dispose();
