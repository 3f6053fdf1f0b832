// Trains routers that let some prompts skip attention in some layers, and shows what each of them kept:
//   node examples/skip-attention.mjs [directory, default runs/skipping] [steps, default 100] [text to train on]
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { distill, elastify, loadModel } from 'elastiform';

const shipped = fileURLToPath(new URL('../models/tiny', import.meta.url));
const [dir = 'runs/skipping', steps = '100', text = join(shipped, 'train.txt')] = process.argv.slice(2);

// One router for the attention of each of four layers: hidden size + 1 parameters.
const plan = await elastify(shipped, { kind: 'router-tuning', target: 'attn' }, { out: `${dir}-plan` });
console.log(`${plan.trainableParameters} parameters to train`);
const result = await distill({
  plan: plan.dir,
  out: dir,
  data: { kind: 'text', files: text },
  steps: Number(steps),
  sequenceLength: 64,
  onEvent(event) {
    if (event.type === 'step') console.log(`step ${event.step}: KL ${event.terms.kl.toFixed(3)}`);
  },
});

const model = await loadModel(result.dir);
for (const prompt of ['Call me', 'It was a dark and stormy night; the', 'Fellow citizens, I am again called upon']) {
  // Of the sequences that it was calibrated on, half ran the attention of each of these layers.
  const budget = { spec: { sequenceCapacity: { attn: 0.5 } } };
  const stream = model.generate(prompt, { budget, maxTokens: 16, temperature: 0 });
  const reply = await stream.text;
  const { layersRun, ratio } = (await stream.usage).compute;
  // Decided once, when the prompt was read: 1 or 0 for all tokens alike.
  const skipped = [...layersRun.attn].flatMap((share, layer) => (share === 0 ? [layer] : []));
  console.log(`${prompt}|${reply}\n  without attention in layers [${skipped}]: ${ratio.toFixed(2)} of the FLOPs`);
}
await model.dispose();
