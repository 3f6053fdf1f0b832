// From sums of sequences to measured values: every comparison is of the same sequences, intervals are bootstraps over them.
import { bootstrap } from '../../../dist/infer/quality/statistics.js';
import { GRANULARITIES, NAMES } from './models.mjs';

const loss = (t, who) => t[`${who}.ce`] / t[`${who}.n`];
const mean = (t, who, what) => t[`${who}.${what}`] / t[`${who}.n`];

/**
 * Sums of several points side by side: one record for each sequence, added over seeds.
 *
 * @param points name: a list, one for each seed, of lists of sums
 */
export function sideBySide(points) {
  const records = [];
  for (const [who, seeds] of Object.entries(points)) {
    for (const sequences of seeds) {
      for (const [i, sums] of sequences.entries()) {
        records[i] ??= {};
        const record = records[i];
        for (const [key, value] of Object.entries(sums)) {
          record[`${who}.${key}`] = (record[`${who}.${key}`] ?? 0) + value;
        }
      }
    }
  }
  return records;
}

/** A statistic of all seeds together, with its interval, and of each seed. */
function measured(points, statistic) {
  const seeds = Object.values(points)[0].map((_, s) => {
    const one = Object.fromEntries(Object.entries(points).map(([who, list]) => [who, [list[s]]]));
    const total = {};
    for (const record of sideBySide(one)) {
      for (const [key, value] of Object.entries(record)) total[key] = (total[key] ?? 0) + value;
    }
    return statistic(total);
  });
  return { ...bootstrap(sideBySide(points), statistic, 0), seeds };
}

/**
 * @param families for each seed: joint, alone, random, sandwich as `measureFamily` gives them; the last two may be absent
 */
export function resultsOf(families) {
  const steps = families[0].joint.points.length - 1;
  const each = steps / (GRANULARITIES.length - 1);
  /** Sums of one point of a family, of every seed. */
  const at = (family, i) => families.map((seed) => seed[family].points[i].sequences);
  const slice = (i) => at('joint', i * each);
  const relative = (t) => loss(t, 'slice') / loss(t, 'alone') - 1;

  const granularities = GRANULARITIES.map((share, i) => {
    const points = { slice: slice(i), alone: at('alone', i) };
    return {
      ...{ name: NAMES[i], share, parameters: families[0].alone.points[i].parameters },
      slice: measured(points, (t) => loss(t, 'slice')),
      alone: measured(points, (t) => loss(t, 'alone')),
      relative: measured(points, relative),
    };
  });
  const ends = { small: at('alone', 0), large: at('alone', GRANULARITIES.length - 1) };
  const spread = measured(ends, (t) => 1 - loss(t, 'large') / loss(t, 'small'));
  const all = Object.fromEntries(
    GRANULARITIES.flatMap((_, i) => [
      [`slice${i}`, slice(i)],
      [`alone${i}`, at('alone', i)],
    ]),
  );
  const average = measured(
    all,
    (t) =>
      GRANULARITIES.reduce((sum, _, i) => sum + loss(t, `slice${i}`) / loss(t, `alone${i}`) - 1, 0) /
      GRANULARITIES.length,
  );

  const mix = families[0].joint.points.flatMap(({ widths, parameters }, i) => {
    if (i % each === 0) return [];
    const below = Math.floor(i / each);
    const part = (i % each) / each;
    const points = { point: at('joint', i), below: slice(below), above: slice(below + 1) };
    const line = (t) => (1 - part) * loss(t, 'below') + part * loss(t, 'above');
    return {
      ...{ widths, parameters },
      loss: measured(points, (t) => loss(t, 'point')),
      line: measured(points, line),
      aboveLine: measured(points, (t) => loss(t, 'point') - line(t)),
    };
  });

  const consistency = GRANULARITIES.slice(0, -1).map((share, i) => {
    const points = { slice: slice(i), alone: at('alone', i) };
    const compare = (what) => ({
      slice: measured(points, (t) => mean(t, 'slice', what)),
      alone: measured(points, (t) => mean(t, 'alone', what)),
      difference: measured(points, (t) => mean(t, 'slice', what) - mean(t, 'alone', what)),
    });
    return { name: NAMES[i], share, agree: compare('agree'), kl: compare('kl'), overlap: compare('overlap') };
  });

  const texts = {
    shared: families.map(({ joint }) => joint.shared),
    slice: families.map(({ joint }) => joint.drafts),
    alone: families.map(({ alone }) => alone.drafts),
  };
  const accepted = (t, who) => t[`${who}.accepted`] / t[`${who}.drafted`];
  const perRun = (t, who) => (t[`${who}.accepted`] + t[`${who}.cycles`]) / t[`${who}.cycles`];
  const drafts = Object.fromEntries(
    Object.entries({ acceptance: accepted, tokensPerRun: perRun }).map(([name, statistic]) => [
      name,
      {
        shared: measured(texts, (t) => statistic(t, 'shared')),
        slice: measured(texts, (t) => statistic(t, 'slice')),
        alone: measured(texts, (t) => statistic(t, 'alone')),
        overAlone: measured(texts, (t) => statistic(t, 'slice') - statistic(t, 'alone')),
        ofSharing: measured(texts, (t) => statistic(t, 'shared') - statistic(t, 'slice')),
      },
    ]),
  );

  const strategies = ['joint', 'random', 'sandwich'].flatMap((strategy) => {
    const [first] = families;
    if (!first[strategy]) return [];
    const points = GRANULARITIES.map((_, i) => ({
      slice: [first[strategy].points[strategy === 'joint' ? i * each : i].sequences],
      alone: [first.alone.points[i].sequences],
    }));
    return { strategy, relative: points.map((point) => measured(point, relative)) };
  });
  return { granularities, average, spread, mix, consistency, drafts, strategies };
}
