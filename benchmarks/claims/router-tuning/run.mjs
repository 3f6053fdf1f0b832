// Router-Tuning's claims, measured again on small models: `npm run claims:router-tuning`.
import { rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { distill, elastify, evaluate, loadModel } from '../../../dist/index.js';
import { machineFacts } from '../../harness/machine.mjs';
import { cellsIn, readOptions } from '../cells.mjs';
import { findModels } from '../elastiformer/models.mjs';
import { reportOf } from './report.mjs';
import { measureSpeed } from './speed.mjs';

const MODEL_NAMES = ['tiny', 'stories'];
const { options, names, steps, cache } = readOptions('router-tuning', MODEL_NAMES, {
  more: '  --time          measure speed as well; the machine must do nothing else\n',
  flags: { time: { type: 'boolean', default: false } },
});
const kept = cellsIn(cache, options);
const say = (line) => process.stderr.write(`${line}\n`);

const SETTINGS = { version: 1, steps, length: 128, share: 0.5, limit: options.quick ? 512 : 16_000 };
/** What is skipped by what: the paper's six, with routers alone, then with corrections of all projections. */
const CELLS = [0, 4].flatMap((rank) =>
  ['sequence', 'token'].flatMap((granularity) =>
    ['attn', 'mlp', 'block'].map((target) => ({ target, granularity, rank, loss: 'kl' })),
  ),
);
/** The paper trains on the language model's own loss. */
CELLS.push({ target: 'attn', granularity: 'sequence', rank: 0, loss: 'cross-entropy' });
const PROJECTIONS = ['q', 'k', 'v', 'o', 'gate', 'up', 'down'];

async function train(model, { target, granularity, rank, loss }, name) {
  const [plan, out] = ['plan', 'trained'].map((kind) => join(cache, `${kind}-${name}`));
  for (const dir of [plan, out]) rmSync(dir, { recursive: true, force: true });
  const lora = rank > 0 ? { lora: { rank, targets: PROJECTIONS } } : {};
  const recipe = { kind: 'router-tuning', target, granularity, ...lora };
  const { trainableParameters, trainableShare } = await elastify(model.dir, recipe, { out: plan });
  const terms = [
    { kind: loss, weight: 1 },
    { kind: 'topk-bce', weight: 0.1 },
  ];
  await distill({
    plan,
    out,
    data: { kind: 'documents', documents: model.train },
    loss: terms,
    steps,
    batchTokens: 2048,
    sequenceLength: SETTINGS.length,
    calibrationTokens: options.quick ? 512 : 8192,
    seed: 1,
  });
  rmSync(plan, { recursive: true, force: true });
  return { dir: out, trainableParameters, trainableShare };
}

/** At half of what the routed layers could run, alike in each and as calibrated over them, beside both baselines. */
async function measure(loaded, model, { target, granularity, rank }) {
  const even = { spec: { [`${granularity}Capacity`]: { [target]: SETTINGS.share } } };
  const { flopsRatio } = loaded.resolve(even, { length: SETTINGS.length });
  const divided = Math.round(flopsRatio * 1e4) / 1e4;
  const { tokens, sequences, levels } = await evaluate(loaded, {
    data: model.heldOut,
    calibration: model.train.slice(0, 20),
    // Corrections of a small model may cost more than skipping saves: then there is nothing to divide.
    budgets: ['full', even, ...(divided < 1 ? [divided] : [])],
    baselines: rank > 0 ? [] : ['random', 'drop'],
    sequenceLength: SETTINGS.length,
    limit: SETTINGS.limit,
    speed: false,
  });
  const at = (budget) => (typeof budget === 'number' ? 'divided' : budget === 'full' ? 'full' : 'even');
  return {
    ...{ tokens, sequences },
    levels: levels.map(({ layersRun, budget, ...level }) => {
      // Who does not enter attention has no keys: sequences, and tokens with keys 'selected'.
      const keys = [...layersRun.attn].reduce((a, b) => a + b, 0) / layersRun.attn.length;
      return { ...level, at: at(budget), keys };
    }),
  };
}

/** What `use` makes of a model that is trained for it. */
async function trained(model, cell, use) {
  const name = `${model.name}-${cell.target}-${cell.granularity}-${cell.rank}-${cell.loss}`;
  const { dir, ...training } = await train(model, cell, name);
  const loaded = await loadModel(dir);
  try {
    return await use(loaded, training);
  } finally {
    await loaded.dispose();
    rmSync(dir, { recursive: true, force: true });
  }
}

async function cellOf(model, cell) {
  const key = { SETTINGS, model: model.name, cell };
  const quality = await kept(key, () =>
    trained(model, cell, async (loaded, training) => ({ ...cell, training, ...(await measure(loaded, model, cell)) })),
  );
  const timed = options.time && cell.rank === 0 && cell.loss === 'kl';
  const { quick } = options;
  const measured = () => trained(model, cell, (loaded) => measureSpeed(loaded, model, cell, { quick }));
  return quality && { ...quality, speed: timed ? await kept({ ...key, speed: true }, measured) : null };
}

const models = await findModels(names, cache, say);
const results = { settings: SETTINGS, machine: machineFacts(), models: [] };
let done = 0;
for (const model of models) {
  const entry = { name: model.name, title: model.title, cells: [] };
  for (const cell of CELLS) {
    const value = await cellOf(model, cell);
    if (!value) continue;
    entry.cells.push(value);
    say(
      `[${++done}/${models.length * CELLS.length}] ${model.name}: ${cell.target} by ${cell.granularity}, rank ${cell.rank}, ${cell.loss}`,
    );
  }
  results.models.push(entry);
}

const { markdown, claims } = reportOf({ ...results, wanted: CELLS.length });
if (options.quick) say('everything runs; a quick run writes no results');
else {
  const out = join(import.meta.dirname, '../../results');
  writeFileSync(join(out, 'claims-router-tuning.json'), `${JSON.stringify({ ...results, claims }, null, 1)}\n`);
  writeFileSync(join(out, 'claims-router-tuning.md'), markdown);
}
process.stdout.write(markdown);
