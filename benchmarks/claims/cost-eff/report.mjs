// From measured points to a table of claims: what the paper says, what was measured, and whether it held.
import { bootstrap, median } from '../../../dist/infer/quality/statistics.js';

const percent = (x, digits = 1) => `${(x * 100).toFixed(digits)} %`;
const interval = ({ value, low, high }, show) => `${show(value)} [${show(low)}, ${show(high)}]`;
const million = (x) => (x / 1e6).toFixed(2);
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const verdict = (value, sure) => (sure ? 'held' : value ? 'held, within noise' : 'not held');

/**
 * @param measured what was measured: what was not is absent, and so are the claims about it
 * @returns {{ markdown: string, claims: object[], summary: object }}
 */
export function reportOf({ settings, machine, rows, base, full: plain, models, assistant, time }) {
  const [point] = plain ?? [];
  const full = models[0] &&
    point && { parameters: models[0].training.full.parameters, flops: mean(point.flops), quality: mean(point.right) };
  const kinds = [
    ...(assistant
      ? [{ name: 'exits only', parameters: models[0].training.assistant.parameters, points: assistant.points }]
      : []),
    ...models.map(({ name, training, points }) => ({
      name: `slim, ${name}`,
      parameters: training.slim.parameters,
      points,
    })),
  ];
  const levels = kinds.flatMap(({ name, parameters, points }) =>
    points.map((point) => ({
      ...{ model: name, parameters, threshold: point.threshold, flops: mean(point.flops) },
      accuracy: bootstrap(
        point.right.map((right) => ({ right, one: 1 })),
        (t) => t.right / t.one,
        0,
      ),
      layers: Array.from(
        { length: settings.model.num_hidden_layers },
        (_, i) => point.layers.filter((l) => l === i).length / point.layers.length,
      ),
    })),
  );
  // Where the first exit decides nearly all texts as well as all layers do, nothing is learned about depth.
  const deepest = levels.find(({ threshold }) => threshold === 0);
  const shallow = levels.find(({ model, layers }) => model === 'exits only' && layers[0] > 0.9);
  const flat =
    shallow &&
    Math.abs(shallow.accuracy.value - deepest.accuracy.value) < 0.01 &&
    `**What this cannot show**: with ${percent(shallow.layers[0], 0)} of the texts decided after the first layer the assistant is as good (${percent(shallow.accuracy.value, 2)}) as after all (${percent(deepest.accuracy.value, 2)}). Rows as short as these, and a model that was not pretrained, need no depth: what exits and slimming keep here is no measure of what they keep where layers matter.`;
  const claims = full && assistant ? claimsOf({ full, assistant, models, time }) : [];
  const share = (flops) => percent(flops / full.flops);
  const markdown = [
    "# COST-EFF's claims, measured again",
    '',
    `SST-2: ${rows} held-out rows of a split of GLUE's training set, whose rows are sentences and phrases of them, so that accuracy is`,
    'higher than on whole sentences; weights were chosen by 1,000 others. A BERT of',
    `${settings.model.num_hidden_layers} layers, ${settings.model.hidden_size} features and ${settings.model.num_attention_heads} heads with the vocabulary of bert-base-uncased, trained from scratch here on 60,614 rows for lack of a`,
    `pretrained one; the pipeline trained on the first ${settings.rows.toLocaleString('en-US')} of them, without dropout, for fewer epochs than the paper has and at larger rates. FLOPs are`,
    'counted by the kernels, per text on average. Texts leave by entropy, at exits from the first on. Intervals are 95 % bootstraps over texts;',
    'differences are paired.',
    'A model of 5 million parameters has far less redundancy than BERT-base: what does not hold here may hold there, and the other way round.',
    ...(time ? [] : ['', 'Wall-clock was not measured in this run (`--time`, on a machine that does nothing else).']),
    '',
    `Machine: ${machine.cpu}, ${machine.availableParallelism} cores. One command: \`npm run claims:cost-eff\`.`,
    ...(base && full
      ? [
          '',
          `The classifier: ${million(full.parameters)} million parameters, ${million(full.flops)} MFLOPs, accuracy ${percent(full.quality, 2)}.`,
        ]
      : ['', 'Nothing is measured yet.']),
    ...(flat ? ['', flat] : []),
    '',
    '| claim | paper | measured | held |',
    '| --- | --- | --- | --- |',
    ...claims.map((c) => `| ${c.claim} | ${c.paper} | ${c.measured} | ${c.held} |`),
    '',
    '| model | parameters, million | threshold, nats | FLOPs of the classifier | accuracy | left after layer 0, 1, ... |',
    '| --- | --- | --- | --- | --- | --- |',
    ...(full
      ? levels
          .filter(({ threshold, layers }) => threshold === 0 || layers.at(-1) < 1)
          .map(
            (l) =>
              `| ${l.model} | ${million(l.parameters)} | ${l.threshold || 'none'} | ${share(l.flops)} | ${interval(l.accuracy, (x) => percent(x, 2))} | ${l.layers.map((x) => percent(x, 0)).join(', ')} |`,
          )
      : []),
  ].join('\n');
  return {
    markdown: `${markdown}\n`,
    claims,
    summary: {
      settings,
      machine,
      rows,
      base,
      full,
      levels,
      training: models.map(({ name, target, calibration, training }) => ({ name, target, calibration, ...training })),
      time,
    },
  };
}

/** The paired difference in accuracy of two points, a less b. */
const difference = (a, b) =>
  bootstrap(
    a.right.map((right, i) => ({ a: right, b: b.right[i], one: 1 })),
    (t) => (t.a - t.b) / t.one,
    0,
  );
const points = (x) => `${x >= 0 ? '+' : ''}${(x * 100).toFixed(2)} points`;
/** The point with the most FLOPs within a limit. */
const within = (all, flops) =>
  all.filter((p) => mean(p.flops) <= flops).toSorted((a, b) => mean(b.flops) - mean(a.flops))[0];

function claimsOf({ full, assistant, models, time }) {
  const claims = [];
  const add = (claim, paper, measured, held) => claims.push({ claim, paper, measured, held });
  const whole = (of) => of.points.find(({ threshold }) => threshold === 0);
  const [half, quarter, least, classifier] = ['half', 'quarter', 'least', 'half-classifier'].map((name) =>
    models.find((m) => m.name === name),
  );
  const smallest = quarter ?? half;
  const reference = full.quality;

  // Retention where the slimmest model is left early: the point with the least FLOPs that keeps at least 96.5 %, or the best one.
  const kept = (p) => mean(p.right) / reference;
  const wanted = smallest.points.toSorted((a, b) => mean(a.flops) - mean(b.flops));
  const chosen = wanted.find((p) => kept(p) >= 0.965) ?? wanted.toSorted((a, b) => kept(b) - kept(a))[0];
  const retention = bootstrap(
    chosen.right.map((right) => ({ right, one: 1 })),
    (t) => t.right / t.one / reference,
    0,
  );
  add(
    `at 1/${(full.parameters / smallest.training.slim.parameters).toFixed(1)} of the parameters and 1/${(full.flops / mean(chosen.flops)).toFixed(1)} of the FLOPs, 96.5 % of the accuracy is kept`,
    '1/8 and 1/19: 96.5 %',
    interval(retention, percent),
    verdict(retention.value >= 0.965, retention.low >= 0.965),
  );

  const cheapest = assistant.points.toSorted((a, b) => mean(a.flops) - mean(b.flops))[0];
  // The paper's share of the FLOPs is less than either comes down to alone: each is compared at the fewest that it does.
  const both = quarter && within(quarter.points, full.flops / 19);
  if (both && least) {
    for (const [other, point] of [
      ['slim only', whole(least)],
      ['exits only', cheapest],
    ]) {
      const d = difference(both, point);
      add(
        `slim (quarter) with exits, at 1/${(full.flops / mean(both.flops)).toFixed(1)} of the FLOPs, is better than ${other} at the fewest it comes down to, 1/${(full.flops / mean(point.flops)).toFixed(1)}`,
        'yes, at equal FLOPs',
        interval(d, points),
        verdict(d.value > 0, d.low > 0),
      );
    }
  }
  if (half && quarter) {
    // At the FLOPs of a slim model without exits, and at the fewest that exits alone come down to.
    for (const [other, point] of [
      ['slim only (quarter)', whole(quarter)],
      ['exits only', cheapest],
    ]) {
      const limit = mean(point.flops);
      const near = within(half.points, limit);
      if (!near) continue;
      const d = difference(near, point);
      const claim = `slim (half) with exits is better than ${other}, at ${percent(limit / full.flops)} of the FLOPs`;
      add(claim, 'yes', interval(d, points), verdict(d.value > 0, d.low > 0));
    }
  }
  if (half && classifier) {
    for (const [what, at] of [
      ['after all layers', 0],
      ['left at 0.2 nats', 0.2],
    ]) {
      const [a, b] = [half, classifier].map((m) => m.points.find(({ threshold }) => threshold === at));
      const d = difference(a, b);
      add(
        `importance by all exits is better than by the classifier, ${what}`,
        'yes',
        interval(d, points),
        verdict(d.value > 0, d.low > 0),
      );
    }
  }
  for (const { model, batch, times, flops } of time ?? []) {
    const counted = 1 - flops.exits / flops.full;
    const clock = 1 - median(times.exits) / median(times.full);
    add(
      `exits of the model ${model} save as much time as FLOPs at batch ${batch} (at least 85 % of it)`,
      batch === 1 ? 'yes' : 'not measured',
      `${percent(clock)} of the time, ${percent(counted)} of the FLOPs: ${percent(clock / counted)} of it`,
      clock >= 0.85 * counted ? 'held' : 'not held',
    );
  }
  return claims;
}
