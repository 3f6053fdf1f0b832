// Times of prompts and of tokens after them, full beside half, in turns: for a machine that does nothing else.
import { bootstrap } from '../../../dist/infer/quality/statistics.js';

const LENGTHS = [16, 64, 256];
const PROMPTS = 12;
const TOKENS = 16;

/** Time at the even share over the full model's, with intervals over prompts, at every length of prompt. */
export async function measureSpeed(loaded, model, { target, granularity }, { quick }) {
  const half = { spec: { [`${granularity}Capacity`]: { [target]: 0.5 } } };
  const ids = model.heldOut.flatMap((text) => loaded.network.tokenizer.encode(text));
  const run = async (prompt, budget) => {
    const stream = loaded.generate(prompt, { budget, maxTokens: TOKENS, temperature: 0 });
    const { ms } = (await stream.usage).compute;
    return ms;
  };
  const result = [];
  for (const length of quick ? [16] : LENGTHS) {
    const prompts = Array.from({ length: quick ? 2 : PROMPTS }, (_, i) => ids.slice(i * length, (i + 1) * length));
    // Compiles both programs.
    for (const budget of ['full', half]) await run(prompts[0], budget);
    const sums = [];
    for (const prompt of prompts) {
      const [full, routed] = [await run(prompt, 'full'), await run(prompt, half)];
      sums.push({
        ...{ 'full.prefill': full.prefill, 'full.decode': full.decode },
        ...{ 'half.prefill': routed.prefill, 'half.decode': routed.decode },
      });
    }
    const ratio = (what) => bootstrap(sums, (t) => t[`full.${what}`] / t[`half.${what}`], 0);
    result.push({ length, prefill: ratio('prefill'), decode: ratio('decode') });
  }
  return result;
}
