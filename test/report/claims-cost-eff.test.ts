// benchmarks/claims/cost-eff: what is reckoned from points measured, and what is said where something was not.
import { expect, test } from 'vitest';

const { reportOf } = (await import(new URL('../../benchmarks/claims/cost-eff/report.mjs', import.meta.url).href)) as {
  reportOf: (measured: object) => { markdown: string; claims: Record<string, string>[]; summary: { levels: object[] } };
};

const settings = { model: { num_hidden_layers: 2, hidden_size: 8, num_attention_heads: 2 }, rows: 16_000 };
const facts = { settings, machine: { cpu: 'a CPU', availableParallelism: 2 }, rows: 200, base: { accuracy: 0.9 } };
/** The first `right` of 200 texts are right; `early` of them left after layer 0, which costs half. */
const point = (threshold: number, right: number, flops: number, early = 0) => ({
  threshold,
  right: Array.from({ length: 200 }, (_, i) => (i < right ? 1 : 0)),
  flops: Array.from({ length: 200 }, (_, i) => (i < early ? flops / 2 : flops)),
  layers: Array.from({ length: 200 }, (_, i) => (i < early ? 0 : 1)),
});
const model = (name: string, parameters: number, points: object[]) => ({
  ...{ name, target: {}, calibration: 'exits', points },
  training: { full: { parameters: 8e6 }, assistant: { parameters: 8.1e6 }, slim: { parameters } },
});
const measured = {
  ...facts,
  full: [point(0, 180, 1000)],
  assistant: { points: [point(0, 182, 1000), point(0.2, 120, 1000, 200)] },
  models: [
    model('half', 2e6, [point(0, 178, 400), point(0.2, 176, 400, 200)]),
    model('quarter', 1e6, [point(0, 160, 200), point(0.2, 150, 200, 200)]),
    model('half-classifier', 2e6, [point(0, 178, 400), point(0.2, 100, 400, 200)]),
  ],
  time: [
    { model: 'slim', batch: 64, times: { full: [10, 12, 11], exits: [8, 8, 8] }, flops: { full: 100, exits: 60 } },
  ],
};

test('claims are reckoned from what was measured', () => {
  const { claims, markdown, summary } = reportOf(measured);
  expect(claims.map(({ claim, measured, held }) => [claim, measured.split(' ')[0], held])).toEqual([
    // 160 of 180 right: 88.9 %; the slimmest model keeps most without exits.
    ['at 1/8.0 of the parameters and 1/5.0 of the FLOPs, 96.5 % of the accuracy is kept', '88.9', 'not held'],
    // Half of it with exits costs 200: 176 against 160 right of 200.
    ['slim (half) with exits is better than slim only (quarter), at 20.0 % of the FLOPs', '+8.00', 'held'],
    // The assistant's cheapest point costs 500, with 120 right; within that the slim model is whole, with 178.
    ['slim (half) with exits is better than exits only, at 50.0 % of the FLOPs', '+29.00', 'held'],
    ['importance by all exits is better than by the classifier, after all layers', '+0.00', 'not held'],
    ['importance by all exits is better than by the classifier, left at 0.2 nats', '+38.00', 'held'],
    // 27.3 % of the time of 40 % of the FLOPs.
    ['exits of the model slim save as much time as FLOPs at batch 64 (at least 85 % of it)', '27.3', 'not held'],
  ]);
  expect(summary.levels).toHaveLength(8);
  expect(markdown).toContain('| slim, half | 2.00 | 0.2 | 20.0 % | 88.00 % [');
  expect(markdown).toContain('| 100 %, 0 % |');
  expect(markdown).not.toContain('What this cannot show');
  const alike = { points: [point(0, 182, 1000), point(0.2, 182, 1000, 200)] };
  expect(reportOf({ ...measured, assistant: alike }).markdown).toContain('as good (91.00 %) as after all (91.00 %)');
});

test('what was not measured is left out, and said', () => {
  const { claims, markdown } = reportOf({ ...measured, models: measured.models.slice(0, 1), time: null });
  expect(claims.map(({ claim }) => claim)).toEqual([
    'at 1/4.0 of the parameters and 1/5.0 of the FLOPs, 96.5 % of the accuracy is kept',
  ]);
  expect(markdown).toContain('Wall-clock was not measured');
  const nothing = reportOf({ ...facts, base: null, full: null, models: [], time: null });
  expect(nothing.claims).toEqual([]);
  expect(nothing.markdown).toContain('Nothing is measured yet.');
});
