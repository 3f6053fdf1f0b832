// Settings in files: what YAML becomes, errors with file, line and key, and the recipes in examples/.
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { describe, expect, it, vi } from 'vitest';
import { ConfigFile } from '../../lib/cli/config.js';
import { policyOf, type Recipe } from '../../lib/elastic/elastify.js';
import { InvalidArgumentError } from '../../lib/native/errors.js';
import { json, quickTraining, run, shipped, workDirectory } from './run.js';

vi.setConfig({ testTimeout: 120_000, hookTimeout: 120_000 });
const work = workDirectory();
const examples = resolve(import.meta.dirname, '../../examples/recipes');
let files = 0;
function written(text: string): string {
  const path = join(work, `settings-${files++}.yaml`);
  writeFileSync(path, text);
  return path;
}

describe('ConfigFile', () => {
  it('reads YAML and the JSON in it', async () => {
    const yaml = await ConfigFile.read(written('a: 1 # one\nb: [x, 2.5]\nc:\n  d: true\n'), 'config');
    expect(yaml.content).toEqual({ a: 1, b: ['x', 2.5], c: { d: true } });
    const tabbed = await ConfigFile.read(written('{\n\t"a": 1,\n\t"c": {"d": [true, null]}\n}\n'), 'config');
    expect(tabbed.content).toEqual({ a: 1, c: { d: [true, null] } });
  });

  it.each([
    ['a: 1\nb: [1, 2\n', /settings-\d+\.yaml, line [23]: /],
    ['a: 1\nb: 2\na: 3\n', /line 3: Map keys must be unique/],
    ['a: 1\nb: !run x\n', /line 2: Unresolved tag: !run/],
    ['- 1\n', /must hold keys with values/],
    ['', /must hold keys with values/],
    ['a: 1\n---\na: 2\n', /multiple documents/],
    [
      `a: &a [x, x, x]\n${[...'bcdefgh'].map((k, i) => `${k}: &${k} [${`*${'abcdefg'[i]}, `.repeat(9)}]\n`).join('')}`,
      /alias/,
    ],
  ])('refuses %j', async (text, message) => {
    await expect(ConfigFile.read(written(text), 'config')).rejects.toMatchObject({
      code: 'InvalidFile',
      message: expect.stringMatching(message),
    });
  });

  it('names a file that is not there', async () => {
    const read = ConfigFile.read(join(work, 'none.yaml'), 'config');
    await expect(read).rejects.toMatchObject({ code: 'InvalidFile', message: expect.stringContaining('none.yaml') });
  });

  const text =
    'steps: 4\noptimizer:\n  lr: 1\n  betas:\n    - 1\n    - 2\nloss:\n  - kind: kl\n  - { kind: x, power: 2 }\n';
  it.each([
    ['[distill] steps must be a positive integer, got x', [], ', line 1)'],
    ['[distill] optimizer.betas[1] must be in [0, 1)', [], ', line 6)'],
    ['[distill] config.optimizer is wrong', [], ', line 2)'],
    ["[distill] unknown key of a term 'power'", [], ', line 9)'],
    // Two keys have that name.
    ['[distill] kind must be kl', [], '.yaml)'],
    ['[distill] config.kind is missing', [], '.yaml)'],
    // Not the file's doing.
    ['[distill] steps must be less', ['steps'], 'less'],
    ['[distill] optimizer.lr must be less', ['optimizer'], 'less'],
    ['[distill] something else', [], 'else'],
  ])('says where %j comes from', async (message, overridden, end) => {
    const file = await ConfigFile.read(written(text), 'config');
    const error = await file
      .blame(overridden, async () => {
        throw new InvalidArgumentError(message);
      })
      .catch((e) => e);
    expect(error).toBeInstanceOf(InvalidArgumentError);
    expect(error.message.startsWith(message)).toBe(true);
    expect(error.message.endsWith(end)).toBe(true);
  });
});

describe('elastify --recipe', () => {
  const elastify = (text: string, ...flags: string[]) =>
    run('elastify', shipped, '--recipe', written(text), '--out', join(work, 'never'), ...flags);

  it.each([
    ['kind: elastiformer\nlorraine: 8\n', "unknown recipe key 'lorraine'", ', line 2)'],
    ['kind: elastiformer\n\ntokens:\n  attn: 0\n', 'tokens.attn: capacity must be in (0, 1], got 0', ', line 4)'],
    ['kind: elastiformer\ntokens: 5\n', 'tokens must be an object, got 5', ', line 2)'],
    ['kind: elastiformer\nblocks:\n', 'blocks must be an object, got null', ', line 2)'],
    ['kind: elastiformer\nblocks: { count: 7 }\n', 'blocks.count must be an integer from 2 that divides', ', line 2)'],
    ['kind: elastiformer\nlora:\n  rank: 0\n', 'lora.rank must be a positive integer, got 0', ', line 3)'],
    ['kind: elastiformer\nlayers: [0, 99]\n', 'layers must be ids from 0 to', ', line 2)'],
    ['kind: elastiformer\ntokens:\n  head: 1\n', "unknown place 'head'", ', line 3)'],
    ['tokens: {}\n', "recipe.kind must be 'elastiformer', 'matformer' or 'router-tuning', got undefined", '.yaml)'],
  ])('refuses %j with key and line', async (text, message, end) => {
    const { code, stdout, stderr } = await elastify(text);
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
    expect(stderr).toContain(message);
    expect(stderr.trimEnd().endsWith(end)).toBe(true);
  });

  it('takes flags before the file', async () => {
    const out = join(work, 'plan-flags');
    const recipe = written('kind: elastiformer\ntokens: { attn: 7, mlp: 0.5 }\nlayers: even\n');
    const outcome = await run(
      'elastify',
      shipped,
      '-r',
      recipe,
      '--attn',
      '0.25:1',
      '--layers',
      '0',
      '-o',
      out,
      '--json',
    );
    expect(outcome).toMatchObject({ code: 0, stderr: '' });
    expect(JSON.parse(readFileSync(join(out, 'elastic_config.json'), 'utf8')).tokens).toMatchObject({
      attn: { layers: [0], train_capacity: [0.25, 1] },
      mlp: { layers: [0], train_capacity: [0.5, 0.5] },
    });
    // What a flag has set is not blamed on the file.
    const { stderr } = await run('elastify', shipped, '-r', recipe, '--attn', '3', '--out', join(work, 'never'));
    expect(stderr).toMatch(/tokens\.attn: capacity must be in \(0, 1\], got 3\n$/);
  });
});

describe('examples/recipes', () => {
  it('are all tested', () => {
    expect(readdirSync(examples).sort()).toEqual([
      'blocks.yaml',
      'distill.yaml',
      'elastiformer.yaml',
      'heads.yaml',
      'lora.yaml',
      'router-tuning.yaml',
      'tokens.yaml',
    ]);
  });

  it.each([
    ['tokens.yaml', ['attn', 'mlp']],
    ['heads.yaml', ['heads']],
    ['blocks.yaml', ['blocks']],
    ['lora.yaml', ['attn', 'mlp']],
    ['elastiformer.yaml', ['attn', 'mlp', 'heads', 'blocks']],
    ['router-tuning.yaml', ['attn-sequence']],
  ])('%s is a recipe', async (name, axes) => {
    const { content } = await ConfigFile.read(join(examples, name), 'recipe');
    const policy = policyOf(content as unknown as Recipe, {
      layers: 8,
      hidden: 128,
      ffn: 352,
      gated: true,
      heads: 4,
      kvHeads: 2,
    });
    expect(Object.keys(policy.capacity)).toEqual(axes);
    expect(policy.lora?.rank).toBe({ 'lora.yaml': 4, 'elastiformer.yaml': 1 }[name]);
  });

  it('tokens.yaml and distill.yaml train a model; flags come first', async () => {
    const [plan, out] = [join(work, 'example-plan'), join(work, 'example')];
    const made = await run('elastify', shipped, '--recipe', join(examples, 'tokens.yaml'), '--out', plan, '--json');
    expect(made).toMatchObject({ code: 0, stderr: '' });
    const [, , ...quick] = quickTraining(work);
    const flags = [...quick, '--steps', '2', '--held-out', '0.4', '--out', out, '--json'];
    const trained = await run('distill', plan, '--config', join(examples, 'distill.yaml'), ...flags);
    expect(trained.code).toBe(0);
    expect(json(trained)).toMatchObject({ dir: out, step: 2, last: { of: 2 } });
  });

  it('settings of distill are refused with key and line, and what no file can give', async () => {
    const distill = (text: string) =>
      run('distill', join(work, 'plan-flags'), '-c', written(text), '--data', join(work, 'train.txt'), '--out', 'x');
    const expected: [string, string][] = [
      ['steps: 1\noptimizer: 5\n', 'optimizer must be an object, got 5 (settings-'],
      ['steps: 1\noptimizer: { lr: fast }\n', 'optimizer.lr must be a positive number, got fast (settings-'],
      ['steps: 1\nloss: [5]\n', 'loss must be a list of terms, got [5] (settings-'],
      ['steps: 1\nstepz: 2\n', "unknown option 'stepz'"],
      ['steps: 1\ngradCheckpointing: on\n', 'gradCheckpointing must be true or false, got "on" (settings-'],
      ['steps: 1\ndtype: i32\n', 'dtype must be f32, bf16 or f16, got "i32" (settings-'],
    ];
    for (const [text, message] of expected) {
      const { code, stderr } = await distill(text);
      expect({ text, code }).toEqual({ text, code: 1 });
      expect(stderr).toContain(message);
      expect(stderr).toMatch(/, line 2\)\n$/);
    }
    const program = await distill('steps: 1\nsignal: x\n');
    expect(program.code).toBe(2);
    expect(program.stderr).toContain("'signal' is for programs, a file cannot give it");
  });
});
