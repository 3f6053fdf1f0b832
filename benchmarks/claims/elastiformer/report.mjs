// From measured cells to a table of claims: what the paper says, what was measured, and whether it held.

const percent = (x, digits = 1) => `${(x * 100).toFixed(digits)} %`;
const interval = ({ value, low, high }, show) => `${show(value)} [${show(low)}, ${show(high)}]`;
const change = (ratio) => `${ratio >= 1 ? '+' : ''}${((ratio - 1) * 100).toFixed(1)} %`;
const nats = (x) => x.toFixed(4);

/** At most this much more perplexity counts as parity. */
const PARITY = 1.01;

const routedAt = (cell, budget) => cell.levels.find((l) => l.method === 'routed' && l.budget === budget);
const baselineAt = (cell, method, budget) => cell.levels.find((l) => l.method === method && l.budget === budget);

/** Points of a cell: the share of the component's compute saved, and what was measured there. */
function points({ wanted, ...cell }) {
  return wanted.flatMap(({ saved, budget }) => {
    const level = routedAt(cell, budget);
    return level ? [{ saved, budget, level }] : [];
  });
}

/** The most that a place saves with the perplexity at parity: by its value, and by the far end of its interval. */
function atParity(cell) {
  const most = (fits) =>
    Math.max(
      0,
      ...points(cell)
        .filter(({ level }) => fits(level.perplexityRatio))
        .map(({ saved }) => saved),
    );
  return { value: most((r) => r.value <= PARITY), sure: most((r) => r.high <= PARITY) };
}

/**
 * @param results what was measured: cells that were not are absent, and so are the claims about them
 * @returns {{ markdown: string, claims: object[] }}
 */
export function reportOf({ settings, machine, models }) {
  const claims = models.flatMap((model) => claimsOf(model));
  const cells = models.flatMap(({ places, domains }) => [
    ...Object.values(places).map(Object.keys),
    Object.keys(domains),
  ]);
  const missing = models.length * 14 - cells.flat().length;
  const markdown = [
    "# ElastiFormer's claims, measured again",
    '',
    `Every cell trains routers (and corrections) of one model for ${settings.steps} steps of 2048 tokens, and is measured on`,
    `held-out texts of at most ${settings.length} tokens. Perplexities are compared on the same sequences; intervals are 95 %`,
    'bootstraps over sequences. FLOPs are counted by the kernels. Dropping leaves out whole sub-layers of those that the cell',
    'routes, at the same FLOPs. These models have 0.3 to 1.7 million parameters and far less',
    'redundancy than those of the paper (arXiv 2411.15281): what does not hold here may hold there.',
    ...(missing > 0
      ? ['', `Not measured yet: ${missing} of ${models.length * 14} cells; claims about them are left out.`]
      : []),
    '',
    `Machine: ${machine.cpu}, ${machine.availableParallelism} cores. One command: \`npm run claims:elastiformer\`.`,
    '',
    '| model | claim | paper | measured | held |',
    '| --- | --- | --- | --- | --- |',
    ...claims.map((c) => `| ${c.model} | ${c.claim} | ${c.paper} | ${c.measured} | ${c.held} |`),
    '',
    ...models.flatMap((model) => tables(model)),
  ].join('\n');
  return { markdown: `${markdown}\n`, claims };
}

function claimsOf({ name, places, domains }) {
  const claims = [];
  const add = (claim, paper, measured, held) => claims.push({ model: name, claim, paper, measured, held });
  for (const [place, cells] of Object.entries(places)) {
    if (place === 'all four') continue;
    const most = Object.values(cells).map(atParity);
    if (most.length === 0) continue;
    const [plain, lora] = most.map(({ value, sure }) => `${percent(value, 0)} (surely ${percent(sure, 0)})`);
    add(
      `compute of ${place} saved at no more than 1 % of perplexity`,
      '20 to 50 %',
      `${plain}${lora ? `; with LoRA of rank 1 ${lora}` : ''}`,
      verdict(
        most.some(({ value }) => value >= 0.2),
        most.some(({ sure }) => sure >= 0.2),
      ),
    );
  }
  for (const [place, cells] of Object.entries(places)) {
    if (!cells[0] || !cells[1]) continue;
    const pairs = points(cells[0]).flatMap(({ saved, budget, level }) => {
      const with1 = routedAt(cells[1], budget);
      return with1 ? [{ saved, without: level.kl, with: with1.kl }] : [];
    });
    const last = pairs.at(-1);
    if (!last) continue;
    add(
      `LoRA of rank 1 improves ${place}`,
      'yes',
      `KL at ${percent(last.saved, 0)} saved: ${interval(last.without, nats)} without, ${interval(last.with, nats)} with`,
      verdict(last.with.value < last.without.value, last.with.high < last.without.low),
    );
  }
  for (const method of ['random', 'drop']) {
    const what = method === 'random' ? 'random choice' : 'leaving out whole sub-layers';
    for (const [place, cells] of Object.entries(places)) {
      const last = cells[0] && points(cells[0]).at(-1);
      const advantage = last && baselineAt(cells[0], method, last.budget)?.routedAdvantage.kl;
      if (!advantage) continue;
      add(
        `learned ${place} better than ${what}`,
        'yes',
        `KL lower by ${interval(advantage, nats)} at ${percent(last.saved, 0)} saved`,
        verdict(advantage.value > 0, advantage.low > 0),
      );
    }
  }
  const training = places['tokens into the FFN'][0]?.training;
  if (training) {
    add(
      'routers are a tiny share of the parameters',
      'down to 0.00006 %',
      `${percent(training.trainableShare, 3)} (${training.trainableParameters}), one linear router a layer; a share of 1 / hidden of a router's layer, so larger in small models`,
      'form only',
    );
  }
  if (domains.own && domains.other) {
    const at = (domain) => domains[domain].levels.find((l) => l.method === 'routed' && l.budget === 0.8);
    const [own, other] = [at('own'), at('other')];
    const random = domains.own.levels.find((l) => l.method === 'random' && l.budget === 0.8);
    if (own && other && random) {
      const kept = (random.kl.value - other.kl.value) / (random.kl.value - own.kl.value);
      add(
        'routers trained on another domain serve as well',
        'alike',
        `KL at 0.8 of the FLOPs: ${interval(own.kl, nats)} trained on its own texts, ${interval(other.kl, nats)} on Shakespeare, ${interval(random.kl, nats)} at random: ${percent(kept, 0)} of the gain over random kept`,
        verdict(kept >= 0.8, kept >= 0.8 && other.kl.high < random.kl.low),
      );
    }
  }
  return claims;
}

const verdict = (value, sure) => (sure ? 'held' : value ? 'held, within noise' : 'not held');

function tables({ title, places }) {
  return [
    `## ${title}`,
    '',
    '| place | saved of its compute | FLOPs | perplexity | KL | with LoRA: perplexity | KL | random: KL | dropping: KL |',
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ...Object.entries(places).flatMap(([place, cells]) =>
      (cells[0] ? points(cells[0]) : []).map(({ saved, budget, level }) => {
        const lora = cells[1] && routedAt(cells[1], budget);
        const kl = (method) => {
          const found = baselineAt(cells[0], method, budget);
          return found ? nats(found.kl.value) : '';
        };
        return `| ${[
          place,
          percent(saved, 0),
          percent(level.ratio),
          interval(level.perplexityRatio, change),
          nats(level.kl.value),
          lora ? interval(lora.perplexityRatio, change) : '',
          lora ? nats(lora.kl.value) : '',
          kl('random'),
          kl('drop'),
        ].join(' | ')} |`;
      }),
    ),
    '',
  ];
}
