// Makes the shipped model elastic and trains its routers; the other examples use what this one writes:
//   node examples/elastify-and-distill.mjs [directory, default runs/example] [steps, default 100] [text to train on]
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { distill, elastify, evaluate } from 'elastiform';

const shipped = fileURLToPath(new URL('../models/tiny', import.meta.url));
const [dir = 'runs/example', steps = '100', text = join(shipped, 'train.txt')] = process.argv.slice(2);

// Routers of zeros, with the model they belong to.
const plan = await elastify(shipped, { kind: 'elastiformer' }, { out: `${dir}-plan` });
console.log(
  `${plan.trainableParameters} parameters to train, ${(plan.trainableShare * 100).toFixed(2)} % of the model's`,
);

// The model learns to imitate its own full self with some of its tokens left out. Ctrl-C stops it; started again, it goes on.
const interrupt = new AbortController();
process.once('SIGINT', () => interrupt.abort());
const result = await distill({
  plan: plan.dir,
  out: dir,
  data: { kind: 'text', files: text },
  steps: Number(steps),
  sequenceLength: 128,
  calibrationTokens: 2048,
  signal: interrupt.signal,
  onEvent(event) {
    if (event.type === 'step') console.log(`step ${event.step}: KL ${event.terms.kl.toFixed(3)}`);
    if (event.type === 'warn') console.warn(event.message);
  },
});
if (result.stopped === 'signal') process.exit(130);

const heldOut = await readFile(join(shipped, 'heldout.txt'), 'utf8');
const report = await evaluate(result.dir, { data: [heldOut], budgets: ['full', 0.8, 0.6], limit: 1000, speed: false });
for (const { budget, ratio, agreement } of report.levels) {
  const share = (agreement.value * 100).toFixed(0);
  console.log(
    `budget ${budget}: ${ratio.toFixed(2)} of the FLOPs, the full model's next token at ${share} % of the positions`,
  );
}
