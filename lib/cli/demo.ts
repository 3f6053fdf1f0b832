// `elastiform demo`: makes a model elastic, measures it against baselines and writes a report, in about two minutes.
import { existsSync } from 'node:fs';
import { copyFile, rm } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { splitHeldOut } from '../distill/data.js';
import { distill } from '../distill/distill.js';
import { elastify } from '../elastic/elastify.js';
import { loadModel } from '../infer/model.js';
import type { EvalReport } from '../infer/quality/evaluate.js';
import { InvalidArgumentError } from '../native/errors.js';
import { type DeviceChoice, deviceChoices, loadAddon } from '../native/index.js';
import type { ReportData } from '../report/index.js';
import { type Command, type CommandContext, exitCodes } from './command.js';
import { documentsOf, fileNames, readTexts } from './data.js';
import { machineLine } from './doctor.js';
import { firstWords, measureModel, readTraining, replaceReport, reportOf, writeReport } from './reporting.js';
import { loadFlags, percent } from './shared.js';
import { trainingReporter } from './training.js';

const shippedModel = resolve(dirname(fileURLToPath(import.meta.url)), '../../models/tiny');
const budgets = [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4];
const defaultSeconds = 75;
const probeSteps = 4;
const seed = 1;

export const demo: Command = {
  name: 'demo',
  summary: 'Make a small model elastic, compare it with baselines at equal compute and write a report.',
  positionals: '',
  flags: {
    model: { type: 'string', value: 'DIR', help: 'model to make elastic (default: the one in the package)' },
    data: {
      type: 'string',
      value: 'FILE,...',
      help: 'text to train and evaluate on (default: the text beside the model)',
    },
    field: { type: 'string', value: 'NAME', help: 'field of .jsonl lines that holds the text (default: text)' },
    out: { type: 'string', short: 'o', value: 'DIR', help: 'directory to write (default: demo-out)' },
    seconds: { type: 'string', value: 'N', help: `time for training (default: ${defaultSeconds})` },
    device: loadFlags.device,
    threads: loadFlags.threads,
  },
  example: 'elastiform demo --model models/mine --data book.txt --seconds 60',
  async run(context) {
    const { flags, json, printJson, signal } = context;
    const dir = flags.string('model') ?? shippedModel;
    const out = resolve(flags.string('out') ?? 'demo-out');
    const seconds = flags.number('seconds', { min: 1 }) ?? defaultSeconds;
    const device = flags.choice('device', deviceChoices);
    const threads = flags.integer('threads', { min: 1 });
    if (threads !== undefined) loadAddon().setThreads(threads);
    const texts = await demoTexts(context, dir);
    const report = await replaceReport('demo', out, (work) => runDemo(context, { dir, work, seconds, texts, device }));
    if (json) printJson(report);
    else
      context.print(
        `\nReport: ${join(out, 'report.html')}\nTry: npx elastiform generate ${join(out, 'model')} --budget 0.6\n`,
      );
    return signal.aborted ? exitCodes.interrupted : exitCodes.ok;
  },
};

interface Texts {
  name: string;
  train: string[];
  heldOut: string[];
}

async function demoTexts(context: CommandContext, dir: string): Promise<Texts> {
  const given = await documentsOf(context, 'data');
  if (given) return { name: fileNames(context, 'data'), ...splitHeldOut(given, 0.15, seed) };
  const files = ['train.txt', 'heldout.txt'].map((name) => join(dir, name));
  const missing = files.find((file) => !existsSync(file));
  if (missing) {
    const advice = existsSync(dir) ? 'give --data FILE' : 'give --model DIR';
    throw new InvalidArgumentError(`[demo] ${missing} does not exist; ${advice}`);
  }
  return { name: 'heldout.txt', train: await readTexts([files[0]]), heldOut: await readTexts([files[1]]) };
}

interface Setting {
  dir: string;
  /** Directory that becomes the output. */
  work: string;
  seconds: number;
  texts: Texts;
  device?: DeviceChoice;
}

async function runDemo(context: CommandContext, setting: Setting): Promise<ReportData> {
  const { dir, work, texts, device } = setting;
  const say = (line: string): void => {
    if (!context.json) context.print(`${line}\n`);
  };
  const started = performance.now();
  say(`Machine: ${machineLine()}`);

  const planDir = join(work, 'plan');
  const modelDir = join(work, 'model');
  const plan = await elastify(dir, { kind: 'elastiformer' }, { out: planDir });
  say(
    `Routers: ${plan.trainableParameters} parameters attached, ${percent(plan.trainableShare, 3)} of ${basename(resolve(dir))}`,
  );

  const training = await train(context, planDir, modelDir, setting);
  say(
    `Trained: ${training.steps} steps in ${training.seconds!.toFixed(0)} s, ${Math.round(training.tokensPerSecond)} tokens/s`,
  );
  await copyFile(join(modelDir, 'metrics.jsonl'), join(work, 'metrics.jsonl'));
  await rm(join(modelDir, 'checkpoints'), { recursive: true, force: true });
  await rm(planDir, { recursive: true });

  await using model = await loadModel(modelDir, { ...(device && { device }), signal: context.signal });
  const measured = await measureModel(context, model, {
    budgets,
    data: { name: texts.name, heldOut: texts.heldOut, calibration: texts.train },
    prompt: firstWords(texts.heldOut[0]),
    seed,
  });
  for (const line of measured.evaluated ? advantages(measured.evaluated) : []) say(line);
  for (const { label, ratio, prompt, text } of measured.samples)
    say(`\n${label}, ${percent(ratio)} of the FLOPs:\n${prompt}${text}`);

  const report = reportOf(basename(resolve(dir)), model, training, measured, started);
  await writeReport(work, report);
  return report;
}

/** Trains for about `seconds`: a few steps tell how long one takes, so that the schedule ends when the time does. */
async function train(
  context: CommandContext,
  plan: string,
  out: string,
  { texts, seconds, device }: Setting,
): Promise<ReportData['training']> {
  const common = {
    plan,
    data: { kind: 'documents', documents: texts.train } as const,
    batchTokens: 1024,
    sequenceLength: 256,
    seed,
    resume: false,
    ...(device && { device }),
    signal: context.signal,
  } as const;
  const probe = `${out}-probe`;
  let rate = 0;
  const enough = new AbortController();
  await distill({
    ...common,
    out: probe,
    steps: probeSteps + 1,
    signal: AbortSignal.any([context.signal, enough.signal]),
    onEvent: (event) => {
      if (event.type !== 'step') return;
      rate = Math.max(rate, event.tokensPerSecond);
      // Stopped, not finished: it is not calibrated.
      if (event.step === probeSteps) enough.abort();
    },
  });
  await rm(probe, { recursive: true, force: true });
  context.signal.throwIfAborted();
  const steps = Math.max(20, Math.round((seconds * rate) / common.batchTokens));

  const reporter = trainingReporter('distill');
  let started = performance.now();
  let ended = started;
  const result = await distill({
    ...common,
    out,
    steps,
    saveEvery: steps,
    onEvent: (event) => {
      reporter.event(event);
      if (event.type === 'measure' && event.what === 'sensitivity') started = performance.now();
      if (event.type !== 'step') return undefined;
      ended = performance.now();
      // A machine that became slower must not take for ever.
      return ended - started > seconds * 1500 ? 'stop' : undefined;
    },
  }).finally(() => reporter.finish());
  if (result.stopped === 'signal') context.signal.throwIfAborted();
  return { ...(await readTraining(out)), seconds: (ended - started) / 1000 };
}

function advantages({ levels }: EvalReport): string[] {
  return levels
    .filter((l) => l.budget === 0.7 && l.routedAdvantage)
    .map(({ method, routedAdvantage }) => {
      const { kl, agreement } = routedAdvantage!;
      const points = (x: number): string => (x * 100).toFixed(1);
      return `Learned routing against ${method} at 0.7: agreement ${points(agreement.value)} points higher [${points(agreement.low)}, ${points(agreement.high)}], KL ${kl.value.toFixed(3)} lower [${kl.low.toFixed(3)}, ${kl.high.toFixed(3)}]`;
    });
}
