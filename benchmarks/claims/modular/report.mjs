// From measured points to a table of claims: what was asked for, what was measured, and whether it held.
import { assemblyText } from '../../../dist/elastic/modules.js';
import { bootstrap } from '../../../dist/infer/quality/statistics.js';

const percent = (x, digits = 1) => `${(x * 100).toFixed(digits)} %`;
const interval = ({ value, low, high }, show = percent) => `${show(value)} [${show(low)}, ${show(high)}]`;
const times = (x) => `${x.toFixed(2)}x`;
const points = (x) => `${x >= 0 ? '+' : ''}${(x * 100).toFixed(1)}`;
const sizeOf = ({ encoder, decoder }) => `${encoder.length}+${decoder.length}`;

const exact = (words) => bootstrap(words, (total) => total.right / total.words, 1);
const errorRate = (words) => bootstrap(words, (total) => total.errors / total.phonemes, 1);
const withCount = (words) => words.map((word) => ({ words: 1, ...word }));
/** Words right of a less words right of b, of the same words. */
const difference = (a, b) =>
  bootstrap(
    a.map(({ right }, i) => ({ words: 1, more: right - b[i].right })),
    (total) => total.more / total.words,
    1,
  );
const sign = ({ low, high }) => (low > 0 ? 'yes' : high < 0 ? 'no' : 'within noise');

/**
 * @param measured what was measured: what was not is absent, and so are the claims about it
 * @returns {{ markdown: string, claims: object[], summary: object }}
 */
export function reportOf({
  settings,
  machine,
  base,
  modular,
  corrected,
  points: path,
  dropped,
  long,
  time: words,
  bound: turns,
}) {
  // The full model in turns with itself takes the same time, unless other work disturbs both.
  const calm = (measured) => measured && [measured[0].all, measured[0].token].every((x) => Math.abs(x - 1) <= 0.05);
  const [time, bound] = [calm(words?.measured) ? words : null, calm(turns?.points) ? turns : null];
  const disturbed = [
    ...(words && !time ? [['words', words]] : []),
    ...(turns && !bound ? [["layers of BART-base's shape", turns]] : []),
  ].map(([what, { others }]) => `${what} (other processes took ${percent(others, 0)} of the processors)`);
  const layers = settings.model.decoder_layers;
  const rows = path
    .filter(({ words }) => words)
    .map(({ assembly, words, corrected: fitted, dropped: plain }, i) => {
      const of = (list) => list.find(({ size }) => size.join('+') === sizeOf(assembly))?.words;
      const trained = { share: of(dropped), long: of(long) };
      return {
        ...{ assembly, layers: sizeOf(assembly), ratio: layers / assembly.decoder.length },
        ...(time && { speedUp: time.measured[i].all, speedUpToken: time.measured[i].token, ms: time.measured[i].ms }),
        ...{ exact: exact(withCount(words)), errorRate: errorRate(words) },
        plain: { exact: exact(withCount(plain)), more: difference(words, plain) },
        ...(fitted && {
          corrected: { exact: exact(withCount(fitted)), more: difference(fitted, words) },
          ...(trained.share && { correctedTrained: { more: difference(fitted, trained.share) } }),
          ...(trained.long && { correctedLong: { more: difference(fitted, trained.long) } }),
        }),
        ...(trained.share && {
          trained: { exact: exact(withCount(trained.share)), more: difference(words, trained.share) },
        }),
        ...(trained.long && { long: { exact: exact(withCount(trained.long)), more: difference(words, trained.long) } }),
      };
    });
  const claims = rows.length > 0 ? claimsOf(rows, bound?.points, settings) : [];
  const minutes = (seconds) => (seconds / 60).toFixed(1);
  const sum = (list) => list.reduce((total, entry) => total + entry.seconds, 0);
  const share = dropped.length > 0 ? Math.ceil(settings.modular.steps / dropped.length) : 0;
  const cell = (x, show) => (x === undefined ? '' : show(x));
  const { model } = settings;
  const markdown = [
    '# Modules of an encoder-decoder model, measured',
    '',
    'Letters to phonemes (CMU Pronouncing Dictionary, stress left out): a word in letters is the source, its phonemes the target. Words are divided',
    `by a hash; ${settings.words.measured} held-out words are measured, ${settings.words.chosen} others choose weights. A word is right where it is written, greedily, as any of its`,
    'pronunciations; phoneme errors are edits towards the nearest one, over its length. Intervals are 95 % bootstraps over words, differences are paired.',
    '',
    `The model: mBART's architecture, ${model.encoder_layers}+${layers} layers of ${model.d_model} features, trained here from scratch (\`finetune\`, ${settings.base.steps} steps of ${settings.batchTokens} tokens). Modules of`,
    `granularities ${settings.granularities.join(', ')} for both stacks: one \`modular\` run of ${settings.modular.steps} steps, and another one with corrections of rank ${settings.lora.rank} of the layers that stay. Layer dropping keeps as many layers, evenly: as they are, and trained with`,
    'the same losses from the same teacher, the layers that are kept learning together, everything else frozen. Trained means as many',
    `steps in all: ${share} for each of the ${dropped.length} sizes from 1.5x on, ${settings.modular.steps} together, while modules serve all sizes from one run.`,
    ...(long.length > 0
      ? [
          `Some sizes were also trained alone with all ${settings.modular.steps} steps, each as long as all modules together.`,
        ]
      : []),
    '',
    `Machine: ${machine.cpu}, ${machine.availableParallelism} cores, ${machine.threads} of them used. One command: \`npm run claims:modular\`.`,
    ...(disturbed.length > 0
      ? [
          `**Not measured here**: times of ${disturbed.join(' and of ')}; even the full model in turns with itself differed by more than 5 %.`,
        ]
      : []),
    ...(base && modular
      ? [
          `Training took ${minutes(base.seconds)} minutes for the model, ${minutes(modular.seconds)} for modules${corrected ? `, ${minutes(corrected.seconds)} with corrections` : ''}${dropped.length > 0 ? `, ${minutes(sum(dropped))} for dropped layers` : ''}.`,
        ]
      : ['', 'Nothing is measured yet.']),
    '',
    '| claim | asked for | measured | held |',
    '| --- | --- | --- | --- |',
    ...claims.map((c) => `| ${c.claim} | ${c.asked} | ${c.measured} | ${c.held} |`),
    '',
    '## Quality and speed',
    '',
    'Layer ratio: layers of the decoder over parts of it. Speed-up: time of `generate`, one word at a time, in turns with the full model, the fastest of',
    `${settings.timed.rounds} turns of each, of this small model, where a step costs as much outside of layers as in them.`,
    '',
    '| encoder+decoder | layer ratio | speed-up | words right | phoneme errors | with corrections | dropped | dropped, trained | modules better, points | with corrections better |',
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ...rows.map((r) =>
      [
        ...['', r.layers, times(r.ratio), cell(r.speedUp, times), interval(r.exact), interval(r.errorRate)],
        cell(r.corrected?.exact, (x) => interval(x)),
        percent(r.plain.exact.value),
        cell(r.trained?.exact, (x) => interval(x)),
        cell(r.trained?.more, (x) => interval(x, points)),
        cell(r.correctedTrained?.more, (x) => interval(x, points)),
        '',
      ]
        .join(' | ')
        .trim(),
    ),
    '',
    ...rows.map(({ assembly, layers }) => `* ${layers}: \`${assemblyText(assembly)}\``),
    ...(rows.some(({ long }) => long)
      ? [
          '',
          `## Dropped layers of one size alone, ${settings.modular.steps} steps`,
          '',
          '| encoder+decoder | words right | modules better, points | with corrections better |',
          '| --- | --- | --- | --- |',
          ...rows
            .filter(({ long }) => long)
            .map(
              ({ layers, long, correctedLong }) =>
                `| ${layers} | ${interval(long.exact)} | ${interval(long.more, points)} | ${cell(correctedLong?.more, (x) => interval(x, points))} |`,
            ),
        ]
      : []),
    ...(bound
      ? [
          '',
          '## Where layers cost the time',
          '',
          `A model of BART-base's shape but for the vocabulary (${settings.bound.model.d_model} features, random weights): ${settings.bound.tokens} tokens for a source of ${settings.bound.source}, one at a time, in turns with the full model, the fastest of ${settings.bound.rounds} turns of each.`,
          'A token reads all weights of the decoder once: those of fewer layers may stay in caches, which makes more of the ratio than there are layers.',
          '',
          '| parts of the decoder | layer ratio | speed-up of a token | share of the ratio | of a whole text |',
          '| --- | --- | --- | --- | --- |',
          ...bound.points.map((b) => {
            const ratio = layers / b.layers;
            return `| ${b.layers} | ${times(ratio)} | ${times(b.token)} | ${percent(b.token / ratio, 0)} | ${times(b.all)} |`;
          }),
        ]
      : []),
    '',
  ].join('\n');
  return {
    markdown,
    claims,
    summary: {
      settings,
      machine,
      others: { words: words?.others, layers: turns?.others },
      training: { base, modular, corrected, dropped: sum(dropped), long: sum(long) },
      points: rows,
      bound,
    },
  };
}

function claimsOf(rows, bound, settings) {
  const claims = [];
  const push = (claim, asked, measured, held) => claims.push({ claim, asked, measured, held });
  const [full] = rows;
  const smaller = rows.slice(1);
  const layers = settings.model.decoder_layers;
  if (!bound)
    push(
      'one training serves speed-ups of a token over a range, 85 % of the layer ratio or more',
      '1.1x to 6x',
      'not measured',
      '',
    );
  if (bound) {
    const [slow, fast] = [bound[1], bound.at(-1)];
    push(
      'one training serves speed-ups of a token over a range',
      '1.1x to 6x',
      `${times(slow.token)} to ${times(fast.token)}, layer ratios ${times(layers / slow.layers)} to ${times(layers / fast.layers)}`,
      slow.token >= 1.1 && fast.token >= 0.85 * 6 ? 'held, at 85 % of the ratio or more' : 'not held',
    );
    const worst = bound.slice(1).reduce((a, b) => (b.token * b.layers < a.token * a.layers ? b : a));
    const share = (worst.token * worst.layers) / layers;
    push(
      'a token is faster by 85 % of the layer ratio or more, where layers cost the time',
      '85 %',
      `at least ${percent(share, 0)}, with ${worst.layers} parts of ${layers}`,
      share >= 0.85 ? 'held' : 'not held',
    );
  }
  for (const [kind, asked] of [
    ['plain', 'modules are better than dropped layers as they are'],
    ['trained', 'modules are better than dropped layers that had as many steps in all'],
    ['correctedTrained', 'with corrections they are'],
    ['long', 'modules are better than dropped layers of one size that had as many steps alone'],
    ['correctedLong', 'with corrections they are'],
  ]) {
    const some = smaller.filter((row) => row.ratio >= 1.5 && row[kind]);
    if (some.length === 0) continue;
    const worse = some.filter((row) => row[kind].more.low <= 0);
    const lost = some.filter((row) => row[kind].more.value <= 0);
    push(
      asked,
      kind.toLowerCase().endsWith('long') ? 'at the sizes tried' : 'at every size from 1.5x on',
      some.map((row) => `${row.layers}: ${points(row[kind].more.value)} (${sign(row[kind].more)})`).join('; '),
      worse.length === 0
        ? 'held'
        : lost.length === 0
          ? 'held, within noise'
          : `not held at ${lost.map((row) => row.layers).join(', ')}`,
    );
  }
  const kept = smaller.map((row) => `${row.layers} ${percent(row.exact.value / full.exact.value, 0)}`);
  push('words right, of what the full model has', 'little to moderate loss', kept.join('; '), '');
  return claims;
}
