// classify and embed from outside: arguments and files, lines in order, bad rows, what is cut, and commands that are for decoders.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it, vi } from 'vitest';
import { loadModel } from '../../lib/infer/model.js';
import { exitClassifier } from '../infer/exits.js';
import { encoderDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';
import { json, run, shipped } from './run.js';

vi.setConfig({ testTimeout: 120_000 });
const work = temporaryDirectory();
const classes = encoderDirectory('bert-classes');
const minilm = encoderDirectory('minilm');
const long = 'the cat '.repeat(30);
const lines = (text: string): Record<string, never>[] =>
  text
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));

const text = join(work, 'text.txt');
writeFileSync(text, 'the cat');
const rows = join(work, 'rows.jsonl');
writeFileSync(
  rows,
  [
    JSON.stringify({ text: 'a cat' }),
    JSON.stringify({ text: '' }),
    JSON.stringify({ text: 'a dog', pair: 'the cat' }),
    'nope',
    '{"tex":1}',
    '',
    JSON.stringify({ text: 'a dog', pair: 7 }),
    JSON.stringify({ text: long }),
  ].join('\r\n'),
);

describe('classify', () => {
  it('has what the API says of texts, as lines and as one object', async () => {
    const texts = ['The cat walks.', 'a dog'];
    await using model = await loadModel(classes);
    const expected = (await model.classify(texts)).map(({ label, score, scores, truncated, compute }, i) => ({
      ...{ line: i + 1, label, score, truncated, compute: { flops: compute.flops, ratio: 1 } },
      scores: Object.fromEntries(scores.map(({ label, score }) => [label, score])),
    }));
    const [plain, object] = await Promise.all([
      run('classify', classes, ...texts),
      run('classify', classes, ...texts, '--json'),
    ]);
    expect(plain).toMatchObject({ code: 0, stderr: '' });
    expect(lines(plain.stdout)).toEqual(expected);
    expect(json(object)).toMatchObject({ rows: 2, bad: 0, truncated: 0, badRows: [], ratio: 1, results: expected });
  });

  it('of a file stops at a bad row, or leaves it out and says so once', async () => {
    const out = join(work, 'classes.jsonl');
    const [stopped, skipped, object] = await Promise.all([
      run('classify', classes, '--data', rows),
      run('classify', classes, '--data', rows, '--bad-rows', 'skip', '--batch', '2'),
      run('classify', classes, '--data', rows, '--bad-rows', 'skip', '--out', out, '--json'),
    ]);
    expect(stopped).toEqual({
      ...{ code: 1, stdout: '' },
      stderr: `elastiform: [classify] ${rows}:2 has an empty text in field 'text'; --bad-rows skip goes on\n`,
    });
    expect(skipped.code).toBe(0);
    expect(lines(skipped.stdout).map(({ line }) => line)).toEqual([1, 3, 8]);
    expect(skipped.stderr).toBe(
      `1 of 3 texts are longer than 24 tokens and were cut\n5 bad rows left out: line 2 has an empty text in field 'text', ` +
        `4 is not JSON, 5 has no text in field 'text', 6 is empty, 7 has no text in field 'pair'\n`,
    );
    expect(json(object)).toMatchObject({
      rows: 3,
      bad: 5,
      truncated: 1,
      badRows: [{ line: 2 }, {}, {}, {}, { line: 7 }],
      out,
    });
    expect(readFileSync(out, 'utf8')).toBe(skipped.stdout);
    await using model = await loadModel(classes);
    const results = await model.classify(['a cat', ['a dog', 'the cat'], long]);
    expect(lines(skipped.stdout).map(({ score }) => score)).toEqual(results.map(({ score }) => score));
  });

  it('reads files longer than what is read at a time, and leaves nothing of one that fails', async () => {
    const file = join(work, 'many.txt');
    const texts = Array.from({ length: 4000 }, (_, i) => `the cat saw the café ${'dog '.repeat(i % 5)}`);
    writeFileSync(file, `${texts.join('\n')}\n`);
    const outcome = await run('classify', classes, '--data', file);
    expect(outcome.code).toBe(0);
    expect(outcome.stderr).toMatch(/^classify \d+\/\d+ {2}KiB {2}512 rows/);
    expect(lines(outcome.stdout).map(({ line }) => line)).toEqual(texts.map((_, i) => i + 1));
    const out = join(work, 'none.jsonl');
    writeFileSync(file, Buffer.concat([Buffer.from(texts.join('\n')), Buffer.from([0xff])]));
    const broken = await run('classify', classes, '--data', file, '--out', out);
    expect(broken).toMatchObject({ code: 1, stdout: '' });
    expect(broken.stderr).toContain(`[files] cannot read ${file} as UTF-8 text`);
    expect(() => readFileSync(out)).toThrow('ENOENT');
  });
});

it('embed has the vectors of the API', async () => {
  const texts = ['The cat walks.', long];
  const outcome = await run('embed', minilm, ...texts, '--dims', '4', '--pooling', 'cls', '--normalize');
  expect(outcome).toMatchObject({ code: 0, stderr: '1 of 2 texts are longer than 16 tokens and were cut\n' });
  await using model = await loadModel(minilm);
  const asked = { dims: 4, pooling: 'cls', normalize: true } as const;
  const { vectors, spaceId, truncated, compute } = await model.embed(texts, asked);
  const costs = compute.map(({ flops, ratio }) => ({ flops, ratio }));
  expect(lines(outcome.stdout)).toEqual(
    vectors.map((vector, i) => ({
      line: i + 1,
      vector: [...vector],
      spaceId,
      truncated: truncated[i],
      compute: costs[i],
    })),
  );
});

it('texts beyond the context are read in windows where that is asked, and said once', async () => {
  const outcome = await run('embed', minilm, 'The cat walks.', long, '--windows', '4');
  expect(outcome).toMatchObject({
    code: 0,
    stderr: '1 of 2 texts are longer than 16 tokens and were read in windows\n',
  });
  await using model = await loadModel(minilm);
  const { vectors, windows } = await model.embed(['The cat walks.', long], { windows: { overlap: 4 } });
  expect(windows[1]).toBeGreaterThan(1);
  expect(lines(outcome.stdout)).toMatchObject(
    vectors.map((vector, i) => ({ vector: [...vector], windows: windows[i], truncated: 0 })),
  );
  const object = json(await run('classify', classes, long, long, '--windows', '0', '--json'));
  expect(object).toMatchObject({ rows: 2, truncated: 0, windowed: 2 });
  expect((await run('classify', classes, long, '--windows', '13')).stderr).toContain('windows must be { overlap }');
});

it('a nested encoder runs at any width', async () => {
  const out = join(work, 'nested');
  const plan = await run(
    'elastify',
    minilm,
    '--nested',
    '0.2,0.5,1',
    '--rank',
    'activation',
    '--data',
    text,
    '--out',
    out,
  );
  expect(plan).toMatchObject({
    code: 0,
    stdout: `${out}: runs at any width. Try one: elastiform embed ${out} TEXT --budget 0.8\n`,
  });
  const narrow = json(await run('embed', out, 'the cat', '--budget', 'ffn20', '--json'));
  await using model = await loadModel(out);
  const { vectors, usage } = await model.embed('the cat', { budget: 'ffn20' });
  expect(narrow).toMatchObject({ ratio: usage.compute.ratio, results: [{ vector: [...vectors[0]] }] });
  expect((await run('inspect', out)).stdout).toMatch(/nested at 20.*\n[\s\S]*ffn20 +\d+\.\d % +20/);
});

it('inspect says what an encoder is for', async () => {
  const outcome = await run('inspect', classes, '--json');
  expect(json(outcome)).toMatchObject({
    ...{ task: 'sequence-classification', architecture: 'bert', labels: ['bad', 'fair', 'good'], maxContext: 24 },
    ...{ pooling: 'mean', normalize: false, tokenizer: { vocab: 90 } },
  });
  expect((await run('inspect', minilm)).stdout).toContain('mean of the features, normalised');
});

describe('exits', () => {
  const texts = Array.from(
    { length: 80 },
    (_, i) => `${['a cat', 'the lake', 'seldom'][i % 3]} ${'saw '.repeat(i % 7)}`,
  );
  const labelled = join(work, 'labelled.tsv');
  writeFileSync(labelled, 'sentence\tlabel\na cat\tbad\n');
  const make = async () => {
    const dir = await exitClassifier();
    await using model = await loadModel(dir);
    const full = await model.classify(texts);
    const table = full.map(({ label }, i) => `${texts[i]}\t${label}`);
    writeFileSync(labelled, ['sentence\tlabel', ...table].join('\n'));
    return dir;
  };

  it('are calibrated to levels, by which texts are told apart, row by row what they cost', async () => {
    const dir = await make();
    const calibrated = json(
      await run('calibrate', dir, '--data', labelled, '--compute', '0.5,0.8', '--quality', '0.6', '--json'),
    );
    expect(calibrated).toMatchObject({ texts: 80, accuracy: { value: 1 }, bad: { count: 0 } });
    const [inspected, table] = [await run('inspect', dir), await run('calibrate', dir, '--data', labelled)];
    expect(inspected.stdout).toContain('exits after layers 0, 1, 2, 3');
    expect(inspected.stdout).toMatch(/exit50 +\d+\.\d % +entropy:/);
    // Default: a quality that 80 texts cannot show.
    expect(table).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('quality 0.98 cannot be shown on 80 texts'),
    });
    const file = join(work, 'texts.txt');
    writeFileSync(file, texts.join('\n'));
    expect((await run('profile', dir)).stderr).toContain('give --data');
    const timed = json(await run('profile', dir, '--data', file, '--context', '4,8', '--json'));
    expect(timed).toMatchObject({ lengths: [4, 8], levels: [{ level: 'full', spec: {} }, {}, {}, {}] });
    expect((await run('classify', dir, 'a cat', '--budget', '100000ms')).stdout).toContain('"ratio":1}');
    const outcome = await run('classify', dir, '--data', file, '--budget', 'exit50', '--batch', '16');
    await using model = await loadModel(dir);
    const expected = await model.classify(texts, { budget: 'exit50' });
    expect(lines(outcome.stdout).map(({ label, compute }) => ({ label, compute }))).toEqual(
      expected.map(({ label, compute: { flops, ratio, exitLayer } }) => ({
        label,
        compute: { flops, ratio, exitLayer },
      })),
    );
    const own = json(await run('classify', dir, ...texts.slice(0, 4), '--exit', 'patience:1:1', '--json'));
    const { exitLayer } = (await model.classify(texts, { exit: { rule: 'patience', threshold: 1, minLayer: 1 } }))[0]
      .compute;
    expect(own.results).toMatchObject([{ compute: { exitLayer } }, {}, {}, {}]);
    expect(own.ratio).toBe((own.flops as number) / (own.flopsFull as number));
    const never = await run('classify', dir, 'a cat', '--exit', 'entropy:0');
    expect(never.stderr).toContain('no text can leave at an exit');
  });

  it.each<[string[], string, number]>([
    [['classify', classes, 'a', '--exit', 'entropy'], '--exit must be RULE:THRESHOLD', 2],
    [['classify', classes, 'a', '--exit', 'luck:1'], '--exit must be RULE:THRESHOLD', 2],
    [['classify', classes, 'a', '--exit', 'own'], 'exit must be absent: the model has no exits', 1],
    [['classify', classes, 'a', '--budget', '2'], 'a budget must be in (0, 1], full or a level', 2],
    [['embed', minilm, 'a', '--budget', 'half'], 'has the full budget alone', 1],
    [['calibrate', classes, '--data', labelled], 'has no exits at all', 1],
    [['calibrate', classes], 'data is missing: give --data', 2],
    [['calibrate', classes, '--data', labelled, '--compute', '2'], '--compute must be shares in (0, 1)', 2],
  ])('%j is one line', async (args, message, code) => {
    const outcome = await run(...args);
    expect(outcome).toMatchObject({ code, stdout: '' });
    expect(outcome.stderr).toContain(message);
    expect(outcome.stderr.match(/\n/g)).toHaveLength(1);
  });
});

describe('what does not fit is one line', () => {
  it.concurrent.each<[string[], string, number]>([
    [['generate', classes], 'is an encoder (bert, sequence-classification), and this needs a decoder', 1],
    [['eval', classes, '--data', text], 'is an encoder (bert, sequence-classification), and this needs a decoder', 1],
    [
      ['elastify', classes, '--out', join(work, 'x')],
      'is an encoder: it has exits and nested feed-forwards, and no routers',
      1,
    ],
    [['classify', shipped, 'a'], 'is a decoder (llama, causal-lm), and this needs an encoder', 1],
    [['classify', minilm, 'a'], 'has no classifier: it is a bert model for feature-extraction', 1],
    [['classify', classes], 'takes texts as arguments, or --data FILE', 2],
    [['classify', classes, 'a', '--data', text], 'takes texts as arguments, or --data FILE', 2],
    [['classify'], 'classify takes <model> [text...], got none', 2],
    [['classify', classes, ''], 'argument:1 is empty; --bad-rows skip goes on', 1],
    [['classify', classes, 'a', '--bad-rows', 'fix'], '--bad-rows must be one of stop, skip', 2],
    [['classify', classes, '--data', join(work, 'absent')], 'cannot read', 1],
    [['embed', minilm, 'a', '--dims', '25'], '[embed] dims must be an integer from 1 to 24, got 25', 1],
  ])('%j', async (args, message, code) => {
    const outcome = await run(...args);
    expect(outcome).toMatchObject({ code, stdout: '' });
    expect(outcome.stderr).toContain(message);
    expect(outcome.stderr.match(/\n/g)).toHaveLength(1);
  });
});
