// Claims of modules, measured on letters to phonemes with a model trained here: `npm run claims:modular`.
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { ladder, spansOf } from '../../../dist/elastic/modules.js';
import { finetune, getRuntime, modular } from '../../../dist/index.js';
import { machineFacts } from '../../harness/machine.mjs';
import { cellsIn, readOptions } from '../cells.mjs';
import { evenSpans, modulesOf, speedUps, trainDropped, wordQuality, writeRandom, writeStock } from './measure.mjs';
import { reportOf } from './report.mjs';
import { readWords, writeTokenizer } from './words.mjs';

const flags = { long: { type: 'boolean', default: false } };
const { options, cache } = readOptions('modular', ['g2p'], {
  more:
    '  --long          also train layer dropping as long as modules for one size alone, for two sizes\n' +
    '                  (--models and --steps are for other claims)\n',
  flags,
});
const kept = cellsIn(cache, options);
const say = (line) => process.stderr.write(`${line}\n`);
const { quick } = options;

const layers = 6;
const shape = {
  ...{ model_type: 'mbart', encoder_layers: layers, decoder_layers: layers, max_position_embeddings: 32 },
  ...{ scale_embedding: true, activation_function: 'relu', bos_token_id: 0, pad_token_id: 1 },
};
const SETTINGS = {
  version: 1,
  words: { seed: 1, chosen: 1000, measured: quick ? 20 : 2000 },
  model: {
    ...shape,
    ...{ d_model: 96, encoder_ffn_dim: 384, decoder_ffn_dim: 384 },
    ...{ encoder_attention_heads: 4, decoder_attention_heads: 4 },
  },
  granularities: [2, 3, 6],
  base: { steps: quick ? 2 : 4000, lr: 3e-3 },
  /** Steps of modules, and of all sizes of layer dropping together. */
  modular: { steps: quick ? 5 : 2400, lr: 3e-3 },
  losses: { task: 1, logits: 1, hidden: 0.5, attention: 0.2 },
  /** Of the layers that stay beside modules, in a run of modules of its own. */
  lora: { rank: 16 },
  batchTokens: 2048,
  /** Sizes that dropped layers are trained with all of the steps for, with --long: encoder and decoder. */
  long: [
    [6, 3],
    [6, 1],
  ],
  timed: { words: quick ? 2 : 40, rounds: quick ? 1 : 9 },
  /** A shape at which time goes into layers: that of BART-base but for the vocabulary. */
  bound: {
    model: {
      ...shape,
      ...{ d_model: quick ? 64 : 768, encoder_ffn_dim: quick ? 64 : 3072, decoder_ffn_dim: quick ? 64 : 3072 },
      ...{ encoder_attention_heads: quick ? 2 : 12, decoder_attention_heads: quick ? 2 : 12 },
    },
    source: 16,
    tokens: quick ? 4 : 30,
    rounds: quick ? 1 : 7,
  },
};

const words = readWords(SETTINGS.words);
const pairs = (examples) => ({ kind: 'examples', examples });
const controller = new AbortController();
process.once('SIGINT', () => controller.abort());
const folder = join(cache, quick ? 'quick' : 'runs');
if (options.fresh || quick) rmSync(folder, { recursive: true, force: true });
mkdirSync(folder, { recursive: true });
const dir = (name) => join(folder, name);
const tokenizer = writeTokenizer(dir('tokenizer'), words.train);

/** What all training has in common. */
function settings(label, { steps, lr }) {
  let shown = 0;
  const onEvent = (event) => {
    if (event.type !== 'step' || performance.now() - shown < 15_000) return;
    shown = performance.now();
    say(
      `${label}: ${event.step}/${event.of}, loss ${event.loss.toFixed(4)}, ${Math.round(event.tokensPerSecond)} tokens/s`,
    );
  };
  return {
    ...{ steps, optimizer: { lr }, batchTokens: SETTINGS.batchTokens, sequenceLength: 24, seed: 1, device: 'cpu' },
    ...{ data: pairs(words.train), evalData: pairs(words.chosen), evalEvery: Math.max(Math.ceil(steps / 4), 1) },
    ...{ saveEvery: 500, onEvent, signal: controller.signal },
  };
}
const checked = (result) => {
  if (result.stopped !== 'signal') return result;
  say('interrupted and saved; run it again to continue');
  process.exit(130);
};

const all = spansOf(layers, SETTINGS.granularities);
/** The decoder becomes smaller first, which runs for every token, then the encoder; both by the finest modules. */
const rungs = ladder(layers, all);
const path = [
  ...rungs.map((decoder) => ({ encoder: rungs[0], decoder })),
  ...rungs.slice(1).map((encoder) => ({ encoder, decoder: rungs.at(-1) })),
];
const nameOf = ({ encoder, decoder }) => `${encoder.length}+${decoder.length}`;
const numbers = Array.from({ length: layers }, (_, i) => `${i}`);
/** Layers that are kept of a stack, evenly, as parts of a checkpoint. */
const keptOf = (count) => (count === layers ? numbers : evenSpans(layers, count).map(({ last }) => `${last}`));
const spansFor = (count) => (count === layers ? [] : evenSpans(layers, count));

const seconds = async (run) => {
  const started = performance.now();
  const value = await run();
  return { value, seconds: (performance.now() - started) / 1000 };
};

const { model, base, modular: training, losses, granularities } = SETTINGS;
const measured = {
  settings: SETTINGS,
  machine: { ...machineFacts(), threads: getRuntime().threads },
  points: [],
  dropped: [],
  long: [],
};
const trainKey = { version: SETTINGS.version, words: SETTINGS.words, model, base, batchTokens: SETTINGS.batchTokens };
measured.base = await kept({ what: 'base', ...trainKey }, async () => {
  const start = { model, tokenizer, out: dir('base') };
  const { value, seconds: took } = await seconds(() => finetune({ ...settings('base', base), ...start }));
  return { ...checked(value).best, examples: value.examples, seconds: took };
});
/** Modules, and beside them corrections of layers or none. */
const trainModules = (name, key, more) =>
  kept({ what: name, ...key }, async () => {
    const start = { from: dir('base'), out: dir(name), granularities, losses, ...more };
    const { value, seconds: took } = await seconds(() => modular({ ...settings(name, training), ...start }));
    return { best: checked(value).best, seconds: took };
  });
const modularKey = { ...trainKey, training, losses, granularities };
const correctedKey = { ...modularKey, lora: SETTINGS.lora };
measured.modular = await trainModules('modular', modularKey, {});
measured.corrected = await trainModules('corrected', correctedKey, { lora: SETTINGS.lora });

const quality = (what, directory) =>
  kept({ what: `quality ${what}`, ...modularKey }, async () => wordQuality(await directory(), words.heldOut));
if (measured.modular) {
  const modules = modulesOf(dir('modular'));
  for (const assembly of path) {
    const name = nameOf(assembly);
    const own = await quality(`modules ${name}`, () =>
      writeStock(dir('base'), dir(`modules-${name}`), assembly, modules),
    );
    const plain = { encoder: keptOf(assembly.encoder.length), decoder: keptOf(assembly.decoder.length) };
    const dropped = await quality(`dropped ${name}`, () => writeStock(dir('base'), dir(`plain-${name}`), plain));
    const budget = assembly === path[0] ? 'full' : { spec: { assembly } };
    const corrected =
      measured.corrected &&
      (await kept({ what: `quality corrected ${name}`, ...correctedKey }, () =>
        wordQuality(dir('corrected'), words.heldOut, budget),
      ));
    measured.points.push({ assembly, words: own, corrected, dropped });
    if (own) say(`${name}: ${((100 * own.filter(({ right }) => right).length) / own.length).toFixed(1)} % right`);
  }
}

/** Trains layers that are kept, and writes words with them. */
const trained = (kind, steps, [encoder, decoder]) => {
  const name = `${encoder}+${decoder}`;
  return kept({ what: `${kind} ${name}`, steps, ...modularKey }, async () => {
    const spans = { encoder: spansFor(encoder), decoder: spansFor(decoder) };
    const out = dir(`${kind}-${name}`);
    const run = { from: dir('base'), out, spans, losses, ...settings(`${kind} ${name}`, { ...training, steps }) };
    const { value, seconds: took } = await seconds(() => trainDropped(run));
    const { assembly, weights } = checked(value);
    const stock = await writeStock(dir('base'), `${out}-stock`, assembly, weights);
    return { words: await wordQuality(stock, words.heldOut), seconds: took };
  });
};
if (measured.base) {
  // The sizes of the table from 1.5x on, which share the steps that modules had.
  const dropped = path.filter(({ decoder }) => layers / decoder.length >= 1.5);
  const share = Math.ceil(training.steps / dropped.length);
  for (const { encoder, decoder } of dropped) {
    const size = [encoder.length, decoder.length];
    const own = await trained('dropped-trained', share, size);
    if (own) measured.dropped.push({ size, ...own });
  }
  for (const size of options.long ? SETTINGS.long : []) {
    const own = await trained('dropped-long', training.steps, size);
    if (own) measured.long.push({ size, ...own });
  }
}

if (measured.points.length > 0 && measured.points[0].words) {
  const { words: count, rounds } = SETTINGS.timed;
  const sources = words.heldOut.slice(0, count).map(({ text }) => text);
  measured.time = await kept({ what: 'times', ...modularKey, timed: SETTINGS.timed }, () =>
    speedUps(
      path.map((assembly) => dir(`modules-${nameOf(assembly)}`)),
      sources,
      { rounds, maxTokens: 30 },
    ),
  );
}
const { bound } = SETTINGS;
measured.bound = await kept({ what: 'bound', bound }, async () => {
  const full = await writeRandom(dir('bound-6'), bound.model, tokenizer);
  const counts = [5, 4, 3, 2, 1];
  const dirs = [full];
  for (const count of counts)
    dirs.push(await writeStock(full, dir(`bound-${count}`), { encoder: numbers, decoder: keptOf(count) }));
  const source = Array.from({ length: bound.source }, (_, i) => 4 + (i % 20));
  const times = await speedUps(dirs, [source], { rounds: bound.rounds, maxTokens: bound.tokens });
  for (const directory of dirs) rmSync(directory, { recursive: true });
  const points = [layers, ...counts].map((count, i) => ({ layers: count, ...times.measured[i] }));
  return { points, others: times.others };
});

const { markdown, claims, summary } = reportOf(measured);
if (quick) say('everything runs; a quick run writes no results');
else {
  const out = join(import.meta.dirname, '../../results');
  writeFileSync(join(out, 'claims-modular.json'), `${JSON.stringify({ ...summary, claims }, null, 1)}\n`);
  writeFileSync(join(out, 'claims-modular.md'), markdown);
}
process.stdout.write(markdown);
