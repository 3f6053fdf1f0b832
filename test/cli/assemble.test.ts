// Modular encoder-decoder models on the command line: assembled, inspected, and run at budgets.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { modularDirectory } from '../infer/modules.js';
import { readSeq2SeqCases } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';
import { run } from './run.js';

const { sources } = readSeq2SeqCases('bart');
let dir: string;
beforeAll(async () => {
  ({ dir } = await modularDirectory('bart'));
});

describe('assemble', () => {
  it('shows the path, writes what was chosen, and keeps it as a level', async () => {
    const shown = await run('assemble', dir);
    expect(shown.code).toBe(0);
    const lines = shown.stdout.trimEnd().split('\n');
    expect(lines.length).toBe(10);
    expect(lines[0]).toMatch(/encoder +decoder +parameters +FLOPs +expected$/);
    expect(lines[1]).toMatch(/ 0,1,2,3 +0,1,2,3,4,5 +[\d,]+ +100.0 % +1.00x$/);
    const out = join(temporaryDirectory(), 'fast');
    const written = await run('assemble', dir, '--speedup', '1.5', '--out', out, '--save-level', 'fast');
    expect(written.stdout).toMatch(/\n> .* 1\.\d\dx\n/);
    expect(written.stdout).toContain('Saved as level fast');
    expect(written.stdout).toContain('3 greedy texts and their logits are those of the assembly');
    expect(existsSync(join(out, 'model.safetensors'))).toBe(true);
    const args = ['--ids', sources[0].join(), '--json'];
    const texts = [
      await run('generate', dir, ...args, '--budget', 'fast'),
      await run('generate', out, ...args),
      await run('generate', dir, ...args),
    ].map(
      ({ stdout }) => JSON.parse(stdout) as { ids: number[]; usage: { compute: { level: string; ratio: number } } },
    );
    expect(texts[0].ids).toEqual(texts[1].ids);
    expect(texts[0].usage.compute.level).toBe('fast');
    expect(texts[0].usage.compute.ratio).toBeLessThan(texts[2].usage.compute.ratio);
    const inspected = await run('inspect', dir);
    expect(inspected.stdout).toMatch(/modules, decoder +0-1, 2-3, 4-5, 0-2, 3-5, 0-5/);
    expect(inspected.stdout).toMatch(/full +all layers\nfast +encoder=/);
  });

  it('takes parts by name, for what is run and what is shown', async () => {
    const json = JSON.parse((await run('assemble', dir, '--decoder', '0-1,2-3,4-5', '--measure', '--json')).stdout);
    expect(json.chosen.assembly).toEqual({ encoder: ['0', '1', '2', '3'], decoder: ['0-1', '2-3', '4-5'] });
    expect(json.chosen.ms).toBeGreaterThan(0);
    const budget = 'encoder=0,1,2,3;decoder=0-1,2-3,4-5';
    const { stdout } = await run('generate', dir, '--ids', sources[0].join(), '--budget', budget, '--json');
    expect(JSON.parse(stdout).usage.compute.effective).toEqual({ assembly: json.chosen.assembly });
  });

  it('says what is wrong', async () => {
    const failures: [string[], number, string][] = [
      [['assemble', dir, '--decoder', '0-1,4-5'], 1, 'decoder has a gap: layers 2 to 3 are missing before 4-5'],
      [['assemble', dir, '--decoder', '0-1,1,2-3,4-5'], 1, 'has an overlap: 1 comes after layer 1 is covered'],
      [['assemble', dir, '--speedup', '1.5', '--size', '0.5'], 1, 'choose by one of them'],
      [['assemble', dir, '--speedup', 'fast'], 2, '--speedup must be a number'],
      [
        ['generate', dir, '--ids', '5', '--budget', 'encoder=0-3'],
        2,
        'settings must be some of encoder=PARTS;decoder=PARTS',
      ],
      [['generate', dir, '--ids', '5', '--budget', 'ffn=wide'], 2, "mlp=SHARE, got 'ffn=wide'"],
      [['generate', dir, '--ids', '5', '--budget', 'ffn=0.5'], 1, 'no feed-forward of this model is nested'],
      [['assemble', dir, '--width', '0.5'], 1, 'ffnWidth must be absent'],
      [['generate', dir, '--ids', '5', '--budget', '20ms'], 1, `measure here: elastiform assemble ${dir} --record`],
    ];
    for (const [args, code, message] of failures) {
      const outcome = await run(...args);
      expect([outcome.code, outcome.stdout]).toEqual([code, '']);
      expect(outcome.stderr).toContain(message);
    }
    expect((await run('assemble', '--help')).stdout).toContain('elastiform assemble runs/modular --speedup 2');
  });
});
