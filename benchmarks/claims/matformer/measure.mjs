// What a family of models says of texts: losses, agreement with its largest, and tokens that a small one drafts for it.
import { mixAndMatch } from '../../../dist/elastic/nested.js';
import { loadModel } from '../../../dist/index.js';
import { budgetDims, budgetSelector, compileLogits, packedDims } from '../../../dist/infer/programs.js';

/** A model, or a slice of one, as a function of token ids: logits f32 [tokens, vocab]. */
function predictor(model, widths, length) {
  const { network } = model;
  const point = model.resolve(widths === null ? 'full' : { spec: { ffnWidth: widths } });
  const select = (graph, _rows, segments) => budgetSelector(graph, network, point, segments);
  const program = compileLogits(network, { rows: length, segments: 1 }, select);
  return {
    async logits(ids) {
      const batch = {
        ids: Int32Array.from(ids),
        positions: Int32Array.from(ids, (_, i) => i),
        offsets: Int32Array.of(0, ids.length),
      };
      const { outputs } = await program.run({
        dims: { ...packedDims(batch), ...budgetDims(network, point) },
        feeds: batch,
      });
      return outputs.logits;
    },
    [Symbol.dispose]: () => program.dispose(),
  };
}

/** Log-probabilities, f64 [vocab], of row `i` of logits, and which is most likely. */
function distribution(logits, i, vocab) {
  const row = Float64Array.from(logits.subarray(i * vocab, (i + 1) * vocab));
  let best = 0;
  for (let v = 1; v < vocab; v++) if (row[v] > row[best]) best = v;
  const max = row[best];
  let sum = 0;
  for (let v = 0; v < vocab; v++) sum += Math.exp(row[v] - max);
  const log = max + Math.log(sum);
  for (let v = 0; v < vocab; v++) row[v] -= log;
  return { log: row, best };
}

/**
 * Sums over the tokens of one sequence: n; ce, the cross-entropy; and of the distributions of a model and of the largest of
 * its family kl, in nats, agree (1 where the most likely token is the same) and overlap (the sum of the lesser
 * probabilities, which is how often speculative sampling accepts: arXiv 2302.01318).
 */
export function compared(logits, reference, ids, vocab) {
  const sums = { n: 0, ce: 0, kl: 0, agree: 0, overlap: 0 };
  for (let i = 0; i + 1 < ids.length; i++) {
    const [p, q] = [distribution(reference, i, vocab), distribution(logits, i, vocab)];
    sums.n++;
    sums.ce -= q.log[ids[i + 1]];
    sums.agree += p.best === q.best ? 1 : 0;
    for (let v = 0; v < vocab; v++) {
      const [a, b] = [Math.exp(p.log[v]), Math.exp(q.log[v])];
      sums.kl += a * (p.log[v] - q.log[v]);
      sums.overlap += Math.min(a, b);
    }
  }
  return sums;
}

/**
 * Greedy speculative decoding of a text whose every token is known, by which of them the draft would have chosen after those
 * before: what is drafted after a wrong token is rejected with it, so this says all. The draft has keys and values of its own.
 *
 * @param right one for each token: whether the draft chooses it; the first comes from the prompt and is not drafted
 * @param count tokens drafted at a time
 */
export function draftedBy(right, count) {
  const sums = { drafted: 0, accepted: 0, cycles: 0, tokens: right.length };
  for (let at = 1; at < right.length; sums.cycles++) {
    const tokens = Math.min(count, right.length - at - 1);
    let accepted = 0;
    while (accepted < tokens && right[at + accepted]) accepted++;
    sums.drafted += tokens;
    sums.accepted += accepted;
    at += accepted + 1;
  }
  return sums;
}

/** Loads models, uses them, and lets go of them. */
async function withModels(dirs, use) {
  const models = [];
  try {
    for (const dir of dirs) models.push(await loadModel(dir));
    return await use(models);
  } finally {
    for (const model of models) await model.dispose();
  }
}

/**
 * A family of models on held-out texts: slices of one (all of Mix'n'Match's ladder, or the granularities), or models of their
 * own, the largest last.
 *
 * @param dirs one, or one for each granularity
 * @param settings sequenceLength, draftTokens, generated
 * @returns points, ascending: `widths` (null: a model of its own), `parameters`, and `sequences`, the sums of each;
 * `drafts` of the smallest for the largest, with a cache of its own, and of a slice `shared`, on the common caches: the sums of
 * each prompt
 */
export function measureFamily(dirs, { heldOut, prompts, granularities, ladder, settings }) {
  return withModels(dirs, async (models) => {
    const { tokenizer, spec, policy } = models.at(-1).network;
    const { vocab, layers, ffn } = spec;
    const { sequenceLength, draftTokens, generated, promptLength } = settings;
    const nested = policy?.nested;
    const slices =
      nested && (ladder ? mixAndMatch(nested, layers, ffn) : granularities.map((g) => Array(layers).fill(g * ffn)));
    const wanted = slices
      ? slices.map((widths) => ({ model: models[0], widths }))
      : models.map((model) => ({ model, widths: null }));
    const predictors = wanted.map(({ model, widths }) =>
      predictor(model, widths?.every((units) => units === ffn) ? null : widths, sequenceLength + 1),
    );
    try {
      const points = wanted.map(({ model, widths }) => {
        const unused = widths ? widths.reduce((sum, units) => sum + ffn - units, 0) * 3 * spec.hidden : 0;
        return { widths, parameters: model.info.parameters - unused, sequences: [] };
      });
      for (const text of heldOut) {
        const ids = tokenizer.encode(text).slice(0, sequenceLength + 1);
        const reference = await predictors.at(-1).logits(ids);
        for (const [i, { logits }] of predictors.entries()) {
          points[i].sequences.push(compared(await logits(ids), reference, ids, vocab));
        }
      }
      if (!ladder && nested) return { points };

      const [small, large] = [predictors[0], models.at(-1)];
      const [drafts, shared] = [[], []];
      for (const prompt of prompts) {
        const start = tokenizer.encode(prompt).slice(0, promptLength);
        const text = await large.generate(start, { maxTokens: generated }).ids;
        const logits = await small.logits([...start, ...text]);
        const right = [...text].map((id, i) => distribution(logits, start.length + i - 1, vocab).best === id);
        drafts.push(draftedBy(right, draftTokens));
        if (!nested) continue;
        shared.push(await draftedOnCaches(large, start, text, { generated, draftTokens, share: granularities[0] }));
      }
      return { points, drafts, ...(nested && { shared }) };
    } finally {
      for (const one of predictors) one[Symbol.dispose]();
    }
  });
}

/**
 * The engine's own speculative decoding with a slice as the draft, which reads the keys and values that the whole model wrote.
 * The text must be that of plain decoding.
 */
async function draftedOnCaches(model, start, text, { generated, draftTokens, share }) {
  const speculative = { draft: { spec: { ffnWidth: share } }, tokens: draftTokens };
  const stream = model.generate(start, { maxTokens: generated, speculative });
  if ((await stream.ids).join() !== [...text].join()) throw new Error('claims: drafts changed the text');
  const { drafted, accepted } = (await stream.usage).compute.speculative;
  // The first token comes from the prompt, and each run gives one more than it accepts.
  return { drafted, accepted, cycles: text.length - 1 - accepted, tokens: text.length };
}
