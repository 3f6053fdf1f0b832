// Router-Tuning from the command line: flags or a recipe, training, levels, evaluation, a report, generation.
import { readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { expect, test, vi } from 'vitest';
import { json, quickTraining, run, shipped, workDirectory } from './run.js';

vi.setConfig({ testTimeout: 120_000 });

const policyOf = (dir: string) => JSON.parse(readFileSync(join(dir, 'elastic_config.json'), 'utf8'));

test('attention is skipped by sequence', async () => {
  const work = workDirectory();
  const [plan, trained] = ['plan', 'trained'].map((name) => join(work, name));
  const recipe = resolve(import.meta.dirname, '../../examples/recipes/router-tuning.yaml');
  const made = await run('elastify', shipped, '--recipe', recipe, '--capacity', '0.2:0.8', '--out', plan, '--json');
  expect(json(made)).toMatchObject({ trainableParameters: 4 * 129 });
  expect(policyOf(plan).sequences).toEqual({
    attn: {
      ...{ layers: [3, 4, 5, 6], train: 'top-k', decode: 'threshold', decide_at: 'prefill' },
      train_capacity: [0.2, 0.8],
    },
  });
  const train = ['distill', plan, ...quickTraining(work), '--steps', '4', '--json'];
  expect(await run(...train, '--out', trained)).toMatchObject({ code: 0 });

  const shown = await run('inspect', trained);
  expect(shown.stdout).toContain('attn sequences');
  const [, level] = policyOf(trained).levels as { name: string }[];
  const page = join(work, 'report');
  expect(await run('report', trained, '--data', join(work, 'train.txt'), '--out', page)).toMatchObject({ code: 0 });
  expect(readFileSync(join(page, 'report.html'), 'utf8')).toContain('attention per sequence of 4 layers');
  const generated = json(
    await run('generate', trained, '--prompt', 'We the', '--budget', level.name, '--max-tokens', '4', '--json'),
  );
  const { layersRun } = (generated.usage as { compute: { layersRun: { attn: number[] } } }).compute;
  for (const share of layersRun.attn) expect([0, 1]).toContain(share);
});

test('flags alone make the recipe, and what does not fit is refused', async () => {
  const plan = join(workDirectory(), 'plan');
  const flags = ['--target', 'block', '--granularity', 'token', '--keys', 'all', '--layers', '2,3', '--out', plan];
  expect(await run('elastify', shipped, ...flags)).toMatchObject({ code: 0 });
  expect(policyOf(plan).tokens.block).toMatchObject({ layers: [2, 3], keys: 'all', train_capacity: [0.3, 1] });
  const refused = await run('elastify', shipped, '--target', 'head', '--out', plan);
  expect(refused.code).toBe(2);
  expect(refused.stderr).toContain('attn');
  const both = await run('elastify', shipped, '--target', 'attn', '--mlp', '0.5', '--out', plan);
  expect(both.stderr).toContain("unknown recipe key 'tokens'; router-tuning takes target");
});
