// The command line with bad data, a full disk, an interruption, a kill, and company in its output directory.
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { beforeAll, describe, expect, it, vi } from 'vitest';
import { json, quickTraining, run, shipped, start, workDirectory } from './run.js';

vi.setConfig({ testTimeout: 120_000, hookTimeout: 120_000 });
const work = workDirectory();
const plan = join(work, 'plan');
beforeAll(async () => {
  expect(await run('elastify', shipped, '--layers', '2,5', '--out', plan)).toMatchObject({ code: 0, stderr: '' });
});

/** What a run leaves in its output directory. */
const listing = (dir: string): string[] => (existsSync(dir) ? readdirSync(dir, { recursive: true }).map(String) : []);

describe('bad data: exit code 1 and one line that names it', () => {
  /** A copy of the shipped model, spoilt. */
  const spoilt = (name: string, spoil: (dir: string) => void): string => {
    const dir = join(work, name);
    cpSync(shipped, dir, { recursive: true });
    spoil(dir);
    return dir;
  };
  const write = (name: string, text: string | Uint8Array): string => {
    const path = join(work, name);
    writeFileSync(path, text);
    return path;
  };
  it.concurrent.each<[string, () => string[], string]>([
    ['a missing model', () => ['generate', join(work, 'none')], 'does not exist'],
    ['a model that is a file', () => ['inspect', write('file', '')], 'file'],
    [
      'truncated weights',
      () => [
        'generate',
        spoilt('truncated', (dir) => {
          const path = join(dir, 'model.safetensors');
          writeFileSync(path, readFileSync(path).subarray(0, 5000));
        }),
      ],
      'truncated/model.safetensors',
    ],
    [
      'an unknown architecture',
      () => ['inspect', spoilt('mamba', (dir) => writeFileSync(join(dir, 'config.json'), '{"model_type":"mamba"}'))],
      'mamba/config.json',
    ],
    [
      'a broken tokenizer',
      () => ['generate', spoilt('mute', (dir) => writeFileSync(join(dir, 'tokenizer.json'), '{')), '--prompt', 'a'],
      'mute/tokenizer.json',
    ],
    [
      'weights that are not numbers',
      () => [
        'generate',
        spoilt('nan', (dir) => {
          const path = join(dir, 'model.safetensors');
          const bytes = readFileSync(path);
          bytes.fill(0xff, bytes.length - 4096); // bf16 0xffff is NaN
          writeFileSync(path, bytes);
        }),
      ],
      'NaN',
    ],
    ['a token id past the vocabulary', () => ['generate', shipped, '--ids', '5,2048'], 'prompt token 1 must be an id'],
    ['a prompt past the context', () => ['generate', shipped, '--ids', Array(600).fill(7).join()], '512'],
    ['a missing text', () => ['eval', shipped, '--data', join(work, 'no.txt')], 'no.txt'],
    ['an empty text', () => ['eval', shipped, '--data', write('empty.txt', '')], 'empty'],
    ['a text that is not UTF-8', () => ['eval', shipped, '--data', write('latin.txt', Buffer.of(0x61, 0xff))], 'UTF-8'],
    [
      'lines without text',
      () => ['distill', plan, '--data', write('a.jsonl', '{"a":1}\n'), '--steps', '1', '--out', join(work, 'no-run')],
      "a.jsonl:1 has no text in field 'text'",
    ],
    [
      'an empty data set',
      () => ['distill', plan, '--data', write('none.jsonl', '\n'), '--steps', '1', '--out', join(work, 'no-run')],
      'the data set is empty',
    ],
    [
      'a configuration that is no YAML',
      () => ['distill', plan, '-c', write('bad.json', '{'), '--out', join(work, 'no-run')],
      'bad.json, line 1: Flow map must end with a }',
    ],
    [
      'an unknown key in a configuration',
      () => ['distill', plan, '-c', write('key.json', '{"colour":1,"steps":1}'), '--data', join(work, 'train.txt')],
      "unknown option 'colour'",
    ],
    [
      'a capacity above 1',
      () => ['elastify', shipped, '--mlp', '2', '--out', join(work, 'no-plan')],
      'capacity must be in (0, 1], got 2',
    ],
    [
      'a capacity of 0 beside a good one',
      () => ['elastify', shipped, '--attn', '0', '--mlp', '0.5', '--out', join(work, 'no-plan')],
      'tokens.attn: capacity must be in (0, 1], got 0',
    ],
    [
      'a file in the place of the plan',
      () => ['elastify', shipped, '--out', write('taken', '')],
      'taken: a part of the path is not a directory',
    ],
    [
      'a file in the place of the parent',
      () => ['elastify', shipped, '--out', join(write('taken', ''), 'plan')],
      'taken: something of another kind is there',
    ],
    [
      'a file in the place of the run',
      () => ['distill', plan, ...quickTraining(work), '--steps', '1', '--out', write('taken', '')],
      'taken: something of another kind is there',
    ],
    [
      'a layer that is not there',
      () => ['elastify', shipped, '--layers', '8', '--out', join(work, 'no-plan')],
      'layers must be ids from 0 to 7, got 8',
    ],
    ['an output directory that holds something else', () => ['elastify', shipped, '--out', work], 'is not a plan'],
  ])('%s', async (_, args, message) => {
    const given = args();
    const out = given[0] === 'distill' && !given.includes('--out') ? ['--out', join(work, 'no-run')] : [];
    const { code, stdout, stderr } = await run(...given, ...out);
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
    expect(stderr).toMatch(/^elastiform: \[[^\n]+\n$/);
    expect(stderr).toContain(message);
    expect(listing(join(work, 'no-plan'))).toEqual([]);
    expect(listing(join(work, 'no-run'))).toEqual([]);
  });
});

// A limit on the size of files stands in for the full disk: the failing write comes back as an error just so.
describe.skipIf(process.platform === 'win32')('a disk that takes no more', () => {
  const limited = (kibibytes: number): string[] => ['bash', '-c', `ulimit -f ${kibibytes}; exec "$@"`, 'bash'];

  it('elastify leaves nothing behind', async () => {
    const out = join(work, 'full', 'plan');
    mkdirSync(join(work, 'full'));
    const { code, stderr } = await start(['elastify', shipped, '--out', out], limited(1)).ended;
    expect(code).toBe(1);
    expect(stderr).toMatch(/^elastiform: \[files\] cannot write .*: the file is larger than [^\n]*\n$/);
    expect(listing(join(work, 'full'))).toEqual([]);
  });

  it('distill says so when not even a line of metrics fits', async () => {
    const training = ['distill', plan, ...quickTraining(work), '--steps', '50', '--out', join(work, 'full-metrics')];
    const { code, stderr } = await start(training, limited(1)).ended;
    expect(code).toBe(1);
    expect(stderr).toMatch(/^elastiform: \[files\] cannot append to .*metrics\.jsonl: the file is larger/m);
    expect(listing(join(work, 'full-metrics'))).toEqual(['metrics.jsonl']);
  });

  it('distill keeps no half of a checkpoint and gives the directory back', async () => {
    const out = join(work, 'full-run');
    const training = ['distill', plan, ...quickTraining(work), '--steps', '2', '--out', out];
    // The parameters fit, the moments of the optimizer, twice as large, do not.
    const { code, stderr } = await start(training, limited(3)).ended;
    expect(code).toBe(1);
    expect(stderr).toMatch(/^elastiform: \[files\] cannot write .*optimizer\.safetensors: the file is larger/m);
    expect(listing(out).sort()).toEqual(['checkpoints', 'metrics.jsonl']);
    // With room again it goes on.
    expect(await run(...training)).toMatchObject({ code: 0 });
  });
});

describe('a training in company', () => {
  const out = join(work, 'run');
  const training = ['distill', plan, ...quickTraining(work), '--steps', '1000000', '--out', out, '--json'];

  /** Steps recorded in metrics.jsonl. */
  const steps = (): number[] => {
    const path = join(out, 'metrics.jsonl');
    const lines = existsSync(path) ? readFileSync(path, 'utf8').split('\n').slice(0, -1) : [];
    return lines.map((line) => JSON.parse(line)).flatMap((event) => (event.type === 'step' ? [event.step] : []));
  };
  const until = async (done: () => boolean): Promise<void> => {
    for (const end = Date.now() + 100_000; !done(); ) {
      if (Date.now() > end) throw new Error(`waited in vain; steps so far: ${steps().length}`);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  };
  const startAfter = async (count: number) => {
    const running = start(training);
    await Promise.race([
      until(() => steps().length > count),
      running.ended.then(({ stderr }) => Promise.reject(new Error(`ended early: ${stderr}`))),
    ]);
    return running;
  };
  const newest = () => {
    const names = listing(join(out, 'checkpoints')).filter((name) => /^step-\d+$/.test(name));
    return Math.max(...names.map((name) => Number(name.slice(5))));
  };

  it('refuses a second one, saves at Ctrl-C, resumes, and takes over from a killed one', async () => {
    const first = await startAfter(0);
    const second = await run(...training);
    expect(second).toMatchObject({ code: 1, stdout: '' });
    expect(second.stderr).toMatch(
      new RegExp(`^elastiform: \\[files\\] .* is being written by process ${first.child.pid} on [^\\n]*\\n$`),
    );
    first.child.kill('SIGINT');
    const interrupted = await first.ended;
    expect(interrupted.code).toBe(130);
    const { step, stopped } = json(interrupted) as { step: number; stopped: string };
    expect(stopped).toBe('signal');
    expect(step).toBeGreaterThanOrEqual(1);
    expect(newest()).toBe(step);
    expect(steps().at(-1)).toBe(step);
    expect(listing(out)).not.toContain('.elastiform.lock');
    expect(listing(out).filter((name) => /partial|tmp/.test(basename(name)))).toEqual([]);

    const resumed = await startAfter(step);
    resumed.child.kill('SIGKILL');
    expect((await resumed.ended).code).toBe(null);
    expect(listing(out)).toContain('.elastiform.lock');

    // What the killed one did after its last checkpoint is done again.
    const third = await startAfter(steps().length);
    third.child.kill('SIGINT');
    const last = json(await third.ended) as { step: number };
    expect(last.step).toBeGreaterThan(step);
    // Every step once, in order, across the interruption and the kill.
    expect(steps()).toEqual(Array.from({ length: last.step }, (_, i) => i + 1));
  });

  it('elastify twice at once into one directory: a whole plan, and at most one refusal', async () => {
    const twice = join(work, 'twice');
    const both = await Promise.all([0, 1].map(() => run('elastify', shipped, '--out', twice)));
    expect(both.filter(({ code }) => code === 0).length).toBeGreaterThan(0);
    for (const { code, stderr } of both) {
      if (code !== 0) expect(stderr).toMatch(/^elastiform: \[elastify\] cannot write .*another process may be writing/);
    }
    expect(await run('inspect', twice)).toMatchObject({ code: 0, stderr: '' });
    expect(readdirSync(work).filter((name) => name.startsWith('twice'))).toEqual(['twice']);
    expect(statSync(twice).isDirectory()).toBe(true);
  });
});
