// From measured cells to a table of claims: what the paper says, what was measured, and whether it held.

const percent = (x, digits = 1) => `${(x * 100).toFixed(digits)} %`;
const interval = ({ value, low, high }, show) => `${show(value)} [${show(low)}, ${show(high)}]`;
const change = (ratio) => `${ratio >= 1 ? '+' : ''}${((ratio - 1) * 100).toFixed(1)} %`;
const nats = (x) => x.toFixed(4);
const times = (x) => `${x.toFixed(2)}x`;

const verdict = (value, sure) => (sure ? 'held' : value ? 'held, within noise' : 'not held');
/** At most this much more perplexity counts as nearly free. */
const NEARLY_FREE = 1.02;

const levelAt = (cell, at, method = 'routed') => cell?.levels.find((l) => l.at === at && l.method === method);

/**
 * @param results what was measured: cells that were not are absent, and so are the claims about them
 * @returns {{ markdown: string, claims: object[] }}
 */
export function reportOf({ settings, machine, models, wanted }) {
  const claims = models.flatMap(claimsOf);
  const missing = models.length * wanted - models.flatMap(({ cells }) => cells).length;
  const timed = models.some(({ cells }) => cells.some(({ speed }) => speed));
  const markdown = [
    "# Router-Tuning's claims, measured again",
    '',
    `Every cell routes half of a model's layers, trains its routers for ${settings.steps} steps of 2048 tokens, and is measured on`,
    `held-out texts of at most ${settings.length} tokens, where about ${percent(settings.share, 0)} of the sequences, or tokens, enter each routed sub-layer`,
    '("even"), and where the same compute is divided over layers by calibration ("divided"). Texts are decided about whole, as',
    'prompts are. Random: as many enter each sub-layer, chosen by chance. Fixed: sub-layers of those that are routed are left',
    'out for all, in the order that hurts least on training texts, at the same FLOPs. Perplexities are compared on the same',
    'sequences; intervals are 95 % bootstraps over sequences. FLOPs are counted by the kernels, and are those that came out: shares of',
    'sequences are held loosely on other text than was calibrated on, so rows of different cells are not of equal compute.',
    'These models have 0.3 to 1.7 million parameters and far less redundancy than those of the paper (arXiv 2410.13184): what does',
    'not hold here may hold there.',
    ...(missing > 0
      ? ['', `Not measured yet: ${missing} of ${models.length * wanted} cells; claims about them are left out.`]
      : []),
    ...(timed ? [] : ['', 'Speed was not measured in this run (`--time`, on a machine that does nothing else).']),
    '',
    `Machine: ${machine.cpu}, ${machine.availableParallelism} cores. One command: \`npm run claims:router-tuning\`.`,
    '',
    '| model | claim | paper | measured | held |',
    '| --- | --- | --- | --- | --- |',
    ...claims.map((c) => `| ${c.model} | ${c.claim} | ${c.paper} | ${c.measured} | ${c.held} |`),
    '',
    ...models.flatMap(tables),
  ].join('\n');
  return { markdown: `${markdown}\n`, claims };
}

function claimsOf({ name, cells }) {
  const claims = [];
  const add = (claim, paper, measured, held) => claims.push({ model: name, claim, paper, measured, held });
  const cell = (target, granularity, rank = 0, loss = 'kl') =>
    cells.find((c) => c.target === target && c.granularity === granularity && c.rank === rank && c.loss === loss);

  for (const granularity of ['sequence', 'token']) {
    const [attn, mlp, block] = ['attn', 'mlp', 'block'].map((target) => levelAt(cell(target, granularity), 'even'));
    if (attn) {
      const { perplexityRatio: r } = attn;
      add(
        `skipping half of attention in half of the layers by ${granularity} is nearly free`,
        granularity === 'sequence' ? '-0.2 to -0.3 points of 69' : '-0.4 to -1.0 points of 69',
        `perplexity ${interval(r, change)} (nearly free: at most ${change(NEARLY_FREE)})`,
        verdict(r.value <= NEARLY_FREE, r.high <= NEARLY_FREE),
      );
    }
    for (const [what, other] of [
      ['the feed-forward', mlp],
      ['whole blocks', block],
    ]) {
      if (!attn || !other) continue;
      add(
        `by ${granularity}, skipping ${what} costs more than skipping attention`,
        '7 to 11 points',
        `KL ${interval(other.kl, nats)} against ${interval(attn.kl, nats)}`,
        verdict(other.kl.value > attn.kl.value, other.kl.low > attn.kl.high),
      );
    }
  }
  const [sequence, token] = ['sequence', 'token'].map((granularity) => levelAt(cell('attn', granularity), 'even'));
  if (sequence && token) {
    add(
      'of attention, whole sequences lose no more than tokens',
      'yes (69.4 and 68.7)',
      `KL ${interval(sequence.kl, nats)} and ${interval(token.kl, nats)}`,
      verdict(sequence.kl.value <= token.kl.value, sequence.kl.high <= token.kl.low),
    );
  }
  for (const { target, granularity, rank, loss, ...measured } of cells) {
    if (rank > 0 || loss !== 'kl') continue;
    for (const [method, what] of [
      ['random', 'a random choice'],
      ['drop', 'fixed skipping'],
    ]) {
      for (const at of method === 'random' ? ['even'] : ['even', 'divided']) {
        const advantage = levelAt(measured, at, method)?.routedAdvantage?.kl;
        if (!advantage) continue;
        add(
          `${target} by ${granularity}, ${at}: better than ${what} at equal share`,
          method === 'random' ? 'yes' : 'not compared',
          `KL lower by ${interval(advantage, nats)}`,
          verdict(advantage.value > 0, advantage.low > 0),
        );
      }
    }
    const corrected = levelAt(cell(target, granularity, 4), 'even');
    const plain = levelAt(measured, 'even');
    if (corrected && plain) {
      add(
        `${target} by ${granularity}: LoRA (rank 4) trained with the routers improves them`,
        target === 'attn' && granularity === 'sequence' ? '+1.4 points' : 'not shown',
        `KL ${interval(plain.kl, nats)} without, ${interval(corrected.kl, nats)} with`,
        verdict(corrected.kl.value < plain.kl.value, corrected.kl.high < plain.kl.low),
      );
    }
  }
  const modelled = cell('attn', 'sequence', 0, 'cross-entropy');
  if (modelled && sequence) {
    const other = levelAt(modelled, 'even');
    add(
      'self-distillation loses no more than the paper’s cross-entropy',
      'not compared',
      `perplexity ${interval(sequence.perplexityRatio, change)} by self-distillation, ${interval(other.perplexityRatio, change)} by cross-entropy`,
      verdict(
        sequence.perplexityRatio.value <= other.perplexityRatio.value,
        sequence.perplexityRatio.high <= other.perplexityRatio.low,
      ),
    );
  }
  const { training } = cell('attn', 'sequence') ?? {};
  if (sequence && training) {
    add(
      'keys and values of sequences that skip are not stored',
      'yes',
      `${percent(1 - sequence.keys)} of the bytes saved, counted from the rows that entered`,
      'by construction',
    );
    add(
      'routers are a tiny share of the parameters',
      '0.0008 %',
      `${percent(training.trainableShare, 3)} (${training.trainableParameters}): hidden + 1 for each routed layer, so larger in small models`,
      'form only',
    );
  }
  for (const { target, granularity, rank, loss, speed } of cells) {
    if (!speed || rank > 0 || loss !== 'kl') continue;
    const paper = { attn: ['1.21x', '1.18x'], mlp: ['1.06x', '1.05x'], block: ['1.26x', '1.24x'] }[target];
    for (const { length, prefill, decode } of speed) {
      add(
        `${target} by ${granularity} is faster at prompts of ${length} tokens`,
        paper[granularity === 'sequence' ? 0 : 1],
        `prompt ${interval(prefill, times)}, tokens ${interval(decode, times)}`,
        verdict(prefill.value > 1 && decode.value > 1, prefill.low > 1 && decode.low > 1),
      );
    }
  }
  return claims;
}

function tables({ title, cells }) {
  const row = (cell, at) => {
    const level = levelAt(cell, at);
    if (!level) return [];
    const kl = (method) => {
      const found = levelAt(cell, at, method);
      return found ? nats(found.kl.value) : '';
    };
    return [
      `| ${[
        `${cell.target} by ${cell.granularity}${cell.rank ? `, LoRA of rank ${cell.rank}` : ''}${cell.loss === 'kl' ? '' : ', cross-entropy'}`,
        at,
        percent(level.ratio),
        percent(1 - level.keys),
        interval(level.perplexityRatio, change),
        interval(level.kl, nats),
        kl('random'),
        kl('drop'),
      ].join(' | ')} |`,
    ];
  };
  return [
    `## ${title}`,
    '',
    '| routed | share | FLOPs | keys and values saved | perplexity | KL | random: KL | fixed: KL |',
    '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ...cells.flatMap((cell) => ['even', 'divided'].flatMap((at) => row(cell, at))),
    '',
  ];
}
