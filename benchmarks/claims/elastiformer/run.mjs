// ElastiFormer's claims, measured again on small models: `npm run claims:elastiformer`.
import { rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { distill, elastify, evaluate, loadModel } from '../../../dist/index.js';
import { machineFacts } from '../../harness/machine.mjs';
import { cellsIn, readOptions } from '../cells.mjs';
import { findModels, MODEL_NAMES } from './models.mjs';
import { reportOf } from './report.mjs';

const { options, names, steps, cache } = readOptions('elastiformer', MODEL_NAMES);
const cell = cellsIn(cache, options);
const say = (line) => process.stderr.write(`${line}\n`);

const ALL = ['q', 'k', 'v', 'o', 'gate', 'up', 'down'];
const RANGE = [0.3, 1];
/** What is routed in a cell; `component`: the sub-layers whose compute it saves. */
const PLACES = {
  'tokens into attention': { recipe: { tokens: { attn: RANGE } }, component: ['attn'] },
  'tokens into the FFN': { recipe: { tokens: { mlp: RANGE } }, component: ['mlp'] },
  heads: { recipe: { heads: { share: RANGE, group: 'head' } }, component: ['attn'] },
  'FFN blocks': { recipe: { blocks: { count: 4, share: RANGE } }, component: ['mlp'] },
  'FFN blocks, tiles of 32': { recipe: { blocks: { count: 4, share: RANGE, tile: 32 } }, component: ['mlp'] },
  'all four': {
    recipe: {
      tokens: { attn: RANGE, mlp: RANGE },
      heads: { share: RANGE, group: 'head' },
      blocks: { count: 4, share: RANGE },
    },
    component: ['attn', 'mlp'],
  },
};
/** Shares of the component's compute that are saved. */
const SAVED = [0.1, 0.2, 0.35, 0.5];

async function withModel(dir, use) {
  const model = await loadModel(dir);
  try {
    return await use(model);
  } finally {
    await model.dispose();
  }
}

/** FLOPs of a component over those of the model, with the logits of every token, at this length. */
function componentShare({ info, network }, component, length) {
  const { layers, hidden, ffn, heads, kvHeads, vocab } = info;
  const { headDim, gated } = network.spec;
  const attn = 2 * hidden * headDim * (2 * heads + 2 * kvHeads) + 2 * headDim * heads * (length + 1);
  const mlp = 2 * hidden * ffn * (gated ? 3 : 2);
  const saved = (component.includes('attn') ? attn : 0) + (component.includes('mlp') ? mlp : 0);
  return (layers * saved) / (layers * (attn + mlp) + 2 * hidden * vocab);
}

async function train(model, recipe, texts, name) {
  const [plan, out] = ['plan', 'trained'].map((kind) => join(cache, `${kind}-${name}`));
  for (const dir of [plan, out]) rmSync(dir, { recursive: true, force: true });
  const { trainableParameters, trainableShare } = await elastify(
    model.dir,
    { kind: 'elastiformer', ...recipe },
    { out: plan },
  );
  const losses = [];
  await distill({
    plan,
    out,
    data: { kind: 'documents', documents: texts },
    steps,
    batchTokens: 2048,
    sequenceLength: 256,
    calibrationTokens: options.quick ? 512 : 4096,
    seed: 1,
    onEvent: (event) => {
      if (event.type === 'step') losses.push(event.terms.kl ?? event.loss);
    },
  });
  rmSync(plan, { recursive: true, force: true });
  return { dir: out, trainableParameters, trainableShare, losses };
}

const SETTINGS = { version: 2, steps, length: 256, limit: options.quick ? 512 : 8_000 };

/** Quality at budgets; those that the model does not reach are left out. */
async function measure(loaded, model, budgets, baselines) {
  const reached = budgets.filter((budget) => {
    try {
      return loaded.resolve(budget, { length: SETTINGS.length });
    } catch {
      return false;
    }
  });
  const { tokens, sequences, levels } = await evaluate(loaded, {
    data: model.heldOut,
    calibration: model.train.slice(0, 20),
    budgets: ['full', ...reached],
    baselines,
    sequenceLength: SETTINGS.length,
    limit: SETTINGS.limit,
    speed: false,
  });
  return { tokens, sequences, levels: levels.map(({ layersRun: _, ...level }) => level) };
}

async function placeCell(model, place, rank) {
  const { recipe, component } = PLACES[place];
  return cell({ SETTINGS, model: model.name, place, rank, recipe }, async () => {
    const name = `${model.name}-${place.replaceAll(' ', '-')}-${rank}`;
    const lora = rank > 0 ? { lora: { rank, targets: ALL } } : {};
    const trained = await train(model, { ...recipe, ...lora }, model.train, name);
    const { dir, losses, ...training } = trained;
    const { share, wanted, measured } = await withModel(dir, async (loaded) => {
      const share = componentShare(loaded, component, SETTINGS.length);
      const wanted = SAVED.map((saved) => ({ saved, budget: Math.round((1 - saved * share) * 1e4) / 1e4 }));
      const budgets = wanted.map(({ budget }) => budget);
      return { share, wanted, measured: await measure(loaded, model, budgets, rank > 0 ? [] : ['random', 'drop']) };
    });
    rmSync(dir, { recursive: true, force: true });
    return { share, wanted, training: { ...training, firstKl: losses[0], lastKl: losses.at(-1) }, ...measured };
  });
}

/** Routers of tokens trained on the model's own texts, and on another domain; both on held-out texts of its own. */
async function domainCell(model, domain) {
  return cell({ SETTINGS, model: model.name, domain }, async () => {
    const texts = domain === 'own' ? model.train : model.other;
    const trained = await train(model, { tokens: { attn: RANGE, mlp: RANGE } }, texts, `${model.name}-${domain}`);
    const measured = await withModel(trained.dir, (loaded) =>
      measure(loaded, model, [0.9, 0.8, 0.7], domain === 'own' ? ['random'] : []),
    );
    rmSync(trained.dir, { recursive: true, force: true });
    return measured;
  });
}

const models = await findModels(names, cache, say);
const results = { settings: SETTINGS, machine: machineFacts(), models: [] };
const total = models.length * (Object.keys(PLACES).length * 2 + 2);
let done = 0;
const progress = (what) => say(`[${++done}/${total}] ${what}`);
for (const model of models) {
  const entry = { name: model.name, title: model.title, places: {}, domains: {} };
  for (const place of Object.keys(PLACES)) {
    entry.places[place] = {};
    for (const rank of [0, 1]) {
      const cell = await placeCell(model, place, rank);
      if (!cell) continue;
      entry.places[place][rank] = cell;
      progress(`${model.name}: ${place}${rank ? `, LoRA of rank ${rank}` : ''}`);
    }
  }
  for (const domain of model.other ? ['own', 'other'] : ['own']) {
    const cell = await domainCell(model, domain);
    if (!cell) continue;
    entry.domains[domain] = cell;
    progress(`${model.name}: routers trained on ${domain === 'own' ? 'its own' : 'other'} texts`);
  }
  results.models.push(entry);
}

const { markdown, claims } = reportOf(results);
if (options.quick) say('everything runs; a quick run writes no results');
else {
  const out = join(import.meta.dirname, '../../results');
  writeFileSync(join(out, 'claims-elastiformer.json'), `${JSON.stringify({ ...results, claims }, null, 1)}\n`);
  writeFileSync(join(out, 'claims-elastiformer.md'), markdown);
}
process.stdout.write(markdown);
