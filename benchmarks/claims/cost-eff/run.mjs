// COST-EFF's claims, measured again on SST-2 with a small BERT trained here: `npm run claims:cost-eff`.
import { cpSync, existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { costEff, finetune } from '../../../dist/index.js';
import { machineFacts } from '../../harness/machine.mjs';
import { cellsIn, readOptions } from '../cells.mjs';
import { heldOutRows, sweep, timed } from './measure.mjs';
import { reportOf } from './report.mjs';

const flags = { time: { type: 'boolean', default: false }, epochs: { type: 'string', default: '1' } };
const { options, cache } = readOptions('cost-eff', ['small-bert'], {
  more:
    '  --epochs X      factor of the epochs of every stage (default: 1)\n' +
    '  --time          measure wall-clock as well; the machine must do nothing else\n' +
    '                  (--models and --steps are for other claims)\n',
  flags,
});
const kept = cellsIn(cache, options);
const say = (line) => process.stderr.write(`${line}\n`);
const folder = process.env.ELASTIFORM_DATA;
if (!folder || !existsSync(join(folder, 'sst2'))) {
  console.error('claims: ELASTIFORM_DATA must name the folder that has sst2 and tokenizers/bert-base-uncased');
  process.exit(2);
}

const factor = options.quick ? 0.02 : Number(options.epochs);
const SETTINGS = {
  version: 1,
  model: {
    ...{ model_type: 'bert', hidden_size: 128, intermediate_size: 512, num_hidden_layers: 6 },
    ...{ num_attention_heads: 4, max_position_embeddings: 128 },
  },
  finetune: { epochs: 3 * factor, lr: 1e-3 },
  stages: {
    assistant: { epochs: 2 * factor, lr: 5e-4 },
    slim: { epochs: 2 * factor, lr: 5e-4, rankShare: options.quick ? 0.02 : 0.5 },
    hidden: { epochs: 1 * factor, lr: 1e-3 },
    prediction: { epochs: 2 * factor, lr: 5e-4 },
  },
  length: 64,
  thresholds: [0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65],
  /** Rows of train.tsv that the pipeline trains on, after the classifier was trained on all. */
  rows: 16_000,
  /** Rows of dev.tsv by which weights are chosen; the others are measured. */
  chosen: 1000,
  limit: options.quick ? 64 : 10_000,
};
/** Slim models: half and a quarter of the heads, a quarter and an eighth of the units, one head and next to no units; one ranked by the classifier alone. */
const SLIM = [
  { name: 'half', target: { heads: 2, ffn: 128, rank: 32 }, calibration: 'exits' },
  { name: 'quarter', target: { heads: 1, ffn: 64, rank: 16 }, calibration: 'exits' },
  { name: 'least', target: { heads: 1, ffn: 8, rank: 16 }, calibration: 'exits' },
  { name: 'half-classifier', target: { heads: 2, ffn: 128, rank: 32 }, calibration: 'classifier' },
];

const file = (name) => join(folder, 'sst2', name);
const data = { kind: 'tsv', files: file('train.tsv') };
const evalData = { kind: 'tsv', files: file('dev.tsv') };
const common = { badRows: 'skip', sequenceLength: SETTINGS.length, batchTokens: 4096, seed: 1 };
const controller = new AbortController();
process.once('SIGINT', () => controller.abort());

function progress(label) {
  let shown = 0;
  return (event) => {
    if (event.type === 'stage') say(`${label}: stage ${event.index} of ${event.of}, ${event.name}`);
    if (event.type !== 'step' || performance.now() - shown < 15_000) return;
    shown = performance.now();
    say(
      `${label}: ${event.step}/${event.of}, loss ${event.loss.toFixed(4)}, ${Math.round(event.tokensPerSecond)} tokens/s`,
    );
  };
}

const quickly = options.quick ? '-quick' : '';
const dir = (name) => join(cache, `${name}${quickly}`);
const checked = (result) => {
  if (result.stopped !== 'signal') return result;
  say('interrupted and saved; run it again to continue');
  process.exit(130);
};

async function trainBase() {
  const { epochs, lr } = SETTINGS.finetune;
  const hooks = { onEvent: progress('classifier'), signal: controller.signal };
  const { best } = checked(
    await finetune({
      ...{ model: SETTINGS.model, tokenizer: join(folder, 'tokenizers/bert-base-uncased') },
      ...{
        out: dir('base'),
        labels: ['negative', 'positive'],
        epochs,
        optimizer: { lr },
        data,
        evalData,
        ...common,
        ...hooks,
      },
    }),
  );
  return { accuracy: best.metric };
}

async function trainSlim({ name, target, calibration }) {
  // The assistant is the same for all.
  const [own, first] = [dir(name), dir(SLIM[0].name)];
  const stage = 'stages/01-assistant';
  if (own !== first && existsSync(join(first, stage, 'done.json')))
    cpSync(join(first, stage), join(own, stage), { recursive: true });
  const hooks = { onEvent: progress(name), signal: controller.signal };
  const result = await costEff({
    from: dir('base'),
    out: own,
    target,
    calibration,
    ...SETTINGS.stages,
    ...some,
    ...common,
    ...hooks,
  });
  const { full, assistant, slim } = checked(result);
  return { full, assistant, slim };
}

const dev = await heldOutRows(file('dev.tsv'));
const rows = dev.slice(SETTINGS.chosen, SETTINGS.chosen + SETTINGS.limit);
const some = {
  data: { kind: 'examples', examples: (await heldOutRows(file('train.tsv'))).slice(0, SETTINGS.rows) },
  evalData: { kind: 'examples', examples: dev.slice(0, SETTINGS.chosen) },
};
const measured = { settings: SETTINGS, machine: machineFacts(), rows: rows.length, models: [], time: null };
measured.base = await kept({ SETTINGS, what: 'base' }, trainBase);
if (measured.base) {
  say(`classifier: accuracy ${measured.base.accuracy.toFixed(4)}`);
  const plain = { ...SETTINGS, thresholds: [0] };
  measured.full = await kept({ SETTINGS, what: 'sweep base' }, () => sweep(dir('base'), rows, plain, say));
  for (const model of SLIM) {
    const training = await kept({ SETTINGS, what: 'train', model }, () => trainSlim(model));
    if (!training) continue;
    const points = await kept({ SETTINGS, what: 'sweep', model }, () =>
      sweep(join(dir(model.name), 'model'), rows, SETTINGS, say),
    );
    measured.models.push({ ...model, training, points });
  }
  const first = dir(SLIM[0].name);
  const exits = await kept({ SETTINGS, what: 'sweep assistant' }, () =>
    sweep(join(first, 'assistant'), rows, SETTINGS, say),
  );
  if (exits) measured.assistant = { points: exits };
  if (options.time)
    measured.time = await kept({ SETTINGS, what: 'times' }, async () => [
      ...(await timed('slim (half)', join(first, 'model'), rows, SETTINGS)),
      ...(await timed('of full width', join(first, 'assistant'), rows, SETTINGS)),
    ]);
}

const { markdown, claims, summary } = reportOf(measured);
if (options.quick) say('everything runs; a quick run writes no results');
else {
  const out = join(import.meta.dirname, '../../results');
  writeFileSync(join(out, 'claims-cost-eff.json'), `${JSON.stringify({ ...summary, claims }, null, 1)}\n`);
  writeFileSync(join(out, 'claims-cost-eff.md'), markdown);
}
process.stdout.write(markdown);
