// `elastiform report` from outside: the page and its data, with and without a text, and what it refuses.
import { chmodSync, cpSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it, vi } from 'vitest';
import type { ReportData } from '../../lib/report/index.js';
import { json, quickTraining, run, shipped, start, workDirectory } from './run.js';

vi.setConfig({ testTimeout: 120_000, hookTimeout: 120_000 });
const work = workDirectory();
const text = join(work, 'train.txt');
const plan = join(work, 'plan');
const trained = join(work, 'run');
const measured = ['--data', text, '--limit', '300', '--sequence-length', '64'];

beforeAll(async () => {
  const axes = ['--attn', '0.3:1', '--mlp', '0.3:1', '--blocks', '4'];
  expect(await run('elastify', shipped, ...axes, '--out', plan)).toMatchObject({ code: 0 });
  const flags = ['--held-out', '0.3', '--steps', '4', '--out', trained];
  expect(await run('distill', plan, ...quickTraining(work), ...flags)).toMatchObject({ code: 0 });
});

/** The text that the tokens of a sample show. */
const tokensOf = ({ trace }: ReportData['samples'][number]): string => trace.tokens.join('');

describe('with a text', () => {
  const out = join(work, 'report');
  let report: ReportData;
  beforeAll(async () => {
    const outcome = await run('report', trained, ...measured, '--budgets', '0.8,p60', '--out', out, '--json');
    expect(outcome.code).toBe(0);
    expect(outcome.stderr).toMatch(/^evaluate 1\/\d+ {2}full model/);
    report = json(outcome) as unknown as ReportData;
  });

  it('writes page, data, chart and CSV as one directory', () => {
    expect(readdirSync(out).sort()).toEqual(['chart.svg', 'levels.csv', 'report.html', 'report.json']);
    expect(JSON.parse(readFileSync(join(out, 'report.json'), 'utf8'))).toEqual(report);
    const page = readFileSync(join(out, 'report.html'), 'utf8');
    expect(page).toContain('<title>run, made elastic</title>');
    expect(page).toMatch(/^<!doctype html>[\s\S]*<\/html>\n$/);
    expect(readdirSync(work).filter((name) => name.includes('partial'))).toEqual([]);
  });

  it('measures full, every budget and the baselines', () => {
    const levels = report.evaluation!.levels.map(({ method, budget }) => `${method} ${budget}`);
    expect(levels).toEqual(
      ['routed 1', 'routed 0.8', 'random 0.8', 'drop 0.8'].concat(['routed p60', 'random p60', 'drop p60']),
    );
    const [full, routed] = report.evaluation!.levels;
    expect(full).toMatchObject({ ratio: 1, timeRatio: 1, agreement: { value: 1 } });
    expect(routed.ratio).toBeLessThan(0.95);
    expect(routed.timeRatio).toBeGreaterThan(0);
  });

  it('shows routers against their targets, and the training', () => {
    expect(report.routing.maps.map(({ budget }) => budget)).toEqual([0.8, 'p60']);
    for (const {
      measured: { attn, mlp },
      target,
    } of report.routing.maps) {
      expect([...attn, ...mlp].every((share) => share >= 0 && share <= 1)).toBe(true);
      expect([...target.attn, ...target.mlp].every((share) => share !== null)).toBe(true);
      expect(attn).toHaveLength(report.model.layers);
    }
    expect(report.elastic.places).toBe('routers for attention of 8 layers, FFN of 8 layers, FFN blocks of 8 layers');
    expect(report.notes[0]).toMatch(/^Where tokens choose blocks of an FFN/);
    expect(report.training.points.map(({ step }) => step)).toEqual([1, 2, 3, 4]);
    expect(report.training.evaluations.length).toBeGreaterThan(0);
  });

  it('shows texts with the layers of every token', () => {
    expect(report.samples.map(({ label }) => label)).toEqual(['Full budget', 'Budget 0.8', 'Level p60']);
    for (const sample of report.samples) {
      expect(tokensOf(sample)).toBe(sample.prompt + sample.text);
      const bits = Buffer.from(sample.trace.attn + sample.trace.mlp, 'base64');
      expect(bits.every((bit) => bit <= 1)).toBe(true);
      expect(bits.includes(0)).toBe(sample.ratio < 1);
    }
    const { prompt } = report.samples[0];
    expect(prompt.length).toBeGreaterThan(10);
    expect(readFileSync(text, 'utf8').trimStart().startsWith(prompt)).toBe(true);
  });

  it('replaces a report, and nothing else', async () => {
    const again = ['report', trained, '--budgets', '0.8', '--prompt', 'Once', '--out'];
    expect(await run(...again, out)).toMatchObject({ code: 0 });
    expect(readdirSync(out).sort()).toEqual(['report.html', 'report.json']);
    const mine = join(work, 'mine');
    mkdirSync(mine);
    writeFileSync(join(mine, 'notes.txt'), 'x');
    const { code, stderr } = await run(...again, mine);
    expect(code).toBe(1);
    expect(stderr).toBe(
      `elastiform: [report] ${mine} exists and holds no report; choose another directory with --out\n`,
    );
    expect(readdirSync(mine)).toEqual(['notes.txt']);
  });
});

describe('without a text', () => {
  it('lies in the run, and counts what routers do on the texts it generates', async () => {
    const outcome = await run('report', trained, '--budgets', 'p70', '--prompt', 'It was <b>', '--json');
    expect(outcome.code).toBe(0);
    const report = json(outcome) as unknown as ReportData;
    expect(report.evaluation).toBeNull();
    expect(report.routing).toMatchObject({ on: 'the texts below, prompts included', maps: [{ budget: 'p70' }] });
    expect(report.samples.map(tokensOf)).toEqual(report.samples.map(({ prompt, text }) => prompt + text));
    expect(readdirSync(join(trained, 'report')).sort()).toEqual(['report.html', 'report.json']);
    const page = readFileSync(join(trained, 'report', 'report.html'), 'utf8');
    expect(page).toContain('&lt;');
    expect(page).not.toContain('<b>');
    // The run is still a model.
    expect(await run('inspect', trained)).toMatchObject({ code: 0 });
  });

  it('is a single page when --out names one', async () => {
    const page = join(work, 'new', 'page.html');
    const outcome = await run('report', trained, '--budgets', '0.7', '--out', page);
    expect(outcome).toMatchObject({ code: 0, stdout: `\nReport: ${page}\n` });
    expect(readdirSync(join(work, 'new'))).toEqual(['page.html']);
  });
});

describe('refuses, says what it expected, and writes nothing', () => {
  const out = join(work, 'none');
  const made = (name: string, change: (dir: string) => void): string => {
    const dir = join(work, name);
    cpSync(trained, dir, { recursive: true });
    change(dir);
    return dir;
  };
  const metrics = (dir: string): string => join(dir, 'metrics.jsonl');

  it.each<[string, () => string[], string]>([
    ['no directory', () => [join(work, 'nowhere')], 'nowhere does not exist; expected a directory written by'],
    ['a plain model', () => [shipped], 'metrics.jsonl cannot be read; expected a directory written by'],
    ['a plan', () => [plan], 'metrics.jsonl cannot be read'],
    [
      'a plan with metrics',
      () => {
        const dir = join(work, 'untrained');
        cpSync(plan, dir, { recursive: true });
        cpSync(metrics(trained), metrics(dir));
        return [dir];
      },
      'has no trained routers; expected a directory written by `elastiform distill`',
    ],
    [
      'an unfinished training',
      () => [made('unfinished', (dir) => rmSync(join(dir, 'config.json')))],
      'its training did not finish; run `elastiform distill` again to continue',
    ],
    [
      'damaged metrics',
      () => [made('damaged', (dir) => writeFileSync(metrics(dir), '{"type":"warn"}\n{"type":"st'))],
      'metrics.jsonl, line 2 is not an event of a training run',
    ],
    [
      'metrics that are none',
      () => [made('odd', (dir) => writeFileSync(metrics(dir), '{"type":"step","step":1,"loss":"<b>"}\n'))],
      'line 1 is not an event of a training run',
    ],
    ['no metrics', () => [made('empty', (dir) => writeFileSync(metrics(dir), ''))], 'records no training step'],
    ['missing data', () => [trained, '--data', join(work, 'no.txt')], 'no.txt'],
    ['a budget out of reach', () => [trained, '--budgets', '0.01'], 'budget 0.01 cannot be reached'],
    ['a level that is none', () => [trained, '--budgets', 'p1'], "'p1'"],
  ])('%s', async (_name, args, message) => {
    const { code, stdout, stderr } = await run('report', ...args(), '--out', out);
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
    expect(stderr).toMatch(/^elastiform: \[\w+\] [^\n]+\n$/);
    expect(stderr).toContain(message);
    expect(existsSync(out)).toBe(false);
  });

  it('bad usage is exit code 2', async () => {
    for (const args of [[], [trained, '--budgets', '2'], [trained, '--limit', '0'], [trained, '--seed', '-1']])
      expect(await run('report', ...args)).toMatchObject({ code: 2, stdout: '' });
  });

  it.skipIf(process.platform === 'win32')('a disk that takes no more', async () => {
    const limited = ['bash', '-c', 'ulimit -f 8; exec "$@"', 'bash'];
    for (const target of [out, `${out}.html`]) {
      const { code, stderr } = await start(['report', trained, '--out', target], limited).ended;
      expect(code).toBe(1);
      expect(stderr).toMatch(/elastiform: \[files\] cannot write .*: the file is larger than [^\n]*\n$/);
    }
    expect(readdirSync(work).filter((name) => name.startsWith('none'))).toEqual([]);
  });

  it.skipIf(process.platform === 'win32' || process.getuid?.() === 0)('a directory that takes nothing', async () => {
    const closed = join(work, 'closed');
    mkdirSync(closed);
    chmodSync(closed, 0o500);
    const { code, stderr } = await run('report', trained, '--out', join(closed, 'report'));
    expect(code).toBe(1);
    expect(stderr).toContain('permission denied');
  });

  it('an interrupted report: exit code 130', async () => {
    const running = start(['report', trained, ...measured, '--out', out]);
    running.child.stderr!.once('data', () => running.child.kill('SIGINT'));
    const { code, stderr } = await running.ended;
    expect(code).toBe(130);
    expect(stderr).toMatch(/elastiform: interrupted\n$/);
    expect(readdirSync(work).filter((name) => name.startsWith('none'))).toEqual([]);
  });
});
