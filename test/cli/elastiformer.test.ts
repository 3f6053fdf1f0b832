// All of ElastiFormer from the command line: recipe, training that is killed and resumed, evaluation, report, generation.
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it, test, vi } from 'vitest';
import { loadModel } from '../../lib/infer/model.js';
import { largestDifference } from '../model/golden.js';
import { json, quickTraining, run, shipped, start, workDirectory } from './run.js';

vi.setConfig({ testTimeout: 120_000, hookTimeout: 120_000 });

const recipe = resolve(import.meta.dirname, '../../examples/recipes/elastiformer.yaml');

describe('all four places with LoRA', async () => {
  const work = workDirectory();
  const [plan, whole, killed] = ['plan', 'whole', 'killed'].map((name) => join(work, name));
  const train = ['distill', plan, ...quickTraining(work), '--steps', '40', '--json'];
  const config = join(work, 'quick.json');
  writeFileSync(config, JSON.stringify({ ...JSON.parse(readFileSync(config, 'utf8')), saveEvery: 5 }));
  expect((await run('elastify', shipped, '--recipe', recipe, '--out', plan)).code).toBe(0);
  expect(await run(...train, '--out', whole)).toMatchObject({ code: 0 });

  it('a training killed with -9 goes on to the same bits', async () => {
    // By its own hand: another process may be late where the machine is busy.
    const saved = JSON.stringify(join(killed, 'checkpoints/step-000010'));
    const module = `import { existsSync } from 'node:fs';
      setInterval(() => existsSync(${saved}) && process.kill(process.pid, 'SIGKILL'), 1);`;
    const options = `NODE_OPTIONS=--import=data:text/javascript,${encodeURIComponent(module)}`;
    expect((await start([...train, '--out', killed], ['env', options]).ended).code).toBe(null);
    expect(existsSync(join(killed, 'elastic_manifest.json'))).toBe(false);
    expect(await run(...train, '--out', killed)).toMatchObject({ code: 0 });
    for (const file of ['elastic_router.safetensors', 'elastic_config.json', 'adapter/adapter_model.safetensors']) {
      expect(readFileSync(join(killed, file)).equals(readFileSync(join(whole, file))), file).toBe(true);
    }
  });

  it('is evaluated at five budgets, reported on, and generates', async () => {
    const heldOut = join(work, 'train.txt');
    const budgets = ['full', '0.9', '0.8', '0.7', '0.6'];
    const evaluated = await run('eval', whole, '--data', heldOut, '--budgets', budgets.join(), '--json');
    expect(evaluated).toMatchObject({ code: 0 });
    const { levels } = json(evaluated) as { levels: { ratio: number }[] };
    expect(levels).toHaveLength(5);
    levels.slice(1).forEach(({ ratio }, i) => {
      expect(ratio).toBeLessThan(levels[i].ratio);
    });
    const page = join(work, 'report');
    expect(await run('report', whole, '--data', heldOut, '--out', page)).toMatchObject({ code: 0 });
    expect(readFileSync(join(page, 'report.html'), 'utf8')).toContain('</html>');
    const made = json(
      await run('generate', whole, '--prompt', 'We the', '--budget', '0.6', '--max-tokens', '8', '--json'),
    );
    expect(made.usage).toMatchObject({ outputTokens: 8 });
    const { ratio } = (made.usage as { compute: { ratio: number } }).compute;
    expect(ratio).toBeLessThan(0.8);
  });

  it('is the backbone at full budget', async () => {
    await using model = await loadModel(whole);
    await using backbone = await loadModel(shipped);
    const ids = [5, 300, 17, 1200, 44];
    expect(await model.logits(ids)).toEqual(await backbone.logits(ids));
  });

  // A Python with transformers and peft, when one is at hand.
  const python = process.env.ELASTIFORM_PYTHON;
  if (python) {
    test('transformers loads the directory, and peft its adapter', async () => {
      const script = fileURLToPath(new URL('../../scripts/golden/peft_logits.py', import.meta.url));
      const ids = [5, 300, 17, 1200, 44];
      const adapter = join(whole, 'adapter');
      const theirs = JSON.parse(execFileSync(python, [script, whole, adapter, ids.join()], { encoding: 'utf8' }));
      await using model = await loadModel(whole, { adapter, dtype: 'f32' });
      expect(largestDifference(await model.logits(ids), theirs as number[])).toBeLessThan(2e-4);
    });
  }
});
