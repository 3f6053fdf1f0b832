// Texts written by an encoder-decoder model of OPUS-MT's shape: for one source, for eight at a time, and by four beams.
import fs from 'node:fs';
import path from 'node:path';
import { roundRobin, warmUp } from '../harness/measure.mjs';
import { milliseconds, number, table, target } from '../harness/report.mjs';
import { tokens } from '../model/random.mjs';
import { SEQ2SEQ, writeSeq2Seq } from '../model/seq2seq.mjs';

const LENGTH = 64;
const WRITTEN = 64;
const CASES = { 'one source': [1, 1], 'eight sources': [8, 1], 'one source, four beams': [1, 4] };

export async function seq2seq({ start, peers, threads, rounds, repeats, quick, cache, log }) {
  const dir = path.join(cache, `seq2seq-${process.pid}`);
  const maxTokens = quick ? 4 : WRITTEN;
  const children = {};
  const libraries = {};
  const data = { model: SEQ2SEQ, length: LENGTH, written: maxTokens, times: {} };
  try {
    log('seq2seq: writing the model');
    writeSeq2Seq(dir);
    children.elastiform = start('elastiform', 'ours_seq2seq.mjs');
    libraries.elastiform = await children.elastiform.ask('load', { dir, threads });
    if (peers.torch.file) {
      const child = start('transformers', 'transformers_seq2seq.py', peers.torch.options);
      try {
        libraries.transformers = await child.ask('load', { dir, threads });
        children.transformers = child;
      } catch (error) {
        log(`seq2seq: transformers left out: ${error.message.split('\n')[0]}`);
        await child.stop();
      }
    }
    const rows = [];
    const targets = [];
    for (const [name, [count, beams]] of Object.entries(CASES)) {
      const sources = Array.from({ length: count }, (_, i) => [...tokens(LENGTH, SEQ2SEQ.vocab - 1, 11 + i)]);
      const args = { sources, maxTokens, beams };
      log(`seq2seq: comparing, ${name}`);
      const texts = {};
      for (const [library, child] of Object.entries(children)) texts[library] = await child.ask('texts', args);
      for (const [library, written] of Object.entries(texts)) {
        if (JSON.stringify(written) !== JSON.stringify(texts.elastiform))
          throw new Error(`${library} writes other texts, ${name}`);
      }
      if (texts.elastiform.some((ids) => ids.length !== maxTokens)) throw new Error(`a text ended early, ${name}`);
      const contestants = Object.entries(children).map(([key, child]) => ({ key, child, command: 'generate', args }));
      await warmUp(contestants);
      log(`seq2seq: timing, ${name}`);
      const times = await roundRobin(contestants, { rounds, repeats });
      data.times[name] = times;
      for (const [library, time] of Object.entries(times)) {
        const ratio = time.median / times.elastiform.median;
        rows.push([
          name,
          library,
          milliseconds(time),
          number((1000 * count * maxTokens) / time.median, 0),
          number(ratio, 2),
        ]);
      }
      const over = times.transformers ? times.transformers.median / times.elastiform.median : null;
      targets.push(target(`an encoder-decoder model over transformers' torch, ${name}`, 1.2, over));
    }
    return {
      libraries,
      data,
      text: table(
        ['', `${LENGTH} tokens in, ${maxTokens} out`, 'ms: median (range)', 'tokens/s', 'its time / ours'],
        rows,
      ),
      targets,
    };
  } finally {
    for (const child of Object.values(children)) await child.stop();
    fs.rmSync(dir, { recursive: true, force: true });
  }
}
