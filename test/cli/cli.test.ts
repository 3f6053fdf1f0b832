// The command line from outside: help, exit codes, JSON, and the way from a plain model to text at a budget.
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it, vi } from 'vitest';
import type { NativeInfo } from '../../lib/native/index.js';
import { json, quickTraining, run, shipped, start, version, workDirectory } from './run.js';

vi.setConfig({ testTimeout: 120_000, hookTimeout: 120_000 });
const work = workDirectory();

describe('help', () => {
  it('without a command or with an unknown one: exit code 2', async () => {
    const [bare, unknown] = await Promise.all([run(), run('serve')]);
    expect(bare).toMatchObject({ code: 2, stderr: '' });
    expect(bare.stdout).toContain('Usage: elastiform <command>');
    expect(unknown).toMatchObject({ code: 2, stdout: '' });
    expect(unknown.stderr).toBe("elastiform: [cli] unknown command 'serve'; see elastiform --help\n");
  });

  it('names the version', async () => {
    expect(await run('--version')).toEqual({ code: 0, stdout: `${version}\n`, stderr: '' });
  });

  it('of every command shows its usage, its flags and an example', async () => {
    const overview = await run('--help');
    expect(overview).toMatchObject({ code: 0, stderr: '' });
    const names = [...overview.stdout.matchAll(/^ {2}([a-z]+) +\S/gm)].map((match) => match[1]);
    expect(names).toEqual(
      expect.arrayContaining([
        'doctor',
        'inspect',
        'elastify',
        'distill',
        'eval',
        'generate',
        'report',
        'pretrain',
        'demo',
      ]),
    );
    for (const name of names) {
      const { code, stdout, stderr } = await run(name, '--help');
      expect({ name, code, stderr }).toEqual({ name, code: 0, stderr: '' });
      expect(stdout).toContain(`Usage: elastiform ${name}`);
      expect(stdout).toContain('--json');
      expect(stdout.split('Example:\n')[1]).toMatch(new RegExp(`^( {2}elastiform ${name}( .+)?\n)+$`));
    }
  });
});

describe('bad usage: exit code 2 and one line that says what', () => {
  const data = join(work, 'train.txt');
  it.concurrent.each<[string[], string]>([
    [['doctor', '--colour'], "Unknown option '--colour'"],
    [['generate'], 'generate takes <model>, got none'],
    [['generate', shipped, 'more'], `generate takes <model>, got ${shipped} more`],
    [['generate', shipped, '--budget', '2'], "a budget must be in (0, 1], full or a level, got '2'"],
    [['generate', shipped, '--max-tokens', 'x'], "--max-tokens must be a number of at least 1, got 'x'"],
    [['generate', shipped, '--draft', 'p50'], '--draft and --draft-tokens go with --speculative'],
    [
      ['generate', shipped, '--speculative', '--draft-tokens', 'x'],
      "--draft-tokens must be a number of at least 1, got 'x'",
    ],
    [['generate', shipped, '--speculative'], 'this model has no level that costs less than the budget'],
    [['generate', shipped, '--ids', '1,a'], "--ids must be token ids separated by commas, got '1,a'"],
    [['generate', shipped, '--ids', '1', '--prompt', 'a'], 'give one of --prompt, --ids and --batch'],
    [['eval', shipped], 'the text to evaluate on is missing: give --data'],
    [['eval', shipped, '--data', 'a.txt,b.jsonl'], '--data must list text files or .jsonl files, not both'],
    [['report'], 'report takes <run>, got none'],
    [['elastify', shipped], 'elastify needs --out'],
    [['elastify', shipped, '--out', 'x', '--gate', 'soft'], '--gate must be one of'],
    [['distill', '--data', data, '--out', 'x'], 'the plan to train is missing'],
    [['distill', 'plan', '--out', 'x'], 'the training data is missing: give --data'],
    [['distill', 'plan', '--data', data], 'give --out'],
    [['distill', 'plan', '--data', data, '--loss', 'kl,mse=1'], 'KIND=WEIGHT of kl, reverse-kl'],
    [['distill', 'plan', '--data', data, '--teacher', 'a', '--teacher-cache', 'b'], 'not both'],
    [['cache-teacher', 'model', '--data', data], 'needs --out'],
    [['cache-teacher', 'model', '--out', 'x'], 'give --data'],
    [['distill', 'plan', '--data', data, '--loss', 'kl=0'], "got 'kl=0'"],
    [['distill', 'plan', '--data', data, '--loss', 'kl=1=2'], "got 'kl=1=2'"],
    [['pretrain', '--out', 'x'], "'model' is missing"],
  ])('%j', async (args, message) => {
    const { code, stdout, stderr } = await run(...args);
    expect({ code, stdout }).toEqual({ code: 2, stdout: '' });
    expect(stderr).toMatch(/^elastiform: \[cli\] [^\n]+\n$/);
    expect(stderr).toContain(message);
  });
});

type Doctor = NativeInfo & { device: Record<'asked' | 'used' | 'why', string> };

describe('the model in the repository', () => {
  it('doctor', async () => {
    const outcome = await run('doctor', '--json');
    expect(outcome).toMatchObject({ code: 0, stderr: '' });
    const report = json(outcome) as unknown as Doctor;
    expect(report).toMatchObject({ version, platform: `${process.platform}-${process.arch}` });
    expect(report.isaAvailable).toContain(report.isa);
    expect(report.device).toMatchObject({ asked: 'auto', used: report.devices.cuda.available ? 'cuda' : 'cpu' });
    if (!report.devices.cuda.available) {
      expect(report.device.why).toBe(`CUDA cannot be used: ${report.devices.cuda.description}`);
    }
    const { stdout } = await run('doctor');
    expect(stdout).toContain(`instructions  ${report.isa}`);
    expect(stdout).toContain(`--device auto  ${report.device.used}: ${report.device.why}`);
  });

  it('doctor of a device, which every command refuses that cannot be used', async () => {
    const { devices } = json(await run('doctor', '--json')) as unknown as Doctor;
    expect(await run('doctor', '--device', 'cpu')).toMatchObject({ code: 0, stderr: '' });
    expect(await run('doctor', '--device', 'tpu')).toMatchObject({ code: 2 });
    if (devices.cuda.available) return;
    const message = `[device] cuda cannot be used: ${devices.cuda.description}`;
    for (const args of [
      ['doctor', '--device', 'cuda'],
      ['demo', '--device', 'cuda', '--seconds', '1', '--out', join(work, 'demo')],
      ['generate', shipped, '--device', 'cuda', '--prompt', 'It'],
      [
        ...['elastify', shipped, '--nested', '0.5,1', '--rank', 'activation', '--device', 'cuda'],
        ...['--data', join(work, 'train.txt'), '--out', join(work, 'plan')],
      ],
    ]) {
      const { code, stderr } = await run(...args);
      expect(code, args.join(' ')).toBe(1);
      expect(stderr).toContain(message);
    }
  });

  it('inspect', async () => {
    const outcome = await run('inspect', shipped, '--json');
    expect(outcome).toMatchObject({ code: 0, stderr: '' });
    const config = JSON.parse(readFileSync(join(shipped, 'config.json'), 'utf8'));
    expect(json(outcome)).toMatchObject({
      dir: shipped,
      architecture: config.model_type,
      layers: config.num_hidden_layers,
      hidden: config.hidden_size,
      vocab: config.vocab_size,
      elastic: false,
      levels: [],
    });
    expect((await run('inspect', shipped)).stdout).toContain(`${config.num_hidden_layers} layers`);
  });

  it('generate at budget 1: the same text streamed, in JSON, and from ids', async () => {
    const flags = ['--max-tokens', '12', '--budget', '1'];
    const [plain, outcome] = [
      await run('generate', shipped, '--prompt', 'Call me', ...flags),
      await run('generate', shipped, '--prompt', 'Call me', ...flags, '--json'),
    ];
    expect(outcome).toMatchObject({ code: 0, stderr: '' });
    const { text, ids, finishReason, usage } = json(outcome) as Record<string, never>;
    expect(ids).toHaveLength(12);
    expect(finishReason).toBe('length');
    expect(usage).toMatchObject({ outputTokens: 12, compute: { requested: 1, ratio: 1 } });
    expect(plain).toMatchObject({ code: 0, stdout: `${text}\n` });
    expect(plain.stderr).toMatch(/^12 tokens \(length\), 100\.0 % of the full FLOPs, \d+ tokens\/s\n$/);
  });

  it('generate ends quietly when its reader goes away', async () => {
    const running = start(['generate', shipped, '--max-tokens', '200', '--temperature', '1', '--seed', '1']);
    running.child.stdout!.once('data', () => running.child.stdout!.destroy());
    expect(await running.ended).toMatchObject({ code: 0, stderr: '' });
  });

  it('eval at budget 1', async () => {
    const data = join(shipped, 'heldout.txt');
    const outcome = await run('eval', shipped, '--data', data, '--budgets', '1', '--limit', '600', '--json');
    expect(outcome.code).toBe(0);
    const { model, tokens, levels } = json(outcome) as { model: string; tokens: number; levels: object[] };
    expect(model).toBe(shipped);
    expect(tokens).toBeGreaterThanOrEqual(512);
    expect(levels).toHaveLength(1);
    expect(levels[0]).toMatchObject({ method: 'full', ratio: 1, kl: { value: 0 }, agreement: { value: 1 } });
  });
});

describe('from a plain model to text at a budget', () => {
  const plan = join(work, 'plan');
  const elastic = join(work, 'elastic');
  beforeAll(async () => {
    const outcome = await run('elastify', shipped, '--out', plan, '--json');
    expect(outcome).toMatchObject({ code: 0, stderr: '' });
    expect(json(outcome)).toMatchObject({ dir: plan, warnings: [] });
  });

  it('cache-teacher, and a distill that reads it', async () => {
    const cache = join(work, 'teacher');
    const sizes = ['--data', join(work, 'train.txt'), '--sequence-length', '32', '--seed', '1', '--top-k', '8'];
    const written = await run('cache-teacher', shipped, ...sizes, '--out', cache, '--json');
    expect(json(written)).toMatchObject({ dir: cache, shards: 1 });
    const other = ['--teacher-cache', cache, '--loss', 'jsd', '--steps', '1', '--out', join(work, 'cached')];
    const refused = await run('distill', plan, ...quickTraining(work), ...other);
    expect(refused).toMatchObject({ code: 1, stderr: expect.stringContaining('the loss cannot have jsd') });
  });

  it('elastify, distill, inspect, generate, eval', async () => {
    const options = ['--loss', 'kl=1,cross-entropy=0.1,topk-bce=0.1', '--steps', '3', '--out', elastic, '--json'];
    const training = await run('distill', plan, ...quickTraining(work), ...options);
    expect(training).toMatchObject({ code: 0 });
    expect(training.stderr).toMatch(/^distill 1\/\d+ {2}/);
    expect(json(training)).toMatchObject({ dir: elastic, step: 3, stopped: 'done', last: { step: 3, of: 3 } });
    expect(existsSync(join(elastic, 'metrics.jsonl'))).toBe(true);

    const inspected = json(await run('inspect', elastic, '--json'));
    expect(inspected).toMatchObject({ elastic: true, calibrated: true });
    expect((inspected.levels as unknown[]).length).toBeGreaterThan(1);

    const outcome = await run('generate', elastic, '--budget', '0.6', '--max-tokens', '8', '--ids', '5,6,7', '--json');
    expect(outcome).toMatchObject({ code: 0, stderr: '' });
    const { usage } = json(outcome) as { usage: { outputTokens: number; compute: { ratio: number } } };
    expect(usage.outputTokens).toBe(8);
    expect(usage.compute.ratio).toBeLessThan(1);

    // Drafts change no token. By themselves they come from a level of about half the FLOPs.
    const prompt = ['--ids', '5,6,7', '--max-tokens', '20', '--temperature', '1', '--seed', '3'];
    const [plain, drafted, auto, shown] = [
      await run('generate', elastic, ...prompt, '--json'),
      await run('generate', elastic, ...prompt, '--speculative', '--draft', 'p80', '--draft-tokens', '2', '--json'),
      await run('generate', elastic, ...prompt, '--speculative', '--json'),
      await run('generate', elastic, ...prompt, '--speculative', '--draft-tokens', '3'),
    ];
    for (const outcome of [drafted, auto]) expect(json(outcome).ids).toEqual(json(plain).ids);
    expect(json(drafted)).toMatchObject({ usage: { compute: { speculative: { level: 'p80' } } } });
    expect(json(auto)).toMatchObject({ usage: { compute: { speculative: { level: 'p50' } } } });
    expect(shown.stderr).toMatch(/ tokens\/s\n\d+ of \d+ drafted tokens accepted \(\d+\.\d %\)\n$/);

    // Three steps teach nothing: an agreement of 1 is out of reach, and that is exit code 3 after the whole report.
    const flags = ['--data', join(work, 'train.txt'), '--limit', '400', '--sequence-length', '64'];
    const evaluated = await run('eval', elastic, ...flags, '--budgets', '1,0.6', '--min-agreement', '1', '--json');
    expect(evaluated.code).toBe(3);
    expect(evaluated.stderr).toMatch(/elastiform: \[eval\] agreement .* at 0\.6 is below 100\.0 %\n$/);
    expect(json(evaluated).levels).toMatchObject([{ method: 'full' }, { method: 'routed', budget: 0.6 }]);
  });

  it('generate --batch: lines with adapters of their own', async () => {
    const [base, adapter] = ['llama-gqa', 'peft-llama'].map((name) => join(import.meta.dirname, '../golden', name));
    const file = join(work, 'adapted.jsonl');
    const line = { ids: [5, 6, 7], maxTokens: 40, temperature: 2, seed: 1 };
    writeFileSync(file, [line, { ...line, adapter: 'peft' }].map((line) => JSON.stringify(line)).join('\n'));
    const flags = ['--batch', file, '--adapters', `peft=${adapter}`, '--json'];
    const { results } = json(await run('generate', base, ...flags)) as { results: { ids: number[] }[] };
    const sampling = ['--max-tokens', '40', '--temperature', '2', '--seed', '1'];
    const single = ['generate', base, '--ids', '5,6,7', ...sampling, '--json'];
    expect(results[0].ids).toEqual(json(await run(...single)).ids);
    expect(results[1].ids).toEqual(json(await run(...single, '--adapter', adapter)).ids);
    expect(results[1].ids).not.toEqual(results[0].ids);
    const bad = await run('generate', base, '--batch', file, '--adapters', adapter);
    expect(bad).toMatchObject({ code: 2, stderr: expect.stringContaining('--adapters must be NAME=DIR') });
  });

  it('generate --batch: lines with budgets of their own, together, in order', async () => {
    const file = join(work, 'prompts.jsonl');
    const write = (...lines: unknown[]) =>
      writeFileSync(file, lines.map((line) => (typeof line === 'string' ? line : JSON.stringify(line))).join('\n'));
    const lines = [
      { ids: [5, 6, 7], budget: 'p60', maxTokens: 12 },
      { prompt: 'Call me', temperature: 1, seed: 3 },
      { prompt: 'Call me', budget: 0.8, maxTokens: 2, stop: ['x'] },
      { ids: [5], speculative: { draft: 'p80', tokens: 2 } },
    ];
    write(lines[0], '', ...lines.slice(1));
    const flags = ['--batch', file, '--max-tokens', '4'];
    const printed = await run('generate', elastic, ...flags);
    expect(printed).toMatchObject({ code: 0, stderr: expect.stringMatching(/generate 4\/4 {2}\d+ tokens/) });
    const results = printed.stdout
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line));
    const levels = results.map(({ usage: { outputTokens, compute } }) => [outputTokens, compute.level]);
    expect(levels).toEqual([
      [12, 'p60'],
      [4, 'full'],
      [2, null],
      [4, 'full'],
    ]);
    const single = ['--ids', '5,6,7', '--budget', 'p60', '--max-tokens', '12', '--json'];
    expect(results[0].ids).toEqual(json(await run('generate', elastic, ...single)).ids);
    const all = json(await run('generate', elastic, ...flags, '--json')) as { results: { ids: number[] }[] };
    expect(all.results.map(({ ids }) => ids)).toEqual(results.map(({ ids }) => ids));

    const bad = async (line: unknown, message: string) => {
      write(lines[0], line);
      const outcome = await run('generate', elastic, ...flags);
      expect(outcome).toMatchObject({ code: 1, stdout: '' });
      expect(outcome.stderr).toContain(`elastiform: [cli] ${file}:2: ${message}`);
    };
    await bad('{', 'Expected property name');
    await bad([1], 'it is no object');
    await bad({ budget: 1 }, "it must have 'prompt' or 'ids', not both");
    await bad({ prompt: 'a', maxtokens: 1 }, "unknown key 'maxtokens'");
    await bad({ ids: [1], maxTokens: -1 }, '[generate] maxTokens must be a positive integer, got -1');
    await bad({ ids: [1, 1e6] }, '[generate] prompt token 1 must be an id');
    expect((await run('generate', elastic, '--batch', join(work, 'none.jsonl'))).stderr).toContain('cannot read');
  });

  it('eval --record measures levels for budgets by quality and latency', async () => {
    const ask = (budget: string) => run('generate', elastic, '--budget', budget, '--max-tokens', '2', '--json');
    expect((await ask('quality:0.5')).stderr).toMatch(/quality of no level was measured yet/);
    expect((await ask('60000ms')).stderr).toMatch(/needs times measured on this device .*--record/);
    const flags = ['--data', join(work, 'train.txt'), '--sequence-length', '32', '--record', '--json'];
    const evaluated = await run('eval', elastic, ...flags);
    expect(evaluated.code).toBe(0);
    const { recorded } = json(evaluated) as { recorded: { levels: string[]; profile: string } };
    expect(recorded.levels).toContain('p80');
    expect(existsSync(recorded.profile)).toBe(true);
    // Every level keeps a minute, and only full surely agrees everywhere.
    for (const budget of ['60000ms', 'ttft:60000ms', 'tpot:60000ms', 'quality:1'])
      expect(json(await ask(budget))).toMatchObject({ usage: { compute: { level: 'full', ratio: 1 } } });
    expect((await ask('0.000001ms')).stderr).toMatch(/no level keeps 0\.000001 ms/);
  });

  it('a plan is refused below full budget until it is trained', async () => {
    const { code, stdout, stderr } = await run('generate', plan, '--budget', '0.6');
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
    expect(stderr).toMatch(/^elastiform: \[budget\] [^\n]*never trained[^\n]*\n$/);
  });
});
