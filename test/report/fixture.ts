// Report data of an invented model, with text that would break a page that did not escape it.
import type { LevelResult, ReportData, SampleTrace } from '../../lib/report/index.js';

export const hostile = 'a<b>&"\'\u0000\ud800</svg></style><script>alert(1)</script><img src=x onerror=alert(2)>';

const measured = (value: number) => ({ value, low: value * 0.9, high: value * 1.1 });

export const level = (method: LevelResult['method'], budget: number | string, layers = 2): LevelResult => {
  const share = typeof budget === 'number' ? budget : 0.5;
  return {
    method,
    budget,
    ratio: share,
    share,
    perplexity: measured(5 / share),
    bitsPerByte: method === 'drop' ? null : measured(1.2 / share),
    kl: measured(1 - share),
    agreement: measured(share),
    tokensPerSecond: method === 'random' ? null : 1234 / share,
    timeRatio: method === 'random' ? null : (1 + 3 * share) / 4,
    layers: { attn: new Array(layers).fill(share), mlp: new Array(layers).fill(1) },
  };
};

/** `enters` says whether a token enters a sub-layer. */
function trace(
  tokens: string[],
  layers: number,
  enters: (token: number, layer: number, place: number) => boolean,
): SampleTrace {
  const bits = (place: number): string =>
    Buffer.from(
      tokens.flatMap((_, t) => Array.from({ length: layers }, (_, l) => Number(enters(t, l, place)))),
    ).toString('base64');
  return {
    tokens,
    promptTokens: 2,
    layers,
    attn: bits(0),
    mlp: bits(1),
    headShare: Array.from({ length: layers }, (_, l) => (l === 4 ? 0.25 : 1)),
    blockShare: Array.from({ length: layers }, (_, l) => (l === 3 ? 0.5 : 1)),
  };
}

export function reportData(layers = 2): ReportData {
  const pieces = [
    '',
    hostile,
    ' whale',
    '\n\r',
    '\u00a0',
    '<b>',
    '&amp;',
    ...'many more words to fill lines '.repeat(9).split(/(?= )/),
  ];
  const text = pieces.join('');
  const ids = Array.from({ length: layers }, (_, l) => l);
  return {
    title: `Elastic ${hostile}`,
    version: '1.0.0',
    created: '2026-01-01T00:00:00Z',
    machine: 'test',
    model: {
      name: 'a-model-whose-name-is-one-long-word-without-a-place-to-break',
      architecture: 'llama',
      parameters: 1000,
      layers,
      hidden: 8,
    },
    elastic: { trainable: 18, share: 0.018, places: 'attention and FFN of every layer' },
    training: {
      steps: 40,
      seconds: 1,
      tokensPerSecond: 100,
      points: ids.concat(ids).map((_, i) => ({ step: i + 1, loss: i === 1 ? Number.NaN : 1 / (i + 1) })),
      evaluations: [1, 2].map((step) => ({ step, levels: { 'capacity 0.5': { kl: 1 / step, top1_agreement: 0.5 } } })),
    },
    evaluation: {
      data: hostile,
      tokens: 100,
      sequences: 4,
      levels: [1, 0.7, 'p50'].flatMap((b) => (['routed', 'random', 'drop'] as const).map((m) => level(m, b, layers))),
    },
    routing: {
      on: hostile,
      maps: [0.7, hostile].map((budget) => ({
        budget,
        measured: { attn: ids.map((l) => l / layers), mlp: ids.map(() => 1) },
        target: { attn: ids.map((l) => (l % 2 === 0 ? null : 0.5)), mlp: ids.map(() => 0.95) },
      })),
    },
    samples: [
      { label: 'Full', prompt: hostile, text, ratio: 1, tokensPerSecond: 10, trace: trace(pieces, layers, () => true) },
      {
        label: hostile,
        ...{ prompt: hostile, text, ratio: 0.5, tokensPerSecond: 20 },
        trace: trace(pieces, layers, (t, l, place) => (t + l + place) % 3 === 0),
      },
    ],
    notes: [hostile],
    seconds: 2,
  };
}
