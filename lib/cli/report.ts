// `elastiform report`: measures what `distill` trained and writes it as one page.
import { existsSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { loadModel } from '../infer/model.js';
import { FileSystemError, inFileSystem, writeFileAtomic } from '../io/files.js';
import { InvalidArgumentError, InvalidFileError } from '../native/errors.js';
import { reportHtml } from '../report/index.js';
import { type Command, exitCodes } from './command.js';
import { dataFlags, documentsOf, fileNames } from './data.js';
import { firstWords, measureModel, readTraining, replaceReport, reportOf, writeReport } from './reporting.js';
import { loadFlags, loadOptions, parseLevel } from './shared.js';

const defaultBudgets = [0.9, 0.8, 0.7, 0.6, 0.5];

export const reportCommand: Command = {
  name: 'report',
  summary: 'Measure a distilled model and write one self-contained page: quality, compute, time, routers, texts.',
  positionals: '<run>',
  flags: {
    out: {
      type: 'string',
      short: 'o',
      value: 'DIR|FILE.html',
      help: 'directory for the page, its data and CSV, or only the page (default: <run>/report)',
    },
    ...dataFlags,
    budgets: {
      type: 'string',
      short: 'b',
      value: 'B,...',
      help: `shares or levels besides full (default: ${defaultBudgets.join(',')})`,
    },
    prompt: { type: 'string', short: 'p', value: 'TEXT', help: 'beginning of the texts (default: of the data)' },
    limit: { type: 'string', value: 'N', help: 'tokens to evaluate at most (default: 8192)' },
    'sequence-length': { type: 'string', value: 'N', help: 'longest sequence in tokens (default: 256)' },
    seed: { type: 'string', value: 'N', help: 'seed of texts, of the random baseline and the intervals (default: 1)' },
    ...loadFlags,
  },
  example: 'elastiform report runs/tiny --data heldout.txt --out report',
  async run(context) {
    const { flags, positionals, json, print, printJson } = context;
    const started = performance.now();
    const [run] = positionals;
    const asked = flags.list('budgets')?.map(parseLevel);
    const limit = flags.integer('limit', { min: 1 });
    const sequenceLength = flags.integer('sequence-length', { min: 2 });
    const seed = flags.integer('seed', { min: 0, max: 2 ** 32 - 1 }) ?? 1;
    const options = loadOptions(context);
    const out = resolve(flags.string('out') ?? join(run, 'report'));
    const heldOut = await documentsOf(context, 'data');
    const training = await readRun(run);

    await using model = await loadModel(run, options);
    if (!model.info.calibrated) {
      throw new InvalidArgumentError(
        `[report] ${run} has no trained routers; expected a directory written by \`elastiform distill\``,
      );
    }
    const below = asked ?? defaultBudgets.filter((budget) => reachable(() => model.resolve(budget)));
    const budgets = [1, ...below.filter((budget) => !model.resolve(budget).full)];
    const report = async () => {
      const measured = await measureModel(context, model, {
        ...{ budgets: [...new Set(budgets)], seed, limit, sequenceLength },
        data: heldOut && { name: fileNames(context, 'data'), heldOut },
        prompt: flags.string('prompt') ?? (heldOut ? firstWords(heldOut[0]) : ''),
      });
      return reportOf(basename(resolve(run)), model, training, measured, started);
    };
    let page = out;
    let data: Awaited<ReturnType<typeof report>>;
    if (out.endsWith('.html')) {
      await inFileSystem('create', dirname(out), () => mkdir(dirname(out), { recursive: true }));
      data = await report();
      await writeFileAtomic(out, reportHtml(data));
    } else {
      page = join(out, 'report.html');
      data = await replaceReport('report', out, async (dir) => {
        const made = await report();
        await writeReport(dir, made);
        return made;
      });
    }
    if (json) printJson(data);
    else print(`\nReport: ${page}\n`);
    return exitCodes.ok;
  },
};

/** How the model of a run was trained; errors say what the directory lacks. */
async function readRun(run: string) {
  if (!existsSync(run)) {
    throw new FileSystemError(`[report] ${run} does not exist; expected a directory written by \`elastiform distill\``);
  }
  const training = await readTraining(run);
  if (!existsSync(join(run, 'config.json'))) {
    throw new InvalidFileError(
      `[report] ${run} holds no model: its training did not finish; run \`elastiform distill\` again to continue`,
    );
  }
  return training;
}

function reachable(resolve: () => unknown): boolean {
  try {
    resolve();
    return true;
  } catch (error) {
    if (error instanceof InvalidArgumentError) return false;
    throw error;
  }
}
