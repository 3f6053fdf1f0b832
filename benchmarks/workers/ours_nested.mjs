// elastiform's nested feed-forwards: a slice, and calls that change their width.
import { elastify, extract, loadModel } from '../../dist/index.js';
import { loadAddon } from '../../dist/native/index.js';
import { serve } from '../harness/serve.mjs';
import { tokens } from '../model/random.mjs';

let model;
let budget;

const budgetOf = (width) => ({ spec: { ffnWidth: width } });

async function generated(ids, options) {
  const { usage } = await finished(model.generate(ids, { temperature: 0, ...options }));
  return usage.compute.ms;
}

async function finished(stream) {
  await stream.text;
  return { usage: await stream.usage };
}

await serve({
  /** Writes the model with nested feed-forwards of these widths, and the least of them as a checkpoint of its own. */
  async prepare({ dir, widths, nested, extracted }) {
    await elastify(dir, { kind: 'matformer', granularities: [...widths, 1] }, { out: nested });
    if (extracted) await extract(nested, { budget: budgetOf(widths[0]), out: extracted, verify: false });
  },
  /** `width`: what calls run at; null: all that the model has. */
  async load({ dir, threads, width, maxContext }) {
    model = await loadModel(dir, { dtype: 'f32', threads, maxContext });
    budget = width === null ? 'full' : budgetOf(width);
    const { version, isa, threads: used } = loadAddon().info();
    return { version, isa, threads: used };
  },
  async prefill({ prompt }) {
    const ids = [...tokens(prompt, model.info.vocab, 7)];
    return { ms: (await generated(ids, { maxTokens: 1, budget })).prefill };
  },
  /** Milliseconds per token after the first. */
  async decode({ prompt, length }) {
    const ids = [...tokens(prompt, model.info.vocab, 7)];
    return { ms: (await generated(ids, { maxTokens: length, budget })).decode / (length - 1) };
  },
  /** Milliseconds per token, prompts included, of texts whose widths take turns: all at once, or those of one width at a time. */
  async texts({ count, prompt, maxTokens, widths, together }) {
    const generate = async (i) => {
      const ids = [...tokens(prompt, model.info.vocab, 100 + i)];
      return model.generate(ids, { maxTokens, budget: budgetOf(widths[i % widths.length]) }).ids;
    };
    const all = [...Array(count).keys()];
    const groups = together ? [all] : widths.map((_, w) => all.filter((i) => i % widths.length === w));
    const ids = [];
    const start = performance.now();
    for (const group of groups) {
      const texts = await Promise.all(group.map(generate));
      for (const [at, i] of group.entries()) ids[i] = texts[at];
    }
    return { ms: (performance.now() - start) / (count * maxTokens), ids };
  },
  /** Milliseconds per call of one token, and bytes that the calls left allocated; widths take turns, `hold` calls each. */
  async calls({ widths, hold, count }) {
    const id = [...tokens(1, model.info.vocab, 7)];
    const before = JSON.stringify(loadAddon().memory());
    const start = performance.now();
    for (let i = 0; i < count; i++) {
      const width = widths[Math.floor(i / hold) % widths.length];
      await finished(model.generate(id, { maxTokens: 1, budget: budgetOf(width) }));
    }
    const ms = (performance.now() - start) / count;
    return { ms, same: JSON.stringify(loadAddon().memory()) === before };
  },
});
