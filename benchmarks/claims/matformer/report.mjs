// From measured values to a table of claims: what the paper says, what was measured, and whether it held.

const percent = (x, digits = 1) => `${(x * 100).toFixed(digits)} %`;
const signed = (x) => `${x >= 0 ? '+' : ''}${percent(x, 2)}`;
const nats = (x) => x.toFixed(4);
const interval = ({ value, low, high }, show) => `${show(value)} [${show(low)}, ${show(high)}]`;
const row = (cells) => `| ${cells.join(' | ')} |`;
const table = (head, rows) => [row(head), row(head.map(() => '---')), ...rows.map(row), ''];

const verdict = (value, sure) => (sure ? 'held' : value ? 'held, within noise' : 'not held');

/** A slice may have at most this much more loss than a model of its own, on average. */
export const MOST = 0.02;

/** @returns claims: what, paper, measured, held */
export function claimsOf({ granularities, average, mix, consistency, drafts }) {
  const claims = [];
  const add = (claim, paper, measured, held) => claims.push({ claim, paper, measured, held });
  const bySeed = ({ seeds }) => (seeds.length > 1 ? ` (by seed ${seeds.map(signed).join(', ')})` : '');
  const atMost = (measured, most) => verdict(measured.value <= most, measured.high <= most);

  add(
    `slices, on average over the granularities, have at most ${percent(MOST, 0)} more held-out loss than models trained alone`,
    'as good or better',
    `${interval(average, signed)}${bySeed(average)}`,
    atMost(average, MOST),
  );
  for (const { name, relative } of granularities) {
    add(
      `${name} is no worse at all than a model trained alone`,
      'as good or better',
      `${interval(relative, signed)}${bySeed(relative)}`,
      atMost(relative, 0),
    );
  }
  const on = mix.filter(({ aboveLine }) => aboveLine.value <= 0);
  const sure = mix.filter(({ aboveLine }) => aboveLine.high <= 0);
  const worst = mix.reduce((a, b) => (b.aboveLine.value > a.aboveLine.value ? b : a));
  add(
    "Mix'n'Match between granularities is on the line between them or better",
    'yes, never trained for',
    `${on.length} of ${mix.length} (surely ${sure.length}); the worst has ${interval(worst.aboveLine, nats)} nats more than the line`,
    verdict(on.length === mix.length, sure.length === mix.length),
  );
  for (const { name, agree, kl, overlap } of consistency) {
    const more = ({ difference }) => verdict(difference.value > 0, difference.low > 0);
    add(
      `${name} has the most likely token of XL more often than a model trained alone has that of its XL`,
      'yes; up to 8.5 % more',
      `${interval(agree.slice, percent)} and ${interval(agree.alone, percent)}`,
      more(agree),
    );
    add(
      `its distribution is nearer to that of XL`,
      'yes',
      `KL ${interval(kl.slice, nats)} and ${interval(kl.alone, nats)}`,
      verdict(kl.difference.value < 0, kl.difference.high < 0),
    );
    add(
      `speculative sampling would accept more of its tokens`,
      'yes',
      `${interval(overlap.slice, percent)} and ${interval(overlap.alone, percent)}`,
      more(overlap),
    );
  }
  const { acceptance, tokensPerRun } = drafts;
  const two = (x) => x.toFixed(2);
  const better = ({ value, low }) => verdict(value > 0, low > 0);
  const draftsOf = (who) =>
    `${interval(acceptance[who], percent)} of drafted tokens, ${interval(tokensPerRun[who], two)} tokens for a run of XL`;
  add(
    'greedy drafts of S are accepted more often than those of a model trained alone',
    '1.14x and 1.10x the speed of plain decoding',
    `${draftsOf('slice')}; alone ${draftsOf('alone')}`,
    better(acceptance.overAlone),
  );
  add('and more often again on the caches of XL', '1.16x', draftsOf('shared'), better(acceptance.ofSharing));
  return claims;
}

const titles = {
  joint: 'joint (the sum of all)',
  random: 'random (one for each step)',
  sandwich: 'sandwich (smallest, largest, one between)',
};

/** @returns {{ markdown: string, claims: object[] }} */
export function reportOf({ settings, results, ...facts }) {
  const { steps, batchTokens, sequenceLength, draftTokens, generated, text, seeds, vocab, hidden, layers, ffn } =
    settings;
  const { granularities, mix, strategies } = results;
  const named = strategies.map(({ strategy }) => strategy).filter((strategy) => strategy !== 'joint');
  const others = named.length > 0 ? ` -- --strategies ${named.join()}` : '';
  const claims = claimsOf(results);
  const markdown = [
    "# MatFormer's claims, measured again",
    '',
    `A MatLM of ${layers} layers, ${hidden} features and ${ffn} units a feed-forward is trained from scratch with the joint objective at an`,
    'eighth, a quarter, half and all of its units (S, M, L, XL). For each width a stock model of that width is trained alone, on the',
    `same batches: ${steps} steps of ${batchTokens} tokens (${((steps * batchTokens) / 1e6).toFixed(2)} M), optimizer and learning rate alike, ${seeds} seed${seeds > 1 ? 's' : ''}. Text: ${text === 'corpus' ? 'a quarter of that of models/tiny' : text};`,
    `vocabulary ${vocab}. Measured on ${facts.sequences} held-out stretches of ${sequenceLength} tokens. Intervals are 95 % bootstraps over those, with the seeds`,
    `together: they say nothing of what another seed would give. Drafts: ${draftTokens} at a time, greedy, ${generated} tokens after each of ${facts.prompts} prompts.`,
    '',
    'The paper (arXiv 2310.07707) trains 78 to 850 million parameters on billions of tokens; these models have under a million and',
    'have seen so little text that none is near what it could learn. What holds or does not hold here may not there. Tokens are equal,',
    'compute is not: the nested model takes as much for a step as the four others together, and what they share learns from all of it.',
    '',
    `One command: \`npm run claims:matformer${others}\` (${facts.machine.cpu}; no clock was used).`,
    '',
    ...table(
      ['claim', 'paper', 'measured', 'held'],
      claims.map(({ claim, paper, measured, held }) => [claim, paper, measured, held]),
    ),
    '## Held-out loss, nats per token',
    '',
    ...table(
      ['', 'units', 'parameters', 'slice', 'trained alone', 'slice over alone'],
      granularities.map(({ name, share, parameters, slice, alone, relative }) => [
        ...[name, share * ffn, parameters],
        ...[interval(slice, nats), interval(alone, nats), interval(relative, signed)],
      ]),
    ),
    `Trained alone, XL has ${interval(results.spread, percent)} less loss than S: beside this a difference of ${percent(MOST, 0)} has to be seen.`,
    '',
    "## Mix'n'Match, never trained for",
    '',
    ...table(
      ['units of the layers', 'parameters', 'loss', 'on the line between granularities', 'difference'],
      mix.map(({ widths, parameters, loss, line, aboveLine }) => [
        ...[widths.join(', '), parameters, nats(loss.value), nats(line.value), interval(aboveLine, nats)],
      ]),
    ),
    ...(strategies.length > 1
      ? [
          '## How widths are sampled',
          '',
          'Loss over that of models trained alone, first seed. All take the same steps, so `random` computes a quarter as much as `joint`.',
          '',
          ...table(
            ['', ...granularities.map(({ name }) => name)],
            strategies.map(({ strategy, relative }) => [titles[strategy], ...relative.map((m) => interval(m, signed))]),
          ),
        ]
      : []),
  ].join('\n');
  return { markdown: `${markdown.trimEnd()}\n`, claims };
}
