// MatFormer's claims, measured again on a small MatLM: `npm run claims:matformer`.
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { machineFacts } from '../../harness/machine.mjs';
import { measureFamily } from './measure.mjs';
import { architecture, excerpts, FFN, GRANULARITIES, NAMES, TEXTS, trained, VOCAB } from './models.mjs';
import { reportOf } from './report.mjs';
import { resultsOf } from './results.mjs';

const HELP = `npm run claims:matformer -- [options]

  --text NAME        ${Object.keys(TEXTS).join(', ')} (default: corpus, what models/tiny was trained on;
                     the others are in the folder that ELASTIFORM_DATA names)
  --steps N          steps of 1024 tokens that every model trains (default: 400)
  --seeds N          models of each kind (default: 2)
  --strategies LIST  random, sandwich: train by these as well, with the first seed
  --quick            2 steps, few texts: checks that everything runs; writes no results
  --fresh            train and measure again what an earlier run finished
  --help

Models and measurements are kept in benchmarks/.cache as they finish; a run that was stopped goes on where it was.`;

const fail = (what) => {
  console.error(`claims: ${what}\n\n${HELP}`);
  process.exit(2);
};
const { values: options } = parseArgs({
  options: {
    text: { type: 'string', default: 'corpus' },
    steps: { type: 'string', default: '400' },
    seeds: { type: 'string', default: '2' },
    strategies: { type: 'string', default: '' },
    quick: { type: 'boolean', default: false },
    fresh: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
});
if (options.help) {
  console.log(HELP);
  process.exit(0);
}
const { text, quick } = options;
const steps = quick ? 2 : Number(options.steps);
const seeds = Number(options.seeds);
const strategies = options.strategies.split(',').filter((name) => name !== '');
const unknown = strategies.find((name) => !['random', 'sandwich'].includes(name));
if (unknown !== undefined) fail(`no strategy ${unknown}`);
if (!Object.hasOwn(TEXTS, text)) fail(`no text ${text}`);
if (!(Number.isInteger(steps) && steps > 0)) fail('--steps must be a positive integer');
if (!(Number.isInteger(seeds) && seeds > 0)) fail('--seeds must be a positive integer');

const cache = join(import.meta.dirname, '../../.cache/claims-matformer');
if (options.fresh) rmSync(cache, { recursive: true, force: true });
mkdirSync(cache, { recursive: true });
const say = (line) => process.stderr.write(`${line}\n`);

const texts = TEXTS[text](cache);
if (quick) texts.train = texts.train.slice(0, 5);
const measuring = {
  ...{ version: 2, sequenceLength: 128, sequences: quick ? 4 : 100, prompts: quick ? 2 : 40 },
  ...{ promptLength: 16, generated: quick ? 10 : 64, draftTokens: 4 },
};
const training = {
  cache: quick ? join(cache, 'quick') : cache,
  text,
  texts,
  steps,
  batchTokens: 1024,
  sequenceLength: measuring.sequenceLength,
  say,
};
// Of about six characters for each token wanted, so that every stretch is long enough.
const characters = 6 * measuring.sequenceLength;
const stretches = excerpts(texts.heldOut, measuring.sequences, characters);
const prompts = excerpts(texts.heldOut, measuring.prompts, characters);

const FAMILIES = {
  joint: { models: ['joint'], ladder: true },
  alone: { models: NAMES },
  ...Object.fromEntries(strategies.map((name) => [name, { models: [name] }])),
};

/** Trains and measures a family of one seed, or reads what was measured. */
async function family(name, seed) {
  const { models, ladder = false } = FAMILIES[name];
  const key = createHash('sha256')
    .update(JSON.stringify([measuring, text, steps, name, seed]))
    .digest('hex');
  const file = join(training.cache, `measured-${key.slice(0, 24)}.json`);
  if (existsSync(file) && !quick) return JSON.parse(readFileSync(file, 'utf8'));
  const dirs = [];
  for (const model of models) dirs.push(await trained(model, seed, training));
  say(`${name}, seed ${seed}: measuring`);
  const options = { heldOut: stretches, prompts, granularities: GRANULARITIES, ladder, settings: measuring };
  const measured = await measureFamily(dirs, options);
  writeFileSync(file, JSON.stringify(measured));
  return measured;
}

const families = [];
for (let seed = 1; seed <= seeds; seed++) {
  const one = {};
  for (const name of Object.keys(FAMILIES)) {
    if (seed === 1 || ['joint', 'alone'].includes(name)) one[name] = await family(name, seed);
  }
  families.push(one);
}

const { hidden_size: hidden, num_hidden_layers: layers } = architecture;
const settings = {
  ...measuring,
  ...{ steps, batchTokens: training.batchTokens, seeds, granularities: GRANULARITIES },
  ...{ text, vocab: VOCAB, hidden, layers, ffn: FFN },
};
const results = resultsOf(families);
const facts = { machine: machineFacts(), sequences: stretches.length, prompts: prompts.length };
const { markdown, claims } = reportOf({ settings, results, ...facts });
if (quick) say('everything runs; a quick run writes no results');
else {
  const out = join(import.meta.dirname, '../../results');
  writeFileSync(
    join(out, 'claims-matformer.json'),
    `${JSON.stringify({ settings, ...facts, results, claims }, null, 1)}\n`,
  );
  writeFileSync(join(out, 'claims-matformer.md'), markdown);
}
process.stdout.write(markdown);
