// Held-out texts through a classifier with exits: what each cost, where it left, whether it was right; and times.
import { loadModel } from '../../../dist/index.js';
import { fileLines } from '../../../dist/io/lines.js';

/** Texts and labels of a GLUE-style file, its bad rows left out as in training. */
export async function heldOutRows(file) {
  const rows = [];
  for await (const { number, text } of fileLines(file)) {
    const [sentence, label, more] = text.split('\t');
    if (number > 1 && more === undefined && sentence?.trim() && /^[01]$/.test(label?.trim() ?? ''))
      rows.push({ text: sentence, label: ['negative', 'positive'][Number(label)] });
  }
  return rows;
}

/** At every threshold: of each text whether it was right (1 or 0), its FLOPs, and the layer after which it was decided. */
export async function sweep(dir, rows, { thresholds, length }, say) {
  const model = await loadModel(dir, { maxContext: length });
  const texts = rows.map(({ text }) => text);
  const points = [];
  try {
    for (const threshold of thresholds) {
      const exit = threshold > 0 ? { exit: { rule: 'entropy', threshold } } : {};
      const results = await model.classify(texts, exit);
      points.push({
        threshold,
        right: results.map(({ label }, i) => (label === rows[i].label ? 1 : 0)),
        flops: results.map(({ compute }) => compute.flops),
        layers: results.map(({ compute }) => compute.exitLayer ?? model.info.layers - 1),
      });
    }
  } finally {
    await model.dispose();
  }
  say(`measured ${dir}`);
  return points;
}

const REPEATS = 7;

/** Milliseconds of all texts with exits and without, in turns, batch by batch: at 1 and 64. Their saving beside that of FLOPs. */
export async function timed(name, dir, rows, { length }) {
  const model = await loadModel(dir, { maxContext: length });
  const exit = { rule: 'entropy', threshold: 0.2 };
  try {
    const result = [];
    for (const [batch, count] of [
      [1, 256],
      [64, 2048],
    ]) {
      const texts = rows.slice(0, count).map(({ text }) => text);
      const run = async (options) => {
        const started = performance.now();
        let flops = 0;
        if (batch === 1) for (const text of texts) flops += (await model.classify([text], options))[0].compute.flops;
        else for (const { compute } of await model.classify(texts, { batch, ...options })) flops += compute.flops;
        return { ms: performance.now() - started, flops };
      };
      const times = { full: [], exits: [] };
      const flops = {};
      for (let i = 0; i <= REPEATS; i++) {
        for (const [name, options] of Object.entries({ full: {}, exits: { exit } })) {
          const one = await run(options);
          flops[name] = one.flops;
          // The first run compiles.
          if (i > 0) times[name].push(one.ms);
        }
      }
      result.push({ model: name, batch, texts: texts.length, threshold: exit.threshold, times, flops });
    }
    return result;
  } finally {
    await model.dispose();
  }
}
