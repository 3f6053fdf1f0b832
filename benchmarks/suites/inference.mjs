// Prefill and decode of the whole model, against every peer, after checking that all compute the same logits.
import { decode, largestDifference, logSoftmax } from '../harness/compare.mjs';
import { roundRobin, warmUp } from '../harness/measure.mjs';
import { milliseconds, number, table, target } from '../harness/report.mjs';
import { tokens } from '../model/random.mjs';
import { SHAPE } from '../model/shape.mjs';

const PROMPT = 512;
const STEPS = 16;
// Differences that rounding of the stored weights or of the KV cache explains; anything above is a bug, not noise.
const TOLERANCE = { 'elastiform bf16': 0.1, 'node-llama-cpp': 0.02 };
const DEFAULT_TOLERANCE = 1e-3;

export async function inference({ start, peers, threads, rounds, repeats, dir, log }) {
  const ids = [...tokens(PROMPT + STEPS, SHAPE.vocab, 7)];
  const text = { prompt: ids.slice(0, PROMPT), next: ids.slice(PROMPT) };
  const children = {};
  try {
    const libraries = {};
    const join = async (name, file, options, args = {}) => {
      log(`inference: loading ${name}`);
      children[name] = start(name, file, options);
      libraries[name] = await children[name].ask('load', { dir, threads, ...args });
    };
    await join('elastiform', 'ours.mjs', {}, { dtype: 'f32' });
    await join('elastiform bf16', 'ours.mjs', {}, { dtype: 'bf16' });
    for (const [name, peer] of Object.entries(peers)) {
      if (!peer.file) continue;
      try {
        await join(name, peer.file, peer.options);
      } catch (error) {
        log(`${name} does not load and will not be compared: ${error.message}`);
        libraries[name] = { error: error.message };
        await children[name].stop();
        delete children[name];
      }
    }

    log('inference: comparing logits');
    const logits = {};
    for (const [name, child] of Object.entries(children)) {
      const { prefill, decode: decoded } = await child.ask('logits', text);
      logits[name] = [prefill, decoded].map((values) => logSoftmax(decode(values)));
    }
    const agreement = {};
    for (const [name, [prefill, decoded]] of Object.entries(logits)) {
      if (name === 'elastiform') continue;
      agreement[name] = {
        prefill: largestDifference(prefill, logits.elastiform[0]),
        decode: largestDifference(decoded, logits.elastiform[1]),
      };
      const worst = Math.max(agreement[name].prefill, agreement[name].decode);
      if (!(worst <= (TOLERANCE[name] ?? DEFAULT_TOLERANCE))) {
        throw new Error(`${name} computes something else: log-probabilities differ by ${worst}`);
      }
    }

    const data = { prompt: PROMPT, steps: STEPS, agreement };
    for (const phase of ['prefill', 'decode']) {
      const args = phase === 'prefill' ? { prompt: text.prompt } : text;
      const contestants = Object.entries(children).map(([key, child]) => ({ key, child, command: phase, args }));
      log(`inference: warming up ${phase}`);
      await warmUp(contestants);
      log(`inference: ${phase}`);
      data[phase] = await roundRobin(contestants, { rounds, repeats });
    }

    const ratio = (phase, name, to = 'elastiform') =>
      data[phase]?.[name] && data[phase][to] ? data[phase][name].median / data[phase][to].median : null;
    const fastest = (phase, names) => {
      const ratios = names.map((name) => ratio(phase, name)).filter((r) => r !== null);
      return ratios.length ? Math.min(...ratios) : null;
    };
    const parts = [
      table(
        ['compared with ours f32', 'prefill', `decode, step ${STEPS}`],
        Object.entries(agreement).map(([name, a]) => [name, a.prefill.toExponential(1), a.decode.toExponential(1)]),
      ),
    ];
    const targets = [];
    if (data.prefill) {
      const rows = Object.entries(data.prefill).map(([name, t]) => [
        name,
        milliseconds(t),
        number((1000 * PROMPT) / t.median, 0),
        number(ratio('prefill', name), 2),
      ]);
      parts.push(table([`prefill of ${PROMPT}`, 'ms: median (range)', 'tokens/s', 'its time / ours f32'], rows));
      targets.push(
        target('prefill over onnxruntime-node', 1.2, ratio('prefill', 'onnxruntime-node')),
        target('prefill over torch eager', 1.25, ratio('prefill', 'torch')),
      );
    }
    if (data.decode) {
      const rows = Object.entries(data.decode).map(([name, t]) => [
        name,
        milliseconds(t),
        number(1000 / t.median, 1),
        number(ratio('decode', name), 2),
      ]);
      parts.push(
        table([`decode after ${PROMPT}`, 'ms/token: median (range)', 'tokens/s', 'its time / ours f32'], rows),
      );
      targets.push(
        target(
          'f32 decode over the fastest f32 peer',
          1.2,
          fastest('decode', ['onnxruntime-node', 'node-llama-cpp', 'torch']),
        ),
        target('bf16 decode over our f32 decode', 1.6, ratio('decode', 'elastiform', 'elastiform bf16')),
      );
    }
    parts[0] = `Largest difference of log-probabilities, all ${SHAPE.vocab} of the last token:\n\n${parts[0]}`;
    return { libraries, data, text: parts.join('\n\n'), targets };
  } finally {
    for (const child of Object.values(children)) await child.stop();
  }
}
