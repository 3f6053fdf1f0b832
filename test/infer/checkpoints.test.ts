// Generation from real checkpoints, against what their authors or transformers recorded.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { loadModel } from '../../lib/infer/model.js';
import { data } from './fixture.js';

test.skipIf(!data)('stories260K: the greedy tokens of transformers', async () => {
  const dir = join(data!, 'stories260K-llama');
  const reference = JSON.parse(readFileSync(join(dir, 'reference.json'), 'utf8'));
  await using model = await loadModel(dir);
  const prompt = model.network.tokenizer!.encode(reference.prompt);
  expect(prompt).toEqual(reference.input_ids);
  const wanted = reference.greedy_ids.slice(prompt.length);
  expect(await model.generate(reference.prompt, { maxTokens: wanted.length }).ids).toEqual(wanted);
  expect((await model.generate('', { maxTokens: 200 }).text).trim()).toBe(reference.greedy_from_bos_200.trim());
});

test.skipIf(!data)('gpt2-nano-sort sorts every input', async () => {
  await using model = await loadModel(join(data!, 'gpt2-nano-sort'));
  for (let n = 0; n < 729; n += 7) {
    const input = Array.from({ length: 6 }, (_, i) => Math.floor(n / 3 ** i) % 3);
    expect(await model.generate(input, { maxTokens: 6 }).ids).toEqual(input.toSorted());
  }
  // 11 positions: 6 of the input and 5 of the output; the last token needs none.
  expect((await model.generate([0, 1, 2, 0, 1, 2], { maxTokens: 100 }).ids).length).toBe(6);
  expect(() => model.generate([])).toThrow(/neither a BOS nor an EOS/);
  expect(() => model.generate('ABC')).toThrow(/tokenizer/);
});
